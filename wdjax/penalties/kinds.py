"""The penalties that are sums over single weights."""

import dataclasses
import math
import numbers
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from .._engine import checks
from .._engine.norms import square
from .._engine.text import shown


@dataclasses.dataclass(frozen=True)
class L2:
    """Half the sum of squares: the penalty whose gradient is the weight itself.

    Rule:   value(w) = sum w^2 / 2; gradient(w) = w; prox(w, k) = w / (1 + k)
    Place:  any that takes a penalty: `penalty`, `add_penalty_to_grads`, `proximal_step`. Of the first two, `l2_penalty`
            and `add_l2_to_grads` do the same.
    Units:  with the factor 1/2. Keras' `l2(r)` lacks it, so r corresponds to the strength 2 r here.
    Source: Hoerl & Kennard 1970 (ridge regression); Krogh & Hertz 1991.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> w = jnp.array([3.0, -4.0])
        >>> float(wdjax.L2().value(w)), wdjax.L2().gradient(w).tolist(), wdjax.L2().prox(w, 1.0).tolist()
        (12.5, [3.0, -4.0], [1.5, -2.0])
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

    Rule:   value(w) = sum |w|; gradient(w) = sign(w); prox(w, k) = sign(w) max(|w| - k, 0)
    Place:  `proximal_step`, if weights should become exactly zero. In `penalty` and `add_penalty_to_grads` they come
            close to zero and rarely land on it.
    Units:  of a weight: the gradient is +-1 for any weight except zero, where it is 0.
    Source: Tibshirani 1996; Beck & Teboulle 2009 for the proximal step.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> w = jnp.array([3.0, -0.5])
        >>> float(wdjax.L1().value(w)), wdjax.L1().gradient(w).tolist(), wdjax.L1().prox(w, 1.0).tolist()
        (3.5, [1.0, -1.0], [2.0, -0.0])
    """

    is_elementwise: ClassVar[bool] = True

    def value(self, w: jax.Array) -> jax.Array:
        return jnp.sum(modulus(w))

    def gradient(self, w: jax.Array) -> jax.Array:
        return jnp.sign(w)

    def prox(self, w: jax.Array, step: jax.Array) -> jax.Array:
        return jnp.sign(w) * jnp.maximum(jnp.abs(w) - step, 0)


@dataclasses.dataclass(frozen=True)
class ElasticNet:
    """A mixture of L1 and L2, weighted as in scikit-learn's `ElasticNet(l1_ratio=...)`.

    Rule:   value(w) = r sum |w| + (1 - r) sum w^2 / 2; gradient(w) = r sign(w) + (1 - r) w; prox(w, k) = soft
            thresholding of w by k r, divided by 1 + k (1 - r). Here r is `l1_ratio`.
    Place:  as `L1`.
    Units:  those of `L1` and `L2`, mixed: one strength multiplies both.
    Source: Zou & Hastie 2005.

    Args:
        l1_ratio: the share of L1, from 0 (`L2()`) to 1 (`L1()`).

    Raises: ValueError if `l1_ratio` is not a number in [0, 1].

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> wdjax.ElasticNet(0.5).prox(jnp.array([3.0, -0.5]), 2.0).tolist()
        [1.0, -0.0]
    """

    l1_ratio: float = 0.5
    is_elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "l1_ratio", checked_ratio("ElasticNet", "L2", self.l1_ratio))

    def value(self, w: jax.Array) -> jax.Array:
        return self.l1_ratio * L1().value(w) + (1 - self.l1_ratio) * L2().value(w)

    def gradient(self, w: jax.Array) -> jax.Array:
        return self.l1_ratio * jnp.sign(w) + (1 - self.l1_ratio) * w

    def prox(self, w: jax.Array, step: jax.Array) -> jax.Array:
        return L1().prox(w, step * self.l1_ratio) / (1 + step * (1 - self.l1_ratio))


@dataclasses.dataclass(frozen=True)
class Huber:
    """L2 for small weights and L1 for large ones: a decay whose pull never exceeds `delta`.

    Rule:   value(w) = sum of w^2 / 2 where |w| <= delta, else delta (|w| - delta / 2); gradient(w) = w clipped to
            +-delta; prox(w, k) = w / (1 + k) where |w| <= (1 + k) delta, else w - k delta sign(w)
    Place:  any that takes a penalty: `penalty`, `add_penalty_to_grads`, `proximal_step`.
    Units:  as `L2` for weights up to delta. The strength times delta is the largest pull.
    Source: Huber 1964; as a decay, AdamHD (arXiv 2511.14721).

    Args:
        delta: the size, in units of a weight, where the quadratic becomes linear.

    Raises: ValueError if `delta` is not a positive finite number.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> wdjax.Huber(delta=1.0).gradient(jnp.array([0.5, -4.0])).tolist()
        [0.5, -1.0]
    """

    delta: float = 1.0
    is_elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not is_number(self.delta) or not 0 < checks.as_float(self.delta) < math.inf:
            raise ValueError(
                f"Huber: delta must be positive and finite, got {shown(self.delta)}. Write Huber(delta=1.0)."
            )
        object.__setattr__(self, "delta", float(self.delta))

    def value(self, w: jax.Array) -> jax.Array:
        size = modulus(w)
        return jnp.sum(jnp.where(size <= self.delta, 0.5 * square(w), self.delta * (size - 0.5 * self.delta)))

    def gradient(self, w: jax.Array) -> jax.Array:
        return jnp.where(jnp.abs(w) <= self.delta, w, self.delta * jnp.sign(w))

    def prox(self, w: jax.Array, step: jax.Array) -> jax.Array:
        inside = jnp.abs(w) <= (1 + step) * self.delta
        return jnp.where(inside, w / (1 + step), w - step * self.delta * jnp.sign(w))


def modulus(w: jax.Array) -> jax.Array:
    # JAX's derivative of |w| at zero is 1. We want 0, as for sign(w).
    return jnp.real(w * jnp.conj(jax.lax.stop_gradient(jnp.sign(w))))


def is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def checked_ratio(name: str, other: str, ratio: Any) -> float:
    """The share of L1 in a mixture with another penalty. A NumPy number would set the dtype of the result."""
    if not is_number(ratio) or not 0 <= ratio <= 1:
        raise ValueError(
            f"{name}: l1_ratio must be a number from 0 to 1, got {shown(ratio)}. "
            f"It splits one strength between L1 and {other}: write {name}(l1_ratio=0.5)."
        )
    return float(ratio)
