"""The decision of a rule set on one parameter, with its factors, and the parameters that it is asked about."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from .trees import Leaf


class Decision(NamedTuple):
    """The decision of a rule set on one parameter.

    Attributes:
        value: a boolean, a rate or multiplier, a schedule, a `PerLayer`, or a label.
        rule: the rule that decided, as the user wrote it.
        reason: why the rule applies, in a few words.
        factors: further factors of the value.
    """

    value: Any
    rule: str
    reason: str = ""
    factors: tuple[Any, ...] = ()


class PerLayer(NamedTuple):
    """One multiplier for each layer of a stacked parameter: `values[i]` for index i along `axis`."""

    values: tuple[float, ...]
    axis: int

    def along(self, ndim: int) -> np.ndarray:
        """The multipliers as an array that broadcasts against a parameter of this rank."""
        shape = [1] * ndim
        shape[self.axis] = len(self.values)
        return np.array(self.values).reshape(shape)


def stack_of(where: str, path: str, factors: Iterable[Any]) -> tuple[int, ...]:
    """The axis that stacks layers, if a factor has one number for each layer."""
    axes = sorted({factor.axis for factor in factors if isinstance(factor, PerLayer)})
    if len(axes) > 1:
        raise ValueError(
            f"{where}: by_depth: the multipliers of {path!r} lie along several axes, {axes}. Layers are stacked along "
            "one axis: write one by_depth with the product of the factors."
        )
    return tuple(axes)


def check_product(where: str, path: str, decision: Decision) -> None:
    """Raises an error if the factors of a rate are finite and their product is not."""
    parts = (*decision.factors, decision.value)
    numbers = [max(part.values, default=0.0) if isinstance(part, PerLayer) else part for part in parts]
    known = [number for number in numbers if isinstance(number, float)]
    if not math.isfinite(math.prod(known)):
        raise ValueError(
            f"{where}: the rate of {path!r} is {' * '.join(f'{number:g}' for number in known)}, which is too large for "
            "a float. Write smaller factors."
        )


class Tree(NamedTuple):
    """The parameters that a rule set is asked about."""

    where: str  # The function to name in an error.
    leaves: list[Leaf]  # All, including holes.
    required: frozenset[int]  # The indices of the leaves that a rule must cover.


def times(first: Decision, second: Decision) -> Decision:
    reason = "; ".join(reason for reason in (first.reason, second.reason) if reason)
    factors = (*first.factors, first.value, *second.factors)
    return Decision(second.value, f"{first.rule} × {second.rule}", reason, factors)


def product(decision: Decision | None, leaf: Any) -> Any:
    """The value of a decision times its factors, in the simplest form."""
    if decision is None:
        return None
    parts = (*decision.factors, decision.value)
    if len(parts) == 1 and not isinstance(decision.value, PerLayer):
        return decision.value
    if any(callable(part) for part in parts):
        return lambda step: product(
            Decision(1.0, "", "", tuple(part(step) if callable(part) else part for part in parts)), leaf
        )
    result: Any = 1.0
    for part in parts:
        result = result * (part.along(leaf.ndim) if isinstance(part, PerLayer) else part)
    return result
