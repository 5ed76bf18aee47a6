"""The penalties of matrices: sums over singular values, and the distance from orthonormal columns."""

import dataclasses
import operator
from typing import Any

import jax
import jax.numpy as jnp

from .._engine import checks
from .._engine.matrices import Matrices, below, mapped, product, singular_values, total
from .._engine.norms import direction, norm, square
from .._engine.text import shown


@dataclasses.dataclass(frozen=True, repr=False)
class NuclearNorm(Matrices):
    """The sum of singular values: matrices of low rank.

    It is to singular values as L1 is to weights. Its proximal step makes small singular values zero, so that the rank
    falls. For a matrix with one row or one column, it is `GroupLasso`.

    Rule:   value(w) = sum of s; gradient(w) = U V^T; prox(w, k) = U diag(max(s - k, 0)) V^T. Here w = U diag(s) V^T,
            and the gradient leaves out singular values of zero.
    Place:  `proximal_step`, if the rank should fall. In `penalty` and `add_penalty_to_grads` singular values come close
            to zero and rarely land on it.
    Units:  of a weight: each singular value is pulled to zero with the same strength, whatever its size.
    Source: Cai, Candes & Shen 2010 for the proximal map; Watson 1992 for the gradient, which is the subgradient of the
            smallest norm. Singular values below the rounding error of the largest count as zero in it. After a step,
            the rank is exact up to the rounding of the weights.

    Args:
        per: the axes of the outputs, as for `SpectralBall`. Within `shard_map`, a matrix must be whole on each device.

    Raises: TypeError for an invalid axis; on use, ValueError if one side has no axes, as for a vector. Leave vectors
            out with a mask.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> w = jnp.array([[3.0, 0.0], [0.0, 0.5]])
        >>> kind = wdjax.penalties.NuclearNorm()
        >>> float(kind.value(w)), kind.prox(w, 1.0).tolist()
        (3.5, [[2.0, 0.0], [0.0, 0.0]])
    """

    def value(self, w: jax.Array) -> jax.Array:
        matrix, _ = self.as_matrix(w)
        return total(jnp.sum, _signs, matrix, _tolerance(matrix))

    def gradient(self, w: jax.Array) -> jax.Array:
        matrix, back = self.as_matrix(w)
        return back(mapped(_signs, matrix, _tolerance(matrix)))

    def prox(self, w: jax.Array, step: jax.Array) -> jax.Array:
        matrix, back = self.as_matrix(w)
        return w - back(mapped(below, matrix, _scalar(step, w)))


@dataclasses.dataclass(frozen=True, repr=False)
class SpectralNorm(Matrices):
    """Half the square of the largest singular value: a decay of this singular value alone.

    If several singular values are the largest, `gradient` is a subgradient: the mean over their vectors.

    Rule:   value(w) = s^2 / 2; gradient(w) = s u v^T, with the largest singular value s and its vectors u and v.
            prox(w, k) caps the singular values at t, where the parts above t add up to k t.
    Place:  any that takes a penalty: `penalty`, `add_penalty_to_grads`, `proximal_step`.
    Units:  with the factor 1/2, as `L2`: of the largest singular value, gradient descent removes the fraction
            learning_rate * strength in a step.
    Source: Yoshida & Miyato 2017, arXiv 1705.10941 (abstract). Deviation: by default the vectors are exact. The usual
            code makes one power iteration in each step, from the vector of the last step. A penalty has no state, so
            `iterations` starts from the same random vector in each step, and more are needed.

    Args:
        per: the axes of the outputs, as for `SpectralBall`. Within `shard_map`, a matrix must be whole on each device.
        iterations: how many power iterations find the vectors in `value` and `gradient`: two products of the matrix
            with a vector in each, in place of a singular value decomposition. An iteration multiplies the error of the
            vectors by (s_2 / s)^2, with the second largest singular value s_2. Until then the value is too small,
            and the gradient pulls on several large singular values. Derivatives take the vectors as constants. With
            None, `value` and `gradient` decompose, as `prox` always does.

    Raises: as `NuclearNorm`; also TypeError or ValueError if `iterations` is not None or an integer >= 1.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> w = jnp.array([[3.0, 0.0], [0.0, 1.0]])
        >>> kind = wdjax.penalties.SpectralNorm()
        >>> float(kind.value(w)), kind.gradient(w).tolist(), kind.prox(w, 0.5).tolist()
        (4.5, [[3.0, 0.0], [0.0, 0.0]], [[2.0, 0.0], [0.0, 1.0]])
    """

    iterations: int | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations is not None:
            object.__setattr__(self, "iterations", _count(self.iterations))

    def value(self, w: jax.Array) -> jax.Array:
        matrix, _ = self.as_matrix(w)
        if self.iterations is None:
            return total(_half_square, _largest, matrix, _scalar(0, matrix))
        return 0.5 * jnp.sum(square(product(matrix, _vector(matrix, self.iterations))))

    def gradient(self, w: jax.Array) -> jax.Array:
        matrix, back = self.as_matrix(w)
        if self.iterations is None:
            return back(mapped(_largest, matrix, _scalar(0, matrix)))
        v = _vector(matrix, self.iterations)
        return back(product(product(matrix, v)[:, None], jnp.conj(v)[None]))

    def prox(self, w: jax.Array, step: jax.Array) -> jax.Array:
        matrix, back = self.as_matrix(w)
        s, step = singular_values(matrix), _scalar(step, w)
        # The level that holds for the n largest values is greatest for the right n.
        levels = jnp.cumsum(s) / (step + jnp.arange(1, 1 + s.size, dtype=s.dtype))
        return w - back(mapped(_above, matrix, jnp.max(levels, initial=0)))


