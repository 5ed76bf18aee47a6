"""Derives from the probes' steps how fast, where, toward what and in which way a leaf decays.

With zero gradient, the decay is the part of the step that changes sign with the weights (their distance to the anchor).
The part that does not change sign comes from the anchor. With a gradient, the odd part is computed again. If it is the
same number, the decay is in the update. If not, the decay is scaled with the gradient, or the moments remember it.
"""

from typing import Any

import numpy as np

from ._facts import PAUSES, Facts, Later, lapse_of
from ._moves import along, is_noise, kind_of, rate_of, same
from ._probes import Arrays, Probes
from ._rows import MOVING_AVERAGE, Audited
from ._runs import Runs


def facts_of(probes: Probes, runs: Runs, i: int, origin: Arrays | None = None, *, nudged: bool = False) -> Facts:
    leaf, steps = probes.leaves[i], runs.steps
    w = (steps["plus"].start[i] - steps["minus"].start[i]) / 2  # Calls before the first step may have moved them.
    total = {name: step.total(i) for name, step in steps.items()}
    plus, minus, plus_grad, minus_grad = (total[name] for name in ("plus", "minus", "plus_grad", "minus_grad"))
    odd, even, beside = (plus - minus) / 2, (plus + minus) / 2, (plus_grad - minus_grad) / 2
    scale = np.abs(w) + (0 if origin is None else np.abs(origin[i])) + runs.sizes.get(i, 0)
    rounding = 8 * probes.eps * scale
    moves = nudged or i in probes.moved or not (np.array_equal(plus_grad, plus) and np.array_equal(minus_grad, minus))
    before = steps["plus"].start[i] - probes.weights[i] - (0 if origin is None else origin[i])
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
        odd_beside=not is_noise(beside, w, rounding),
        lands=bool(np.any(np.abs(before) > rounding)),
    )
    if not np.all(np.isfinite(plus)) or is_noise(odd, w, rounding):
        return facts
    kind = kind_of(odd, total["double"] - even, w)
    size = np.abs(plus_grad) + runs.sizes.get(i, 0)
    noise = 64 * probes.eps * (size + scale) + 2 * probes.update_eps * size
    place, rescaled, is_remembered, next_rate = "update", False, False, None
    start, tiny = {name: step.start[i] for name, step in steps.items()}, total["tiny"]
    second, at_second = ((part["plus_second"] - part["minus_second"]) / 2 for part in (total, start))
    back = (total["plus_back"] - total["minus_back"]) / 2
    follows = False
    if origin is not None:
        # A moving average has seen the weights of the first step. At the origin, it pulls toward them.
        acts = odd != 0
        follows = bool(np.all(np.real(back / w)[acts] > 0) and np.all(np.abs(back)[acts] > rounding[acts]))
        if follows:
            total |= {"plus_second": total["plus_second"] - back, "minus_second": total["minus_second"] + back}
    is_even = same(beside - along(beside - odd, (plus_grad + minus_grad) / 2), odd, noise, probes.tolerance)
    # What moments remember moves weights without a distance, too. A strength that has changed does not.
    is_at_rest = bool(np.all(np.abs(back) <= rounding))
    # A step size that gradients change is no strength of the decay either.
    farther, beside_farther = (
        (total[f"plus_{name}"] - total[f"minus_{name}"]) / 2 for name in ("farther", "grad_farther")
    )
    adapts = is_at_rest and is_even and same(farther, beside_farther, noise, probes.tolerance)
    # Weights next to zero, if they move at all, move exactly to zero.
    if kind != "L2" and np.any(tiny) and np.all((tiny == 0) | (tiny == -start["tiny"])):
        place = "weights"
    elif not nudged and _is_remembered(total, start, 8 * rounding, has_copy=not is_at_rest):
        is_remembered = True
        if adapts:
            # Doubled weights double the strength too, so the kind is not measured. New states have no strength yet.
            kind, later, rates, next_rate = "other", [], (), rate_of(second, at_second)
        else:
            place = "gradient"
    elif not is_even:
        if same(2 * beside, odd, 2 * noise, probes.tolerance):
            kind = f"cautious {kind}"
        else:
            sizes = float(np.linalg.norm(beside) * np.linalg.norm(odd))
            place, rescaled = "gradient", float(np.real(np.vdot(beside, odd))) > 0.9 * sizes
    is_odd = nudged or same(even, 0 * even, 1e-3 * np.abs(odd) + rounding)
    if not is_odd and place == "update" and kind == "L2" and origin is None:  # An anchor stays, but noise changes.
        is_odd = not same(total["plus_second"] - odd / w * (start["plus"] + plus), even, 8 * rounding, 0.05)
    from_init = MOVING_AVERAGE if follows or leaf.path in runs.moving else "init"
    rate, ratios = rate_of(odd, w), 0.0 - np.real(odd / w)
    lapse = lapse_of(later)
    if not lapse and kind == "L2" and rate < 0.9:  # An optimizer without a count may still pause.
        lapse = PAUSES if np.all(np.abs(second) <= rounding) and np.any(total["still_second"]) else ""
    row = facts.row._replace(
        rate=rate,
        rates=rates,
        least=float(np.min(ratios)) if kind.endswith("L2") else rate,
        most=float(np.max(ratios)) if kind.endswith("L2") else rate,
        beside_gradient=-float(np.real(np.vdot(w, beside))) / float(np.real(np.vdot(w, w))),
        place=place,
        kind=kind,
        toward=from_init if origin is not None else "zero" if is_odd else "a tree" if kind.endswith("L2") else "",
    )
    return facts._replace(
        row=row,
        later=tuple(later),
        next_rate=next_rate,
        grows=bool(np.all(ratios <= 0) or (kind == "L2" and np.any(-ratios * np.abs(w) > rounding))),
        is_proportional=kind == "L2" and float(np.std(ratios)) <= 1e-2 * abs(rate),
        lapse=lapse,
        is_repeated=not nudged and sum(bool(np.any(call[i] != 0)) for call in steps["plus"].moved) > 1,
        rescaled=rescaled,
        is_remembered=is_remembered,
        lands=next_rate is None
        and bool(
            np.linalg.norm(before) > 2 * np.linalg.norm(odd)
            or np.linalg.norm(odd) > 0.5 * np.linalg.norm(w)
            or np.linalg.norm(second) * np.linalg.norm(w) < 0.5 * np.linalg.norm(odd) * np.linalg.norm(at_second)
        ),
    )


