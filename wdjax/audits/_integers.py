"""Finds integers and booleans that an optimizer moves, although they have no gradient."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._engine import trees
from ._probes import Probes
from ._states import is_a

PyTree = Any
_LARGEST = 100  # Larger ones would lose digits in the optimizer's arithmetic, which is another matter.


def moved_integers(optimizer: Any, params: PyTree, extra_args: Mapping[str, Any], probes: Probes) -> list[str]:
    """The paths of the integers and booleans that a real step without gradients moves. It takes values of its own."""
    found = trees.flatten_with_paths(params)
    if not any(_is_integer(leaf) for _, leaf in found):
        return []
    values = [_values(leaf) if _is_integer(leaf) else leaf for _, leaf in found]
    own = Probes(
        optimizer, jax.tree.unflatten(trees.structure(params), values), extra_args, longest=probes.longest, exact=False
    )
    start = after = own.tree(own.weights, wide=False)
    grads, state = own.gradients_of(own.scaled(own.weights, 0.0), wide=False), own.init(own.weights, wide=False)
    for _ in range(probes.offset + probes.calls):
        _, state, after = own.call(grads, state, after)
    pairs = zip(trees.flatten_with_paths(start), trees.flatten_with_paths(after), strict=True)
    return [path for (path, old), (_, new) in pairs if _is_integer(old) and not np.array_equal(old, new)]


def _is_integer(leaf: Any) -> bool:
    return is_a(leaf, jnp.integer) or is_a(leaf, jnp.bool_)


def _values(leaf: Any) -> np.ndarray:
    """Values of all sizes and signs that the dtype has."""
    if is_a(leaf, jnp.bool_):
        return np.resize([False, True], leaf.shape)
    info = jnp.iinfo(leaf.dtype)
    least, most = max(int(info.min), -_LARGEST), min(int(info.max), _LARGEST)
    return np.resize(np.linspace(least, most, 9), leaf.shape).astype(leaf.dtype)
