"""What a sweep found: the results of all runs, the best setting, and what may be as good."""

import dataclasses
import itertools
from typing import Any

import numpy as np

from ..plans._table import in_columns


@dataclasses.dataclass(frozen=True, eq=False)
class Best:
    """The setting of the lowest mean loss over seeds, and the settings that the seeds cannot tell from the best.

    A setting is ruled out if another one is better by a paired one-sided t-test over the seeds, each pair at a level of
    (1 - confidence) / (settings - 1). So the setting that is truly best, for infinitely many seeds, is among the rest
    with that confidence, if the differences between settings are about normal over seeds. It is the screening of
    Nelson, Swann, Goldsman & Song 2001 (Operations Research 49) with common random numbers: the same seeds in every
    setting, so that what seeds have in common cancels. With one seed nothing is known and nothing is ruled out.

    Attributes:
        values: the setting, by name.
        index: where it is in the grid.
        mean, standard_error: of its loss over the seeds; the error is NaN for one seed. The mean is that of a winner,
            so it is too low by about its error: report the loss on data that did not choose.
        alike: of the grid's shape, booleans: what may be the best.
        interval: for each name the smallest and the largest value among these.
        at_end: the names whose best value is the smallest or largest that was tried, unless it is 0: try more.
    """

    values: dict[str, float]
    index: tuple[int, ...]
    mean: float
    standard_error: float
    alike: np.ndarray
    interval: dict[str, tuple[float, float]]
    at_end: tuple[str, ...]

    def __str__(self) -> str:
        found = ", ".join(
            f"{name} = {value:.4g} (between {self.interval[name][0]:.4g} and {self.interval[name][1]:.4g})"
            for name, value in self.values.items()
        )
        alike = f"{self.alike.sum()} of {self.alike.size} settings may be the best"
        end = "".join(f"; {name} is at the end of what was tried" for name in self.at_end)
        return f"{found}: {self.mean:.4g} ± {self.standard_error:.2g}; {alike}{end}"

    __repr__ = __str__


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Sweep:
    """What all runs returned.

    Attributes:
        values: for each name the values that were tried, float64; their order is that of the grid's axes.
        seeds: the seeds, the axis after those.
        results: what `train` returned, by name ("loss" if it returned a scalar): NumPy arrays of shape
            (*grid, seeds, *the shape that one run returned), or trees of these.
    """

    values: dict[str, np.ndarray]
    seeds: np.ndarray
    results: dict[str, Any]

    def best(self, name: str = "loss", *, confidence: float = 0.95) -> Best:
        """The setting where the result of this name is lowest in the mean, and what may be as good.

        A setting with a run that ended in NaN or infinity is never the best and never alike.

        Raises:
            KeyError: if `train` returned no scalar of this name.
            ValueError: if no setting has finite results for all seeds, or `confidence` is not between 0 and 1.
        """
        if not 0 < confidence < 1:
            raise ValueError(
                f"Sweep.best: confidence must be between 0 and 1, got {confidence}. Write confidence=0.95."
            )
        losses = self._losses(name).reshape(-1, len(self.seeds))
        finite = np.flatnonzero(np.isfinite(losses).all(axis=1))
        if not len(finite):
            raise ValueError(f"Sweep.best: in every setting a run's {name!r} is NaN or infinite. Try lower rates.")
        alike = np.zeros(len(losses), bool)
        alike[finite] = may_be_best(losses[finite], 1 - confidence)
        row = finite[losses[finite].mean(axis=1).argmin()]
        alike = alike.reshape(self._grid)
        index = tuple(map(int, np.unravel_index(row, self._grid)))
        values = {name: float(tried[i]) for (name, tried), i in zip(self.values.items(), index, strict=True)}
        among = dict(zip(self.values, alike.nonzero(), strict=True))
        return Best(
            values,
            index,
            float(losses[row].mean()),
            float(_standard_error(losses[row])),
            alike,
            {
                name: (float(tried[among[name]].min()), float(tried[among[name]].max()))
                for name, tried in self.values.items()
            },
            tuple(n for n, v in values.items() if v and self.values[n].size > 1 and v in _ends(self.values[n])),
        )

    def table(self, name: str = "loss") -> str:
        """A line for each setting: mean and standard error of the result of this name, runs that failed, what is best.

        Where a run ended in NaN or infinity, the mean is that of the others, and the line says how many failed.
        """
        losses = self._losses(name).reshape(-1, len(self.seeds))
        settings = list(itertools.product(*self.values.values()))
        best = self.best(name) if np.isfinite(losses).all(axis=1).any() else None
        rows = []
        for i, (setting, row) in enumerate(zip(settings, losses, strict=True)):
            finite = row[np.isfinite(row)]
            failed = len(row) - len(finite)
            mark = f"{failed} of {len(row)} failed" if failed else ""
            if best is not None and best.alike.flat[i]:
                mark = "best" if i == np.ravel_multi_index(best.index, self._grid) else "may be the best"
            mean = f"{finite.mean():.4g}" if len(finite) else "-"
            rows.append((*(f"{v:.4g}" for v in setting), mean, f"{_standard_error(finite):.2g}", mark))
        header = (*self.values, name, "std. error", "")
        return "\n".join(in_columns(header, rows, header[:-1]))

    @property
    def _grid(self) -> tuple[int, ...]:
        return tuple(map(len, self.values.values()))

    def _losses(self, name: str) -> np.ndarray:
        found = self.results.get(name)
        if not isinstance(found, np.ndarray) or found.ndim != len(self._grid) + 1:
            scalars = [
                n for n, r in self.results.items() if isinstance(r, np.ndarray) and r.ndim == len(self._grid) + 1
            ]
            raise KeyError(f"Sweep: train returned no scalar of the name {name!r}; it returned the scalars {scalars}.")
        return found.astype(np.float64)

    def __repr__(self) -> str:
        axes = ", ".join(f"{name}: {len(tried)}" for name, tried in self.values.items())
        return f"Sweep({axes}, seeds: {len(self.seeds)}; results: {', '.join(self.results)})"


