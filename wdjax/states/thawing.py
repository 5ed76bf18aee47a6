"""The state with which training continues when other parameters are frozen."""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .._engine import checks, trees
from .._engine.text import listed
from .._engine.types import Optimizer, Params

PyTree = Any


@checks.known_arguments
def thaw(state: PyTree, optimizer: Optimizer, params: Params) -> PyTree:
    """The state with which training continues when other parameters are frozen than before.

    It carries over everything that both states have: moments, counts, anchors, the learning rate of
    `optax.inject_hyperparams`. A parameter that was frozen until now starts as in `optimizer.init(params)`: with
    moments of 0, with its value now as its anchor or average, and with its norm now as its radius of "init". What is
    frozen from now on loses its state.

    Counts are shared by all parameters. So Adam corrects the moments of a parameter that is thawed after t updates as
    if they were t updates old. With equal gradients, the parameter's k-th step is larger than that of a new Adam by

        (1 - b1^k) / (1 - b1^(t + k)) * sqrt((1 - b2^(t + k)) / (1 - b2^k))

    For b1 = 0.9, b2 = 0.999 and a large t, this is 3.2 in the first step, at most 6.6 (in the twelfth), and 1.3 after
    1000 steps. Warm up the learning rate after you thaw.

    Args:
        state: the state of the same optimizer with other frozen parameters, or with none. It may be restored from a
            checkpoint, and it may be traced.
        optimizer: the optimizer that goes on: `freeze(optimizer, mask)` with another mask, or without `freeze`.
        params: the parameters now, all of them, where they have to be: new moments are placed like them.

    Returns:
        A state of `optimizer`. The arrays of `state` stay where they are; `thaw` neither copies nor changes them.

    Raises:
        TypeError: if `optimizer` is not an optimizer.
        ValueError: if the states differ in more than what is frozen. It names the paths, shapes and dtypes.

    Example:

        >>> import jax, jax.numpy as jnp, optax, wdjax
        >>> params = {"encoder": jnp.ones(2), "head": jnp.ones(2)}
        >>> whole = optax.adam(0.1)
        >>> head_only = wdjax.freeze(whole, wdjax.only("encoder"))
        >>> _, state = head_only.update(params, head_only.init(params), params)
        >>> adam, _ = wdjax.thaw(state, whole, params)
        >>> print(adam.count, adam.mu["head"], adam.mu["encoder"])
        1 [0.1 0.1] [0. 0.]
    """
    inner = checks.finished("thaw", optimizer, "thaw(state, optimizer, params)")
    fresh = inner.init(params)
    found = matched(state, fresh, params)
    if found.faults:
        of_restore = ""
        if type(state) is not type(fresh):
            of_restore = (
                f" It is a {type(state).__name__} where the optimizer has a {type(fresh).__name__}. If it was restored "
                "without a template, restore it with the state of the optimizer that saved it, optimizer.init(params)."
            )
        raise ValueError(
            "thaw: this is not a state of this optimizer and these parameters with others of them frozen. "
            f"{' '.join(found.faults)}{of_restore} {_remedy(found)}"
        )
    return jax.tree.unflatten(trees.structure(fresh), found.leaves)


def _remedy(found: "Matched") -> str:
    """What to write if the states differ in more than what is frozen."""
    are_anchors = [bool(re.search(r"(^|/)anchor(/|$)", path)) for path in found.missing]
    if len(found.faults) == 1 and are_anchors and all(are_anchors):
        return (
            "The old optimizer had no toward, so its state holds no anchor. Give it the same toward= from the start, "
            "also while parameters are frozen."
        )
    return (
        "The state must come from the same optimizer, with or without freeze, such as freeze(optimizer, "
        "only('encoder')). Has a number become a schedule, or was a transformation added?"
    )


class Matched(NamedTuple):
    """What two states have in common.

    Attributes:
        leaves: for each leaf and hole of the new state, what it continues with.
        thawed: the paths where only the new state has something, and the old one has a hole for parameters.
        frozen: the same with the two states exchanged.
        faults: sentences about other differences.
        missing: the paths that the old state lacks, although it has no hole for parameters there.
    """

    leaves: list[Any]
    thawed: list[str]
    frozen: list[str]
    faults: list[str]
    missing: list[str]


def matched(state: PyTree, fresh: PyTree, params: Params) -> Matched:
    """Matches a state with a new one of the same optimizer, in which other parameters may be frozen."""
    old, new = (dict(trees.flatten_with_paths(tree)) for tree in (state, fresh))
    places = {place for path, _ in trees.flatten_with_paths(params) for place in trees.prefixes(path) if place}
    old_holes, new_holes = (_holes_for_parameters(tree, places) for tree in (old, new))
    leaves, thawed, missing, differing = [], [], [], []
    for path, leaf in new.items():
        own = old.get(path)
        if trees.is_hole(leaf):
            leaves.append(leaf)
        elif _is_measured(path, new):
            leaves.append(own if _kind(own) == _kind(leaf) else leaf)
        elif not trees.is_hole(own):
            leaves.append(own)
            if _kind(own) != _kind(leaf):
                differing.append(f"{path!r} is {_kind(own)} in the state and {_kind(leaf)} in optimizer.init(params).")
        else:
            leaves.append(leaf)
            (missing if old_holes.isdisjoint(trees.prefixes(path)) else thawed).append(path)
    only_old = [path for path, own in old.items() if not trees.is_hole(own) and trees.is_hole(new.get(path))]
    only_old = [path for path in only_old if not _is_measured(path, old)]
    frozen = [path for path in only_old if not new_holes.isdisjoint(trees.prefixes(path))]
    extra = [path for path in only_old if new_holes.isdisjoint(trees.prefixes(path))]
    faults = [f"Only the state has {listed(extra)}."] * bool(extra)
    faults += [f"Only optimizer.init(params) has {listed(missing)}."] * bool(missing) + differing[:3]
    return Matched(leaves, thawed, frozen, faults, missing)


def _holes_for_parameters(tree: dict[str, Any], places: set[str]) -> set[str]:
    """The holes that stand for parameters. None may also mean that there is no anchor at all: its place decides."""

    def is_for_parameters(path: str, node: Any) -> bool:
        is_place = any(end in places for _, end in trees.cuts(path))
        return isinstance(node, optax.MaskedNode) or (node is None and is_place)

    return {path for path, node in tree.items() if is_for_parameters(path, node)}


def _is_measured(path: str, tree: dict[str, Any]) -> bool:
    """Whether a leaf is one of the metrics of a `monitor`, whose groups depend on what is frozen."""
    base, measured, _ = f"/{path}".partition("/measured/")
    return bool(measured) and f"{base}/decay/count".removeprefix("/") in tree


def _kind(leaf: Any) -> str:
    if trees.is_hole(leaf):
        return "empty"
    return f"{getattr(leaf, 'dtype', None) or jnp.result_type(leaf)} of shape {getattr(leaf, 'shape', ())}"
