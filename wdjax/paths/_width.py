"""Multipliers from the fan-in of a matrix, so that the decay per step stays the same as a model gets wider."""

import dataclasses
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

from .._engine import checks
from .._engine.rules import Decision, Rules, Tree, entries
from .._engine.trees import Leaf
from .roles import KERNEL, Parameter, role
from .standard import parameter_at


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
            leaf = tree.leaves[i]
            width = None
            if i in tree.required:
                width = self._width(tree.where, leaf, shapes) if self.fan_in is None else self._given(tree.where, leaf)
            if not width:  # Not a matrix, or an empty one.
                decided[i] = Decision(1.0, "by_width", "not a matrix")
            else:
                decided[i] = Decision((width / self.base) ** self.power, "by_width", f"fan-in {width:g}")
        return decided

    def _width(self, where: str, leaf: Leaf, shapes: dict[str, tuple[int, ...]]) -> int | None:
        """The fan-in, by the layout that belongs to the name. None if the leaf is not a matrix."""
        parameter = parameter_at(leaf.path, shapes)
        found = role(parameter)
        if found is not None and found.name != KERNEL:
            return None
        inputs = None if found is None or len(parameter.shape) < 2 else _inputs(parameter)
        if inputs is not None:
            return math.prod(inputs)
        raise ValueError(
            f"{where}: by_width can't tell the fan-in of {leaf.path!r}, of shape {leaf.shape}. If layers are stacked, "
            "give the number of leading axes that stack them: by_width(256, stacked_axes=1). Otherwise give a function "
            "that returns the fan-in of a leaf, or None if it is not a matrix: "
            "by_width(256, fan_in=lambda leaf: leaf.shape[0]). Or exclude the parameter: "
            f"by_path({{{leaf.path!r}: 1.0}}, default=by_width(256))."
        )

    def _given(self, where: str, leaf: Leaf) -> float | None:
        assert self.fan_in is not None
        width = self.fan_in(leaf)
        if width is not None and not (_is_number(width) and width > 0):
            raise ValueError(
                f"{where}: by_width: fan_in must return a number > 0, or None for a leaf that is not a matrix, but for "
                f"{leaf.path!r} it returned {width!r}."
            )
        return width

    def _values(self) -> list[Any]:
        return [1.0]

    def _written(self) -> str:
        said = [repr(self.base).removesuffix(".0")]
        said += [f"power={self.power!r}".removesuffix(".0")] if self.power != 1 else []
        said += [f"fan_in={getattr(self.fan_in, '__qualname__', self.fan_in)}"] if self.fan_in else []
        said += [f"stacked_axes={self.stacked_axes}"] if self.stacked_axes else []
        return f"by_width({', '.join(said)})"

    def _arguments(self) -> dict[str, Any]:
        if self.fan_in is not None:
            raise TypeError(
                f"Rules.to_dict: {self!r} can't be written to a file, because fan_in is a function. "
                "Write the multipliers with by_path instead."
            )
        return {"base": self.base, "power": self.power, "stacked_axes": self.stacked_axes}

    @classmethod
    def _from_arguments(cls, arguments: dict[str, Any]) -> Rules:
        return by_width(**entries("by_width", arguments, {"base"}, {"power", "stacked_axes"}))


@checks.known_arguments
def by_width(
    base: float, *, power: float = 1.0, fan_in: Callable[[Leaf], float] | None = None, stacked_axes: int = 0
) -> Rules:
    """Multipliers that grow with the width of a layer's matrix.

    Under μP the learning rate of a hidden matrix falls as 1 / width, and so does the decay that it multiplies. The
    multiplier grows with the width, so the decay per step is the same at every size again. `0.1 * by_width(256)` is 0.1
    at a width of 256, where it was tuned. It is for hidden matrices:
    `by_path({"embed": 1.0, "head": 1.0}, default=by_width(256))`.

    Rule:   (fan-in / base)^power for a matrix, 1 for everything else.
    Place:  a factor of a rate that the learning rate multiplies: `decoupled_decay(0.1 * by_width(256))`.
    Source: CompleteP, arXiv 2505.01618, Table 1 (hidden weight decay times the width multiplier, AdamW); the square
            root: arXiv 2510.15262.

    Args:
        base: the fan-in at which the multiplier is 1, > 0.
        power: 1 for μP and CompleteP; 0.5 for a decay that grows with the square root of the width.
        fan_in: a function of a `Leaf` (path, shape, dtype) that returns the fan-in, or None if the leaf is not a
            matrix. Without it, the name decides which axes are the inputs: all but the last of a `kernel` or a `w`
            (only the first of Flax's query, key and value), and all but the first of a `weight`. If a bias beside the
            matrix says otherwise, the inputs are the axes that the bias lacks. Matrices with other names need `fan_in`.
        stacked_axes: the number of leading axes that stack layers.

    Returns:
        `Rules` of multipliers. Multiplied by a rate, they are a rate for any wdjax function.

    Raises:
        TypeError, ValueError: for a base that is not > 0. At `init` and `update`: for a matrix whose fan-in is unknown.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> params = {"Dense_0": {"kernel": jnp.ones((512, 8)), "bias": jnp.ones(8)}}
        >>> wdjax.by_width(256).values(params)
        {'Dense_0': {'bias': 1.0, 'kernel': 2.0}}
    """
    base = checks.positive("by_width", "base", base, "by_width(256)")
    if not _is_number(power):
        raise TypeError(f"by_width: power must be a finite number, got {power!r}. Write by_width(256, power=0.5).")
    if fan_in is not None and not callable(fan_in):
        raise TypeError(
            f"by_width: fan_in must be a function of a Leaf, got {fan_in!r}. "
            "Write by_width(256, fan_in=lambda leaf: leaf.shape[0])."
        )
    if not isinstance(stacked_axes, int) or isinstance(stacked_axes, bool) or stacked_axes < 0:
        raise ValueError(
            f"by_width: stacked_axes must be a number of leading axes >= 0, got {stacked_axes!r}. "
            "Write by_width(256, stacked_axes=1)."
        )
    return ByWidth(base, float(power), fan_in, stacked_axes)


def _inputs(parameter: Parameter) -> tuple[int, ...] | None:
    """The sizes of a matrix's input axes, by the layout that its name implies. None if that layout does not fit."""
    shape, bias = parameter.shape, parameter.bias
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


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
