"""Tells constraints from decays. A constraint puts weights that are outside a set onto it, and leaves those that obey.

So with zero gradient, one step moves weights, and from where they landed neither the next step nor a new optimizer
moves them. If a decay acts too, it shows inside the set.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ._facts import Facts
from ._moves import rate_of, same
from ._probes import Arrays, Probes, weights_from
from ._rows import CONSTRAINT


def find_constraints(probes: Probes, facts: dict[int, Facts], origin: Arrays | None = None) -> dict[int, Facts]:
    """The facts with constraints, and without the decays that they look like."""
    those = [i for i, fact in facts.items() if fact.lands or _may_be_at_a_boundary(fact, origin)]
    if not those:
        return facts
    zeros = probes.scaled(probes.weights, 0.0)
    starts = {sign: weights_from(origin, probes.weights, sign) for sign in (1.0, -1.0)}
    # What each of three moves adds, by sign: to where the weights land, and from there with the old and a new state.
    ends, moves = {}, {"first": {}, "second": {}, "fresh": {}}
    for sign, start in starts.items():
        first = probes.first_step(start, zeros, origin)
        ends[sign] = first.end()
        moves["first"][sign] = _difference(ends[sign], start)
        moves["second"][sign] = _difference(probes.step(ends[sign], zeros, first.after).end(), ends[sign])
        fresh = probes.first_step(ends[sign], zeros, start if origin is None else origin)
        moves["fresh"][sign] = _difference(fresh.end(), ends[sign])
    landed = {i: (ends[1.0][i] - ends[-1.0][i]) / 2 for i in zeros}
    inside, found = None, dict(facts)
    for i in those:
        fact = facts[i]
        size = max(float(np.max(np.abs(end[i]), initial=0.0)) for end in (*starts.values(), *ends.values()))
        noise = 64 * probes.eps * size
        is_at_rest = {name: _is_at_rest(by_sign, i, noise) for name, by_sign in moves.items()}
        # An optimizer with its own copy of the weights goes back to it from anywhere, to one point.
        if is_at_rest["first"] or np.all(np.abs(landed[i]) <= noise):
            continue
        if is_at_rest["second"] and is_at_rest["fresh"]:
            found[i] = _constrained(fact, "weights", CONSTRAINT, 0.0)
            continue
        first, fresh = ((moves[name][1.0][i] - moves[name][-1.0][i]) / 2 for name in ("first", "fresh"))
        if fact.lands and not _share(fresh, landed[i]) < 0.5 * _share(first, probes.weights[i]):
            continue  # It moves on like this, and so it is a decay, which pauses or becomes smaller.
        inside = inside or _inside(probes, ends)
        decay, beside = (odd[i] for odd in inside)
        acts = landed[i] != 0
        rate, ratios = rate_of(decay, landed[i] / 2), -2 * np.real(decay[acts] / landed[i][acts])
        is_even = origin is None and rate > 0 and np.std(ratios) <= 1e-2 * rate
        if is_even and same(beside, decay, noise + 2 * probes.update_eps * size, probes.tolerance):
            found[i] = _constrained(fact, "update", "L2", rate)
        elif fact.lands:
            found[i] = _constrained(fact, "weights", "unknown", rate_of(fresh, landed[i]))
    return found


def _may_be_at_a_boundary(fact: Facts, origin: Arrays | None) -> bool:
    """Whether steps of gradients may leave a set, so that the decay beside them looks rescaled."""
    return origin is None and fact.rescaled and fact.is_proportional


def _inside(probes: Probes, ends: Mapping[float, Arrays]) -> tuple[Arrays, Arrays]:
    """The decay of half of the weights that obey a constraint, with zero gradient and beside one."""
    zeros, odd = probes.scaled(probes.weights, 0.0), []
    for given in (zeros, probes.gradients):
        plus, minus = (probes.first_step(probes.scaled(end, 0.5), given, end) for end in ends.values())
        odd.append({i: (plus.total(i) - minus.total(i)) / 2 for i in zeros})
    return odd[0], odd[1]


def _constrained(fact: Facts, place: str, kind: str, rate: float) -> Facts:
    toward = "zero" if kind == "L2" else ""
    # The rates of later counts are of steps onto the set.
    rates, later = ((), ()) if fact.lands else (fact.row.rates, fact.later)
    row = fact.row._replace(
        place=place, kind=kind, toward=toward, rate=rate, least=rate, most=rate, beside_gradient=rate, rates=rates
    )
    is_even = kind == "L2"
    return fact._replace(
        row=row, later=later, is_constrained=True, is_proportional=is_even, rescaled=False, grows=False, lapse=""
    )


def _share(moved: np.ndarray, weights: np.ndarray) -> float:
    return float(np.linalg.norm(moved) / np.linalg.norm(weights))


def _difference(end: Arrays, start: Arrays) -> Arrays:
    return {i: end[i] - start[i] for i in end}


def _is_at_rest(moved: Any, i: int, noise: float) -> bool:
    return all(np.all(np.abs(by_sign[i]) <= noise) for by_sign in moved.values())
