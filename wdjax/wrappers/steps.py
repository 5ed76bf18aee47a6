"""Whether an optimizer's own steps allow a decay around it, and the learning rate that multiplies it."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from .._engine.arithmetic import stateless, subtracted
from .._engine.loop import Action, DecayState
from .._engine.rates import values_of
from .._engine.steps import INJECTED, SKIPPING, injected, learning_rates, nodes
from .._engine.text import shown
from .._engine.unstable import is_traced
from ..paths import Rules

PyTree = Any
_SUBTRACTED = stateless(subtracted)


_PARTIAL = (optax.PartitionState, optax.MaskedState)
PLATEAUS = (contrib.ReduceLROnPlateauState,)
FREE = (contrib.ScheduleFreeState,)
_OWN_STEPS = (*SKIPPING, *FREE)

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


def refuse_what_rows_owe(where: str, state: DecayState) -> None:
    """Raises an error if rows still owe a decay, which this wrapper would forget."""
    if state.leaf is not None:
        raise ValueError(
            f"{where}: the state is that of with_lazy_decay, and rows still owe decay. Pay it, "
            "p - state.decay.leaf * (p - toward), and then make a new state: optimizer.init(params)."
        )


def refuse_what_skips(where: str, state: Any, write: str) -> None:
    """Raises an error if an optimizer takes other steps than those of its gradients. `write` is a call of `where`."""
    for node in nodes(state, _OWN_STEPS):
        raise ValueError(
            f"{where}: the optimizer holds the state {type(node).__name__}, whose steps are not those of the "
            f"gradients. Put it around the decay, as in optax.MultiSteps({write}, 4)."
        )


def check_steps(where: str, state: Any, write: str) -> None:
    """Raises an error if an optimizer undoes a change of its steps. `write` is a call of `where`."""
    for name in _names_in(state):
        why, _ = _REFUSED.get(name, (_ESTIMATES, ""))
        if why is not _ESTIMATES:
            raise ValueError(
                f"{where}: the optimizer holds {why.format(name)}. Wrap the optimizer inside, or another one: {write}."
            )


class Scale:
    """How strong a decay around an optimizer is in a step, if the optimizer keeps its learning rate in its state."""

    def __init__(self, action: Action):
        self._action, self._of_state = (
            action,
            dataclasses.replace(action, rates={"weight_decay": action.rates["weight_decay"]}),
        )

    def of(self, state: Any) -> tuple[Action, tuple[Any, ...]]:
        """The decay, and further factors of its rate, for an update that ended with this state."""
        kept = learning_rates(state)
        return (self._of_state if kept else self._action), (*kept, *(node.scale for node in nodes(state, PLATEAUS)))


def check(where: str, learning_rate: Any, state: Any) -> None:
    """Raises an error, in the name of the wrapper `where`, if no decay is right around an optimizer with this state."""
    try:
        _refuse_what_undoes_it(state)
        _check_learning_rate(learning_rate, state)
    except ValueError as error:
        raise ValueError(str(error).replace("with_decoupled_decay", where)) from None


def _names_in(state: Any) -> list[str]:
    """The names of the types of all nodes in a state."""
    names: list[str] = []
    jax.tree.leaves(state, is_leaf=lambda node: bool(names.append(type(node).__name__)))
    return names


def _refuse_what_undoes_it(state: Any) -> None:
    names = _names_in(state)
    if found := [name for name in names if name in _REFUSED]:
        why, write = _REFUSED[found[0]]
        fault = f"holds {why.format(found[0])}"
    elif found := _in_parts(state, (*_OWN_STEPS, *PLATEAUS)):
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
