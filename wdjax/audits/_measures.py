"""Derives from the probes' steps how fast, where, toward what and in which way each leaf decays.

With zero gradient, the decay is the part of the step that changes sign with the weights (their distance to the anchor).
The part that does not change sign comes from the anchor. With a gradient, the odd part is computed again. If it is the
same number, the decay is in the update. If not, the decay is scaled with the gradient, or the moments remember it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ._probes import Arrays, Probes, Step, positions_of_counters, positions_of_keys, with_counters_at, with_counters_of


class Facts(NamedTuple):
    """What was measured for one leaf.

    Attributes:
        rate: the fraction of a weight that the first real step removes, as the median over the weights.
        least, most: the smallest and the largest fraction, if the step is proportional to the weight.
        rates: the same at other counts.
        beside_gradient: the same when there is a gradient.
        kind, place, toward: as in `Audited`.
        moves: whether gradients move it.
        is_raw: whether its update is its gradient.
        is_finite: whether its updates are finite.
        is_touched: whether anything moves it, gradients or not.
        grows: whether the decay makes all weights grow.
        is_repeated: whether it decays in more than one call of a step.
        rescaled: whether, beside a gradient, the decay keeps its direction but not its size.
    """

    rate: float
    least: float
    most: float
    rates: tuple[float, ...]
    beside_gradient: float
    kind: str
    place: str
    toward: str
    moves: bool
    is_raw: bool
    is_finite: bool
    is_touched: bool
    grows: bool
    is_repeated: bool
    rescaled: bool


class _Runs(NamedTuple):
    """Steps of the optimizer from different weights and states.

    Attributes:
        plus, minus, double, tiny, still: from 1, -1, 2, 1e-6 and 0 times the probe weights, with zero gradient.
        plus_grad, minus_grad: from 1 and -1 times the probe weights, with a gradient.
        second, fresh: from where `plus` ended, with zero gradient: with its state, and with a new state at its count.
        minus_second, minus_fresh, still_second, still_fresh: the same after `minus` and `still`; the last two with a
            gradient.
        foreign: from the probe weights, with zero gradient and the state of `still`.
        later: as `plus` and `minus`, at other counts.
    """

    plus: Step
    minus: Step
    double: Step
    tiny: Step
    still: Step
    plus_grad: Step
    minus_grad: Step
    second: Step
    fresh: Step
    minus_second: Step
    minus_fresh: Step
    still_second: Step
    still_fresh: Step
    foreign: Step
    later: list[tuple[Step, Step]]


def measure(probes: Probes, offset: int, calls: int, steps: tuple[int, ...]) -> dict[int, Facts]:
    """The facts of every leaf that is a number."""
    runs = _run(probes, offset, calls, steps)
    if _is_nan_without_gradient(probes, runs):
        runs = _run(probes, offset, calls, steps, nudge=probes.gradients)
        return {i: _facts(probes, runs, i, None, nudged=True) for i in probes.indices}
    facts = {i: _facts(probes, runs, i, None) for i in probes.indices}
    # Leaves that do not decay in the first step may decay later.
    for at_count in steps if runs.later else ():
        late = [i for i in facts if facts[i].kind == "none" and dict(zip(steps, facts[i].rates, strict=True))[at_count]]
        if late:
            runs = _run(probes, offset, calls, steps, at_count=at_count)
            facts |= {i: _facts(probes, runs, i, None) for i in late}
    if all(each.kind != "none" for each in facts.values()):
        return facts
    # The others do not decay to zero, but they may decay to where the optimizer was initialized. An optimizer that
    # keeps its own copy of the weights also goes back there, but by the whole distance. A decay takes a fraction.
    moved = _run(probes, offset, calls, steps, origin=probes.origin)
    for i, fact in facts.items():
        back = _facts(probes, moved, i, probes.origin)
        if fact.kind == "none" and back.kind != "none" and back.rate < 0.5:
            facts[i] = back
    return facts


def _is_nan_without_gradient(probes: Probes, runs: _Runs) -> bool:
    """Whether the optimizer divides zero by zero if all gradients are zero."""
    bare, given = ([step.total(i) for i in probes.indices] for step in (runs.plus, runs.plus_grad))
    return any(np.any(np.isnan(x)) for x in bare) and all(np.all(np.isfinite(x)) for x in given)


def _run(
    probes: Probes,
    offset: int,
    calls: int,
    steps: tuple[int, ...],
    *,
    origin: Arrays | None = None,
    nudge: Arrays | None = None,
    at_count: int | None = None,
) -> _Runs:
    """All steps. With an origin, the optimizer is initialized there and the weights are offsets from it.

    With a nudge, it replaces the zero gradient. With `at_count`, the first step is taken at that count.
    """
    zeros = probes.scaled(probes.weights, 0.0) if nudge is None else nudge
    gradients = probes.gradients if nudge is None else probes.scaled(nudge, 2.0)

    def at(factor: float) -> Arrays:
        weights = probes.scaled(probes.weights, factor)
        return weights if origin is None else _sum(weights, origin)

    def step(weights: Arrays, gradients: Arrays = zeros, to_count: Callable[[Any], Any] | None = None) -> Step:
        """The first real step from a new state."""
        state = probes.init(weights if origin is None else origin)
        if offset:
            before = probes.steps(weights, zeros, state, offset)
            weights, state = before.end(), before.after
        if to_count is None and at_count is not None:
            state = with_counters_at(state, counters, at_count)
        return probes.steps(weights, gradients, state if to_count is None else to_count(state), calls)

    counters: list[int] = []
    first = step(at(1.0))
    counters += positions_of_counters(first.before, first.after, calls)
    plus, minus, still = (step(at(factor)) for factor in (1.0, -1.0, 0.0))

    def to_second(state: Any) -> Any:
        return with_counters_of(state, plus.after, [*counters, *positions_of_keys(state)])

    def later(factor: float, count: int) -> Step:
        return step(at(factor), to_count=lambda state: with_counters_at(state, counters, count)).bare()

    return _Runs(
        plus.bare(),
        minus.bare(),
        double=step(at(2.0)).bare(),
        tiny=step(at(1e-6)).bare(),
        still=still.bare(),
        plus_grad=step(at(1.0), gradients).bare(),
        minus_grad=step(at(-1.0), gradients).bare(),
        second=probes.steps(plus.end(), zeros, plus.after, calls).bare(),
        fresh=step(plus.end(), to_count=to_second).bare(),
        minus_second=probes.steps(minus.end(), zeros, minus.after, calls).bare(),
        minus_fresh=step(minus.end(), to_count=to_second).bare(),
        still_second=probes.steps(still.end(), probes.gradients, still.after, calls).bare(),
        still_fresh=step(still.end(), probes.gradients, to_second).bare(),
        foreign=probes.steps(plus.start, zeros, still.after, calls).bare(),
        later=[(later(1.0, count), later(-1.0, count)) for count in (steps if counters else ())],
    )


def _sum(a: Arrays, b: Arrays) -> Arrays:
    return [None if x is None or y is None else x + y for x, y in zip(a, b, strict=True)]


def _facts(probes: Probes, runs: _Runs, i: int, origin: Arrays | None, *, nudged: bool = False) -> Facts:
    w = probes.weights[i]
    plus, minus, plus_grad, minus_grad = (
        step.total(i) for step in (runs.plus, runs.minus, runs.plus_grad, runs.minus_grad)
    )
    moves = nudged or not (np.array_equal(plus_grad, plus) and np.array_equal(minus_grad, minus))
    rest = {
        "moves": moves,
        "is_raw": moves and not nudged and np.allclose(plus_grad - plus, probes.gradients[i], rtol=1e-5, atol=0),
        "is_touched": bool(np.any(plus != 0) or np.any(plus_grad != 0)),
        "is_finite": bool(np.all(np.isfinite(plus_grad) & np.isfinite(plus))) and not nudged,
    }
    odd, even = (plus - minus) / 2, (plus + minus) / 2
    scale = np.abs(w) + (0 if origin is None else np.abs(origin[i]))
    later = tuple(_late_rate(pair, i, w, 8 * probes.eps * scale) for pair in runs.later)
    if w.size == 0 or not np.all(np.isfinite(plus)) or _is_noise(odd, w, 8 * probes.eps * scale):
        return Facts(
            0.0, 0.0, 0.0, later, 0.0, "none", "none", "", **rest, grows=False, is_repeated=False, rescaled=False
        )
    beside = (plus_grad - minus_grad) / 2
    kind = _kind(odd, runs.double.total(i) - even, w)
    noise = 64 * probes.eps * (np.abs(plus_grad) + scale) + 2 * probes.update_eps * np.abs(plus_grad)
    place, rescaled = "update", False
    if kind != "L2" and _lands_on_zero(runs.tiny, i):
        place = "weights"
    elif not nudged and _is_remembered(runs, i, 64 * probes.eps * scale):
        place = "gradient"
    elif not _same(beside - _along(beside - odd, (plus_grad + minus_grad) / 2), odd, noise, probes.tolerance):
        if _same(2 * beside, odd, 2 * noise, probes.tolerance):
            kind = f"cautious {kind}"
        else:
            place, rescaled = "gradient", _cosine(beside, odd) > 0.9
    is_odd = nudged or _same(even, 0 * even, 1e-3 * np.abs(odd) + 8 * probes.eps * scale)
    if not is_odd and place == "update" and kind == "L2" and origin is None:  # An anchor stays, but noise changes.
        is_odd = not _same(runs.second.total(i) - odd / w * runs.plus.end()[i], even, 64 * probes.eps * scale, 0.05)
    toward = "init" if origin is not None else "zero" if is_odd else "a tree" if kind.endswith("L2") else ""
    rate, ratios = _rate(odd, w), -np.real(odd / w)
    least, most = (np.min(ratios), np.max(ratios)) if kind.endswith("L2") else (rate, rate)
    return Facts(
        rate,
        float(least),
        float(most),
        later,
        _rate(beside, w, mean=True),
        kind,
        place,
        toward,
        **rest,
        grows=bool(np.all(ratios <= 0)),
        is_repeated=not nudged and sum(bool(np.any(call[i] != 0)) for call in runs.plus.moved) > 1,
        rescaled=rescaled,
    )


def _is_remembered(runs: _Runs, i: int, noise: Any) -> bool:
    """Whether a decay comes back in the next step, so that a state that saw it steps differently from a new one."""
    # An optimizer with its own copy of the weights goes all the way back to it from anywhere. That is not a memory.
    own = _rate(runs.foreign.total(i), runs.plus.start[i] - runs.still.start[i])
    if 0.5 < own < 1.5:
        return False
    second = (runs.second.total(i) - runs.minus_second.total(i)) / 2
    fresh = (runs.fresh.total(i) - runs.minus_fresh.total(i)) / 2
    if not np.all(np.isfinite(second)):
        return False
    # If the step size itself changed, steps with a gradient change by the same ratio.
    moved, moved_fresh = runs.still_second.total(i), runs.still_fresh.total(i)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = moved / moved_fresh
    ratio = np.median(ratios[np.isfinite(ratios)]) if np.any(np.isfinite(ratios)) else 1.0
    # A real memory brings back a tenth or more. Estimated step sizes drift by less.
    return not (_same(second, fresh, noise, 0.05) or _same(second, ratio * fresh, noise, 0.05))


def _lands_on_zero(tiny: Step, i: int) -> bool:
    """Whether weights next to zero, if they move at all, move exactly to zero."""
    moved = tiny.total(i)
    return bool(np.any(moved) and np.all((moved == 0) | (moved == -tiny.start[i])))


def _late_rate(pair: tuple[Step, Step], i: int, w: np.ndarray, rounding: np.ndarray) -> float:
    odd = (pair[0].total(i) - pair[1].total(i)) / 2
    return 0.0 if w.size == 0 or _is_noise(odd, w, rounding) else _rate(odd, w)


def _rate(moved: np.ndarray, weights: np.ndarray, *, mean: bool = False) -> float:
    if mean:
        return -float(np.real(np.vdot(weights, moved))) / float(np.real(np.vdot(weights, weights)))
    return float(np.median(-np.real(moved / weights)))


def _along(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The part of `a` along `b`. If the size of the gradient's step depends on the weights, that is not a decay."""
    size = float(np.real(np.vdot(b, b)))
    share = float(np.real(np.vdot(b, a))) / size if size else 0.0
    # With few elements, any two arrays are nearly parallel.
    return share * b if b.size > 4 or abs(share) < 0.5 else np.zeros_like(b)


