"""Measures every leaf: with zero gradient first, then where that shows no decay, in other ways.

Some decays show only with weights away from where the optimizer was initialized, and some only beside a gradient
(`_beside`). Some moves of weights are no decay, but a constraint (`_constraints`). Then the decay is measured again,
with weights that obey it. Some are rules for the weights after the step (`_after_the_step`).
"""

from collections.abc import Sequence

import numpy as np

from ._after_the_step import find_rules_after_the_step
from ._beside import find_beside_gradients
from ._constraints import find_constraints, inside
from ._facts import Facts
from ._interpret import facts_of
from ._probes import Probes, weights_from
from ._runs import run


def measure(probes: Probes, counts: Sequence[int]) -> dict[int, Facts]:
    """The facts of every leaf that is a number."""
    facts = _measured(probes, counts)
    if those := [i for i, fact in facts.items() if fact.is_constrained and fact.lands]:
        inner = _measured(inside(probes, those), counts)
        facts |= {i: inner[i]._replace(is_constrained=True) for i in those if _is_decay_inside(inner[i])}
    return facts


def _is_decay_inside(fact: Facts) -> bool:
    """Whether this is surely a decay, and no effect of a step that left the set."""
    return fact.row.place == "update" and fact.row.kind.endswith(("L2", "L1")) and not fact.lands


def _measured(probes: Probes, counts: Sequence[int]) -> dict[int, Facts]:
    """The facts of every leaf at these probe weights."""
    runs = run(probes, counts)
    bare, given = ([runs.steps[name].total(i) for i in probes.indices] for name in ("plus", "plus_grad"))
    # Some optimizers divide zero by zero if all gradients are zero.
    if any(np.any(np.isnan(x)) for x in bare) and all(np.all(np.isfinite(x)) for x in given):
        runs = run(probes, counts, nudge=probes.gradients)
        return {i: facts_of(probes, runs, i, nudged=True) for i in probes.indices}
    facts = {i: facts_of(probes, runs, i) for i in probes.indices}
    # Leaves that do not decay in the first step may decay later.
    for place, (count, after, *_) in enumerate(runs.later):
        if late := [i for i, fact in facts.items() if not fact.row.decays and fact.later[place].rate]:
            runs = run(probes, counts, at_count=(count, after))
            facts |= {i: facts_of(probes, runs, i) for i in late}
    facts = find_rules_after_the_step(probes, find_constraints(probes, facts))
    if all(_is_known(fact) for fact in facts.values()):
        return facts
    # The others do not decay to zero, but they may decay to where the optimizer was initialized. An optimizer that
    # keeps its own copy of the weights also goes back there, but by the whole distance. A decay takes a fraction.
    zeros, origin = probes.scaled(probes.weights, 0.0), probes.origin
    ends = [probes.first_step(weights_from(origin, probes.weights, sign), zeros, origin) for sign in (1.0, -1.0)]
    if any(np.any(ends[0].total(i) != ends[1].total(i)) for i, fact in facts.items() if not _is_known(fact)):
        moved = run(probes, counts, origin=origin)
        back = {i: facts_of(probes, moved, i, origin) for i, fact in facts.items() if not _is_known(fact)}
        back = find_rules_after_the_step(probes, find_constraints(probes, back, origin), origin)
        facts |= {i: one for i, one in back.items() if _is_known(one) and one.row.rate < 0.5}
    return find_beside_gradients(probes, counts, facts)


def _is_known(fact: Facts) -> bool:
    return fact.row.kind != "none"
