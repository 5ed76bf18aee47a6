"""Constraints on weights."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .._engine import checks
from .._engine.arithmetic import LeafRule, Strength
from .._engine.groups import check_even
from .._engine.loop import Action, transformation
from .._engine.radii import InitialNorm, check_kept, check_radius, warn_of_single_weights, warn_of_zeros
from .._engine.text import shown
from .._engine.types import Mask, Rate, StackedAxes
from ..constraints import Constraint, L2Sphere, is_ours
from ..paths import stacks

PyTree = Any


@checks.known_arguments
def constrain(
    kind: Constraint,
    radius: Rate | Literal["init"] | None = None,
    mask: Mask = None,
    *,
    stacked_axes: StackedAxes | None = None,
) -> optax.GradientTransformation:
    """Moves the weights, after the optimizer's step, to the nearest weights that obey a constraint.

    Rule:   p + u <- kind.project(p + u, radius). An element that the projection leaves alone keeps the bits of u.
    Place:  last in the chain, after the learning rate and after every decay.
    Units:  the radius is in units of the weights, and the learning rate does not scale it. A radius of 0 makes all
            weights 0.
    Source: projected gradient descent, Goldstein 1964; Keras' `kernel_constraint`. Deviation: Keras projects after the
            step. Here the update is changed instead. So three things are rounded: the projection, the update, and the
            sum of weight and update. With `L2Ball` and `L2Sphere` in float32, each weight is off by a few units in the
            last place of the weight or of the update, whichever is larger.

    Args:
        kind: a constraint: `L2Ball(per=-1)`, `L2Sphere()`, `L1Ball()`, `SpectralBall()`, `NonNegative()`, or your own
            `Constraint`.
        radius: a number >= 0, a 0-d array, a schedule, a `by_path` table or a tree like params of these, or of arrays
            with one radius for each group. "init" is the norm of each group at `init`, before any projection, for each
            layer of a stack; the state keeps it. `NonNegative()` has no radius: write
            `constrain(NonNegative(), mask=mask)`.
        mask: as `decoupled_decay`, for whole parameters.
        stacked_axes: as `add_penalty_to_grads`.

    Returns: an `optax.GradientTransformation` with a `DecayState`, whose `leaf` holds the radii of "init". Its `update`
    needs `params`. Updates keep their dtype.
    Raises: TypeError or ValueError, when built, for a kind without a `project`, and for a radius that is missing, not
            wanted, negative or not a scalar; at `update`, if a radius differs within a group. Otherwise as
            `decoupled_decay`.
    Warns:  UserWarning at `init`, if the radius is "init" and the weights of a group are all zero: they will stay zero;
            and if each weight is a sphere of its own, as in a bias under `L2Sphere(per=-1)`.

    Example:

        >>> import jax.numpy as jnp, optax, wdjax
        >>> optimizer = optax.chain(optax.sgd(1.0), wdjax.constrain(wdjax.L2Ball(), 5.0))
        >>> params = jnp.array([3.0, 4.0])
        >>> updates, _ = optimizer.update(jnp.array([-3.0, -4.0]), optimizer.init(params), params)
        >>> optax.apply_updates(params, updates).tolist()
        [3.0, 4.0]
    """
    where = "constrain"
    _check_kind(where, kind, radius)
    is_init = isinstance(radius, str) and radius == "init"
    rates = {} if is_init or radius is None else {"radius": radius}
    action = Action(where, rates, mask, off_at=None, stacked_axes=stacks(where, stacked_axes))
    rule = LeafRule(
        _Projected(kind, is_init),
        InitialNorm(kind) if is_init else None,
        is_elementwise=getattr(kind, "is_elementwise", False) and not is_init,
        is_kept=is_ours(kind),
    )
    plain = transformation(action, rule)

    def init_fn(params: PyTree) -> Any:
        state = plain.init(params)
        if is_init:
            warn_of_zeros(action, params, state, "stay zero")
        if isinstance(kind, L2Sphere):
            warn_of_single_weights(action, kind, params, "can only be the radius or minus the radius")
        return state

    return optax.GradientTransformationExtraArgs(init_fn, plain.update)


def _check_kind(where: str, kind: Any, radius: Any) -> None:
    if isinstance(kind, type) or not callable(getattr(kind, "project", None)):
        name = kind.__name__ if isinstance(kind, type) else "L2Ball"
        raise TypeError(
            f"{where}: kind must be a constraint with the method project, got {shown(kind)}. Write "
            f"{where}({name}(), radius=1.0), with {name} from wdjax; a constraint of your own needs that method."
        )
    has_radius = getattr(kind, "has_radius", True)
    if has_radius and radius is None:
        raise TypeError(
            f"{where}: {shown(kind)} needs a radius, got None. Write {where}({shown(kind)}, radius=1.0), or "
            "radius='init' for the norm at init."
        )
    if not has_radius and radius is not None:
        raise TypeError(
            f"{where}: {shown(kind)} has no radius, but radius={shown(radius)} was given. Write "
            f"{where}({shown(kind)}, mask=...)."
        )
    is_init = check_radius(where, radius, shown(kind))
    if is_init and not callable(getattr(kind, "norm", None)):
        raise TypeError(
            f"{where}: radius='init' needs the method norm, which {shown(kind)} lacks. Give the radius as a number, or "
            "add norm(w): the smallest radius that w obeys."
        )


@dataclasses.dataclass(frozen=True)
class _Projected:
    kind: Constraint
    is_init: bool

    def __call__(
        self, update: jax.Array, p: jax.Array, a: Any, given: Strength, state: Any, totals: Any
    ) -> tuple[jax.Array, Any]:
        radius: Any = None
        if getattr(self.kind, "has_radius", True):
            radius = state if self.is_init else given.value
            if self.is_init:
                check_kept("constrain", self.kind, state, p)
            check_even("constrain", "radius", self.kind, radius)
        landed = p + update
        new = self.kind.project(landed, radius)
        if np.shape(new) != landed.shape:
            raise ValueError(
                f"{shown(self.kind)}: project must return an array of shape {landed.shape}, but it returned the shape "
                f"{np.shape(new)}."
            )
        # Where nothing changes, the value is the update itself, and the derivative is still that of the projection.
        moved = new - p
        same = jax.lax.stop_gradient(update) - (jax.lax.stop_gradient(moved) - moved)
        moved = jnp.where((new == landed) & jnp.isfinite(moved), same, moved)
        return jnp.where(jnp.isfinite(landed), moved, update), state  # No projection hides a fault.
