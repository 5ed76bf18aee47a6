"""Finds decays that act only beside a gradient: of the rows, elements or arrays that have one in a step.

The mean of two steps, with a gradient and with its negative, is free of the gradient's part if an optimizer's steps
change sign with the gradient. What is left is interpreted like a step with zero gradient. It is a decay if it is the
same beside another gradient.
"""

from collections.abc import Sequence

import numpy as np

from ._facts import Facts
from ._interpret import facts_of
from ._moves import is_noise, rate_of
from ._probes import Arrays, Probes, Step, weights_from
from ._runs import Runs, mean, run

_KINDS = ("L2", "L1", "norm", "Huber")  # Others can't be told from steps that depend on the weights in other ways.


def find_beside_gradients(probes: Probes, counts: Sequence[int], facts: dict[int, Facts]) -> dict[int, Facts]:
    """The facts with the decays that need a gradient. Cheap looks come first."""
    found, gradients = dict(facts), (probes.gradients, probes.scaled(probes.gradients, -1.0))
    for origin in (None, probes.origin):
        those = [i for i, fact in found.items() if fact.row.kind == "none" and fact.moves and fact.is_finite]
        if origin is None:
            those = [i for i in those if found[i].odd_beside]
        for given in (gradients[:1], gradients) if origin is not None else (gradients,):
            if those:
                odd, noise = _odd(probes, origin, given)
                those = [i for i in those if not is_noise(odd[i], probes.weights[i], noise[i])]
        if those:
            found |= _decays(probes, counts, found, those, origin)
    return found


def _odd(probes: Probes, origin: Arrays | None, gradients: Sequence[Arrays]) -> tuple[Arrays, Arrays]:
    """The part of the first step that changes sign with the weights, in the mean over gradients; and its rounding."""
    steps = [
        [probes.first_step(weights_from(origin, probes.weights, sign), each, origin, idle=each) for sign in (1.0, -1.0)]
        for each in gradients
    ]
    odd, noise = {}, {}
    for i in probes.indices:
        parts = [(plus.total(i) - minus.total(i)) / 2 for plus, minus in steps]
        odd[i] = np.mean(parts, axis=0)
        noise[i] = 8 * probes.eps * (np.abs(steps[0][0].start[i]) + np.abs(steps[0][0].total(i)))
    return odd, noise


def _decays(
    probes: Probes, counts: Sequence[int], facts: dict[int, Facts], those: Sequence[int], origin: Arrays | None
) -> dict[int, Facts]:
    """The facts of those leaves that decay beside a gradient."""
    weights, gradients = probes.weights, probes.gradients
    # With another direction. Weights on a sphere move in proportion to themselves too, but by how the two directions
    # differ.
    other = {i: 2 * np.abs(g) * weights[i] / np.abs(weights[i]) for i, g in gradients.items()}
    up, down = (
        run(probes, counts, origin=origin, nudge=probes.scaled(gradients, sign), beside=probes.scaled(other, sign))
        for sign in (1.0, -1.0)
    )
    steps = {name: mean(step, down.steps[name]) for name, step in up.steps.items()}
    # The step of the gradient at a count is the difference of the third step and the first.
    later = [(*a[:2], mean(a[2], b[2]), mean(a[3], b[3]), a[2]) for a, b in zip(up.later, down.later, strict=True)]
    runs = Runs(steps, later, up.moving, {i: np.abs(up.steps["plus"].total(i)) for i in those})
    found = {}
    for i in those:
        fact, row = facts[i], (new := facts_of(probes, runs, i, origin)).row
        # Beside a gradient of twice the size it is half as large.
        if is_divided := row.kind == "cautious L2" and row.place == "update":
            row = row._replace(kind="L2")
        # Moments that are linear remember it, and it is still the same beside other gradients.
        is_even = row.kind == "L2" and np.isclose(row.beside_gradient, row.rate, rtol=probes.tolerance, atol=0)
        is_decay = row.kind in _KINDS and (row.place != "gradient" or (is_even and not new.rescaled))
        if is_decay and (origin is None or row.rate < 0.5):
            row = row._replace(needs_gradient=True)
            found[i] = new._replace(row=row, is_raw=fact.is_raw, is_touched=fact.is_touched, is_divided=is_divided)
    if not found:
        return found
    units = _units(probes, origin, steps, list(found))
    usual, late = (_second_rates(probes, origin, share) for share in (1.0, 0.0))
    for i, fact in found.items():
        # Of a decay that is divided by the second moment, it is up to the root of 2 times as large.
        catches_up = late[i] > 1.45 * usual[i]
        fact = fact._replace(needed_by=units[i], late_rate=late[i] if catches_up else 0.0)
        if fact.is_divided or (late[i] > 1.2 * usual[i] and not catches_up):
            # Moments are new at each count, so at later ones the decay is divided by too little.
            fact = fact._replace(row=fact.row._replace(rates=()), later=(), lapse="")
        plus, minus = (np.abs(up.steps[name].total(i) - up.steps["still"].total(i)) for name in ("plus", "minus"))
        # Where a cautious decay acts on a weight, it does not act on the weight's negative. The mean is half of it.
        is_cautious = fact.row.kind == "L2" and np.all(np.minimum(plus, minus) < 1e-3 * np.maximum(plus, minus))
        found[i] = _cautious(fact) if is_cautious else fact
    return found


def _cautious(fact: Facts) -> Facts:
    row = fact.row
    doubled = {name: 2 * getattr(row, name) for name in ("rate", "least", "most", "beside_gradient")}
    rates = tuple((count, 2 * rate) for count, rate in row.rates)
    later = tuple(one._replace(rate=2 * one.rate) for one in fact.later)
    return fact._replace(row=row._replace(kind="cautious L2", rates=rates, **doubled), later=later)


def _units(probes: Probes, origin: Arrays | None, steps: dict[str, Step], those: Sequence[int]) -> dict[int, str]:
    """What needs a gradient of its own: the first row gets none in these steps, and one element of the second."""
    some = {i: gradient.copy() for i, gradient in probes.gradients.items()}
    for gradient in some.values():
        if gradient.ndim > 1 and len(gradient) > 1:
            gradient[0] = 0.0
            gradient[1].flat[0] = 0.0
        elif gradient.size > 1:
            gradient.flat[0] = 0.0
    odd, _ = _odd(probes, origin, (some, probes.scaled(some, -1.0)))
    units = {}
    for i in those:
        usual = (steps["plus"].total(i) - steps["minus"].total(i)) / 2
        acts = np.abs(odd[i]) > 0.5 * np.abs(usual)
        has_rows = acts.ndim > 1 and len(acts) > 1
        is_element = not (acts[1].flat[0] if has_rows else acts.flat[:1].any())
        units[i] = "element" if is_element and acts.size > 1 else "row" if has_rows and not acts[0].any() else "array"
    return units


def _second_rates(probes: Probes, origin: Arrays | None, share: float) -> dict[int, float]:
    """The rates of the second step beside a gradient, from the first weights, after one with a share of it."""
    seconds = []
    for sign in (1.0, -1.0):
        start, both = weights_from(origin, probes.weights, sign), []
        for to in (1.0, -1.0):
            first = probes.first_step(start, probes.scaled(probes.gradients, to * share), origin)
            both.append(probes.step(first.start, probes.scaled(probes.gradients, to), first.after).bare())
        seconds.append(mean(*both))
    plus, minus = seconds
    return {i: rate_of(plus.total(i) - minus.total(i), plus.start[i] - minus.start[i]) for i in probes.indices}
