"""Matrices: an array as one, and functions of its singular values whose derivatives exist everywhere."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .groups import Groups, UnfitShapeError
from .text import shown


@dataclasses.dataclass(frozen=True, repr=False)
class Matrices(Groups):
    """The base of kinds that act on whole matrices. `SpectralBall` explains the field."""

    axis: None = dataclasses.field(default=None, init=False)
    per: int | tuple[int, ...] = dataclasses.field(default=-1, kw_only=True)

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "per", self._checked("per", self.per))
        except TypeError:
            raise TypeError(
                f"{self.called}: per must be an integer or a tuple of integers, got {shown(self.per)}. Write "
                f"{self.called}(per=-1) for matrices with the last axis on one side."
            ) from None

    def axes(self, ndim: int) -> tuple[int, ...]:
        return tuple(range(ndim))

    def as_matrix(self, w: jax.Array) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
        """The array as a matrix with no more columns than rows, and the way back."""
        rows = super().axes(w.ndim)
        columns = tuple(axis for axis in range(w.ndim) if axis not in rows)
        if not rows or not columns:
            raise UnfitShapeError(
                f"{self}: an array of shape {w.shape} is not a matrix. Use a mask to select matrices, such as "
                "weights_only() or only('kernel')."
            )
        order = (*rows, *columns) if _size(w, rows) >= _size(w, columns) else (*columns, *rows)
        moved = jnp.transpose(w, order)
        matrix = jnp.reshape(moved, sorted([_size(w, rows), _size(w, columns)], reverse=True))
        return matrix, lambda m: jnp.transpose(jnp.reshape(m, moved.shape), [order.index(i) for i in range(w.ndim)])


def _size(w: jax.Array, axes: tuple[int, ...]) -> int:
    return math.prod(w.shape[axis] for axis in axes)


def singular_values(w: jax.Array) -> jax.Array:
    """The singular values, the largest first."""
    return jnp.linalg.svd(w, compute_uv=False)


# A function of singular values: (values, number) -> (results, their slopes, their slopes in the number).
Function = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]


# The two parts of singular values. Subtract the part that goes: then only the change of the matrix is rounded.


def below(s: jax.Array, limit: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The part up to the limit. A matrix minus this one is its soft thresholding."""
    return jnp.minimum(s, limit), s <= limit, s > limit


def above(s: jax.Array, limit: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The part above the limit. A matrix minus this one has no larger singular values than the limit."""
    is_over = (s > limit).astype(s.dtype)
    return jnp.maximum(s - limit, 0), is_over, -is_over


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def mapped(function: Function, w: jax.Array, number: jax.Array) -> jax.Array:
    """U diag(function(s)) V^H for a matrix w = U diag(s) V^H; w itself if no singular value changes."""
    u, s, vh = jnp.linalg.svd(w, full_matrices=False)
    new, _, _ = function(s, number)
    return jnp.where(jnp.all(new == s), w, product(u * new[None], vh))


@mapped.defjvp
def _mapped_jvp(function: Function, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    # The derivative of the decomposition divides by differences of singular values. That of the mapped matrix has
    # divided differences of the new values instead (Daleckii & Krein), which exist also where values are equal.
    (w, number), (dw, dnumber) = primals, tangents
    u, s, vh = jnp.linalg.svd(w, full_matrices=False)
    uh, v = jnp.conj(u.T), jnp.conj(vh.T)
    new, slope, of_number = function(s, number)
    with jax.numpy_dtype_promotion("standard"):  # Real times complex.
        inner = product(uh, dw, v)
        even, odd = (inner + jnp.conj(inner.T)) / 2, (inner - jnp.conj(inner.T)) / 2
        of_even = _ratio(new[:, None] - new[None], s[:, None] - s[None], slope[:, None])
        of_odd = _ratio(new[:, None] + new[None], s[:, None] + s[None], slope[:, None])
        within = product(u, of_even * even + of_odd * odd, vh)
        beside = product((product(dw, v) - product(u, inner)) * _ratio(new, s, slope)[None], vh)
        return mapped(function, w, number), within + beside + dnumber * product(u * of_number[None], vh)


def _ratio(a: jax.Array, b: jax.Array, if_zero: jax.Array) -> jax.Array:
    return jnp.where(b == 0, jnp.asarray(if_zero, a.dtype), a / jnp.where(b == 0, 1, b))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def total(value: Callable[[jax.Array], jax.Array], slope: Function, w: jax.Array, number: jax.Array) -> jax.Array:
    """value(s) for the singular values s of a matrix. Its gradient is U diag(slope(s)) V^H."""
    return value(singular_values(w))


@total.defjvp
def _total_jvp(
    value: Callable[[jax.Array], jax.Array], slope: Function, primals: Any, tangents: Any
) -> tuple[jax.Array, jax.Array]:
    (w, number), (dw, _) = primals, tangents
    gradient = mapped(slope, w, number)
    return total(value, slope, w, number), jnp.sum(jnp.real(jnp.conj(gradient) * dw))


def product(*matrices: jax.Array) -> jax.Array:
    """The product of matrices. Each float32 product is one of float32 numbers, also where the default is less."""
    return functools.reduce(functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST), matrices)
