"""A rate as a user gives it. A tree of rates becomes a rule set, so that the loop knows only numbers and rule sets."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from . import checks, trees
from .decision import Decision, Tree
from .rules import TABLE, Rules, check_rates
from .text import lacks


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PerParameter(Rules, kind="a tree of rates", is_written=False):
    """A tree like params whose leaves are rates: numbers, arrays, schedules, or None where nothing is done."""

    rates: dict[str, Any]

    def _decide(self, tree: Tree, asked: Sequence[int]) -> dict[int, Decision]:
        paths = {leaf.path for leaf in tree.leaves}
        holes = tuple(f"{leaf.path}/" for leaf in tree.leaves if leaf.dtype is None)
        missing = [tree.leaves[i].path for i in asked if i in tree.required and tree.leaves[i].path not in self.rates]
        extra = [path for path in self.rates if path not in paths and not path.startswith(holes)]
        if missing or extra:
            raise ValueError(
                f"{tree.where}: a tree of rates must have the structure of params. {lacks(missing, extra)} "
                "Write jax.tree.map(lambda p: 0.1, params), with None where nothing is to be done. "
                f"Write rates by pattern as {TABLE}."
            )
        rates = {i: self.rates.get(tree.leaves[i].path) for i in asked}
        return {i: Decision(rate, self.kind) for i, rate in rates.items() if not trees.is_hole(rate)}

    def _values(self) -> list[Any]:
        return [rate for rate in self.rates.values() if not trees.is_hole(rate)]

    def _written(self) -> str:
        return f"<{self.kind}>"

    def to_dict(self) -> dict[str, Any]:
        raise TypeError("Rules.to_dict: a tree of rates can't be written to a file. Write rates by path: by_path.")


def rate_or_rules(where: str, name: str, value: Any) -> Any:
    """Checks a rate: a number, a 0-d array, a schedule, a rule set, or a tree of rates, which becomes a rule set."""
    if isinstance(value, Rules):
        check_rates(value, where)
        return value
    # A tree may be callable too, such as an Equinox module of rates.
    is_tree = value is not None and jax.tree.structure(value) != jax.tree.structure(0)
    if is_tree and not isinstance(value, jax.tree_util.Partial):
        rates = dict(trees.flatten_with_paths(value))
        return PerParameter({p: r if trees.is_hole(r) else _rate_at(where, name, p, r) for p, r in rates.items()})
    return checks.rate(where, name, value)


def _rate_at(where: str, name: str, path: str, rate: Any) -> Any:
    return checks.rate(where, f"{name} at {path!r}", rate, write=f"{where}({name}=0.1)", may_be_array=True)


def values_of(schedule: Any, counts: Sequence[int]) -> np.ndarray | None:
    """The values of a schedule at some counts. None if they aren't known yet, or if it fails.

    Inside a trace, the schedule still runs on numbers.
    """
    with jax.ensure_compile_time_eval():
        steps = np.asarray(counts, np.int32)
        try:
            # One compiled program is several times as fast as the schedule's operations one by one.
            return np.asarray(jax.jit(lambda steps: jax.lax.map(schedule, steps))(steps))
        except Exception:  # A schedule with Python's `if` can't be compiled.
            pass
        try:
            return np.array([np.asarray(schedule(step)) for step in steps])
        except Exception:  # It raises its own error when the step calls it.
            return None
