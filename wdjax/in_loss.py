"""In the loss: scalars to add to what is differentiated.

The gradient that comes back holds the penalty's gradient, so everything after it sees it: clipping, averaging over
devices, the optimizer's moments. Of the four places this is the one that a formula in a paper means, and it is the
dearest: a reduction over all weights and its backward pass, where `in_gradient` adds the same thing in one pass.

There is no step count here. Call a schedule yourself: `l2_penalty(params, schedule(step))`. Under `jit` the penalty is
that of the whole parameters, however they are sharded. Within `shard_map` and `pmap` it is to be added once to the loss
that all devices have together: docs/many_devices.md has the table.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ._engine import arithmetic, checks, mesh_axes, trees
from ._engine.loop import Action
from .penalties import L2, Penalty, checked_kind

PyTree = Any


@checks.known_arguments
def l2_penalty(
    params: PyTree, weight_decay: Any, mask: Any = None, *, toward: PyTree = None, axis_name: Any = None
) -> jax.Array:
    """Half of weight_decay times the sum of squared weights, to add to the loss.

    Rule:   loss <- loss + weight_decay / 2 * sum (p - toward)^2
    Place:  in the function that is differentiated.
    Units:  of the loss per squared weight, with the half: its gradient is weight_decay * p. Keras' `l2(r)` is
            weight_decay = 2 r; scikit-learn's `Ridge(alpha)` is weight_decay = alpha / n beside half the mean square.
    Source: Hoerl & Kennard 1970. The same as `add_l2_to_grads`; not the same as `decoupled_decay` in Adam.

    Args:
        params: a tree of parameters; integers, booleans, PRNG keys and None are left out. Of an NNX module
            give `nnx.state(model, nnx.Param)`: its batch statistics are numbers too.
        weight_decay: a number or 0-d array (traced is fine) >= 0, or a `by_path` table of these.
        mask: None, `Rules` of booleans, a tree or prefix tree of booleans, or a function of params that gives one.
        toward: None for zero, or a tree like params, which may leave out what does not decay.
        axis_name: within `shard_map`, the mesh axis, or a tuple of them, that splits parameters: the penalty is then
            that of the whole parameters, on every device. What is known to be the same on all devices of the axis
            counts once; with check_vma=False nothing is known, and all are taken to be split.

    Returns:
        A 0-d float32 array (float64 if a parameter is).

    Raises:
        TypeError, ValueError: for a rate that is a schedule, negative, NaN, infinite or not a scalar; a mask or
            anchor that does not fit params; a rule that matches nothing; a mesh axis that is not there.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> params = {"kernel": jnp.array([3.0, 4.0]), "bias": jnp.array([7.0])}
        >>> float(wdjax.l2_penalty(params, 0.2, wdjax.all_but("bias")))
        2.5
    """
    return _penalty("l2_penalty", "weight_decay", params, L2(), weight_decay, mask, toward, axis_name)


@checks.known_arguments
def penalty(
    params: PyTree,
    kind: Penalty,
    strength: Any,
    mask: Any = None,
    *,
    toward: PyTree = None,
    axis_name: Any = None,
) -> jax.Array:
    """strength times any penalty of the weights, to add to the loss.

    Rule:   loss <- loss + strength * sum over parameters of kind.value(p - toward)
    Place:  in the function that is differentiated.
    Units:  those of the kind; see `wdjax.penalties`.
    Source: the kind's.

    Args:
        kind: a penalty: `L2()`, `L1()`, `ElasticNet(r)`, `GroupLasso(axis)`, `Huber(delta)`, or your own `Penalty`.
        params, strength, mask, toward: as `l2_penalty`.
        axis_name: as `l2_penalty`. A mesh axis that splits norms is given to the kind instead,
            `GroupLasso(axis_name="data")`.

    Returns, Raises: as `l2_penalty`.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> float(wdjax.penalty({"kernel": jnp.array([3.0, -4.0])}, wdjax.GroupLasso(), 0.5))
        2.5
    """
    return _penalty("penalty", "strength", params, checked_kind("penalty", kind), strength, mask, toward, axis_name)


def _penalty(
    where: str, name: str, params: PyTree, kind: Penalty, rate: Any, mask: Any, toward: PyTree, axis_name: Any
) -> jax.Array:
    if isinstance(toward, str):
        raise ValueError(
            f"{where}: toward={toward!r} needs a state, and a loss has none. Write {where}(..., toward=initial_params)."
        )
    axes = mesh_axes.names(where, axis_name)
    if set(axes) & set(mesh_axes.names(where, getattr(kind, "axis_name", None))):
        raise ValueError(
            f"{where}: {kind!r} takes its norms over all devices of {axis_name!r} already, and axis_name={axis_name!r} "
            f"would count them once for each. Leave axis_name out of {where}."
        )
    action = Action(where, {name: rate}, mask, toward)
    leaves = trees.flatten_with_paths(params)
    terms = action.terms(params, leaves, None)
    dtype = jnp.finfo(arithmetic.compute_dtype(*(leaf for _, leaf in leaves if trees.is_decayable(leaf)))).dtype
    totals: dict[mesh_axes.Names, jax.Array] = {(): jnp.zeros([], dtype)}
    for (_, param), term in zip(leaves, terms, strict=True):
        if term is not None:
            wide = arithmetic.compute_dtype(param)
            anchor = None if term.anchor is None else jnp.asarray(term.anchor, wide)
            far = arithmetic.away(jnp.asarray(param, wide), anchor)
            rate, axis = arithmetic.product(term.factors, wide)
            with jax.numpy_dtype_promotion("standard"):  # Of complex weights, a real norm meets the complex.
                value = kind.value(far) if axis is None else jax.vmap(kind.value, axis)(far)
            value = jnp.sum(rate * value).astype(dtype)
            split = mesh_axes.split_over(where, value, axes)
            totals[split] = totals[split] + value if split in totals else value
    return sum((mesh_axes.total(value, split) for split, value in totals.items()), jnp.zeros([], dtype))
