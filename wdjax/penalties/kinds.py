"""The penalties that are sums over single weights."""

import dataclasses
import math
import numbers
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from .._engine.norms import square
from .._engine.text import shown


@dataclasses.dataclass(frozen=True)
class L2:
    """Half the sum of squares: the penalty whose gradient is the weight itself.

    Units:  with the factor 1/2. Keras' `l2(r)` lacks it, so r corresponds to the strength 2 r here.
    Source: Hoerl & Kennard 1970 (ridge regression); Krogh & Hertz 1991.
    """

    is_elementwise: ClassVar[bool] = True

    def value(self, w: jax.Array) -> jax.Array:
        return 0.5 * jnp.sum(square(w))

    def gradient(self, w: jax.Array) -> jax.Array:
        return w

    def prox(self, w: jax.Array, step: jax.Array) -> jax.Array:
        return w / (1 + step)


@dataclasses.dataclass(frozen=True)
class L1:
    """The sum of absolute values. Its proximal map is soft thresholding, which makes exact zeros.

    Units:  of a weight: the gradient is +-1 for any weight except zero, where it is 0.
    Source: Tibshirani 1996; Beck & Teboulle 2009 for the proximal step.
    """

    is_elementwise: ClassVar[bool] = True

    def value(self, w: jax.Array) -> jax.Array:
        return jnp.sum(_modulus(w))

    def gradient(self, w: jax.Array) -> jax.Array:
        return jnp.sign(w)

    def prox(self, w: jax.Array, step: jax.Array) -> jax.Array:
        return jnp.sign(w) * jnp.maximum(jnp.abs(w) - step, 0)


@dataclasses.dataclass(frozen=True)
class ElasticNet:
    """A mixture of L1 and L2, weighted as in scikit-learn's `ElasticNet(l1_ratio=...)`.

    Args:
        l1_ratio: the share of L1, from 0 (`L2()`) to 1 (`L1()`).

    Raises: ValueError if `l1_ratio` is not a number in [0, 1].
    Source: Zou & Hastie 2005.
    """

    l1_ratio: float = 0.5
    is_elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not _is_number(self.l1_ratio) or not 0 <= self.l1_ratio <= 1:
            raise ValueError(
                f"ElasticNet: l1_ratio must be a number from 0 to 1, got {shown(self.l1_ratio)}. "
                "It splits one strength between L1 and L2: write ElasticNet(l1_ratio=0.5)."
            )

    def value(self, w: jax.Array) -> jax.Array:
        return self.l1_ratio * L1().value(w) + (1 - self.l1_ratio) * L2().value(w)

    def gradient(self, w: jax.Array) -> jax.Array:
        return self.l1_ratio * jnp.sign(w) + (1 - self.l1_ratio) * w

    def prox(self, w: jax.Array, step: jax.Array) -> jax.Array:
        return L1().prox(w, step * self.l1_ratio) / (1 + step * (1 - self.l1_ratio))


@dataclasses.dataclass(frozen=True)
class Huber:
    """L2 for small weights and L1 for large ones: a decay whose pull never exceeds `delta`.

    Args:
        delta: the size, in units of a weight, where the quadratic becomes linear.

    Raises: ValueError if `delta` is not a positive finite number.
    Source: Huber 1964; as a decay, AdamHD (arXiv 2511.14721).
    """

    delta: float = 1.0
    is_elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not _is_number(self.delta) or not 0 < self.delta < math.inf:
            raise ValueError(
                f"Huber: delta must be positive and finite, got {shown(self.delta)}. Write Huber(delta=1.0)."
            )

    def value(self, w: jax.Array) -> jax.Array:
        size = _modulus(w)
        return jnp.sum(jnp.where(size <= self.delta, 0.5 * square(w), self.delta * (size - 0.5 * self.delta)))

    def gradient(self, w: jax.Array) -> jax.Array:
        return jnp.where(jnp.abs(w) <= self.delta, w, self.delta * jnp.sign(w))

    def prox(self, w: jax.Array, step: jax.Array) -> jax.Array:
        inside = jnp.abs(w) <= (1 + step) * self.delta
        return jnp.where(inside, w / (1 + step), w - step * self.delta * jnp.sign(w))


def _modulus(w: jax.Array) -> jax.Array:
    # JAX's derivative of |w| at zero is 1. We want 0, as for sign(w).
    return jnp.real(w * jnp.conj(jax.lax.stop_gradient(jnp.sign(w))))


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
