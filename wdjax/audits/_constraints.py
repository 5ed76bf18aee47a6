"""Tells constraints from decays. A constraint puts weights that are outside a set onto it, and leaves those that obey.

So with zero gradient, one step moves weights, and from where they landed neither the next step nor a new optimizer
moves them. If they move them much less, a decay acts too. It is measured inside the set.
"""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np

from ._facts import Facts
from ._moves import rate_of, same
from ._probes import Arrays, Probes, Step, weights_from
from ._rows import CONSTRAINT

# By how much a decay may differ beside a gradient where no weight leaves the set. Farther out it differs by more.
_INSIDE = 1e-4


def find_constraints(probes: Probes, facts: dict[int, Facts], origin: Arrays | None = None) -> dict[int, Facts]:
    """The facts with constraints, and without the decays that they look like."""
    found = dict(facts)
    if those := [i for i, fact in facts.items() if origin is None and fact.rescaled and fact.is_proportional]:
        found |= _at_a_boundary(probes, facts, those)
    those = [i for i, fact in facts.items() if fact.lands]
    return found | _where_they_land(probes, facts, those, origin) if those else found


def _at_a_boundary(probes: Probes, facts: dict[int, Facts], those: Sequence[int]) -> dict[int, Facts]:
    """The facts of those leaves whose decay looks rescaled beside a gradient only because the step leaves a set."""
    starts = [weights_from(None, probes.weights, sign) for sign in (1.0, -1.0)]
    zeros, noise = probes.scaled(probes.weights, 0.0), probes.eps + 2 * probes.update_eps

    def first_steps(factor: float, gradients: Arrays) -> list[Step]:
        return [probes.first_step(probes.scaled(start, factor), gradients, start) for start in starts]

    def odd(steps: Sequence[Step], i: int) -> np.ndarray:
        plus, minus = steps
        return (plus.total(i) - minus.total(i)) / 2

    beside = first_steps(0.5, probes.gradients)
    decays = {i: -facts[i].row.rate * probes.weights[i] / 2 for i in those if facts[i].row.rate < 0.5}
    those = [i for i, decay in decays.items() if same(odd(beside, i), decay, noise, _INSIDE)]
    if not those:
        return {}
    # Moments remember a first step, if there was one.
    seen, unseen = (
        [probes.step(probes.scaled(start, 0.5), zeros, one.after) for start, one in zip(starts, first, strict=True)]
        for first in (first_steps(0.5, zeros), first_steps(0.0, zeros))
    )
    places = {i: "update" if same(odd(seen, i), odd(unseen, i), noise, 0.02) else "gradient" for i in those}
    return {i: _constrained(facts[i], place, "L2", facts[i].row.rate) for i, place in places.items()}


def _where_they_land(
    probes: Probes, facts: dict[int, Facts], those: Sequence[int], origin: Arrays | None
) -> dict[int, Facts]:
    """The facts of those leaves that a step moves far, and the next step does not, if that is a constraint."""
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
    found = {}
    for i in those:
        fact, landed = facts[i], (ends[1.0][i] - ends[-1.0][i]) / 2
        size = max(float(np.max(np.abs(end[i]), initial=0.0)) for end in (*starts.values(), *ends.values()))
        noise = 64 * probes.eps * size
        is_at_rest = {name: _is_at_rest(by_sign, i, noise) for name, by_sign in moves.items()}
        # An optimizer with its own copy of the weights goes back to it from anywhere, to one point.
        if is_at_rest["first"] or np.all(np.abs(landed) <= noise):
            continue
        if is_at_rest["second"] and is_at_rest["fresh"]:
            found[i] = _constrained(fact, "weights", CONSTRAINT, 0.0)
            continue
        first, fresh = ((moves[name][1.0][i] - moves[name][-1.0][i]) / 2 for name in ("first", "fresh"))
        if not _share(fresh, landed) < 0.5 * _share(first, probes.weights[i]):
            continue  # It moves on like this, and so it is a decay, which pauses or becomes smaller.
        found[i] = _constrained(fact, "weights", "unknown", rate_of(fresh, landed))
    return found


def inside(probes: Probes, those: Sequence[int]) -> Probes:
    """The same probes, but with smaller weights of those leaves, which obey their constraints."""
    zeros, other = probes.scaled(probes.weights, 0.0), copy.copy(probes)
    plus, minus = (probes.first_step(weights_from(None, probes.weights, sign), zeros).end() for sign in (1.0, -1.0))
    other.weights, other.origin = dict(probes.weights), dict(probes.origin)
    for i in those:
        landed = np.abs(plus[i] - minus[i]) / 2
        # A projection may have put weights onto zero exactly.
        shrunk = np.maximum(landed, 1e-3 * np.max(landed, initial=0.0)) / np.abs(probes.weights[i])
        other.weights[i], other.origin[i] = (shrunk / 4 * x for x in (probes.weights[i], probes.origin[i]))
    return other


def _constrained(fact: Facts, place: str, kind: str, rate: float) -> Facts:
    toward = "zero" if kind == "L2" else ""
    # If it lands, the rates of later counts are those of steps onto the set.
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
