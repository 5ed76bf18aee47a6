"""The penalties of groups of weights."""

import dataclasses

import jax
import jax.numpy as jnp

from .._engine import mesh_axes
from .._engine.groups import SplitGroups
from .._engine.norms import direction
from .kinds import L1, checked_ratio


@dataclasses.dataclass(frozen=True, repr=False)
class GroupLasso(SplitGroups):
    """The sum of the norms of groups of weights: whole groups become zero together.

    Layouts differ, so say which axes index the groups. `per=-1` makes one group of all weights of an output unit or
    channel, for a dense kernel (inputs, outputs) and a convolution (height, width, inputs, outputs) alike: the layout
    of Flax and Haiku. In Equinox and PyTorch outputs come first, (outputs, inputs, height, width): write `per=0`. In a
    bias, each number is then a group of its own. To leave biases out, use a mask.

    Rule:   value(w) = sum of ||w|| over groups; gradient(w) = w / ||w||; prox(w, k) = w max(1 - k / ||w||, 0)
    Place:  as `L1`.
    Units:  of a weight; not scaled by the square root of the group size. The gradient of a zero group is zero.
    Source: Yuan & Lin 2006. The norm is computed at three scales, as in Blue 1978, so that it never overflows or
            underflows.

    Args:
        axis: the axes to take a norm over, if you would rather name these. The other axes index the groups. With
            neither `axis` nor `per`, the whole array is one group.
        per: the axes that index the groups: one group for each index along them. The norm is over all other axes. For
            layers in a stack, both count the axes of one layer.
        axis_name: within `shard_map`, the mesh axis, or a tuple of axes, that splits the axes of a norm. Norms then
            cover the whole array. An array that is known to be the same on all devices of that axis counts once. With
            check_vma=False nothing is known, and every array counts as split. Under `jit` leave it out: there a norm
            always covers the whole array. If the mesh axis splits only axes that index groups, leave it out, too.

    Raises: TypeError for an invalid axis or axis name; ValueError for both `axis` and `per`, and on use, if an array or
            the mesh lacks the axis.

    Example:

        >>> import wdjax
        >>> dense, convolution = (64, 32), (3, 3, 64, 32)  # 32 outputs each, in Flax
        >>> wdjax.GroupLasso(per=-1).groups(dense), wdjax.GroupLasso(per=-1).groups(convolution)
        ((32, 64), (32, 576))
        >>> wdjax.GroupLasso(axis=-1).groups(convolution)  # the norm over the outputs: one group for each input weight
        (576, 32)
        >>> wdjax.GroupLasso(per=0).groups((32, 64, 3, 3))  # 32 outputs in Equinox
        (32, 576)
    """

    def value(self, w: jax.Array) -> jax.Array:
        return jnp.sum(self.norm(w))

    def gradient(self, w: jax.Array) -> jax.Array:
        return direction(w, self.norm(w))

    def prox(self, w: jax.Array, step: jax.Array) -> jax.Array:
        return _shrunk(w, self.norm(w), step)


@dataclasses.dataclass(frozen=True, repr=False)
class SparseGroupLasso(SplitGroups):
    """A mixture of L1 and GroupLasso: groups become zero, and in the other groups single weights become zero.

    Rule:   value(w) = r sum |w| + (1 - r) sum of ||w|| over groups; gradient(w) = r sign(w) + (1 - r) w / ||w||;
            prox(w, k) = the prox of `GroupLasso` at k (1 - r), of the prox of `L1` of w at k r. Here r is `l1_ratio`.
    Place:  as `L1`.
    Units:  those of `L1` and `GroupLasso`, mixed: one strength multiplies both. A group at zero stays there if the norm
            of its gradient, after soft thresholding by strength * r, is at most strength * (1 - r).
    Source: Simon et al. 2013, whose alpha is r. Deviation: norms are not scaled by the square root of the group size.

    Args:
        axis, per, axis_name: the groups, as for `GroupLasso`.
        l1_ratio: the share of L1, from 0 (`GroupLasso`) to 1 (`L1`).

    Raises: as `GroupLasso`; ValueError if `l1_ratio` is not a number in [0, 1].

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> kind = wdjax.penalties.SparseGroupLasso(per=0, l1_ratio=0.5)
        >>> kind.prox(jnp.array([[5.0, 1.0, 0.5], [1.5, 0.5, 0.5]]), 2.0).tolist()
        [[3.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    """

    l1_ratio: float = dataclasses.field(default=0.5, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "l1_ratio", checked_ratio(self.called, "GroupLasso", self.l1_ratio))
        super().__post_init__()

    def value(self, w: jax.Array) -> jax.Array:
        of_weights = mesh_axes.total(L1().value(w), self.split_over(w))  # Over the devices that share the groups.
        return self.l1_ratio * of_weights + (1 - self.l1_ratio) * jnp.sum(self.norm(w))

    def gradient(self, w: jax.Array) -> jax.Array:
        return self.l1_ratio * jnp.sign(w) + (1 - self.l1_ratio) * direction(w, self.norm(w))

    def prox(self, w: jax.Array, step: jax.Array) -> jax.Array:
        w = L1().prox(w, step * self.l1_ratio)
        return _shrunk(w, self.norm(w), step * (1 - self.l1_ratio))


def _shrunk(w: jax.Array, norm: jax.Array, step: jax.Array) -> jax.Array:
    return w * jnp.where(norm <= step, 0, 1 - step / jnp.where(norm <= step, 1, norm))
