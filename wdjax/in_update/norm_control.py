"""Weight norm control: a decay toward a norm instead of toward zero."""

import dataclasses
from typing import Any, Literal

import jax
import optax

from .._engine import checks
from .._engine.arithmetic import LeafRule, Strength, minus, narrowed_like, stateless, subtracted, widened
from .._engine.groups import SplitGroups, check_even
from .._engine.loop import Action, DecayState
from .._engine.norms import direction
from .._engine.probe import DecayProbe, gated
from .._engine.radii import InitialNorm, check_kept, check_radius, warn_of_zeros
from .._engine.types import Mask, Rate, StackedAxes
from ..paths import stacks

PyTree = Any


@checks.known_arguments
def weight_norm_control(
    weight_decay: Rate,
    radius: Rate | Literal["init"] = "init",
    mask: Mask = None,
    *,
    ratio: Rate = 1.0,
    axis: int | tuple[int, ...] | None = None,
    per: int | tuple[int, ...] | None = None,
    axis_name: Any = None,
    stacked_axes: StackedAxes | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Decays the norm of weights toward a target instead of toward zero: the decay of AdamWN.

    Rule:   u <- u - weight_decay * (1 - ratio * radius / ||p||) * p, for each parameter or group. Weights that are all
            zero have no direction, so u stays as it is.
    Place:  after the learning rate, where u is added to the parameters unchanged.
    Units:  weight_decay is per step: with zero gradient, ||p|| - ratio * radius is multiplied by 1 - weight_decay each
            step, and the direction of the weights stays. To follow the shape of the learning rate, pass
            `rates.relative(weight_decay, learning_rate, peak=...)`. The radius is in units of the weights.
    Source: AdamWN, Loshchilov 2023, arXiv 2311.11446 (abstract and the definition in section 2 only): weight_decay is
            its update rate, ratio the ratio of target and initial norm, both for each step. Deviation: the definition
            has one norm, of all weights together. Here each parameter or group has its own.

    The term is the gradient of weight_decay / 2 * (||p|| - ratio * radius)^2: L2 toward the nearest point of the
    sphere. A radius of 0 is `independent_decay`. A weight_decay of 1 moves the weights of each step onto the sphere,
    and then adds u: `constrain(L2Sphere(), "init")` also projects u. Above 1 the norm overshoots, and from 2 on it
    never settles.

    Args:
        weight_decay, mask: as `independent_decay`. Within a group, weight_decay must not differ, unless the radius is
            0.
        radius: a number >= 0, a 0-d array, a schedule, a `by_path` table or a tree like params of these, or of arrays
            with one radius for each group. "init" is the norm of each group at `init`, for each layer of a stack; the
            state keeps it.
        ratio: a factor of the radius, in the same forms. A schedule moves the target during training.
        axis, per, axis_name: the groups, as for `GroupLasso`. With neither, the whole array is one group.
        stacked_axes: as `add_penalty_to_grads`.

    Returns: an `optax.GradientTransformationExtraArgs` with a `DecayState`, whose `leaf` holds the radii of "init". Its
    `update` needs `params`. Updates keep their dtype.
    Raises: as `independent_decay`, also for the radius and the ratio; as `GroupLasso`, for axes; at `update`, a
            ValueError if weight_decay or the target differs within a group.
    Warns:  UserWarning at `init`, if weight_decay is known to round to nothing; and if the radius is "init" and the
            weights of a group are all zero: their target is then zero.

    Example:

        >>> import jax.numpy as jnp, optax, wdjax
        >>> optimizer = optax.chain(optax.adam(0.5), wdjax.in_update.weight_norm_control(0.1, 10.0))
        >>> params = jnp.array([3.0, 4.0])
        >>> updates, _ = optimizer.update(jnp.zeros(2), optimizer.init(params), params)
        >>> round(float(jnp.linalg.norm(optax.apply_updates(params, updates))), 6)  # From 5 a tenth of the way to 10.
        5.5
    """
    where = "weight_norm_control"
    groups = _Groups(axis, per=per, axis_name=axis_name)
    is_init = check_radius(where, radius, "0.01")
    target = {"ratio": ratio} if is_init else {"ratio": ratio, "radius": radius}
    in_stacks = stacks(where, stacked_axes)
    # The rule is the sum of two, each with one product of rates, as the engine wants it: the plain decay, and a growth
    # by weight_decay * ratio * radius along the weights.
    decay = Action(
        where, {"weight_decay": weight_decay}, mask, is_per_step=True, can_overshoot=False, is_toward_zero=False
    )
    growth = Action(where, {"weight_decay": weight_decay, **target}, mask, stacked_axes=in_stacks)
    grown = LeafRule(_Grown(groups, is_init), InitialNorm(groups) if is_init else None)

    def init_fn(params: PyTree) -> DecayState:
        decay.init(params)
        state = growth.init(params, grown, aliases=lambda path: False)  # The decay warned of them.
        if is_init:
            warn_of_zeros(growth, params, state, "decay toward zero")
        return state

    def update_fn(
        updates: PyTree, state: Any, params: PyTree = None, *, decay_probe: DecayProbe | None = None, **extra_args: Any
    ) -> tuple[PyTree, DecayState]:
        def controlled(updates: PyTree) -> PyTree:
            # Near the sphere the two terms almost cancel, so their difference is not rounded to bfloat16 in between.
            wide = widened(updates)
            for action, rule in ((decay, _DECAYED), (growth, grown)):
                wide, _ = action.run(rule, wide, state, params)
            return narrowed_like(wide, updates)

        new = gated(decay_probe, decay, params, controlled, updates, controlled(updates))
        return new, state._replace(count=optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@dataclasses.dataclass(frozen=True, repr=False)
class _Groups(SplitGroups, called="weight_norm_control"):
    pass


@dataclasses.dataclass(frozen=True)
class _Grown:
    groups: _Groups
    is_init: bool

    def __call__(
        self, update: jax.Array, p: jax.Array, a: Any, rate: Strength, kept: Any, totals: Any
    ) -> tuple[jax.Array, Any]:
        check_even("weight_norm_control", "weight_decay, ratio, radius or mask", self.groups, rate.value)
        if self.is_init:
            check_kept("weight_norm_control", self.groups, kept, p)
        inward = direction(-p, self.groups.norm(p))
        return minus(update, rate, inward * kept if self.is_init else inward), kept


_DECAYED = stateless(subtracted)
