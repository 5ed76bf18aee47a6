"""The results of a sweep: those of all runs, the best setting, and the settings that may be as good."""

import dataclasses
import itertools
from typing import Any

import numpy as np

from ..plans.table import in_columns


@dataclasses.dataclass(frozen=True, eq=False)
class Best:
    """The setting with the lowest mean loss over seeds, and the settings that the seeds cannot tell from the best.

    A setting is ruled out if another one is better in a paired one-sided t-test over the seeds. Each pair is tested at
    a level of (1 - confidence) / (settings - 1). So the setting that is truly best, for infinitely many seeds, remains
    with that confidence, if the differences between settings are about normal over seeds. This is the screening of
    Nelson, Swann, Goldsman & Song 2001 (Operations Research 49) with common random numbers: every setting has the same
    seeds, so the part of the loss that depends only on the seed cancels. With one seed, nothing is ruled out.

    Attributes:
        values: the setting, by name.
        index: its position in the grid.
        mean, standard_error: the mean loss over the seeds and its error, which is NaN for one seed. The setting was
            chosen for its low mean, so the mean is too low by about its error. Report the loss on other data.
        alike: booleans of the grid's shape: which settings may be the best.
        interval: for each name, the smallest and the largest value among these.
        at_end: the names whose best value is the smallest or largest that was tried, except 0. Try values beyond it.
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
        end = "".join(f"; {name} is at the end of the tried values" for name in self.at_end)
        return f"{found}: {self.mean:.4g} ± {self.standard_error:.2g}; {alike}{end}"

    __repr__ = __str__


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Sweep:
    """The results of all runs.

    Attributes:
        values: the values that were tried, by name, as float64. The grid's axes have the same order as the names.
        seeds: the seeds, which are the axis after the grid.
        results: what `train` returned, by name ("loss" if it returned a scalar): NumPy arrays of shape
            (*grid, seeds, *shape of one run's result), or trees of these.
    """

    values: dict[str, np.ndarray]
    seeds: np.ndarray
    results: dict[str, Any]

    def best(self, name: str = "loss", *, confidence: float = 0.95) -> Best:
        """The setting with the lowest mean of the result with this name, and the settings that may be as good.

        A setting with a run that ended in NaN or infinity is neither the best nor among these.

        Raises:
            KeyError: if `train` returned no scalar with this name.
            ValueError: if no setting has finite results for all seeds, or `confidence` is not between 0 and 1.
        """
        if not 0 < confidence < 1:
            raise ValueError(
                f"Sweep.best: confidence must be between 0 and 1, got {confidence}. Write confidence=0.95."
            )
        losses = self._losses(name).reshape(-1, len(self.seeds))
        finite = np.flatnonzero(np.isfinite(losses).all(axis=1))
        if not len(finite):
            raise ValueError(f"Sweep.best: every setting has a run whose {name!r} is NaN or infinite. Try lower rates.")
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
        """A line for each setting: mean and standard error of the result with this name, and which may be the best.

        If runs ended in NaN or infinity, the mean is over the others, and the line shows how many failed.
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
            raise KeyError(f"Sweep: train returned no scalar named {name!r}. It returned the scalars {scalars}.")
        return found.astype(np.float64)

    def __repr__(self) -> str:
        axes = ", ".join(f"{name}: {len(tried)}" for name, tried in self.values.items())
        return f"Sweep({axes}, seeds: {len(self.seeds)}; results: {', '.join(self.results)})"


def may_be_best(losses: np.ndarray, level: float) -> np.ndarray:
    """The rows (settings, seeds) that no other row beats in a paired t-test, corrected for all pairs."""
    may = np.ones(len(losses), bool)
    freedom = losses.shape[1] - 1
    if freedom == 0 or len(losses) == 1:
        return may
    for other in losses:
        worse = losses - other
        mean, error = worse.mean(axis=1), _standard_error(worse)
        # If the difference is the same for all seeds, there is no doubt: t is infinite.
        t = np.divide(mean, error, out=np.where(mean > 0, np.inf, 0.0), where=error > 0)
        may &= upper_tail_of_t(t, freedom) >= level / (len(losses) - 1)
    return may


def upper_tail_of_t(t: np.ndarray, freedom: int) -> np.ndarray:
    """P(T > t) of Student's distribution for integer degrees of freedom: Abramowitz & Stegun 26.7.3 and 26.7.4."""
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
    """The standard error of the mean over the last axis; NaN for fewer than two values."""
    count = losses.shape[-1]
    return losses.std(axis=-1, ddof=1) / np.sqrt(count) if count > 1 else np.full(losses.shape[:-1], np.nan)


def _ends(tried: np.ndarray) -> tuple[float, float]:
    return float(tried.min()), float(tried.max())
