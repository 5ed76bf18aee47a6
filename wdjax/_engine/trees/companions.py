"""Trees beside the parameters, such as updates and states: leaf by leaf, with an error if their structure differs."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..text import kind_of, listed, shown
from .flattening import box_types, flatten_with_paths, key_text, structure
from .leaves import is_hole

PyTree = Any


def beside(
    where: str, tree: PyTree, params: PyTree, paths: Sequence[str]
) -> tuple[list[Any], Callable[[Sequence[Any]], PyTree]]:
    """The leaf of a tree for each parameter, or None, and a function that rebuilds the tree from new leaves.

    The tree may have holes, which stay, and may lack boxes that params have. The canonical paths are for the error.
    """
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_hole)
    params_def = structure(params)
    places: list[Any] = list(range(params_def.num_leaves))
    if treedef != params_def:
        try:
            places = treedef.flatten_up_to(jax.tree.unflatten(params_def, places))
        except (ValueError, TypeError) as error:
            raise ValueError(_structure_message(where, tree, params, paths)) from error
    found: list[Any] = [None] * len(paths)
    for n, (leaf, place) in enumerate(zip(leaves, places, strict=True)):
        indices = jax.tree.leaves(place)
        if len(indices) == 1:
            places[n] = indices[0]
            found[indices[0]] = leaf
        elif is_hole(leaf):  # A hole may stand for a whole subtree of parameters.
            places[n] = None
        else:
            raise ValueError(_structure_message(where, tree, params, paths))

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
    """Maps `leaf_fn` over the leaves that `acts` selects (arrays or their shapes), and `other_fn` over the others.

    A box whose leaves all vanish becomes None, because Flax would ask it for the sharding of its content.
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


def _structure_message(where: str, updates: PyTree, params: PyTree, paths: Sequence[str]) -> str:
    found = {path for path, _ in flatten_with_paths(updates)}
    if found == set(paths):
        at, difference = _difference(updates, params, "") or ("", "their structures differ in their static data")
        place = f"at {at!r}" if at else "at the root"
        return (
            f"{where}: updates and params have the same paths in different containers: {place}, {difference}. "
            "Make both from one tree, as in jax.grad(loss)(params) and jax.tree.map(f, params)."
        )
    only = {"updates": found - set(paths), "params": set(paths) - found}
    said = ". ".join(f"Only in {name}: {listed(sorted(some))}" for name, some in only.items() if some)
    return (
        f"{where}: updates and params are trees of different structure. {said}. "
        "Pass the parameters that the gradients belong to: optimizer.update(grads, state, params)."
    )


def _difference(update: PyTree, param: PyTree, path: str) -> tuple[str, str] | None:
    """The outermost node of two trees with the same paths that differs, and how."""
    (keys, nodes, one_level), (of_param, nodes_of_param, one_level_of_param) = map(_opened, (update, param))
    if is_hole(update) or not (keys or of_param):
        return None
    if one_level == one_level_of_param:
        for key, below, below_param in zip(keys, nodes, nodes_of_param, strict=True):
            if found := _difference(below, below_param, f"{path}/{key}".removeprefix("/")):
                return found
        return None
    if type(update) is not type(param):
        return path, f"updates have {kind_of(update)} and params {kind_of(param)}"
    if keys != of_param:
        both = f"updates have the keys in the order {shown(keys)} and params in the order {shown(of_param)}"
        return path, f"{both} (JAX sorts a plain dict)"
    names = [field.name for field in dataclasses.fields(param)] if dataclasses.is_dataclass(param) else []
    static = [name for name in names if name not in keys and getattr(update, name) is not getattr(param, name)]
    return path, f"the static fields {static} of {kind_of(param)} differ" if static else f"{kind_of(param)} differs"


def _opened(node: PyTree) -> tuple[list[str], list[Any], Any]:
    """The keys, children and structure of one node. A box stands for its content."""
    children, one_level = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    if isinstance(node, box_types()) and len(children) == 1:
        return _opened(children[0][1])
    return [key_text(keys[0]) for keys, _ in children if keys], [child for _, child in children], one_level
