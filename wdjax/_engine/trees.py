"""The leaves of a parameter tree, each with its canonical path.

A parameter has one name, its *canonical path*: the keys that lead to it, joined by "/". Libraries put more than
parameters into a tree: an NNX `Variable` or a Linen `Partitioned` box around an array, `None` where an Equinox
filter took a leaf out, `optax.MaskedNode` where `optax.masked` did. Boxes leave no trace in the path, so that the
tree that `init` sees (NNX Variables) and the one that `update` sees (bare arrays) name their parameters alike.
The other two are *holes*: places that a rule may speak of but that hold nothing to decay.
"""

import contextlib
import contextvars
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey, keystr

from . import checks

PyTree = Any


class Leaf(NamedTuple):
    """What a rule may know of a parameter: nothing here depends on values, so a rule is decided while tracing."""

    path: str
    shape: tuple[int, ...]
    dtype: Any

    @property
    def ndim(self) -> int:
        return len(self.shape)


class Hidden(optax.MaskedNode):
    """The place of a parameter that an optimizer is not to see; unlike Optax's own it says what stood there.

    So a rule inside decides as it would on the whole tree: a norm is told by its bias, a stack by its height.
    """

    shape: tuple[int, ...] = ()
    dtype: Any = None

    @classmethod
    def of(cls, leaf: Any) -> "Hidden":
        place = cls()
        described = describe("", leaf)
        place.shape, place.dtype = described.shape, described.dtype
        return place


@dataclasses.dataclass(eq=False)
class _Remembered:
    shape: tuple[int, ...]
    dtype: Any

    # Two trees with the same places hidden are trees of one structure, whatever stood there.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Remembered)

    def __hash__(self) -> int:
        return hash(_Remembered)


def _hidden(remembered: _Remembered, _: Any) -> Hidden:
    place = Hidden()
    place.shape, place.dtype = remembered.shape, remembered.dtype
    return place


jax.tree_util.register_pytree_node(Hidden, lambda place: ((), _Remembered(place.shape, place.dtype)), _hidden)


_HOLES = (type(None), optax.MaskedNode)


def canonical_paths(params: PyTree) -> list[str]:
    """The canonical path of every leaf, in the order of the tree: what patterns are compared with.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> wdjax.paths.canonical_paths({"Dense_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}})
        ['Dense_0/bias', 'Dense_0/kernel']
    """
    return [path for path, leaf in flatten_with_paths(params) if not is_hole(leaf)]


def is_hole(node: Any) -> bool:
    """Whether this place of a tree holds no parameter: `None`, or what `optax.masked` leaves behind."""
    return isinstance(node, _HOLES)


def is_decayable(leaf: Any) -> bool:
    """Whether the leaf is a real or complex number or array: not an integer, a boolean, a PRNG key or a hole."""
    dtype = getattr(leaf, "dtype", None)
    if is_hole(leaf) or dtype is None:
        return isinstance(leaf, (float, complex))
    return _is_inexact(dtype)


@functools.cache
def _is_inexact(dtype: Any) -> bool:
    # A `Leaf` has the type of what is no array for its dtype.
    is_python = type(dtype) is type and not issubclass(dtype, np.generic)
    return dtype in (float, complex) if is_python else jnp.issubdtype(dtype, jnp.inexact)


def flatten_with_paths(tree: PyTree) -> list[tuple[str, Any]]:
    """Every leaf and hole of a tree with its canonical path, in the order of `structure(tree)`."""
    boxes = box_types()
    stops = (*_HOLES, *boxes)

    def is_stop(x: Any) -> bool:
        return isinstance(x, stops)

    found = [("/".join(keys), leaf) for keys, leaf in _walk(tree, (), is_stop)]
    paths = [path for path, _ in found]
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(
            f"wdjax: two parameters have the path {twice!r}, as {{'a/b': ...}} beside {{'a': {{'b': ...}}}} have. "
            "Rename one: a rule by path could not tell them apart."
        )
    return found


def structure(tree: PyTree) -> Any:
    """The structure of a tree in which holes count as leaves."""
    return jax.tree.structure(tree, is_leaf=is_hole)


def check_broadcasts(where: str, what: str, array: Any, shape: tuple[int, ...]) -> None:
    """Refuses an array that does not broadcast against a parameter of this shape."""
    sizes = np.shape(array)
    pairs = zip(reversed(sizes), reversed(shape), strict=False)
    if len(sizes) > len(shape) or any(size not in (1, of_param) for size, of_param in pairs):
        raise ValueError(
            f"{where}: {what} is an array of shape {sizes}, which does not broadcast against the parameter's shape "
            f"{shape}. Give an array of {shape}, or with axes of size 1, or one number."
        )


def describe(path: str, leaf: Any) -> Leaf:
    """The description of a leaf that predicates get."""
    if is_hole(leaf) and not isinstance(leaf, Hidden):
        return Leaf(path, (), None)
    shape = (_shapes_taken.get() or {}).get(path, getattr(leaf, "shape", ()))
    return Leaf(path, tuple(shape), getattr(leaf, "dtype", type(leaf)))


_Shapes = Mapping[str, tuple[int, ...]]
_shapes_taken: contextvars.ContextVar[_Shapes | None] = contextvars.ContextVar("shapes", default=None)


