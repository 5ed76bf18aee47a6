"""Sums over devices within `shard_map`, where a rule sees only the part of an array that is on one device.

Under `jit` an array is whole, however it is sharded, and XLA adds the communication. Within `shard_map` the caller
names the mesh axes that split arrays, and `split_over` finds out which arrays they really split: with `check_vma`, its
default, `shard_map` knows whether an array is the same on all devices of an axis.
"""

import operator
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp

from .text import shown
from .unstable import varying_axes

Names = tuple[Hashable, ...]


def names(where: str, axis_name: Any) -> Names:
    """The names of mesh axes as a tuple; empty for None."""
    found = axis_name if isinstance(axis_name, tuple) else () if axis_name is None else (axis_name,)
    # Any hashable value may be a name, except an integer: that is probably meant as an axis of an array.
    if any(name is None or isinstance(name, (int, tuple)) or not isinstance(name, Hashable) for name in found):
        raise TypeError(
            f"{where}: axis_name must be the name of a mesh axis, or a tuple of names, got {shown(axis_name)}. Write "
            f"{where}(..., axis_name='data') within shard_map, and leave it out under jit."
        )
    return found


def split_over(where: str, x: Any, axes: Names) -> Names:
    """The mesh axes that split an array: along these, each device has a part of it, not the whole."""
    split = []
    for name in axes:
        try:
            index = jax.lax.axis_index(name)
        except NameError:
            raise ValueError(
                f"{where}: there is no mesh axis {name!r} here. axis_name is only for code within shard_map or pmap; "
                f"under jit an array is whole, however it is sharded: leave axis_name out."
            ) from None
        # An index always varies. If JAX does not report that, it reports nothing, and we trust the caller.
        if name in varying_axes(x) or name not in varying_axes(index):
            split.append(name)
    return tuple(split)


def added_up(where: str, parts: Sequence[tuple[str, Any, Any]], axes: Names, dtype: Any = None) -> dict[str, Any]:
    """Sums trees of numbers over the parameters of each group, and over the mesh axes that split them.

    A part is a group, a tree of numbers, and its parameter. Parameters that are split over the same axes share one sum
    over the devices. The sums have this dtype; by default that of the numbers.
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
    """The sum of an array, or of each array of a tree, over all devices of the mesh axes."""
    return jax.lax.psum(x, axes) if axes else x
