"""Warnings at `init` about known rates that are too small to have an effect, or so large that they overshoot."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from . import checks
from .arithmetic import Term


def warn_of_rates(where: str, argument: str, decays: Iterable[tuple[str, Any, Term]], *, can_overshoot: bool) -> None:
    """Warns of fractions per step that round to nothing, and of those that overshoot, unless no large rate can.

    `decays` holds a path, a dtype and the fraction, the product of `argument`. A fraction that has no value yet (a
    schedule, a traced rate) is skipped; `audit` sees it.
    """
    lost: dict[tuple[str, float], list[str]] = {}
    beyond: dict[float, list[str]] = {}
    for path, dtype, term in decays:
        fractions = term.known()
        if fractions is None or np.size(fractions) == 0:
            continue
        fraction = float(np.max(fractions))
        if 0 < fraction < smallest_fraction(dtype):
            lost.setdefault((jnp.dtype(dtype).name, fraction), []).append(path)
        elif fraction >= 1 and can_overshoot:
            beyond.setdefault(fraction, []).append(path)
    if lost:
        (dtype, fraction), paths = next(iter(lost.items()))
        least = smallest_fraction(dtype)
        checks.warn(
            f"{where}: the decay rounds to nothing: {argument} is {fraction:g} a step, and optax.apply_updates keeps "
            f"no change of less than {least:.3g} (2**{math.log2(least):.0f}) of a {dtype} weight: "
            f"{_named(paths, sum(map(len, lost.values())))}. {remedy(dtype)}"
        )
    if beyond:
        fraction = max(beyond)
        paths = beyond[fraction]
        does = "moves weights to zero (or their anchor) at once" if fraction == 1 else "moves weights past zero"
        never_settles = ", as far again or farther, so they never settle" if fraction >= 2 else ""
        checks.warn(
            f"{where}: {argument} is {fraction:g} a step, which {does}{never_settles}: "
            f"{_named(paths, sum(map(len, beyond.values())))}. Is a factor missing? If the rate is intended, "
            "use continuous_decay(...) or proximal_step(L2(), ...), which never overshoot."
        )


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
    shown = ", ".join(map(repr, paths[:3]))
    return shown if total <= 3 else f"{shown} and {total - min(3, len(paths))} more"
