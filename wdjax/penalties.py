"""Penalties: a value, its gradient, and its proximal map, each in closed form.

A penalty does not depend on the place where it acts. The same object serves in the loss (its `value`), in the gradient
(its `gradient`), and on the weights after the step (its `prox`). The place sets the strength. All three methods get one
array and compute in its dtype. `gradient` and `prox` keep its shape.

| penalty | value(w) | gradient(w) | prox(w, k) |
|---|---|---|---|
| `L2()` | sum w^2 / 2 | w | w / (1 + k) |
| `L1()` | sum \\|w\\| | sign(w) | sign(w) max(\\|w\\| - k, 0) |
| `ElasticNet(r)` | r L1 + (1 - r) L2 | r sign(w) + (1 - r) w | prox of L1 at k r, divided by 1 + k (1 - r) |
| `GroupLasso(per=-1)` | sum over groups of \\|\\|w\\|\\| | w / \\|\\|w\\|\\| | w max(1 - k / \\|\\|w\\|\\|, 0) |
| `Huber(delta)` | w^2 / 2, linear beyond delta | w clipped to +-delta | that of L2; for large w, w - k delta sign(w) |

Complex weights: |w| is the modulus, sign(w) is w / |w|.
"""

import dataclasses
import functools
import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from ._engine import mesh_axes
from ._engine.arithmetic import LeafRule, Strength, stateless
from ._engine.text import shown


@runtime_checkable
class Penalty(Protocol):
    """A penalty for the loss and for the gradient: any object with a `value`.

    `value(w)` maps an array to a scalar and must be differentiable. If there is a method `gradient(w)`, it replaces the
    derivative of `value`: to save time, or to choose a subgradient at a corner. If the penalty is a sum over elements,
    set `is_elementwise = True`. Then strengths may be arrays.
    """

    def value(self, w: jax.Array) -> jax.Array: ...


@runtime_checkable
class ProximalPenalty(Protocol):
    """A penalty for `proximal_step`: any object with a `prox`.

    `prox(w, step)` must return the argmin over v of |v - w|^2 / 2 + step * value(v). If the penalty is a sum over
    elements, set `is_elementwise = True`. Then strengths, and so `step`, may be arrays.
    """

    def prox(self, w: jax.Array, step: jax.Array) -> jax.Array: ...


def gradient(kind: Any, w: jax.Array) -> jax.Array:
    """The gradient of a penalty, as a direction of ascent. Without a method `gradient`, it is derived from `value`."""
    if callable(getattr(kind, "gradient", None)):
        return _like(kind, "gradient", kind.gradient(w), w.shape)
    return jnp.conj(jax.grad(lambda w: _like(kind, "value", kind.value(w), ()))(w))


def prox(kind: Any, w: jax.Array, step: jax.Array) -> jax.Array:
    """The proximal map of a penalty."""
    return _like(kind, "prox", kind.prox(w, step), w.shape)


def _like(kind: Any, method: str, result: Any, shape: tuple[int, ...]) -> Any:
    if np.shape(result) != shape:
        raise ValueError(
            f"{shown(kind)}: {method} must return an array of shape {shape}, but it returned the shape "
            f"{np.shape(result)}."
        )
    return result


def weighted_value(where: str, kind: Any, w: jax.Array, strength: Strength) -> jax.Array:
    """The sum of strength times value over the parts of an array, each of which has one strength."""
    check_strength(where, kind, strength.value)
    parts = _parts(strength.value)
    held = [name for name, x in getattr(kind, "__dict__", {}).items() if np.ndim(x)]
    if parts and held and not is_ours(kind):
        raise ValueError(
            f"{where}: {shown(kind)} holds an array, {held[0]!r}, and is called for each part of a parameter whose "
            "strength is an array. Multiply that array into the strength."
        )
    if not strength.is_known:  # Where the rate is 0, an infinite weight must not make NaN of it.
        w = jnp.where((strength.value == 0) & ~jnp.isfinite(w), 0, w)

    def value(w: jax.Array) -> jax.Array:
        return _like(kind, "value", kind.value(jnp.expand_dims(w, parts)), ())

    for _ in parts:
        value = jax.vmap(value)
    sizes = [np.shape(strength.value)[axis] for axis in parts]
    return jnp.sum(jnp.reshape(strength.value, sizes) * value(jnp.moveaxis(w, parts, range(len(parts)))))


def _parts(strength: Any) -> list[int]:
    """The axes along which a strength differs."""
    return [axis for axis, size in enumerate(np.shape(strength)) if size != 1]


def is_ours(kind: Any) -> bool:
    """Whether the penalty is one of this file: never changed, so that jit may keep what it compiled for it."""
    return type(kind) in (L2, L1, ElasticNet, GroupLasso, Huber)


def is_elementwise(kind: Any) -> bool:
    """Whether a penalty says that it is a sum over elements."""
    return getattr(kind, "is_elementwise", False)


