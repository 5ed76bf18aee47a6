"""Optimizers in NumPy float64: (gradient, memory, count from 1) -> (direction, memory). The first memory is None."""

from typing import Any

import numpy as np


def adam(g: np.ndarray, memory: Any, count: int) -> Any:
    m, v = memory or (np.zeros_like(g), np.zeros_like(g))
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    return m / (1 - 0.9**count) / (np.sqrt(v / (1 - 0.999**count)) + 1e-8), (m, v)


def momentum(g: np.ndarray, memory: Any, count: int) -> Any:
    m = g + 0.9 * (0.0 if memory is None else memory)
    return m, m
