"""Constraints: the nearest weights that obey them, each in closed form. `constrain` puts weights there after each step.

A constraint does not depend on the optimizer. It is a set of arrays. Most constraints have a radius, which `constrain`
takes.

| constraint | weights that obey it | the nearest ones |
|---|---|---|
| `L2Ball(per=-1)` | norm of each group <= radius | w radius / \\|\\|w\\|\\| where the norm is larger |
| `L2Sphere(per=-1)` | norm of each group = radius | w radius / \\|\\|w\\|\\| |
| `L1Ball()` | sum \\|w\\| of each group <= radius | soft thresholding by the number that gives this sum |
| `SpectralBall()` | largest singular value <= radius | larger singular values become the radius |
| `NonNegative()` | w >= 0 | max(w, 0) |

Complex weights: \\|w\\| is the modulus. `NonNegative` is for real weights.
"""

import dataclasses
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax

from ._engine.groups import Groups, SplitGroups
from ._engine.matrices import Matrices, above, mapped, singular_values
from ._engine.norms import direction


@runtime_checkable
class Constraint(Protocol):
    """A constraint for `constrain`: any object with a `project`.

    `project(w, radius)` must return the nearest array to `w` that obeys the constraint, in the shape of `w`. If there
    is a method `norm(w)`, it gives the smallest radius that `w` obeys, and the radius may be "init". If each element
    has a constraint of its own, set `is_elementwise = True`; then radii may be arrays. If there is no radius, set
    `has_radius = False`; then `project` gets None.

    Place:  `constrain`, which moves the weights w, where the optimizer puts them, to project(w, radius).

    Example:

        >>> import jax, jax.numpy as jnp, wdjax
        >>> class Box:
        ...     is_elementwise = True
        ...     def project(self, w: jax.Array, radius: jax.Array) -> jax.Array:
        ...         return jnp.clip(w, -radius, radius)
        >>> isinstance(Box(), wdjax.constraints.Constraint)
        True
        >>> box = wdjax.constrain(Box(), 1.0)
        >>> box.update(jnp.array([0.5]), box.init(jnp.array([0.75])), jnp.array([0.75]))[0].tolist()
        [0.25]
    """

    def project(self, w: jax.Array, radius: Any) -> jax.Array: ...


@dataclasses.dataclass(frozen=True, repr=False)
class L2Ball(SplitGroups):
    """Weights whose norm is at most the radius: the norm of each unit (max-norm), or of the whole array.

    Choose the parameters with a mask: without one, `per=-1` holds each number of a bias within plus or minus the
    radius. `norm(w)` returns the norm of each group, with its axes kept, with size 1: `L2Ball(per=-1).norm(kernel)`.

    Rule:   w <- w * radius / ||w|| in each group with ||w|| > radius
    Place:  `constrain`.
    Args:
        axis: the axes that the norm of a group is taken over, an integer or a tuple, as in Keras. The other axes index
            the groups.
        per: the axes that index the groups: one group for each index along them. The norm is over all other axes.
            `per=-1` is one group for the incoming weights of each unit, in Flax, Haiku and Keras; in Equinox and
            PyTorch write `per=0`. Give `axis` or `per`. With neither, the whole array is one group. For layers in a
            stack, both count the axes of one layer.
        axis_name: as for `GroupLasso`.

    Raises: as `GroupLasso`.
    Units:  the radius is in units of the weights.
    Source: Srivastava et al. 2014 (max-norm of units, beside dropout). Keras' `MaxNorm(r, axis=a)` is
            `L2Ball(axis=a)` with a radius of r, except that Keras divides by the norm plus 1e-7. For a dense kernel,
            `axis=0` and `per=-1` are the same.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> wdjax.L2Ball(per=-1).project(jnp.array([[3.0, 0.1], [4.0, 0.2]]), 1.0).tolist()
        [[0.6000000238418579, 0.10000000149011612], [0.800000011920929, 0.20000000298023224]]
    """

    def project(self, w: jax.Array, radius: Any) -> jax.Array:
        size = self.norm(w)
        return jnp.where(size <= radius, w, direction(w, size) * radius)


@dataclasses.dataclass(frozen=True, repr=False)
class L2Sphere(SplitGroups):
    """Weights whose norm equals the radius: the norm of each unit, or of the whole array (its Frobenius norm).

    A group of zeros has no direction, so it stays zero. Choose the parameters with a mask: without one, `per=-1` makes
    each number of a bias the radius or minus the radius. `norm(w)` returns the norm of each group, with its axes kept,
    with size 1.

    Rule:   w <- w * radius / ||w|| in each group
    Place:  `constrain`.
    Args:
        axis, per, axis_name: the groups, as for `L2Ball`.

    Raises: as `GroupLasso`.
    Units:  the radius is in units of the weights.
    Source: Salimans & Kingma 2016 (weight normalization, which learns the radius); nGPT, arXiv 2410.01131, for unit
            norms after each step; Hyperball, arXiv 2606.16899, for the norm at init. Keras' `UnitNorm(axis=a)` is
            `L2Sphere(axis=a)` with a radius of 1, except that Keras divides by the norm plus 1e-7.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> wdjax.L2Sphere().project(jnp.array([3.0, 4.0]), 10.0).tolist()
        [6.0, 8.0]
    """

    def project(self, w: jax.Array, radius: Any) -> jax.Array:
        return direction(w, self.norm(w)) * radius


