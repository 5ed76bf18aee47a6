"""Derives from the probes' steps how fast, where, toward what and in which way each leaf decays.

With zero gradient, the decay is the part of the step that changes sign with the weights (their distance to the anchor).
The part that does not change sign comes from the anchor. With a gradient, the odd part is computed again. If it is the
same number, the decay is in the update. If not, the decay is scaled with the gradient, or the moments remember it.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ._probes import Arrays, Change, Probes, Step, counters_of, numbers_in, positions_of_keys, replaced
from ._report import GRADIENT_AND_UPDATE, Audited

_STRONG = 100.0  # Gradients beside which a decay is so small that the moments respond to it in proportion.
_BOUND = re.compile(
    r"hyperparams.*(norm|clip|max|bound|threshold)"
)  # A bound on gradients is meant to spare the decay.


class Facts(NamedTuple):
    """What is known about one leaf. The last facts, from the tolerance on, do not come from measurements of it."""

    row: Audited
    moves: bool  # Whether gradients move it.
    is_raw: bool  # Whether its update is its gradient.
    is_finite: bool  # Whether its updates are finite.
    is_touched: bool  # Whether anything moves it, gradients or not.
    grows: bool = False  # Whether the decay makes all weights grow.
    is_repeated: bool = False  # Whether it decays in more than one call of a step.
    rescaled: bool = False  # Whether, beside a gradient, the decay keeps its direction but not its size.
    is_proportional: bool = False  # Whether the first step takes the same fraction of all weights.
    later: tuple["Later", ...] = ()  # Steps at the tested counts, and at those that follow.
    lapse: str = ""  # In which way the decay pauses while gradients still move the leaf; a finding's name.
    strength: float = 0.0  # The factor of L2 in the gradient, where a decay in the update acts too.
    step_size: str = ""  # A number in the state that scales the step of the gradient, but not the decay.
    tolerance: float = 0.0  # By how much rates may differ, relatively.
    expected: tuple[float, float] | None = None  # The smallest and the largest expected rate, if one was given.
    expected_later: Mapping[int, float] = {}  # The expected rates by count, if a schedule was given.
    should_decay: bool | None = None  # The mask that was given.
    is_frozen: bool = False  # Whether the user says that it is frozen.


class Later(NamedTuple):
    """The decay of one leaf in a step from a new state whose counters were set."""

    at: int  # The count.
    after: int  # 0 for the step at this count, 1 for the next one.
    rate: float
    moved: float  # The size of the gradient's part of the step.


class Runs(NamedTuple):
    """Steps by name, and for counts: the count, 0 or 1 for the step after it, and "plus", "minus" and "plus_grad"."""

    steps: dict[str, Step]
    later: Sequence[tuple[int, int, Step, Step, Step]]


def measure(probes: Probes, counts: Sequence[int]) -> dict[int, Facts]:
    """The facts of every leaf that is a number."""
    runs = _run(probes, counts)
    bare, given = ([runs.steps[name].total(i) for i in probes.indices] for name in ("plus", "plus_grad"))
    # Some optimizers divide zero by zero if all gradients are zero.
    if any(np.any(np.isnan(x)) for x in bare) and all(np.all(np.isfinite(x)) for x in given):
        runs = _run(probes, counts, nudge=probes.gradients)
        return {i: _facts(probes, runs, i, nudged=True) for i in probes.indices}
    facts = {i: _facts(probes, runs, i) for i in probes.indices}
    # Leaves that do not decay in the first step may decay later.
    for place, (count, after, *_) in enumerate(runs.later):
        if late := [i for i, fact in facts.items() if not fact.row.decays and fact.later[place].rate]:
            runs = _run(probes, counts, at_count=(count, after))
            facts |= {i: _facts(probes, runs, i) for i in late}
    if all(fact.row.decays for fact in facts.values()):
        return facts
    # The others do not decay to zero, but they may decay to where the optimizer was initialized. An optimizer that
    # keeps its own copy of the weights also goes back there, but by the whole distance. A decay takes a fraction.
    zeros, origin = probes.scaled(probes.weights, 0.0), probes.origin
    ends = [probes.first_step(_from(origin, probes.weights, sign), zeros, origin) for sign in (1.0, -1.0)]
    if not any(np.any(ends[0].total(i) != ends[1].total(i)) for i, fact in facts.items() if not fact.row.decays):
        return facts
    moved = _run(probes, counts, origin=origin)
    for i, fact in facts.items():
        back = _facts(probes, moved, i, origin)
        if not fact.row.decays and back.row.decays and back.row.rate < 0.5:
            facts[i] = back
    return facts


def _from(origin: Arrays | None, weights: Arrays, factor: float) -> Arrays:
    """Weights times a factor, as offsets from the origin if there is one."""
    return {i: factor * w if origin is None else origin[i] + factor * w for i, w in weights.items()}


def _run(
    probes: Probes,
    counts: Sequence[int],
    *,
    origin: Any = None,
    nudge: Any = None,
    at_count: tuple[int, int] | None = None,
) -> Runs:
    """Steps of the optimizer from different weights and states, by name; and counts, with steps at and after each.

    "plus", "minus", "double", "tiny" and "still" start at 1, -1, 2, 1e-6 and 0 times the probe weights, with zero
    gradient; "plus_grad" and "minus_grad" as the first two, with a gradient. "plus_second" starts where "plus" ended,
    and "plus_fresh" there too, with a new state at its count; the same after "minus", and after "still" with a
    gradient. "foreign" starts at the probe weights with the state of "still".

    With an origin, the optimizer is initialized there and the weights are offsets from it. With a nudge, it replaces
    the zero gradient. With `at_count`, the first step is taken at that count.
    """
    zeros = probes.scaled(probes.weights, 0.0) if nudge is None else nudge
    gradients = probes.gradients if nudge is None else probes.scaled(nudge, 2.0)
    counters: dict[int, tuple[int, int]] = {}

    def to(count: int, after: int) -> Change:
        def value(i: int, leaf: Any) -> Any:
            start, added = counters[i]
            asked = count + after * added
            # What counts calls, several in each step, must be where a step begins.
            return jnp.asarray(asked - (asked - start) % added, leaf.dtype)

        return lambda state: replaced(state, counters, value)

    def step(factor: float, gradients: Arrays = zeros, change: Change | None = None) -> Step:
        return step_from(_from(origin, probes.weights, factor), gradients, change)

    def step_from(weights: Arrays, gradients: Arrays, change: Change | None = None) -> Step:
        start = to(*at_count) if at_count and counters else lambda state: state
        return probes.first_step(weights, gradients, origin, change or start, zeros)

    first = step(1.0)  # It shows the counters, so it is not yet at a count.
    counters |= counters_of(first.before, first.after, probes.calls)
    plus, minus, still = first if at_count is None else step(1.0), step(-1.0), step(0.0)
    counts_of_second = jax.tree.leaves(plus.after)

    def to_second(state: Any) -> Any:
        return replaced(state, [*counters, *positions_of_keys(state)], lambda i, _: counts_of_second[i])

    steps = {"plus": plus.bare(), "minus": minus.bare(), "still": still.bare()}
    steps |= {"double": step(2.0).bare(), "tiny": step(1e-6).bare()}
    steps |= {"plus_grad": step(1.0, gradients).bare(), "minus_grad": step(-1.0, gradients).bare()}
    for name, one, given in (("plus", plus, zeros), ("minus", minus, zeros), ("still", still, probes.gradients)):
        steps[f"{name}_second"] = probes.step(one.end(), given, one.after).bare()
        steps[f"{name}_fresh"] = step_from(one.end(), given, to_second).bare()
    steps["foreign"] = probes.step(plus.start, zeros, still.after).bare()
    later = []
    for count, after in [(count, after) for count in (counts if counters else ()) for after in (0, 1)]:
        there = to(count, after)
        three = step(1.0, zeros, there), step(-1.0, zeros, there), step(1.0, gradients, there)
        later.append((count, after, three[0].bare(), three[1].bare(), three[2].bare()))
    return Runs(steps, later)


def _facts(probes: Probes, runs: Runs, i: int, origin: Arrays | None = None, *, nudged: bool = False) -> Facts:
    leaf, steps = probes.leaves[i], runs.steps
    w = (steps["plus"].start[i] - steps["minus"].start[i]) / 2  # Calls before the first step may have moved them.
    total = {name: step.total(i) for name, step in steps.items()}
    plus, minus, plus_grad, minus_grad = (total[name] for name in ("plus", "minus", "plus_grad", "minus_grad"))
    odd, even, beside = (plus - minus) / 2, (plus + minus) / 2, (plus_grad - minus_grad) / 2
    scale = np.abs(w) + (0 if origin is None else np.abs(origin[i]))
    rounding = 8 * probes.eps * scale
    moves = nudged or i in probes.moved or not (np.array_equal(plus_grad, plus) and np.array_equal(minus_grad, minus))
    later = []
    for count, after, one, other, given in runs.later:
        part, by_gradient = (one.total(i) - other.total(i)) / 2, given.total(i) - one.total(i)
        rate = 0.0 if _is_noise(part, w, rounding) else _rate(part, w)
        later.append(Later(count, after, rate, float(np.linalg.norm(by_gradient))))
    rates = tuple((one.at, one.rate) for one in later if not one.after)
    facts = Facts(
        Audited(leaf.path, leaf.shape, np.dtype(leaf.dtype).name, rates=rates),
        later=tuple(later),
        moves=moves,
        is_raw=moves and not nudged and np.allclose(plus_grad - plus, probes.gradients[i], rtol=1e-5, atol=0),
        is_finite=bool(np.all(np.isfinite(plus_grad) & np.isfinite(plus))) and not nudged,
        is_touched=bool(np.any(plus != 0) or np.any(plus_grad != 0)),
    )
    if not np.all(np.isfinite(plus)) or _is_noise(odd, w, rounding):
        return facts
    kind = _kind(odd, total["double"] - even, w)
    noise = 64 * probes.eps * (np.abs(plus_grad) + scale) + 2 * probes.update_eps * np.abs(plus_grad)
    place, rescaled = "update", False
    start, tiny = {name: step.start[i] for name, step in steps.items()}, total["tiny"]
    # Weights next to zero, if they move at all, move exactly to zero.
    if kind != "L2" and np.any(tiny) and np.all((tiny == 0) | (tiny == -start["tiny"])):
        place = "weights"
    elif not nudged and _is_remembered(total, start, 8 * rounding):
        place = "gradient"
    elif not _same(beside - _along(beside - odd, (plus_grad + minus_grad) / 2), odd, noise, probes.tolerance):
        if _same(2 * beside, odd, 2 * noise, probes.tolerance):
            kind = f"cautious {kind}"
        else:
            sizes = float(np.linalg.norm(beside) * np.linalg.norm(odd))
            place, rescaled = "gradient", float(np.real(np.vdot(beside, odd))) > 0.9 * sizes
    is_odd = nudged or _same(even, 0 * even, 1e-3 * np.abs(odd) + rounding)
    if not is_odd and place == "update" and kind == "L2" and origin is None:  # An anchor stays, but noise changes.
        is_odd = not _same(total["plus_second"] - odd / w * (start["plus"] + plus), even, 8 * rounding, 0.05)
    rate, ratios = _rate(odd, w), 0.0 - np.real(odd / w)
    lapse = _lapse(later)
    if not lapse and kind == "L2" and rate < 0.9:  # An optimizer without a count may still pause.
        second = (total["plus_second"] - total["minus_second"]) / 2
        lapse = _PAUSES if np.all(np.abs(second) <= rounding) and np.any(total["still_second"]) else ""
    row = facts.row._replace(
        rate=rate,
        least=float(np.min(ratios)) if kind.endswith("L2") else rate,
        most=float(np.max(ratios)) if kind.endswith("L2") else rate,
        beside_gradient=-float(np.real(np.vdot(w, beside))) / float(np.real(np.vdot(w, w))),
        place=place,
        kind=kind,
        toward="init" if origin is not None else "zero" if is_odd else "a tree" if kind.endswith("L2") else "",
    )
    return facts._replace(
        row=row,
        grows=bool(np.all(ratios <= 0) or (kind == "L2" and np.any(-ratios * np.abs(w) > rounding))),
        is_proportional=kind == "L2" and float(np.std(ratios)) <= 1e-2 * abs(rate),
        lapse=lapse,
        is_repeated=not nudged and sum(bool(np.any(call[i] != 0)) for call in steps["plus"].moved) > 1,
        rescaled=rescaled,
    )


_STOPS, _STARTS, _PAUSES = LAPSES = ("stops", "starts late", "not in every step")


def _lapse(later: Sequence[Later]) -> str:
    """How the decay pauses in these steps while gradients still move the leaf; "" if it does not."""
    rate, moved = (max((abs(getattr(one, name)) for one in later), default=0.0) for name in ("rate", "moved"))
    acts = [abs(one.rate) / rate > 1e-3 * one.moved / moved for one in later if rate and one.moved > 1e-2 * moved]
    if all(acts) or not any(acts):
        return ""
    if not any(acts[-2:]):
        return _STOPS
    if acts != sorted(acts):
        return _PAUSES
    return "" if acts[1] else _STARTS  # A rate that warms up from 0 is 0 in the first step alone.


def look_behind_the_moments(probes: Probes, facts: dict[int, Facts]) -> dict[int, Facts]:
    """The facts with the kind of a decay that moments have rescaled, and with a decay in the update beside it.

    Beside strong gradients, moments respond to a penalty's gradient in proportion. So two steps show it: in the first,
    weights of both signs or gradients moved by +w and -w; in the second, the same weights, so that only the memory of
    the first differs. Where the optimizer has no memory, the first step must do.
    """
    zeros, weights, found = probes.scaled(probes.weights, 0.0), probes.weights, dict(facts)
    strong = {i: _STRONG * np.sign(gradient) for i, gradient in probes.gradients.items()}
    starts = {"plus": (1, 0), "minus": (-1, 0), "double": (2, 0), "up": (1, 1), "down": (1, -1)}
    for origin, toward in ((None, ("zero", "a tree", "")), (probes.origin, ("init",))):
        those = [i for i, fact in facts.items() if fact.row.place == "gradient" and fact.row.toward in toward]
        those = [i for i in those if not (facts[i].rescaled and facts[i].is_proportional)]
        if not those:
            continue
        first, second = {}, {}
        for name, (factor, shift) in starts.items():
            given = {i: gradient + shift * weights[i] for i, gradient in strong.items()}
            first[name] = probes.first_step(_from(origin, weights, factor), given, origin)
            second[name] = probes.step(first["plus"].end(), zeros, first[name].after).bare()
            if name != "plus":
                first[name] = first[name].bare()
        for i in those:
            found[i] = _behind_the_moments(probes, facts[i], i, first, second)
    return found


def _behind_the_moments(probes: Probes, fact: Facts, i: int, first: Any, second: Any) -> Facts:
    w = probes.weights[i]

    def halves(steps: dict[str, Step]) -> tuple[np.ndarray, ...]:
        plus, minus, double, up, down = (step.total(i) for step in steps.values())
        odd, noise = (plus - minus) / 2, 64 * probes.eps * np.abs(plus)
        return np.where(np.abs(odd) > noise, odd, 0.0), double - (plus + minus) / 2, (up - down) / 2

    direct, remembered = halves(first), halves(second)
    odd, _, response = direct
    size = np.abs(first["plus"].total(i))
    is_direct, has_memory = np.all(np.abs(response) > 1e-6 * size), bool(np.any(remembered[0]))
    with np.errstate(all="ignore"):
        part, double, beside = direct if is_direct else remembered
        penalty, penalty_double = part / beside * w, double / beside * w
        strengths = np.real(remembered[0] / remembered[2])
        strength = float(np.median(strengths)) if np.std(strengths) <= 1e-2 * np.abs(np.mean(strengths)) else 0.0
    is_known = np.any(part) and np.all(np.isfinite(penalty) & np.isfinite(penalty_double))
    kind = fact.row.kind if fact.row.kind == "L2" else _kind(penalty, penalty_double, w) if is_known else "unknown"
    row = fact.row._replace(kind=kind)
    # A decay in the update is the part of the first step that the penalty does not explain.
    rest = odd - strength * response
    in_update = _rate(rest, w)
    is_seen = np.all(np.abs(rest) > 1e-3 * np.abs(odd) + 1e3 * probes.eps * size)
    can_tell = strength > 0 if has_memory else not np.any(response)
    if can_tell and is_seen and np.std(rest / w) <= 1e-2 * in_update:
        return fact._replace(row=row._replace(place=GRADIENT_AND_UPDATE, in_update=in_update), strength=strength)
    return fact._replace(row=row)


def find_step_sizes(probes: Probes, facts: dict[int, Facts], extra_args: Mapping[str, Any]) -> dict[int, Facts]:
    """The facts with the number in the state, or in the extra arguments, that scales steps but not the decay.

    Each number that may be a step size is halved, before the first step and before the second. If that changes the
    gradient's part of the step by one factor and leaves the decay as it is, the decay is not times the step size.
    """
    found = dict(facts)
    for origin, toward in ((None, ("zero", "a tree", "")), (probes.origin, ("init",))):
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
    plus, minus = (probes.first_step(_from(origin, probes.weights, sign), gradients, origin) for sign in (1.0, -1.0))

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
                step = probes.first_step(_from(origin, probes.weights, factor), given, origin, change)
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


def _is_remembered(total: dict[str, np.ndarray], start: dict[str, np.ndarray], noise: Any) -> bool:
    """Whether a decay comes back in the next step, so that a state that saw it steps differently from a new one."""
    second, fresh = ((total[f"plus_{name}"] - total[f"minus_{name}"]) / 2 for name in ("second", "fresh"))
    weights = [start[f"plus_{name}"] - start[f"minus_{name}"] for name in ("second", "fresh")]
    fresh = fresh * np.divide(*weights, out=np.ones_like(fresh), where=weights[1] != 0)
    # An optimizer with its own copy of the weights goes all the way back to it from anywhere. That is not a memory.
    if 0.5 < _rate(total["foreign"], start["plus"] - start["still"]) < 1.5 or not np.all(np.isfinite(second)):
        return False
    if np.all(np.abs(second) <= noise):  # The decay pauses.
        return False
    # If the step size itself changed, steps with a gradient change by the same ratio.
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = total["still_second"] / total["still_fresh"]
    ratio = np.median(ratios[np.isfinite(ratios)]) if np.any(np.isfinite(ratios)) else 1.0
    # A real memory brings back a tenth or more. Estimated step sizes drift by less.
    return not (_same(second, fresh, noise, 0.05) or _same(second, ratio * fresh, noise, 0.05))


def _rate(moved: np.ndarray, weights: np.ndarray) -> float:
    """The fraction by which weights move, the median of those that do: only some rows may decay."""
    moves = moved != 0
    return float(np.median(-np.real(moved[moves] / weights[moves]))) if np.any(moves) else 0.0


def _along(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The part of `a` along `b`. If the size of the gradient's step depends on the weights, that is not a decay."""
    size = float(np.real(np.vdot(b, b)))
    share = float(np.real(np.vdot(b, a))) / size if size else 0.0
    # With few elements, any two arrays are nearly parallel.
    return share * b if b.size > 4 or abs(share) < 0.5 else np.zeros_like(b)