def _same(a: np.ndarray, b: np.ndarray, noise: Any, tolerance: float = 2e-3) -> bool:
    return bool(np.all(np.abs(a - b) <= tolerance * np.minimum(np.abs(a), np.abs(b)) + noise))


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    norms = np.linalg.norm(a.ravel()) * np.linalg.norm(b.ravel())
    return float(np.real(np.vdot(a, b)) / norms) if norms else 0.0


def _is_noise(odd: np.ndarray, w: np.ndarray, rounding: np.ndarray) -> bool:
    """Whether this is zero, or only the rounding of updates that are differences of weights."""
    if not np.any(odd):
        return True
    ratios = odd / w
    is_spread = np.std(ratios) > 0.1 * np.abs(np.mean(ratios))
    return bool(is_spread and np.all(np.abs(odd) <= rounding))


def _kind(odd: np.ndarray, double: np.ndarray, w: np.ndarray) -> str:
    """The kind of decay, by how it grows when the weights are doubled."""
    turned = odd / w
    is_real = bool(np.all(np.abs(np.imag(turned)) <= 1e-3 * np.abs(turned)))
    with np.errstate(divide="ignore", invalid="ignore"):
        growth = np.where(odd == 0, np.nan, np.abs(double) / np.abs(odd))
    growth = growth[np.isfinite(growth)]
    linear, constant = np.abs(growth - 2) < 0.02, np.abs(growth - 1) < 0.02
    if growth.size == 0 or not is_real:
        return "other"
    if np.all(linear):
        return "L2"
    if np.all(constant):
        sizes = np.abs(odd)
        return "L1" if sizes.min() >= 0.98 * sizes.max() else "norm"
    between = (growth > 0.98) & (growth < 2.02)
    return "Huber" if linear.any() and constant.any() and between.all() else "other"