@contextlib.contextmanager
def shapes_taken_for(shapes: _Shapes) -> Iterator[None]:
    """Lets rules take leaves for larger ones: they decide on small copies of a model as on the model."""
    token = _shapes_taken.set(shapes)
    try:
        yield
    finally:
        _shapes_taken.reset(token)


def warn_of_aliases(where: str, leaves: Sequence[tuple[str, Any]]) -> None:
    """Warns where one array stands in two places of a tree: updates, and decays, would tell the two apart."""
    paths: dict[int, list[str]] = {}
    for path, leaf in leaves:
        if isinstance(leaf, (jax.Array, np.ndarray)):
            paths.setdefault(id(leaf), []).append(path)
    tied = [" and ".join(map(repr, same[:3])) for same in paths.values() if len(same) > 1]
    if tied:
        more = f" (and {len(tied) - 1} more such arrays)" if len(tied) > 1 else ""
        checks.warn(
            f"{where}: {tied[0]} are one array{more}. In a tree of arrays they are parameters of their own: each gets "
            "its own update and its own decay, and the first step parts them. To keep them tied, have the array once "
            "in params and use it twice in the model: with NNX share the Variable and take nnx.state(model), with "
            "Equinox eqx.nn.Shared. To start alike, copy it."
        )


def beside(
    where: str, tree: PyTree, params: PyTree, paths: Sequence[str]
) -> tuple[list[Any], Callable[[Sequence[Any]], PyTree]]:
    """What stands in a tree at the place of each parameter, and how to build the tree anew.

    Args:
        where: the function to name in an error.
        tree: a tree like params, such as updates. It may have holes, and lack boxes that params have.
        params: the parameters.
        paths: their canonical paths, for the error.

    Returns:
        The leaf of the tree for each parameter, None where there is none; and a function that gives the tree with
        other leaves for them. The structure and the holes of the tree stay.

    Raises:
        ValueError: if the tree has another structure than `params`.
    """
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_hole)
    params_def = structure(params)
    places: list[Any] = list(range(params_def.num_leaves))
    if treedef != params_def:
        try:
            places = treedef.flatten_up_to(jax.tree.unflatten(params_def, places))
        except (ValueError, TypeError) as error:
            raise ValueError(_structure_message(where, tree, paths)) from error
    found: list[Any] = [None] * len(paths)
    for n, (leaf, place) in enumerate(zip(leaves, places, strict=True)):
        indices = jax.tree.leaves(place)
        if len(indices) == 1:
            places[n] = indices[0]
            found[indices[0]] = leaf
        elif is_hole(leaf):  # A hole may stand for a whole part of the parameters.
            places[n] = None
        else:
            raise ValueError(_structure_message(where, tree, paths))

    def rebuilt(new: Sequence[Any]) -> PyTree:
        filled = [leaf if i is None else new[i] for leaf, i in zip(leaves, places, strict=True)]
        return jax.tree.unflatten(treedef, filled)

    return found, rebuilt


def of_each(
    tree: PyTree,
    acts: Callable[[Any], bool],
    leaf_fn: Callable[[Any], Any],
    other_fn: Callable[[Any], Any] = lambda x: None,
) -> PyTree:
    """The tree with `leaf_fn` of the leaves that `acts` selects, arrays or their shapes, and `other_fn` of the others.

    A box that loses its content becomes None: Flax would ask it for the sharding of its content.
    """
    boxes = box_types()

    def act(x: Any) -> Any:
        if isinstance(x, boxes):
            new = jax.tree.map(act, x)
            return None if jax.tree.leaves(x) and not jax.tree.leaves(new) else new
        if not acts(x):
            return other_fn(x)
        return jax.eval_shape(leaf_fn, x) if isinstance(x, jax.ShapeDtypeStruct) else leaf_fn(jnp.asarray(x))

    return jax.tree.map(act, tree, is_leaf=lambda x: isinstance(x, boxes))


def _structure_message(where: str, updates: PyTree, paths: Sequence[str]) -> str:
    found = {path for path, _ in flatten_with_paths(updates)}
    if found == set(paths):
        return (
            f"{where}: updates and params have the same paths in different containers (a list for a tuple, a dict "
            f"for a FrozenDict): updates are {jax.tree.structure(updates)}. Give both in the containers of params."
        )
    return (
        f"{where}: updates and params are trees of different structure. "
        f"Only in updates: {sorted(found - set(paths))[:5]}; only in params: {sorted(set(paths) - found)[:5]}. "
        "Pass the parameters that the gradients were taken of: optimizer.update(grads, state, params)."
    )


def _walk(
    tree: PyTree, prefix: tuple[str, ...], is_stop: Callable[[Any], bool], *, box: bool = False
) -> list[tuple[tuple[str, ...], Any]]:
    found = []
    # The root of a box is not its own leaf, and the key under it ("value") is not part of the path.
    stop = (lambda x: x is not tree and is_stop(x)) if box else is_stop
    for keys, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=stop)[0]:
        path = prefix + tuple(map(key_text, keys[1:] if box else keys))
        if is_stop(node) and not is_hole(node):
            found += _walk(node, path, is_stop, box=True)
        else:
            found.append((path, node))
    return found


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
    # A box in the tree means that its library is imported already; wdjax itself needs no Flax.
    names = (("flax.core.meta", "AxisMetadata"), ("flax.nnx", "Variable"))
    found = (getattr(sys.modules.get(module), name, None) for module, name in names)
    return tuple(kind for kind in found if isinstance(kind, type))
