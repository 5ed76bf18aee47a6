"""The anchors that decays pull toward: zero, given values, the values at `init`, or a moving average of the weights.

What a decay keeps of an anchor is a tree like params in its state. A given anchor is a constant of the program.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import trees
from .arithmetic import Strength, away, cast, compute_dtype, jitted_act, plus, stateless
from .rules import Rules, decisions, possible_values
from .text import lacks, listed, shown

PyTree = Any
Leaves = Sequence[tuple[str, Any]]


@dataclasses.dataclass(frozen=True)
class EMA:
    """An anchor that follows the weights: their exponential moving average. `toward=EMA(0.999)` pulls toward it.

    Rule:   a_0 = p_0. The update of p_t pulls toward a_t. Then a_{t+1} = decay * a_t + (1 - decay) * p_t.
    Units:  per step: the average has a memory of about 1 / (1 - decay) steps.
    Source: elastic averaging SGD with one worker (Zhang, Choromanska & LeCun 2015). There, the rate of
            `decoupled_decay` is called rho, and 1 - decay is called beta.

    The state of the decay holds the average, in at least float32. Steps that a wrapper skips do not move it. Penalties
    in the loss have no state, so they do not take it. `with_lazy_decay` does not take it either.

    Args:
        decay: a number from 0 to less than 1, not an array. (With 1 the anchor would stay: write `toward="init"`.)

    Raises: ValueError for another decay.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> decay = wdjax.independent_decay(0.5, toward=wdjax.EMA(0.75))
        >>> state = decay.init(jnp.array([0.0]))
        >>> _, state = decay.update(jnp.zeros(1), state, jnp.array([4.0]))
        >>> updates, _ = decay.update(jnp.zeros(1), state, jnp.array([4.0]))  # The average is 1 now.
        >>> float(updates[0])
        -1.5
    """

    decay: float

    def __post_init__(self) -> None:
        if not _is_number(self.decay) or not 0 <= self.decay < 1:
            is_array = isinstance(self.decay, (np.ndarray, jax.Array))
            constant = " It is a constant of the program, so it can't be an array or traced." if is_array else ""
            raise ValueError(
                f"EMA: decay must be a number from 0 to less than 1, got {shown(self.decay)}.{constant} Write "
                "toward=EMA(0.999); for an anchor that never moves, toward='init'."
            )


def check(where: str, toward: Any) -> None:
    """Raises an error for what is no anchor."""
    if isinstance(toward, Rules):
        wrong = [value for value in possible_values(toward) if not (_is_kept(value) or _is_zero(value))]
        if wrong or toward.factors:
            raise ValueError(
                f"{where}: a table of anchors holds 0.0, 'init' and EMA(...), but {shown(toward)} holds "
                f"{shown(wrong[0]) if wrong else 'a factor'}. Give arrays in a tree like params: "
                "toward={'encoder': pretrained, 'head': 0.0}."
            )
    elif isinstance(toward, type) or (isinstance(toward, str) and toward != "init"):
        raise ValueError(
            f"{where}: toward must be None (zero), a tree like params, 'init', EMA(...), or a table by path of "
            f"these and 0.0, got {shown(toward)}. Write {where}(..., toward='init') for the values at init."
        )
    elif not _is_kept(toward):
        if kept := [leaf for leaf in jax.tree.leaves(toward) if isinstance(leaf, str) or _is_kept(leaf)]:
            raise ValueError(
                f"{where}: toward holds {shown(kept[0])}, but a tree like params holds arrays, and 0.0 for zeros. "
                "Write 'init' and EMA(...) by path: toward=by_path({'encoder': 'init'}, default=0.0)."
            )
        trees.parameters(where, toward, "toward", may_hold=["functions"])


def is_in_state(toward: Any) -> bool:
    """Whether the state of a decay keeps this anchor."""
    return _is_kept(toward) or isinstance(toward, Rules)


def _is_kept(value: Any) -> bool:
    return isinstance(value, EMA) or (isinstance(value, str) and value == "init")


def kinds(where: str, toward: Any, leaves: Leaves) -> list[Any]:
    """For each leaf, what the state keeps of it: "init", an `EMA`, or None."""
    if not is_in_state(toward):
        return [None] * len(leaves)
    given = [toward] * len(leaves)
    if isinstance(toward, Rules):
        given = [None if decision is None else decision.value for decision in decisions(toward, where, leaves)]
    pairs = zip(given, leaves, strict=True)
    return [value if _is_kept(value) and trees.is_decayable(leaf) else None for value, (_, leaf) in pairs]


def initial(where: str, toward: Any, params: PyTree, leaves: Leaves) -> PyTree:
    """What the state keeps at first: a tree like params with copies of those that are anchors, or None."""
    if not is_in_state(toward):
        return None
    if isinstance(toward, str):
        # If the state shared the buffers of params, the two could not both be donated.
        return jax.tree.map(_copied, params)
    each = zip(kinds(where, toward, leaves), leaves, strict=True)
    of_leaves = [kind for kind, (_, leaf) in each if not trees.is_hole(leaf)]
    decided, chosen = iter(of_leaves), iter([kind for kind in of_leaves if kind is not None])
    return trees.of_each(params, lambda _: next(decided) is not None, lambda p: _first(next(chosen), p))


def _first(kind: Any, p: jax.Array) -> Any:
    return jnp.array(p, compute_dtype(p)) if isinstance(kind, EMA) else _copied(p)


def _copied(p: Any) -> Any:
    return p.copy() if hasattr(p, "copy") else p


def moved(where: str, toward: Any, kept: PyTree, params: PyTree, is_real: jax.Array | None = None) -> PyTree:
    """What the state keeps after an update of params, unless it is known not to be a real step."""
    if not isinstance(toward, (EMA, Rules)) or kept is None:
        return kept
    leaves = trees.flatten_with_paths(params)
    anchors = dict(trees.flatten_with_paths(kept))
    order = list(anchors)
    for kind, (path, param) in zip(kinds(where, toward, leaves), leaves, strict=True):
        if isinstance(kind, EMA) and not trees.is_hole(anchors.get(path)):
            # A state that was made for "init" has anchors as narrow as the parameters.
            anchor = cast(anchors[path], compute_dtype(anchors[path], param))
            share = jnp.finfo(compute_dtype(anchor, param)).dtype.type(1 - kind.decay)
            factors = (share,) if is_real is None else (share, is_real)
            anchors[path], _ = jitted_act(_MOVED, (), anchor, param, anchor, factors, None, None)
    return jax.tree.unflatten(trees.structure(kept), [anchors[path] for path in order])


def _toward_params(anchor: jax.Array, p: jax.Array, same: jax.Array | None, rate: Strength) -> jax.Array:
    return plus(anchor, rate, away(p, same))


_MOVED = stateless(_toward_params)


def found(where: str, toward: Any, leaves: Leaves, acts: Sequence[bool], kept: PyTree) -> list[Any]:
    """Each leaf's anchor, by canonical path; None for zero. Leaves on which nothing acts need no anchor."""
    if toward is None or not leaves:
        return [None] * len(leaves)
    if is_in_state(toward) and kept is None:
        raise ValueError(_no_anchor(where, toward, ""))
    given = dict(trees.flatten_with_paths(kept if is_in_state(toward) else toward))
    if isinstance(toward, Rules):
        each = zip(kinds(where, toward, leaves), leaves, strict=True)
        given |= {path: 0.0 for kind, (path, leaf) in each if kind is None and not trees.is_hole(leaf)}
    zeros = {path for path, anchor in given.items() if _is_zero(anchor)}
    holes = tuple(path + "/" for path, leaf in leaves if trees.is_hole(leaf))
    paths = {path: np.shape(leaf) for path, leaf in leaves}
    nodes = {node for path in paths for node in trees.prefixes(path)}
    write = f"Write {where}(..., toward=pretrained_params), or toward='init'."
    for path in [path for path, anchor in given.items() if path in nodes - zeros and not trees.is_hole(anchor)]:
        if path not in paths or (_is_number(given[path]) and paths[path] != ()):
            at, there = f"at {path!r}" if path else "alone", "an array" if path in paths else "more"
            raise ValueError(
                f"{where}: toward is {shown(given[path])} {at}, where params have {there}. Give an array for "
                f"each parameter, or 0.0 for zeros. {write}"
            )
    acting = [leaf for leaf, acts_on in zip(leaves, acts, strict=True) if acts_on]
    pulled = [(path, leaf) for path, leaf in acting if zeros.isdisjoint(trees.prefixes(path))]
    missing = [path for path, _ in pulled if trees.is_hole(given.get(path))]
    for path in missing:
        if isinstance(hole := given.get(path), trees.Hidden):
            hole.refuse()
    known = {path for path in given if path in paths or path.startswith(holes)} | (zeros & nodes)
    extra = [path for path, anchor in given.items() if not (path in known or trees.is_hole(anchor))]
    if missing and is_in_state(toward):
        raise ValueError(_no_anchor(where, toward, f" of {listed(missing)}"))
    if missing or extra:
        fits = missing and not paths.keys().isdisjoint(given)
        zero = f" For zero write 0.0: toward={_with_zero(missing[0], given)}." if fits else ""
        raise ValueError(f"{where}: toward must be a tree like params. {lacks(missing, extra)}{zero} {write}")
    for path, leaf in pulled:
        anchor = given[path]
        if np.shape(anchor) != np.shape(leaf):
            raise ValueError(
                f"{where}: toward has shape {np.shape(anchor)} at {path!r}, but the parameter has "
                f"{np.shape(leaf)}. {write}"
            )
        if not trees.is_decayable(anchor) or (jnp.iscomplexobj(anchor) and not jnp.iscomplexobj(leaf)):
            raise ValueError(
                f"{where}: toward is {jnp.result_type(anchor)} at {path!r}, but the parameter is "
                f"{jnp.result_type(leaf)}. Convert it: a.astype(p.dtype). {write}"
            )
    acted_on = {path for path, _ in pulled}
    return [given[path] if path in acted_on else None for path, _ in leaves]


def _no_anchor(where: str, toward: Any, of: str) -> str:
    return (
        f"{where}: toward={shown(toward)}, but the state holds no anchor{of}: an optimizer without one made it. "
        "Make a new state, optimizer.init(params), and copy the rest of the old state into it."
    )


def _with_zero(path: str, given: Iterable[str]) -> str:
    """How to write that a part of `toward` is zero: the outermost node above this path of which nothing is given."""
    nodes = {node for other in given for node in trees.prefixes(other)}
    *_, node = [path, *(node for node in trees.prefixes(path) if node and node not in nodes)]
    text = "0.0"
    for key in reversed(node.split("/")):
        text = f"{{..., {key!r}: {text}}}"
    return text


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def _is_zero(value: Any) -> bool:
    return _is_number(value) and value == 0
