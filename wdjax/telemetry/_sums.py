"""The sums of one array, and the metrics of a group of arrays, computed from their sums.

Each array is read only for a few sums, which are taken together. On accelerators, and with several devices, each is a
plain sum: XLA fuses the sums of one array, adds in trees, and reduces all sums over all shards at once. On a single CPU
XLA would write one loop for each sum. So there they are one reduction with several operands, which would need a gather
if the array were sharded.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._engine.arithmetic import Term, away, cast, compute_dtype
from ..low_precision.rounding import is_low, rounded

METRICS = (
    "weight_norm",
    "weight_rms",
    "update_norm",
    "decay_norm",
    "decay_to_update",
    "angular_update",
    "effective_rate",
    "shrinkage",
    "rounded_away",
    "decay_landed",
)


class Sums(NamedTuple):
    """The sums of one array, or of the arrays of a group. Complex products count with their real parts."""

    size: Any  # numbers in the array
    weight: Any  # <p, p>
    update: Any  # <u, u>
    step: Any  # <step, step>, the step as it lands
    along: Any  # <step, p>
    away: Any = 0.0  # <p - toward, p - toward>, over the weights that decay
    decay: Any = 0.0  # <d, d>
    landed: Any = 0.0  # <step - step without the decay, d>
    moving: Any = 0.0  # how many weights the decay should move
    lost: Any = 0.0  # how many of these land where they would land without the decay


def metrics(s: Sums) -> dict[str, jax.Array]:
    """The metrics of the groups, from their sums."""
    weight, update, decay = (jnp.sqrt(x) for x in (s.weight, s.update, s.decay))
    radial = ratio(s.along, weight)
    # The part of the step orthogonal to the weights. The tangent is precise for small angles; the cosine is not.
    across = jnp.sqrt(jnp.maximum(s.step - radial**2, 0.0))
    return {
        "weight_norm": weight,
        "weight_rms": jnp.sqrt(ratio(s.weight, s.size)),
        "update_norm": update,
        "decay_norm": decay,
        "decay_to_update": ratio(decay, update),
        "angular_update": jnp.where(weight == 0, 0.0, jnp.arctan2(across, weight + radial)),
        "effective_rate": ratio(decay, jnp.sqrt(s.away)),
        "shrinkage": ratio(-s.along, s.weight),
        "rounded_away": ratio(s.lost, s.moving),
        "decay_landed": ratio(s.landed, s.decay),
    }


def ratio(part: jax.Array, whole: jax.Array) -> jax.Array:
    return jnp.where(whole == 0, 0.0, part / jnp.where(whole == 0, 1.0, whole))


def sums(update: Any, param: Any, term: Term | None, is_written: bool, decay: Any = None) -> Sums:
    """The sums of one array; nothing is lost if a writer sets the array.

    `term` has the rate and the anchor of the decay in the update. If the decay itself is given, the rate is not used.
    """
    dtype = compute_dtype(update, param)
    real = jnp.finfo(dtype).dtype
    # Metrics have no gradient, even if the caller differentiates the step.
    w, u = (jax.lax.stop_gradient(cast(x, dtype)) for x in (param, update))
    narrow, narrow_update = jnp.result_type(param), jnp.result_type(update)
    u = _as(u, narrow_update)  # XLA may pass on more digits than the dtype of the update has.
    after = _as(w + u, narrow)
    each = {"weight": _product(w, w), "update": _product(u, u), "along": _product(u, w)}
    if is_low(param):
        step = after - w
        each |= {"step": _product(step, step), "along": _product(step, w)}
    rate = None
    if term is not None:
        pull = away(w, None if term.anchor is None else jax.lax.stop_gradient(cast(term.anchor, dtype)))
        if decay is None:
            rate = jax.lax.stop_gradient(term.strength(dtype).value)
            decay, moving = rate * pull, (rate > 0) & (pull != 0)
        else:
            decay = jax.lax.stop_gradient(cast(decay, dtype))
            moving = decay != 0
        each["moving"] = moving.astype(real)
        if term.anchor is not None:
            each["away"] = _product(pull, pull)
        if rate is None or np.ndim(rate):
            each["decay"] = _product(decay, decay)
        if not is_written:
            without = _as(w + _as(u + decay, narrow_update), narrow)
            each["landed"] = _product(without - after, decay)
            each["lost"] = (moving & (after == without)).astype(real)
    total = dict(zip(each, _totals(tuple(each.values())), strict=True))
    total.setdefault("step", total["update"])
    if term is not None:
        total.setdefault("away", total["weight"])
        if rate is not None:
            total.setdefault("decay", rate**2 * total["away"])
        total.setdefault("landed", total["decay"])
    return Sums(w.size, **total)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return (a * jnp.conj(b)).real if jnp.iscomplexobj(a) else a * b


@jax.jit
def _totals(arrays: tuple[jax.Array, ...]) -> Sequence[jax.Array]:
    """The sum of each of several arrays of one shape and dtype."""
    if jax.device_count() > 1:
        return _one_by_one(*arrays)
    return jax.lax.platform_dependent(*arrays, cpu=_in_one_loop, default=_one_by_one)


def _one_by_one(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(map(jnp.sum, arrays))


def _in_one_loop(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Sums the rows first. Adding ten million numbers one by one in float32 would lose 1% of the sum."""
    size = arrays[0].size
    root = max(math.isqrt(size), 1)
    width = next((width for width in range(root, 8 * root) if size % width == 0), root)
    whole = size - size % width
    zeros = (jnp.zeros([], arrays[0].dtype),) * len(arrays)

    def total(parts: Sequence[jax.Array], axis: int) -> Sequence[jax.Array]:
        return jax.lax.reduce(tuple(parts), zeros, lambda a, b: tuple(map(jax.lax.add, a, b)), (axis,))

    rows = total([x.ravel()[:whole].reshape(-1, width) for x in arrays], 1)
    rest = total([x.ravel()[whole:] for x in arrays], 0)
    return tuple(jnp.sum(x) + y for x, y in zip(rows, rest, strict=True))


def _as(x: jax.Array, dtype: Any) -> jax.Array:
    """Rounds x to the numbers of a dtype by arithmetic, because XLA may remove a conversion there and back."""
    if jnp.iscomplexobj(x) or jnp.finfo(dtype).bits >= jnp.finfo(x.dtype).bits:
        return x
    if is_low(np.empty(0, dtype)):
        return cast(rounded(x.astype(jnp.float32), dtype), x.dtype)
    return jax.lax.reduce_precision(x, 8, 23)
