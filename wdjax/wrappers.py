"""Wrappers around a finished optimizer: `with_decoupled_decay` adds weight decay, and `freeze` freezes parameters.

Around a finished optimizer, there is only one right place for a decay: after it, with the factor of the learning rate
and the right sign. Two kinds of optimizers need more than that:

- Some do not step at every update: `optax.MultiSteps` while it accumulates or skips, `optax.apply_if_finite` at a
  NaN. The decay waits with them, and so does its step count.
- Schedule-free holds the iterate that it really steps in its state. The decay goes into that iterate, and through its
  averaging into the weights, as if it were in the base optimizer.

Optimizers that rewrite the weights from their own state, or that step only in part, raise an error.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from ._engine import checks, trees
from ._engine.arithmetic import compute_dtype, stateless, subtracted
from ._engine.loop import Action, DecayState
from ._engine.masks import flags
from ._engine.rules import check_booleans
from ._engine.steps import SKIPPING, nodes, stepped
from ._engine.types import Anchor, Mask, Optimizer, Rate
from ._engine.unstable import automatic, explicit_spec, is_traced, may_be_split
from .paths import Rules

PyTree = Any
_SUBTRACTED = stateless(subtracted)


class WithDecoupledDecayState(NamedTuple):
    """The state of `with_decoupled_decay`: the count of real steps, any anchor, and the wrapped optimizer's state."""

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
        learning_rate: the number or schedule that the optimizer has, called with the wrapper's own count of steps.

    Returns:
        An `optax.GradientTransformationExtraArgs` with a `WithDecoupledDecayState`; its `update` needs `params`.

    Raises:
        TypeError, ValueError: for the optimizer; and for rates, masks and anchors, as `decoupled_decay`. At `init`: if
            the optimizer undoes or repeats an added decay, or if parts of it step on their own. `init` also warns of
            weight_decay * learning_rate as `independent_decay` does.

    Example:

        >>> import jax.numpy as jnp, optax, wdjax
        >>> schedule = optax.cosine_decay_schedule(0.5, 100)
        >>> optimizer = wdjax.with_decoupled_decay(optax.lion(schedule, weight_decay=0.0), 0.1, learning_rate=schedule)
        >>> params = jnp.array([2.0])
        >>> updates, _ = optimizer.update(jnp.zeros(1), optimizer.init(params), params)
        >>> round(float(optax.apply_updates(params, updates)[0]), 6)
        1.9
    """
    where = "with_decoupled_decay"
    inner = checks.finished(where, optimizer, f"{where}(optax.adam(1e-3), 0.1, learning_rate=1e-3)")
    action = Action(where, {"weight_decay": weight_decay, "learning_rate": learning_rate}, mask, toward, True)

    def init_fn(params: PyTree) -> WithDecoupledDecayState:
        trees.parameters(where, params)
        state = inner.init(params)
        _refuse_what_undoes_it(state)
        return WithDecoupledDecayState(action.init(params), state)

    def update_fn(updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any) -> tuple[PyTree, Any]:
        checks.params_given(where, params)
        before = state.inner_state
        updates, after = inner.update(updates, before, params, **extra_args)
        real = stepped(before, after)
        shares = _shares(before, after)

        def subtract(tree: PyTree, *factors: jax.Array) -> PyTree:
            return action.run(_SUBTRACTED, tree, state.decay, params, gates=factors)[0]

        def is_free(node: Any) -> bool:
            return isinstance(node, contrib.ScheduleFreeState)

        def subtract_from_iterate(node: Any) -> Any:
            return node._replace(z=subtract(node.z, *real)) if is_free(node) else node

        if shares:
            after = jax.tree.map(subtract_from_iterate, after, is_leaf=is_free)
        updates = subtract(updates, *real, *shares)
        count = state.decay.count
        next_count = jnp.where(jnp.all(jnp.array(real, bool)), optax.safe_increment(count), count)
        return updates, WithDecoupledDecayState(state.decay._replace(count=next_count), after)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@checks.known_arguments
def freeze(optimizer: Optimizer, mask: Mask) -> optax.GradientTransformationExtraArgs:
    """Keeps the parameters of a mask bit for bit. It goes around the optimizer, not into a chain as `optax.freeze`.

    Later transformations in a chain, such as a decay, can undo zero updates. Here the optimizer never sees a frozen
    parameter: it has no state for it, and no global norm includes its gradient. Whatever is inside changes no bit.

    Rule:   u <- -0.0 where the mask is True (p + -0.0 is p, also for p = -0.0, inf and NaN); else the optimizer's u
    Place:  around the whole optimizer: the last thing before `optax.apply_updates`.
    Units:  those of the optimizer.
    Source: big_vision's `schedule=[(regex, None)]`. Optax's `selective_transform` turns a weight of -0.0 into +0.0.

    Args:
        optimizer: an `optax.GradientTransformation` or `optax.MultiSteps`, with any decay inside.
        mask: True for frozen parameters: `only("encoder")`, or any other mask of `decoupled_decay`.

    Returns:
        An `optax.GradientTransformationExtraArgs` with the state of `optimizer` for the other parameters. Its `update`
        needs `params`. Rules inside may still name frozen parameters. To unfreeze, make a new state.

    Raises:
        TypeError, ValueError: for the optimizer; and for the mask or missing params, as `decoupled_decay`.

    Example:

        >>> import jax.numpy as jnp, optax, wdjax
        >>> optimizer = wdjax.freeze(wdjax.adamw(0.5, 0.1), wdjax.only("encoder"))
        >>> params = {"encoder": jnp.array([2.0]), "head": jnp.array([2.0])}
        >>> updates, _ = optimizer.update({k: jnp.zeros(1) for k in params}, optimizer.init(params), params)
        >>> {name: round(float(new[0]), 6) for name, new in optax.apply_updates(params, updates).items()}
        {'encoder': 2.0, 'head': 1.9}
    """
    inner = checks.finished("freeze", optimizer, "freeze(optax.adam(1e-3), only('encoder'))")
    if mask is None:
        raise TypeError("freeze: the mask is None. Select the frozen parameters: freeze(optimizer, only('encoder')).")
    if isinstance(mask, Rules):
        check_booleans(mask, "freeze")

    def init_fn(params: PyTree) -> Any:
        trees.parameters("freeze", params)
        return inner.init(_Frozen(mask, params).hidden(params, is_params=True))

    def update_fn(updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any) -> tuple[PyTree, Any]:
        checks.params_given("freeze", params)
        frozen = _Frozen(mask, params)
        extra_args = {name: frozen.hidden_in_argument(name, value) for name, value in extra_args.items()}
        moved, state = inner.update(frozen.hidden(updates), state, frozen.hidden(params, is_params=True), **extra_args)
        return frozen.kept(updates, moved), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class _Frozen:
    """The frozen parameters. It hides them from an optimizer and makes the updates that keep them."""

    def __init__(self, mask: Any, params: PyTree):
        self.params = params
        self.leaves = trees.flatten_with_paths(params)
        self.flags = flags("freeze", mask, params, self.leaves, of_all=True)

    def hidden(self, tree: PyTree, *, is_params: bool = False) -> PyTree:
        """A tree like params with empty places for frozen parameters. Frozen parts have gradients of 0."""

        def hide(x: Any, i: int) -> Any:
            flag = self.flags[i]
            if flag is True:
                return trees.Hidden.of(self.leaves[i][1])
            return x if flag is False or is_params or trees.is_hole(x) else _where(flag, jnp.zeros_like(x), x)

        return self._mapped(hide, tree)

    def hidden_in_argument(self, name: str, value: Any) -> Any:
        """The extra arguments of line searches and the like: gradients, and functions of all parameters."""
        if name == "grad":
            return self.hidden(value)
        if name not in ("value_fn", "obj_fn", "grad_fn"):
            return value

        def of_the_others(tree: PyTree, *args: Any, **kwargs: Any) -> Any:
            whole = self._mapped(lambda x, i: self.leaves[i][1] if self.flags[i] is True else x, tree)
            result = value(whole, *args, **kwargs)
            return self.hidden(result) if name == "grad_fn" else result

        return of_the_others

    def kept(self, updates: PyTree, moved: PyTree) -> PyTree:
        """The updates in `moved`, and for frozen parameters updates that change no bit."""
        given, _ = self._beside(updates)

        def update(new: Any, i: int) -> Any:
            flag, param = self.flags[i], self.leaves[i][1]
            if flag is False:
                return new
            if flag is True:
                return _no_update(given[i], param)
            # A hole and the gradient of an integer (float0) change nothing.
            has_bits = not trees.is_hole(new) and getattr(new, "dtype", None) != jax.dtypes.float0
            return _where(flag, _no_update(new, param), new) if has_bits else new

        return self._mapped(update, moved)

    def _mapped(self, leaf_fn: Any, tree: PyTree) -> PyTree:
        found, rebuilt = self._beside(tree)
        return rebuilt([leaf_fn(leaf, i) for i, leaf in enumerate(found)])

    def _beside(self, tree: PyTree) -> Any:
        return trees.beside("freeze", tree, self.params, [path for path, _ in self.leaves])


@jax.jit
def _where(flag: Any, if_frozen: Any, if_not: Any) -> jax.Array:
    return automatic(jnp.where, (flag, if_frozen, if_not), like=if_not)


def _no_update(update: Any, param: Any) -> Any:
    """The update that keeps every bit of a parameter, with the dtype and sharding of its own update: -0.0.

    On one device it is a constant, and XLA omits its addition. On several devices, a constant that is returned from jit
    would be replicated on all of them, unless its type has the explicit axes of a mesh. So there a `select` that XLA
    cannot simplify ties it to the parameter. If it were tied to the update, the frozen gradient would be computed.
    """
    if trees.is_hole(update):
        return _no_update(param, param) if trees.is_decayable(param) else update
    if not trees.is_decayable(update):
        # The gradient of an integer may have the dtype float0, which has no bits. Nothing can be added to a key.
        dtype = getattr(update, "dtype", type(update))
        has_bits = dtype != jax.dtypes.float0 and any(jnp.issubdtype(dtype, kind) for kind in (jnp.integer, jnp.bool_))
        return jnp.zeros_like(update) if has_bits else update
    zeros = -jnp.zeros_like(update)
    if is_traced(param) and may_be_split(param) and explicit_spec(zeros) == explicit_spec(param):
        return jax.lax.select(jax.lax.optimization_barrier(False), param.astype(zeros.dtype), zeros)
    return zeros


_PARTIAL = (optax.PartitionState, optax.MaskedState)
_UNDOING = (optax.LookaheadState, optax.ConditionallyMaskState, optax.ConditionallyTransformState)
_UNDOING += (contrib.COCOBState, contrib.MechanicState, contrib.SAMState)
_OWN_STEPS = (*SKIPPING, contrib.ScheduleFreeState)


def _refuse_what_undoes_it(state: Any) -> None:
    write = "Put the decay inside: with_decoupled_decay(optax.sgd(lr), 0.1, learning_rate=lr), not optax.sgd(lr)."
    if nodes(state, (optax.ApplyEvery,)):
        fault = "optimizer holds optax.apply_every, and a decay around it would also act in calls that do not step"
        write = "Write with_decoupled_decay(optax.MultiSteps(optimizer, k), 0.1, learning_rate=lr)."
    elif found := nodes(state, _UNDOING):
        why = "which steps in part or rewrites the weights, so a decay after it would be undone or repeated"
        fault = f"optimizer holds a {type(found[0]).__name__}, {why}"
    elif found := [node for part in nodes(state, _PARTIAL) for node in nodes(tuple(part), _OWN_STEPS)]:
        fault = f"optimizer holds a {type(found[0]).__name__} for a part of the parameters, which step on their own"
    else:
        return
    raise ValueError(f"with_decoupled_decay: the {fault}. {write}")


def _shares(before: Any, after: Any) -> tuple[jax.Array, ...]:
    """For a schedule-free optimizer, the share of a change of its iterate z that reaches the weights y at once.

    z' = z + change; x' = (1 - c) x + c z'; y' = b1 x' + (1 - b1) z'. Here c is the weight of this step in the average.
    """
    shares = []
    for old, new in zip(*(nodes(state, (contrib.ScheduleFreeState,)) for state in (before, after)), strict=True):
        dtype = compute_dtype(new.weight_sum)
        total, previous, b1 = (jnp.asarray(x, dtype) for x in (new.weight_sum, old.weight_sum, new.b1))
        c = jnp.where(total > 0, (total - previous) / jnp.where(total > 0, total, 1), 0)
        shares.append(1 - b1 + b1 * c)
    return tuple(shares)
