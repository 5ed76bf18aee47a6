"""Updates of a fixed size relative to the weights."""

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
from .._engine.types import Mask, StackedAxes
from ..paths import stacks


@checks.known_arguments
def normalized_update(
    mask: Mask = None,
    *,
    axis: int | tuple[int, ...] | None = None,
    per: int | tuple[int, ...] | None = None,
    axis_name: Any = None,
    stacked_axes: StackedAxes | None = None,
) -> optax.GradientTransformation:
    """Gives each update the norm of its weights, so that the learning rate is the relative change in each step.

    Rule:   u <- ||p|| u / ||u||, for each parameter or group. An update of zeros stays zero. Where the weights are all
            zero, u stays as it is, so that they can leave zero.
    Place:  after `scale_by_*`, before the learning rate. A `decoupled_decay` before it is part of what is normalized,
            as in LAMB; one after it is not.
    Units:  of the learning rate: at 0.01, each step moves a parameter by 1 % of its norm.
    Source: the trust ratio of LARS (arXiv 1708.03888) and LAMB (arXiv 1904.00962); for whole arrays
            `optax.scale_by_trust_ratio()`. With `constrain(L2Sphere(), "init")` it is Hyperball, arXiv 2606.16899.

    Args:
        mask: as `decoupled_decay`, for whole parameters.
        axis, per, axis_name: the groups, as for `GroupLasso`. With neither, the whole array is one group.
        stacked_axes: as `add_penalty_to_grads`.

    Returns: an `optax.GradientTransformation` with a `DecayState`. Its `update` needs `params`. Updates keep their
    dtype.
    Raises: as `GroupLasso`, for axes; otherwise as `decoupled_decay`.

    Example:

        >>> import jax.numpy as jnp, optax, wdjax
        >>> optimizer = optax.chain(wdjax.normalized_update(), optax.scale_by_learning_rate(0.1))
        >>> params = jnp.array([30.0, 40.0])
        >>> optimizer.update(jnp.array([0.0, 2.0]), optimizer.init(params), params)[0].tolist()
        [-0.0, -5.0]
    """
    where = "normalized_update"
    groups = _Groups(axis, per=per, axis_name=axis_name)
    action = Action(where, mask=mask, off_at=None, stacked_axes=stacks(where, stacked_axes))
    return transformation(action, stateless(_Normalized(groups), is_elementwise=False))


@dataclasses.dataclass(frozen=True, repr=False)
class _Groups(SplitGroups, called="normalized_update"):
    pass


@dataclasses.dataclass(frozen=True)
class _Normalized:
    groups: _Groups

    def __call__(self, update: jax.Array, p: jax.Array, a: jax.Array | None, given: Strength) -> jax.Array:
        wanted, size = self.groups.norm(p), self.groups.norm(update)
        return jnp.where(wanted == 0, update, direction(update, size) * wanted)
