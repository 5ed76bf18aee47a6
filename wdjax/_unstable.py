"""All that wdjax takes from parts of JAX that may change: each with what is done where JAX no longer has it.

What JAX documents as stable is imported where it is used. What is experimental (`jax.experimental`), semi-public
(`jax.core`, `jax.extend`) or an attribute of an abstract value stands here and nowhere else. Nothing here decides what
a decay computes: without these parts some programs compile more slowly, some checks see less, and results are the same.
"""

import contextlib
from typing import Any

import jax
import numpy as np

try:
    from jax.core import Tracer
except ImportError:
    Tracer = None

try:
    from jax.experimental.xla_metadata import set_xla_metadata
except ImportError:
    set_xla_metadata = None

try:
    from jax.experimental.multihost_utils import process_allgather
except ImportError:
    process_allgather = None


def is_traced(value: Any) -> bool:
    """Whether a value is an array without values yet, as within `jax.jit`, `jax.grad` or `jax.vmap`."""
    if Tracer is not None:
        return isinstance(value, Tracer)
    if not isinstance(value, jax.Array):
        return False
    try:
        return not hasattr(value, "is_fully_addressable")
    except TypeError:  # jax.errors.ConcretizationTypeError: a traced array lies nowhere.
        return True


def varying_axes(x: Any) -> frozenset[Any]:
    """The mesh axes along which an array is known to differ: none outside `shard_map` and with `check_vma=False`.

    Without JAX's word on it nothing is known, and what the caller says of an array is believed.
    """
    kind = jax.typeof(x)
    found = getattr(getattr(kind, "manual_axis_type", None), "varying", None)
    if found is None:
        found = getattr(kind, "vma", None)  # Its name before JAX 0.10.
    return frozenset() if found is None else frozenset(found)


def may_be_split(x: Any) -> bool:
    """Whether an array may lie on several devices. Within jit its type names the mesh, if not how it is split."""
    mesh = getattr(getattr(jax.typeof(x), "sharding", None), "mesh", None)
    return getattr(mesh, "size", 2) > 1


def explicit_axes(x: Any) -> Any:
    """How an array is split over the explicit axes of a mesh; equal for all arrays where there are none."""
    return getattr(getattr(jax.typeof(x), "sharding", None), "spec", None)


def not_inlined() -> contextlib.AbstractContextManager[Any] | None:
    """Within it, XLA's compiler for CPUs keeps calls of jitted functions as calls; None where JAX cannot say so."""
    return None if set_xla_metadata is None else set_xla_metadata(inlineable="false")


def whole(x: Any) -> np.ndarray:
    """The values of an array, including those that lie on other processes; all processes must ask."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return np.asarray(x)
    if process_allgather is None:
        return _gathered(x)
    return np.asarray(process_allgather(x, tiled=True))


def _gathered(x: Any) -> np.ndarray:
    everywhere = jax.sharding.NamedSharding(x.sharding.mesh, jax.sharding.PartitionSpec())
    return np.asarray(jax.jit(lambda x: x, out_shardings=everywhere)(x))
