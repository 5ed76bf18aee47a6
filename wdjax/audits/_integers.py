"""Integers and booleans among the parameters, which no optimizer should move because they have no gradient."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from .._engine import trees
from ._states import is_a

PyTree = Any
_LARGEST = 100  # Larger ones would lose digits in the optimizer's arithmetic, which is another matter.


def is_integer(leaf: Any) -> bool:
    return is_a(leaf, jnp.integer) or is_a(leaf, jnp.bool_)


def spread(leaf: Any) -> np.ndarray:
    """Values of several sizes and both signs, in the shape and dtype of an integer leaf."""
    if is_a(leaf, jnp.bool_):
        return np.resize([False, True], leaf.shape)
    info = jnp.iinfo(leaf.dtype)
    least, most = max(int(info.min), -_LARGEST), min(int(info.max), _LARGEST)
    return np.resize(np.linspace(least, most, 9), leaf.shape).astype(leaf.dtype)


def moved_integers(before: PyTree, after: PyTree) -> set[str]:
    """The paths of the integers that differ in two trees."""
    pairs = zip(trees.flatten_with_paths(before), trees.flatten_with_paths(after), strict=True)
    return {path for (path, old), (_, new) in pairs if is_integer(old) and not np.array_equal(old, new)}
