"""Layer-wise decay: multipliers from the depth of a block, for lists, numbered names and stacked layers."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

from .._engine import checks, trees
from .._engine.rules import Decision, PerLayer, Rules, Tree, entries
from . import language
from .language import Pattern

_NUMBER = r"(\d+)"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ByDepth(Rules, kind="by_depth"):
    """factor ** (number of blocks above). The depth of a block is the rank of its number among all blocks."""

    blocks: tuple[Pattern, ...]
    factor: float
    first: tuple[Pattern, ...]
    axis: int | None

    def _decide(self, tree: Tree, asked: Sequence[int]) -> dict[int, Decision]:
        everyone = range(len(tree.leaves))
        first = set().union(*(language.matching(tree, pattern, everyone, everyone) for pattern in self.first))
        decided, count = self._by_number(tree, first) if self.axis is None else self._by_axis(tree, asked, first)
        stem = Decision(self.factor ** (count + 1), "by_depth", f"before block 0 of {count}")
        rest = Decision(1.0, "by_depth", f"outside the {count} blocks")
        return {i: decided.get(i) or (stem if i in first else rest) for i in asked}

    def _by_number(self, tree: Tree, first: set[int]) -> tuple[dict[int, Decision], int]:
        numbers: dict[int, tuple[int, ...]] = {}
        for pattern in self.blocks:
            found = self._numbers(tree, pattern)
            if not found:
                shown = language.show((pattern,))
                raise ValueError(
                    f"{tree.where}: by_depth: {shown} matches no parameter. Here '*' stands for a number. Write "
                    f"by_depth('Block_*', ...) or by_depth('layers/*', ...). For layers stacked along an axis, write "
                    f"by_depth('blocks', ..., axis=0). "
                    f"The nearest paths: {language.nearest(shown, [leaf.path for leaf in tree.leaves])}."
                )
            numbers = {**found, **numbers}
        ranks = {number: rank for rank, number in enumerate(sorted(set(numbers.values())))}
        count = len(ranks)
        decided = {
            i: Decision(self.factor ** (count - ranks[n]), "by_depth", f"block {ranks[n]} of {count}")
            for i, n in numbers.items()
            if i not in first
        }
        return decided, count

    @staticmethod
    def _numbers(tree: Tree, pattern: Pattern) -> dict[int, tuple[int, ...]]:
        """The numbers in the path of each leaf that the pattern matches. A group that did not match counts as 0."""
        if isinstance(pattern, str):
            match: Callable[[str], re.Match[str] | None] = language.compiled(pattern, _NUMBER).search
        else:
            assert isinstance(pattern, re.Pattern)
            match = pattern.fullmatch
        numbers: dict[int, tuple[int, ...]] = {}
        places: dict[tuple[int, ...], str] = {}
        for i, leaf in enumerate(tree.leaves):
            found = match(leaf.path)
            if found is None:
                continue
            if not all(group is None or group.isdecimal() for group in found.groups()):
                raise ValueError(
                    f"{tree.where}: by_depth: the groups of {language.show((pattern,))} must be numbers, but in "
                    f"{leaf.path!r} they are {found.groups()}. Write (?:...) for a group that is not a number."
                )
            numbers[i] = tuple(int(group or 0) for group in found.groups())
            place = leaf.path[: found.end(len(found.groups()))]
            if isinstance(pattern, str) and places.setdefault(numbers[i], place) != place:
                raise ValueError(
                    f"{tree.where}: by_depth: {pattern!r} finds {places[numbers[i]]!r} and {place!r}, which have the "
                    "same number. Include all numbers: by_depth('stages/*/blocks/*', ...). Or write one rule set for "
                    "each stack: by_path({'encoder': by_depth('encoder/Block_*', ...), ...}). If equal numbers mean "
                    "equal depth, give both patterns: by_depth(('encoder/Block_*', 'decoder/Block_*'), ...)."
                )
        return numbers

    def _by_axis(self, tree: Tree, asked: Sequence[int], first: set[int]) -> tuple[dict[int, Decision], int]:
        assert self.axis is not None
        everyone = range(len(tree.leaves))
        found = set().union(*(language.matching(tree, pattern, everyone, everyone) for pattern in self.blocks))
        # Leaves that `freeze` hides count too, because they keep their shape and dtype.
        found = {i for i in found - first if trees.is_decayable(tree.leaves[i])}
        deciding = found.intersection(asked)
        sizes: dict[int, str] = {}
        for i in sorted(deciding or found):
            leaf = tree.leaves[i]
            if not -len(leaf.shape) <= self.axis < len(leaf.shape):
                if not deciding:
                    continue
                raise ValueError(
                    f"{tree.where}: by_depth: axis={self.axis} does not exist in {leaf.path!r}, whose shape is "
                    f"{leaf.shape}. It should count the stacked layers. If this array is not stacked, exclude it: "
                    f"by_path({{{leaf.path!r}: 1.0}}, default=by_depth(...))."
                )
            sizes.setdefault(leaf.shape[self.axis], leaf.path)
        if len(sizes) > 1:
            shown = ", ".join(f"{size} in {path!r}" for size, path in sizes.items())
            raise ValueError(
                f"{tree.where}: by_depth: the arrays have different numbers of layers along axis {self.axis}: {shown}. "
                "Give by_depth the pattern of one stack. Combine several stacks with "
                "by_path({'stack_1': by_depth(...), ...})."
            )
        if not sizes and first & tree.required & set(asked):
            raise ValueError(
                f"{tree.where}: by_depth: all parameters that {language.show(self.blocks)} matches are hidden here "
                "(they are None, or optax.masked hides them), so the number of layers is unknown. Build the tree "
                "on all parameters, or give the parameters of `first` their multiplier with by_path."
            )
        count = next(iter(sizes), 0)
        values, reason = tuple(self.factor ** (count - k) for k in range(count)), f"{count} stacked blocks"
        axes = {i: range(len(tree.leaves[i].shape))[self.axis] for i in deciding}
        return {i: Decision(PerLayer(values, axis), "by_depth", reason) for i, axis in axes.items()}, count

    def _values(self) -> list[Any]:
        return [self.factor]

    def _written(self) -> str:
        said = [language.show(self.blocks), f"{self.factor!r}"]
        said += [f"first={language.show(self.first)}"] if self.first else []
        said += [f"axis={self.axis}"] if self.axis is not None else []
        return f"by_depth({', '.join(said)})"

    def _arguments(self) -> dict[str, Any]:
        written = {"blocks": language.plain(self.blocks), "factor": self.factor}
        written |= {"first": language.plain(self.first)} if self.first else {}
        return written | ({} if self.axis is None else {"axis": self.axis})

    @classmethod
    def _from_arguments(cls, arguments: dict[str, Any]) -> Rules:
        arguments = entries("by_depth", arguments, {"blocks", "factor"}, {"first", "axis"})
        return by_depth(**{k: language.from_plain(v) if k in ("blocks", "first") else v for k, v in arguments.items()})


@checks.known_arguments
def by_depth(blocks: Any, factor: float, *, first: Any = (), axis: int | None = None) -> Rules:
    """Layer-wise decay: multipliers that change by a factor from each block of a model to the one below it.

    Rule:   with N blocks, block i (from 0) has factor^(N - i), `first` has factor^(N + 1), and everything else has 1.
            Blocks are ordered by their numbers. The numbers may start anywhere and have gaps.
    Place:  a factor of any rate: `0.1 * by_depth("blocks/*", 0.75, first=("patch_embed",))`. timm and BEiT apply it to
            the learning rate, and so to the decay that the learning rate multiplies. To do the same, multiply the
            updates at the end of the chain by `by_depth(...).values(params)`.
    Source: BEiT (arXiv 2106.08254); timm's `param_groups_layer_decay`, where the last norm counts as the last block:
            `by_path({"norm/*": 0.75}, default=by_depth("blocks/*", 0.75, first=...))`.

    Args:
        blocks: the pattern of the blocks, in which "*" stands for a number: `"Block_*"`, `"layers/*"` or
            `"stages/*/blocks/*"` (ordered by the first number, then by the second). Or a compiled regular expression
            for the whole path, whose groups are the numbers (a group that did not match counts as 0). Or a tuple of
            these: blocks with the same numbers then have the same depth. With `axis`, it is an ordinary pattern.
        factor: the factor from each block to the one below, > 0.
        first: the patterns of everything before the first block: embeddings, the stem.
        axis: the axis that counts the blocks, if they are stacked in one array as by `nn.scan`. Each slice then has its
            own multiplier.

    Returns:
        `Rules` of multipliers. Multiplied by a rate, they are a rate for any wdjax function.

    Raises:
        TypeError, ValueError: for an invalid pattern, or a factor that is not > 0. At `init` and `update`: for a
            pattern that matches nothing or finds two blocks with the same number, or for stacks of different lengths.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> params = {name: jnp.ones(2) for name in ("stem", "block_0", "block_1", "head")}
        >>> wdjax.by_depth("block_*", 0.5, first="stem").values(params)
        {'block_0': 0.25, 'block_1': 0.5, 'head': 1.0, 'stem': 0.125}
    """
    factor = checks.positive("by_depth", "factor", factor, "by_depth('Block_*', 0.75)")
    if axis is not None and (not isinstance(axis, int) or isinstance(axis, bool)):
        raise TypeError(
            f"by_depth: axis must be an integer, the axis of the stacked blocks, got {axis!r}. "
            "Write axis=0, or leave it out."
        )
    patterns = language.checked_patterns("by_depth", blocks)
    for pattern in patterns if axis is None else ():
        if isinstance(pattern, str):
            if not language.compiled(pattern, _NUMBER).groups:
                raise ValueError(
                    f"by_depth: {pattern!r} has no '*' for the number of a block. Write by_depth('{pattern}_*', "
                    f"{factor}) or by_depth('{pattern}/*', {factor}). For blocks that are stacked in one array, write "
                    f"by_depth('{pattern}', {factor}, axis=0)."
                )
        elif not isinstance(pattern, re.Pattern) or not pattern.groups:
            raise TypeError(
                f"by_depth: blocks must be a string with '*' for the number, or a regular expression with a group for "
                f"it, got {language.show((pattern,))}. Write by_depth('Block_*', {factor})."
            )
    return ByDepth(patterns, factor, language.checked_patterns("by_depth", first) if first != () else (), axis)