def _same(a: np.ndarray, b: np.ndarray, noise: Any, tolerance: float = 2e-3) -> bool:
    return bool(np.all(np.abs(a - b) <= tolerance * np.minimum(np.abs(a), np.abs(b)) + noise))


def _is_noise(odd: np.ndarray, w: np.ndarray, rounding: np.ndarray) -> bool:
    """Whether this is zero, or only the rounding of updates that are differences of weights."""
    if not np.any(odd):
        return True
    is_spread = np.std(odd / w) > 0.1 * np.abs(np.mean(odd / w))
    return bool(is_spread and np.all(np.abs(odd) <= rounding))


def _kind(odd: np.ndarray, double: np.ndarray, w: np.ndarray) -> str:
    """The kind of decay, by how it grows when the weights are doubled."""
    is_real = np.all(np.abs(np.imag(odd / w)) <= 1e-3 * np.abs(odd / w))
    with np.errstate(divide="ignore", invalid="ignore"):
        growth = np.where(odd == 0, np.nan, np.abs(double) / np.abs(odd))
    growth = growth[np.isfinite(growth)]
    linear, constant = np.abs(growth - 2) < 0.02, np.abs(growth - 1) < 0.02
    if growth.size == 0 or not is_real:
        return "other"
    if np.all(linear):
        return "L2"
    if np.all(constant):
        return "L1" if np.min(np.abs(odd[odd != 0])) >= 0.98 * np.max(np.abs(odd)) else "norm"
    between = (growth > 0.98) & (growth < 2.02)
    return "Huber" if linear.any() and constant.any() and between.all() else "other"
