"""The groups of parameters whose metrics are one: by the rules that decay them, or as the user says."""

from collections.abc import Sequence
from typing import Any

from .._engine import trees
from .._engine.rules import decisions, possible_values
from .._engine.text import shown
from ..paths import Rules
from ._reading import UNDECAYED, Found


def check_groups(where: str, groups: Any) -> None:
    write = f"{where}(..., groups=by_path({{'embedding': 'embeddings'}}, default='rest'))"
    if isinstance(groups, Rules):
        wrong = [value for value in possible_values(groups) if not isinstance(value, str)]
        if wrong:
            raise TypeError(
                f"{where}: groups must be strings, but {shown(groups)} holds {shown(wrong[0])}. Write {write}."
            )
    elif groups is not None and (not callable(groups) or isinstance(groups, type)):
        raise TypeError(
            f"{where}: groups must be Rules of strings, or a function from a Leaf to a string, got {shown(groups)}. "
            f"Write {write}, or groups=lambda leaf: leaf.path for one group per array."
        )


def labels_of(found: Found, groups: Any, leaves: Sequence[tuple[str, Any]]) -> list[str | None]:
    """The group of each leaf; None for leaves that can't decay."""
    if groups is None:
        labels = [" + ".join(found.rules.get(path, (UNDECAYED,))) for path, _ in leaves]
        return [label if trees.is_decayable(leaf) else None for label, (_, leaf) in zip(labels, leaves, strict=True)]
    if isinstance(groups, Rules):
        chosen = decisions(groups, "monitor", leaves)
        return [d.value if d and trees.is_decayable(x) else None for d, (_, x) in zip(chosen, leaves, strict=True)]
    labels: list[str | None] = []
    for path, leaf in leaves:
        label = groups(trees.describe(path, leaf)) if trees.is_decayable(leaf) else None
        if trees.is_decayable(leaf) and not isinstance(label, str):
            raise TypeError(f"monitor: groups must return a string, but returned {shown(label)} for {path!r}.")
        labels.append(label)
    return labels
