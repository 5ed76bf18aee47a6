"""Finds numbers in the state, and among the extra arguments, that scale the step of a gradient but not the decay."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ._facts import Facts
from ._probes import Arrays, Probes, weights_from
from ._rows import MOVING_AVERAGE
from ._states import Change, numbers_in, replaced

# A bound on gradients is meant to spare the decay.
_BOUND = re.compile(r"hyperparams.*(norm|clip|max|bound|threshold)")


def find_step_sizes(probes: Probes, facts: dict[int, Facts], extra_args: Mapping[str, Any]) -> dict[int, Facts]:
    """The facts with the number in the state, or in the extra arguments, that scales steps but not the decay.

    Each number that may be a step size is halved, before the first step and before the second. If that changes the
    gradient's part of the step by one factor and leaves the decay as it is, the decay is not times the step size.
    """
    found = dict(facts)
    for origin, toward in ((None, ("zero", "a tree", "")), (probes.origin, ("init", MOVING_AVERAGE))):
        those = [i for i, fact in facts.items() if fact.row.decays and fact.moves and fact.row.toward in toward]
        if those:
            for name, i in _step_sizes(probes, those, origin, extra_args):
                found[i] = found[i]._replace(step_size=found[i].step_size or name)
    return found


def _step_sizes(
    probes: Probes, those: Sequence[int], origin: Arrays | None, extra_args: Mapping[str, Any]
) -> list[tuple[str, int]]:
    """The names of step sizes that scale no decay, and the leaves."""
    zeros, gradients = probes.scaled(probes.weights, 0.0), probes.gradients
    kinds = ((1.0, zeros), (-1.0, zeros), (1.0, gradients))  # A gradient beside the positive weights only.
    plus, minus = (
        probes.first_step(weights_from(origin, probes.weights, sign), gradients, origin) for sign in (1.0, -1.0)
    )

    def parts(
        is_second: bool, change: Change = lambda state: state, probes: Probes = probes
    ) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
        """The gradient's part of the first step, or of the second, and the decay."""
        moved = []
        for factor, given in kinds:
            before = plus if factor > 0 else minus
            if is_second:
                step = probes.step(before.end(), given, change(before.after))
            else:
                step = probes.first_step(weights_from(origin, probes.weights, factor), given, origin, change)
            moved.append({i: step.total(i) for i in those})
        return {i: moved[2][i] - moved[0][i] for i in those}, {i: (moved[0][i] - moved[1][i]) / 2 for i in those}

    def scaled(i: int, factor: float) -> Change:
        return lambda state: replaced(state, [i], lambda _, leaf: factor * leaf)

    numbers = {name: i for name, i in numbers_in(plus.after, probes.tree(gradients)).items() if not _BOUND.search(name)}
    others = {
        name: probes.with_extra_args({**extra_args, name: value / 2})
        for name, value in extra_args.items()
        if isinstance(value, float)
    }
    found = []
    for is_second in (False, True) if numbers or others else ():
        old = parts(is_second)
        for name, i in numbers.items():
            shares = _shares(old, parts(is_second, scaled(i, 0.5)))
            if shares and "hyperparams" in name:  # Such as b1. A step size enters as a power of itself.
                quarter = _shares(old, parts(is_second, scaled(i, 0.25)))
                shares = {k: s for k, s in shares.items() if s < 1 and abs(quarter.get(k, 0.0) - s**2) < 0.01}
            found += [(f"state{name}", k) for k in shares]
        for name, other in others.items():
            found += [(name, k) for k in _shares(old, parts(is_second, probes=other))]
    return found


def _shares(old: Any, new: Any) -> dict[int, float]:
    """By which factor the gradient's part changed, where it did and the decay did not."""
    stays = [i for i in old[1] if abs(_share(new[1][i], old[1][i]) - 1) < 0.01]
    shares = {i: _share(new[0][i], old[0][i]) for i in stays}
    return {i: share for i, share in shares.items() if abs(share - 1) > 0.05}


def _share(part: np.ndarray, whole: np.ndarray) -> float:
    """The factor from one array to the other; NaN if there is no common one."""
    with np.errstate(all="ignore"):
        ratios = np.real(part / whole)[whole != 0]
    middle = float(np.median(ratios)) if ratios.size else np.nan
    return middle if np.allclose(ratios, middle, rtol=1e-2) else np.nan
