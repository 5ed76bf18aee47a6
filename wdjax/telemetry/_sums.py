"""The sums of one array, and the metrics that the sums of a group of arrays make.

Everything that reads an array is a plain sum here. Several in one reduction would read it once on a CPU too, but add up
one number after the other (1% is lost in ten million), and are gathered where arrays are sharded; plain sums XLA adds
up in trees, fuses with each other on GPUs and TPUs, and reduces over all shards at once.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._action import Term, away, cast, compute_dtype, product
from ..low_precision._rounding import is_low, rounded

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
    """The sums of one array, or of the arrays of a group; of complex products the real parts."""

    size: Any  # numbers in the array
    weight: Any  # <p, p>
    update: Any  # <u, u>
    step: Any  # <step, step>, the step as it lands
    along: Any  # <step, p>
    away: Any = 0.0  # <p - toward, p - toward>, of what decays
    decay: Any = 0.0  # <d, d>
    landed: Any = 0.0  # <step - step without the decay, d>
    moving: Any = 0.0  # how many weights the decay should move
    lost: Any = 0.0  # how many of them land where they would without it


def metrics(s: Sums) -> dict[str, jax.Array]:
    """The metrics of the groups, from their sums."""
    weight, update, decay = (jnp.sqrt(x) for x in (s.weight, s.update, s.decay))
    radial = _ratio(s.along, weight)
    # The part of the step across the weights, whose tangent is precise for small angles, as the cosine is not.
    across = jnp.sqrt(jnp.maximum(s.step - radial**2, 0.0))
    return {
        "weight_norm": weight,
        "weight_rms": jnp.sqrt(_ratio(s.weight, s.size)),
        "update_norm": update,
        "decay_norm": decay,
        "decay_to_update": _ratio(decay, update),
        "angular_update": jnp.where(weight == 0, 0.0, jnp.arctan2(across, weight + radial)),
        "effective_rate": _ratio(decay, jnp.sqrt(s.away)),
        "shrinkage": _ratio(-s.along, s.weight),
        "rounded_away": _ratio(s.lost, s.moving),
        "decay_landed": _ratio(s.landed, s.decay),
    }


def _ratio(part: jax.Array, whole: jax.Array) -> jax.Array:
    return jnp.where(whole == 0, 0.0, part / jnp.where(whole == 0, 1.0, whole))


def sums(update: Any, param: Any, term: Term | None, is_written: bool) -> Sums:
    """The sums of one array. Each is a plain sum: several in one reduction would lose digits, or be gathered."""
    dtype = compute_dtype(update, param)
    # Nothing here is to be differentiated, whoever differentiates the step.
    w, u = (jax.lax.stop_gradient(cast(x, dtype)) for x in (param, update))
    narrow, narrow_update = jnp.result_type(param), jnp.result_type(update)
    u = _as(u, narrow_update)  # XLA may hand on more digits than the dtype of the update has.
    after = _as(w + u, narrow)
    square = _dot(u, u)
    measured = Sums(w.size, _dot(w, w), square, square, _dot(u, w))
    if is_low(param):
        step = after - w
        measured = measured._replace(step=_dot(step, step), along=_dot(step, w))
    if term is None:
        return measured
    rate, axis = product(term.factors, dtype)
    rate = jax.lax.stop_gradient(rate)
    if axis is not None:
        rate = rate.reshape([-1 if i == axis % w.ndim else 1 for i in range(w.ndim)])
    pull = away(w, None if term.anchor is None else jax.lax.stop_gradient(cast(term.anchor, dtype)))
    decay = rate * pull
    distance = measured.weight if term.anchor is None else _dot(pull, pull)
    size = rate**2 * distance if axis is None else _dot(decay, decay)
    measured = measured._replace(away=distance, decay=size)
    moving = (rate > 0) & (pull != 0)
    if is_written:
        return measured._replace(moving=_count(moving), landed=size)
    without = _as(w + _as(u + decay, narrow_update), narrow)
    lost = moving & (after == without)
    return measured._replace(landed=_dot(without - after, decay), moving=_count(moving), lost=_count(lost))


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.sum((a * jnp.conj(b)).real if jnp.iscomplexobj(a) else a * b)


def _count(flags: jax.Array) -> jax.Array:
    return jnp.sum(flags.astype(jnp.float32))


def _as(x: jax.Array, dtype: Any) -> jax.Array:
    """x rounded to the numbers of a dtype, in arithmetic: a conversion there and back may be taken out."""
    if jnp.iscomplexobj(x) or jnp.finfo(dtype).bits >= jnp.finfo(x.dtype).bits:
        return x
    if is_low(np.empty(0, dtype)):
        return cast(rounded(x.astype(jnp.float32), dtype), x.dtype)
    return jax.lax.reduce_precision(x, 8, 23)