@dataclasses.dataclass(frozen=True, repr=False)
class L1Ball(Groups):
    """Weights whose absolute values add up to at most the radius. Small weights become exactly zero.

    `norm(w)` returns the sum of the absolute values of each group, with its axes kept, with size 1.

    Rule:   w <- sign(w) * max(|w| - t, 0) in each group with sum |w| > radius, with the t that makes it the radius
    Place:  `constrain`.
    Args:
        axis, per: the groups, as for `L2Ball`. Within `shard_map`, a group must be on one device.

    Raises: as `GroupLasso`.
    Units:  the radius is in units of the weights.
    Source: Tibshirani 1996 (the lasso in its constrained form); Duchi et al. 2008 for the projection by sorting.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> wdjax.L1Ball().project(jnp.array([3.0, -1.0, 0.5]), 2.0).tolist()
        [2.0, -0.0, 0.0]
    """

    def norm(self, w: jax.Array) -> jax.Array:
        """The sum of absolute values of each group. The axes of the sum are kept, with size 1."""
        return jnp.sum(jnp.abs(w), self.axes(w.ndim), keepdims=True)

    def project(self, w: jax.Array, radius: Any) -> jax.Array:
        # Optax's projection_l1_ball has no groups, gives NaN for a radius of 0, and fails for float32 in 64-bit mode.
        moduli, size = jnp.abs(w), self.norm(w)
        axes = self.axes(w.ndim)
        first = [axis for axis in range(w.ndim) if axis not in axes]
        groups = jnp.transpose(moduli, (*first, *axes)).reshape(self.groups(w.shape))
        radii = jnp.broadcast_to(radius, size.shape).reshape(size.size, 1)
        # What is left of each group are its largest weights, each smaller by the same number.
        largest = -jnp.sort(-groups, -1)
        number = jnp.arange(1, 1 + largest.shape[-1], dtype=moduli.dtype)[None]
        is_left = largest * number > jnp.cumsum(largest, -1) - radii
        count = jnp.maximum(jnp.sum(is_left, -1, keepdims=True), 1).astype(moduli.dtype)
        is_left = (number <= count) | jnp.isnan(largest)  # A fault shows in the whole group.
        threshold = (jnp.sum(jnp.where(is_left, largest, 0), -1, keepdims=True) - radii) / count
        return jnp.where(size <= radius, w, jnp.sign(w) * jnp.maximum(moduli - jnp.reshape(threshold, size.shape), 0))


@dataclasses.dataclass(frozen=True, repr=False)
class SpectralBall(Matrices):
    """Matrices whose largest singular value is at most the radius. Singular values above it become the radius.

    `norm(w)` returns the largest singular value.

    Rule:   w = U diag(s) V^T <- U diag(min(s, radius)) V^T
    Place:  `constrain`.
    Args:
        per: the axes of the outputs; all other axes are the inputs. It matters for arrays with more than two axes. The
            default, `per=-1`, makes a convolution (height, width, inputs, outputs) a matrix with height * width *
            inputs rows. In Equinox and PyTorch write `per=0`, and for Flax's query, key and value (features, heads,
            size of a head) `per=(1, 2)`. For layers in a stack, it counts the axes of one layer.

    Raises: TypeError for an invalid axis; on use, ValueError if one side has no axes, as for a vector. Leave vectors
            out with a mask.
    Units:  the radius is a singular value: the largest factor by which the matrix can lengthen a vector.
    Source: Sedghi, Gupta & Long 2019 and arXiv 2507.13338 (the spectral cap, there by an approximation). Here it is
            exact, by a singular value decomposition in each step. It is not differentiable where a singular value
            equals the radius. With the radius "init", `init` decomposes every matrix, also those that the mask leaves
            out; `optax.masked` hides them.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> wdjax.SpectralBall().project(jnp.array([[3.0, 0.0], [0.0, 0.5]]), 1.0).tolist()
        [[1.0, 0.0], [0.0, 0.5]]
    """

    def norm(self, w: jax.Array) -> jax.Array:
        """The largest singular value, with as many axes as `w`."""
        matrix, _ = self.as_matrix(w)
        return jnp.reshape(jnp.max(singular_values(matrix), initial=0), (1,) * w.ndim)

    def project(self, w: jax.Array, radius: Any) -> jax.Array:
        matrix, back = self.as_matrix(w)
        return w - back(mapped(above, matrix, jnp.reshape(jnp.asarray(radius, jnp.finfo(w.dtype).dtype), ())))


@dataclasses.dataclass(frozen=True)
class NonNegative:
    """Weights that are not negative. Negative ones become zero. It takes no radius.

    Rule:   w <- max(w, 0)
    Place:  `constrain`, without a radius: `constrain(NonNegative(), mask=mask)`.
    Units:  those of the weights; there is no radius.
    Source: Lawson & Hanson 1974 (nonnegative least squares); Keras' `NonNeg`.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> wdjax.NonNegative().project(jnp.array([2.0, -1.0])).tolist()
        [2.0, 0.0]
    """

    is_elementwise: ClassVar[bool] = True
    has_radius: ClassVar[bool] = False

    def project(self, w: jax.Array, radius: None = None) -> jax.Array:
        if jnp.iscomplexobj(w):
            raise TypeError("NonNegative: complex weights have no sign. Use a mask to select real weights.")
        return optax.projections.projection_non_negative(w)


def is_ours(kind: Any) -> bool:
    """Whether the constraint is one of this module: never changed, so that jit may keep what it compiled for it."""
    return type(kind).__module__ == __name__
