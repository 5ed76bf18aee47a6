"""Turns every kind of mask that Optax users write into one answer for each leaf.

The answer is a boolean, or an array of booleans that broadcasts against the leaf.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from . import trees
from .rules import Rules, flags_of
from .text import lacks, shown
from .unstable import is_traced

PyTree = Any
_IS_DECIDED = "A mask must be known during tracing: build it with NumPy, from paths and shapes."
# What JAX raises where Python needs the value of something traced.
NEEDS_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


def flags(
    where: str, mask: Any, params: PyTree, leaves: Sequence[tuple[str, Any]], *, of_all: bool = False
) -> list[Any]:
    """Each leaf's answer under a mask: None, `Rules`, a function of params, a tree of booleans or a prefix tree.

    With `of_all`, `Rules` also answer for integers and keys, which never decay but may be frozen. Trees are matched
    by canonical path, so that one built from NNX Variables or a FrozenDict also fits bare arrays and plain dicts.
    """
    if mask is None or not leaves:
        return [True] * len(leaves)
    if isinstance(mask, Rules):
        return _fitting(where, flags_of(mask, where, leaves, of_all=of_all), leaves, of_all)
    if isinstance(mask, (bool, np.bool_, np.ndarray, jax.Array)) and [path for path, _ in leaves] != [""]:
        is_array = isinstance(mask, (np.ndarray, jax.Array))
        given = f"one array of shape {np.shape(mask)}" if is_array else f"{mask}, one boolean"
        raise TypeError(
            f"{where}: the mask is {given} for the whole tree. Leave it out to decay all, or write a rule set: "
            "mask=only('kernel'), mask=by_path({'embedding': array}, default=True). optax.inject_hyperparams takes a "
            "mask function for a schedule: give it a rule set, or name the mask in static_args."
        )
    # A tree may also be callable, such as an Equinox module of booleans.
    is_function = callable(mask) and jax.tree.structure(mask) == jax.tree.structure(0)
    tree = _called(where, mask, params) if is_function else mask
    entries = trees.flatten_with_paths(tree)
    paths = [path for path, _ in leaves]
    # A list of Keras variables has paths, and one of booleans has numbers.
    if [path for path, _ in entries] != paths and trees.structure(tree) == trees.structure(params):
        entries = [(path, flag) for path, (_, flag) in zip(paths, entries, strict=True)]
    given = {path: _flag(where, path, flag) for path, flag in entries if not trees.is_hole(flag)}
    owners = [next((prefix for prefix in trees.prefixes(path) if prefix in given), None) for path, _ in leaves]
    owned = zip(owners, leaves, strict=True)
    bare = [path for owner, (path, leaf) in owned if owner is None and not trees.is_hole(leaf)]
    holes = {path for path, leaf in leaves if trees.is_hole(leaf)}
    used = set(owners)
    extra = [p for p in given if p not in used and holes.isdisjoint(trees.prefixes(p))]
    if bare or extra:
        raise ValueError(
            f"{where}: the mask is neither a tree like params nor a prefix of one. {lacks(bare, extra)} Build the "
            "mask from the same tree, jax.tree.map(lambda p: p.ndim > 1, params), or by path, mask=all_but('bias')."
        )
    return _fitting(where, [False if owner is None else given[owner] for owner in owners], leaves, of_all)


def _fitting(where: str, found: Sequence[Any], leaves: Sequence[tuple[str, Any]], of_all: bool) -> list[Any]:
    """The answers, after a check that arrays broadcast. An array of equal values becomes one boolean."""
    pairs = zip(found, leaves, strict=True)
    return [flag if isinstance(flag, bool) else _parts(where, flag, *leaf, of_all) for flag, leaf in pairs]


def _parts(where: str, flag: Any, path: str, leaf: Any, of_all: bool) -> Any:
    if trees.is_hole(leaf) or not (of_all or trees.is_decayable(leaf)):
        return False
    if is_traced(flag):
        raise TypeError(f"{where}: the mask at {path!r} is traced. {_IS_DECIDED}")
    trees.check_broadcasts(where, f"the mask at {path!r}", flag, np.shape(leaf))
    if not getattr(flag, "is_fully_addressable", True):  # Other processes have a part of it.
        return flag
    array = np.asarray(flag)
    return bool(array.flat[0]) if array.size and array.all() == array.any() else array


def _called(where: str, mask: Any, params: PyTree) -> PyTree:
    if inspect.isfunction(mask) and mask.__module__.partition(".")[0] == "wdjax":
        raise TypeError(f"{where}: the mask is the function {mask.__name__}. Call it: mask={mask.__name__}(...).")
    try:
        return mask(params)
    except NEEDS_VALUES as error:
        name = getattr(mask, "__name__", type(mask).__name__)
        raise TypeError(
            f"{where}: the mask function {name} looks at the values of params, which are traced here. {_IS_DECIDED} Or "
            "call it once, before tracing, and give its result: mask=mask(params)."
        ) from error
    except (AttributeError, TypeError) as error:
        raise TypeError(
            f"{where}: the mask function failed on params: {error}. It gets the whole tree: write "
            "lambda params: jax.tree.map(lambda p: p.ndim > 1, params), or mask=only(lambda leaf: leaf.ndim > 1)."
        ) from error


def _flag(where: str, path: str, flag: Any) -> Any:
    if isinstance(flag, (bool, np.bool_)):
        return bool(flag)
    place = f"the mask at {path!r}" if path else "the mask"
    if is_traced(flag):
        raise TypeError(f"{where}: {place} is traced. {_IS_DECIDED}")
    if isinstance(flag, (np.ndarray, jax.Array)) and flag.dtype == bool:
        return flag if flag.shape else bool(flag)
    if isinstance(flag, str):
        remedy = f"For a mask by name write mask=only({flag!r}) or mask=all_but({flag!r})."
    elif isinstance(flag, (int, float, np.number, np.ndarray, jax.Array)):
        remedy = "Put multipliers in the rate: weight_decay=0.1 * by_path({'kernel': 1.0, 'norm': 0.5}, default=0.0)."
    else:
        remedy = "Write mask=all_but('bias'), or a tree of booleans like params."
    raise TypeError(f"{where}: {place} is {shown(flag)}, which is not a boolean. {remedy}")
