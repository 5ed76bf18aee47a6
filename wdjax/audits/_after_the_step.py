"""Finds rules for the weights after the step, such as proximal maps, by where weights land.

Such a rule sees the weights and the gradient's part of the step only as their sum. So a step beside a gradient lands
where one with zero gradient lands from weights that this part has already moved. The part is found at some weights, and
it must be the same at others. Of a decay that is added to the update, or that a trust ratio rescales, this isn't true.
"""

from collections.abc import Sequence

import numpy as np

from ._facts import Facts
from ._probes import Arrays, Probes, weights_from

_MOST = 64  # How many steps the search for the gradient's part may take.


def find_rules_after_the_step(
    probes: Probes, facts: dict[int, Facts], origin: Arrays | None = None
) -> dict[int, Facts]:
    """The facts with the rules for weights that look like decays in the gradient or in the update."""
    those = [i for i, fact in facts.items() if _may_be_one(fact)]
    if not those:
        return facts
    found = _rules(probes, those, origin)
    return facts | {i: facts[i]._replace(row=facts[i].row._replace(place="weights"), rescaled=False) for i in found}


def _may_be_one(fact: Facts) -> bool:
    row = fact.row
    if not fact.moves or not fact.is_finite or fact.is_constrained or fact.is_remembered:
        return False
    # In an update, L2 before the step and after it are the same.
    return row.place == "gradient" or (row.place == "update" and row.kind in ("Huber", "other"))


def _rules(probes: Probes, those: Sequence[int], origin: Arrays | None) -> list[int]:
    """Those of these leaves that a rule for the weights moves."""
    zeros = probes.scaled(probes.weights, 0.0)

    def end(start: Arrays, gradients: Arrays = zeros) -> Arrays:
        return probes.first_step(start, gradients, start if origin is None else origin).end()

    def signed(signs: Arrays) -> Arrays:
        # Only the signs change, so norms of weights, which a trust ratio or a normalized update uses, stay the same.
        return weights_from(origin, {i: signs[i] * w for i, w in probes.weights.items()}, 1.0)

    ones = {i: np.ones_like(w) for i, w in probes.weights.items()}
    first = signed(ones)
    landed, bare = end(first, probes.gradients), end(first)
    sizes = {i: float(max(np.max(np.abs(x[i]), initial=0.0) for x in (first, landed))) for i in those}
    noise = {i: (64 * probes.eps + 4 * probes.update_eps) * size for i, size in sizes.items()}
    # The weights from which a step with zero gradient lands there. Proximal maps are contractions, so this finds them.
    moved, ends = {i: first[i] + landed[i] - bare[i] for i in first}, bare
    for _ in range(_MOST):
        ends = end(moved)
        if all(_is_near(ends[i], landed[i], noise[i] / 64) for i in those):
            break
        moved = {i: moved[i] + landed[i] - ends[i] for i in moved}
    those = [i for i in those if _is_near(ends[i], landed[i], noise[i])]
    are_added = set(those)
    mixed = {i: np.sign(gradient) for i, gradient in probes.gradients.items()}
    for signs in (probes.scaled(ones, -1.0), mixed, probes.scaled(mixed, -1.0)):
        start = signed(signs)
        beside, without = end(start, probes.gradients), end(start)
        after = end({i: start[i] + moved[i] - first[i] for i in start})
        those = [i for i in those if _is_near(after[i], beside[i], 4 * noise[i])]
        are_added &= {i for i in those if _is_near(beside[i] - without[i], landed[i] - bare[i], 16 * noise[i])}
    return [i for i in those if i not in are_added]


def _is_near(a: np.ndarray, b: np.ndarray, noise: float) -> bool:
    return bool(np.all(np.abs(a - b) <= noise))
