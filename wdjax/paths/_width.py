"""Multipliers from the width of a matrix, its fan-in."""

import dataclasses
import math
import numbers
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .._engine import checks
from .._engine.decision import Decision, Tree
from .._engine.rules import Rules
from .._engine.text import call, shown
from .._engine.trees import Leaf
from . import language
from .parameters import Parameter, parameter_at
from .roles import ADAPTER, EMBEDDING, KERNEL, Role, role

_OTHER_FACTOR = {"a": "b", "b": "a", "A": "B", "B": "A", "down": "up", "up": "down"}


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ByWidth(Rules, kind="by_width"):
    """(fan-in / base) ** power for matrices, 1 for everything else."""

    base: float
    power: float
    fan_in: Callable[[Leaf], float] | None
    stacked_axes: int

    def _decide(self, tree: Tree, asked: Sequence[int]) -> dict[int, Decision]:
        shapes = {leaf.path: leaf.shape[self.stacked_axes :] for leaf in tree.leaves if leaf.dtype is not None}
        decided = {}
        for i in asked:
            width = self._width(tree.where, tree.leaves[i], shapes) if i in tree.required else None
            decided[i] = Decision(1.0, "by_width", width if isinstance(width, str) else "not a matrix")
            if width and not isinstance(width, str):  # It is a matrix, and not empty.
                value = checks.power(f"{tree.where}: by_width", width / self.base, self.power, "by_width(256)")
                decided[i] = Decision(value, "by_width", f"fan-in {width:g}")
        return decided

    def _width(self, where: str, leaf: Leaf, shapes: dict[str, tuple[int, ...]]) -> float | str | None:
        """The fan-in, as `fan_in` says or by the layout that belongs to the name. Or why it has none."""
        if self.fan_in is not None:
            width = self.fan_in(leaf)
            if width is None or (_is_number(width) and width > 0):
                return width
            raise ValueError(
                f"{where}: by_width: fan_in must return a number > 0, or None, but for {leaf.path!r} it gave "
                f"{shown(width)}."
            )
        parameter = parameter_at(leaf.path, shapes)
        found = role(parameter)
        if found is not None and (found.name == EMBEDDING or _is_first_factor_of_embedding(leaf.path, found, shapes)):
            return "an embedding, whose input is one-hot"
        if found is not None and found.name not in (KERNEL, ADAPTER):
            return None
        inputs = None
        if found is not None:
            inputs = _inputs(parameter) if found.name == KERNEL else _inputs_of_factor(leaf.path, parameter, shapes)
        if inputs is not None:
            return math.prod(inputs)
        raise ValueError(
            f"{where}: by_width can't tell the fan-in of {leaf.path!r}, of shape {leaf.shape}. If layers are stacked, "
            "write by_width(256, stacked_axes=1). Otherwise write by_width(256, fan_in=lambda leaf: leaf.shape[0]), or "
            f"exclude the parameter: by_path({{{language.at(leaf.path)}: 1.0}}, default=by_width(256))."
        )

    def _written(self) -> str:
        base, power = (repr(number).removesuffix(".0") for number in (self.base, self.power))
        named = {"power": None if power == "1" else power, "fan_in": self.fan_in and language.show(self.fan_in)}
        return call("by_width", base, **named, stacked_axes=self.stacked_axes or None)

    @staticmethod
    def _from_plain(base: Any, power: Any = 1.0, stacked_axes: Any = 0) -> Rules:
        return by_width(base, power=power, stacked_axes=stacked_axes)