@dataclasses.dataclass(frozen=True, repr=False)
class Orthogonality(Matrices):
    """The distance of the columns from orthonormal ones, or of the rows if there are fewer: singular values near one.

    Rule:   value(w) = ||W^T W - I||^2 / 4; gradient(w) = W (W^T W - I), for the matrix W with no more columns than rows
            that w or its transpose is. The sum over singular values of (s^2 - 1)^2 / 4.
    Place:  `penalty` and `add_penalty_to_grads`. It has no prox, so `proximal_step` refuses it.
    Units:  with the factor 1/4: near orthonormal columns, gradient descent removes the fraction
            2 * learning_rate * strength of s - 1 in a step. It diverges if
            learning_rate * strength * (s^2 - 1) > 2 for some s. In float32 the value overflows for s above 4e9.
    Source: soft orthogonality, in Bansal et al. 2018, arXiv 1810.09102 (abstract), without the factor 1/4. BigGAN's
            code (`default_ortho`) adds twice this gradient, always with the outputs as columns. Keras'
            `OrthogonalRegularizer` is another penalty: the mean absolute cosine between rows, whatever their norms.

    Args:
        per: the axes of the outputs, as for `SpectralBall`. Within `shard_map`, a matrix must be whole on each device.

    Raises: as `NuclearNorm`.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> w = jnp.array([[2.0, 0.0], [0.0, 1.0]])
        >>> kind = wdjax.penalties.Orthogonality()
        >>> float(kind.value(w)), kind.gradient(w).tolist()
        (2.25, [[6.0, 0.0], [0.0, 0.0]])
    """

    def value(self, w: jax.Array) -> jax.Array:
        matrix, _ = self.as_matrix(w)
        return 0.25 * jnp.sum(square(_excess(matrix)))

    def gradient(self, w: jax.Array) -> jax.Array:
        matrix, back = self.as_matrix(w)
        return back(product(matrix, _excess(matrix)))


def _excess(w: jax.Array) -> jax.Array:
    return product(jnp.conj(w.T), w) - jnp.eye(w.shape[1], dtype=w.dtype)


def _tolerance(w: jax.Array) -> jax.Array:
    return _scalar(max(w.shape) * float(jnp.finfo(w.dtype).eps), w)


def _signs(s: jax.Array, tolerance: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    signs = (s > tolerance * jnp.max(s, initial=0)).astype(s.dtype)
    return signs, jnp.zeros_like(s), jnp.zeros_like(s)


def _half_square(s: jax.Array) -> jax.Array:
    return 0.5 * jnp.max(s, initial=0) ** 2


def _largest(s: jax.Array, number: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    is_largest = (s == jnp.max(s, initial=0)).astype(s.dtype)
    share = is_largest / jnp.maximum(jnp.sum(is_largest), 1)
    return share * s, share, jnp.zeros_like(s)


def _above(s: jax.Array, level: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    # At a step of 0, the level is the largest singular value, up to rounding, and falls as the step grows.
    is_above = (s >= level * (1 - 16 * jnp.finfo(s.dtype).eps)).astype(s.dtype)
    return jnp.maximum(s - level, 0), is_above, -is_above


def _vector(w: jax.Array, iterations: int) -> jax.Array:
    """An approximation of the first right singular vector, as a constant."""
    every = tuple(range(w.ndim))
    unit = jax.lax.stop_gradient(direction(w, norm(w, every, ())))  # So no power overflows.

    def better(_: Any, v: jax.Array) -> jax.Array:
        v = product(jnp.conj(unit.T), product(unit, v))
        return direction(v, norm(v, (0,), ()))

    # Not orthogonal to any vector with a structure, as that of ones is to differences.
    start = jax.random.normal(jax.random.key(0), w.shape[1:], w.dtype)
    return jax.lax.fori_loop(1, iterations, better, better(0, start))


def _scalar(number: Any, w: jax.Array) -> jax.Array:
    """A number, or an array of one, in the real dtype of the matrix."""
    return jnp.reshape(jnp.asarray(number, jnp.finfo(w.dtype).dtype), ())


def _count(given: Any) -> int:
    write = "Write SpectralNorm(iterations=30), or leave it out for exact singular vectors."
    try:
        count = operator.index(given)
    except TypeError:
        count = None
    if count is None or isinstance(given, bool):
        raise TypeError(
            f"SpectralNorm: iterations must be an integer or None, got {shown(given)}. {write}"
            f"{checks.static('iterations', given)}"
        )
    if not 0 < count < 2**31:
        raise ValueError(f"SpectralNorm: iterations must be at least 1, and below 2**31, got {shown(given)}. {write}")
    return count
