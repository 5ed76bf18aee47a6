"""The penalty that is a sum of powers of single weights."""

import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from .._engine import checks
from .._engine.text import shown
from .kinds import L1, is_number, modulus


@dataclasses.dataclass(frozen=True)
class Lp:
    """The sum of the p-th powers of the weights, divided by p: `L2()` for p = 2, `L1()` for p = 1.

    Rule:   value(w) = sum |w|^p / p; gradient(w) = sign(w) |w|^(p - 1); prox(w, k) = sign(w) v, where v is the largest
            solution of v + k v^(p - 1) = |w|. For p <= 1, v is zero if |w| <= c k^(1 / (2 - p)), with
            c = (2 - p) / (2 - 2p) ((2 - 2p) / p)^(1 / (2 - p)), and c = 1 for p = 1.
    Place:  for p < 2 `proximal_step`: weights never overshoot, and for p <= 1 they become zero. For p < 1 the gradient
            grows without bound near zero, so `penalty` and `add_penalty_to_grads` move small weights far beyond it.
    Units:  of a weight to the power p, with the factor 1/p. PAdam lacks it: its lambda_p is the strength
            p * lambda_p here. With zero gradient and small steps, |w|^(2 - p) falls by learning_rate * strength *
            (2 - p) per step: for p < 2 a weight is zero after finitely many steps (for p > 1 because it underflows),
            for p > 2 never.
    Source: Frank & Friedman 1993 (bridge regression). As a decay: pWD (arXiv 2404.10824, by its abstract and code).
            Deviation: pWD divides by 1 + k |w|^(p - 2), with w before the step. `proximal_step` solves the equation.
            They agree to first order in k. A weight of zero can move here; in pWD it is zero forever.

    Args:
        p: the power, a positive number. For p < 1 the penalty is not convex, and prox is the global minimum.

    Raises: ValueError if `p` is not a positive finite number.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> half = wdjax.penalties.Lp(0.5)
        >>> [round(float(v), 4) for v in half.prox(jnp.array([4.0, -1.4]), 1.0)]
        [3.4626, -0.0]
    """

    p: float
    is_elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not is_number(self.p) or not 0 < checks.as_float(self.p) < math.inf:
            raise ValueError(f"Lp: p must be a positive finite number, got {shown(self.p)}. Write Lp(p=1.5).")
        object.__setattr__(self, "p", float(self.p))

    def value(self, w: jax.Array) -> jax.Array:
        return jnp.sum(_of_nonzero(modulus(w), self.p)) / self.p

    def gradient(self, w: jax.Array) -> jax.Array:
        return jnp.sign(w) * _of_nonzero(jnp.abs(w), self.p - 1)

    def prox(self, w: jax.Array, step: jax.Array) -> jax.Array:
        if self.p == 1:
            return L1().prox(w, step)
        return _prox(w, jnp.asarray(step, jnp.finfo(w.dtype).dtype), self.p)


# The derivative follows from the equation, not from the iteration that solves it.
@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _prox(w: jax.Array, step: jax.Array, p: float) -> jax.Array:
    return w * _fraction(w, step, p)


@_prox.defjvp
def _prox_jvp(p: float, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (w, step), (dw, dstep) = primals, tangents
    t, sign = _fraction(w, step, p), jnp.sign(w)
    new = w * t
    # d new / d |w| = 1 / (1 + (p - 1) c t^(p - 2)), where c t^(p - 2) = (1 - t) / t.
    slope = t / ((2 - p) * t + (p - 1))
    along = (slope - t) * jnp.real(jnp.conj(sign) * dw) - slope * _of_nonzero(jnp.abs(new), p - 1) * dstep
    return new, t * dw + sign * along


def _fraction(w: jax.Array, step: jax.Array, p: float) -> jax.Array:
    """What the proximal map leaves of a weight: t in [0, 1] with t + c t^(p - 1) = 1, where c = step |w|^(p - 2).

    Newton's iteration starts above the solution of an increasing convex function, so it falls toward the solution and
    never passes it. The number of steps is enough for float64.
    """
    size = jnp.abs(w)
    if p >= 2:  # (b t)^m = c t^m, and b is finite where c overflows.
        m = p - 1
        return _root(jnp.where(step == 0, 0, _power(step, 1 / m) * _power(size, (p - 2) / m)), m)
    if p > 1:  # With x = c t^(p - 1), which is 1 - t: x + (x / c)^q = 1.
        q, most = 1 / (p - 1), jnp.finfo(w.dtype).eps ** -2  # If 1 / c is that large, t is 1.
        b = jnp.minimum(jnp.where(step == 0, most, _power(size, 2 - p) / step), most)
        x = _root(b, q)
        return jnp.where(x < 1 / p, 1 - x, _power(b * x, q))  # The one that rounding changes less.
    c = jnp.where(step == 0, 0, step * _power(size, p - 2))
    # Where 0 and the larger solution are equally low, t is `least`. That is the smallest t, except 0.
    least = (2 - 2 * p) / (2 - p)
    bound = p / (2 - p) * least ** (1 - p)
    within, t = jnp.minimum(c, bound), 1.0
    for _ in range(8):
        pull = within * _power(t, p - 1)
        t = jnp.maximum((1 - (2 - p) * pull) / (1 - (1 - p) * pull / t), least)
    return jnp.where(c >= bound, 0, t)


def _root(b: jax.Array, m: float) -> jax.Array:
    """The positive solution of x + (b x)^m = 1, for m >= 1."""
    x = jnp.minimum(1, 1 / b)
    for _ in range(6 + math.ceil(math.log(m) / 2)):
        high = _power(b * x, m)
        x = (1 + (m - 1) * high) / (1 + m * high / x)
    return x


def _of_nonzero(size: jax.Array, power: float) -> jax.Array:
    """The power; 0 at zero, where it may be infinite or have no derivative."""
    is_zero = size < jnp.finfo(size.dtype).tiny
    return jnp.where(is_zero, 0, _power(jnp.where(is_zero, 1, size), power))


def _power(x: Any, power: float) -> Any:
    return x ** (int(power) if power == int(power) else power)  # Whole powers are products, which are faster.
