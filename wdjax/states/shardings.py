"""The sharding of each array in the state of an optimizer."""

import collections
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .._engine import checks, trees
from .._engine.text import listed, shown
from .._engine.types import Optimizer, Params

PyTree = Any


@checks.known_arguments
def state_shardings(optimizer: Optimizer, params: Params, shardings: PyTree = None) -> PyTree:
    """The sharding of each array in an optimizer's state: that of its parameter, or whole on every device.

    XLA does not know where to put the moments that an `init` within `jit` makes of zeros. This tells it:
    `jax.jit(optimizer.init, out_shardings=state_shardings(optimizer, params))(params)`.

    Args:
        optimizer: any finished Optax optimizer.
        params: the parameters: arrays, or shapes as from `jax.eval_shape`.
        shardings: a tree like params of shardings, or a prefix of one: `jax.sharding.NamedSharding` or any other, or
            `PartitionSpec` for the mesh of `jax.set_mesh`. None for those that params have.

    Returns:
        A tree like `optimizer.init(params)`. Where the path of an array ends with that of a parameter and both have
        the same shape, it has the parameter's sharding. The rest is replicated on the same mesh: counts, metrics, the
        factored moments of Adafactor. If all parameters are in one kind of memory, the rest is there too.

    Raises:
        TypeError: if `optimizer` is not an optimizer, or a sharding is something else.
        ValueError: if a parameter has no sharding, or a sharding no parameter.

    Example:

        >>> import jax, jax.numpy as jnp, optax, wdjax
        >>> mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        >>> params = {"kernel": jax.ShapeDtypeStruct((64, 8), jnp.float32)}
        >>> adam, _ = wdjax.state_shardings(optax.adam(0.1), params, rows)
        >>> print(tuple(adam.count.spec), tuple(adam.mu["kernel"].spec))
        () ('data',)
    """
    where = "state_shardings"
    inner = checks.finished(where, optimizer, f"{where}(optimizer, params, shardings)")
    leaves = {path: leaf for path, leaf in trees.flatten_with_paths(params) if not trees.is_hole(leaf)}
    found = {path: getattr(leaf, "sharding", None) for path, leaf in leaves.items()}
    if shardings is not None:
        given = {path: each for path, each in trees.flatten_with_paths(shardings) if each is not None}
        found = {path: next((given[p] for p in trees.prefixes(path) if p in given), None) for path in leaves}
        used = {prefix for path in leaves for prefix in trees.prefixes(path)}
        if extra := [path for path in given if path not in used]:
            raise ValueError(f"{where}: the shardings have {listed(extra)}, and params do not. {_GIVE}")
    for path, sharding in found.items():
        if not isinstance(sharding, (jax.sharding.Sharding, PartitionSpec, type(None))):
            raise TypeError(f"{where}: the sharding of {path!r} is {shown(sharding)}. {_GIVE}")
    if bare := [path for path, sharding in found.items() if sharding is None]:
        raise ValueError(f"{where}: {listed(bare)} has no sharding. {_GIVE}")
    shapes = jax.eval_shape(inner.init, params)
    of_state = trees.flatten_with_paths(shapes)
    # A parameter may be called like a field of a state, such as "mu". The base of a tree like params has most of them.
    bases = collections.Counter(base for path, _ in of_state for base, end in trees.cuts(path) if end in leaves)
    everywhere = _everywhere(list(found.values()))

    def sharding_of(path: str, leaf: Any) -> Any:
        if trees.is_hole(leaf):
            return leaf
        ends = [(bases[base], end) for base, end in trees.cuts(path) if end in leaves]
        _, end = max(ends, key=lambda cut: cut[0], default=(0, None))
        return found[end] if end is not None and np.shape(leaves[end]) == leaf.shape else everywhere

    return jax.tree.unflatten(trees.structure(shapes), [sharding_of(*each) for each in of_state])


_GIVE = "Give a tree like params, or one sharding for all: state_shardings(optimizer, params, shardings)."


def _everywhere(shardings: Sequence[Any]) -> Any:
    """The sharding of what is whole on every device."""
    named = [each for each in shardings if isinstance(each, NamedSharding)]
    kinds = {getattr(each, "memory_kind", None) for each in shardings}
    kind = kinds.pop() if len(kinds) == 1 else None
    if named:
        widest = max(named, key=lambda each: each.mesh.size)
        return NamedSharding(widest.mesh, PartitionSpec(), memory_kind=kind)
    widest = max(shardings, key=lambda each: len(getattr(each, "device_set", ())), default=None)
    if widest is None or isinstance(widest, PartitionSpec):
        return None if widest is None else PartitionSpec()
    if widest.is_fully_replicated:
        return widest
    devices = sorted(widest.device_set, key=lambda device: device.id)
    return NamedSharding(Mesh(np.array(devices), ("devices",)), PartitionSpec(), memory_kind=kind)
