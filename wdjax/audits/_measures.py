"""Derives from the probes' steps how fast, where, toward what and in which way each leaf decays.

With zero gradient, the decay is the part of the step that changes sign with the weights (their distance to the anchor).
The part that does not change sign comes from the anchor. With a gradient, the odd part is computed again. If it is the
same number, the decay is in the update. If not, the decay is scaled with the gradient, or the moments remember it.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ._probes import Arrays, Probes, Step, positions_of_counters, positions_of_keys, replaced
from ._report import Audited


class Facts(NamedTuple):
    """What is known about one leaf. The last three facts do not come from measurements of it."""

    row: Audited
    moves: bool  # Whether gradients move it.
    is_raw: bool  # Whether its update is its gradient.
    is_finite: bool  # Whether its updates are finite.
    is_touched: bool  # Whether anything moves it, gradients or not.
    grows: bool = False  # Whether the decay makes all weights grow.
    is_repeated: bool = False  # Whether it decays in more than one call of a step.
    rescaled: bool = False  # Whether, beside a gradient, the decay keeps its direction but not its size.
    tolerance: float = 0.0  # By how much rates may differ, relatively.
    expected: tuple[float, float] | None = None  # The smallest and the largest expected rate, if one was given.
    is_frozen: bool = False  # Whether the user says that it is frozen.


Runs = tuple[dict[str, Step], list[tuple[int, Step, Step]]]


def measure(probes: Probes, counts: Sequence[int]) -> dict[int, Facts]:
    """The facts of every leaf that is a number."""
    runs = _run(probes, counts)
    bare, given = ([runs[0][name].total(i) for i in probes.indices] for name in ("plus", "plus_grad"))
    # Some optimizers divide zero by zero if all gradients are zero.
    if any(np.any(np.isnan(x)) for x in bare) and all(np.all(np.isfinite(x)) for x in given):
        runs = _run(probes, counts, nudge=probes.gradients)
        return {i: _facts(probes, runs, i, nudged=True) for i in probes.indices}
    facts = {i: _facts(probes, runs, i) for i in probes.indices}
    # Leaves that do not decay in the first step may decay later.
    for count, *_ in runs[1]:
        if late := [i for i, fact in facts.items() if not fact.row.decays and dict(fact.row.rates)[count]]:
            runs = _run(probes, counts, at_count=count)
            facts |= {i: _facts(probes, runs, i) for i in late}
    if all(fact.row.decays for fact in facts.values()):
        return facts
    # The others do not decay to zero, but they may decay to where the optimizer was initialized. An optimizer that
    # keeps its own copy of the weights also goes back there, but by the whole distance. A decay takes a fraction.
    moved = _run(probes, counts, origin=probes.origin)
    for i, fact in facts.items():
        back = _facts(probes, moved, i, probes.origin)
        if not fact.row.decays and back.row.decays and back.row.rate < 0.5:
            facts[i] = back
    return facts


def _run(
    probes: Probes, counts: Sequence[int], *, origin: Any = None, nudge: Any = None, at_count: int | None = None
) -> Runs:
    """Steps of the optimizer from different weights and states, by name; and counts, with two steps at each.

    "plus", "minus", "double", "tiny" and "still" start at 1, -1, 2, 1e-6 and 0 times the probe weights, with zero
    gradient; "plus_grad" and "minus_grad" as the first two, with a gradient. "plus_second" starts where "plus" ended,
    and "plus_fresh" there too, with a new state at its count; the same after "minus", and after "still" with a
    gradient. "foreign" starts at the probe weights with the state of "still". At each count: as "plus" and "minus".

    With an origin, the optimizer is initialized there and the weights are offsets from it. With a nudge, it replaces
    the zero gradient. With `at_count`, the first step is taken at that count.
    """
    zeros = probes.scaled(probes.weights, 0.0) if nudge is None else nudge
    gradients = probes.gradients if nudge is None else probes.scaled(nudge, 2.0)
    counters: list[int] = []

    def at(factor: float) -> Arrays:
        weights = probes.scaled(probes.weights, factor)
        return weights if origin is None else {i: w + origin[i] for i, w in weights.items()}

    def to(count: int | None) -> Callable[[Any], Any]:
        positions = [] if count is None else counters
        return lambda state: replaced(state, positions, lambda _, leaf: jnp.asarray(count, leaf.dtype))

    def step(weights: Arrays, gradients: Arrays = zeros, to_count: Callable[[Any], Any] | None = None) -> Step:
        """The first real step from a new state."""
        state = probes.init(weights if origin is None else origin)
        if probes.offset:
            before = probes.step(weights, zeros, state, probes.offset)
            weights, state = before.end(), before.after
        return probes.step(weights, gradients, (to_count or to(at_count))(state))

    first = step(at(1.0))  # It shows the counters, so it is not yet at a count.
    counters += positions_of_counters(first.before, first.after, probes.calls)
    plus, minus, still = (step(at(factor)) for factor in (1.0, -1.0, 0.0))
    counts_of_second = jax.tree.leaves(plus.after)

    def to_second(state: Any) -> Any:
        return replaced(state, [*counters, *positions_of_keys(state)], lambda i, _: counts_of_second[i])

    steps = {"plus": plus.bare(), "minus": minus.bare(), "still": still.bare()}
    steps |= {"double": step(at(2.0)).bare(), "tiny": step(at(1e-6)).bare()}
    steps |= {"plus_grad": step(at(1.0), gradients).bare(), "minus_grad": step(at(-1.0), gradients).bare()}
    for name, one, given in (("plus", plus, zeros), ("minus", minus, zeros), ("still", still, probes.gradients)):
        steps[f"{name}_second"] = probes.step(one.end(), given, one.after).bare()
        steps[f"{name}_fresh"] = step(one.end(), given, to_second).bare()
    steps["foreign"] = probes.step(plus.start, zeros, still.after).bare()
    later = [
        (count, step(at(1.0), zeros, to(count)).bare(), step(at(-1.0), zeros, to(count)).bare())
        for count in (counts if counters else ())
    ]
    return steps, later


def _facts(probes: Probes, runs: Runs, i: int, origin: Arrays | None = None, *, nudged: bool = False) -> Facts:
    leaf, w = probes.leaves[i], probes.weights[i]
    steps, later = runs
    total = {name: step.total(i) for name, step in steps.items()}
    plus, minus, plus_grad, minus_grad = (total[name] for name in ("plus", "minus", "plus_grad", "minus_grad"))
    odd, even, beside = (plus - minus) / 2, (plus + minus) / 2, (plus_grad - minus_grad) / 2
    scale = np.abs(w) + (0 if origin is None else np.abs(origin[i]))
    rounding = 8 * probes.eps * scale
    moves = nudged or not (np.array_equal(plus_grad, plus) and np.array_equal(minus_grad, minus))
    moved = ((count, (one.total(i) - other.total(i)) / 2) for count, one, other in later)
    rates = tuple((count, 0.0 if _is_noise(part, w, rounding) else _rate(part, w)) for count, part in moved)
    facts = Facts(
        Audited(leaf.path, leaf.shape, np.dtype(leaf.dtype).name, rates=rates),
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
    elif not nudged and _is_remembered(total, start["plus"] - start["still"], 8 * rounding):
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
        grows=bool(np.all(ratios <= 0)),
        is_repeated=not nudged and sum(bool(np.any(call[i] != 0)) for call in steps["plus"].moved) > 1,
        rescaled=rescaled,
    )


def _is_remembered(total: dict[str, np.ndarray], offset: np.ndarray, noise: Any) -> bool:
    """Whether a decay comes back in the next step, so that a state that saw it steps differently from a new one."""
    second, fresh = ((total[f"plus_{name}"] - total[f"minus_{name}"]) / 2 for name in ("second", "fresh"))
    # An optimizer with its own copy of the weights goes all the way back to it from anywhere. That is not a memory.
    if 0.5 < _rate(total["foreign"], offset) < 1.5 or not np.all(np.isfinite(second)):
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
