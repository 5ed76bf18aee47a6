"""The metrics in a state, as a flat dictionary to log."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._engine import checks, trees

PyTree = Any


@checks.known_arguments
def scalars(opt_state: PyTree, prefix: str = "") -> dict[str, jax.Array]:
    """Reads what `monitor` measured in the last step, as a flat dictionary to log.

    Call it on the state after `update`, inside or outside the compiled step. TensorBoard, Weights & Biases and clu
    group plots by the "/" in names.

    Args:
        opt_state: the state of an optimizer with a `monitor` anywhere in it, or an object that holds the state: a
            `TrainState`, an `nnx.Optimizer` or its `nnx.state`, a checkpoint that was restored into dictionaries.
        prefix: a string before each name, such as "train/".

    Returns: {prefix + "group/metric": value} for every monitor in the state. {prefix + "learning_rate": value} is the
        learning rate that `optax.inject_hyperparams` keeps anywhere in the state, or else the one that the monitor was
        given; "weight_decay" an injected weight decay. If there are several, they are "learning_rate_0" and so on, in
        the order of the state. Values are 0-d float32 arrays; under `vmap` and `pmap` they have more axes.
        `jax.device_get` turns them all into NumPy scalars at once.
    Raises: a ValueError if the state holds no monitor, or several monitors with the same group name.

    Example:

        >>> import jax.numpy as jnp, optax, wdjax
        >>> optimizer = optax.chain(optax.clip(1.0), wdjax.monitor(optax.sgd(0.1)))
        >>> params = {"w": jnp.array([3.0, 4.0])}
        >>> _, state = optimizer.update(params, optimizer.init(params), params)
        >>> float(wdjax.scalars(state, "train/")["train/undecayed/weight_norm"])
        5.0
    """
    found: dict[str, jax.Array] = {}
    monitors = _nodes(opt_state, "measured")
    if not monitors:
        raise ValueError(
            "scalars: there is no MonitorState in this state. Wrap the optimizer before init: "
            "monitor(optax.adamw(1e-3, weight_decay=0.1), 0.1, learning_rate=1e-3)."
        )
    for monitor in monitors:
        for path, value in trees.flatten_with_paths(monitor["measured"]):
            if prefix + path in found:
                what = f"scalars: {len(monitors)} monitors in this state measure {path!r}."
                write = "Give their groups different names: monitor(..., groups=lambda leaf: 'encoder')."
                raise ValueError(f"{what} {write}")
            found[prefix + path] = value
    injected = [node["hyperparams"] for node in _nodes(opt_state, "hyperparams")]
    for name in ("learning_rate", "weight_decay"):
        for tables in (injected, [monitor.get("rates", {}) for monitor in monitors]):
            values = [value for table in tables for key, value in trees.flatten_with_paths(table) if key == name]
            for i, value in enumerate(values):
                key = name if len(values) == 1 else f"{name}_{i}"
                found[prefix + key] = jnp.asarray(value, jnp.float32)
            if values:
                break
    return found


def _nodes(state: PyTree, field: str) -> list[Mapping[str, Any]]:
    """The fields of each named tuple around an optimizer that has this field, however deep.

    NNX and checkpoints turn named tuples into mappings. NNX leaves empty fields out.
    """

    def fields(node: Any) -> Mapping[str, Any]:
        return node._asdict() if hasattr(node, "_asdict") else node if isinstance(node, Mapping) else {}

    def is_one(node: Any) -> bool:
        return {field, "inner_state"} <= set(fields(node))

    found = []
    for node in jax.tree.leaves(state, is_leaf=is_one):
        if is_one(node):
            found += [fields(node), *_nodes(fields(node)["inner_state"], field)]
    return found
