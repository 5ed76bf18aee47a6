"""What the moves of an array of weights show: the rate and kind of a decay, what is noise, and what is the same."""

from typing import Any

import numpy as np


def rate_of(moved: np.ndarray, weights: np.ndarray) -> float:
    """The fraction by which weights move, the median of those that do: only some rows may decay."""
    moves = moved != 0
    return float(np.median(-np.real(moved[moves] / weights[moves]))) if np.any(moves) else 0.0


def kind_of(odd: np.ndarray, double: np.ndarray, w: np.ndarray, *, may_mix: bool = True) -> str:
    """The kind of decay, by how it grows when the weights are doubled. `may_mix`: whether weights may move others."""
    is_real = np.all(np.abs(np.imag(odd / w)) <= 1e-3 * np.abs(odd / w))
    with np.errstate(divide="ignore", invalid="ignore"):
        growth = np.where(odd == 0, np.nan, np.abs(double) / np.abs(odd))
    growth = growth[np.isfinite(growth)]
    linear, constant = np.abs(growth - 2) < 0.02, np.abs(growth - 1) < 0.02
    if growth.size == 0 or not is_real or (may_mix and _is_mixed(np.real(odd / w))):
        return "other"
    if np.all(linear):
        return "L2"
    if np.all(constant):
        return "L1" if np.min(np.abs(odd[odd != 0])) >= 0.98 * np.max(np.abs(odd)) else "norm"
    between = (growth > 0.98) & (growth < 2.02)
    return "Huber" if linear.any() and constant.any() and between.all() else "other"


def _is_mixed(ratios: np.ndarray) -> bool:
    """Whether weights move one another, as under a penalty of singular values.

    Then some grow and some shrink. Rates of layers or rows of both signs would be constant along some axis.
    """
    small = 1e-2 * float(np.max(np.abs(ratios)))
    varies = [bool(np.any(np.ptp(ratios, axis) > small)) for axis in range(ratios.ndim)]
    return len(varies) > 1 and all(varies) and bool(np.min(ratios) < -small and np.max(ratios) > small)


def is_noise(odd: np.ndarray, w: np.ndarray, rounding: np.ndarray) -> bool:
    """Whether this is zero, or only the rounding of updates that are differences of weights."""
    if not np.any(odd):
        return True
    is_spread = np.std(odd / w) > 0.1 * np.abs(np.mean(odd / w))
    return bool(is_spread and np.all(np.abs(odd) <= rounding))


def same(a: np.ndarray, b: np.ndarray, noise: Any, tolerance: float = 2e-3) -> bool:
    return bool(np.all(np.abs(a - b) <= tolerance * np.minimum(np.abs(a), np.abs(b)) + noise))


def along(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The part of `a` along `b`. If the size of the gradient's step depends on the weights, that is not a decay."""
    size = float(np.real(np.vdot(b, b)))
    share = float(np.real(np.vdot(b, a))) / size if size else 0.0
    # With few elements, any two arrays are nearly parallel.
    return share * b if b.size > 4 or abs(share) < 0.5 else np.zeros_like(b)
