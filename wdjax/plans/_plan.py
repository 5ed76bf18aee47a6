"""A plan has one row for each parameter. It can be printed, compared and saved."""

import collections
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

from . import table
from .planned import Planned, Totals, show_rate, totals_of


@dataclasses.dataclass(frozen=True, repr=False)
class Plan:
    """Which parameters decay, how strongly and why: one row for each parameter, in the order of the tree.

    `print(plan)` and `str(plan)` give a table in plain text. `plan.show()` and `rich.print(plan)` show it in colors in
    a terminal. A notebook shows it as HTML. Repeated blocks are one line.

    `for row in plan` iterates over the rows, and `plan[path]` is the row of one parameter.
    """

    parameters: tuple[Planned, ...]

    def __getitem__(self, path: str) -> Planned:
        """The row of the parameter at a canonical path."""
        if path not in self._rows:
            raise KeyError(f"Plan: no parameter has the path {path!r}.")
        return self._rows[path]

    def __iter__(self) -> Iterator[Planned]:
        """The rows, in the order of the tree."""
        return iter(self.parameters)

    def __len__(self) -> int:
        return len(self.parameters)

    @functools.cached_property
    def _rows(self) -> dict[str, Planned]:
        return {planned.path: planned for planned in self.parameters}

    @property
    def totals(self) -> "Totals":
        """How many parameters decay, in how many arrays."""
        return totals_of(self.parameters)

    @property
    def totals_by_rule(self) -> dict[str, "Totals"]:
        """The totals of the parameters that each rule decided on."""
        groups: dict[str, list[Planned]] = collections.defaultdict(list)
        for planned in self.parameters:
            groups[planned.rule].append(planned)
        return {rule: totals_of(group) for rule, group in groups.items()}

    def diff(self, other: "Plan") -> "PlanDiff":
        """How `other` differs: parameters that it adds, parameters that it lacks, and parameters with another rate."""
        before, after = self._rows, other._rows
        return PlanDiff(
            added=tuple(planned for path, planned in after.items() if path not in before),
            removed=tuple(planned for path, planned in before.items() if path not in after),
            changed=tuple(
                (planned, after[path])
                for path, planned in before.items()
                if path in after and show_rate(planned.rate) != show_rate(after[path].rate)
            ),
        )

    def text(self) -> str:
        """A line for each parameter, for a golden file and `testing.assert_plan`: its rate, a tab and its path.

        Numbers have six digits. A schedule is shown by its name only.
        """
        return "".join(f"{show_rate(planned.rate)}\t{planned.path}\n" for planned in self.parameters)

    def to_dict(self) -> dict[str, Any]:
        """The plan in plain dictionaries, lists, strings, numbers and booleans, for JSON, TOML or a tracker."""
        rows = [planned._asdict() for planned in self.parameters]
        for row in rows:
            row["shape"] = list(row["shape"])
            row["rate"] = list(row["rate"]) if isinstance(row["rate"], tuple) else row["rate"]
        return {"totals": str(self.totals), "parameters": rows}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> "Plan":
        """The plan that `to_dict` wrote.

        Raises:
            ValueError: if `data` was not written by `to_dict`.
        """
        try:
            rows = [{**row, "shape": tuple(row["shape"])} for row in data["parameters"]]
            for row in rows:
                row["rate"] = tuple(row["rate"]) if isinstance(row["rate"], list) else row["rate"]
            return Plan(tuple(Planned(**row) for row in rows))
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"Plan.from_dict: data must be a dictionary from Plan.to_dict, got {str(data)[:80]}, which raises "
                f"{type(error).__name__}: {error}."
            ) from error

    def show(self) -> None:
        """Prints the table: in colors if rich is installed and the output is a terminal, otherwise in plain text."""
        try:
            from rich.console import Console
        except ImportError:
            print(self)
            return
        console = Console()
        if console.is_terminal:
            console.print(self)
        else:
            print(self)

    def __str__(self) -> str:
        totals = self.totals_by_rule.items()
        by_rule = [f"  {rule}: {total}" for rule, total in totals] if len(totals) > 1 else []
        return "\n".join((*table.as_text(self.parameters), "", str(self.totals), *by_rule))

    __repr__ = __str__

    def __rich_console__(self, console: Any, options: Any) -> Any:
        yield table.as_rich(str(self.totals), self.parameters, options.max_width)

    def _repr_html_(self) -> str:
        return table.as_html(str(self.totals), self.parameters)


@dataclasses.dataclass(frozen=True)
class PlanDiff:
    """How one plan differs from another. It is falsy if there is no difference.

    Attributes:
        added, removed: the rows of parameters that only the second plan has, or only the first.
        changed: pairs of rows, for parameters whose rate differs.
    """

    added: tuple[Planned, ...]
    removed: tuple[Planned, ...]
    changed: tuple[tuple[Planned, Planned], ...]

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed)

    def __str__(self) -> str:
        added, removed = ((None, p) for p in self.added), ((p, None) for p in self.removed)
        return "\n".join(table.changes((*added, *removed, *self.changed))) or "no difference"
