"""The decay of each parameter, as far as it is known before a step: its rate, the axes that stack layers, its mask."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from . import trees
from .arithmetic import Term
from .decision import PerLayer, stack_of
from .masks import flags
from .rules import Rules, decisions, rates_of

PyTree = Any
Leaves = Sequence[tuple[str, Any]]  # Canonical paths and leaves.
Terms = list[Term | None]  # One for each leaf; None where nothing decays.


def terms_of_leaves(
    where: str,
    rates: Mapping[str, Any],
    mask: Any,
    stacked_axes: Any,
    params: PyTree,
    leaves: Leaves,
    off_at: float | None,
) -> Terms:
    """The term of each leaf before this step, without its anchor; None for a leaf that does not decay."""
    columns = []
    chosen = flags(where, mask, params, leaves)
    asked = trees.hidden_where(chosen, leaves)
    for name, rate in rates.items():
        of_each = rates_of(rate, where, asked) if isinstance(rate, Rules) else [(rate,)] * len(leaves)
        columns.append([factors and [(name, factor) for factor in factors] for factors in of_each])
    rows: Terms = []
    counts = stack_counts(where, stacked_axes, leaves)
    for flag, count, (path, leaf), *named in zip(chosen, counts, leaves, *columns, strict=True):
        if flag is False or None in named or not trees.is_decayable(leaf):
            rows.append(None)
            continue
        factors = list(itertools.chain(*named))
        stack = _checked_stack(where, path, leaf, count)
        stack = tuple(sorted({*stack, *stack_of(where, path, (factor for _, factor in factors))}))
        part = None if flag is True or off_at == 0 else flag
        if flag is not True and part is None:  # At a rate of 0 the rule does nothing.
            factors.append(("mask", flag))
        values = tuple(_spread(where, name, factor, path, leaf) for name, factor in factors)
        rows.append(Term(values, tuple(name for name, _ in factors), stack=stack, part=part))
    return rows


def stack_counts(where: str, stacked_axes: Any, leaves: Leaves) -> list[int]:
    """How many leading axes of each leaf stack layers, as the user says it."""
    if not isinstance(stacked_axes, Rules):
        return [stacked_axes] * len(leaves)
    found = decisions(stacked_axes, where, leaves)
    return [0 if decision is None else int(decision.value) for decision in found]


def known_stacks(where: str, stacked_axes: Any, leaves: Leaves, rows: Terms) -> list[tuple[int, ...]]:
    """The axes of each leaf that stack layers, for a rule with a state, which must know them without the rates."""
    found = []
    for count, row, (path, leaf) in zip(stack_counts(where, stacked_axes, leaves), rows, leaves, strict=True):
        found.append(_checked_stack(where, path, leaf, count) if trees.is_decayable(leaf) else ())
        if row is not None and row.stack != found[-1]:
            raise ValueError(
                f"{where}: the rate of {path!r} has one number for each layer along axis {row.stack[-1]}. The state "
                "must know which axes stack layers, however the rates change. Say that the first axis does: "
                f"{where}(..., stacked_axes=1), or for some parameters stacked_axes={{'blocks': 1}}."
            )
    return found


def _checked_stack(where: str, path: str, leaf: Any, count: int) -> tuple[int, ...]:
    if count > np.ndim(leaf):
        raise ValueError(
            f"{where}: stacked_axes={count} for {path!r}, whose shape is {np.shape(leaf)}. Write "
            "stacked_axes={'layers': 1} if only the first axis of 'layers' stacks layers."
        )
    return tuple(range(count))


def _spread(where: str, name: str, factor: Any, path: str, leaf: Any) -> Any:
    """The factor. An array, or a number for each layer, becomes an array of the parameter's rank."""
    if isinstance(factor, PerLayer):
        return factor.along(np.ndim(leaf))
    if callable(factor) or np.ndim(factor) == 0:
        return factor
    shape = np.shape(leaf)
    trees.check_broadcasts(where, f"{name} at {path!r}", factor, shape)
    return factor.reshape((1,) * (len(shape) - factor.ndim) + factor.shape)
