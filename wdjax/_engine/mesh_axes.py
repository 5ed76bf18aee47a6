"""Within `shard_map`, where a rule sees the part of an array that one device has: what the other devices have of it.

Under `jit` an array is whole, however it is sharded, and XLA adds the communication. Within `shard_map` the name of the
mesh axis that arrays are split over must be said, and `split_over` tells which arrays really are: the present
`shard_map` knows of each array whether it is the same on all devices of an axis (with `check_vma`, its default).
"""

import operator
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp

from .unstable import varying_axes

Names = tuple[Hashable, ...]


def names(where: str, axis_name: Any) -> Names:
    """The names of mesh axes as a tuple: of None none, of a tuple each."""
    found = axis_name if isinstance(axis_name, tuple) else () if axis_name is None else (axis_name,)
    # What else can be hashed may be a name, but an integer is an axis of an array.
    if not all(
        isinstance(name, Hashable) and not isinstance(name, (int, tuple)) and name is not None for name in found
    ):
        raise TypeError(
            f"{where}: axis_name must be the name of a mesh axis, or a tuple of names, got {axis_name!r}. Write "
            f"{where}(..., axis_name='data') within shard_map, and leave it out under jit."
        )
    return found


def split_over(where: str, x: Any, axes: Names) -> Names:
    """Those of the mesh axes along which the devices have different parts of an array, not each the whole."""
    split = []
    for name in axes:
        try:
            index = jax.lax.axis_index(name)
        except NameError:
            raise ValueError(
                f"{where}: there is no mesh axis {name!r} here. axis_name is for what runs within shard_map or pmap; "
                f"under jit an array is whole, however it is sharded: leave axis_name out."
            ) from None
        # An index differs by nature: if it is not known to, nothing is, and the user's word is taken.
        if name in varying_axes(x) or name not in varying_axes(index):
            split.append(name)
    return tuple(split)


def added_up(where: str, parts: Sequence[tuple[str, Any, Any]], axes: Names, dtype: Any = None) -> dict[str, Any]:
    """The sum of trees of numbers over parameters, and over the mesh axes that split these, by group.

    All that is split alike is summed over the devices at once.

    Args:
        where: the function to name in an error.
        parts: the group, the tree of each parameter, and the parameter.
        axes: the mesh axes.
        dtype: that of the sums, if it is not that of the numbers.
    """
    sums: dict[Names, dict[str, Any]] = {}
    with jax.numpy_dtype_promotion("standard"):
        for group, part, param in parts:
            of_groups = sums.setdefault(split_over(where, param, axes), {})
            of_groups[group] = jax.tree.map(operator.add, of_groups[group], part) if group in of_groups else part
        totals: dict[str, Any] = dict.fromkeys(group for group, _, _ in parts)
        for split, of_groups in sums.items():
            of_groups = jax.tree.map(lambda x: jnp.asarray(x, dtype), of_groups)
            if split:
                numbers, unraveled = jax.flatten_util.ravel_pytree(of_groups)
                of_groups = unraveled(total(numbers, split))
            for group, part in of_groups.items():
                totals[group] = part if totals[group] is None else jax.tree.map(jnp.add, totals[group], part)
    return totals


def total(x: Any, axes: Names) -> Any:
    """The sum over all devices of some mesh axes, of arrays or trees of them."""
    return jax.lax.psum(x, axes) if axes else x
