"""Bounds of `cpr` that are taken from the weights themselves, in some step of the training.

Each has a method `due`, a schedule: -1 in most steps. In the steps in which the bound may be taken, it is the multiple
of the penalty to take.
"""

import dataclasses
import numbers
from typing import Any

import jax
import jax.numpy as jnp

from .._engine import checks
from .._engine.text import shown
from .._engine.types import Number


@dataclasses.dataclass(frozen=True)
class AtInit:
    """A bound for `cpr`: a multiple of the penalty of the weights before the first step.

    Attributes:
        factor: the multiple, a number >= 0 or a 0-d array, which may be traced. A factor below 1 shrinks the weights.
            It is in units of the penalty: 0.8 of L2 is a norm of 0.89.

    Raises: ValueError or TypeError for another factor.

    Example:

        >>> import wdjax
        >>> bounded = wdjax.on_weights.cpr(wdjax.L2(), wdjax.on_weights.AtInit(0.8))
    """

    factor: Number = 1.0

    def __post_init__(self) -> None:
        factor = checks.number("AtInit", "factor", self.factor, "AtInit(0.8)", "a number >= 0")
        object.__setattr__(self, "factor", factor)

    def due(self, count: jax.Array) -> jax.Array:
        return jnp.where(count == 0, self.factor, -1.0)


@dataclasses.dataclass(frozen=True)
class WarmStart:
    """A bound for `cpr`: the penalty of the weights after some steps. Until then nothing is regularized.

    Attributes:
        steps: a whole number > 0. The authors take one to four times the steps in which the learning rate warms up.

    Raises: ValueError for another number of steps.

    Example:

        >>> import wdjax
        >>> bounded = wdjax.on_weights.cpr(wdjax.L2(), wdjax.on_weights.WarmStart(1000))
    """

    steps: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", _steps("WarmStart", "steps", self.steps, "WarmStart(1000)"))

    def due(self, count: jax.Array) -> jax.Array:
        return jnp.where(count == self.steps, 1.0, -1.0)


@dataclasses.dataclass(frozen=True)
class InflectionPoint:
    """A bound for `cpr`: the penalty of the weights when it begins to grow more slowly. No regularization until then.

    Each parameter has its own step. With R_t the penalty after t steps, smoothed over steps, and d_k its growth from
    step (k - 1) * every to step k * every, the bound is the penalty itself in the first step k * every in which
    d_k < d_{k-1}. This is in step 3 * every, or later.

    Attributes:
        every: the number of steps between two looks, a whole number > 0.
        smoothing: the share of the old value in the moving average of the penalty, from 0 to less than 1. The memory of
            about 1 / (1 - smoothing) steps should be shorter than `every`, and longer than the noise.

    Raises: ValueError for other numbers.

    Example:

        >>> import wdjax
        >>> bounded = wdjax.on_weights.cpr(wdjax.L2(), wdjax.on_weights.InflectionPoint(every=200))
    """

    every: int = 200
    smoothing: float = 0.99

    def __post_init__(self) -> None:
        object.__setattr__(self, "every", _steps("InflectionPoint", "every", self.every, "InflectionPoint(every=200)"))
        is_number = isinstance(self.smoothing, numbers.Real) and not isinstance(self.smoothing, bool)
        if not is_number or not 0 <= self.smoothing < 1:
            raise ValueError(
                f"InflectionPoint: smoothing must be a number from 0 to less than 1, got {shown(self.smoothing)}. "
                "Write InflectionPoint(every=200, smoothing=0.99)."
            )
        object.__setattr__(self, "smoothing", float(self.smoothing))

    def due(self, count: jax.Array) -> jax.Array:
        return jnp.where((count > 0) & (count % self.every == 0), 1.0, -1.0)


TAKEN = (AtInit, WarmStart, InflectionPoint)


def _steps(where: str, name: str, value: Any, write: str) -> int:
    if not checks.is_whole(value) or not 0 < value < 2**31:  # The count of updates is an int32.
        raise ValueError(f"{where}: {name} must be an integer from 1 to 2**31 - 1, got {shown(value)}. Write {write}.")
    return int(value)
