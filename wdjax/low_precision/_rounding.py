"""Which leaves are of low precision, and their rounding, in float32 arithmetic that no compiler takes out."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def is_low(leaf: Any) -> bool:
    """Whether the leaf is real, floating and has less than 32 bits."""
    return is_narrow(leaf) and jnp.finfo(leaf.dtype).bits < 32


def is_narrow(leaf: Any) -> bool:
    """Whether the leaf is real, floating and has less than 64 bits."""
    dtype = getattr(leaf, "dtype", None)
    is_floating = isinstance(dtype, np.dtype) and jnp.issubdtype(dtype, jnp.floating)
    return is_floating and jnp.finfo(dtype).bits < 64


def two_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The rounded sum, and what rounding took from it: together they are a + b exactly."""
    total = a + b
    return total, remainder(total, a, b)


def remainder(total: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """a + b - total, exactly, for a total next to their sum."""
    part = total - a
    return (a - (total - part)) + (b - part)


def rounded(x: jax.Array, dtype: Any, lost: Any = 0.0, fraction: jax.Array | None = None) -> jax.Array:
    """x + lost as a number of `dtype`, in float32: the nearest, or with a fraction the next one up where that carries.

    It is done in arithmetic, since compilers may take out a conversion to a narrower dtype and back.
    """
    spacing, inverse = spacing_of(x, dtype)
    steps = x * inverse
    if fraction is None:
        steps = jnp.round(steps)
    else:
        whole = jnp.floor(steps)
        steps = whole + jnp.floor((steps - whole) + lost * inverse + fraction)
    # What is finite stays finite; what is beyond the dtype is left to the conversion.
    largest = float(jnp.finfo(dtype).max)
    return jnp.where(jnp.abs(x) <= largest, jnp.clip(steps * spacing, -largest, largest), x)


def spacing_of(x: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """The distance of the neighbours of x in `dtype`, and its inverse, in float32."""
    info = jnp.finfo(dtype)
    # Both are powers of two, so that their exponents can be written into the bits of a float32.
    exponent = (jax.lax.bitcast_convert_type(x, jnp.int32) >> 23) & 255
    exponent = jnp.maximum(exponent, max(int(info.minexp) + 127, int(info.nmant) + 1)) - int(info.nmant)
    bits = exponent << 23, (254 - exponent) << 23
    spacing, inverse = (jax.lax.bitcast_convert_type(each, jnp.float32) for each in bits)
    return spacing, inverse


def step_to(p: jax.Array, target: jax.Array, step: jax.Array) -> jax.Array:
    """The update, in float32, with which `optax.apply_updates` lands on the target; no bit changes without a step."""
    p = p.astype(jnp.float32)
    return jnp.where((target == p) | (step == 0), jnp.float32(-0.0), target - p)
