"""Checks of arguments. Each error names the mistake, the value, and the call to write instead."""

import collections
import difflib
import functools
import inspect
import math
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .text import shown
from .unstable import is_traced

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

_MOST_ENTRIES = 100_000  # At one depth of data from a file.

# Argument names from other libraries, and the arguments here that they may mean.
_ALSO_CALLED = {
    **dict.fromkeys(("wd", "l2", "lam", "lambda_", "decay", "rate"), ("weight_decay", "strength")),
    **dict.fromkeys(("weight_decay", "l1"), ("strength",)),
    "strength": ("weight_decay",),
    "lr": ("learning_rate",),
    **dict.fromkeys(("weight_decay_mask", "where", "only"), ("mask",)),
    **dict.fromkeys(("anchor", "init", "reference"), ("toward",)),
}

# Arguments whose sign depends on the place elsewhere.
_SHRINKS = {
    "weight_decay": ": a positive decay shrinks weights, in every place",
    "strength": ": a positive strength lowers the penalty, in every place",
}


def rate(where: str, name: str, value: Any, *, write: str | None = None, may_be_array: bool = False) -> Any:
    """Checks a rate: a finite number >= 0, a 0-d real array, or a schedule. Numbers are returned as Python floats.

    A 0-d array that was put on a device counts as its number. The errors name the function `where` and its argument
    `name`, and show the call `write`. For a traced array, which has no value yet, it checks only the shape and dtype.
    """
    write = write or f"{where}({name}=0.1)"
    if callable(value) and not isinstance(value, type):
        return value
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{where}: {name} must be a rate, got {value}. Write {write}, or 0.0 for none.")
    if not isinstance(value, (int, float, np.number, np.ndarray, jax.Array)):
        raise TypeError(
            f"{where}: {name} must be a number, a 0-d array, a schedule (a function of the step) or a by_path table "
            f"of these, got {shown(value)}. Write {write}; rates by path are by_path({{'kernel': 0.1}}, default=0.0)."
        )
    if jnp.shape(value) != () and not may_be_array:
        raise ValueError(
            f"{where}: {name} must be a scalar, got an array of shape {jnp.shape(value)}. Write {write}. Give arrays "
            "by path, by_path({'embedding': array}, default=0.1), or in a tree like params."
        )
    dtype = getattr(value, "dtype", np.dtype(float))
    if not jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.complexfloating):
        of = f" and dtype {dtype}" if jnp.shape(value) else ""
        raise TypeError(f"{where}: {name} must be a real number, got {shown(value)}{of}. Write {write}.")
    if is_traced(value) or not getattr(value, "is_fully_addressable", True):
        return value
    value = unplaced(value)
    numbers = np.asarray(value if jnp.shape(value) else as_float(value))
    wrong = numbers[~(np.isfinite(numbers) & (numbers >= 0))]
    if wrong.size:
        raise ValueError(
            f"{where}: {name} must be finite and not negative, got {'an array with ' * (numbers.ndim > 0)}{wrong[0]}. "
            f"Write {write}{next((said for kind, said in _SHRINKS.items() if name.startswith(kind)), '')}."
        )
    return value if isinstance(value, jax.Array) or numbers.ndim else float(numbers)


def unplaced(value: Any) -> Any:
    """The value. A 0-d array that was put on a device becomes its number, which goes to any device, as within jit.

    Multiplying by it gives the dtype that the array would give.
    """
    if not isinstance(value, jax.Array) or is_traced(value) or value.shape != ():
        return value
    if not (value.is_fully_addressable and value.committed):
        return value
    _, is_weak = jax.dtypes.result_type(value, return_weak_type_flag=True)
    return value.item() if is_weak else np.asarray(value)


def value_of_schedule(where: str, name: str, value: Any) -> Any:
    """Checks what the schedule given as the argument `name` returned, as `rate` does."""
    what = f"the value of the schedule {name}"
    if getattr(value, "shape", ()) != ():
        raise ValueError(
            f"{where}: {what} must be a scalar, got an array of shape {value.shape}. Let the schedule return one "
            f"number, and multiply it by the array: {name}=schedule * by_path({{'embedding': array}}, default=1.0)."
        )
    write = f"{name}=lambda count: 0.1 / (1 + count)"
    if not isinstance(value, (bool, int, float, complex, np.generic, np.ndarray, jax.Array)):
        raise TypeError(f"{where}: {what} must be a number or a 0-d array, got {shown(value)}. Write {write}.")
    return rate(where, what, value, write=write)


def as_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:  # An integer too large for a float.
        return math.inf


def power(where: str, base: float, exponent: float, write: str) -> float:
    """base ** exponent, or an error where Python gives an OverflowError."""
    try:
        return float(base) ** exponent
    except OverflowError:
        raise ValueError(f"{where}: {base:g} ** {exponent:g} is too large for a float. Write {write}.") from None


