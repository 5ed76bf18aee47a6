"""A plan as a table: repeated blocks are one line, in plain text, for rich, or as HTML."""

import collections
import html
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from ._planned import Planned, count, show_rate

HEADER = ("path", "arrays", "shape", "dtype", "parameters", "rate", "rule", "why")
_NUMBERS = ("arrays", "shape", "dtype", "parameters", "rate")
_NUMBER = re.compile(r"\d+")
_DISPENSABLE = ("dtype", "arrays", "rule", "shape", "parameters")  # Where the terminal is narrow, in this order.


class Line(NamedTuple):
    """A line of the table; one cell for each name of the header."""

    cells: tuple[str, ...]
    decays: bool


def lines_of(parameters: Sequence[Planned]) -> list[Line]:
    """One line for the parameters of one shape and one rule that differ in the numbers of their paths only."""
    groups: dict[Any, list[Planned]] = collections.defaultdict(list)
    for p in parameters:
        without = _NUMBER.sub("#", p.path), _NUMBER.sub("#", p.reason)
        groups[without, p.shape, p.dtype, p.decays, p.rule].append(p)
    return [_line(group) for group in groups.values()]


def as_text(parameters: Sequence[Planned]) -> list[str]:
    """The table in aligned columns."""
    rows = [HEADER, *(line.cells for line in lines_of(parameters))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    lines = ["  ".join(_aligned(row, widths)).rstrip() for row in rows]
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
        # Text, since rich would take brackets in a pattern for markup.
        cells = [Text(cell) for cell, name in zip(line.cells, HEADER, strict=True) if name in shown]
        table.add_row(*cells, style="green" if line.decays else "dim")
    return table


def as_html(title: str, parameters: Sequence[Planned]) -> str:
    """A title and a table, with nothing but inline styles."""

    def row(cells: Iterable[str], tag: str, style: str = "") -> str:
        return f"<tr{style}>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    lines = lines_of(parameters)
    body = "".join(row(line.cells, "td", "" if line.decays else ' style="opacity: 0.6"') for line in lines)
    return f"<p>{html.escape(title)}</p><table>{row(HEADER, 'th')}{body}</table>"


def changes(pairs: Iterable[tuple[Planned | None, Planned | None]]) -> list[str]:
    """A line for each change from one row to another, None where there is none; like changes are one line."""
    groups: dict[tuple[str, str], list[tuple[Planned | None, Planned | None]]] = collections.defaultdict(list)
    for old, new in pairs:
        kind = "new" if old is None else "gone" if new is None else f"by {new.rule}"
        row = new if old is None else old
        assert row is not None
        groups[_NUMBER.sub("#", row.path), kind].append((old, new))
    lines = []
    for (_, kind), group in groups.items():
        before, after = ([row for row in rows if row is not None] for rows in zip(*group, strict=True))
        rates = " → ".join(_rates(rows) for rows in (before, after) if rows)
        lines.append(f"{_merged_path(before or after)}: {rates}, {kind}")
    return lines


def _line(group: Sequence[Planned]) -> Line:
    first = group[0]
    return Line(
        (
            _merged_path(group),
            str(len(group)),
            str(first.shape),
            first.dtype,
            count(sum(planned.size for planned in group)),
            _rates(group),
            first.rule,
            first.reason if len({planned.reason for planned in group}) == 1 else _NUMBER.sub("#", first.reason),
        ),
        first.decays,
    )


def _merged_path(group: Sequence[Planned]) -> str:
    """One path for paths that differ in their numbers only: "blocks/{0..11}/kernel"."""
    columns = [sorted(set(map(int, column))) for column in zip(*map(_numbers, group), strict=True)]
    shown = map(_range, columns)
    return _NUMBER.sub(lambda match: match.group() if len(group) == 1 else next(shown), group[0].path)


def _numbers(planned: Planned) -> list[str]:
    return _NUMBER.findall(planned.path)


def _rates(group: Sequence[Planned]) -> str:
    """The rate of all, or that of the first and of the last by their numbers."""
    ordered = sorted(group, key=lambda planned: list(map(int, _numbers(planned))))
    shown = list(dict.fromkeys(show_rate(planned.rate, digits=4) for planned in ordered))
    return shown[0] if len(shown) == 1 else f"{shown[0]} … {shown[-1]}"


def _range(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    if numbers[-1] - numbers[0] == len(numbers) - 1 and len(numbers) > 2:
        return f"{{{numbers[0]}..{numbers[-1]}}}"
    return f"{{{','.join(map(str, numbers))}}}"


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    cells = zip(row, widths, HEADER, strict=True)
    return [cell.rjust(width) if name in _NUMBERS else cell.ljust(width) for cell, width, name in cells]
