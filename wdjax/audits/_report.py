"""The result of an audit: rows, findings ranked by harm, and the table that is printed."""

import collections
import dataclasses
import functools
import itertools
import math
import re
import textwrap
from collections.abc import Sequence

from .._engine.text import merged, merged_texts
from ..plans import table
from ._rows import GRADIENT_AND_UPDATE, Audited, Finding, in_words
from .findings import NAMES

_HEADER = ("path", "arrays", "shape", "dtype", "rate", "where", "kind", "toward", "x learning rate", "kept")


@dataclasses.dataclass(frozen=True, repr=False)
class Audit:
    """What an optimizer does to each parameter, as measured; `print(audit)` gives a table and the findings.

    Attributes:
        parameters: a row for each parameter that is a number, in the order of the tree.
        findings: what is unexpected, the most harmful first.
        calls_per_step: how many calls of `update` make one real step: more than 1 under `optax.MultiSteps`.
        first_step: the first call, from 0, in which gradients moved anything: later if a learning rate warms up from 0.

    Raises: KeyError from `audit[path]`, if no parameter has this path.

    Example:

        >>> import jax.numpy as jnp, optax, wdjax
        >>> audit = wdjax.audit(optax.adamw(1e-3, weight_decay=0.1), {"kernel": jnp.ones((2, 3))})
        >>> round(audit["kernel"].rate, 8), audit["kernel"].place, audit.finding("rounds to nothing")
        (0.0001, 'update', None)
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
        """The first finding of this name, or None.

        Raises: ValueError if no finding of any audit has this name.
        """
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
        findings = [_wrapped(str(finding)) for finding in self.findings]
        return "\n".join((self.table(), "", *(findings or ["nothing unexpected"])))

    __repr__ = __str__


def _wrapped(finding: str) -> str:
    return textwrap.fill(finding, 88, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)


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
    where = f"{row.place}, beside a gradient" if row.needs_gradient else row.place
    return (str(row.shape), row.dtype, _rates(row), where, row.kind, row.toward, scales, kept)


def _rates(row: Audited) -> str:
    """The rate; its smallest and largest value; or, if it changes with the count, the first and the largest or last.

    Behind moments only the first: at later counts they are as young as at the first one, which no training has.
    """
    if f"{row.least:.3g}" != f"{row.most:.3g}":
        return f"{row.least:.3g} to {row.most:.3g}"
    if row.place == "gradient":
        return f"{row.rate:.3g}"
    if len({f"{rate:.3g}" for rate in (row.rate, *(rate for _, rate in row.rates))}) == 1:
        return f"{row.rate:.3g}"
    first, largest = 0, max(range(len(row.rates)), key=lambda k: abs(row.rates[k][1]))
    words = in_words([rate for _, rate in row.rates])
    return " … ".join(f"{words[k]} ({row.rates[k][0]})" for k in (first, largest or -1))
