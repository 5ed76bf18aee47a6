"""Rates that change from step to step: those that follow the learning rate, and schedules of their own.

All of them may be called with a traced step, under strict dtype promotion, and with an array of steps to plot them.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from .._engine import checks
from .._engine.rates import rate_or_rules
from .._engine.rules import Rules
from .._engine.types import Number, Rate, Schedule
from ._numbers import positive, rate_of_learning, wide

Step = Any  # A number, or an array of integers.


@checks.known_arguments
def relative(weight_decay: Rate, learning_rate: Number | Schedule, *, peak: Number | None = None) -> Rate:
    """A weight decay that follows the shape of the learning rate, but not its size.

    Rule:   weight_decay * learning_rate(step) / peak
    Place:  the weight_decay of `independent_decay`.
    Units:  per step: with zero gradient, a step at the peak multiplies a weight by 1 - weight_decay. A sensible value
            is that of `decoupled_decay` times the peak.
    Source: Loshchilov & Hutter 2019, Algorithm 2, where the learning rate is alpha times the schedule multiplier and
            peak is alpha; big_vision's `wd`; `DecoupledAdamW` of MosaicML Composer.

    Args:
        weight_decay: a number or 0-d array (may be traced) >= 0, a schedule, a `by_path` table of these, or a tree of
            rates.
        learning_rate: the optimizer's learning rate: a number, a 0-d array or a schedule.
        peak: the largest value of a schedule. It is required for a schedule, because finding it would mean calling the
            schedule at every step. For a number, it may be left out, and then the result is weight_decay itself.

    Returns: a number for numbers, a table for a table, otherwise a schedule. Its dtype is that of the learning rate,
    but at least float32.
    Raises: TypeError, ValueError for a schedule without its peak, and for arguments that are not rates.

    Example:

        >>> import jax.numpy as jnp, optax, wdjax, wdjax.rates
        >>> schedule = optax.linear_schedule(0.5, 0.0, 10)
        >>> decay = wdjax.independent_decay(wdjax.rates.relative(0.1, schedule, peak=0.5))
        >>> optimizer = optax.chain(optax.adam(schedule), decay)
        >>> round(float(wdjax.rates.relative(0.1, schedule, peak=0.5)(5)), 6)
        0.05
    """
    return _following("relative", weight_decay, learning_rate, peak, 1)


@checks.known_arguments
def corrected(weight_decay: Rate, learning_rate: Number | Schedule, *, peak: Number | None = None) -> Rate:
    """A weight decay in proportion to the square of the learning rate, so that normalized weights keep their size.

    The size at which normalized weights settle depends on learning_rate / weight_decay. If only the learning rate
    falls, they shrink and their gradients grow. Here both fall together.

    Rule:   weight_decay * learning_rate(step)**2 / peak
    Place:  the weight_decay of `independent_decay`. Before the learning rate, write the same decay as
            `decoupled_decay(relative(weight_decay, learning_rate, peak=peak))`.
    Units:  weight_decay is that of AdamW, which the learning rate multiplies. The result is per step.
    Source: AdamC, arXiv 2506.02285; `corrected_weight_decay` of timm; `adamc_weight_decay` of levanter. Deviation: the
            paper corrects only layers that a normalization follows, and so does pytorch-optimizer's `AdamC`, in groups
            marked `normalized`. timm and levanter correct all that decays, as this does. To correct only
            normalized layers, use two decays, each with its own mask.

    Args, Returns, Raises: as `relative`. For a number without a peak, the result is weight_decay * learning_rate.

    Example:

        >>> import optax, wdjax, wdjax.rates
        >>> schedule = optax.linear_schedule(0.5, 0.0, 10)
        >>> optimizer = optax.chain(
        ...     optax.adam(schedule), wdjax.independent_decay(wdjax.rates.corrected(0.1, schedule, peak=0.5))
        ... )
        >>> round(float(wdjax.rates.corrected(0.1, schedule, peak=0.5)(5)), 6)
        0.0125
    """
    return _following("corrected", weight_decay, learning_rate, peak, 2)


def _following(where: str, weight_decay: Any, learning_rate: Any, peak: Any, power: int) -> Any:
    """weight_decay * learning_rate ** power / peak. The peak of a number is the number itself."""
    write = f"{where}(0.1, learning_rate, peak=1e-3)"
    rates = rate_or_rules(where, "weight_decay", weight_decay)
    eta = rate_of_learning(learning_rate, write)
    if peak is not None:
        peak = positive("peak", peak, write)
    elif callable(eta):
        raise ValueError(
            f"{where}: a learning-rate schedule needs its peak, the largest value that it takes, got peak=None. "
            f"Write {write}."
        )
    if not callable(eta):
        eta = wide(eta)
        if peak is None and power == 1:
            return rates
        return _times(where, rates, eta ** (power - 1) if peak is None else eta**power / _like(eta, peak))

    def shape(step: Step) -> jax.Array:
        value = wide(jnp.asarray(eta(step)))
        return value**power / _like(value, peak)

    return _times(where, rates, _named(where, shape))


def _times(where: str, rates: Any, shape: Any) -> Any:
    """The product of a rate and a number or schedule, which sets the dtype."""
    if isinstance(rates, Rules):
        return rates * shape
    if not callable(rates) and not callable(shape):
        return _like(shape, wide(rates)) * shape

    def product(step: Step) -> jax.Array:
        value = jnp.asarray(shape(step) if callable(shape) else shape)
        return _like(value, rates(step) if callable(rates) else rates) * value

    return _named(where, product)


def _named(name: str, schedule: Schedule) -> Schedule:
    """The schedule under a name, which `plan` shows."""
    schedule.__name__ = name  # pyright: ignore[reportFunctionMemberAccess]
    return schedule


def _like(array: Any, value: Any) -> Any:
    return jnp.asarray(value, array.dtype) if isinstance(array, jax.Array) else value


@checks.known_arguments
def cosine(start: Number, end: Number, steps: Number) -> Schedule:
    """A weight decay that goes from `start` to `end` along half a cosine, up or down, and stays there.

    Optax writes the same as `optax.cosine_decay_schedule(start, steps, alpha=end / start)`, which can't start at 0.

    Rule:   end + (start - end) * (1 + cos(pi * min(step / steps, 1))) / 2
    Place:  the weight_decay or strength of any place but the loss, which has no step.
    Units:  those of start and end.
    Source: DINOv2, whose weight decay goes from 0.04 to 0.4; nanochat, from 0.28 to 0.

    Args:
        start, end: numbers or 0-d arrays >= 0. Neither has to be the larger one.
        steps: the number of steps to the end, > 0.

    Returns: a schedule. Its values are float32, and exactly start and end at the ends.
    Raises: TypeError, ValueError for arguments that are not such numbers.

    Example:

        >>> import wdjax, wdjax.rates
        >>> schedule = wdjax.rates.cosine(0.04, 0.4, 100)
        >>> optimizer = wdjax.adamw(1e-3, schedule, wdjax.weights_only())
        >>> [round(float(schedule(step)), 4) for step in (0, 50, 100, 200)]
        [0.04, 0.22, 0.4, 0.4]
    """
    write = "cosine(0.04, 0.4, steps=100_000)"
    ends = [positive(name, value, write, or_zero=True) for name, value in (("start", start), ("end", end))]
    steps = positive("steps", steps, write)

    def schedule(step: Step) -> jax.Array:
        first, last = (jnp.asarray(value, jnp.float32) for value in ends)
        share = jnp.minimum(_float32(step) / _float32(steps), 1.0)
        bend = (1 + jnp.cos(math.pi * share)) / 2
        return first * bend + last * (1 - bend)

    return _named("cosine", schedule)


@checks.known_arguments
def log_time(weight_decay: Number, timescale: Number) -> Schedule:
    """A weight decay that falls as one over the number of steps, after a first `timescale` steps.

    The share of the run that AdamW averages over then stays the same while the run goes on.

    Rule:   weight_decay / (1 + step / timescale)
    Place:  as `cosine`.
    Units:  those of weight_decay.
    Source: ADANA, arXiv 2602.05298 (read in secondary sources and in code after it, not in the paper), where the rate
            is omega / (T / 10 + t) for a run of T steps: `log_time(10 * omega / T, T / 10)`. It also multiplies by the
            learning rate over its peak: `relative(log_time(...), learning_rate, peak=...)` in `independent_decay`.
            Deviation: the step counts from 0 as all schedules in Optax do, and from 1 in that code.

    Args:
        weight_decay: the rate at step 0: a number or 0-d array >= 0.
        timescale: the number of steps after which the rate is half of that, > 0.

    Returns: a schedule. Its values are float32.
    Raises: TypeError, ValueError for arguments that are not such numbers.

    Example:

        >>> import wdjax, wdjax.rates
        >>> schedule = wdjax.rates.log_time(0.1, 1000)
        >>> [round(float(schedule(step)), 6) for step in (0, 1000, 9000)]
        [0.1, 0.05, 0.01]
    """
    write = "log_time(0.1, timescale=1000)"
    rate = positive("weight_decay", weight_decay, write, or_zero=True)
    timescale = positive("timescale", timescale, write)

    def schedule(step: Step) -> jax.Array:
        return jnp.asarray(rate, jnp.float32) / (1 + _float32(step) / _float32(timescale))

    return _named("log_time", schedule)


def _float32(value: Any) -> jax.Array:
    return jnp.asarray(value).astype(jnp.float32)
