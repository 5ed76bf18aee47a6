"""Tables: rows of named values, as Markdown and as plain data."""

import dataclasses
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ._timing import Ratio

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Table:
    """One comparison.

    Attributes:
        title: what is compared, in one line.
        about: how to read it: what the rows and the target are.
        rows: mappings from column to value: strings, numbers, booleans, `Ratio`s, or None for an empty cell.
    """

    title: str
    about: str
    rows: Sequence[Row]

    def markdown(self) -> str:
        columns = list(dict.fromkeys(column for row in self.rows for column in row))
        lines = [columns, ["---"] * len(columns)]
        lines += [[_text(row.get(column)) for column in columns] for row in self.rows]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"### {self.title}\n\n{self.about}\n\n{table}\n"

    def data(self) -> dict[str, Any]:
        rows = [{column: _plain(value) for column, value in row.items()} for row in self.rows]
        return {"title": self.title, "about": self.about, "rows": rows}


def rows_for(items: Iterable[Any], make: Callable[[Any], Iterable[Row]]) -> list[Row]:
    """The rows of all items. An item that fails, for example for lack of memory, gets a row that says so."""
    rows: list[Row] = []
    for item in items:
        try:
            rows += make(item)
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            rows.append({"tree": str(item), "failed": f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"})
    return rows


def at_most(value: float | Ratio, bound: float) -> Row:
    """The last two columns of a row that has an upper bound as its target."""
    return {"target": f"≤ {bound:g}", "met": _met(value, bound, low_is_good=True)}


def at_least(value: float | Ratio, bound: float) -> Row:
    """The last two columns of a row that has a lower bound as its target."""
    return {"target": f"≥ {bound:g}", "met": _met(value, bound, low_is_good=False)}


def equal(value: Any, to: Any) -> Row:
    """The last two columns of a row whose target is exact."""
    return {"target": f"= {to}", "met": "yes" if value == to else "no"}


def as_control(value: Ratio, control: Ratio) -> Row:
    """The last two columns of a ratio that should be 1.00 within the noise of the control."""
    bound = max(control.upper, 1.0)
    return {"target": "1.00 ± noise", "met": _met(value, bound, low_is_good=True)}


def _met(value: float | Ratio, bound: float, *, low_is_good: bool) -> str:
    sign = 1 if low_is_good else -1
    if not isinstance(value, Ratio):
        return "yes" if sign * value <= sign * bound else "no"
    if sign * value.median <= sign * bound:
        return "yes"
    return "noise" if value.lower <= bound <= value.upper else "no"


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _plain(value: Any) -> Any:
    return value._asdict() if isinstance(value, Ratio) else value
