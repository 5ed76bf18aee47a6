"""Every leaf of a tree with its canonical path. Boxes around arrays are looked into and do not appear in the path."""

import collections
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey, keystr

from .leaves import HOLES, is_hole

PyTree = Any


def canonical_paths(params: PyTree) -> list[str]:
    """The canonical path of every leaf, in the order of the tree. Patterns are matched against these paths.

    Args:
        params: a tree of parameters, or their shapes as from `jax.eval_shape`.

    Returns: a list of strings: the keys that lead to each leaf, joined by "/". A Keras variable in a list has its own
        path instead of an index.
    Raises: ValueError if two leaves have the same path.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> wdjax.paths.canonical_paths({"Dense_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}})
        ['Dense_0/bias', 'Dense_0/kernel']
    """
    return [path for path, leaf in flatten_with_paths(params) if not is_hole(leaf)]


def flatten_with_paths(tree: PyTree) -> list[tuple[str, Any]]:
    """Every leaf and hole of a tree with its canonical path, in the order of `structure(tree)`."""
    boxes = box_types()
    stops = (*HOLES, *boxes)

    def is_stop(x: Any) -> bool:
        return isinstance(x, stops)

    found = [("/".join(keys), leaf) for keys, leaf in _walk(tree, (), is_stop)]
    paths = [path for path, _ in found]
    if len(set(paths)) < len(paths):
        raise ValueError(f"wdjax: {_on_repeated(tree, paths)}")
    return found


def _on_repeated(tree: PyTree, paths: list[str]) -> str:
    """The message about parameters with one path, with the places of the first two."""
    repeated = [path for path, times in collections.Counter(paths).items() if times > 1]
    of_keras = _variables_of_keras()
    places = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, (*HOLES, *of_keras)))[0]
    same = [entry for path, entry in zip(paths, places, strict=True) if path == repeated[0]]
    remedy = "Rename one: a rule by path could not tell them apart."
    if isinstance(same[0][1], of_keras):
        remedy += " Keras repeats the paths of layers with one name: name the layers, or write a dictionary."
    more = f" {len(repeated) - 1} more paths are repeated." if len(repeated) > 1 else ""
    first, second = (keystr(keys) for keys, _ in same[:2])
    return f"two parameters have the path {repeated[0]!r}: those at {first} and {second}.{more} {remedy}"


def structure(tree: PyTree) -> Any:
    """The structure of a tree in which holes count as leaves."""
    return jax.tree.structure(tree, is_leaf=is_hole)


def _walk(
    tree: PyTree, prefix: tuple[str, ...], is_stop: Callable[[Any], bool], *, box: bool = False
) -> list[tuple[tuple[str, ...], Any]]:
    found, of_keras = [], _variables_of_keras()
    # We look inside the box, so its root is not a leaf, and its own key ("value") is not part of the path.
    stop = (lambda x: x is not tree and is_stop(x)) if box else is_stop
    for keys, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=stop)[0]:
        path = prefix + tuple(map(key_text, keys[1:] if box else keys))
        if isinstance(node, of_keras) and keys and isinstance(keys[-1], SequenceKey):
            path = (*path[:-1], node.path)
        if is_stop(node) and not is_hole(node):
            found += _walk(node, path, is_stop, box=True)
        else:
            found.append((path, node))
    return found


def prefixes(path: str) -> Iterable[str]:
    """The path and the paths of all nodes above it; the root has the path ""."""
    while path:
        yield path
        path = path.rpartition("/")[0]
    yield ""


def cuts(path: str) -> Iterable[tuple[str, str]]:
    """Every way to cut a path into a base and an end, beginning with the longest end."""
    yield "", path
    for slash in re.finditer("/", path):
        yield path[: slash.start()], path[slash.end() :]
    if path:
        yield path, ""


def key_text(key: Any) -> str:
    """One segment of a canonical path."""
    match key:
        case DictKey() | FlattenedIndexKey():
            return str(key.key)
        case GetAttrKey():
            return key.name
        case SequenceKey():
            return str(key.idx)
    return keystr((key,), simple=True)


def box_types() -> tuple[type, ...]:
    return classes("flax.core.meta.AxisMetadata", "flax.nnx.Variable")


def _variables_of_keras() -> tuple[type, ...]:
    return classes("keras.Variable")


def is_module(node: Any) -> bool:
    return isinstance(node, classes("flax.linen.Module", "flax.nnx.Module", "equinox.Module"))


def is_array(node: Any) -> bool:
    """Whether a node is an array or describes one. A module may have attributes of the same names."""
    return hasattr(node, "shape") and hasattr(node, "dtype") and not is_module(node)


def classes(*names: str) -> tuple[type, ...]:
    """The classes of these names, without those of modules that are not imported. Then no tree has such an object."""
    found = [getattr(sys.modules.get(module), name, None) for module, _, name in (n.rpartition(".") for n in names)]
    return tuple(kind for kind in found if isinstance(kind, type))
