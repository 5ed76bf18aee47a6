"""Which updates are steps: some optimizers skip updates, and the transformations around them must skip them too."""

from typing import Any

import jax
import optax

# The wrappers that may skip a whole step, and the field with the state of the optimizer they wrap.
SKIPPING = {optax.MultiStepsState: "inner_opt_state", optax.ApplyIfFiniteState: "inner_state"}


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