def nesting(where: str, data: Any, write: str, most: int = 400) -> None:
    """Raises an error for data from a file that are nested too deeply or hold too much to be read by recursion.

    An object that occurs several times counts each time. (YAML's anchors can make a small file endless.)
    """
    level, times = {id(data): data}, {id(data): 1}  # What stands at one depth, and how many times.
    for _ in range(most):
        inner: dict[int, Any] = {}
        counts: dict[int, int] = collections.defaultdict(int)
        for key, x in level.items():
            for item in x.values() if isinstance(x, Mapping) else x if isinstance(x, (list, tuple)) else ():
                inner[id(item)] = item
                counts[id(item)] += times[key]
        level, times = inner, counts
        if sum(times.values()) > _MOST_ENTRIES:
            raise ValueError(
                f"{where}: data has more than {_MOST_ENTRIES:,} entries at one depth. What is shared counts at each "
                f"place. Write {write}."
            )
    if level:
        raise ValueError(f"{where}: data is nested more than {most} levels deep. Write {write}.")


def read(of: str, make: Callable[..., T], written: Any) -> T:
    """Calls `make` with the arguments in a dictionary that `to_dict` wrote."""
    if not isinstance(written, Mapping):
        raise TypeError(f"Rules.from_dict: {of} must be a dictionary, got {shown(written)}.")
    known = inspect.signature(make).parameters
    required = sorted(name for name, parameter in known.items() if parameter.default is parameter.empty)
    lacks, unknown = [name for name in required if name not in written], sorted(set(written) - set(known), key=str)
    if lacks or unknown:
        fault = f"lacks {lacks}" if lacks else f"has the unknown entries {unknown}"
        optional = sorted(set(known).difference(required))
        may = f", and may have {optional}" if optional else ""
        raise ValueError(f"Rules.from_dict: {of} {fault}: it needs {required}{may}, got {shown(dict(written))}.")
    return make(**written)


def number(where: str, name: str, value: Any, write: str, wanted: str) -> Any:
    """Checks a number as `rate` does, but takes no schedule, and its errors offer none."""
    is_number = isinstance(value, (int, float, np.number, np.ndarray, jax.Array)) and not isinstance(value, bool)
    if not is_number:
        kind = ValueError if callable(value) else TypeError
        raise kind(f"{where}: {name} must be {wanted}, got {shown(value)}. Write {write}.")
    return rate(where, name, value, write=write)


def positive(where: str, name: str, value: Any, write: str) -> float:
    """Checks a number > 0, as `rate` does."""
    wanted = "a number > 0"
    found = number(where, name, value, write, wanted)
    if isinstance(value, jax.Array) or not isinstance(found, float) or found == 0:
        raise ValueError(f"{where}: {name} must be {wanted}, got {shown(value)}. Write {write}.")
    return found


def finished(where: str, optimizer: Any, write: str) -> optax.GradientTransformationExtraArgs:
    """Checks a finished optimizer: a gradient transformation, or an `optax.MultiSteps`."""
    if isinstance(optimizer, optax.MultiSteps):
        # Its `update` takes extra arguments, but the transformation that it makes of itself would drop them.
        optimizer = optax.GradientTransformationExtraArgs(*optimizer.gradient_transformation())
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(
            f"{where}: optimizer must be a finished Optax optimizer, got {shown(optimizer)}. Write {write}."
        )
    return optax.with_extra_args_support(optimizer)


def params_given(where: str, params: Any) -> None:
    """Raises an error if `update` was called without the parameters."""
    if params is None:
        raise ValueError(
            f"{where} needs the parameters, but update got params=None. "
            "Write: updates, state = optimizer.update(grads, state, params)."
        )


def same_shape(where: str, path: str, update: Any, param: Any) -> None:
    """Raises an error if the update and its parameter differ in shape."""
    if jnp.shape(update) != jnp.shape(param):
        raise ValueError(
            f"{where}: the update of {path!r} has shape {jnp.shape(update)} and the parameter "
            f"{jnp.shape(param)}. Pass the parameters that the gradients belong to."
        )


def warn(message: str) -> None:
    """Issues a warning at the caller's line: the nearest frame outside wdjax, Optax and JAX."""
    frame, level = sys._getframe(1), 2
    inside = ("wdjax", "optax", "jax")
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in inside:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def known_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """Makes errors for unknown or missing arguments show the nearest argument and the whole call."""
    signature = inspect.signature(function)
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    call = f"{function.__name__}{inspect.Signature(bare)}"

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in signature.parameters:
                meant = [other for other in _ALSO_CALLED.get(name, ()) if other in signature.parameters]
                near = meant or difflib.get_close_matches(name, signature.parameters, n=1, cutoff=0.6)
                hint = f" Did you mean {near[0]}=...?" if near else ""
                raise TypeError(
                    f"{function.__name__}() has no argument {name!r} (given {shown(kwargs[name])}).{hint} Write {call}."
                )
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{function.__name__}(): {error}. Write {call}.") from None
        return function(*args, **kwargs)

    return checked


def static(name: str, value: Any) -> str:
    """A hint, as a further sentence, for a number that `optax.inject_hyperparams` has made an array of."""
    is_array = isinstance(value, jax.Array)
    return f" Inside optax.inject_hyperparams, name it in static_args=({name!r},)." if is_array else ""


def is_whole(value: Any) -> bool:
    """Whether a value is an integer of Python or NumPy. Booleans do not count."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
