"""Multipliers from the depth of a block: in a list, a numbered name or a stack."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from .._engine import checks, trees
from .._engine.decision import Decision, PerLayer, Tree
from .._engine.rules import Rules
from .._engine.text import call, shown
from .._engine.trees import Leaf
from . import hints, language
from ._shell import compiled
from .language import Patterns, Text
from .roles import is_input


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ByDepth(Rules, kind="by_depth"):
    """factor ** (number of blocks above). The depth of a block is the rank of its number among all blocks."""

    blocks: Patterns
    factor: float
    first: Patterns | None
    last: Patterns | None
    axis: int | None

    def _decide(self, tree: Tree, asked: Sequence[int]) -> dict[int, Decision]:
        first, last = (language.matching_all(tree, patterns or ()) for patterns in (self.first, self.last))
        decided, count = self._by_number(tree) if self.axis is None else self._by_axis(tree, self.axis, asked, first)
        known = first.union(decided, last)
        unsaid = [tree.leaves[i] for i in sorted(tree.required.intersection(asked) - known)]
        outside = [leaf for leaf in unsaid if trees.is_decayable(leaf)]
        if outside:
            raise ValueError(f"{tree.where}: by_depth: {self._question(tree, outside, known)}")
        stem = Decision(self._multiplier(tree.where, count + 1), "by_depth", f"before block 0 of {count}")
        rest = Decision(1.0, "by_depth", f"outside the {count} blocks")
        return {i: stem if i in first else decided.get(i, rest) for i in asked}

    def _question(self, tree: Tree, outside: Sequence[Leaf], known: set[int]) -> str:
        """The message about parameters outside the blocks, with the call that says where they are."""
        taken = {"", *(node for i in known for node in trees.prefixes(tree.leaves[i].path))}
        said: dict[bool, list[Any]] = {True: [*(self.first or ())], False: [*(self.last or ())]}
        # The outermost node above each that holds nothing else.
        nodes = ([node for node in trees.prefixes(leaf.path) if node not in taken][-1] for leaf in outside)
        for node in dict.fromkeys(nodes):
            said[is_input(node)].append(language.at(node))
        write = dataclasses.replace(self, first=Patterns(said[True]) or None, last=Patterns(said[False]) or None)
        return (
            f"these parameters are neither in a block, nor in `first`, nor in `last`: {hints.with_shapes(outside)}. "
            "`first` is what comes before the blocks, and `last` is what comes after them and has a multiplier of 1. "
            f"Write {write._written()}, or last='**' for everything else."
        )

    def _by_number(self, tree: Tree) -> tuple[dict[int, Decision], int]:
        numbers: dict[int, tuple[int, ...]] = {}
        for pattern in self.blocks:
            numbers = {**_numbers(tree, pattern), **numbers}
        ranks = {number: rank for rank, number in enumerate(sorted(set(numbers.values())))}
        count = len(ranks)
        of_rank = [
            Decision(self._multiplier(tree.where, count - k), "by_depth", f"block {k} of {count}") for k in range(count)
        ]
        return {i: of_rank[ranks[number]] for i, number in numbers.items()}, count

    def _by_axis(self, tree: Tree, axis: int, asked: Sequence[int], first: set[int]) -> tuple[dict[int, Decision], int]:
        # Leaves that `freeze` hides count too, because they keep their shape and dtype.
        blocks = language.matching_all(tree, self.blocks) - first
        found = {i for i in blocks if trees.is_decayable(tree.leaves[i])}
        deciding = found.intersection(asked, tree.required)
        sizes: dict[int, str] = {}
        for i in sorted(deciding or found):
            path, shape, _ = tree.leaves[i]
            if -len(shape) <= axis < len(shape):
                sizes.setdefault(shape[axis], path)
            elif deciding:
                raise ValueError(
                    f"{tree.where}: by_depth: axis={axis} does not exist in {path!r}, whose shape is {shape}. If this "
                    f"array is not stacked, exclude it: by_path({{{language.at(path)}: 1.0}}, default=by_depth(...))."
                )
        if len(sizes) > 1:
            shown = ", ".join(f"{size} in {path!r}" for size, path in sizes.items())
            raise ValueError(
                f"{tree.where}: by_depth: the arrays have different numbers of layers along axis {axis}: {shown}. "
                "Give each stack its own: by_path({'stack_1': by_depth('stack_1', ...), ...})."
            )
        if not sizes and first & tree.required & set(asked):
            raise ValueError(
                f"{tree.where}: by_depth: the number of layers is unknown, because all that {self.blocks} matches is "
                "hidden here (None, or by optax.masked). Build the tree on all parameters, or exclude `first`."
            )
        count = next(iter(sizes), 0)
        values = tuple(self._multiplier(tree.where, count - k) for k in range(count))
        reason = f"{count} stacked blocks"
        decided = dict.fromkeys(blocks, Decision(1.0, "by_depth", reason))  # Of what doesn't decay.
        for i in deciding:
            stack = PerLayer(values, axis % len(tree.leaves[i].shape))
            decided[i] = Decision(stack, "by_depth", reason)
        return decided, count

    def _multiplier(self, where: str, above: int) -> float:
        return checks.power(f"{where}: by_depth", self.factor, above, f"by_depth({self.blocks}, 0.75)")

    def _written(self) -> str:
        return call("by_depth", self.blocks, self.factor, first=self.first, last=self.last, axis=self.axis)

    @staticmethod
    def _from_plain(blocks: Any, factor: Any, first: Any = (), last: Any = (), axis: Any = None) -> Rules:
        outside = {"first": language.from_plain(first), "last": language.from_plain(last)}
        return by_depth(language.from_plain(blocks), factor, **outside, axis=axis)


@checks.known_arguments
def by_depth(blocks: Any, factor: float, *, first: Any = (), last: Any = (), axis: int | None = None) -> Rules:
    """Multipliers that change by a factor from each block of a model to the one below it: layer-wise rates.

    Rule:   with N blocks, block i (from 0) has factor^(N - i), `first` has factor^(N + 1), and `last` has 1.
            Blocks are ordered by their numbers, which may start anywhere and have gaps.
    Units:  of a ratio: multipliers of a rate. A factor below 1 makes rates smaller toward the input.
    Place:  for learning rates, as in BEiT and timm's `layer_decay`: `scale_by_path(by_depth(...))` at the end of the
            chain, which scales the decay too. For the weight decay alone, a factor of the rate:
            `0.1 * by_depth("blocks/*", 0.75, first="patch_embed", last="head")`.
    Source: BEiT (arXiv 2106.08254). In timm's `param_groups_layer_decay`, a last norm mostly counts as the last block:
            `by_path({"norm/*": 0.75}, default=by_depth("blocks/*", 0.75, first=..., last="head"))`.

    Args:
        blocks: the pattern of the blocks, in which "*" stands for a number: `"Block_*"`, `"layers/*"` or
            `"stages/*/blocks/*"` (ordered by the first number, then by the second). Or a compiled regular expression
            for the whole path, whose groups are the numbers (0 for one that did not match). Or a tuple of these: equal
            numbers are then equal depth. With `axis`, it is an ordinary pattern.
        factor: the factor from each block to the one below, > 0.
        first: the patterns of everything before the first block: embeddings, class tokens, the stem.
        last: the patterns of everything after the last block: the final norm, the head; `"**"` for all the rest. A
            parameter that decays, but is neither in a block nor in `first` nor in `last`, is an error. What is in
            several of them counts for `first`, then for its block.
        axis: the axis that counts the blocks, if they are stacked in one array as by `nn.scan`.

    Returns: `Rules`, whose values are multipliers.
    Raises: TypeError, ValueError for arguments that are not as above; and where the rules are used, if a pattern finds
            no number, if numbers are ambiguous, or if a parameter that decays is nowhere.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> params = {name: jnp.ones(2) for name in ("stem", "block_0", "block_1", "head")}
        >>> wdjax.by_depth("block_*", 0.5, first="stem", last="head").values(params)
        {'block_0': 0.25, 'block_1': 0.5, 'head': 1.0, 'stem': 0.125}
    """
    factor = checks.positive("by_depth", "factor", factor, "by_depth('Block_*', 0.75)")
    if axis is not None and not checks.is_whole(axis):
        raise TypeError(f"by_depth: axis must be an integer, got {shown(axis)}. Write axis=0, or leave it out.")
    patterns = language.checked_patterns("by_depth", blocks)
    for pattern in patterns if axis is None else ():
        syntax = pattern.syntax if isinstance(pattern, Text) else ""
        if syntax == "shell" and not compiled(pattern.text, is_numbered=True).groups:
            raise ValueError(
                f"by_depth: {pattern} has no '*' for the number of a block. Write '{pattern.text}_*' or "
                f"'{pattern.text}/*'. For blocks that are stacked in one array, add axis=0."
            )
        if syntax != "shell" and not (syntax == "regex" and pattern.regex.groups):
            raise TypeError(
                f"by_depth: blocks must be a string with '*' for the number, or a regular expression with a group for "
                f"it, got {language.show(pattern)}. Write by_depth('Block_*', {factor})."
            )
    before, after = (language.checked_patterns("by_depth", said) if said != () else None for said in (first, last))
    return ByDepth(patterns, factor, before, after, None if axis is None else int(axis))


def _numbers(tree: Tree, pattern: Text) -> dict[int, tuple[int, ...]]:
    """The numbers in the path of each leaf that the pattern matches. A group that did not match counts as 0."""
    where, is_shell = f"{tree.where}: by_depth", pattern.syntax == "shell"
    match = compiled(pattern.text, is_numbered=True).search if is_shell else pattern.regex.fullmatch
    numbers: dict[int, tuple[int, ...]] = {}
    places: dict[tuple[int, ...], str] = {}
    for i, leaf in enumerate(tree.leaves):
        found = match(leaf.path)
        if found is None:
            continue
        if not all(group is None or group.isdecimal() for group in found.groups()):
            raise ValueError(
                f"{where}: the groups of {pattern} must be numbers, but in {leaf.path!r} they are {found.groups()}. "
                "Write (?:...) for a group that is not a number."
            )
        numbers[i] = tuple(int(group or 0) for group in found.groups())
        place = leaf.path[: found.end(len(found.groups()))]
        if is_shell and places.setdefault(numbers[i], place) != place:
            raise ValueError(
                f"{where}: {pattern} finds {places[numbers[i]]!r} and {place!r}, which have the same number. Include "
                "all numbers: by_depth('stages/*/blocks/*', ...). Or give each stack its own: by_path({'encoder': "
                "by_depth('encoder/Block_*', ...), ...}). Or give both patterns, if they have equal depth."
            )
    if not numbers:
        raise ValueError(
            f"{where}: {pattern} matches no parameter. Here '*' stands for a number. Write by_depth('Block_*', ...) or "
            "by_depth('layers/*', ...). For layers stacked along an axis, write by_depth('blocks', ..., axis=0). "
            f"The nearest paths: {hints.nearest(pattern.text, [leaf.path for leaf in tree.leaves])}."
        )
    return numbers
