"""Multipliers of updates: a learning rate for each parameter."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from .._engine import checks
from .._engine.arithmetic import Strength, stateless
from .._engine.loop import Action, transformation
from .._engine.types import Mask, Rate


@checks.known_arguments
def scale_by_path(multipliers: Rate, mask: Mask = None) -> optax.GradientTransformation:
    """Multiplies the update of each parameter by its own number: learning rates by path.

    Rule:   u <- multiplier * u. A multiplier of 0 gives 0, also where u is inf or NaN; a multiplier of 1 keeps u.
    Place:  after `scale_by_*`, because Adam and its relatives undo the scale of a gradient. What comes before it is
            multiplied, and what comes after it is not. After `decoupled_decay` or a whole recipe, it scales learning
            rate and decay alike, as the learning rate of a PyTorch parameter group does. Before `independent_decay`,
            the decay stays as it is, as under big_vision's `lr_mults`. L2 in the gradient comes before `scale_by_*`, so
            it is always scaled. Later functions with a learning rate of their own need the same table, such as
            `proximal_step`, or `with_decoupled_decay` around the chain: `learning_rate=1e-3 * multipliers`.
    Units:  those of the update: a multiplier of 0.1 makes the learning rate a tenth. With a multiplier of 0, a
            parameter does not move, but it has moments, and its gradient counts in a global norm. `freeze` avoids both.
    Source: PyTorch's parameter groups; timm's `lr_scale` and big_vision's `lr_mults`, for tables of them.

    Args:
        multipliers: a `by_path` table, `by_depth(...)`, a tree like params, or a schedule of numbers >= 0. Tables and
            trees may also hold schedules, and arrays that broadcast against the parameter.
        mask: as `decoupled_decay`: the updates of the parameters that it leaves out keep every bit.

    Returns: an `optax.GradientTransformation` with a `DecayState`, whose count is that of the schedules. Its `update`
    needs `params`. Updates keep their dtype.
    Raises: as `decoupled_decay`, for the multipliers and the mask.

    Example:

        >>> import jax.numpy as jnp, optax, wdjax
        >>> multipliers = wdjax.by_path({"encoder": 0.1}, default=1.0)
        >>> optimizer = optax.chain(wdjax.adamw(0.5, 0.1), wdjax.scale_by_path(multipliers))
        >>> params = {"encoder": jnp.array([2.0]), "head": jnp.array([2.0])}
        >>> updates, _ = optimizer.update({k: jnp.zeros(1) for k in params}, optimizer.init(params), params)
        >>> {name: round(float(new[0]), 6) for name, new in optax.apply_updates(params, updates).items()}
        {'encoder': 1.99, 'head': 1.9}
    """
    return transformation(Action("scale_by_path", {"multipliers": multipliers}, mask, off_at=1.0), _SCALED)


def _scaled(update: jax.Array, p: jax.Array, a: Any, multiplier: Strength) -> jax.Array:
    # The derivative with respect to a multiplier of 0 is still u.
    return multiplier.value * jnp.where((multiplier.value == 0) & ~jnp.isfinite(update), 0, update)


_SCALED = stateless(_scaled)
