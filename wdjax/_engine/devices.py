"""Errors about arrays that were put on different devices. JAX names them as the arguments of our inner functions."""

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import jax

from . import trees
from .anchors import is_in_state
from .unstable import is_of_devices, is_traced

P = ParamSpec("P")
R = TypeVar("R")
PyTree = Any


def explained(method: Callable[P, R]) -> Callable[P, R]:
    """Makes JAX's error about devices name the argument and say what to write. It looks at arrays only after an error.

    Under jit, arrays of any device may be constants of the program, so a check beforehand would refuse too much.
    """
    signature = inspect.signature(method)

    @functools.wraps(method)
    def explaining(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(*args, **kwargs)
        except ValueError as error:
            if not is_of_devices(error):
                raise
            given = signature.bind(*args, **kwargs).arguments
            try:
                apart = next(_apart(*map(given.get, ("self", "updates", "state", "params"))), None)
            except ValueError:  # A schedule whose own arrays are apart fails again.
                apart = None
            if apart is None:
                raise
            name, there, first, here, write = apart
            message = f"{given['self'].where}: {name} is on {there}, but {first} is on {here}. {write}"
            raise ValueError(message) from error

    return explaining


def _apart(action: Any, updates: PyTree, state: Any, params: PyTree) -> Iterator[tuple[str, str, str, str, str]]:
    """What is on other devices than a parameter, or than the first array beside it that was put on a device."""
    for parts in _parts(action, updates, state, params):
        placed = [(name, devices, write) for name, part, write in parts if (devices := _devices(part))]
        for name, devices, write in placed[1:]:
            first, at_first, _ = placed[0]
            if devices != at_first:
                yield name, devices, first, at_first, write


def _parts(action: Any, updates: PyTree, state: Any, params: PyTree) -> Iterator[list[tuple[str, Any, str]]]:
    """For each parameter the arrays that are computed with it: what users call it, the array, what to write."""
    leaves = trees.flatten_with_paths(params)
    new = dict(trees.flatten_with_paths(updates))
    kept = dict(trees.flatten_with_paths(getattr(state, "leaf", None)))
    shardings = "jax.tree.map(lambda p: p.sharding, params)"
    for_state = (
        "Make a state of these parameters, optimizer.init(params), or move it: "
        "jax.device_put(state, wdjax.state_shardings(optimizer, params))."
    )
    for_toward = f"Put it on the same devices: jax.device_put(pretrained, {shardings})."
    for_array = "Put it on the same devices with jax.device_put, or write it as a NumPy array, np.asarray(array)."
    for_schedule = "In the schedule, use NumPy arrays, np.asarray(array), or Python numbers."
    toward, for_anchor = ("the state", for_state) if is_in_state(action.toward) else ("toward", for_toward)
    terms = action.terms(params, leaves, state)
    for (path, param), row, term in zip(leaves, action._rows(params, leaves), terms, strict=True):
        if term is None:
            continue
        factors = list(zip(row.names, row.factors, term.factors, strict=True))
        yield [
            (f"the parameter {path!r}", param, ""),
            (f"the update of {path!r}", new.get(path), f"Move the updates: jax.device_put(updates, {shardings})."),
            (toward, term.anchor, for_anchor),
            ("the state", kept.get(path), for_state),
            *((name, array, for_array) for name, given, array in factors if not callable(given)),
            ("the state", getattr(state, "count", None), for_state),
            *((f"the value of the schedule {name}", x, for_schedule) for name, given, x in factors if callable(given)),
        ]


def _devices(x: Any) -> str:
    """The devices that an array was put on. Empty if it goes to any device, or if it is traced."""
    if not isinstance(x, jax.Array) or is_traced(x) or not x.committed:
        return ""
    return ", ".join(f"{device.platform}:{device.id}" for device in sorted(x.devices(), key=lambda device: device.id))
