"""What the decays in an optimizer tell of themselves: which parameters they act on, and what they add to an update."""

import collections
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .._engine import anchors, trees
from .._engine.decision import Decision
from .._engine.loop import Action, DecayState
from .._engine.probe import DecayProbe
from .._engine.rules import Rules, decisions
from .._engine.steps import INJECTED, learning_rates, nodes
from .._engine.text import listed
from ..plans import asked, row_of

PyTree = Any
UNDECAYED = "undecayed"


def read(
    inner: optax.GradientTransformationExtraArgs,
    found: "Found",
    updates: PyTree,
    inner_state: Any,
    params: PyTree,
    *,
    decay_probe: DecayProbe | None = None,
    **extra_args: Any,
) -> tuple[dict[str, jax.Array], tuple[PyTree, Any]]:
    """The decays in the update of an optimizer, by path, and what the update returns. `found` gets what they report."""
    paths = [path for path, _ in trees.flatten_with_paths(params)]

    def run(gate: jax.Array) -> tuple[dict[str, jax.Array], tuple[PyTree, Any]]:
        probe = DecayProbe(gate, found.report).within(decay_probe)
        new, after = inner.update(updates, inner_state, params, decay_probe=probe, **extra_args)
        each, _ = trees.beside("monitor", new, params, paths)
        decayed = {path: u for path, u in zip(paths, each, strict=True) if path in found.rules}
        return {path: -u for path, u in decayed.items() if trees.is_decayable(u)}, (new, after)

    one = jnp.ones([], jnp.float32)
    try:
        _, decays, results = jax.jvp(run, (one,), (one,), has_aux=True)
    except TypeError as error:
        if "custom_vjp" not in str(error):
            raise
        raise TypeError(f"monitor: the decay can't be read behind a jax.custom_vjp. {_TELL}") from error
    lost = [path for path in found.rules if path not in paths]
    if lost:
        raise ValueError(
            f"monitor: a decay in the optimizer sees parameters with other paths, {listed(lost)}, as within "
            f"optax.flatten. {_TELL}"
        )
    return decays, results


def try_to_read(inner: optax.GradientTransformationExtraArgs, found: "Found", inner_state: Any, params: PyTree) -> None:
    """Lets the decays in an optimizer report in an update that is only traced. Here gradients are like parameters."""

    def trace(**extra_args: Any) -> None:
        jax.eval_shape(lambda: read(inner, found, params, inner_state, params, **extra_args)[0])

    try:
        try:
            trace()
        except TypeError:  # Some optimizers ask for the loss and its gradient.
            trace(value=jnp.zeros([]), grad=params, value_fn=lambda _: jnp.zeros([]))
    except Exception as error:
        if str(error).startswith("monitor: "):
            raise
        raise ValueError(
            "monitor: to find the decays in the optimizer, its update is traced, and that failed: "
            f"{type(error).__name__}: {str(error)[:200]}\nDoes it need other arguments, or refuse some? {_TELL}"
        ) from error


_TELL = (
    "Give the monitor the arguments of the decay, monitor(optimizer, 0.1, mask, learning_rate=1e-3), or 0.0 if there "
    "is no decay."
)


def rate_of_all_decays(state: Any) -> Any:
    """The learning rate that `optax.inject_hyperparams` keeps, if there is one and each decay is within."""
    holders = [node for node in nodes(state, INJECTED) if learning_rates(node)]
    rates = [rate for node in holders for rate in learning_rates(node)]
    are_within = [len(nodes(part, (DecayState,))) for part in (state, *holders)]
    return rates[0] if len(rates) == 1 and are_within[0] == are_within[1] else None


class Found:
    """What the decays in an optimizer say of the parameters that they act on, by path."""

    def __init__(self) -> None:
        self.rules: dict[str, dict[str, None]] = collections.defaultdict(dict)  # The rules that decide, in order.
        # Whether the learning rate multiplies weight_decay: in decoupled decays, but not in an independent one.
        self.is_scaled: dict[str, set[bool]] = collections.defaultdict(set)
        self._toward: dict[str, Any] = {}

    def report(self, action: Action, params: PyTree) -> None:
        leaves = trees.flatten_with_paths(params)
        given = {} if anchors.is_in_state(action.toward) else dict(trees.flatten_with_paths(action.toward))
        kept = anchors.kinds(action.where, action.toward, leaves)
        for (path, _), kind, rule in zip(leaves, kept, _rules(action, params, leaves), strict=True):
            if rule not in (None, UNDECAYED):
                self.rules[path][rule] = None
                is_given = "weight_decay" in action.rates  # Not by `cpr`, whose strength is per step.
                self.is_scaled[path].add(is_given and (not action.is_per_step or "learning_rate" in action.rates))
                anchor = given.get(path) if kind is None else kind
                # Two decays with different anchors have no common distance, so the norm of the weights stands for it.
                self._toward[path] = anchor if self._toward.get(path, anchor) is anchor else None

    def anchors(self, state: Any) -> dict[str, Any]:
        """The anchor of each parameter, for the state before an update: what a decay keeps of them is there."""
        held = [dict(trees.flatten_with_paths(node.anchor)) for node in nodes(state, (DecayState,))]
        initial = {path: anchor for tree in held for path, anchor in tree.items() if not trees.is_hole(anchor)}
        return {path: initial.get(path) if anchors.is_in_state(a) else a for path, a in self._toward.items()}

    def is_rate_scaled(self, label: str, labels: Sequence[str | None], paths: Sequence[str], rate: Any) -> bool | None:
        """Whether the learning rate scales the weight decay of a group. None if its weight decay is not known."""
        members = [path for path, own in zip(paths, labels, strict=True) if own == label]
        kinds = {kind for path in members for kind in self.is_scaled.get(path, ())}
        return None if len(kinds) != 1 or (True in kinds and rate is None) else True in kinds


def _rules(action: Action, params: PyTree, leaves: Sequence[tuple[str, Any]]) -> list[str | None]:
    """For each leaf that decays, the rule that decides so, as `plan` shows it."""
    rate, *_ = action.rates.values()  # A learning rate may follow.
    chosen = asked(action.where, action.mask, params, leaves, "all")
    left = trees.hidden_where([choice.value for choice in chosen], leaves)
    rates = decisions(rate, action.where, left) if isinstance(rate, Rules) else [Decision(rate, "")] * len(leaves)
    labels: list[str | None] = []
    for acts, (path, leaf), choice, rated in zip(action.acts_on(params, leaves), leaves, chosen, rates, strict=True):
        label = UNDECAYED if trees.is_decayable(leaf) else None
        if acts:
            row = row_of(trees.describe(path, leaf), True, choice, rated or Decision(0.0, ""), Decision(False, ""))
            label = row.rule.replace("'", "")
        labels.append(label)
    return labels
