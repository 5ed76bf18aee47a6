"""What the state of an optimizer tells of its steps: which updates are steps, and how large they are.

Some optimizers skip updates, and the transformations around them must skip them too. Others keep their learning rate in
their state, where a training loop may set it.
"""

from typing import Any

import jax
import optax

# The wrappers that may skip a whole step, and the field with the state of the optimizer they wrap.
SKIPPING = {optax.MultiStepsState: "inner_opt_state", optax.ApplyIfFiniteState: "inner_state"}

# The states that hold a learning rate: `hyperparams["learning_rate"]`.
INJECTED = (optax.schedules.InjectHyperparamsState, optax.schedules.InjectStatefulHyperparamsState)


def nodes(state: Any, kinds: tuple[type, ...]) -> list[Any]:
    """The outermost nodes of these types in a state, in order."""
    found = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kinds))
    return [node for node in found if isinstance(node, kinds)]


def stepped(before: Any, after: Any) -> tuple[jax.Array, ...]:
    """For each wrapper in the state that may skip a step, whether it stepped, as a boolean factor for a rate."""
    flags: tuple[jax.Array, ...] = ()
    for old, new in zip(*(nodes(state, tuple(SKIPPING)) for state in (before, after)), strict=True):
        flags += (new.gradient_step > old.gradient_step if isinstance(new, optax.MultiStepsState) else new.last_finite,)
        inner = SKIPPING[type(new)]
        flags += stepped(getattr(old, inner), getattr(new, inner))
    return flags


def injected(state: Any) -> list[dict[str, Any]]:
    """The hyperparameters of each `optax.inject_hyperparams` in a state, the outer ones first."""
    found = nodes(state, INJECTED)
    return [table for node in found for table in (node.hyperparams, *injected(node.inner_state))]


def learning_rates(state: Any) -> list[Any]:
    """The learning rates that `optax.inject_hyperparams` keeps in a state, however deep.

    After an update, they are the learning rates of that update, whether they are numbers or schedules.
    """
    return [table["learning_rate"] for table in injected(state) if "learning_rate" in table]
