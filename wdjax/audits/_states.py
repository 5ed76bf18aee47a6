"""What an audit looks for and replaces in an optimizer's state: counters of steps, random keys, single numbers."""

from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._engine import trees
from .._engine.loop import DecayState
from .._engine.steps import nodes

PyTree = Any
Change = Callable[[PyTree], PyTree]  # From a state to a state.
KEEP_INTEGERS_OUT = (
    "Keep integers out of the optimizer: write freeze(optimizer, mask), where the mask selects them, or use "
    "optax.partition, or optax.masked with a mask that leaves them out."
)
_FEW = 64  # The most step sizes that an optimizer keeps in one array.


def counters_of(before: PyTree, after: PyTree, calls: int) -> dict[int, tuple[int, int]]:
    """The leaves of a state that count steps: their values before one, and what it adds: 1, or its number of calls."""
    if jax.tree.structure(before) != jax.tree.structure(after):
        return {}
    pairs = enumerate(zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))
    scalars = [(i, old, new) for i, (old, new) in pairs if is_a(old, jnp.integer) and jnp.ndim(old) == 0]
    found = {i: (int(old), int(new) - int(old)) for i, old, new in scalars}
    return {i: (start, added) for i, (start, added) in found.items() if added in (1, calls)}


def numbers_in(state: PyTree, params: PyTree) -> dict[str, int]:
    """The leaves of a state that are a float or a few, beside no parameter, by name."""
    beside = tuple(jax.tree_util.keystr(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(params))
    leaves = enumerate(jax.tree_util.tree_leaves_with_path(state))
    few = ((jax.tree_util.keystr(keys), i) for i, (keys, x) in leaves if is_a(x, jnp.floating) and x.size <= _FEW)
    return {name: i for name, i in few if not (name.endswith(beside) and "" not in beside)}


def positions_of_keys(state: PyTree) -> list[int]:
    """The leaves of a state that are random keys, typed or raw."""
    leaves = jax.tree.leaves(state)
    are_raw = [is_a(leaf, jnp.uint32) and jnp.shape(leaf)[-1:] == (2,) for leaf in leaves]
    return [i for i, leaf in enumerate(leaves) if are_raw[i] or is_a(leaf, jax.dtypes.prng_key)]


def replaced(state: PyTree, positions: Collection[int], new: Callable[[int, Any], Any]) -> PyTree:
    """The state with `new(i, leaf)` for the leaves at these positions."""
    leaves, treedef = jax.tree.flatten(state)
    return treedef.unflatten([new(i, leaf) if i in positions else leaf for i, leaf in enumerate(leaves)])


def is_a(leaf: Any, kind: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, kind)


def moving_anchors(before: PyTree, after: PyTree) -> set[str]:
    """The paths of the parameters whose anchors in wdjax's states have moved."""
    moved = set()
    for one, other in zip(*(nodes(state, (DecayState,)) for state in (before, after)), strict=False):
        pairs = zip(trees.flatten_with_paths(one.anchor), trees.flatten_with_paths(other.anchor), strict=True)
        moved |= {path for (path, old), (_, new) in pairs if not trees.is_hole(old) and np.any(old != new)}
    return moved


def drift_of(before: PyTree, after: PyTree) -> tuple[str, str]:
    """How an update changes the structure, shapes or dtypes of the state, in words, and the remedy."""
    wide = "For low precision, write in_float32(...)."
    if jax.tree.structure(after) != jax.tree.structure(before):
        return "the structure of the state changes with an update", wide
    leaves = jax.tree_util.tree_leaves_with_path(before)
    pairs = [(keys, old, new) for (keys, old), new in zip(leaves, jax.tree.leaves(after), strict=True)]
    changes = [
        (f"state{jax.tree_util.keystr(keys)} is {_type(old)} before the first update and {_type(new)} after", old)
        for keys, old, new in pairs
        if _type(old) != _type(new)
    ]
    if not changes:
        return "", ""
    more = f" (and {len(changes) - 1} more changes)" if len(changes) > 1 else ""
    are_integers = all(is_a(old, jnp.integer) or is_a(old, jnp.bool_) for _, old in changes)
    return changes[0][0] + more, KEEP_INTEGERS_OUT if are_integers else wide


def _type(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"
