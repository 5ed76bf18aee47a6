"""What rounding to a parameter's dtype makes of its decay."""

import numpy as np

from .._engine import hazards
from ._facts import Facts


def is_lost(facts: Facts) -> bool:
    """Whether at least half of the decay is lost, as measured."""
    return facts.row.decays and facts.row.kept < 0.5


def is_changed(facts: Facts) -> bool:
    """Whether more or less of the decay acts, in the closed form."""
    return not is_lost(facts) and hazards.is_changed(_share(facts))


def text(facts: Facts) -> str:
    return (
        f"{facts.row.rate:.6g} per step in {facts.row.dtype} acts as {hazards.acts_as(facts.row.rate * _share(facts))}"
    )


def remedy(facts: Facts) -> str:
    return hazards.remedy(facts.row.dtype).replace(" and ignore this warning", "")


def _share(facts: Facts) -> float:
    """Which share of the decay remains in rounding to nearest, if it takes a constant fraction of weights; else 1."""
    row = facts.row
    is_plain = (row.place, row.kind, row.toward) == ("update", "L2", "zero") and facts.is_rounded_to_nearest
    adapts = row.needs_gradient or facts.is_constrained or facts.next_rate is not None
    rates = [row.least, row.most, *(rate for _, rate in row.rates)]
    is_constant = is_plain and not adapts and np.allclose(rates, row.rate, rtol=facts.tolerance, atol=0)
    return hazards.share_kept(row.rate, row.dtype) if is_constant else 1.0
