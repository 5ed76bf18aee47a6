"""Decay of the rows that had a gradient: of embedding tables, whose rows are mostly unused in a step, and of experts.

A row is an index along the first axis, with all that is below it: a token's vector in an embedding (vocabulary, width),
an expert's matrix in an array (experts, in, out), a single element of a vector.

Why a wrapper: whether a row was used shows in its gradient, and only there. After `scale_by_adam` a row without a
gradient still moves, by its momentum. But the decay belongs at the other end of the chain, after the learning rate. A
wrapper around the optimizer sees both ends.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .._engine import anchors, checks, mesh_axes, trees
from .._engine.arithmetic import LeafRule, Strength, away, cast, compute_dtype, minus, widened
from .._engine.loop import Action
from .._engine.probe import gated
from .._engine.rules import Rules, possible_values
from .._engine.text import shown
from .._engine.types import Anchor, Mask, Optimizer, Rate, StackedAxes
from ..paths import stacks
from .decay import WithDecoupledDecayState
from .steps import Scale, check, refuse_what_rows_owe, refuse_what_skips

PyTree = Any


@checks.known_arguments
def with_sparse_decay(
    optimizer: Optimizer,
    weight_decay: Rate,
    mask: Mask = None,
    *,
    learning_rate: Rate,
    toward: Anchor = None,
    stacked_axes: StackedAxes | None = None,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Adds decoupled weight decay to the rows whose gradient is not zero in this step. Other rows do not decay.

    Rule:   u <- optimizer's u - learning_rate * weight_decay * (p - toward) in rows where some gradient is not 0
    Place:  around the whole optimizer, because it must see the gradients themselves, before they enter the moments. A
            row is an index along the first axis; in a vector, each element is a row. Choose embeddings and experts with
            the mask.
    Units:  as `with_decoupled_decay`, per step in which the row has a gradient: rarely used rows decay less.
    Source: TensorFlow Addons' `DecoupledWeightDecayExtension` on sparse gradients, which decays the gathered rows.

    Args:
        optimizer: an `optax.GradientTransformation` that ends with a learning rate. Its moments may still move rows
            without a gradient. It may have a decay of its own for the parameters that `mask` leaves out.
        weight_decay, mask, toward: as `decoupled_decay`.
        learning_rate: as `with_decoupled_decay`.
        stacked_axes: as `add_penalty_to_grads`: the first axis of a layer is the one after these.
        axis_name: within `shard_map`, the mesh axis, or a tuple of axes, that splits arrays within a row.

    Returns:
        An `optax.GradientTransformationExtraArgs` with a `WithDecoupledDecayState`; its `update` needs `params`.

    Raises:
        TypeError, ValueError: as `with_decoupled_decay`. At `init`, also for optimizers that skip steps, such as
            `optax.MultiSteps`. Put these around this wrapper, so that it sees the gradient of the whole step.

    Example:

        >>> import jax.numpy as jnp, optax, wdjax
        >>> optimizer = wdjax.with_sparse_decay(optax.sgd(0.5), 0.5, learning_rate=0.5)
        >>> params = {"embedding": jnp.full((2, 1), 2.0)}
        >>> grads = {"embedding": jnp.array([[1.0], [0.0]])}
        >>> updates, _ = optimizer.update(grads, optimizer.init(params), params)
        >>> optax.apply_updates(params, updates)["embedding"].tolist()
        [[1.0], [2.0]]
    """
    rates = {"weight_decay": weight_decay, "learning_rate": learning_rate}
    axes = stacks("with_sparse_decay", stacked_axes)
    action = Action("with_sparse_decay", rates, mask, toward, True, stacked_axes=axes)
    return _around(optimizer, action, LeafRule(_Sparse(mesh_axes.names("with_sparse_decay", axis_name))))


