"""Norms over some axes of an array that neither overflow nor underflow, also over devices."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from . import mesh_axes


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def norm(w: jax.Array, axes: tuple[int, ...], split: mesh_axes.Names) -> jax.Array:
    """The norm over some axes, which are kept, and over the mesh axes that split them, with one sum over the devices.

    Scaling by the largest weight would be simpler, but would need a second communication. Instead it sums the squares
    at three scales: as they are, and with the weights times a small and a large power of two. One of the sums neither
    overflows nor underflows.
    """
    wide = w if jnp.finfo(w.dtype).bits >= 32 else w.astype(jnp.float32)
    info = jnp.finfo(wide.dtype)
    power = int(0.7 * info.maxexp)
    scales = jnp.array([2.0**-power, 1.0, 2.0**power], info.dtype).reshape(3, *[1] * w.ndim)
    squares = jnp.sum(square(wide[None] * scales.astype(wide.dtype)), tuple(axis + 1 for axis in axes), keepdims=True)
    large, plain, small = mesh_axes.total(squares, split)
    is_large, is_small = jnp.isinf(plain), plain < 2.0 ** (-info.maxexp // 2)
    root = jnp.sqrt(jnp.where(is_large, large, jnp.where(is_small, small, plain)))
    found = root * jnp.where(is_large, 2.0**power, jnp.where(is_small, 2.0**-power, 1.0)).astype(info.dtype)
    return found.astype(jnp.finfo(w.dtype).dtype)


@norm.defjvp
def _norm_jvp(
    axes: tuple[int, ...], split: mesh_axes.Names, primals: Any, tangents: Any
) -> tuple[jax.Array, jax.Array]:
    (w,), (dw,) = primals, tangents
    size = norm(w, axes, split)
    along = jnp.sum(jnp.real(jnp.conj(direction(w, size)) * dw), axes, keepdims=True)
    return size, mesh_axes.total(along, split)


def direction(w: jax.Array, size: jax.Array) -> jax.Array:
    """w / size, its norm; zero for a zero group, where the norm has no derivative."""
    # XLA multiplies by 1 / size, which is denormal, so perhaps zero, where the size is near the largest number.
    scale = jnp.where(size > 1, 0.125, 1).astype(size.dtype)
    return jnp.where(size == 0, 0, w * scale / jnp.where(size == 0, 1, size * scale))


def square(w: jax.Array) -> jax.Array:
    return jnp.real(w * jnp.conj(w))
