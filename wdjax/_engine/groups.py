"""Groups of weights: which axes a norm is taken over, said by the axes themselves or by those that index the groups."""

import dataclasses
import math
import operator
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from . import checks, mesh_axes
from .norms import norm
from .text import shown


class UnfitShapeError(ValueError):
    """An array lacks an axis that a kind needs."""


@dataclasses.dataclass(frozen=True, repr=False)
class Groups:
    """The base of kinds that act on groups of weights. `GroupLasso` explains the two fields."""

    axis: int | tuple[int, ...] | None = None
    per: int | tuple[int, ...] | None = dataclasses.field(default=None, kw_only=True)

    called: ClassVar[str]  # The public name, for errors.

    def __init_subclass__(cls, called: str | None = None) -> None:
        cls.called = called or cls.__name__

    def __post_init__(self) -> None:
        for name in ("axis", "per"):
            given = getattr(self, name)
            if given is not None:
                object.__setattr__(self, name, self._checked(name, given))
        if self.axis is not None and self.per is not None:
            raise ValueError(
                f"{self.called}: axis={self.axis} names the axes of a norm and per={self.per} the others, so give one "
                f"of them. Write {self.called}(per={self.per}) or {self.called}(axis={self.axis})."
            )

    def _checked(self, name: str, given: Any) -> int | tuple[int, ...]:
        try:
            return tuple(map(operator.index, given)) if isinstance(given, tuple) else operator.index(given)
        except TypeError:
            raise TypeError(
                f"{self.called}: {name} must be an integer, a tuple of integers or None, got {shown(given)}. Write "
                f"{self.called}(per=-1) for one group for each index along the last axis, or {self.called}(axis=0)."
                f"{checks.static(name, given)}"
            ) from None

    def __repr__(self) -> str:
        fields = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return f"{self.called}({', '.join(f'{name}={value!r}' for name, value in fields if value is not None)})"

    def axes(self, ndim: int) -> tuple[int, ...]:
        """The axes of a norm, for an array with `ndim` axes."""
        name, given = ("axis", self.axis) if self.per is None else ("per", self.per)
        if given is None:
            return tuple(range(ndim))
        named = given if isinstance(given, tuple) else (given,)
        axes = tuple(axis % ndim for axis in named if -ndim <= axis < ndim)
        if len(set(axes)) < len(named):
            fault = "names an axis twice" if len(axes) == len(named) else "is out of range"
            raise UnfitShapeError(
                f"{self.called}: {name}={given} {fault} for a {ndim}-dimensional array. "
                "Use a mask to select arrays with that axis, such as only('kernel')."
            )
        return axes if self.per is None else tuple(axis for axis in range(ndim) if axis not in axes)

    def fits(self, ndim: int) -> bool:
        """Whether an array with `ndim` axes has the axes."""
        try:
            self.axes(ndim)
        except UnfitShapeError:
            return False
        return True

    def groups(self, shape: Sequence[int]) -> tuple[int, int]:
        """How many groups an array of this shape has, and how many weights are in each."""
        of_norm = self.axes(len(shape))
        others = (size for axis, size in enumerate(shape) if axis not in of_norm)
        return math.prod(others), math.prod(shape[axis] for axis in of_norm)


@dataclasses.dataclass(frozen=True, repr=False)
class SplitGroups(Groups):
    """Groups whose norm may be taken over the devices of a mesh axis within `shard_map`."""

    axis_name: Any = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        mesh_axes.names(self.called, self.axis_name)
        super().__post_init__()

    def norm(self, w: jax.Array) -> jax.Array:
        """The norm of each group. The axes of the norm are kept, with size 1."""
        return norm(w, self.axes(w.ndim), self.split_over(w))

    def inner(self, w: jax.Array, v: jax.Array) -> jax.Array:
        """The real inner product of each group. The axes of the sum are kept, with size 1."""
        products = jnp.sum(jnp.real(jnp.conj(w) * v), self.axes(w.ndim), keepdims=True)
        return mesh_axes.total(products, self.split_over(w))

    def split_over(self, w: jax.Array) -> mesh_axes.Names:
        """The mesh axes that split the groups."""
        return mesh_axes.split_over(self.called, w, mesh_axes.names(self.called, self.axis_name))


def uneven(number: Any) -> list[int]:
    """The axes along which a rate differs."""
    return [axis for axis, size in enumerate(np.shape(number)) if size != 1]


def check_even(where: str, name: str, kind: Any, number: Any) -> None:
    """Raises an error if a rate differs within a part that a kind takes as a whole."""
    parts = uneven(number)
    if not parts or getattr(kind, "is_elementwise", False):
        return
    if isinstance(kind, Groups) and not set(parts) & set(kind.axes(np.ndim(number))):
        return
    one_each = f"one {name} for each group, with axes of size 1."
    remedy = f"Give {one_each}"
    if not type(kind).__module__.startswith("wdjax."):
        is_sum = "its value is a sum over single weights" if name == "strength" else "it acts on each weight alone"
        remedy = f"Set is_elementwise = True in {type(kind).__name__} if {is_sum}. Otherwise give {one_each}"
    raise ValueError(f"{where}: a {name} of shape {np.shape(number)} differs within a group of {shown(kind)}. {remedy}")
