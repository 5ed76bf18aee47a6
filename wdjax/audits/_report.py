"""What an audit found: a row for each parameter, findings ranked by harm, and how a person reads them."""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from ..plans import _table

_HEADER = ("path", "arrays", "shape", "dtype", "rate", "where", "kind", "toward", "x learning rate", "kept")


class Audited(NamedTuple):
    """What an optimizer does to one parameter.

    Attributes:
        path: its canonical path.
        shape, dtype: of the parameter; the dtype by its name.
        rate: the fraction of a weight that the first real step takes away with zero gradient (the median, where it is
            not the same for all); if that step decays nothing, the first of those at `steps` that does. 0.0 where
            nothing decays, negative where weights grow.
        least, most: the smallest and the largest of an array with a rate for each layer; else both the rate.
        rates: pairs of a count and the rate at that count; empty for an optimizer that counts nothing.
        beside_gradient: the same fraction where there is a gradient.
        place: "update": added to the finished update; "gradient": the moments see it, or the gradient's scaling takes
            hold of it; "weights": a rule for the weights after the step; "none".
        kind: "L2": in proportion to the weight; "L1": of one size for all weights; "norm": in proportion to the
            weight over a norm; "Huber": L2 for small and L1 for large weights; "cautious ..."; "other"; "none".
        toward: "zero"; "init": the weights that the optimizer was initialized with; "a tree": others; "" for no decay.
        scales_with_learning_rate: whether another learning rate makes another rate; None where that was not to be seen.
        kept: the share of the decay that is left after rounding to the parameter's dtype; 1.0 where it all is; NaN
            where it can't be seen: the state changes its dtypes, updates are no numbers, or a writer would need more
            steps than were run.
        role: what the parameter is by its name and shape, as `weights_only` tells it: "kernel", "bias", "norm", ...;
            "" where nothing tells.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    rate: float
    least: float
    most: float
    rates: tuple[tuple[int, float], ...]
    beside_gradient: float
    place: str
    kind: str
    toward: str
    scales_with_learning_rate: bool | None
    kept: float
    role: str

    @property
    def decays(self) -> bool:
        """Whether anything pulls at it, with whatever result."""
        return self.kind != "none"


class Finding(NamedTuple):
    """Something that a reader of the code would not expect.

    Attributes:
        harm: "wrong": the training is not what is written; "suspect": probably not what is meant; "note".
        name: a word for it, to allow it in a test.
        message: what was measured.
        remedy: what to write instead.
        paths: the parameters it is about; empty for all.
    """

    harm: str
    name: str
    message: str
    remedy: str
    paths: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = ""
        if self.paths:
            more = f" and {len(self.paths) - 3} more" if len(self.paths) > 3 else ""
            where = f" ({', '.join(map(repr, self.paths[:3]))}{more})"
        return f"{self.harm} [{self.name}]: {self.message}{where}. {self.remedy}".rstrip()


@dataclasses.dataclass(frozen=True, repr=False)
class Audit:
    """What an optimizer does to each parameter, as measured; `print(audit)` gives a table and the findings.

    Attributes:
        parameters: a row for each parameter that is a number, in the order of the tree.
        findings: what is unexpected, the most harmful first.
        calls_per_step: how many calls of `update` make one real step, as under `optax.MultiSteps`.
        first_step: the first call that moved anything when given gradients, from 0: later than calls_per_step - 1
            under a learning rate that warms up from zero.
    """

    parameters: tuple[Audited, ...]
    findings: tuple[Finding, ...]
    calls_per_step: int
    first_step: int

    def __getitem__(self, path: str) -> Audited:
        """The row of the parameter at a canonical path."""
        if path not in self._rows:
            raise KeyError(f"Audit: no parameter has the path {path!r}.")
        return self._rows[path]

    @functools.cached_property
    def _rows(self) -> dict[str, Audited]:
        return {row.path: row for row in self.parameters}

    def finding(self, name: str) -> Finding | None:
        """The first finding of this name, or None."""
        return next((finding for finding in self.findings if finding.name == name), None)

    def table(self) -> str:
        """The rows alone; repeated blocks are one line."""
        lines = _table.in_columns(_HEADER, _lines(self.parameters), ("arrays", "shape", "dtype", "rate", "kept"))
        steps = [f"\na real step every {self.calls_per_step} calls of update"] if self.calls_per_step > 1 else []
        return "\n".join((*lines, *steps))

    def __str__(self) -> str:
        return "\n".join((self.table(), "", *map(str, self.findings or ("nothing unexpected",))))

    __repr__ = __str__


def _lines(rows: Sequence[Audited]) -> list[tuple[str, ...]]:
    """One line for the parameters that differ in the numbers of their paths only."""
    groups: dict[object, list[Audited]] = collections.defaultdict(list)
    for row in rows:
        cells = _cells(row)
        groups[tuple(re.split(r"\d+", row.path)), cells].append(row)
    return [
        (_table.merged_texts([row.path for row in part]), str(len(part)), *_cells(part[0]))
        for group in groups.values()
        for part in _table.merged(group)
    ]


def _cells(row: Audited) -> tuple[str, ...]:
    scales = {True: "yes", False: "no", None: "?"}[row.scales_with_learning_rate] if row.decays else ""
    kept = "" if not row.decays else "?" if math.isnan(row.kept) else f"{max(row.kept, 0):.0%}"
    return (str(row.shape), row.dtype, _rates(row), row.place, row.kind, row.toward, scales, kept)


def _rates(row: Audited) -> str:
    """The rate; the smallest and the largest; or, if it changes with the count, the first and the largest or last."""
    if f"{row.least:.3g}" != f"{row.most:.3g}":
        return f"{row.least:.3g} to {row.most:.3g}"
    if len({f"{rate:.3g}" for rate in (row.rate, *(rate for _, rate in row.rates))}) == 1:
        return f"{row.rate:.3g}"
    (count, first), largest = row.rates[0], max(row.rates, key=lambda pair: abs(pair[1]))
    other_count, other = row.rates[-1] if largest == row.rates[0] else largest
    return f"{first:.3g} ({count}) … {other:.3g} ({other_count})"
