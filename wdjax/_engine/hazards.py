"""Warnings at `init` about known rates that are too small to have an effect, or so large that they overshoot.

A schedule is known by its values at some counts. Only its largest value counts: a rate that is lost there is lost in
every step, and one that overshoots there overshoots in some step.
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


def warn_of_rates(
    where: str, argument: str, decays: Iterable[tuple[str, Any, Term]], probed: dict[int, Any], *, can_overshoot: bool
) -> None:
    """Warns of fractions per step that round to nothing, and of those that overshoot, unless no large rate can.

    `decays` holds a path, a dtype and the fraction, the product of `argument`. A fraction that has no value yet (a
    traced rate, a schedule that fails) is skipped; `audit` sees it. `probed` keeps the values of schedules.
    """
    lost: dict[tuple[str, str], list[str]] = {}
    beyond: dict[tuple[float, str], list[str]] = {}
    for path, dtype, term in decays:
        fraction, said = _largest(term, probed)
        if 0 < fraction < smallest_fraction(dtype):
            lost.setdefault((jnp.dtype(dtype).name, said), []).append(path)
        elif fraction >= 1 and can_overshoot:
            beyond.setdefault((fraction, said), []).append(path)
    if lost:
        (dtype, said), paths = next(iter(lost.items()))
        least = smallest_fraction(dtype)
        checks.warn(
            f"{where}: the decay rounds to nothing: {argument} is {said}, and optax.apply_updates keeps "
            f"no change of less than {least:.3g} (2**{math.log2(least):.0f}) of a {dtype} weight: "
            f"{_named(paths, sum(map(len, lost.values())))}. {remedy(dtype)}"
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


def _largest(term: Term, probed: dict[int, Any]) -> tuple[float, str]:
    """The largest fraction in any step, also in words; 0 if it isn't known."""
    schedules = [factor for factor in term.factors if callable(factor)]
    known = term._replace(factors=tuple(factor for factor in term.factors if not callable(factor))).known()
    if known is None or np.size(known) == 0:
        return 0.0, ""
    fractions = np.full(len(_COUNTS), np.max(known))
    for schedule in schedules:
        if id(schedule) not in probed:
            probed[id(schedule)] = values_of(schedule, _COUNTS)
        values = probed[id(schedule)]
        if values is None or values.shape != fractions.shape or not jnp.can_cast(values.dtype, np.float64):
            return 0.0, ""
        fractions = fractions * values.astype(np.float64)
    at = int(np.argmax(fractions))
    if at == len(_COUNTS) - 1:  # It rises without end, and a run ends somewhere.
        return 0.0, ""
    largest = float(fractions[at])
    said = f"{largest:g} a step"
    if schedules:
        said = f"at most {said} (at count {_COUNTS[at]}, of {len(_COUNTS)} that were tried)"
    return largest, said


def remedy(dtype: Any) -> str:
    """The advice for a decay that rounds to nothing in this dtype."""
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


def _named(paths: Sequence[str], total: int) -> str:
    others = total - len(paths)
    return listed(paths, 3) + (f" and {others} at other rates" if others else "")
