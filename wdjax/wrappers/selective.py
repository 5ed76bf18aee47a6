"""Selective projection decay: it holds an array back only if its negative gradient points back, too.

Why a wrapper: the condition is about the gradient, and the projection is of the weights after the step. A wrapper
around the optimizer sees both.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .._engine import anchors, checks, mesh_axes, trees
from .._engine.arithmetic import LeafRule, Strength, away, minus, stateless
from .._engine.groups import SplitGroups, uneven
from .._engine.loop import Action
from .._engine.norms import direction
from .._engine.types import Anchor, Mask, Optimizer, Rate, StackedAxes
from ..paths import stacks
from .decay import WithDecoupledDecayState
from .steps import check_steps, refuse_what_rows_owe, refuse_what_skips

PyTree = Any
_WHERE = "with_selective_decay"


@checks.known_arguments
def with_selective_decay(
    optimizer: Optimizer,
    strength: Rate,
    mask: Mask = None,
    *,
    toward: Anchor = "init",
    axis_name: Any = None,
    stacked_axes: StackedAxes | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Moves an array back toward its anchor if its negative gradient points there and the step leads away: SPD.

    Rule:   for each array, with the gradient g, d = p - toward and new = p + u - toward: if <g, d> > 0,
            u <- u - strength * max(0, 1 - ||d|| / ||new||) * new. Otherwise u does not change (subnormal numbers may
            become 0).
    Place:  around the whole optimizer, because it must see the gradients themselves, before they enter the moments. The
            result is the last thing before `optax.apply_updates`.
    Units:  the fraction of the way back to the previous distance ||d||: at 1, a step on which it acts does not increase
            the distance. The learning rate does not scale it, because the way is that of the step.
    Source: Tian et al., "Rethinking Weight Decay for Robust Fine-Tuning of Foundation Models", arXiv 2411.01713
            (abstract), and its code, AdamSPD.

    Args:
        optimizer: an `optax.GradientTransformation` that ends with a learning rate.
        strength: as the weight_decay of `decoupled_decay`, one for each array or layer. Above 1, an array ends closer
            to its anchor than before, or beyond it after a long step.
        mask: as `decoupled_decay`, for whole arrays.
        toward: as `decoupled_decay`. By default, the weights at `init`: for fine-tuning, the pretrained ones. For
            adapters that start at zero, such as LoRA's, None.
        axis_name: within `shard_map`, the mesh axis, or a tuple of axes, that splits arrays.
        stacked_axes: as `add_penalty_to_grads`: each layer of a stack is an array of its own.

    Returns:
        An `optax.GradientTransformationExtraArgs` with a `WithDecoupledDecayState`; its `update` needs `params`.

    Raises:
        TypeError, ValueError: for the optimizer; for strengths, masks and anchors, as `decoupled_decay`. At `init`, for
            optimizers that rewrite the weights, search for the size of a step, or skip steps, such as
            `optax.MultiSteps`. Put that around this wrapper, so that it sees the gradient of the whole step.

    Example:

        >>> import jax.numpy as jnp, optax, wdjax.wrappers
        >>> optimizer = wdjax.wrappers.with_selective_decay(optax.sgd(1.0, momentum=0.9), 1.0)
        >>> params = jnp.array([0.0])
        >>> state = optimizer.init(params)
        >>> for gradient in (-4.0, 1.0):  # The momentum still leads away in the second step.
        ...     updates, state = optimizer.update(jnp.array([gradient]), state, params)
        ...     params = optax.apply_updates(params, updates)
        ...     print(params.tolist())
        [4.0]
        [4.0]
    """
    inner = checks.finished(_WHERE, optimizer, f"{_WHERE}(optax.adam(1e-3), 1.0)")
    action = Action(_WHERE, {"strength": strength}, mask, toward, stacked_axes=stacks(_WHERE, stacked_axes))
    groups = _Groups(axis_name=axis_name)
    opposed = stateless(_Opposed(groups), is_elementwise=False)
    projected = stateless(_Projected(groups), is_elementwise=False)

    def init_fn(params: PyTree) -> WithDecoupledDecayState:
        trees.parameters(_WHERE, params)
        state = inner.init(params)
        check_steps(_WHERE, state, f"{_WHERE}(optax.adam(1e-3), 1.0)")
        refuse_what_skips(_WHERE, state, f"{_WHERE}(optax.adam(lr), 1.0)")
        return WithDecoupledDecayState(action.init(params), state)

    def update_fn(updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any) -> tuple[PyTree, Any]:
        checks.params_given(_WHERE, params)
        refuse_what_rows_owe(_WHERE, state.decay)

        def run(rule: LeafRule, tree: PyTree) -> PyTree:
            return action.run(rule, tree, state.decay, params)[0]

        signs = run(opposed, updates)
        moved, after = inner.update(updates, state.inner_state, params, **extra_args)
        new = jax.tree.map(_chosen, updates, signs, moved, run(projected, moved), is_leaf=trees.is_hole)
        anchor = anchors.moved(_WHERE, toward, state.decay.anchor, params)
        count = optax.safe_increment(state.decay.count)
        return new, WithDecoupledDecayState(state.decay._replace(count=count, anchor=anchor), after)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _chosen(gradient: Any, sign: Any, moved: Any, projected: Any) -> Any:
    """The projected update where the sign is 1. Where nothing acts, the rule has left the gradient."""
    return moved if sign is gradient else jnp.where(sign > 0, projected, moved)


