"""Updates without their radial part."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .._engine import checks
from .._engine.arithmetic import Strength, stateless
from .._engine.groups import SplitGroups
from .._engine.loop import Action, transformation
from .._engine.norms import direction
from .._engine.radii import warn_of_single_weights
from .._engine.types import Mask, StackedAxes
from ..paths import stacks

PyTree = Any


@checks.known_arguments
def tangential_update(
    mask: Mask = None,
    *,
    axis: int | tuple[int, ...] | None = None,
    per: int | tuple[int, ...] | None = None,
    axis_name: Any = None,
    stacked_axes: StackedAxes | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Removes the part of each update that is parallel to its weights, so that the step turns them.

    Rule:   u <- u - <u, p> / ||p||^2 * p, for each parameter or group. Where the weights are all zero, u stays as it
            is. For complex weights, <u, p> is the real inner product: the part along p changes the norm and is removed,
            and the part along i p turns the phase and stays.
    Place:  after `scale_by_*`, with the decay behind it. A decay toward zero is radial: in front, all of it would be
            removed.
    Units:  the learning rate scales the result as it scales u. Then ||p + u||^2 = ||p||^2 + ||u||^2: the norm grows,
            but only by second order.
    Source: AdamP, arXiv 2006.08217, and its code; the rotational optimizers of arXiv 2305.17212, which then also keep
            the norm, as `constrain(L2Sphere(), "init")` does. Deviation: AdamP does this only in steps in which the
            cosine between gradient and weights is below delta / sqrt(size), and multiplies the weight decay by wd_ratio
            in them. Here the mask says which weights are followed by a normalization, and the decay has its own rate.

    Args:
        mask: as `decoupled_decay`, for whole parameters: those whose scale does not matter, because a normalization
            follows.
        axis, per, axis_name: the groups, as for `GroupLasso`. With neither, the whole array is one group. A
            normalization for each unit, such as a batch norm, makes each unit a group: `per=-1`, in Equinox and PyTorch
            `per=0`.
        stacked_axes: as `add_penalty_to_grads`.

    Returns: an `optax.GradientTransformationExtraArgs` with a `DecayState`. Its `update` needs `params`. Updates keep
    their dtype.
    Raises: as `GroupLasso`, for axes; otherwise as `decoupled_decay`.
    Warns:  UserWarning at `init`, if each weight is a group of its own, as in a bias with `per=-1`: it never moves.

    Example:

        >>> import jax.numpy as jnp, optax, wdjax
        >>> optimizer = optax.chain(wdjax.in_update.tangential_update(), optax.scale_by_learning_rate(0.5))
        >>> params = jnp.array([3.0, 0.0])
        >>> optimizer.update(jnp.array([2.0, 2.0]), optimizer.init(params), params)[0].tolist()
        [-0.0, -1.0]
    """
    where = "tangential_update"
    groups = _Groups(axis, per=per, axis_name=axis_name)
    action = Action(where, mask=mask, off_at=None, stacked_axes=stacks(where, stacked_axes))
    plain = transformation(action, stateless(_Tangential(groups), is_elementwise=False))

    def init_fn(params: PyTree) -> Any:
        state = plain.init(params)
        warn_of_single_weights(action, groups, params, "never moves")
        return state

    return optax.GradientTransformationExtraArgs(init_fn, plain.update)


@dataclasses.dataclass(frozen=True, repr=False)
class _Groups(SplitGroups, called="tangential_update"):
    pass


@dataclasses.dataclass(frozen=True)
class _Tangential:
    groups: _Groups

    def __call__(self, update: jax.Array, p: jax.Array, a: jax.Array | None, given: Strength) -> jax.Array:
        size = self.groups.norm(p)
        outward = direction(p, size)
        return jnp.where(size == 0, update, update - self.groups.inner(outward, update) * outward)
