"""Which updates are steps: some optimizers do not step at every update, and what is around them waits with them."""

from typing import Any

import jax
import optax

# What skips a step as a whole, and where it keeps the state of what it wraps.
SKIPPING = {optax.MultiStepsState: "inner_opt_state", optax.ApplyIfFiniteState: "inner_state"}


def nodes(state: Any, kinds: tuple[type, ...]) -> list[Any]:
    """The outermost nodes of these types in a state."""
    found = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kinds))
    return [node for node in found if isinstance(node, kinds)]


def stepped(before: Any, after: Any) -> tuple[jax.Array, ...]:
    """For each wrapper in the state that may skip a step, whether it stepped: a boolean, to multiply a rate with."""
    flags: tuple[jax.Array, ...] = ()
    for old, new in zip(*(nodes(state, tuple(SKIPPING)) for state in (before, after)), strict=True):
        flags += (new.gradient_step > old.gradient_step if isinstance(new, optax.MultiStepsState) else new.last_finite,)
        inner = SKIPPING[type(new)]
        flags += stepped(getattr(old, inner), getattr(new, inner))
    return flags
