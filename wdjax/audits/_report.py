"""The result of an audit: a row for each parameter, findings ranked by harm, and the table that is printed."""

import collections
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from .._engine.text import listed, merged, merged_texts
from ..plans import table

GRADIENT_AND_UPDATE = "gradient and update"
_HEADER = ("path", "arrays", "shape", "dtype", "rate", "where", "kind", "toward", "x learning rate", "kept")


class Audited(NamedTuple):
    """What an optimizer does to one parameter.

    Attributes:
        path, shape, dtype: its canonical path, its shape, and the name of its dtype.
        rate: the fraction of a weight that the first real step removes with zero gradient (the median over weights). If
            that step decays nothing, that at the first of `steps` that does. 0.0 for no decay, negative for growth.
        least, most: the smallest and the largest rate of an array with a rate for each layer; otherwise both the rate.
        rates: pairs of a count and the rate at that count; empty for an optimizer without a count.
        beside_gradient: the same fraction when there is a gradient.
        place: "update": added to the finished update; "gradient": it enters the moments, or is scaled with the
            gradient; "weights": a rule for the weights after the step; "gradient and update": two decays; "none".
        kind: "L2": proportional to the weight; "L1": the same size for all weights; "norm": proportional to the weight
            divided by a norm; "Huber": L2 for small and L1 for large weights; "cautious ..."; "other"; "unknown":
            the moments hide it; "none".
        toward: "zero"; "init": the weights at the optimizer's `init`; "a tree": others; "" for no decay.
        scales_with_learning_rate: whether the rate changes with the learning rate; None if the audit can't tell.
        in_update: if the place is "gradient and update", the part of the rate that the decay in the update takes.
        kept: the share of the decay that remains after rounding to the parameter's dtype. NaN if it can't be measured:
            the state changes its dtypes, updates are not finite, or a writer would need more steps than were run.
        role: what it is by its name and shape, as in `weights_only`: "kernel", "bias", "norm", ...; "" if unknown.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    rate: float = 0.0
    least: float = 0.0
    most: float = 0.0
    rates: tuple[tuple[int, float], ...] = ()
    beside_gradient: float = 0.0
    place: str = "none"
    kind: str = "none"
    toward: str = ""
    scales_with_learning_rate: bool | None = None
    in_update: float = 0.0
    kept: float = 1.0
    role: str = ""

    @property
    def decays(self) -> bool:
        """Whether any decay acts on it, even if rounding removes it."""
        return self.kind != "none"


class Finding(NamedTuple):
    """Something that a reader of the code would not expect.

    Attributes:
        harm: "wrong": the training is not what the code says; "suspect": probably not what you want; "note".
        name: its name, which `assert_audit` can allow.
        message, remedy: what it is, and what to write instead.
        paths: the parameters that it concerns; empty for all.
        measured: for each of these paths, the numbers, in words; "" where there are none.
    """

    harm: str
    name: str
    message: str
    remedy: str
    paths: tuple[str, ...] = ()
    measured: tuple[str, ...] = ()

    def __str__(self) -> str:
        groups: dict[str, list[str]] = {}
        for path, numbers in zip(self.paths, self.measured or [""] * len(self.paths), strict=True):
            groups.setdefault(numbers, []).append(path)
        parts = [f"{numbers} ({listed(paths, 3)})".lstrip() for numbers, paths in groups.items()]
        where = f"{'' if '' in groups else ':'} {'; '.join(parts)}" if parts else ""
        return f"{self.harm} [{self.name}]: {self.message}{where}. {self.remedy}".rstrip()


@dataclasses.dataclass(frozen=True, repr=False)
class Audit:
    """What an optimizer does to each parameter, as measured; `print(audit)` gives a table and the findings.

    Attributes:
        parameters: a row for each parameter that is a number, in the order of the tree.
        findings: what is unexpected, the most harmful first.
        calls_per_step: how many calls of `update` make one real step: more than 1 under `optax.MultiSteps`.
        first_step: the first call, from 0, in which gradients moved anything: later if a learning rate warms up from 0.
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
        """The first finding of this name, or None. Raises a ValueError if no finding has this name."""
        from .findings import NAMES  # It imports this module.

        if name not in NAMES:
            raise ValueError(f"Audit: no finding is named {name!r}. The names are: {', '.join(map(repr, NAMES))}.")
        return next((finding for finding in self.findings if finding.name == name), None)

    def table(self) -> str:
        """The rows alone; repeated blocks are one line."""
        lines = table.in_columns(_HEADER, _lines(self.parameters), ("arrays", "shape", "dtype", "rate", "kept"))
        if self.calls_per_step > 1:
            lines += ["", f"one real step every {self.calls_per_step} calls of update"]
        return "\n".join(lines)

    def __str__(self) -> str:
        return "\n".join((self.table(), "", *map(str, self.findings or ("nothing unexpected",))))

    __repr__ = __str__


def _lines(rows: Sequence[Audited]) -> list[tuple[str, ...]]:
    """One line for all parameters whose paths differ only in their numbers."""
    groups: dict[object, list[Audited]] = collections.defaultdict(list)
    for row in itertools.chain.from_iterable(map(_decays, rows)):
        groups[tuple(re.split(r"\d+", row.path)), _cells(row)].append(row)
    return [
        (merged_texts([row.path for row in part]), str(len(part)), *_cells(part[0]))
        for group in groups.values()
        for part in merged(group)
    ]


def _decays(row: Audited) -> list[Audited]:
    """The row, or one for each of its two decays."""
    if row.place != GRADIENT_AND_UPDATE:
        return [row]
    parts = (("gradient", row.kind, row.rate - row.in_update), ("update", "L2", row.in_update))
    return [row._replace(place=p, kind=k, rate=r, least=r, most=r, rates=()) for p, k, r in parts]


def _cells(row: Audited) -> tuple[str, ...]:
    scales = {True: "yes", False: "no", None: "?"}[row.scales_with_learning_rate] if row.decays else ""
    kept = "" if not row.decays else "?" if math.isnan(row.kept) else f"{max(row.kept, 0):.0%}"
    return (str(row.shape), row.dtype, _rates(row), row.place, row.kind, row.toward, scales, kept)


def _rates(row: Audited) -> str:
    """The rate; its smallest and largest value; or, if it changes with the count, the first and the largest or last."""
    if f"{row.least:.3g}" != f"{row.most:.3g}":
        return f"{row.least:.3g} to {row.most:.3g}"
    if len({f"{rate:.3g}" for rate in (row.rate, *(rate for _, rate in row.rates))}) == 1:
        return f"{row.rate:.3g}"
    (count, first), largest = row.rates[0], max(row.rates, key=lambda pair: abs(pair[1]))
    other_count, other = row.rates[-1] if largest == row.rates[0] else largest
    return f"{first:.3g} ({count}) … {other:.3g} ({other_count})"
