"""Derives from the probes' steps how fast, where, toward what and in which way each leaf decays.

With zero gradient, the decay is the part of the step that changes sign with the weights (their distance to the anchor).
The part that does not change sign comes from the anchor. With a gradient, the odd part is computed again. If it is the
same number, the decay is in the update. If not, the decay is scaled with the gradient, or the moments remember it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ._facts import PAUSES, Facts, Later, lapse_of
from ._moves import along, is_noise, kind_of, rate_of, same
from ._probes import Arrays, Probes, Step, weights_from
from ._rows import Audited
from ._states import Change, counters_of, positions_of_keys, replaced


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
    ends = [probes.first_step(weights_from(origin, probes.weights, sign), zeros, origin) for sign in (1.0, -1.0)]
    if not any(np.any(ends[0].total(i) != ends[1].total(i)) for i, fact in facts.items() if not fact.row.decays):
        return facts
    moved = _run(probes, counts, origin=origin)
    for i, fact in facts.items():
        back = _facts(probes, moved, i, origin)
        if not fact.row.decays and back.row.decays and back.row.rate < 0.5:
            facts[i] = back
    return facts


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
        return step_from(weights_from(origin, probes.weights, factor), gradients, change)

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
        rate = 0.0 if is_noise(part, w, rounding) else rate_of(part, w)
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
    if not np.all(np.isfinite(plus)) or is_noise(odd, w, rounding):
        return facts
    kind = kind_of(odd, total["double"] - even, w)
    noise = 64 * probes.eps * (np.abs(plus_grad) + scale) + 2 * probes.update_eps * np.abs(plus_grad)
    place, rescaled = "update", False
    start, tiny = {name: step.start[i] for name, step in steps.items()}, total["tiny"]
    # Weights next to zero, if they move at all, move exactly to zero.
    if kind != "L2" and np.any(tiny) and np.all((tiny == 0) | (tiny == -start["tiny"])):
        place = "weights"
    elif not nudged and _is_remembered(total, start, 8 * rounding):
        place = "gradient"
    elif not same(beside - along(beside - odd, (plus_grad + minus_grad) / 2), odd, noise, probes.tolerance):
        if same(2 * beside, odd, 2 * noise, probes.tolerance):
            kind = f"cautious {kind}"
        else:
            sizes = float(np.linalg.norm(beside) * np.linalg.norm(odd))
            place, rescaled = "gradient", float(np.real(np.vdot(beside, odd))) > 0.9 * sizes
    is_odd = nudged or same(even, 0 * even, 1e-3 * np.abs(odd) + rounding)
    if not is_odd and place == "update" and kind == "L2" and origin is None:  # An anchor stays, but noise changes.
        is_odd = not same(total["plus_second"] - odd / w * (start["plus"] + plus), even, 8 * rounding, 0.05)
    rate, ratios = rate_of(odd, w), 0.0 - np.real(odd / w)
    lapse = lapse_of(later)
    if not lapse and kind == "L2" and rate < 0.9:  # An optimizer without a count may still pause.
        second = (total["plus_second"] - total["minus_second"]) / 2
        lapse = PAUSES if np.all(np.abs(second) <= rounding) and np.any(total["still_second"]) else ""
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


def _is_remembered(total: dict[str, np.ndarray], start: dict[str, np.ndarray], noise: Any) -> bool:
    """Whether a decay comes back in the next step, so that a state that saw it steps differently from a new one."""
    second, fresh = ((total[f"plus_{name}"] - total[f"minus_{name}"]) / 2 for name in ("second", "fresh"))
    weights = [start[f"plus_{name}"] - start[f"minus_{name}"] for name in ("second", "fresh")]
    fresh = fresh * np.divide(*weights, out=np.ones_like(fresh), where=weights[1] != 0)
    # An optimizer with its own copy of the weights goes all the way back to it from anywhere. That is not a memory.
    if 0.5 < rate_of(total["foreign"], start["plus"] - start["still"]) < 1.5 or not np.all(np.isfinite(second)):
        return False
    if np.all(np.abs(second) <= noise):  # The decay pauses.
        return False
    # If the step size itself changed, steps with a gradient change by the same ratio.
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = total["still_second"] / total["still_fresh"]
    ratio = np.median(ratios[np.isfinite(ratios)]) if np.any(np.isfinite(ratios)) else 1.0
    # A real memory brings back a tenth or more. Estimated step sizes drift by less.
    return not (same(second, fresh, noise, 0.05) or same(second, ratio * fresh, noise, 0.05))
