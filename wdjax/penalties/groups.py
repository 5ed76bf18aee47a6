"""The penalty of groups of weights."""

import dataclasses
import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._engine import mesh_axes
from .._engine.norms import direction, norm
from .._engine.text import shown


@dataclasses.dataclass(frozen=True, repr=False)
class GroupLasso:
    """The sum of the norms of groups of weights: whole groups become zero together.

    Layouts differ, so say which axes index the groups. `per=-1` makes one group of all weights of an output unit or
    channel, for a dense kernel (inputs, outputs) and a convolution (height, width, inputs, outputs) alike: the layout
    of Flax and Haiku. In Equinox and PyTorch outputs come first, (outputs, inputs, height, width): write `per=0`. In a
    bias, each number is then a group of its own. To leave biases out, use a mask.

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
    Units:  of a weight; not scaled by the square root of the group size. The gradient of a zero group is zero.
    Source: Yuan & Lin 2006. The norm is computed at three scales, as in Blue 1978, so that it never overflows or
            underflows.

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

    axis: int | tuple[int, ...] | None = None
    per: int | tuple[int, ...] | None = dataclasses.field(default=None, kw_only=True)
    axis_name: Any = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        mesh_axes.names("GroupLasso", self.axis_name)
        for name in ("axis", "per"):
            given = getattr(self, name)
            if given is None:
                continue
            try:
                axes = tuple(map(operator.index, given)) if isinstance(given, tuple) else operator.index(given)
            except TypeError:
                raise TypeError(
                    f"GroupLasso: {name} must be an integer, a tuple of integers or None, got {shown(given)}. "
                    "Write GroupLasso(per=-1) for one group for each index along the last axis, or GroupLasso(axis=0)."
                ) from None
            object.__setattr__(self, name, axes)
        if self.axis is not None and self.per is not None:
            raise ValueError(
                f"GroupLasso: axis={self.axis} names the axes of a norm and per={self.per} the others, so give one of "
                f"them. Write GroupLasso(per={self.per}) or GroupLasso(axis={self.axis})."
            )

    def __repr__(self) -> str:
        fields = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return f"GroupLasso({', '.join(f'{name}={value!r}' for name, value in fields if value is not None)})"

    def axes(self, ndim: int) -> tuple[int, ...]:
        """The axes of a norm, for an array with `ndim` axes."""
        name, given = ("axis", self.axis) if self.per is None else ("per", self.per)
        if given is None:
            return tuple(range(ndim))
        named = given if isinstance(given, tuple) else (given,)
        axes = tuple(axis % ndim for axis in named if -ndim <= axis < ndim)
        if len(set(axes)) < len(named):
            fault = "names an axis twice" if len(axes) == len(named) else "is out of range"
            raise ValueError(
                f"GroupLasso: {name}={given} {fault} for a {ndim}-dimensional array. "
                "Use a mask to select arrays with that axis, such as only('kernel')."
            )
        return axes if self.per is None else tuple(axis for axis in range(ndim) if axis not in axes)

    def groups(self, shape: Sequence[int]) -> tuple[int, int]:
        """How many groups an array of this shape has, and how many weights are in each."""
        of_norm = self.axes(len(shape))
        others = (size for axis, size in enumerate(shape) if axis not in of_norm)
        return math.prod(others), math.prod(shape[axis] for axis in of_norm)

    def _norm(self, w: jax.Array) -> jax.Array:
        split = mesh_axes.split_over("GroupLasso", w, mesh_axes.names("GroupLasso", self.axis_name))
        return norm(w, self.axes(w.ndim), split)

    def value(self, w: jax.Array) -> jax.Array:
        return jnp.sum(self._norm(w))

    def gradient(self, w: jax.Array) -> jax.Array:
        return direction(w, self._norm(w))

    def prox(self, w: jax.Array, step: jax.Array) -> jax.Array:
        norm = self._norm(w)
        return w * jnp.where(norm <= step, 0, 1 - step / jnp.where(norm <= step, 1, norm))
