"""Every use of JAX's unstable API, each with a fallback.

Stable API is imported where it is used. Anything experimental (`jax.experimental`) or semi-public (`jax.core`,
`jax.extend`), and every attribute of an abstract value, is used only here. Without this API some programs compile more
slowly, and arrays within `shard_map` count as split over every axis that the caller names. Decays stay the same.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
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
    from jax.sharding import auto_axes
except ImportError:
    auto_axes = None

try:
    from jax.experimental.multihost_utils import process_allgather
except ImportError:
    process_allgather = None


def is_traced(value: Any) -> bool:
    """Whether a value is a JAX tracer, as it is within `jax.jit`, `jax.grad` or `jax.vmap`."""
    if Tracer is not None:
        return isinstance(value, Tracer)
    if not isinstance(value, jax.Array):
        return False
    try:
        return not hasattr(value, "is_fully_addressable")
    except TypeError:  # jax.errors.ConcretizationTypeError: a traced array is not on any device.
        return True


def is_of_devices(error: ValueError) -> bool:
    """Whether an error of JAX says that arrays are on different devices. If JAX rewords it, users see its message."""
    return "incompatible devices" in str(error)


def varying_axes(x: Any) -> frozenset[Any]:
    """The mesh axes along which an array is known to differ. Empty outside `shard_map` and with `check_vma=False`.

    If JAX does not report the axes, the set is also empty, and wdjax trusts the caller.
    """
    kind = jax.typeof(x)
    found = getattr(getattr(kind, "manual_axis_type", None), "varying", None)
    if found is None:
        found = getattr(kind, "vma", None)  # Its name before JAX 0.10.
    return frozenset() if found is None else frozenset(found)


def may_be_split(x: Any) -> bool:
    """Whether an array may be on several devices. Within jit, its type may know the mesh but not the partition."""
    mesh = getattr(getattr(jax.typeof(x), "sharding", None), "mesh", None)
    return getattr(mesh, "size", 2) > 1


def explicit_spec(x: Any) -> Any:
    """How an array is split over the explicit axes of a mesh. Without explicit axes, it is equal for all arrays."""
    return getattr(getattr(jax.typeof(x), "sharding", None), "spec", None)


def automatic(function: Callable[..., Any], arguments: tuple[Any, ...], *, like: Any) -> Any:
    """Calls a function of arrays within jit. Explicit axes of a mesh are automatic inside the function.

    So rules can be written as if there were no mesh: XLA decides how to split intermediate arrays. The results get the
    sharding of the arrays in `like`; with None they are whole on every device.
    """
    explicit = [x for x in jax.tree.leaves(arguments) if _explicit_axes(x)]
    if auto_axes is None or not explicit:
        return function(*arguments)
    first = jax.typeof(explicit[0])
    whole_everywhere = jax.sharding.NamedSharding(first.sharding.mesh, jax.sharding.PartitionSpec())

    def sharding_of(x: Any) -> Any:
        # JAX forgets the mesh of zeros that are made within jit but without `jax.set_mesh`.
        is_known, kind = _explicit_axes(x), jax.typeof(x)
        return kind.sharding if is_known else first.sharding if kind.shape == first.shape else whole_everywhere

    out_sharding = whole_everywhere if like is None else jax.tree.map(sharding_of, like)
    within = auto_axes(function, axes=_explicit_axes(explicit[0]), out_sharding=out_sharding)
    # Without the mesh in a context, only a jit finds it.
    return (within if any(map(is_traced, explicit)) else jax.jit(within))(*arguments)


def _explicit_axes(x: Any) -> tuple[Any, ...]:
    """The axes of an array's mesh that are explicit. Within `shard_map` others may be manual."""
    mesh = getattr(getattr(jax.typeof(x), "sharding", None), "mesh", None)
    kinds = zip(getattr(mesh, "axis_names", ()), getattr(mesh, "axis_types", None) or (), strict=False)
    return tuple(name for name, kind in kinds if kind == jax.sharding.AxisType.Explicit)


def as_arguments(numbers: Sequence[Any], likes: Iterable[Any]) -> list[Any]:
    """Hides numbers from the compiler's constant folding, if there are several and something in `likes` is traced.

    XLA folds a constant into the loop that uses it, and compiles loops with different constants one by one. On the CPU,
    XLA treats the result of a call that it may not inline like an argument. So a thousand rates compile in the time of
    one. On other platforms the numbers stay constants.
    """
    distinct = dict.fromkeys(zip(numbers, (n.dtype for n in numbers), strict=True))
    if set_xla_metadata is None or len(distinct) < 2 or not any(is_traced(like) for like in likes):
        return list(numbers)
    values = tuple(value for value, _ in distinct)
    marked: Any = set_xla_metadata

    def called_on_cpu() -> list[jax.Array]:
        with marked(inlineable="false"):
            return _constants(values)

    called = jax.lax.platform_dependent(cpu=called_on_cpu, default=lambda: list(values))
    found = dict(zip(distinct, called, strict=True))
    return [found[number, number.dtype] for number in numbers]


@functools.partial(jax.jit, static_argnums=0)
def _constants(values: tuple[Any, ...]) -> list[jax.Array]:
    return [jnp.asarray(value) for value in values]


def whole(x: Any) -> np.ndarray:
    """The values of an array, including those on other processes. All processes must call it."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return np.asarray(x)
    if process_allgather is None:
        return _gathered(x)
    return np.asarray(process_allgather(x, tiled=True))


def _gathered(x: Any) -> np.ndarray:
    everywhere = jax.sharding.NamedSharding(x.sharding.mesh, jax.sharding.PartitionSpec())
    return np.asarray(jax.jit(lambda x: x, out_shardings=everywhere)(x))
