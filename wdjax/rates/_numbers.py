"""What the functions of this room take: numbers > 0, and learning rates."""

import functools
import math
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from .._engine import checks
from .._engine.rules import Rules
from .._engine.text import shown
from .._engine.unstable import is_traced

P = ParamSpec("P")
R = TypeVar("R")
Positive = Any  # A float, or a 0-d array of at least float32, which may be traced.


def converting(function: Callable[P, R]) -> Callable[P, R]:
    """Checks the names of arguments, and lets arrays of several dtypes meet under strict promotion too."""

    @functools.wraps(function)
    def promoting(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return checks.known_arguments(promoting)


def positive(name: str, value: Any, write: str, *, or_zero: bool = False) -> Positive:
    """Checks a number > 0, or >= 0. The errors show the call `write`."""
    where, wanted = write.partition("(")[0], "a number >= 0" if or_zero else "a number > 0"
    if not _is_real(value):
        hint = " Of a learning-rate schedule, give the peak." if callable(value) else ""
        raise TypeError(f"{where}: {name} must be {wanted}, got {shown(value)}.{hint} Write {write}.")
    if jnp.shape(value) != ():
        raise ValueError(f"{where}: {name} must be a scalar, got an array of shape {jnp.shape(value)}. Write {write}.")
    if is_known(value) and not (0 < checks.as_float(value) < math.inf or (or_zero and value == 0)):
        raise ValueError(f"{where}: {name} must be {wanted}, and finite, got {shown(value)}. Write {write}.")
    return wide(value) if isinstance(value, jax.Array) else float(value)


def _is_real(value: Any) -> bool:
    if isinstance(value, (np.ndarray, jax.Array)):
        return jnp.issubdtype(value.dtype, jnp.integer) or jnp.issubdtype(value.dtype, jnp.floating)
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def is_known(value: Any) -> bool:
    return not is_traced(value) and getattr(value, "is_fully_addressable", True)


def rate_of_learning(value: Any, write: str) -> Any:
    """Checks a learning rate: a number, a 0-d array or a schedule."""
    where = write.partition("(")[0]
    if isinstance(value, Rules):
        raise TypeError(
            f"{where}: learning_rate must be a number or a schedule, got {shown(value)}. For learning rates by path, "
            f"give the schedule that they have in common, and multiply the result by the table: {write} * table."
        )
    return checks.rate(where, "learning_rate", value, write=write)


def wide(value: Any) -> Any:
    """The value. An array that is narrower than float32, or of integers, becomes float32."""
    if not isinstance(value, jax.Array):
        return value
    is_wide = jnp.issubdtype(value.dtype, jnp.floating) and jnp.finfo(value.dtype).bits >= 32
    return value.astype(value.dtype if is_wide else jnp.float32)  # The cast also makes a weak type a strong one.