def check_strength(where: str, kind: Any, strength: Any) -> None:
    """Raises an error if the strength differs within a part that the penalty does not split into a sum."""
    parts = _parts(strength)
    if not parts or is_elementwise(kind):
        return
    if isinstance(kind, GroupLasso) and not set(parts) & set(kind.axes(np.ndim(strength))):
        return
    raise ValueError(
        f"{where}: a strength of shape {np.shape(strength)} differs within a group of {shown(kind)}. Give one strength "
        "for each group, with axes of size 1. If a penalty of your own is a sum over elements, set is_elementwise = "
        "True."
    )


@dataclasses.dataclass(frozen=True)
class L2:
    """Half the sum of squares: the penalty whose gradient is the weight itself.

    Units:  with the factor 1/2. Keras' `l2(r)` lacks it, so r corresponds to the strength 2 r here.
    Source: Hoerl & Kennard 1970 (ridge regression); Krogh & Hertz 1991.
    """

    is_elementwise: ClassVar[bool] = True

    def value(self, w: jax.Array) -> jax.Array:
        return 0.5 * jnp.sum(_square(w))

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


@dataclasses.dataclass(frozen=True, repr=False)
class GroupLasso:
    """The sum of the norms of groups of weights: whole groups become zero together.

    Layouts differ, so say which axes index the groups. `per=-1` makes one group of all weights of an output unit or
    channel, for a dense kernel (inputs, outputs) and a convolution (height, width, inputs, outputs) alike: the layout
    of Flax and Haiku. In Equinox and PyTorch outputs come first, (outputs, inputs, height, width): write `per=0`. In a
    bias, each number is then a group of its own. To leave biases out, use a mask.

    Args:
        axis: the axes to take a norm over, if you would rather name these. The other axes index the groups. With
            neither `axis` nor `per`, the whole array is one group.
        per: the axes that index the groups: one group for each index along them. The norm is over all other axes. For
            layers in a stack, both count the axes of one layer.
        axis_name: within `shard_map`, the mesh axis, or a tuple of axes, that splits the axes of a norm. Norms then
            cover the whole array. An array that is known to be the same on all devices of that axis counts once. With
            check_vma=False nothing is known, and every array counts as split. Under `jit` leave it out: there a norm
            always covers the whole array. If the mesh axis splits only axes that index groups, leave it out, too.

    Raises: TypeError for an invalid axis or axis name; ValueError for both `axis` and `per`, and on use, if an array or
            the mesh lacks the axis.
    Units:  of a weight; not scaled by the square root of the group size. The gradient of a zero group is zero.
    Source: Yuan & Lin 2006. The norm is computed at three scales, as in Blue 1978, so that it never overflows or
            underflows.

    Example:

        >>> import wdjax
        >>> dense, convolution = (64, 32), (3, 3, 64, 32)  # 32 outputs each, in Flax
        >>> wdjax.GroupLasso(per=-1).groups(dense), wdjax.GroupLasso(per=-1).groups(convolution)
        ((32, 64), (32, 576))
        >>> wdjax.GroupLasso(axis=-1).groups(convolution)  # the norm over the outputs: one group for each input weight
        (576, 32)
        >>> wdjax.GroupLasso(per=0).groups((32, 64, 3, 3))  # 32 outputs in Equinox
        (32, 576)
    """

    axis: int | tuple[int, ...] | None = None
    per: int | tuple[int, ...] | None = dataclasses.field(default=None, kw_only=True)
    axis_name: Any = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        mesh_axes.names("GroupLasso", self.axis_name)
        for name in ("axis", "per"):
            given = getattr(self, name)
            if given is None:
                continue
            try:
                axes = tuple(map(operator.index, given)) if isinstance(given, tuple) else operator.index(given)
            except TypeError:
                raise TypeError(
                    f"GroupLasso: {name} must be an integer, a tuple of integers or None, got {shown(given)}. "
                    "Write GroupLasso(per=-1) for one group for each index along the last axis, or GroupLasso(axis=0)."
                ) from None
            object.__setattr__(self, name, axes)
        if self.axis is not None and self.per is not None:
            raise ValueError(
                f"GroupLasso: axis={self.axis} names the axes of a norm and per={self.per} the others, so give one of "
                f"them. Write GroupLasso(per={self.per}) or GroupLasso(axis={self.axis})."
            )

    def __repr__(self) -> str:
        fields = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return f"GroupLasso({', '.join(f'{name}={value!r}' for name, value in fields if value is not None)})"

    def axes(self, ndim: int) -> tuple[int, ...]:
        """The axes of a norm, for an array with `ndim` axes."""
        name, given = ("axis", self.axis) if self.per is None else ("per", self.per)
        if given is None:
            return tuple(range(ndim))
        named = given if isinstance(given, tuple) else (given,)
        axes = tuple(axis % ndim for axis in named if -ndim <= axis < ndim)
        if len(set(axes)) < len(named):
            fault = "names an axis twice" if len(axes) == len(named) else "is out of range"
            raise ValueError(
                f"GroupLasso: {name}={given} {fault} for a {ndim}-dimensional array. "
                "Use a mask to select arrays with that axis, such as only('kernel')."
            )
        return axes if self.per is None else tuple(axis for axis in range(ndim) if axis not in axes)

    def groups(self, shape: Sequence[int]) -> tuple[int, int]:
        """How many groups an array of this shape has, and how many weights are in each."""
        of_norm = self.axes(len(shape))
        others = (size for axis, size in enumerate(shape) if axis not in of_norm)
        return math.prod(others), math.prod(shape[axis] for axis in of_norm)

    def _norm(self, w: jax.Array) -> jax.Array:
        split = mesh_axes.split_over("GroupLasso", w, mesh_axes.names("GroupLasso", self.axis_name))
        return _norm(w, self.axes(w.ndim), split)

    def value(self, w: jax.Array) -> jax.Array:
        return jnp.sum(self._norm(w))

    def gradient(self, w: jax.Array) -> jax.Array:
        return _direction(w, self._norm(w))

    def prox(self, w: jax.Array, step: jax.Array) -> jax.Array:
        norm = self._norm(w)
        return w * jnp.where(norm <= step, 0, 1 - step / jnp.where(norm <= step, 1, norm))


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
        return jnp.sum(jnp.where(size <= self.delta, 0.5 * _square(w), self.delta * (size - 0.5 * self.delta)))

    def gradient(self, w: jax.Array) -> jax.Array:
        return jnp.where(jnp.abs(w) <= self.delta, w, self.delta * jnp.sign(w))

    def prox(self, w: jax.Array, step: jax.Array) -> jax.Array:
        inside = jnp.abs(w) <= (1 + step) * self.delta
        return jnp.where(inside, w / (1 + step), w - step * self.delta * jnp.sign(w))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _norm(w: jax.Array, axes: tuple[int, ...], split: mesh_axes.Names) -> jax.Array:
    """The norm over some axes, which are kept, and over the mesh axes that split them, with one sum over the devices.

    Scaling by the largest weight would be simpler, but would need a second communication. Instead it sums the squares
    at three scales: as they are, and with the weights times a small and a large power of two. One of the sums neither
    overflows nor underflows.
    """
    wide = w if jnp.finfo(w.dtype).bits >= 32 else w.astype(jnp.float32)
    info = jnp.finfo(wide.dtype)
    power = int(0.7 * info.maxexp)
    scales = jnp.array([2.0**-power, 1.0, 2.0**power], info.dtype).reshape(3, *[1] * w.ndim)
    squares = jnp.sum(_square(wide[None] * scales.astype(wide.dtype)), tuple(axis + 1 for axis in axes), keepdims=True)
    large, plain, small = mesh_axes.total(squares, split)
    is_large, is_small = jnp.isinf(plain), plain < 2.0 ** (-info.maxexp // 2)
    root = jnp.sqrt(jnp.where(is_large, large, jnp.where(is_small, small, plain)))
    norm = root * jnp.where(is_large, 2.0**power, jnp.where(is_small, 2.0**-power, 1.0)).astype(info.dtype)
    return norm.astype(jnp.finfo(w.dtype).dtype)


@_norm.defjvp
def _norm_jvp(
    axes: tuple[int, ...], split: mesh_axes.Names, primals: Any, tangents: Any
) -> tuple[jax.Array, jax.Array]:
    (w,), (dw,) = primals, tangents
    norm = _norm(w, axes, split)
    along = jnp.sum(jnp.real(jnp.conj(_direction(w, norm)) * dw), axes, keepdims=True)
    return norm, mesh_axes.total(along, split)


def _direction(w: jax.Array, norm: jax.Array) -> jax.Array:
    """w / norm; zero for a zero group, where the norm has no derivative."""
    return jnp.where(norm == 0, 0, w / jnp.where(norm == 0, 1, norm))


def _square(w: jax.Array) -> jax.Array:
    return jnp.real(w * jnp.conj(w))


def _modulus(w: jax.Array) -> jax.Array:
    # JAX's derivative of |w| at zero is 1. We want 0, as for sign(w).
    return jnp.real(w * jnp.conj(jax.lax.stop_gradient(jnp.sign(w))))


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def rule_of(kind: Any, function: Any) -> LeafRule:
    """The rule of a place for a penalty: (update, param, anchor, strength) -> update."""
    return stateless(function, is_elementwise=is_elementwise(kind), is_kept=is_ours(kind))


def check_kind(where: str, kind: Any, *needs: str) -> None:
    """Raises an error, in the name of the function `where`, if a penalty has none of the methods in `needs`."""
    if not isinstance(kind, type) and any(callable(getattr(kind, method, None)) for method in needs):
        return
    name = kind.__name__ if isinstance(kind, type) else {"l1": "L1", "l2": "L2"}.get(str(kind).lower(), "L2")
    raise TypeError(
        f"{where}: kind must be a penalty with the method {' or '.join(needs)}, got {shown(kind)}. "
        f"Write {where}({name}(), ...), with {name} from wdjax; a penalty of your own needs that method."
    )
