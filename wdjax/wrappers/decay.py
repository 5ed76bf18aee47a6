"""Decay around a finished optimizer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .._engine import anchors, checks, trees
from .._engine.arithmetic import compute_dtype, stateless, subtracted
from .._engine.loop import Action, DecayState
from .._engine.probe import gated
from .._engine.steps import nodes, stepped
from .._engine.types import Anchor, Mask, Optimizer, Rate
from .steps import FREE, Scale, check, refuse_what_rows_owe

PyTree = Any
_SUBTRACTED = stateless(subtracted)


class WithDecoupledDecayState(NamedTuple):
    """The state of every wrapper that decays: `with_decoupled_decay`, `with_sparse_decay` and the others.

    Attributes:
        decay: the count of real steps, any anchor, and in `leaf` what rows owe under `with_lazy_decay`.
        inner_state: the state of the wrapped optimizer.

    Example:

        >>> import jax.numpy as jnp, optax, wdjax
        >>> optimizer = wdjax.with_decoupled_decay(optax.adam(0.1), 0.1, learning_rate=0.1)
        >>> int(optimizer.init(jnp.ones(2)).decay.count)
        0
    """

    decay: DecayState
    inner_state: Any


@checks.known_arguments
def with_decoupled_decay(
    optimizer: Optimizer, weight_decay: Rate, mask: Mask = None, *, learning_rate: Rate, toward: Anchor = None
) -> optax.GradientTransformationExtraArgs:
    """Adds decoupled weight decay to any finished Optax optimizer.

    Rule:   u <- optimizer's u - learning_rate * weight_decay * (p - toward)
    Place:  around the whole optimizer; the result is the last thing before `optax.apply_updates`.
    Units:  as `decoupled_decay`, per step of the optimizer: under `optax.MultiSteps` once per accumulated gradient. A
            step that `MultiSteps` or `apply_if_finite` skips does not decay.
    Source: Loshchilov & Hutter 2019; for schedule-free Defazio et al. 2024 with the decay at y, as in Optax.

    Args:
        optimizer: an `optax.GradientTransformation` that ends with a learning rate, or an `optax.MultiSteps`. If it
            decays by itself, it goes on decaying, so give `optax.lion` and `optax.adamw` `weight_decay=0.0`.
        weight_decay, mask, toward: as `decoupled_decay`.
        learning_rate: the number or schedule that the optimizer has, called with the wrapper's own count of steps. If
            the optimizer keeps its learning rate in its state (`optax.inject_hyperparams`), the decay takes that one,
            and this must be its initial value. A factor that `optax.contrib.reduce_on_plateau` keeps counts too. The
            multipliers of a `scale_by_path` in the optimizer do not: write `learning_rate=1e-3 * multipliers`, or put
            `scale_by_path` after the wrapper.

    Returns:
        An `optax.GradientTransformationExtraArgs` with a `WithDecoupledDecayState`; its `update` needs `params`.

    Raises:
        TypeError, ValueError: for the optimizer; and for rates, masks and anchors, as `decoupled_decay`. At `init`: if
            the optimizer undoes or repeats an added decay, if it estimates the size of its steps, or if it has more
            than one learning rate. `init` also warns if rounding changes the rate or if it overshoots.
            `optax.polyak_sgd` estimates its steps too, but it has no state that shows it: put `add_l2_to_grads` first.

    Example:

        >>> import jax.numpy as jnp, optax, wdjax
        >>> schedule = optax.cosine_decay_schedule(0.5, 100)
        >>> optimizer = wdjax.with_decoupled_decay(optax.lion(schedule, weight_decay=0.0), 0.1, learning_rate=schedule)
        >>> params = jnp.array([2.0])
        >>> updates, _ = optimizer.update(jnp.zeros(1), optimizer.init(params), params)
        >>> round(float(optax.apply_updates(params, updates)[0]), 6)
        1.9
    """
    rates = {"weight_decay": weight_decay, "learning_rate": learning_rate}
    return around(optimizer, Action("with_decoupled_decay", rates, mask, toward, True))


class Factor(NamedTuple):
    """A further factor of the rate of a decay, which an optimizer's state tells.

    Attributes:
        check: called at `init` with the action, params and the optimizer's state: raises an error if it is not there.
        of: the factors of a step that ended with this state of the optimizer.
    """

    check: Callable[[Action, PyTree, Any], None] = lambda action, params, state: None
    of: Callable[[Any], tuple[jax.Array, ...]] = lambda state: ()


_NO_FACTOR = Factor()


def around(optimizer: Optimizer, action: Action, factor: Factor = _NO_FACTOR) -> optax.GradientTransformationExtraArgs:
    """Subtracts a decay from the updates of a finished optimizer, in its real steps and with its learning rate."""
    where, toward = action.where, action.toward
    inner = checks.finished(where, optimizer, f"{where}(optax.adam(1e-3), 0.1, learning_rate=1e-3)")
    scale = Scale(action)

    def init_fn(params: PyTree) -> WithDecoupledDecayState:
        trees.parameters(where, params)
        state = inner.init(params)
        check(where, action.rates["learning_rate"], state)
        decay = action.init(params)
        factor.check(action, params, state)
        return WithDecoupledDecayState(decay, state)

    def update_fn(updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any) -> tuple[PyTree, Any]:
        checks.params_given(where, params)
        refuse_what_rows_owe(where, state.decay)
        before = state.inner_state
        updates, after = inner.update(updates, before, params, **extra_args)
        real = stepped(before, after)
        shares = _shares(before, after)
        acting, factors = scale.of(after)
        factors += factor.of(after)

        def subtract(tree: PyTree, *shares: jax.Array) -> PyTree:
            return acting.run(_SUBTRACTED, tree, state.decay, params, gates=(*real, *factors, *shares))[0]

        def is_free(node: Any) -> bool:
            return isinstance(node, FREE)

        def subtract_from_iterate(node: Any) -> Any:
            return node._replace(z=subtract(node.z)) if is_free(node) else node

        if shares:
            after = jax.tree.map(subtract_from_iterate, after, is_leaf=is_free)
        new, probe = subtract(updates, *shares), extra_args.get("decay_probe")
        updates = gated(probe, action, params, lambda u: subtract(u, *shares), updates, new)
        count = state.decay.count
        is_real = jnp.all(jnp.array(real, bool))
        next_count = jnp.where(is_real, optax.safe_increment(count), count)
        anchor = anchors.moved(where, toward, state.decay.anchor, params, is_real if real else None)
        return updates, WithDecoupledDecayState(state.decay._replace(count=next_count, anchor=anchor), after)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _shares(before: Any, after: Any) -> tuple[jax.Array, ...]:
    """For a schedule-free optimizer, the share of a change of its iterate z that reaches the weights y at once.

    z' = z + change; x' = (1 - c) x + c z'; y' = b1 x' + (1 - b1) z'. Here c is the weight of this step in the average.
    """
    shares = []
    for old, new in zip(*(nodes(state, FREE) for state in (before, after)), strict=True):
        dtype = compute_dtype(new.weight_sum)
        total, previous, b1 = (jnp.asarray(x, dtype) for x in (new.weight_sum, old.weight_sum, new.b1))
        c = jnp.where(total > 0, (total - previous) / jnp.where(total > 0, total, 1), 0)
        shares.append(1 - b1 + b1 * c)
    return tuple(shares)