@checks.known_arguments
def by_width(
    base: float, *, power: float = 1.0, fan_in: Callable[[Leaf], float] | None = None, stacked_axes: int = 0
) -> Rules:
    """Multipliers that grow with the width of a layer's matrix.

    Under μP the learning rate of a hidden matrix falls as 1 / width, and so does the decay that it multiplies. This
    multiplier undoes that: `0.1 * by_width(256)` is 0.1 at a width of 256, where it was tuned. It is for hidden
    matrices: `by_path({"embed": 1.0, "head": 1.0}, default=by_width(256))`.

    Rule:   (fan-in / base)^power for a matrix, 1 for everything else.
    Units:  of a ratio: multipliers of a rate.
    Place:  a factor of a rate that the learning rate multiplies: `decoupled_decay(0.1 * by_width(256))`.
    Source: CompleteP, arXiv 2505.01618, Table 1 (AdamW); the square root: arXiv 2510.15262.

    Args:
        base: the fan-in at which the multiplier is 1, > 0.
        power: 1 for μP and CompleteP; 0.5 for a decay that grows with the square root of the width.
        fan_in: a function of a `Leaf` that returns the fan-in, or None if the leaf is not a matrix. Without it, the
            inputs are the axes that a bias beside the matrix lacks, or by name: all axes but the last of a `kernel` or
            a `w` (only the first of Flax's query, key and value), and all but the first of a `weight`. Of a pair of
            LoRA factors, the axis that they share tells. The input of an embedding is one-hot, so it has 1.
        stacked_axes: the number of leading axes that stack layers.

    Returns: `Rules`, whose values are multipliers.
    Raises: TypeError, ValueError for arguments that are not as above; and where the rules are used, if the fan-in of a
            matrix is not known.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> params = {"Dense_0": {"kernel": jnp.ones((512, 8)), "bias": jnp.ones(8)}}
        >>> wdjax.by_width(256).values(params)
        {'Dense_0': {'bias': 1.0, 'kernel': 2.0}}
    """
    base = checks.positive("by_width", "base", base, "by_width(256)")
    if not _is_number(power):
        raise TypeError(f"by_width: power must be a finite number, got {shown(power)}. Write by_width(256, power=0.5).")
    if fan_in is not None and not callable(fan_in):
        raise TypeError(f"by_width: fan_in must be a function of a Leaf, got {shown(fan_in)}. Write lambda leaf: ...")
    if not checks.is_whole(stacked_axes) or stacked_axes < 0:
        raise ValueError(
            f"by_width: stacked_axes must be a number of leading axes >= 0, got {shown(stacked_axes)}. "
            "Write stacked_axes=1."
        )
    return ByWidth(base, float(power), fan_in, int(stacked_axes))


def _inputs(parameter: Parameter) -> tuple[int, ...] | None:
    """The sizes of a matrix's input axes, by the layout that its name implies. None if that layout does not fit."""
    shape, bias = parameter.shape, parameter.bias
    if len(shape) < 2:
        return None
    if parameter.name == "weight":  # (out, in, ...), and a bias (out,) or (out, 1, ...).
        fits = bias is None or (bias[:1] == shape[:1] and math.prod(bias) == shape[0])
        return shape[1:] if fits else None
    if parameter.name not in ("kernel", "w") or "einsum" in parameter.owner.lower():
        return None
    if bias is not None:  # (in, ..., out, ...), and a bias (out, ...) or (out, 1, ...).
        ends = (bias, bias[:1] if math.prod(bias[1:]) == 1 else bias)
        return next((shape[: -len(end)] for end in ends if end and shape[-len(end) :] == end), None)
    heads = parameter.owner in ("query", "key", "value") and len(shape) == 3
    return shape[:1] if heads else shape[:-1]


def _is_first_factor_of_embedding(path: str, found: Role, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether this is the LoRA factor that is multiplied by the one-hot input: `lora_a` beside `embedding`."""
    parent = path.rpartition("/")[0]
    tables = [f"{parent}/{name}".removeprefix("/") for name in ("embedding", "embeddings", "weight")]
    of_tables = [role(parameter_at(table, shapes)) for table in tables if table in shapes]
    is_first = re.search(r"(a|A|down)$", path.rpartition("/")[2]) is not None
    return found.name == ADAPTER and is_first and any(of and of.name == EMBEDDING for of in of_tables)


def _inputs_of_factor(path: str, parameter: Parameter, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    """The input axes of a LoRA factor: its layer's, or by the rank, which `lora_a` and `lora_b` share."""
    if parameter.name == "weight" or (parameter.name in ("kernel", "w") and len(parameter.shape) == 2):
        return _inputs(parameter)
    found = re.fullmatch(r"(.*?)(a|b|A|B|down|up)", path, re.DOTALL)
    if found is None:
        return None
    start, which = found.groups()
    other = start + _OTHER_FACTOR[which]
    pair = [shapes[path], shapes.get(other, ())]
    first, second = pair if which in ("a", "A", "down") else reversed(pair)
    if len(first) != 2 or len(second) != 2:
        return None
    # (in, rank) and (rank, out), or (rank, in) and (out, rank). Where both fit, the rank is the smaller size.
    ranks = {0: first[1] if first[1] == second[0] else math.inf, 1: first[0] if first[0] == second[1] else math.inf}
    axis = min(ranks, key=lambda axis: ranks[axis])
    return shapes[path][axis : axis + 1] if ranks[axis] < math.inf else None


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(checks.as_float(value))
