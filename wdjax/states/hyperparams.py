"""Which numbers in a state differ from those in the code."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._engine import checks, trees
from .._engine.steps import INJECTED
from .._engine.types import Optimizer, Params
from .thawing import matched

PyTree = Any


@checks.known_arguments
def stale_hyperparams(state: PyTree, optimizer: Optimizer, params: Params) -> dict[str, tuple[Any, Any]]:
    """The rates and other numbers in a state that differ from those in the code.

    `optax.inject_hyperparams` keeps numbers in its state, and each step reads them there. So a run that is resumed goes
    on with the rates of its checkpoint, whatever the code says. Compare them after you restore, outside `jit`:

        stale = wdjax.stale_hyperparams(state, optimizer, params)
        assert not stale, stale  # Not if your loop sets rates on purpose.

    To use the number in the code, set it: `state = optax.tree.set(state, weight_decay=jnp.asarray(0.5))`. This sets
    all numbers of this name. Without `inject_hyperparams`, rates are not in the state: those in the code apply.

    Args:
        state: a state of `optimizer`, restored or trained, such as `train_state.opt_state`.
        optimizer: the optimizer, as the code builds it now.
        params: the parameters, as arrays. The function makes a state of them to compare with.

    Returns:
        For each number that differs: its path in the state, its value there and its value in the code. Betas, eps and
        all others are compared, too. The values of schedules are not: they come from the code.

    Raises:
        TypeError: if `optimizer` is not an optimizer, or if arrays are only described by their shapes.
        ValueError: if the state does not have the structure of `optimizer.init(params)`, for example because a number
            has become a schedule.

    Example:

        >>> import jax.numpy as jnp, optax, wdjax
        >>> params = {"w": jnp.ones(2)}
        >>> sgdw = optax.inject_hyperparams(wdjax.sgdw)
        >>> state = sgdw(learning_rate=0.1, weight_decay=0.25).init(params)
        >>> wdjax.stale_hyperparams(state, sgdw(learning_rate=0.1, weight_decay=0.5), params)
        {'hyperparams/weight_decay': (0.25, 0.5)}
    """
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves((state, params))):
        raise TypeError("stale_hyperparams: state and params must be arrays, not shapes. Call it with restored arrays.")
    fresh = checks.finished("stale_hyperparams", optimizer, "stale_hyperparams(state, optimizer, params)").init(params)
    kept, numbers = dict(trees.flatten_with_paths(state)), dict(_injected_numbers(fresh))
    # Numbers may differ in their dtypes, too.
    same = [kept.get(path, x) if path in numbers else x for path, x in trees.flatten_with_paths(fresh)]
    if faults := matched(state, jax.tree.unflatten(trees.structure(fresh), same), params).faults:
        raise ValueError(
            f"stale_hyperparams: the state does not fit this optimizer and these parameters. {' '.join(faults)} Pass "
            "the state of the optimizer alone, such as train_state.opt_state. If a number has become a schedule, or a "
            "schedule a number, keep the moments: optimizer.init(params)._replace(inner_state=state.inner_state)."
        )
    pairs = {path: (_on_host(kept[path]), _on_host(number)) for path, number in numbers.items()}
    return {path: (a.tolist(), b.tolist()) for path, (a, b) in pairs.items() if not _are_equal(a, b)}


def _on_host(x: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(x) if jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key) else x)


def _are_equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether numbers are equal in the narrower of their dtypes, as a state in bfloat16 holds those of the code."""
    floats = [x.dtype for x in (a, b) if jnp.issubdtype(x.dtype, jnp.floating)]
    dtype = min(floats, key=lambda dtype: jnp.finfo(dtype).bits, default=a.dtype)
    a, b = a.astype(dtype), b.astype(dtype)
    return a.shape == b.shape and bool(np.all((a == b) | ((a != a) & (b != b))))  # NaN is equal to NaN.


def _injected_numbers(state: PyTree, base: str = "") -> Iterable[tuple[str, Any]]:
    """The numbers that `optax.inject_hyperparams` keeps in a state, with their paths; not the values of schedules."""
    for keys, node in jax.tree_util.tree_flatten_with_path(state, is_leaf=lambda x: isinstance(x, INJECTED))[0]:
        if isinstance(node, INJECTED):
            path = base + "".join(f"{trees.key_text(key)}/" for key in keys)
            schedules = getattr(node, "hyperparams_states", {})
            yield from ((f"{path}hyperparams/{k}", x) for k, x in node.hyperparams.items() if k not in schedules)
            yield from _injected_numbers(node.inner_state, f"{path}inner_state/")
