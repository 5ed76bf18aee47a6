"""The results of a sweep: those of all runs, the best setting, and the settings that may be as good."""

import dataclasses
import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..plans.table import in_columns


@dataclasses.dataclass(frozen=True, eq=False)
class Best:
    """The setting with the lowest mean loss over seeds, and the settings that the seeds cannot tell from the best.

    A setting is ruled out if another one is better in a paired one-sided t-test over the seeds, at a level of
    (1 - confidence) / (settings - 1). So the truly best setting remains with that confidence, if the differences
    between settings are about normal over seeds: the screening of Nelson, Swann, Goldsman & Song 2001 (Operations
    Research 49). All settings have the same seeds, so what depends only on the seed cancels.

    Attributes:
        values: the setting, by name.
        index: its position in the grid.
        mean, standard_error: the mean loss over the seeds and its error, which is NaN for one seed. The setting was
            chosen for its low mean, so the mean is too low by about its error. Report the loss on other data.
        alike: booleans of the grid's shape: which settings may be the best.
        interval: for each name, the smallest and the largest value among these.
        at_end: the names whose best value is the smallest or largest that was tried, except 0. Try values beyond it.

    Example:

        >>> import wdjax
        >>> found = wdjax.sweep(lambda key, weight_decay: (weight_decay - 1.0) ** 2, weight_decay=[0.0, 0.5, 1.0])
        >>> best = found.best()
        >>> best.values, best.mean, best.at_end
        ({'weight_decay': 1.0}, 0.0, ('weight_decay',))
    """

    values: dict[str, float]
    index: tuple[int, ...]
    mean: float
    standard_error: float
    alike: np.ndarray
    interval: dict[str, tuple[float, float]]
    at_end: tuple[str, ...]

    def __str__(self) -> str:
        ranges = {name: f"between {least:.4g} and {most:.4g}" for name, (least, most) in self.interval.items()}
        found = ", ".join(f"{name} = {value:.4g} ({ranges[name]})" for name, value in self.values.items())
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

    Example:

        >>> import wdjax
        >>> found = wdjax.sweep(lambda key, weight_decay: (weight_decay - 1.0) ** 2, weight_decay=[0.0, 0.5, 1.0])
        >>> found
        Sweep(weight_decay: 3, seeds: 1; results: loss)
        >>> found.results["loss"][:, 0].tolist()
        [1.0, 0.25, 0.0]
    """

    values: dict[str, np.ndarray]
    seeds: np.ndarray
    results: dict[str, Any]

    def best(self, name: str = "loss", *, confidence: float = 0.95) -> Best:
        """The setting with the lowest mean of the result with this name, and the settings that may be as good.

        A setting with a run that ended in NaN or infinity is neither the best nor among these.

        Returns: a `sweeps.Best`.
        Raises: KeyError if `train` returned no scalar with this name; TypeError if it is complex; ValueError if no
                setting has finite results for all seeds, or if `confidence` is not between 0 and 1.
        """
        if not 0 < confidence < 1:
            raise ValueError(f"Sweep.best: confidence must be in (0, 1), got {confidence}. Write confidence=0.95.")
        losses = self._losses(name)
        finite = np.flatnonzero(np.isfinite(losses).all(axis=1))
        if not len(finite):
            raise ValueError(f"Sweep.best: every setting has a run whose {name!r} is NaN or infinite. Try lower rates.")
        row = finite[losses[finite].mean(axis=1).argmin()]
        index = tuple(map(int, np.unravel_index(row, self._grid)))
        alike = np.zeros(self._grid, bool)
        alike.flat[finite] = _may_be_best(losses[finite], 1 - confidence)
        values = {name: float(tried[i]) for (name, tried), i in zip(self.values.items(), index, strict=True)}
        among = {name: self.values[name][i] for name, i in zip(self.values, alike.nonzero(), strict=True)}
        ends = {name: (tried.min(), tried.max()) for name, tried in self.values.items() if tried.size > 1}
        return Best(
            values,
            index,
            mean=float(losses[row].mean()),
            standard_error=float(_standard_error(losses[row])),
            alike=alike,
            interval={name: (float(some.min()), float(some.max())) for name, some in among.items()},
            at_end=tuple(name for name in ends if values[name] and values[name] in ends[name]),
        )

    def table(self, name: str = "loss") -> str:
        """A line for each setting: mean and standard error of the result with this name, and which may be the best.

        If runs ended in NaN or infinity, the mean is over the others, and the line shows how many failed.

        Raises: KeyError if `train` returned no scalar with this name; TypeError if it is complex.
        """
        losses = self._losses(name)
        best = self.best(name) if np.isfinite(losses).all(axis=1).any() else None
        rows = []
        for i, (setting, row) in enumerate(zip(itertools.product(*self.values.values()), losses, strict=True)):
            finite = row[np.isfinite(row)]
            mark = f"{len(row) - len(finite)} of {len(row)} failed" if len(finite) < len(row) else ""
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
        """The result with this name: a row for each setting, a column for each seed."""
        shape = (*self._grid, len(self.seeds))
        scalars = [n for n, found in self.results.items() if isinstance(found, np.ndarray) and found.shape == shape]
        if name not in scalars:
            raise KeyError(f"Sweep: train returned no scalar named {name!r}. It returned the scalars {scalars}.")
        check_real("Sweep", name, self.results[name])
        return self.results[name].reshape(-1, len(self.seeds)).astype(np.float64)

    def __repr__(self) -> str:
        axes = ", ".join(f"{name}: {len(tried)}" for name, tried in self.values.items())
        return f"Sweep({axes}, seeds: {len(self.seeds)}; results: {', '.join(self.results)})"


def check_real(where: str, name: str, result: Any) -> None:
    """Raises an error if a result to compare is complex: only its real part would be compared."""
    if isinstance(result, complex) or jnp.issubdtype(getattr(result, "dtype", bool), jnp.complexfloating):
        raise TypeError(
            f"{where}: {name!r} is complex, and complex numbers have no order, so none is the lowest. Return its "
            f'modulus or its real part from train: {{"{name}": abs({name})}}.'
        )


def _may_be_best(losses: np.ndarray, level: float) -> np.ndarray:
    """The rows (settings, seeds) that no other row beats in a paired t-test, corrected for all pairs."""
    from scipy import special

    may = np.ones(len(losses), bool)
    freedom = losses.shape[1] - 1
    if freedom == 0 or len(losses) == 1:
        return may
    for other in losses:
        worse = losses - other
        mean, error = worse.mean(axis=1), _standard_error(worse)
        # If the difference is the same for all seeds, there is no doubt: t is infinite.
        t = np.divide(mean, error, out=np.where(mean > 0, np.inf, 0.0), where=error > 0)
        may &= special.stdtr(freedom, -t) >= level / (len(losses) - 1)
    return may


def _standard_error(losses: np.ndarray) -> Any:
    """The standard error of the mean over the last axis; NaN for fewer than two values."""
    count = losses.shape[-1]
    return losses.std(axis=-1, ddof=1) / np.sqrt(count) if count > 1 else np.full(losses.shape[:-1], np.nan)