def _is_remembered(total: dict[str, np.ndarray], start: dict[str, np.ndarray], noise: Any, *, has_copy: bool) -> bool:
    """Whether a decay comes back in the next step, so that a state that saw it steps differently from a new one."""
    second, fresh = ((total[f"plus_{name}"] - total[f"minus_{name}"]) / 2 for name in ("second", "fresh"))
    weights = [start[f"plus_{name}"] - start[f"minus_{name}"] for name in ("second", "fresh")]
    fresh = fresh * np.divide(*weights, out=np.ones_like(fresh), where=weights[1] != 0)
    # An optimizer with its own copy of the weights goes all the way back to it from anywhere. That is not a memory.
    goes_back = has_copy and 0.5 < rate_of(total["foreign"], start["plus"] - start["still"]) < 1.5
    if goes_back or not np.all(np.isfinite(second)):
        return False
    if np.all(np.abs(second) <= noise):  # The decay pauses.
        return False
    # If the step size itself changed, steps with a gradient change by the same ratio.
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = total["still_second"] / total["still_fresh"]
    ratio = np.median(ratios[np.isfinite(ratios)]) if np.any(np.isfinite(ratios)) else 1.0
    # A real memory brings back a tenth or more. Estimated step sizes drift by less.
    return not (same(second, fresh, noise, 0.05) or same(second, ratio * fresh, noise, 0.05))
