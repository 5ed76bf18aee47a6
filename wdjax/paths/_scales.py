"""Multipliers from a parameter's place in the model: how deep it lies, and how wide it is."""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from .. import _checks
from .._leaves import Leaf
from . import _patterns
from ._patterns import Pattern
from ._roles import KERNEL, role
from ._rules import Decision, PerLayer, Rules, Tree
from ._standard import parameter_at

_NUMBER = r"(\d+)"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ByDepth(Rules, kind="by_depth"):
    """factor ** (blocks above); the depth of a block is the rank of its number among all that there are."""

    blocks: tuple[Pattern, ...]
    factor: float
    first: tuple[Pattern, ...]
    axis: int | None

    def _decide(self, tree: Tree, asked: Sequence[int]) -> dict[int, Decision]:
        everyone = range(len(tree.leaves))
        first = set().union(*(_patterns.matching(tree, pattern, everyone, everyone) for pattern in self.first))
        decide = self._by_number if self.axis is None else self._by_axis
        decided, count = decide(tree, first)
        stem = Decision(self.factor ** (count + 1), "by_depth", f"before block 0 of {count}")
        rest = Decision(1.0, "by_depth", f"after the {count} blocks")
        return {i: decided.get(i) or (stem if i in first else rest) for i in asked}

    def _by_number(self, tree: Tree, first: set[int]) -> tuple[dict[int, Decision], int]:
        numbers: dict[int, tuple[int, ...]] = {}
        for pattern in self.blocks:
            found = self._numbers(tree, pattern)
            if not found:
                shown = _patterns.show((pattern,))
                raise ValueError(
                    f"{tree.where}: by_depth: {shown} matches no parameter, where '*' stands for a number. Write "
                    f"by_depth('Block_*', ...), by_depth('layers/*', ...), or for layers stacked along an axis "
                    f"by_depth('blocks', ..., axis=0). "
                    f"The nearest paths: {_patterns.nearest(shown, [leaf.path for leaf in tree.leaves])}."
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
        if isinstance(pattern, str):
            match: Callable[[str], re.Match[str] | None] = _patterns.compiled(pattern, _NUMBER).search
        else:
            assert isinstance(pattern, re.Pattern)
            match = pattern.fullmatch
        matches = {i: match(leaf.path) for i, leaf in enumerate(tree.leaves)}
        return {i: tuple(int(n or 0) for n in found.groups()) for i, found in matches.items() if found}

    def _by_axis(self, tree: Tree, first: set[int]) -> tuple[dict[int, Decision], int]:
        assert self.axis is not None
        everyone = range(len(tree.leaves))
        found = set().union(*(_patterns.matching(tree, pattern, everyone, everyone) for pattern in self.blocks)) - first
        sizes: dict[int, str] = {}
        for i in sorted(found & tree.required):
            leaf = tree.leaves[i]
            if not -len(leaf.shape) <= self.axis < len(leaf.shape):
                raise ValueError(
                    f"{tree.where}: by_depth: axis={self.axis} should count the layers stacked in {leaf.path!r}, whose "
                    f"shape is {leaf.shape}."
                )
            sizes.setdefault(leaf.shape[self.axis], leaf.path)
        if len(sizes) > 1:
            shown = ", ".join(f"{size} in {path!r}" for size, path in sizes.items())
            raise ValueError(
                f"{tree.where}: by_depth: the stacked layers are not of one number along axis {self.axis}: {shown}. "
                "Give by_depth the pattern of one stack, and join two by by_path({'stack_1': by_depth(...), ...})."
            )
        count = next(iter(sizes), 0)
        each = PerLayer(tuple(self.factor ** (count - k) for k in range(count)), self.axis)
        return dict.fromkeys(found & tree.required, Decision(each, "by_depth", f"{count} stacked blocks")), count

    def _values(self) -> list[Any]:
        return [self.factor]

    def _written(self) -> str:
        said = [_patterns.show(self.blocks), f"{self.factor!r}"]
        said += [f"first={_patterns.show(self.first)}"] if self.first else []
        said += [f"axis={self.axis}"] if self.axis is not None else []
        return f"by_depth({', '.join(said)})"

    def _arguments(self) -> dict[str, Any]:
        written = {"blocks": _patterns.plain(self.blocks), "factor": self.factor}
        written |= {"first": _patterns.plain(self.first)} if self.first else {}
        return written | ({} if self.axis is None else {"axis": self.axis})

    @classmethod
    def _from_arguments(cls, arguments: dict[str, Any]) -> Rules:
        patterns = {name: _from_plain(arguments.pop(name, ())) for name in ("blocks", "first")}
        return by_depth(patterns["blocks"], arguments.pop("factor"), first=patterns["first"], **arguments)


@_checks.known_arguments
def by_depth(blocks: Any, factor: float, *, first: Any = (), axis: int | None = None) -> Rules:
    """Multipliers that fall by a factor from each block of a model to the one below it: layer-wise decay.

    With N blocks, block i (from 0) gets factor^(N - i), what is `first` factor^(N + 1), and all the rest, above the
    last block, 1. As multipliers of weight decay: `0.1 * by_depth("blocks/*", 0.75, first=("patch_embed",))`. timm and
    BEiT apply them to the learning rate, and so to the decay that it multiplies; Optax does that to the updates, with
    `by_depth(...).values(params)`.

    Args:
        blocks: the pattern of the blocks, where "*" stands for a number, as `"Block_*"`, `"layers/*"` or
            `"stages/*/blocks/*"` (ordered by the first number, then by the second); or a compiled regular expression
            for the whole path, whose groups are the numbers; or a tuple of these. With `axis` an ordinary pattern.
        factor: from each block to the one below, > 0.
        first: the patterns of what lies before the first block: embeddings, the stem.
        axis: for blocks that are stacked in one array, as `nn.scan` does: the axis that counts them. Each slice
            then has its own multiplier.

    Returns:
        `Rules` of multipliers: times a rate they are a rate for any wdjax function.

    Raises:
        TypeError, ValueError: for a pattern that is none or a factor that is not > 0. At `init` and `update`: for a
            pattern that matches nothing, or stacks of different heights.

    Source: BEiT (arXiv 2106.08254); timm's `param_groups_layer_decay`, where the last norm counts as the last block:
        `by_path({"norm": 0.75}, default=by_depth("blocks/*", 0.75, first=...))`.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> params = {name: jnp.ones(2) for name in ("stem", "block_0", "block_1", "head")}
        >>> wdjax.by_depth("block_*", 0.5, first="stem").values(params)
        {'block_0': 0.25, 'block_1': 0.5, 'head': 1.0, 'stem': 0.125}
    """
    factor = _positive("by_depth", "factor", factor, "by_depth('Block_*', 0.75)")
    if axis is not None and (not isinstance(axis, int) or isinstance(axis, bool)):
        raise TypeError(f"by_depth: axis counts stacked blocks, got {axis!r}. Write axis=0, or leave it out.")
    checked = _patterns.checked("by_depth", blocks)
    for pattern in checked if axis is None else ():
        if isinstance(pattern, str):
            if not _patterns.compiled(pattern, _NUMBER).groups:
                raise ValueError(
                    f"by_depth: {pattern!r} has no '*' for the number of a block. Write by_depth('{pattern}_*', "
                    f"{factor}) or by_depth('{pattern}/*', {factor}); by_depth('{pattern}', {factor}, axis=0) for "
                    "blocks that are stacked in one array."
                )
        elif not isinstance(pattern, re.Pattern) or not pattern.groups:
            raise TypeError(
                f"by_depth: the blocks are a text with '*' for the number, or a regular expression with a group for "
                f"it, got {_patterns.show((pattern,))}. Write by_depth('Block_*', {factor})."
            )
    return ByDepth(checked, factor, _patterns.checked("by_depth", first) if first != () else (), axis)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ByWidth(Rules, kind="by_width"):
    """(fan-in / base) ** power for matrices, 1 for all else."""

    base: float
    power: float
    fan_in: Callable[[Leaf], float] | None
    stacked_axes: int

    def _decide(self, tree: Tree, asked: Sequence[int]) -> dict[int, Decision]:
        shapes = {leaf.path: leaf.shape[self.stacked_axes :] for leaf in tree.leaves}
        decided = {}
        for i in asked:
            leaf = tree.leaves[i]
            width = None
            if i in tree.required:
                width = self._width(tree.where, leaf, shapes) if self.fan_in is None else self.fan_in(leaf)
            if width is None:
                decided[i] = Decision(1.0, "by_width", "no matrix")
            else:
                decided[i] = Decision((width / self.base) ** self.power, "by_width", f"fan-in {width:g}")
        return decided

    def _width(self, where: str, leaf: Leaf, shapes: dict[str, tuple[int, ...]]) -> int | None:
        """The fan-in by the layout of the library that the name is of; None for what is no matrix."""
        parameter = parameter_at(leaf.path, shapes)
        found = role(parameter)
        if found is not None and found.name != KERNEL:
            return None
        shape, name = parameter.shape, parameter.name
        if found is not None and len(shape) >= 2:
            if name == "weight":
                return math.prod(shape[1:])
            if name in ("kernel", "w") and "einsum" not in parameter.owner:
                heads = parameter.owner in ("query", "key", "value") and len(shape) == 3
                return shape[0] if heads else math.prod(shape[:-1])
        raise ValueError(
            f"{where}: by_width can't tell the fan-in of {leaf.path!r}, of shape {leaf.shape}. Give a function of the "
            "leaf that can, None for what is no matrix: by_width(256, fan_in=lambda leaf: leaf.shape[0]); or leave it "
            "out: by_path({...: 1.0}, default=by_width(256))."
        )

    def _values(self) -> list[Any]:
        return [1.0]

    def _written(self) -> str:
        said = [f"{self.base:g}"]
        said += [f"power={self.power:g}"] if self.power != 1 else []
        said += [f"fan_in={getattr(self.fan_in, '__qualname__', self.fan_in)}"] if self.fan_in else []
        said += [f"stacked_axes={self.stacked_axes}"] if self.stacked_axes else []
        return f"by_width({', '.join(said)})"

    def _arguments(self) -> dict[str, Any]:
        if self.fan_in is not None:
            raise TypeError(f"Rules.to_dict: the function fan_in of {self!r} can't be written into a file.")
        return {"base": self.base, "power": self.power, "stacked_axes": self.stacked_axes}

    @classmethod
    def _from_arguments(cls, arguments: dict[str, Any]) -> Rules:
        return by_width(arguments.pop("base"), **arguments)


@_checks.known_arguments
def by_width(
    base: float, *, power: float = 1.0, fan_in: Callable[[Leaf], float] | None = None, stacked_axes: int = 0
) -> Rules:
    """Multipliers that grow with the width of a matrix: (fan-in / base)^power, and 1 for all that is no matrix.

    Under μP the learning rate of a hidden matrix falls as 1 / width, and with it the decay that it multiplies. Times
    its width the decay per step is the same again at every size: `0.1 * by_width(256)` is 0.1 at the width of 256 at
    which it was tuned. It is for hidden matrices: `by_path({"embed": 1.0, "head": 1.0}, default=by_width(256))`.

    Args:
        base: the fan-in at which the multiplier is 1, > 0.
        power: 1 for μP and CompleteP; 0.5 for a decay that grows with the square root of the width.
        fan_in: a function of a `Leaf` (path, shape, dtype), None for what is no matrix. Without one the layout goes by
            the name: all axes but the last of a `kernel` (the first alone for Flax's query, key and value) or a `w`,
            all but the first of a `weight`; for a matrix of another name it is needed.
        stacked_axes: the number of leading axes that stack layers.

    Returns:
        `Rules` of multipliers: times a rate they are a rate for any wdjax function.

    Raises:
        TypeError, ValueError: for a base that is not > 0. At `init` and `update`: for a matrix whose fan-in is not
            known.

    Source: CompleteP, arXiv 2505.01618, Table 1 (hidden weight decay times the width multiplier, AdamW); the square
        root: arXiv 2510.15262.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> params = {"Dense_0": {"kernel": jnp.ones((512, 8)), "bias": jnp.ones(8)}}
        >>> wdjax.by_width(256).values(params)
        {'Dense_0': {'bias': 1.0, 'kernel': 2.0}}
    """
    base = _positive("by_width", "base", base, "by_width(256)")
    if not isinstance(power, (int, float)) or isinstance(power, bool) or not math.isfinite(power):
        raise TypeError(f"by_width: power must be a finite number, got {power!r}. Write by_width(256, power=0.5).")
    if fan_in is not None and not callable(fan_in):
        raise TypeError(
            f"by_width: fan_in must be a function of a Leaf, got {fan_in!r}. "
            "Write by_width(256, fan_in=lambda leaf: leaf.shape[0])."
        )
    return ByWidth(base, float(power), fan_in, stacked_axes)


def _positive(where: str, name: str, value: Any, write: str) -> float:
    number = _checks.rate(where, name, value, write=write)
    if callable(number) or not isinstance(number, float) or number == 0:
        raise ValueError(f"{where}: {name} must be a number > 0, got {value!r}. Write {write}.")
    return number


def _from_plain(written: Any) -> Any:
    return _patterns.from_plain(written) if written != () else ()
