"""Constrained parameter regularization: a bound on a penalty, held by a multiplier that adapts to it."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .._engine import checks, mesh_axes
from .._engine.arithmetic import LeafRule, Strength, compute_dtype, minus
from .._engine.loop import Action, transformation
from .._engine.rules import Rules, check_no_mask, possible_values
from .._engine.text import shown
from .._engine.types import Mask, Rate, StackedAxes
from ..paths import stacks
from ..penalties import Penalty, check_kind, gradient, is_ours, value
from .bounds import TAKEN, AtInit, InflectionPoint, WarmStart


@checks.known_arguments
def cpr(
    kind: Penalty,
    bound: Rate | AtInit | WarmStart | InflectionPoint,
    mask: Mask = None,
    *,
    update_rate: float = 1.0,
    axis_name: Any = None,
    stacked_axes: StackedAxes | None = None,
) -> optax.GradientTransformation:
    """Holds a penalty of each parameter at or below a bound, by a decay that grows while it is above the bound.

    Rule:   m <- max(m + update_rate * (kind.value(p) - bound) / size of p, 0); u <- u - m * kind.gradient(p). The
            multiplier m starts at 0, one for each parameter and for each layer of a stack. While the bound is not known
            or never exceeded, m is 0, and updates do not change (subnormal ones may become 0).
    Place:  last in the chain, after the learning rate, before `constrain`.
    Units:  the bound is in units of kind.value, which is a sum over the parameter: for a norm of at most r under `L2`,
            write r**2 / 2. The update_rate is per step and per mean of the penalty over the weights, so that its effect
            does not depend on the shape. m is per step: the learning rate does not scale it. Where the weights settle,
            m is the learning rate of SGD times the Lagrange multiplier of the bound. Under `L2`, a step multiplies
            weights by 1 - m, and m oscillates ever more if update_rate times the mean of p**2 is above 4.
    Source: Franke et al. 2023, arXiv 2311.09058 (Algorithm 1), and their code, automl/CPR. Deviations of the code: it
            takes the penalty and its gradient after the optimizer's step. It has no 1/2 in L2: its bound k and rate r
            are bound=k / 2, update_rate=4 * r here; for Huber and L1 they are the same. It divides by the size, the
            algorithm in the paper does not.

    Args:
        kind: a penalty: `L2()`, `Huber(delta)`, or your own `Penalty`. With one that has a corner at zero, such as
            `L1()`, and a low bound, m may grow without end. There, use `constrain(L1Ball(), radius)`.
        bound: a number >= 0, a 0-d array, a schedule, a `by_path` table or a tree like params of these. Or from the
            weights: `AtInit(0.8)`, `WarmStart(1000)`, `InflectionPoint(every=200)`.
        mask: as `decoupled_decay`, for whole parameters.
        update_rate: a number > 0: how fast m follows the excess over the bound.
        axis_name: within `shard_map`, the mesh axis, or a tuple of axes, that splits parameters, as `l2_penalty`. Pass
            a mesh axis that splits norms to the penalty instead: `GroupLasso(axis_name="data")`.
        stacked_axes: as `add_penalty_to_grads`.

    Returns:
        An `optax.GradientTransformation` with a `DecayState`. Its `leaf` has an array for each parameter, whose last
        axis holds m, the bound (inf until it is known), and for `InflectionPoint` three numbers more. Its `update`
        needs `params`. Updates keep their dtype.

    Raises:
        TypeError, ValueError: for a kind without a value, and for a bound that is negative, differs within a parameter
            or is missing; otherwise as `decoupled_decay`.

    Example:

        >>> import jax.numpy as jnp, optax, wdjax
        >>> optimizer = optax.chain(optax.sgd(0.1), wdjax.on_weights.cpr(wdjax.L2(), bound=0.5))
        >>> params, target = jnp.zeros(2), jnp.array([3.0, 4.0])
        >>> state = optimizer.init(params)
        >>> for _ in range(200):
        ...     updates, state = optimizer.update(params - target, state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> [round(float(w), 4) for w in params]  # The nearest weights of norm 1.
        [0.6, 0.8]
    """
    where = "cpr"
    check_kind(where, kind, "value")
    _check_bound(where, kind, bound)
    axes = mesh_axes.names(where, axis_name)
    if set(axes) & set(mesh_axes.names(where, own := getattr(kind, "axis_name", None))):
        raise ValueError(
            f"{where}: {shown(kind)} already takes its norms over all devices of {own!r}, so axis_name={axis_name!r} "
            f"would count each norm once per device. Leave axis_name out of {where}."
        )
    write = f"{where}({shown(kind)}, bound, update_rate=1.0)"
    if isinstance(update_rate, jax.Array):
        raise TypeError(
            f"{where}: update_rate is a constant of the program, so it can't be an array or traced. Write {write}."
            f"{checks.static('update_rate', update_rate)}"
        )
    is_taken = isinstance(bound, TAKEN)
    rates = {"bound": bound.due if is_taken else bound}
    rule = LeafRule(
        _Held(
            kind,
            checks.positive(where, "update_rate", update_rate, write),
            axes,
            is_taken,
            bound.smoothing if isinstance(bound, InflectionPoint) else None,
        ),
        _Start(isinstance(bound, InflectionPoint)),
        is_kept=is_ours(kind),
    )
    action = Action(where, rates, mask, off_at=None, stacked_axes=stacks(where, stacked_axes))
    return transformation(action, rule, is_decay=True)


def _check_bound(where: str, kind: Any, bound: Any) -> None:
    write = f"{where}({shown(kind)}, AtInit(0.8), only('kernel'))"
    if bound is None or isinstance(bound, (str, type)):
        raise TypeError(
            f"{where}: bound must be a number, a 0-d array, a schedule (a function of the step) or a by_path table of "
            f"these, or AtInit(factor), WarmStart(steps) or InflectionPoint() of wdjax.on_weights, got {shown(bound)}. "
            f"Write {write}."
        )
    check_no_mask(where, "bound", bound, f"{where}({shown(kind)}, bound=1.0, mask=...)")
    given = possible_values(bound) if isinstance(bound, Rules) else jax.tree.leaves(bound)
    taken = [value for value in given if isinstance(value, TAKEN)]
    if taken and not isinstance(bound, TAKEN):
        raise TypeError(
            f"{where}: {shown(taken[0])} is not for tables and trees. Write {write}, and another one for the other "
            "parameters."
        )


@dataclasses.dataclass(frozen=True)
class _Start:
    """The state of a parameter before the first step: no multiplier and no bound, and for an inflection no memory."""

    has_memory: bool

    def __call__(self, p: jax.Array) -> jax.Array:
        # The moving average, its value at the last look, and its last growth: with these, nothing is smaller.
        memory = (math.inf, math.inf, -math.inf) if self.has_memory else ()
        return jnp.array([0.0, math.inf, *memory], jnp.finfo(compute_dtype(p)).dtype)


@dataclasses.dataclass(frozen=True)
class _Held:
    kind: Penalty
    update_rate: float
    axes: mesh_axes.Names
    is_taken: bool
    smoothing: float | None

    def __call__(
        self, update: jax.Array, p: jax.Array, a: Any, given: Strength, state: Any, totals: Any
    ) -> tuple[jax.Array, jax.Array]:
        wanted = (2 if self.smoothing is None else 5,)
        if np.shape(state) != wanted:
            raise ValueError(
                f"cpr: the state has an array of shape {np.shape(state)}, and this bound needs {wanted}. It was made "
                "for another bound or for other layers. Make a new one: optimizer.init(params)."
            )
        if np.size(given.value) != 1:
            raise ValueError(
                f"cpr: a bound of shape {np.shape(given.value)} differs within a parameter, which has one multiplier. "
                "Give one number for each parameter, by path: by_path({'kernel': 1.0}, default=2.0)."
            )
        split = mesh_axes.split_over("cpr", p, self.axes)
        found = mesh_axes.total(value(self.kind, p), split)
        size = mesh_axes.total(float(max(p.size, 1)), (*split, *self._split_by_kind(p)))
        multiplier, bound, *memory = (state[i].astype(found.dtype) for i in range(len(state)))
        due = jnp.reshape(given.value, ())
        if self.smoothing is not None:
            has_turned, memory = _turned(due > 0, found, *memory, share=self.smoothing)
            bound = jnp.where(has_turned & jnp.isinf(bound), found, bound)
        elif self.is_taken:
            bound = jnp.where(due >= 0, due * found, bound)
        else:
            bound = due
        # A penalty that overflows does not exceed a bound that is not known: inf - inf is NaN.
        excess = jnp.where(jnp.isinf(bound), -jnp.inf, found - bound)
        multiplier = jnp.maximum(multiplier + self.update_rate * excess / size, 0)
        kept = jnp.stack([multiplier, bound, *memory]).astype(state.dtype)
        return minus(update, Strength(multiplier), gradient(self.kind, p)), kept

    def _split_by_kind(self, p: jax.Array) -> mesh_axes.Names:
        return mesh_axes.split_over("cpr", p, mesh_axes.names("cpr", getattr(self.kind, "axis_name", None)))


def _turned(
    looks: jax.Array, found: jax.Array, smooth: jax.Array, last: jax.Array, growth: jax.Array, *, share: float
) -> tuple[jax.Array, list[jax.Array]]:
    """Whether the penalty grows more slowly than at the last look, and the new memory."""
    smooth = share * jnp.where(jnp.isinf(smooth), found, smooth) + (1 - share) * found
    now = smooth - last
    return looks & (now < growth), [smooth, jnp.where(looks, smooth, last), jnp.where(looks, now, growth)]
