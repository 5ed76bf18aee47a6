"""The types of arguments, defined once."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import jax
import numpy as np
import optax

from .anchors import EMA
from .rules import Rules

Params: TypeAlias = Any  # A tree of parameters.
Schedule: TypeAlias = optax.Schedule  # Maps the number of updates so far to a number.
Number: TypeAlias = float | np.number[Any] | np.ndarray[Any, Any] | jax.Array  # Arrays of shape ().

# A number, a schedule, a table by path, or a tree like params whose leaves are numbers, schedules or arrays.
Rate: TypeAlias = Number | Schedule | Rules | Mapping[Any, Any] | Sequence[Any]

# Rules of booleans, a tree or prefix tree of booleans (or of arrays of booleans), or a function from params to one.
Mask: TypeAlias = Rules | Callable[[Params], Params] | Params | None

# A tree like params, the values at `init`, a moving average, or a table of the last two; None for zero.
Anchor: TypeAlias = Params | Literal["init"] | EMA | Rules | None

# A finished optimizer.
Optimizer: TypeAlias = optax.GradientTransformation | optax.MultiSteps

# How many leading axes stack layers: of all parameters, or by pattern.
StackedAxes: TypeAlias = int | Mapping[str, int]
