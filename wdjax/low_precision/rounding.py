"""Finds leaves of low precision, and rounds to their dtypes in float32 arithmetic that no compiler removes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._engine import trees


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
    spacing, inverse = spacing_of(x, dtype)
    steps = x * inverse
    if fraction is None:
        steps = jnp.round(steps)
    else:
        whole = jnp.floor(steps)
        steps = whole + jnp.floor((steps - whole) + lost * inverse + fraction)
    # Finite values stay finite. Values beyond the range of the dtype are left to the conversion.
    largest = float(jnp.finfo(dtype).max)
    return jnp.where(jnp.abs(x) <= largest, jnp.clip(steps * spacing, -largest, largest), x)


def spacing_of(x: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """The distance between the neighbors of x in `dtype`, and its inverse, in float32."""
    info = jnp.finfo(dtype)
    # Both are powers of two, so their exponents can be written into the bits of a float32.
    exponent = (jax.lax.bitcast_convert_type(x, jnp.int32) >> 23) & 255
    exponent = jnp.maximum(exponent, max(int(info.minexp) + 127, int(info.nmant) + 1)) - int(info.nmant)
    bits = exponent << 23, (254 - exponent) << 23
    return jax.lax.bitcast_convert_type(bits[0], jnp.float32), jax.lax.bitcast_convert_type(bits[1], jnp.float32)


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
