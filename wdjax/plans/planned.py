"""One row of a plan, and sums of rows."""

import math
from collections.abc import Sequence
from typing import NamedTuple

PlannedRate = float | tuple[float, ...] | str


class Planned(NamedTuple):
    """What is planned for one parameter.

    Attributes:
        path: its canonical path.
        shape, dtype: the shape and the name of the dtype of the parameter.
        decays: whether the parameter will decay.
        rate: a number; for stacked layers, a number for each; a string if the rate is known only during training (a
            schedule, a traced rate); 0.0 if the parameter does not decay.
        rule: the rule that decided, as it is written.
        reason: why the rule applies, in a few words.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    decays: bool
    rate: PlannedRate
    rule: str
    reason: str

    @property
    def size(self) -> int:
        """The number of parameters in the array."""
        return math.prod(self.shape)


class Totals(NamedTuple):
    """How many parameters and arrays decay, and how many there are."""

    decayed: int
    parameters: int
    decayed_arrays: int
    arrays: int

    def __str__(self) -> str:
        return (
            f"decayed {count(self.decayed)} of {count(self.parameters)} parameters "
            f"in {self.decayed_arrays} of {self.arrays} arrays"
        )


def show_rate(rate: PlannedRate, *, digits: int = 6) -> str:
    """A rate as it is written in golden files. For stacked layers, it is one number for each layer."""
    if isinstance(rate, str):
        return rate
    return ", ".join(f"{one:.{digits}g}" for one in (rate if isinstance(rate, (tuple, list)) else (rate,)))


def totals_of(rows: Sequence[Planned]) -> Totals:
    """The totals of these rows."""
    decayed = [planned.size for planned in rows if planned.decays]
    return Totals(sum(decayed), sum(planned.size for planned in rows), len(decayed), len(rows))


def count(number: int) -> str:
    """A count in short form: "124.4 M"."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= 0.99995 * size * (10 if unit == "k" else 1):  # Never "1000.0 k".
            return f"{number / size:.1f} {unit}"
    return str(number)
