"""Closed forms of weight decay and of L2 regularization: NumPy in float64, no JAX."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Floats = Any  # Anything that NumPy can convert to a float64 array.
Sequenced = float | Sequence[float] | np.ndarray | Callable[[int], Any]  # One number, or one for each step.


def decayed_weights(
    weights: Floats, learning_rate: Sequenced, weight_decay: Sequenced, steps: int, *, toward: Floats = 0.0
) -> np.ndarray:
    """Weights after `steps` steps of decoupled decay with zero gradients.

    Rule:   w_T = a + (w_0 - a) * product over t < T of (1 - learning_rate_t * weight_decay_t)
    Units:  as `decoupled_decay`; for `independent_decay` give learning_rate=1.0.
    Source: Loshchilov & Hutter 2019, unrolled.

    Args:
        weights: the weights before the first step.
        learning_rate, weight_decay: a number, a sequence of at least `steps` numbers, or a schedule of the step.
        steps: how many steps.
        toward: the anchor a.

    Returns: a float64 array like `weights`.
    Raises: ValueError if a sequence is shorter than `steps`.

    Example:

        >>> from wdjax.testing import decayed_weights
        >>> decayed_weights([1.0, -2.0], learning_rate=0.5, weight_decay=0.2, steps=2).round(4).tolist()
        [0.81, -1.62]
    """
    factors = 1.0 - _each_step("learning_rate", learning_rate, steps) * _each_step("weight_decay", weight_decay, steps)
    anchor = np.asarray(toward, np.float64)
    return anchor + (np.asarray(weights, np.float64) - anchor) * np.prod(factors)


def _each_step(name: str, value: Sequenced, steps: int) -> np.ndarray:
    values = np.asarray([value(step) for step in range(steps)] if callable(value) else value, np.float64)
    if values.ndim and len(values) < steps:
        raise ValueError(f"decayed_weights: {name} has {len(values)} values for {steps} steps. Write one for each.")
    return values[:steps] if values.ndim else np.full(steps, values)


def heavy_ball_weights(
    weights: Floats, learning_rate: float, weight_decay: float, momentum: float, steps: int
) -> np.ndarray:
    """Weights after `steps` steps of SGD with momentum and L2 in the gradient, with zero gradients of the loss.

    Rule:   w_{t+1} = (1 + m - learning_rate * weight_decay) * w_t - m * w_{t-1}, with w_{-1} = w_0
    Units:  as `add_l2_to_grads`.
    Source: Polyak 1964.

    Args:
        weights: the weights before the first step.
        learning_rate, weight_decay, momentum: numbers.
        steps: how many steps.

    Returns: a float64 array like `weights`.

    Example:

        >>> from wdjax.testing import heavy_ball_weights
        >>> float(heavy_ball_weights(1.0, 0.1, 1.0, 0.9, steps=2).round(4))
        0.72
    """
    before = now = np.asarray(weights, np.float64)
    for _ in range(steps):
        before, now = now, (1 + momentum - learning_rate * weight_decay) * now - momentum * before
    return now


def ridge_solution(inputs: Floats, targets: Floats, weight_decay: float) -> np.ndarray:
    """The minimum of half the mean squared error plus weight_decay / 2 times the squared norm of the weights.

    Rule:   w = (X^T X / n + weight_decay * I)^-1 X^T y / n
    Units:  scikit-learn's `Ridge(alpha)` has alpha = n * weight_decay.
    Source: Hoerl & Kennard 1970.

    Args:
        inputs: X, of shape (n, d).
        targets: y, of shape (n,) or (n, k).
        weight_decay: the rate of `l2_penalty` or `add_l2_to_grads`.

    Returns: a float64 array of shape (d,) or (d, k).
    Raises: `numpy.linalg.LinAlgError` for a singular matrix, which only a weight_decay of 0 allows.

    Example:

        >>> from wdjax.testing import ridge_solution
        >>> ridge_solution([[1.0], [1.0]], [2.0, 2.0], weight_decay=1.0).tolist()
        [1.0]
    """
    x, y = np.asarray(inputs, np.float64), np.asarray(targets, np.float64)
    return np.linalg.solve(x.T @ x / len(x) + weight_decay * np.eye(x.shape[1]), x.T @ y / len(x))


def soft_threshold(weights: Floats, threshold: Floats) -> np.ndarray:
    """The proximal map of threshold times the absolute value: closer to zero by the threshold, and zero within it.

    Rule:   sign(w) * max(|w| - threshold, 0)
    Units:  those of the weights. For `proximal_step(L1(), strength, ...)`, the threshold is learning_rate * strength.
    Source: Donoho & Johnstone 1994.

    Args:
        weights: an array, or anything that NumPy makes one of.
        threshold: a number >= 0, or an array that broadcasts.

    Returns: a float64 array.

    Example:

        >>> from wdjax.testing import soft_threshold
        >>> soft_threshold([3.0, -0.5], 1.0).tolist()
        [2.0, -0.0]
    """
    w = np.asarray(weights, np.float64)
    return np.sign(w) * np.maximum(np.abs(w) - np.asarray(threshold, np.float64), 0.0)
