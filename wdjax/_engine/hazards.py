"""Warnings at `init` about known rates that rounding removes or changes, or that are so large that they overshoot.

A schedule is known by its values at some counts. Only its largest value counts: a rate that is lost there is lost in
every step, and one that overshoots there overshoots in some step. What rounding makes of other rates is said only of
one that is the same in every step.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from . import checks
from .arithmetic import Term
from .rates import values_of
from .text import listed

# Each of the first steps, then 64 counts for each power of two. So they meet the peak of a warmup closely.
_COUNTS = (*range(2**12), *((64 + i) * 2**k for k in range(6, 18) for i in range(64)), 2**24)
_MOST_CHANGE = 0.2  # By which share rounding may change a rate before it is said.
_FEW_BITS = 12  # Of a mantissa, of which every value is tried; of a longer one, as many values.


def warn_of_rates(
    where: str,
    argument: str,
    decays: Iterable[tuple[str, Any, Term]],
    probed: dict[int, Any],
    *,
    can_overshoot: bool,
    is_toward_zero: bool,
) -> None:
    """Warns of fractions per step that rounding removes or changes, and of those that overshoot, unless none can.

    `decays` holds a path, a dtype and the fraction, the product of `argument`. A fraction that has no value yet (a
    traced rate, a schedule that fails) is skipped; `audit` sees it. `probed` keeps the values of schedules. What
    rounding makes of a decay that is not toward zero depends on the distance, so only its loss is known.
    """
    lost: dict[tuple[str, str], list[str]] = {}
    changed: dict[tuple[str, str, str], list[str]] = {}
    beyond: dict[tuple[float, str], list[str]] = {}
    for path, dtype, term in decays:
        fraction, said, is_constant = _largest(term, probed)
        if 0 < fraction < smallest_fraction(dtype):
            lost.setdefault((jnp.dtype(dtype).name, said), []).append(path)
        elif fraction >= 1:
            if can_overshoot:
                beyond.setdefault((fraction, said), []).append(path)
        elif is_constant and is_toward_zero and is_changed(share := share_kept(fraction, dtype)):
            changed.setdefault((jnp.dtype(dtype).name, said, acts_as(fraction * share)), []).append(path)
    if lost:
        (dtype, said), paths = next(iter(lost.items()))
        least = smallest_fraction(dtype)
        checks.warn(
            f"{where}: the decay rounds to nothing: {argument} is {said}, and optax.apply_updates keeps "
            f"no change of less than {least:.3g} (2**{math.log2(least):.0f}) of a {dtype} weight: "
            f"{_named(paths, sum(map(len, lost.values())))}. {remedy(dtype)}"
        )
    if changed:
        (dtype, said, acts), paths = next(iter(changed.items()))
        checks.warn(
            f"{where}: rounding changes the decay: {argument} is {said}, and rounding to {dtype} makes it {acts}: "
            f"{_named(paths, sum(map(len, changed.values())))}. {remedy(dtype)}"
        )
    if beyond:
        (fraction, said), paths = max(beyond.items())
        does = "moves weights to zero (or their anchor) at once" if fraction == 1 else "moves weights past zero"
        never_settles = ", as far again or farther, so they never settle" if fraction >= 2 else ""
        checks.warn(
            f"{where}: {argument} is {said}, which {does}{never_settles}: "
            f"{_named(paths, sum(map(len, beyond.values())))}. Is a factor missing? If the rate is intended, "
            "use continuous_decay(...) or proximal_step(L2(), ...), which never overshoot."
        )


def _largest(term: Term, probed: dict[int, Any]) -> tuple[float, str, bool]:
    """The largest fraction in any step, also in words, and whether it is the only one; 0 if it isn't known."""
    schedules = [factor for factor in term.factors if callable(factor)]
    known = term._replace(factors=tuple(factor for factor in term.factors if not callable(factor))).known()
    if known is None or np.size(known) == 0:
        return 0.0, "", False
    fractions = np.full(len(_COUNTS), np.max(known))
    for schedule in schedules:
        if id(schedule) not in probed:
            probed[id(schedule)] = values_of(schedule, _COUNTS)
        values = probed[id(schedule)]
        if values is None or values.shape != fractions.shape or not jnp.can_cast(values.dtype, np.float64):
            return 0.0, "", False
        fractions = fractions * values.astype(np.float64)
    at = int(np.argmax(fractions))
    if at == len(_COUNTS) - 1:  # It rises without end, and a run ends somewhere.
        return 0.0, "", False
    largest = float(fractions[at])
    said = f"{largest:g} a step"
    if schedules:
        said = f"at most {said} (at count {_COUNTS[at]}, of {len(_COUNTS)} that were tried)"
    return largest, said, not schedules and bool(np.all(known == largest))


def remedy(dtype: Any) -> str:
    """The advice for a decay that rounding removes or changes in this dtype."""
    if jnp.finfo(dtype).bits < 32:
        return (
            "Keep the parameters in float32 and compute in a narrower dtype, or write "
            "optax.chain(in_float32(optimizer), compensated()) with the decay inside."
        )
    return "Use a larger rate, or write optax.chain(optimizer, compensated()) and ignore this warning."


def smallest_fraction(dtype: Any) -> float:
    """The fraction of a weight below which rounding to nearest undoes any change."""
    dtype = jnp.dtype(dtype)
    return 2.0 ** -(int(jnp.finfo(dtype).nmant) + 2) if jnp.issubdtype(dtype, jnp.inexact) else 0.0


def share_kept(rate: float, dtype: Any) -> float:
    """Which share of a decay acts, if each step rounds the weights to nearest and nothing else moves them.

    A weight that decays meets each value of the mantissa. There it loses a whole number of spacings, so its speed
    differs from the rate, up or down. The share is that of the mean speed; 0 if a weight gets stuck on its way.
    """
    if not jnp.issubdtype(dtype, jnp.inexact) or not 0 < rate < 1:
        return 1.0
    bits = int(jnp.finfo(dtype).nmant)
    number = 2 ** min(bits, _FEW_BITS)
    weights = 2.0**bits * (1 + np.arange(1, number + 1) / number)  # In spacings.
    lost = weights - np.rint(weights - rate * weights)
    return float(np.sum(1 / (rate * weights)) / np.sum(1 / lost)) if np.all(lost) else 0.0


def is_changed(share: float) -> bool:
    """Whether so much or so little of a decay acts that it is another decay."""
    return abs(share - 1) > _MOST_CHANGE


def acts_as(rate: float) -> str:
    """The rate that acts, in words."""
    return f"{rate:.3g} a step" if rate else "0 a step wherever half the spacing of the weights is larger"


def _named(paths: Sequence[str], total: int) -> str:
    others = total - len(paths)
    return listed(paths, 3) + (f" and {others} at other rates" if others else "")
