"""Everything that wdjax uses of the unstable parts of JAX, each with a fallback.

What JAX documents as stable is imported where it is used. What is experimental (`jax.experimental`), semi-public
(`jax.core`, `jax.extend`) or an attribute of an abstract value stands here and nowhere else. Without these parts some
programs compile more slowly, and arrays within `shard_map` are taken to be split as the caller says. What a decay
computes stays the same.
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
    """Whether a value is a JAX tracer, as within `jax.jit`, `jax.grad` or `jax.vmap`."""
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

    If JAX does not report them, the set is empty, and wdjax trusts the caller.
    """
    kind = jax.typeof(x)
    found = getattr(getattr(kind, "manual_axis_type", None), "varying", None)
    if found is None:
        found = getattr(kind, "vma", None)  # Its name before JAX 0.10.
    return frozenset() if found is None else frozenset(found)


def may_be_split(x: Any) -> bool:
    """Whether an array may lie on several devices. Within jit its type has the mesh, if not the partition."""
    mesh = getattr(getattr(jax.typeof(x), "sharding", None), "mesh", None)
    return getattr(mesh, "size", 2) > 1


def explicit_axes(x: Any) -> Any:
    """How an array is split over the explicit axes of a mesh; equal for all arrays where there are none."""
    return getattr(getattr(jax.typeof(x), "sharding", None), "spec", None)


def not_inlined() -> contextlib.AbstractContextManager[Any] | None:
    """A context in which XLA does not inline jitted functions on CPUs; None if JAX cannot ask for that."""
    return None if set_xla_metadata is None else set_xla_metadata(inlineable="false")


def whole(x: Any) -> np.ndarray:
    """The values of an array, including those that lie on other processes. All processes must call it."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return np.asarray(x)
    if process_allgather is None:
        return _gathered(x)
    return np.asarray(process_allgather(x, tiled=True))


def _gathered(x: Any) -> np.ndarray:
    everywhere = jax.sharding.NamedSharding(x.sharding.mesh, jax.sharding.PartitionSpec())
    return np.asarray(jax.jit(lambda x: x, out_shardings=everywhere)(x))
