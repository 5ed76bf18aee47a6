"""The rows of a plan, and their table in plain text, for rich, or as HTML. Repeated blocks are one line."""

import collections
import html
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from .._engine.text import merged, merged_texts

MANY = 1000
_OF_STEPS = {"per_step": "per step", "per_thousand": f"per {MANY} steps"}  # Fields of a row, and their columns.
NUMBERS = ("arrays", "shape", "dtype", "parameters", "rate", *_OF_STEPS.values())
_NUMBER = re.compile(r"\d+")
_DISPENSABLE = ("dtype", "arrays", "rule", "shape", "parameters")  # Dropped in this order if the terminal is narrow.
PlannedRate = float | tuple[float, ...] | str


class Planned(NamedTuple):
    """What is planned for one parameter: a row of a `Plan`.

    Attributes:
        path, shape, dtype: its canonical path, its shape, and the name of its dtype.
        decays: whether it decays in any step.
        rate: a number, 0.0 if it does not decay; a number for each of stacked layers; or a string if it is known only
            during training (a schedule, a traced rate).
        rule, reason: the rule that decided, and why.
        per_step, per_thousand: the fractions of a weight that the decay alone removes in a step and in a thousand
            steps. They are None if the plan was made without a learning rate.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> row = wdjax.plan({"kernel": jnp.ones((2, 3))}, 0.1, wdjax.weights_only(), learning_rate=0.01)["kernel"]
        >>> row.rate, round(row.per_step, 6), row.rule, row.reason
        (0.1, 0.001, 'weights_only', "kernel: named 'kernel'")
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    decays: bool
    rate: PlannedRate
    rule: str
    reason: str
    per_step: PlannedRate | None = None
    per_thousand: PlannedRate | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class Totals(NamedTuple):
    """How many parameters and arrays decay, and how many there are.

    Attributes:
        decayed, parameters: the numbers of weights.
        decayed_arrays, arrays: the numbers of arrays.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> totals = wdjax.plan({"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, 0.1, wdjax.only("kernel")).totals
        >>> totals.decayed, totals.parameters
        (6, 9)
    """

    decayed: int
    parameters: int
    decayed_arrays: int
    arrays: int

    def __str__(self) -> str:
        parameters = f"{count(self.decayed)} of {count(self.parameters)} parameters"
        return f"decayed {parameters} in {self.decayed_arrays} of {self.arrays} arrays"


def show_rate(rate: PlannedRate, *, digits: int = 6) -> str:
    """A rate as it is written in golden files. For stacked layers, it is one number for each layer."""
    if isinstance(rate, str):
        return rate
    return ", ".join(f"{one:.{digits}g}" for one in (rate if isinstance(rate, (tuple, list)) else (rate,)))


def totals_of(rows: Sequence[Planned]) -> Totals:
    decayed = [planned.size for planned in rows if planned.decays]
    return Totals(sum(decayed), sum(planned.size for planned in rows), len(decayed), len(rows))


def count(number: int) -> str:
    """A count in short form: "124.4 M"."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= 0.99995 * size * (10 if unit == "k" else 1):  # Never "1000.0 k".
            return f"{number / size:.1f} {unit}"
    return str(number)


def _fields_of_steps(rows: Sequence[Planned | None]) -> list[str]:
    """The fields of rates per step that all of these rows have."""
    return [field for field in _OF_STEPS if all(row and getattr(row, field) is not None for row in rows)]


def different(old: Planned, new: Planned) -> list[str]:
    """The fields of the rates that differ in golden files, of those that both rows have."""
    fields = ("rate", *_fields_of_steps((old, new)))
    return [field for field in fields if show_rate(getattr(old, field)) != show_rate(getattr(new, field))]


def header(parameters: Sequence[Planned]) -> tuple[str, ...]:
    """The names of the columns. The rates per step are shown if they were planned."""
    of_steps = [_OF_STEPS[field] for field in _fields_of_steps(parameters)] if parameters else []
    return ("path", "arrays", "shape", "dtype", "parameters", "rate", *of_steps, "rule", "why")


def lines_of(parameters: Sequence[Planned]) -> list[tuple[tuple[str, ...], bool]]:
    """The cells of each line, and whether it decays. Rows that differ only in their numbers are one line."""
    groups: dict[Any, list[Planned]] = collections.defaultdict(list)
    for p in parameters:
        without = tuple(_NUMBER.split(p.path)), tuple(_NUMBER.split(p.reason))
        groups[without, p.shape, p.dtype, p.decays, p.rule].append(p)
    lines = []
    for part in (part for group in groups.values() for part in merged(group)):
        path, why = merged_texts([p.path for p in part]), merged_texts([p.reason for p in part])
        first, size = part[0], count(sum(p.size for p in part))
        rates = [_rates(part, field) for field in ("rate", *_fields_of_steps(parameters))]
        cells = (path, str(len(part)), str(first.shape), first.dtype, size, *rates, first.rule, why)
        lines.append((cells, first.decays))
    return lines


def in_columns(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str]) -> list[str]:
    """The lines of a table. The columns named in `right` are right-aligned."""
    columns = []
    for name, *cells in zip(header, header, *rows, strict=True):
        width = max(map(len, cells))
        columns.append([cell.rjust(width) if name in right else cell.ljust(width) for cell in cells])
    first, *lines = ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]
    return [first, "-" * max(map(len, (first, *lines))), *lines]


