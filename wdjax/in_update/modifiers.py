"""Modifiers of a decay: they decide where it acts."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from .._engine import checks, trees
from .._engine.arithmetic import cast
from .._engine.loop import DecayState as DecayState
from .._engine.probe import blank
from .._engine.text import shown

PyTree = Any


@checks.known_arguments
def cautious(decay: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Lets a decay act only where it pulls a weight in the direction of the optimizer's update, ties included.

    Rule:   u <- u + t where t * u >= 0, else u; t is the term that `decay` adds. For a decay toward zero this means:
            decay where the sign of the optimizer's direction agrees with the sign of the weight.
    Place:  the place of `decay`: around `decoupled_decay` before the learning rate, around `independent_decay` after.
    Units:  those of `decay`. Where the optimizer does not move a weight (u = 0), the weight decays in full. At a rate
            of exactly 0 every t is a tie, so the derivative with respect to the rate is that of the plain decay.
    Source: Cautious Weight Decay, arXiv 2510.12402 (the tie as in the paper: u * p >= 0).

    Args: decay: `decoupled_decay(...)` or `independent_decay(...)`; not a whole optimizer.
    Returns: an `optax.GradientTransformationExtraArgs` with the state of `decay`.
    Raises: TypeError if `decay` is not a gradient transformation; at `init`, if it is an optimizer or a chain.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> decay = wdjax.cautious(wdjax.decoupled_decay(0.5))
        >>> params = jnp.array([2.0, 2.0, 2.0])
        >>> decay.update(jnp.array([1.0, -1.0, 0.0]), decay.init(params), params)[0].tolist()
        [2.0, -1.0, 1.0]
    """
    if not isinstance(decay, optax.GradientTransformation):
        raise TypeError(
            f"cautious: decay must be a gradient transformation, got {shown(decay)}. "
            "Write cautious(decoupled_decay(0.1, mask))."
        )
    inner = optax.with_extra_args_support(decay)

    def init_fn(params: PyTree) -> Any:
        state = inner.init(params)
        if not isinstance(state, DecayState):
            # An optimizer would run on the blank updates below, and its own update would be lost.
            raise TypeError(
                f"cautious: decay must be a wdjax decay, not an optimizer or a chain, got one with the state "
                f"{type(state).__name__}. Write optax.chain(optax.scale_by_adam(), cautious(decoupled_decay(0.1)), "
                "optax.scale_by_learning_rate(1e-3))."
            )
        return state

    def update_fn(updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any) -> tuple[PyTree, Any]:
        checks.params_given("cautious", params)
        blanks = jax.tree.map(blank, updates, is_leaf=trees.is_hole)
        terms, state = inner.update(blanks, state, params, **extra_args)
        return jax.tree.map(_add_where_agreed, updates, blanks, terms, is_leaf=trees.is_hole), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _add_where_agreed(update: Any, blank: Any, term: Any) -> Any:
    if term is blank:
        return update
    wide = cast(update, term.dtype)
    # Multiply the signs: the product of two small values would underflow to a tie.
    agreement = jax.lax.sign(wide) * jnp.conj(jax.lax.sign(term))
    return cast(wide + jax.lax.select(jnp.real(agreement) >= 0, term, blank), jnp.result_type(update))
