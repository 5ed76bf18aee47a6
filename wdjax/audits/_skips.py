"""Finds parameters that move in steps which the optimizer skips because a gradient is NaN."""

import contextlib

import jax
import numpy as np

from ._probes import Arrays, Probes


def moved_in_skipped_steps(probes: Probes) -> set[int]:
    """The leaves that move in a skipped step.

    Each gradient gets one NaN. If the rest of the step is finite and no longer depends on the gradients, the optimizer
    has skipped them. An optimizer that replaces a NaN by 0 still takes the other elements into account.
    """

    def with_nan(gradients: Arrays) -> Arrays:
        return {i: np.where(np.arange(g.size).reshape(g.shape) == 0, np.nan, g) for i, g in gradients.items()}

    up, down = probes.gradients, probes.scaled(probes.gradients, -1.0)
    # An optimizer that raises an error at a NaN skips nothing.
    with jax.debug_nans(False), contextlib.suppress(RuntimeError, ValueError, ArithmeticError):
        bad, opposite, usual, other = (
            probes.first_step(probes.weights, gradients) for gradients in (with_nan(up), with_nan(down), up, down)
        )
        return {
            i
            for i in probes.moved
            if np.any((moved := bad.total(i).flat[1:]) != 0)
            and np.all(np.isfinite(moved))
            and np.array_equal(moved, opposite.total(i).flat[1:])
            and not np.array_equal(usual.total(i).flat[1:], other.total(i).flat[1:])
        }
    return set()