def as_rich(title: str, parameters: Sequence[Planned], width: int) -> Any:
    """A `rich.table.Table` with the columns that fit into a width."""
    from rich.table import Table
    from rich.text import Text

    lines, names = lines_of(parameters), header(parameters)
    columns = zip(names, *(cells for cells, _ in lines), strict=True)
    needed = {name: max(map(len, column)) for name, column in zip(names, columns, strict=True)}
    for name in _DISPENSABLE:
        if sum(size + 3 for size in needed.values()) >= width:
            del needed[name]
    table = Table(title=title)
    for name in needed:
        table.add_column(name, justify="right" if name in NUMBERS else "left", overflow="fold")
    for line, decays in lines:
        # As Text, because rich would read brackets in a pattern as markup.
        cells = [Text(cell) for cell, name in zip(line, names, strict=True) if name in needed]
        table.add_row(*cells, style="green" if decays else "dim")
    return table


def as_html(title: str, parameters: Sequence[Planned]) -> str:
    """A title and a table, with inline styles only."""

    def row(cells: Iterable[str], tag: str, style: str = "") -> str:
        return f"<tr{style}>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    lines = lines_of(parameters)
    body = "".join(row(cells, "td", "" if decays else ' style="opacity: 0.6"') for cells, decays in lines)
    return f"<p>{html.escape(title)}</p><table>{row(header(parameters), 'th')}{body}</table>"


def changes(pairs: Iterable[tuple[Planned | None, Planned | None]]) -> list[str]:
    """A line for each change from one row to another; None stands for a missing row. Similar changes are one line."""
    groups: dict[Any, dict[str, tuple[Planned | None, Planned | None]]] = collections.defaultdict(dict)
    for old, new in pairs:
        path = (old or new).path  # pyright: ignore[reportOptionalMemberAccess]
        groups[tuple(_NUMBER.split(path)), old and old.rule, new and new.rule][path] = old, new
    lines = []
    for group in groups.values():
        for part in merged([old or new for old, new in group.values()]):
            paths = [row.path for row in part]
            before, after = zip(*(group[path] for path in paths), strict=True)
            there = [rows for rows in (before, after) if rows[0] is not None]
            fields = ("rate", *_fields_of_steps([row for rows in there for row in rows]))
            if len(there) == 2:
                differing = {field for old, new in zip(*there, strict=True) for field in different(old, new)}
                fields = [field for field in fields if field in differing]
            rates = [[_OF_STEPS.get(field), " → ".join(_rates(rows, field) for rows in there)] for field in fields]
            shown = ", ".join(" ".join(filter(None, rate)) for rate in rates)
            kind = "new" if before[0] is None else "gone" if after[0] is None else f"by {after[0].rule}"
            lines.append(f"{merged_texts(paths)}: {shown}, {kind}")
    return lines


def _rates(group: Sequence[Planned], field: str) -> str:
    """The common rate; the first and the last if rates rise or fall with the numbers; otherwise all of them."""
    ordered = sorted(group, key=lambda planned: list(map(int, _NUMBER.findall(planned.path))))
    each = list(dict.fromkeys(getattr(planned, field) for planned in ordered))
    rates: list[Any] = list(each[0]) if len(each) == 1 and isinstance(each[0], tuple) else list(each)
    shown = list(dict.fromkeys(show_rate(rate, digits=4) for rate in rates))
    are_numbers = all(isinstance(rate, float) for rate in rates)
    if len(shown) > 2 and are_numbers and rates in (sorted(rates), sorted(rates, reverse=True)):
        return f"{shown[0]} … {shown[-1]}"
    return ", ".join(shown)
