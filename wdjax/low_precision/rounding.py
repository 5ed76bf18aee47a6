"""Finds leaves of low precision, and rounds to their dtypes in float32 arithmetic that no compiler removes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._engine import trees

EXPONENT = 255 << 23  # Where float32 has its exponent.


def is_low(leaf: Any) -> bool:
    """Whether the leaf has a real floating dtype with less than 32 bits."""
    return is_narrow(leaf) and jnp.finfo(leaf.dtype).bits < 32


def is_narrow(leaf: Any) -> bool:
    """Whether the leaf has a real floating dtype with less than 64 bits."""
    dtype = None if trees.is_hole(leaf) else getattr(leaf, "dtype", None)
    is_floating = isinstance(dtype, np.dtype) and jnp.issubdtype(dtype, jnp.floating)
    return is_floating and jnp.finfo(dtype).bits < 64


def two_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The rounded sum and its rounding error. Together they are a + b exactly."""
    total = a + b
    return total, remainder(total, a, b)


def remainder(total: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """a + b - total, exactly, for a total close to a + b."""
    part = total - a
    return (a - (total - part)) + (b - part)


def rounded(x: jax.Array, dtype: Any, lost: Any = 0.0, fraction: jax.Array | None = None) -> jax.Array:
    """x rounded to the values of `dtype`, as float32: to nearest; with a fraction, x + lost + fraction rounded down.

    The fraction is in units of the spacing. The rounding is arithmetic, because compilers may remove a conversion to a
    narrower dtype and back.
    """
    steps = in_spacings(x, x, dtype)
    if fraction is None:
        steps = jnp.round(steps)
    else:
        whole = jnp.floor(steps)
        steps = whole + jnp.floor((steps - whole) + in_spacings(lost, x, dtype) + fraction)
    # Finite values stay finite. Values beyond the range of the dtype are left to the conversion.
    largest = float(jnp.finfo(dtype).max)
    return jnp.where(jnp.abs(x) <= largest, jnp.clip(times_spacing(steps, x, dtype), -largest, largest), x)


def in_spacings(x: jax.Array, of: jax.Array, dtype: Any) -> jax.Array:
    """x in units of the distance between the neighbors of `of` in `dtype`."""
    # The inverse of the largest binade is subnormal, twice the inverse is not.
    twice = _from_bits(EXPONENT - _binade(of, dtype))
    return x * twice * 2.0 ** (int(jnp.finfo(dtype).nmant) - 1)


def times_spacing(steps: jax.Array, of: jax.Array, dtype: Any) -> jax.Array:
    """The inverse of `in_spacings`. The distance may be subnormal, but neither of the two factors is."""
    return steps * 2.0 ** -int(jnp.finfo(dtype).nmant) * _from_bits(_binade(of, dtype))


def _binade(x: jax.Array, dtype: Any) -> jax.Array:
    """The bits of the power of two at or below |x|, or of the smallest normal number of `dtype`, in float32."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32) & EXPONENT
    return jnp.clip(bits, (int(jnp.finfo(dtype).minexp) + 127) << 23, 254 << 23)


def _from_bits(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


@jax.custom_jvp
def step_to(p: jax.Array, target: jax.Array, step: jax.Array) -> jax.Array:
    """The float32 update with which `optax.apply_updates` lands on the target. If the step is 0, no bit changes.

    Its derivative is that of the step, as if nothing were rounded.
    """
    p = p.astype(jnp.float32)
    return jnp.where((target == p) | (step == 0), jnp.float32(-0.0), target - p)


@step_to.defjvp
def _step_to_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return step_to(*primals), tangents[2]