def may_be_best(losses: np.ndarray, level: float) -> np.ndarray:
    """Of the rows (settings, seeds), those that no other is better than by a paired t-test, corrected for all pairs."""
    may = np.ones(len(losses), bool)
    freedom = losses.shape[1] - 1
    if freedom == 0 or len(losses) == 1:
        return may
    for other in losses:
        worse = losses - other
        mean, error = worse.mean(axis=1), _standard_error(worse)
        # Where all seeds differ by the same there is no doubt: t is infinite.
        t = np.divide(mean, error, out=np.where(mean > 0, np.inf, 0.0), where=error > 0)
        may &= upper_tail_of_t(t, freedom) >= level / (len(losses) - 1)
    return may


def upper_tail_of_t(t: np.ndarray, freedom: int) -> np.ndarray:
    """P(T > t) of Student's distribution for whole degrees of freedom: Abramowitz & Stegun 26.7.3 and 26.7.4."""
    angle = np.arctan(t / np.sqrt(freedom))
    is_odd = freedom % 2
    term = np.cos(angle) if is_odd else np.ones_like(angle)
    total = np.zeros_like(angle)
    for k in range(1 + is_odd, freedom, 2):
        total += term
        term = term * np.cos(angle) ** 2 * k / (k + 1)
    within = 2 / np.pi * (angle + np.sin(angle) * total) if is_odd else np.sin(angle) * total
    return (1 - within) / 2


def _standard_error(losses: np.ndarray) -> Any:
    """Of the mean over the last axis; NaN for fewer than two."""
    count = losses.shape[-1]
    return losses.std(axis=-1, ddof=1) / np.sqrt(count) if count > 1 else np.full(losses.shape[:-1], np.nan)


def _ends(tried: np.ndarray) -> tuple[float, float]:
    return float(tried.min()), float(tried.max())
