"""A plan has one row for each parameter. It can be printed, compared and saved."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

from .._engine import checks
from .._engine.rules import plain
from .._engine.text import shown
from . import table
from .table import Planned, Totals, show_rate, totals_of


@dataclasses.dataclass(frozen=True, repr=False)
class Plan:
    """Which parameters decay, how strongly and why: one row for each parameter, in the order of the tree.

    `print(plan)` gives a table in plain text, `plan.show()` and `rich.print(plan)` show it in colors, and a notebook as
    HTML. Repeated blocks are one line. `for row in plan` iterates over the rows, and `plan[path]` is one of them.

    Attributes:
        parameters: the rows, each a `plans.Planned`.

    Raises: KeyError from `plan[path]`, if no parameter has this path.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
        >>> plan = wdjax.plan(params, 0.1, wdjax.only("kernel"))
        >>> str(plan.totals), plan["kernel"].rate, [row.path for row in plan if row.decays]
        ('decayed 6 of 9 parameters in 1 of 2 arrays', 0.1, ['kernel'])
        >>> print(plan.diff(wdjax.plan(params, 0.2, wdjax.only("kernel"))))
        kernel: 0.1 → 0.2, by 'kernel'
    """

    parameters: tuple[Planned, ...]

    def __getitem__(self, path: str) -> Planned:
        if path not in self._rows:
            raise KeyError(f"Plan: no parameter has the path {path!r}.")
        return self._rows[path]

    def __iter__(self) -> Iterator[Planned]:
        return iter(self.parameters)

    def __len__(self) -> int:
        return len(self.parameters)

    @functools.cached_property
    def _rows(self) -> dict[str, Planned]:
        return {planned.path: planned for planned in self.parameters}

    @property
    def totals(self) -> Totals:
        """How many parameters decay, in how many arrays."""
        return totals_of(self.parameters)

    @property
    def totals_by_rule(self) -> dict[str, Totals]:
        """The totals of the parameters that each rule decided on."""
        rules = dict.fromkeys(planned.rule for planned in self.parameters)
        return {rule: totals_of([planned for planned in self.parameters if planned.rule == rule]) for rule in rules}

    def diff(self, other: "Plan") -> "PlanDiff":
        """How `other` differs: parameters that it adds, parameters that it lacks, and parameters with another rate."""
        before, after = self._rows, other._rows
        added = tuple(planned for path, planned in after.items() if path not in before)
        removed = tuple(planned for path, planned in before.items() if path not in after)
        both = [(planned, after[path]) for path, planned in before.items() if path in after]
        changed = tuple((old, new) for old, new in both if table.different(old, new))
        return PlanDiff(added, removed, changed)

    def text(self) -> str:
        """For a golden file: the rate of each parameter in six digits (a schedule by its name), a tab and the path."""
        return "".join(f"{show_rate(planned.rate)}\t{planned.path}\n" for planned in self.parameters)

    def to_dict(self) -> dict[str, Any]:
        """The plan in plain dictionaries, lists, strings, numbers and booleans, for JSON, TOML or a tracker."""
        rows = [{key: value for key, value in row._asdict().items() if value is not None} for row in self.parameters]
        return {"totals": str(self.totals), "parameters": plain(tuple(rows))}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> "Plan":
        """The plan that `to_dict` wrote.

        Raises: ValueError for anything else.
        """
        checks.nesting("Plan.from_dict", data, "it as Plan.to_dict does")
        try:
            rows: list[dict[str, Any]] = [dict(row) for row in data["parameters"]]
            lists = [{key: tuple(value) for key, value in row.items() if isinstance(value, list)} for row in rows]
            return Plan(tuple(Planned(**{**row, **tuples}) for row, tuples in zip(rows, lists, strict=True)))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"Plan.from_dict: data must be a dictionary from Plan.to_dict, got {shown(data)}: {error!r}."
            ) from error

    def show(self) -> None:
        """Prints the table: in colors if rich is installed and the output is a terminal, otherwise in plain text."""
        show = print
        with contextlib.suppress(ImportError):
            from rich.console import Console

            console = Console()
            show = console.print if console.is_terminal else print
        show(self)

    def __str__(self) -> str:
        totals = self.totals_by_rule.items()
        by_rule = [f"  {rule}: {total}" for rule, total in totals] if len(totals) > 1 else []
        cells = [cells for cells, _ in table.lines_of(self.parameters)]
        lines = table.in_columns(table.header(self.parameters), cells, table.NUMBERS)
        return "\n".join((*lines, "", str(self.totals), *by_rule))

    __repr__ = __str__

    def __rich_console__(self, console: Any, options: Any) -> Any:
        yield table.as_rich(str(self.totals), self.parameters, options.max_width)

    def _repr_html_(self) -> str:
        return table.as_html(str(self.totals), self.parameters)


@dataclasses.dataclass(frozen=True)
class PlanDiff:
    """How one plan differs from another; falsy if it does not. `print(diff)` gives a line for each change.

    Attributes:
        added, removed: the rows that only the other plan has, and those that only this one has.
        changed: pairs of rows, of this plan and of the other, whose rates differ.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> plan = wdjax.plan({"kernel": jnp.ones((2, 3))}, 0.1)
        >>> bool(plan.diff(plan)), len(plan.diff(wdjax.plan({"kernel": jnp.ones((2, 3))}, 0.2)).changed)
        (False, 1)
    """

    added: tuple[Planned, ...]
    removed: tuple[Planned, ...]
    changed: tuple[tuple[Planned, Planned], ...]

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed)

    def __str__(self) -> str:
        added, removed = ((None, p) for p in self.added), ((p, None) for p in self.removed)
        return "\n".join(table.changes((*added, *removed, *self.changed))) or "no difference"
