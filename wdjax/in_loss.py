"""In the loss: scalars to add to the loss before it is differentiated.

The gradient then includes the penalty's gradient, and everything after it sees that: clipping, averaging over devices,
the optimizer's moments. Formulas in papers usually mean this place. It is also the most expensive of the four: a
reduction over all weights and its backward pass, where `in_gradient` adds the same gradient in one pass.

A loss has no step count. Call a schedule yourself: `l2_penalty(params, schedule(step))`. Under `jit` the penalty covers
the whole parameters, however they are sharded. Within `shard_map` and `pmap`, add it once to the joint loss of all
devices; see the table in docs/how_to/many_devices.md.
"""

from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp

from ._engine import checks, mesh_axes, trees
from ._engine.anchors import is_in_state
from ._engine.arithmetic import LeafRule, Strength, away, compute_dtype
from ._engine.loop import Action
from ._engine.rules import check_no_mask
from ._engine.text import shown
from ._engine.types import Anchor, Mask, Params, Rate, StackedAxes
from .paths import stacks
from .penalties import L2, Penalty, check_kind, is_elementwise, weighted_value

PyTree = Any


@checks.known_arguments
def l2_penalty(
    params: Params, weight_decay: Rate, mask: Mask = None, *, toward: Anchor = None, axis_name: Hashable = None
) -> jax.Array:
    """Returns weight_decay / 2 times the sum of squared weights, to add to the loss.

    Rule:   loss <- loss + weight_decay / 2 * sum (p - toward)^2
    Place:  in the function that is differentiated.
    Units:  of the loss per squared weight. The factor 1/2 makes the gradient weight_decay * p. Keras' `l2(r)` is
            weight_decay = 2 r. scikit-learn's `Ridge(alpha)` is weight_decay = alpha / n with half the mean squared
            error as the loss.
    Source: Hoerl & Kennard 1970. The same as `add_l2_to_grads`; not the same as `decoupled_decay` in Adam.

    Args:
        params: a tree of parameters. Integers, booleans, PRNG keys and None are left out. For an NNX module, pass
            `nnx.state(model, nnx.Param)`, because its batch statistics are numbers too.
        weight_decay, mask: as `decoupled_decay`, except that a loss has no step for a schedule.
        toward: None for zero, or a tree like params, which may leave out parameters that do not decay, and hold 0.0 for
            zero, as in `decoupled_decay`.
        axis_name: within `shard_map`, the mesh axis, or a tuple of axes, that splits parameters. Every device then gets
            the penalty of the whole parameters. An array that is known to be the same on all devices of the axis
            counts once. With check_vma=False nothing is known, and all arrays count as split.

    Returns:
        A 0-d float32 array (float64 if a parameter is float64).

    Raises:
        TypeError, ValueError: for a rate that is a schedule, a bare array, negative, NaN or infinite; a mask or
            anchor that does not fit params; a rule that matches nothing; an unknown mesh axis.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> params = {"kernel": jnp.array([3.0, 4.0]), "bias": jnp.array([7.0])}
        >>> float(wdjax.l2_penalty(params, 0.2, wdjax.all_but("bias")))
        2.5
    """
    return _penalty(Action("l2_penalty", {"weight_decay": weight_decay}, mask, toward), params, L2(), axis_name)


@checks.known_arguments
def penalty(
    params: Params,
    kind: Penalty,
    strength: Rate,
    mask: Mask = None,
    *,
    toward: Anchor = None,
    axis_name: Hashable = None,
    stacked_axes: StackedAxes | None = None,
) -> jax.Array:
    """Returns strength times any penalty of the weights, to add to the loss.

    Rule:   loss <- loss + strength * sum over parameters of kind.value(p - toward)
    Place:  in the function that is differentiated.
    Units:  those of `kind`; see `wdjax.penalties`.
    Source: that of `kind`.

    Args:
        kind: a penalty: `L2()`, `L1()`, `ElasticNet(r)`, `GroupLasso(per=-1)`, `Huber(delta)`, or your own `Penalty`.
        params, strength, mask, toward: as `l2_penalty`.
        axis_name: as `l2_penalty`. Pass a mesh axis that splits norms to the penalty instead:
            `GroupLasso(axis_name="data")`.
        stacked_axes: as `add_penalty_to_grads`.

    Returns, Raises: as `l2_penalty`.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> float(wdjax.penalty({"kernel": jnp.array([3.0, -4.0])}, wdjax.GroupLasso(), 0.5))
        2.5
    """
    where = "penalty"
    check_kind(where, kind, "value")
    check_no_mask(where, "strength", strength, f"{where}(params, {shown(kind)}, strength=0.1, mask=...)")
    action = Action(where, {"strength": strength}, mask, toward, stacked_axes=stacks(where, stacked_axes))
    return _penalty(action, params, kind, axis_name)


def _penalty(action: Action, params: PyTree, kind: Penalty, axis_name: Any) -> jax.Array:
    where, toward = action.where, action.toward
    if is_in_state(toward):
        raise ValueError(
            f"{where}: toward={shown(toward)} needs a state, but a loss has none. "
            f"Write {where}(..., toward=initial_params)."
        )
    axes = mesh_axes.names(where, axis_name)
    if set(axes) & set(mesh_axes.names(where, getattr(kind, "axis_name", None))):
        raise ValueError(
            f"{where}: {shown(kind)} already takes its norms over all devices of {axis_name!r}, so "
            f"axis_name={axis_name!r} would count each norm once per device. Leave axis_name out of {where}."
        )
    leaves = trees.parameters(where, params, may_hold=["functions"])  # Equinox differentiates whole models.
    dtype = jnp.finfo(compute_dtype(*(leaf for _, leaf in leaves if trees.is_decayable(leaf)))).dtype

    def value(_: jax.Array, p: jax.Array, a: jax.Array | None, strength: Strength) -> jax.Array:
        return weighted_value(where, kind, away(p, a), strength).astype(dtype)

    rule = LeafRule(reduce=value, is_elementwise=is_elementwise(kind))
    total = action.total(rule, params, axes)
    return jnp.zeros([], dtype) if total is None else total