@checks.known_arguments
def with_lazy_decay(
    optimizer: Optimizer,
    weight_decay: Rate,
    mask: Mask = None,
    *,
    learning_rate: Rate,
    toward: Anchor = None,
    stacked_axes: StackedAxes | None = None,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Adds decoupled weight decay that waits until a row has a gradient, and then applies all decay that it missed.

    Rule:   u <- optimizer's u - f * (p - toward) in rows where some gradient is not 0, where f is the fraction that the
            row owes: 1 - f = product of (1 - learning_rate * weight_decay) over the steps since the last such step,
            this one included. In other rows f grows, and u stays as it is.
    Place:  as `with_sparse_decay`.
    Units:  as `with_decoupled_decay`. With the same gradients, a row that has just caught up equals a row under
            `with_decoupled_decay`, if the optimizer does not move rows without a gradient (plain SGD and Adagrad do
            not, Adam does). While it waits, a row does not decay. At the end of training, apply the rest:
            p - f * (p - toward), with f from `decay.leaf` of the state.
    Source: the global weight decay of FBGEMM's sparse optimizers; the product in closed form.

    Args, Raises: as `with_sparse_decay`. `toward` can't be an `EMA`, which moves while a row waits, and the rate can't
    differ within a row.

    Returns:
        An `optax.GradientTransformationExtraArgs` with a `WithDecoupledDecayState`. Its `decay.leaf` has one number f
        for each row, in at least float32. So a decay that would round to nothing in a single step accumulates.

    Example:

        >>> import jax.numpy as jnp, optax, wdjax
        >>> optimizer = wdjax.with_lazy_decay(optax.sgd(0.5), 0.2, learning_rate=0.5)
        >>> params = {"embedding": jnp.full((1, 1), 2.0)}
        >>> state = optimizer.init(params)
        >>> for gradient in (0.0, 0.0, 1e-6):
        ...     updates, state = optimizer.update({"embedding": jnp.array([[gradient]])}, state, params)
        ...     params = optax.apply_updates(params, updates)
        ...     print(round(float(params["embedding"][0, 0]), 4))  # 2 * 0.9^3 in the end
        2.0
        2.0
        1.458
    """
    where = "with_lazy_decay"
    moving = possible_values(toward) if isinstance(toward, Rules) else [toward]
    for anchor in moving:
        if isinstance(anchor, anchors.EMA):
            raise ValueError(
                f"{where}: toward is {shown(anchor)}, which moves while a row waits, so there is no common anchor of "
                "the steps that it missed. Write toward='init', or with_sparse_decay(...)."
            )
    rates = {"weight_decay": weight_decay, "learning_rate": learning_rate}
    # It does not warn of rates that round to nothing in one step: what a row owes adds up.
    action = Action(where, rates, mask, toward, stacked_axes=stacks(where, stacked_axes))
    return _around(optimizer, action, LeafRule(_Lazy(mesh_axes.names(where, axis_name)), init=_owes_nothing))


def _around(optimizer: Optimizer, action: Action, rule: LeafRule) -> optax.GradientTransformationExtraArgs:
    where = action.where
    inner = checks.finished(where, optimizer, f"{where}(optax.adam(1e-3), 0.1, learning_rate=1e-3)")
    scale = Scale(action)

    def init_fn(params: PyTree) -> WithDecoupledDecayState:
        trees.parameters(where, params)
        state = inner.init(params)
        check(where, action.rates["learning_rate"], state)
        refuse_what_skips(where, state, f"{where}(optax.adam(lr), 0.1, learning_rate=lr)")
        return WithDecoupledDecayState(action.init(params, rule), state)

    def update_fn(updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any) -> tuple[PyTree, Any]:
        checks.params_given(where, params)
        if rule.init is None:
            refuse_what_rows_owe(where, state.decay)
        moved, after = inner.update(updates, state.inner_state, params, **extra_args)
        acting, factors = scale.of(after)
        wide = widened(updates)  # The decay is added to the update before rounding.
        terms, leaf = acting.run(rule, wide, state.decay, params, gates=factors)

        def decayed(tree: PyTree) -> PyTree:
            return jax.tree.map(_added, tree, wide, terms, is_leaf=trees.is_hole)

        new = gated(extra_args.get("decay_probe"), action, params, decayed, moved, decayed(moved))
        count = optax.safe_increment(state.decay.count)
        anchor = anchors.moved(where, action.toward, state.decay.anchor, params)
        return new, WithDecoupledDecayState(state.decay._replace(count=count, anchor=anchor, leaf=leaf), after)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _added(update: Any, gradient: Any, term: Any) -> Any:
    """The update plus the decay. Where nothing decays, the rule has left the gradient."""
    if term is gradient:
        return update
    return cast(cast(update, term.dtype) + term, jnp.result_type(update))


def _has_gradient(where: str, gradient: jax.Array, axes: mesh_axes.Names) -> jax.Array:
    """Whether each row has a gradient, with the axes of a row kept at size 1."""
    used = jnp.any(gradient != 0, range(1, gradient.ndim), keepdims=True)
    split = mesh_axes.split_over(where, gradient, axes)
    return mesh_axes.total(used.astype(jnp.int32), split) > 0


def _owes_nothing(param: jax.Array) -> jax.Array:
    dtype = jnp.finfo(compute_dtype(param)).dtype
    return jnp.zeros([size if axis == 0 else 1 for axis, size in enumerate(param.shape)], dtype)


@dataclasses.dataclass(frozen=True)
class _Sparse:
    """In place of the gradient, the decay of the rows that have one, and -0.0 in the other rows."""

    axes: mesh_axes.Names

    def __call__(self, g: jax.Array, p: jax.Array, a: Any, rate: Strength, state: Any, totals: Any) -> Any:
        used = _has_gradient("with_sparse_decay", g, self.axes)
        return minus(-jnp.zeros_like(g), Strength(jnp.where(used, rate.value, 0)), away(p, a)), None


@dataclasses.dataclass(frozen=True)
class _Lazy:
    """In place of the gradient, the decay that the rows with one owe, and -0.0 in the other rows."""

    axes: mesh_axes.Names

    def __call__(self, g: jax.Array, p: jax.Array, a: Any, rate: Strength, owed: jax.Array, totals: Any) -> Any:
        if any(size != 1 for size in np.shape(rate.value)[1:]):
            raise ValueError(
                f"with_lazy_decay: a rate or mask of shape {np.shape(rate.value)} differs within a row, which owes one "
                "fraction. Give one number for each row, with axes of size 1."
            )
        # The sum of the products: small rates are not lost, as they would be in a product of numbers close to 1.
        owed = owed + rate.value * (1 - owed)
        used = _has_gradient("with_lazy_decay", g, self.axes)
        paid = jnp.where(used, owed, 0)
        return minus(-jnp.zeros_like(g), Strength(paid), away(p, a)), jnp.where(used, 0, owed)
