"""Assertions about a penalty: its gradient and its proximal map follow from its value.

Both run the methods under `jit` in float64, and compare with what they return in float32.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import penalties
from .._engine import checks
from .._engine.text import shown
from ..penalties import Penalty

# All magnitudes that a weight may have. In float32, exp(100) and cosh(100) are infinite.
_MIXED = np.array([[0, 1e-3, -1e-3], [0.3, -0.5, 1], [-2, 3, -10], [50, -50, 100]])
_MOST = 1000  # Numbers in w. Each is moved alone, so the points to test are an array of twice its square.


@checks.known_arguments
def assert_gradient(kind: Penalty, w: Any = None) -> None:
    """Asserts that the gradient of a penalty is the slope of its value, and that both are right in float32.

    Each number of w is moved up and down a little, in float64. The gradient must lie between the two slopes of `value`:
    where it is smooth, they are equal up to rounding; at a corner, any number between them is a subgradient. Without
    a method `gradient`, JAX's derivative of `value` is tested. `add_penalty_to_grads` then adds it, and it may be NaN
    at 0.

    Args:
        kind: a penalty with a `value`.
        w: the weights to test: a real array of at most 1000 numbers. None for several arrays of shape (4, 3), with
            numbers from 0 to 100.

    Raises: AssertionError with the method, the weight and both numbers; TypeError for a penalty without `value`;
            ValueError for a `w` that is not as above, or a result of another shape.

    Example:

        >>> import jax, jax.numpy as jnp, wdjax.testing
        >>> class Quartic:
        ...     def value(self, w: jax.Array) -> jax.Array:
        ...         return jnp.sum(w**4) / 4
        ...     def gradient(self, w: jax.Array) -> jax.Array:
        ...         return w**3
        >>> wdjax.testing.assert_gradient(Quartic())
    """
    __tracebackhide__ = True  # So pytest shows the error and not this function.
    where = "assert_gradient"
    penalties.check_kind(where, kind, "value")
    method = "gradient" if callable(getattr(kind, "gradient", None)) else "JAX's derivative of value"
    value, gradient = _value(kind), jax.jit(lambda w: penalties.gradient(kind, w))
    many = jax.jit(jax.vmap(value))
    for weights in _weights(where, w):
        said = f"{where}: {shown(kind)}: "
        _in_both(f"{said}value", weights, value, np.max(np.abs(weights)))
        found = _in_both(f"{said}{method}", weights, gradient, None)
        low, high, blur = _slopes(many, weights)
        slack = blur + 1e-6 * np.maximum(np.abs(low), np.abs(high)) + 1e-9
        if (worst := _worst(np.maximum(low - found, found - high) - slack)) is not None:
            raise AssertionError(
                f"{said}{method} is {_one(found[worst])} at the weight {_one(weights[worst])}"
                f"{_place(worst)}, but the slope of value there is {_between(low[worst], high[worst])}."
            )


@checks.known_arguments
def assert_prox(kind: Penalty, w: Any = None, steps: float | Sequence[float] = (0.01, 0.7, 10.0)) -> None:
    """Asserts that `prox(w, step)` is the minimum over v of |v - w|^2 / 2 + step * value(v), also in float32.

    In float64, no other point may be lower: near or far, in each coordinate and in random directions, at w and at 0.
    And at the minimum, w - v must be step times the slope of `value`. At a corner, where `value` has two slopes, it
    must lie between these. A prox by iteration passes if it is exact to about six digits.

    Args:
        kind: a penalty with `value` and `prox`.
        w: as `assert_gradient`.
        steps: a positive number or several. In `proximal_step`, a step is the learning rate times the strength.

    Raises: AssertionError with the weight, the step and both numbers; TypeError for a penalty without `value` or
            `prox`; ValueError for a `w` or `steps` that are not as above, or a result of another shape.

    Example:

        >>> import jax, jax.numpy as jnp, wdjax.testing
        >>> class NearOne:
        ...     def value(self, w: jax.Array) -> jax.Array:
        ...         return jnp.sum((w - 1) ** 2) / 2
        ...     def prox(self, w: jax.Array, step: jax.Array) -> jax.Array:
        ...         return (w + step) / (1 + step)
        >>> wdjax.testing.assert_prox(NearOne())
    """
    __tracebackhide__ = True
    where = "assert_prox"
    for method in ("value", "prox"):
        penalties.check_kind(where, kind, method)
    sizes = np.atleast_1d(np.asarray(steps))
    if (
        sizes.dtype.kind not in "iuf"
        or sizes.ndim > 1
        or not sizes.size
        or not np.all((sizes > 0) & np.isfinite(sizes))
    ):
        raise ValueError(
            f"{where}: steps must be positive finite numbers, got {shown(steps)}. Write steps=(0.01, 10.0)."
        )
    prox, many = jax.jit(lambda w, step: penalties.prox(kind, w, step)), jax.jit(jax.vmap(_value(kind)))
    for weights in _weights(where, w):
        for step in sizes.tolist():
            said = f"{where}: {shown(kind)}: with step {step:g}, prox"
            found = _in_both(said, weights, prox, None, step)
            _assert_slopes(said, many, weights, step, found)
            _assert_lowest(said, many, weights, step, found)


def _assert_slopes(said: str, many: Callable[..., Any], w: np.ndarray, step: float, found: np.ndarray) -> None:
    __tracebackhide__ = True
    low, high, blur = _slopes(many, found)
    moved = w - found
    slack = step * blur + 1e-6 * (1 + np.abs(w) + step * np.maximum(np.abs(low), np.abs(high)))
    if (worst := _worst(np.maximum(step * low - moved, moved - step * high) - slack)) is not None:
        slope = _between(step * low[worst], step * high[worst])
        raise AssertionError(
            f"{said} moves the weight w = {_one(w[worst])}{_place(worst)} to v = {_one(found[worst])}. There w - v is "
            f"{_one(moved[worst])}, and step times the slope of value is {slope}. At the minimum they are equal."
        )


def _assert_lowest(said: str, many: Callable[..., Any], w: np.ndarray, step: float, found: np.ndarray) -> None:
    __tracebackhide__ = True
    points = np.stack([found, *_others(w, found)])
    costs = 0.5 * np.sum((points - w) ** 2, axis=tuple(range(1, points.ndim))) + step * _values(many, points)
    best = int(np.nanargmin(costs))
    if costs[0] - costs[best] > 1e-9 * np.abs(costs[0]) + 1e-12:
        at = np.unravel_index(int(np.argmax(np.abs(points[best] - found))), w.shape)
        raise AssertionError(
            f"{said} moves the weight w = {_one(w[at])}{_place(at)} to v = {_one(found[at])}. At v, |v - w|^2 / 2 + "
            f"step * value(v) is {costs[0]:.9g}, but it is {costs[best]:.9g} at another point, which has "
            f"{_one(points[best][at])} there."
        )


def _value(kind: Penalty) -> Callable[..., Any]:
    def value(w: jax.Array) -> jax.Array:
        result = kind.value(w)
        if np.shape(result) != ():
            raise ValueError(
                f"{shown(kind)}: value must return a scalar, but it returned the shape {np.shape(result)}."
            )
        return result

    return jax.jit(value)


def _others(w: np.ndarray, found: np.ndarray) -> Iterator[np.ndarray]:
    """Points that must not be lower: on the way to w, to 0 and beyond, in one coordinate and in random directions."""
    rng = np.random.default_rng(0)
    for end in (w, np.zeros_like(w), -w):
        for part in (1e-3, 0.1, 0.5, 1.0, 1.5):
            yield found + part * (end - found)
        for index in np.ndindex(w.shape):
            alone = found.copy()
            alone[index] = end[index]
            yield alone
    for size in 10.0 ** np.arange(-5, 3):
        yield from found + size * rng.normal(size=(20, *w.shape))


def _weights(where: str, w: Any) -> list[np.ndarray]:
    """The arrays to test, in float64 but with numbers that float32 has."""
    if w is None:
        normal = np.random.default_rng(0).normal(size=_MIXED.shape)
        given = [np.zeros_like(_MIXED), 1e-3 * normal, normal, 30 * normal, _MIXED]
    else:
        given = [np.asarray(w)]
        if not np.issubdtype(given[0].dtype, np.number) or np.iscomplexobj(w) or not 0 < given[0].size <= _MOST:
            raise ValueError(
                f"{where}: w must be an array of real numbers, at least one and at most {_MOST}, got {shown(w)}. "
                f"Write {where}(kind, np.ones((4, 3)))."
            )
    return [each.astype(np.float32).astype(np.float64) for each in given]


def _in_both(said: str, w: np.ndarray, function: Callable[..., Any], size: Any, *step: float) -> np.ndarray:
    """What the function returns in float64, if it is finite and float32 agrees to three digits of it or of `size`."""
    __tracebackhide__ = True
    results = []
    for dtype in (np.float64, np.float32):
        with jax.enable_x64(dtype == np.float64):
            results.append(np.asarray(function(*(jnp.asarray(x, dtype) for x in (w, *step))), np.float64))
    wide, narrow = results
    scale = size if size is not None else np.abs(w) * bool(step) + 1e-2 * np.max(np.abs(wide))
    excess = [np.where(np.isfinite(wide), -1.0, np.inf), np.abs(narrow - wide) - 1e-3 * (np.abs(wide) + scale) - 1e-6]
    for dtype, result, over in zip(("float64", "float32"), results, excess, strict=True):
        if (worst := _worst(over)) is not None:
            of = f"the weight {_one(w[worst])}{_place(worst)}" if wide.ndim else f"weights up to {np.max(np.abs(w)):g}"
            other = f" and not {_one(wide[worst])}, as in float64" * (dtype == "float32")
            raise AssertionError(f"{said} at {of} is {_one(result[worst])} in {dtype}{other}.")
    return wide


def _slopes(many: Callable[..., Any], w: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The smaller and the larger slope of a value, to both sides of each number, and how much rounding blurs them."""
    moves = 1e-6 * np.maximum(1, np.abs(w))
    each = np.eye(w.size).reshape(w.size, *w.shape)
    points = np.concatenate([w[None], w + each * moves, w - each * moves])
    here, *values = np.split(_values(many, points), [1, 1 + w.size])
    up, down = ((after - here).reshape(w.shape) for after in values)
    slopes = up / ((w + moves) - w), down / ((w - moves) - w)
    return np.minimum(*slopes), np.maximum(*slopes), 8 * np.finfo(np.float64).eps * np.abs(here) / moves


def _values(many: Callable[..., Any], points: np.ndarray) -> np.ndarray:
    with jax.enable_x64(True):
        return np.asarray(many(jnp.asarray(points)), np.float64)


def _worst(excess: np.ndarray) -> tuple[Any, ...] | None:
    """Where the excess over what is allowed is largest, if there is any. NaN is the largest."""
    excess = np.where(np.isnan(excess), np.inf, excess)
    worst = np.unravel_index(int(np.argmax(excess)), excess.shape)
    return worst if excess[worst] > 0 else None


def _place(index: tuple[Any, ...]) -> str:
    return f" at {tuple(map(int, index))}" if index else ""


def _between(low: Any, high: Any) -> str:
    is_corner = high - low > 1e-4 * (1 + max(abs(low), abs(high)))
    return f"from {_one(low)} to {_one(high)}" if is_corner else _one((low + high) / 2)


def _one(x: Any) -> str:
    return f"{float(x):.6g}" if math.isfinite(float(x)) else str(float(x))
