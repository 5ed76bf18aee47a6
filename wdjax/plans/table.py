"""A plan as a table, in plain text, for rich, or as HTML. Repeated blocks are one line."""

import collections
import html
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from .planned import Planned, count, show_rate

HEADER = ("path", "arrays", "shape", "dtype", "parameters", "rate", "rule", "why")
_NUMBERS = ("arrays", "shape", "dtype", "parameters", "rate")
_NUMBER = re.compile(r"\d+")
_DISPENSABLE = ("dtype", "arrays", "rule", "shape", "parameters")  # Dropped in this order if the terminal is narrow.


class _Row(Protocol):
    @property
    def path(self) -> str: ...


R = TypeVar("R", bound=_Row)


class Line(NamedTuple):
    """A line of the table, with one cell for each name in the header."""

    cells: tuple[str, ...]
    decays: bool


def lines_of(parameters: Sequence[Planned]) -> list[Line]:
    """One line for all parameters with the same shape and rule whose paths differ only in their numbers."""
    groups: dict[Any, list[Planned]] = collections.defaultdict(list)
    for p in parameters:
        without = tuple(_NUMBER.split(p.path)), tuple(_NUMBER.split(p.reason))
        groups[without, p.shape, p.dtype, p.decays, p.rule].append(p)
    return [_line(part) for group in groups.values() for part in merged(group)]


def as_text(parameters: Sequence[Planned]) -> list[str]:
    """The table in aligned columns."""
    return in_columns(HEADER, [line.cells for line in lines_of(parameters)], _NUMBERS)


def in_columns(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str]) -> list[str]:
    """The lines of a table. The columns named in `right` are right-aligned."""
    rows = [header, *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = []
    for row in rows:
        cells = zip(row, widths, header, strict=True)
        aligned = (cell.rjust(width) if name in right else cell.ljust(width) for cell, width, name in cells)
        lines.append("  ".join(aligned).rstrip())
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def as_rich(title: str, parameters: Sequence[Planned], width: int) -> Any:
    """A `rich.table.Table` with the columns that fit into a width."""
    from rich.table import Table
    from rich.text import Text

    lines = lines_of(parameters)
    needed = {name: max(len(name), *(len(line.cells[k]) for line in lines), 0) for k, name in enumerate(HEADER)}
    shown = list(HEADER)
    for name in _DISPENSABLE:
        if sum(needed[other] + 3 for other in shown) >= width:
            shown.remove(name)
    table = Table(title=title)
    for name in shown:
        table.add_column(name, justify="right" if name in _NUMBERS else "left", overflow="fold")
    for line in lines:
        # As Text, because rich would read brackets in a pattern as markup.
        cells = [Text(cell) for cell, name in zip(line.cells, HEADER, strict=True) if name in shown]
        table.add_row(*cells, style="green" if line.decays else "dim")
    return table


def as_html(title: str, parameters: Sequence[Planned]) -> str:
    """A title and a table, with inline styles only."""

    def row(cells: Iterable[str], tag: str, style: str = "") -> str:
        return f"<tr{style}>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    lines = lines_of(parameters)
    body = "".join(row(line.cells, "td", "" if line.decays else ' style="opacity: 0.6"') for line in lines)
    return f"<p>{html.escape(title)}</p><table>{row(HEADER, 'th')}{body}</table>"


def changes(pairs: Iterable[tuple[Planned | None, Planned | None]]) -> list[str]:
    """A line for each change from one row to another; None stands for a missing row. Similar changes are one line."""
    groups: dict[Any, dict[str, tuple[Planned | None, Planned | None]]] = collections.defaultdict(dict)
    for old, new in pairs:
        row = new if old is None else old
        assert row is not None
        key = (tuple(_NUMBER.split(row.path)), old and old.rule, new and new.rule)
        groups[key][row.path] = old, new
    lines = []
    for group in groups.values():
        for part in merged([old or new for old, new in group.values()]):  # pyright: ignore[reportArgumentType]
            before, after = zip(*(group[row.path] for row in part), strict=True)
            rates = " → ".join(_rates(rows) for rows in (before, after) if rows[0] is not None)
            kind = "new" if before[0] is None else "gone" if after[0] is None else f"by {after[0].rule}"
            lines.append(f"{merged_texts([row.path for row in part])}: {rates}, {kind}")
    return lines


def _line(group: Sequence[Planned]) -> Line:
    first = group[0]
    return Line(
        (
            merged_texts([planned.path for planned in group]),
            str(len(group)),
            str(first.shape),
            first.dtype,
            count(sum(planned.size for planned in group)),
            _rates(group),
            first.rule,
            merged_texts([planned.reason for planned in group]),
        ),
        first.decays,
    )


def merged(group: Sequence[R]) -> list[list[R]]:
    """The group in parts. Each has every combination of the numbers in its paths, so that its line is exact."""
    columns = _columns([planned.path for planned in group])
    if math.prod(map(len, columns)) == len(group):
        return [list(group)]
    first = next(k for k, column in enumerate(columns) if len(column) > 1)
    parts: dict[str, list[R]] = collections.defaultdict(list)
    for planned in group:
        parts[_NUMBER.findall(planned.path)[first]].append(planned)
    return [part for each in parts.values() for part in merged(each)]


def _columns(texts: Sequence[str]) -> list[list[str]]:
    """The sorted numbers at each position in strings that differ only in their numbers, as they are written."""
    columns = zip(*map(_NUMBER.findall, texts), strict=True)
    return [sorted(set(column), key=lambda digits: (int(digits), digits)) for column in columns]


def merged_texts(texts: Sequence[str]) -> str:
    """One string for strings that differ only in their numbers: "blocks/{0..11}/kernel"."""
    shown = map(_range, _columns(texts))
    return _NUMBER.sub(lambda match: next(shown), texts[0])


def _range(digits: Sequence[str]) -> str:
    if len(digits) == 1:
        return digits[0]
    numbers = range(int(digits[0]), int(digits[-1]) + 1)
    if len(digits) > 2 and list(digits) == list(map(str, numbers)):
        return f"{{{digits[0]}..{digits[-1]}}}"
    return f"{{{','.join(digits)}}}"


def _rates(group: Sequence[Planned]) -> str:
    """The common rate; the first and the last if rates rise or fall with the numbers; otherwise all of them."""
    ordered = sorted(group, key=lambda planned: list(map(int, _NUMBER.findall(planned.path))))
    each = list(dict.fromkeys(planned.rate for planned in ordered))
    rates: list[Any] = list(each[0]) if len(each) == 1 and isinstance(each[0], tuple) else list(each)
    shown = list(dict.fromkeys(show_rate(rate, digits=4) for rate in rates))
    are_numbers = all(isinstance(rate, float) for rate in rates)
    if len(shown) > 2 and are_numbers and rates in (sorted(rates), sorted(rates, reverse=True)):
        return f"{shown[0]} … {shown[-1]}"
    return ", ".join(shown)