@dataclasses.dataclass(frozen=True, repr=False)
class _Groups(SplitGroups, called=_WHERE):
    """Whole arrays."""

    def has_positive_product(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Whether the inner product of two arrays is positive.

        As in `norm`, it is summed at three scales. The product of their directions would be simpler, but would have to
        wait for the norms, with a second communication for each array.
        """
        split = mesh_axes.split_over(self.called, x, mesh_axes.names(self.called, self.axis_name))
        maxexp = jnp.finfo(x.dtype).maxexp
        powers = (2.0 ** -int(0.7 * maxexp), 1.0, 2.0 ** int(0.7 * maxexp))
        sums = jnp.stack([jnp.sum(jnp.real(jnp.conj(x * power) * (y * power))) for power in powers])
        large, plain, small = mesh_axes.total(sums, split)
        is_small = (jnp.abs(plain) < 2.0 ** (-maxexp // 2)) & jnp.isfinite(small)
        return jnp.where(jnp.isfinite(plain), jnp.where(is_small, small, plain), large) > 0


@dataclasses.dataclass(frozen=True)
class _Opposed:
    """In place of the gradient, 1 where the step against it leads toward the anchor, else 0."""

    groups: _Groups

    def __call__(self, g: jax.Array, p: jax.Array, a: jax.Array | None, rate: Strength) -> jax.Array:
        return jnp.broadcast_to(self.groups.has_positive_product(g, away(p, a)), g.shape).astype(g.dtype)


@dataclasses.dataclass(frozen=True)
class _Projected:
    groups: _Groups

    def __call__(self, update: jax.Array, p: jax.Array, a: jax.Array | None, rate: Strength) -> jax.Array:
        if uneven(rate.value):
            raise ValueError(
                f"{_WHERE}: a strength or mask of shape {np.shape(rate.value)} differs within an array, which is held "
                "back as a whole. Give one strength for each array or layer, and select whole arrays: mask=only('w')."
            )
        landed = away(p + update, a)
        before, after = self.groups.norm(away(p, a)), self.groups.norm(landed)
        # A step with a NaN or an infinity stays as it is: no projection hides a fault, or spreads one.
        acts = (after > before) & (after < jnp.inf)
        excess = jnp.where(acts, direction(after - before, after), 0)
        return minus(update, Strength(rate.value * excess), landed)
