"""Wrappers and writers that keep small steps from being rounded away in bfloat16, float16 or float8.

`optax.apply_updates` rounds params + update to the dtype of params. In bfloat16, rounding undoes a change of less than
2^-9 of a weight (float16: 2^-12, float8_e4m3fn: 2^-5). A decay is such a change in every step, so it never happens. It
is lost in two places, and each has its own remedy:

- *Within* the optimizer, the decay is a small number beside a large one. `in_float32` wraps the optimizer, so its
  arithmetic and its state are in float32, whatever the dtype of the parameters.
- *At the end*, the step is a small number beside the weight. A writer is the last in the chain. With its update,
  `optax.apply_updates` lands on a number that the writer chose: one drawn at random with the right mean
  (`stochastic_rounding`), the nearest after earlier rounding errors are added back (`compensated`), or the nearest to a
  float32 copy of the weights (`master_weights`).

    optax.chain(in_float32(adamw(3e-4, 0.1, mask)), stochastic_rounding(seed=0))

Nothing after a writer may change the update. A decay after it is rounded away again.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from .._engine import checks, trees
from .._engine.steps import nodes
from .._engine.types import Optimizer
from .rounding import is_low
from .writers import WRITERS as WRITERS
from .writers import CompensatedState as CompensatedState
from .writers import MasterWeightsState as MasterWeightsState
from .writers import StochasticRoundingState as StochasticRoundingState
from .writers import compensated as compensated
from .writers import master_weights as master_weights
from .writers import stochastic_rounding as stochastic_rounding

PyTree = Any


@checks.known_arguments
def in_float32(optimizer: Optimizer) -> optax.GradientTransformationExtraArgs:
    """Runs an optimizer in float32 on gradients and parameters of lower precision.

    In bfloat16, the sum of a direction and a decay loses the decay if it is less than 2^-9 of the direction, and a
    second moment with b2 = 0.999 never moves.

    Rule:   u <- optimizer's u for the gradients, the parameters and a state in float32; u stays in float32
    Place:  around the optimizer. After it, last in the chain, comes a writer: `stochastic_rounding`, `compensated` or
            `master_weights`.
    Units:  those of the optimizer. The state is as large as for float32 parameters: 8 bytes per parameter for Adam.
    Source: torchao's low-bit optimizers compute in float32 as well.

    Args:
        optimizer: an `optax.GradientTransformation` or `optax.MultiSteps`, with any decay inside.

    Returns: an `optax.GradientTransformationExtraArgs` with the state of `optimizer` for float32 parameters. If
        parameters and gradients are in float32 or wider, it changes nothing.
    Raises: a TypeError if `optimizer` is not an optimizer; a ValueError at `init` if a writer is inside.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> optimizer = wdjax.in_float32(wdjax.adamw(0.01, 0.1))
        >>> params = {"kernel": jnp.array([2.0], jnp.bfloat16)}
        >>> updates, _ = optimizer.update({"kernel": jnp.zeros(1, jnp.bfloat16)}, optimizer.init(params), params)
        >>> updates["kernel"].dtype, round(float(updates["kernel"][0]), 6)
        (dtype('float32'), -0.002)
    """
    inner = checks.finished("in_float32", optimizer, "in_float32(optax.adam(1e-3))")

    def init_fn(params: PyTree) -> Any:
        trees.parameters("in_float32", params)
        state = inner.init(_widened(params))
        if nodes(state, WRITERS) and any(map(is_low, jax.tree.leaves(params))):
            raise ValueError(
                "in_float32: the optimizer holds a writer, which would see float32 parameters and do nothing. "
                "Put it behind: optax.chain(in_float32(optimizer), compensated())."
            )
        return state

    def update_fn(updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any) -> tuple[PyTree, Any]:
        return inner.update(_widened(updates), state, _widened(params), **extra_args)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def apply_updates(params: PyTree, updates: PyTree) -> PyTree:
    """Adds updates to parameters of any dtype: `optax.apply_updates` that also works with float8.

    Optax relies on JAX's dtype promotion, which is not defined for float8 and float32. Here the sum is computed in at
    least float32 and rounded to the nearest number in the dtype of the parameter. For other dtypes both do the same.

    Args:
        params: the parameters. None stays None.
        updates: a tree of the same structure.

    Returns: the new parameters, with the dtypes of the old ones.
    Raises: a ValueError if the trees differ in structure.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> wdjax.apply_updates(jnp.ones(2, jnp.float8_e4m3fn), jnp.array([0.1, 0.2])).tolist()
        [1.125, 1.25]
    """

    def add(p: Any, u: Any) -> Any:
        if p is None or u is None or not (trees.is_decayable(p) and trees.is_decayable(u)):
            return optax.apply_updates(p, u)  # pyright: ignore[reportArgumentType]
        dtype = jnp.promote_types(*(jnp.float32 if is_low(x) else jnp.result_type(x) for x in (p, u)))
        return (jnp.asarray(p, dtype) + jnp.asarray(u, dtype)).astype(jnp.result_type(p))

    if trees.structure(params) != trees.structure(updates):  # JAX's own error may print arrays.
        trees.beside("apply_updates", updates, params, [path for path, _ in trees.flatten_with_paths(params)])
    return jax.tree.map(add, params, updates, is_leaf=lambda x: x is None)


def _widened(tree: PyTree) -> PyTree:
    return trees.of_each(tree, is_low, lambda x: x.astype(jnp.float32), lambda x: x)
