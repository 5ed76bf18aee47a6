"""Wrappers around a finished optimizer: `with_decoupled_decay` adds weight decay, and `freeze` freezes parameters.

Around a finished optimizer, there is only one right place for a decay: after it, with the factor of the learning rate
and the right sign. Two kinds of optimizers need more than that:

- Some do not step at every update: `optax.MultiSteps` while it accumulates or skips, `optax.apply_if_finite` at a
  NaN. The decay waits with them, and so does its step count.
- Schedule-free holds the iterate that it really steps in its state. The decay goes into that iterate, and through its
  averaging into the weights, as if it were in the base optimizer.
- `optax.inject_hyperparams` keeps the learning rate in its state, where a training loop may set it, and
  `reduce_on_plateau` a factor of it. The decay takes both from there.

Optimizers that rewrite the weights from their own state, that step only in part, or that estimate the size of their
steps raise an error. Only their own code can put a decay into such a step.
"""

import dataclasses
import re
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from ._engine import checks, trees
from ._engine.arithmetic import compute_dtype, stateless, subtracted
from ._engine.loop import Action, DecayState
from ._engine.masks import flags
from ._engine.probe import gated
from ._engine.rates import values_of
from ._engine.rules import check_booleans
from ._engine.steps import INJECTED, SKIPPING, injected, learning_rates, nodes, stepped
from ._engine.text import listed, shown
from ._engine.types import Anchor, Mask, Optimizer, Rate
from ._engine.unstable import automatic, explicit_spec, is_traced, may_be_split
from .paths import Rules
from .states import matched

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
        learning_rate: the number or schedule that the optimizer has, called with the wrapper's own count of steps. If
            the optimizer keeps its learning rate in its state (`optax.inject_hyperparams`), the decay takes that one,
            and this must be its initial value. A factor that `optax.contrib.reduce_on_plateau` keeps counts too.

    Returns:
        An `optax.GradientTransformationExtraArgs` with a `WithDecoupledDecayState`; its `update` needs `params`.

    Raises:
        TypeError, ValueError: for the optimizer; and for rates, masks and anchors, as `decoupled_decay`. At `init`: if
            the optimizer undoes or repeats an added decay, if it estimates the size of its steps, or if it has more
            than one learning rate. `init` also warns of weight_decay * learning_rate as `independent_decay` does.
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
    where = "with_decoupled_decay"
    inner = checks.finished(where, optimizer, f"{where}(optax.adam(1e-3), 0.1, learning_rate=1e-3)")
    action = Action(where, {"weight_decay": weight_decay, "learning_rate": learning_rate}, mask, toward, True)
    of_state = dataclasses.replace(action, rates={"weight_decay": weight_decay})

    def init_fn(params: PyTree) -> WithDecoupledDecayState:
        trees.parameters(where, params)
        state = inner.init(params)
        _refuse_what_undoes_it(state)
        _check_learning_rate(action.rates["learning_rate"], state)
        return WithDecoupledDecayState(action.init(params), state)

    def update_fn(updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any) -> tuple[PyTree, Any]:
        checks.params_given(where, params)
        before = state.inner_state
        updates, after = inner.update(updates, before, params, **extra_args)
        real = stepped(before, after)
        shares = _shares(before, after)
        kept = learning_rates(after)
        acting = of_state if kept else action
        factors = (*real, *kept, *(node.scale for node in nodes(after, _PLATEAUS)))

        def subtract(tree: PyTree, *shares: jax.Array) -> PyTree:
            return acting.run(_SUBTRACTED, tree, state.decay, params, gates=(*factors, *shares))[0]

        def is_free(node: Any) -> bool:
            return isinstance(node, contrib.ScheduleFreeState)

        def subtract_from_iterate(node: Any) -> Any:
            return node._replace(z=subtract(node.z)) if is_free(node) else node

        if shares:
            after = jax.tree.map(subtract_from_iterate, after, is_leaf=is_free)
        new, probe = subtract(updates, *shares), extra_args.get("decay_probe")
        updates = gated(probe, action, params, lambda u: subtract(u, *shares), updates, new)
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
        needs `params`. Rules inside may still name frozen parameters. To freeze others, or none, carry the state over:
        `thaw`.

    Raises:
        TypeError, ValueError: for the optimizer; for the mask or missing params, as `decoupled_decay`; and at `update`
            for the state of an optimizer with other frozen parameters.

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
        hidden, others = frozen.hidden(updates), frozen.hidden(params, is_params=True)
        try:
            moved, state = inner.update(hidden, state, others, **extra_args)
        except Exception as error:
            _explain(state, inner, others, error)
            raise
        return frozen.kept(updates, moved), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _explain(state: Any, inner: optax.GradientTransformation, params: PyTree, error: Exception) -> None:
    """Raises an error that shows `thaw` if the state of a failed update was made for other frozen parameters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = matched(state, jax.eval_shape(inner.init, params), params)
    lacks = f" It has nothing for {listed(found.thawed)}, which trains now." * bool(found.thawed)
    holds = f" It still has something for {listed(found.frozen)}, which is frozen now." * bool(found.frozen)
    if lacks or holds:
        raise ValueError(
            f"freeze: the state was made for other frozen parameters.{lacks}{holds} Carry it over: "
            "state = wdjax.thaw(state, optimizer, params)."
        ) from error


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
_PLATEAUS = (contrib.ReduceLROnPlateauState,)
_OWN_STEPS = (*SKIPPING, contrib.ScheduleFreeState)

_INSIDE = "Put the decay inside: with_decoupled_decay(optax.sgd(lr), 0.1, learning_rate=lr), not optax.sgd(lr)."
_INJECT = (
    "Put the decay inside: optax.inject_hyperparams(lambda learning_rate: with_decoupled_decay(optax.adam("
    "learning_rate), 0.1, learning_rate=learning_rate))(learning_rate=1e-3)."
)
_UNDOES = "a {}, which steps in part or rewrites the weights, so a decay after it would be undone or repeated"
_ESTIMATES = "a {}, which estimates the size of its own steps, so the learning rate is not the factor of its decay"
_SEARCHES = "a {}, which searches for the size of each step, so the learning rate is not the factor of its decay"
_IN_LOSS = "Put l2_penalty(params, 0.1) into the loss, so that the search sees it."


def _own(name: str) -> str:
    return f"Use its own argument: optax.contrib.{name}(weight_decay=0.1)."


# The states of optimizers around which no decay is right, by name, as Optax does not export all of them: why, and what
# to write instead.
_REFUSED = {
    **dict.fromkeys(("LookaheadState", "ConditionallyMaskState", "ConditionallyTransformState"), (_UNDOES, _INSIDE)),
    **dict.fromkeys(("MechanicState", "SAMState"), (_UNDOES, _INSIDE)),
    "COCOBState": (_UNDOES, _own("cocob")),
    "MadgradState": (_UNDOES, _own("madgrad")),
    "DAdaptAdamWState": (_ESTIMATES, _own("dadapt_adamw")),
    "ProdigyState": (_ESTIMATES, _own("prodigy")),
    "MomoState": (_ESTIMATES, _own("momo")),
    "MomoAdamState": (_ESTIMATES, _own("momo_adam")),
    "DoGState": (_ESTIMATES, _own("dog")),
    "DoWGState": (_ESTIMATES, _own("dowg")),
    "ScaleByDistanceOverGradientsState": (
        _ESTIMATES,
        "Put the decay in front: optax.chain(decoupled_decay(0.1), optax.scale_by_distance_over_gradients()).",
    ),
    "ScaleByRpropState": (
        _ESTIMATES,
        "Give the fraction of a weight that each step takes: optax.chain(optax.rprop(lr), independent_decay(1e-4)).",
    ),
    "ScaleByBacktrackingLinesearchState": (_SEARCHES, _IN_LOSS),
    "ScaleByZoomLinesearchState": (_SEARCHES, _IN_LOSS),
    "ApplyEvery": (
        "optax.apply_every, and a decay around it would also act in calls that do not step",
        "Write with_decoupled_decay(optax.MultiSteps(optimizer, k), 0.1, learning_rate=lr).",
    ),
}
# Hyperparameters that are learning rates under another name. The second pattern counts only without the first.
_A_RATE = re.compile(r"(.*_)?(lr|learning_?rate|step_?size)\d*|(lr|learning_?rate|step_?size)_.*")
_MAYBE_A_RATE = re.compile(r"(eta|alpha|scale|factor|multiplier)\d*")


def _refuse_what_undoes_it(state: Any) -> None:
    names: list[str] = []
    jax.tree.leaves(state, is_leaf=lambda node: bool(names.append(type(node).__name__)))
    if found := [name for name in names if name in _REFUSED]:
        why, write = _REFUSED[found[0]]
        fault = f"holds {why.format(found[0])}"
    elif found := _in_parts(state, (*_OWN_STEPS, *_PLATEAUS)):
        name, write = type(found[0]).__name__, _INSIDE
        fault = f"holds a {name} for a part of the parameters, which step on their own"
    elif any(map(_rates_in, _in_parts(state, INJECTED))):
        fault, write = "keeps a learning rate for a part of the parameters in its state", _INJECT
    elif (found := _rates_in(state)) not in ([], ["learning_rate"]):
        fault, write = f"keeps {found} in its state, and the decay needs one learning_rate", _INJECT
    elif found and "ScaleByScheduleState" in names:
        fault, write = "keeps a learning_rate in its state and multiplies it by a schedule", _INJECT
    else:
        return
    raise ValueError(f"with_decoupled_decay: the optimizer {fault}. {write}")


def _in_parts(state: Any, kinds: tuple[type, ...]) -> list[Any]:
    """The nodes of these types that belong to a part of the parameters."""
    return [node for part in nodes(state, _PARTIAL) for node in nodes(tuple(part), kinds)]


def _rates_in(state: Any) -> list[str]:
    """The names of the hyperparameters in a state that look like learning rates."""
    names = [name for table in injected(state) for name in table]
    return [x for x in names if _A_RATE.fullmatch(x)] or [x for x in names if _MAYBE_A_RATE.fullmatch(x)]


def _check_learning_rate(given: Any, state: Any) -> None:
    """Raises an error if the learning rate that was given is not the one that the optimizer keeps in its state."""
    for kept in learning_rates(state):
        said = shown(given)
        if not isinstance(given, Rules):
            first = values_of(given, [0]) if callable(given) else given
            if first is None or is_traced(first) or is_traced(kept) or _agree(first, kept):
                continue
            said = f"{np.ravel(first)[0]:.6g}{' in the first step' * callable(given)}"
        raise ValueError(
            f"with_decoupled_decay: learning_rate is {said}, but the optimizer keeps {float(kept):.6g} in its state, "
            f"and the decay takes that one. Give the same to both. If the step has another factor: {_INJECT}"
        )


def _agree(number: Any, kept: Any) -> bool:
    dtype = jnp.result_type(kept)  # The state may have rounded the number.
    eps = float(jnp.finfo(dtype).eps) if jnp.issubdtype(dtype, jnp.floating) else 0.0
    return np.allclose(np.float64(number), np.float64(kept), rtol=max(eps, 1e-6), atol=0)


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
