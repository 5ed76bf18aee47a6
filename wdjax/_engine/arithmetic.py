"""The arithmetic of one parameter: a rate, and what a place does with it, in safe dtypes.

A place's rule is a function `rule(update, param, anchor, rate) -> update` on arrays of one dtype, at least float32.
`act` runs it on one parameter, as a jitted function of its own: traced and compiled once for every shape and dtype,
however many parameters have them and whatever their rates are. That is why a rate is an argument and not a constant.
Inside somebody's jit all of it is inlined and fused as if it had been written there.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .rules import PerLayer
from .unstable import is_traced, not_inlined

Scalar = Any  # A NumPy scalar where the value is known while tracing, else a 0-d array.


class Rate(NamedTuple):
    """The rate of one parameter in this step.

    Attributes:
        value: a scalar in the real dtype of the arithmetic.
        is_known: whether it is known while tracing; it is not zero then, because what is off for good is left alone.
    """

    value: Any
    is_known: bool = False


Rule = Callable[[jax.Array, jax.Array, jax.Array | None, Rate], jax.Array]


class Strength(NamedTuple):
    """A product of factors, parted into what is known while tracing and what is not.

    Attributes:
        number: the product of the numbers.
        arrays: the 0-d arrays; and of stacked layers one array of shape (layers,) for each `PerLayer`.
        axis: the axis that counts the layers, or None.
    """

    number: float
    arrays: tuple[Any, ...]
    axis: int | None


def strength(factors: Iterable[Any]) -> Strength:
    """Parts Python floats, 0-d arrays and `PerLayer`s."""
    number, arrays, axis = 1.0, [], None
    for factor in factors:
        if isinstance(factor, float):
            number *= factor
        elif isinstance(factor, PerLayer):
            axis = factor.axis
            arrays.append(np.array(factor.values))
        else:
            arrays.append(factor)
    return Strength(number, tuple(arrays), axis)


def product(factors: Iterable[Any], dtype: Any) -> tuple[Scalar, int | None]:
    """The product of Python floats, 0-d arrays and `PerLayer`s, in the real dtype that belongs to `dtype`.

    Returns:
        The rate, and None; or where a `PerLayer` is among the factors, the rate of each layer, of shape (layers,), and
        the axis that counts the layers.
    """
    number, arrays, axis = strength(factors)
    return _times(jnp.finfo(dtype).dtype.type(number), arrays), axis


def _times(number: Scalar, arrays: Iterable[Any]) -> Any:
    for array in arrays:
        number = number * jnp.asarray(array, number.dtype)
    return number


@functools.partial(jax.jit, static_argnums=(0, 1))
def act(
    rule: Rule,
    axis: int | None,
    update: jax.Array,
    param: jax.Array,
    anchor: jax.Array | None,
    number: Scalar,
    arrays: Sequence[jax.Array],
) -> jax.Array:
    """What a rule makes of one parameter's update, in the update's dtype.

    Args:
        rule: the place's rule.
        axis: the axis of stacked layers that have rates of their own, or None.
        update, param, anchor: of one shape; None for an anchor of zero.
        number, arrays: the factors of the rate, as in `Strength`; the number is known not to be zero.
    """
    dtype = compute_dtype(update, param)
    # All dtypes are ours; what is left to promote is a real rate beside complex weights.
    with jax.numpy_dtype_promotion("standard"):
        rate = _times(cast(number, jnp.finfo(dtype).dtype), arrays)
        u, p, a = cast(update, dtype), cast(param, dtype), None if anchor is None else cast(anchor, dtype)
        if axis is None:
            new = rule(u, p, a, Rate(rate, is_known=not arrays))
        else:
            of_layer = jax.vmap(
                lambda u, p, a, rate: rule(u, p, a, Rate(rate)), (axis, axis, None if a is None else axis, 0), axis
            )
            new = of_layer(u, p, a, rate)
        return cast(new, jnp.result_type(update))


def as_arguments(numbers: Sequence[Scalar], likes: Iterable[Any]) -> list[Scalar]:
    """Numbers as what a compiler takes for data, if there are several and something in `likes` is traced.

    A constant is folded into the loop that uses it, and loops with other constants are compiled one by one. XLA's CPU
    compiler takes what a call returns that it may not inline as it takes an argument, so that a thousand rates compile
    in the time of one. Elsewhere they stay constants.
    """
    distinct = dict.fromkeys(zip(numbers, (n.dtype for n in numbers), strict=True))
    metadata = not_inlined()
    if metadata is None or len(distinct) < 2 or not any(is_traced(like) for like in likes):
        return list(numbers)
    values = tuple(value for value, _ in distinct)

    def called_on_cpu() -> list[jax.Array]:
        with metadata:
            return _constants(values)

    called = jax.lax.platform_dependent(cpu=called_on_cpu, default=lambda: list(values))
    found = dict(zip(distinct, called, strict=True))
    return [found[number, number.dtype] for number in numbers]


@functools.partial(jax.jit, static_argnums=0)
def _constants(values: tuple[Scalar, ...]) -> list[jax.Array]:
    return [jnp.asarray(value) for value in values]


def cast(x: Any, dtype: Any) -> jax.Array:
    """The array in this dtype: itself if it is that already, which traces faster than a conversion that is none."""
    return x if isinstance(x, jax.Array) and x.dtype == dtype else jnp.asarray(x, dtype)


def compute_dtype(*leaves: Any) -> Any:
    """The dtype to compute in: at least float32, float64 if a leaf is, complex if a leaf is."""
    return _compute_dtype(*(leaf.dtype if isinstance(leaf, jax.Array) else jnp.result_type(leaf) for leaf in leaves))


@functools.cache
def _compute_dtype(*dtypes: Any) -> Any:
    wide = any(dtype in (jnp.float64, jnp.complex128) for dtype in dtypes)
    if any(jnp.issubdtype(dtype, jnp.complexfloating) for dtype in dtypes):
        return jnp.dtype(jnp.complex128 if wide else jnp.complex64)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def plus(update: jax.Array, rate: Rate, pull: jax.Array) -> jax.Array:
    """update + rate * pull; the same bits as the update where the rate is 0."""
    return minus(update, rate, -pull)


def minus(update: jax.Array, rate: Rate, pull: jax.Array) -> jax.Array:
    """update - rate * pull; the same bits as the update where the rate is 0.

    There what is subtracted is +0.0, which changes no number, and the derivative with respect to the rate is still
    that of the rule, so that a rate can be learned away from 0. An infinite pull is out of both, or 0 * inf is NaN.
    """
    if rate.is_known:
        return update - rate.value * pull
    off = rate.value == 0
    step = rate.value * jax.lax.select_n(off, pull, _finite(pull))
    return update - jax.lax.select_n(off, step, step - jax.lax.stop_gradient(step))


def unless_off(rate: Rate, off: jax.Array, on: jax.Array) -> jax.Array:
    """`off` where the rate is 0, else `on`, with the derivative of `on` in both, where it is finite."""
    if rate.is_known:
        return on
    finite = _finite(on)
    off = jax.lax.select_n(jnp.isfinite(on), off, jax.lax.stop_gradient(off))
    return jax.lax.select_n(rate.value == 0, on, off - (jax.lax.stop_gradient(finite) - finite))


def _finite(x: jax.Array) -> jax.Array:
    return jax.lax.select(jnp.isfinite(x), x, jnp.zeros_like(x))


def away(p: jax.Array, anchor: jax.Array | None) -> jax.Array:
    """How far a parameter is from its anchor, None for zero."""
    return p if anchor is None else p - anchor


def subtracted(update: jax.Array, p: jax.Array, anchor: jax.Array | None, rate: Rate) -> jax.Array:
    """The rule that takes a part of a parameter, from its anchor on, out of the finished update."""
    return minus(update, rate, away(p, anchor))
