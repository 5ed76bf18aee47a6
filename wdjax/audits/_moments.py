"""Looks behind the moments of an optimizer: which penalty they rescale, and whether a decay acts beside it."""

from typing import Any

import numpy as np

from ._facts import Facts
from ._moves import kind_of, rate_of
from ._probes import Probes, Step, weights_from
from ._rows import GRADIENT_AND_UPDATE, MOVING_AVERAGE

# Gradients beside which a decay is so small that the moments respond to it in proportion.
_STRONG = 100.0


def look_behind_the_moments(probes: Probes, facts: dict[int, Facts]) -> dict[int, Facts]:
    """The facts with the kind of a decay that moments have rescaled, and with a decay in the update beside it.

    Beside strong gradients, moments respond to a penalty's gradient in proportion. So two steps show it: in the first,
    weights of both signs or gradients moved by +w and -w; in the second, the same weights, so that only the memory of
    the first differs. Where the optimizer has no memory, the first step must do. The gradients are at right angles to
    the weights, so a clip by global norm, which ties all parameters together, acts alike on all these steps.
    """
    zeros, found = probes.scaled(probes.weights, 0.0), dict(facts)
    # No gradient is at right angles to a single weight, so everything about it is smaller.
    share = {i: 0.1 if w.size == 1 else 1.0 for i, w in probes.weights.items()}
    weights = {i: share[i] * w for i, w in probes.weights.items()}
    strong = {i: _STRONG * share[i] * _across(w) for i, w in weights.items()}
    # Factors of the weights and of the gradient, and how many weights are added to the gradient.
    starts = {"plus": (1, 1, 0), "minus": (-1, 1, 0), "double": (2, 1, 0), "minus_double": (-2, 1, 0)}
    starts |= {"up": (1, 1, 1), "down": (1, 1, -1), "loud": (1, 2, 0)}
    for origin, toward in ((None, ("zero", "a tree", "")), (probes.origin, ("init", MOVING_AVERAGE))):
        those = [i for i, fact in facts.items() if fact.row.place == "gradient" and fact.row.toward in toward]
        those = [i for i in those if not (facts[i].rescaled and facts[i].is_proportional)]
        if not those:
            continue
        first, second = {}, {}
        for name, (factor, times, shift) in starts.items():
            given = {i: times * gradient + shift * weights[i] for i, gradient in strong.items()}
            first[name] = probes.first_step(weights_from(origin, weights, factor), given, origin)
            second[name] = probes.step(first["plus"].end(), zeros, first[name].after).bare()
            if name != "plus":
                first[name] = first[name].bare()
        for i in those:
            found[i] = _behind_the_moments(probes, facts[i], i, weights[i], first, second)
    return found


def _across(w: np.ndarray) -> np.ndarray:
    """A gradient at right angles to weights: if a small share of them is added, its norm hardly changes.

    Its elements are near 1. Pairs of weights of nearly the same size cancel, and of an odd one all take a share.
    """
    size = np.abs(w).ravel()
    order, across = np.argsort(size), np.ones(w.size)
    one, other = order[w.size % 2 :: 2], order[w.size % 2 + 1 :: 2]
    across[one], across[other] = np.sqrt(size[other] / size[one]), -np.sqrt(size[one] / size[other])
    if w.size > 1:
        across -= size * (across @ size) / (size @ size)
    return across.reshape(w.shape) * w / np.abs(w)


def _behind_the_moments(probes: Probes, fact: Facts, i: int, w: np.ndarray, first: Any, second: Any) -> Facts:
    def halves(steps: dict[str, Step]) -> tuple[np.ndarray, ...]:
        plus, minus, double, minus_double, up, down, _ = (step.total(i) for step in steps.values())
        odd, noise = (plus - minus) / 2, 64 * probes.eps * np.abs(plus)
        return np.where(np.abs(odd) > noise, odd, 0.0), (double - minus_double) / 2, (up - down) / 2

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
    kind = fact.row.kind if fact.row.kind == "L2" else "unknown"
    if is_known and kind != "L2":
        # Weights that move one another do so in the first step too. Where several memories mix, ratios have any sign.
        kind = kind_of(penalty, penalty_double, w, may_mix=fact.row.kind == "other")
    row = fact.row._replace(kind=kind)
    # A decay in the update is the part of the first step that the penalty does not explain.
    rest = odd - strength * response
    in_update = rate_of(rest, w)
    is_seen = np.all(np.abs(rest) > 1e-3 * np.abs(odd) + 1e3 * probes.eps * size)
    can_tell = strength > 0 if has_memory else not np.any(response)
    if row.toward == MOVING_AVERAGE:  # It remembers weights too, so the two memories are mixed.
        return fact._replace(row=row)
    if can_tell and is_seen and np.std(rest / w) <= 1e-2 * in_update:
        # A clip in front hides the gradient's size, and with it the factor of the penalty.
        louder = np.abs(second["loud"].total(i) - second["plus"].total(i))
        strength = 0.0 if np.all(louder <= 0.1 * np.abs(remembered[0])) else strength
        return fact._replace(row=row._replace(place=GRADIENT_AND_UPDATE, in_update=in_update), strength=strength)
    return fact._replace(row=row)
