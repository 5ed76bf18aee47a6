"""Decays toward zero or an anchor: before the learning rate, after it, and in continuous time."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from .._engine import checks
from .._engine.arithmetic import Strength, away, minus, plus, stateless, subtracted
from .._engine.loop import Action, transformation
from .._engine.loop import DecayState as DecayState
from .._engine.types import Anchor, Mask, Rate

PyTree = Any


@checks.known_arguments
def decoupled_decay(weight_decay: Rate, mask: Mask = None, *, toward: Anchor = None) -> optax.GradientTransformation:
    """Decays weights in proportion to the learning rate, untouched by the optimizer's scaling: AdamW's weight decay.

    Rule:   u <- u + weight_decay * (p - toward)
    Place:  after `scale_by_*`, before the learning rate.
    Units:  per step and per unit of learning rate: with zero gradient, a weight is multiplied by
            1 - learning_rate * weight_decay each step.
    Source: Loshchilov & Hutter 2019. Deviation: the factor is the learning rate itself, as in PyTorch and Optax.

    Args:
        weight_decay: a number or 0-d array (may be traced) >= 0, a schedule, a `by_path` table of these, or a tree like
            params of them. A table or tree may also hold arrays that broadcast against the parameter.
        mask: None, `Rules` of booleans, a tree or prefix tree of booleans, or a function of params that returns one.
            Instead of a boolean it may hold an array of booleans that broadcasts against the parameter.
        toward: None for zero; a tree like params, which may leave out parameters that do not decay (it is a constant in
            the compiled step); "init" for the values at `init`, which the state keeps; or `EMA(0.999)` for a moving
            average of the weights. In a tree, the number 0.0 stands for zero, for one parameter or for all below:
            `{"encoder": pretrained, "head": 0.0}`. `by_path({"encoder": "init"}, default=0.0)` says it by path.

    Returns:
        An `optax.GradientTransformation` with a `DecayState`. Its `update` needs `params`. Updates keep their dtype.

    Raises:
        TypeError, ValueError: for a rate that is negative, NaN, infinite or not a scalar. At `init` and `update`: for
            a mask or anchor that does not fit params, a rule that matches nothing, or missing params.

    Example:

        >>> import jax.numpy as jnp, optax, wdjax
        >>> optimizer = optax.chain(
        ...     optax.scale_by_adam(),
        ...     wdjax.decoupled_decay(0.1, wdjax.only("kernel")),
        ...     optax.scale_by_learning_rate(0.5),
        ... )
        >>> params = {"kernel": jnp.array([2.0]), "bias": jnp.array([2.0])}
        >>> grads = {"kernel": jnp.array([0.0]), "bias": jnp.array([0.0])}
        >>> updates, _ = optimizer.update(grads, optimizer.init(params), params)
        >>> {name: round(float(new[0]), 6) for name, new in optax.apply_updates(params, updates).items()}
        {'bias': 2.0, 'kernel': 1.9}
    """
    action = Action("decoupled_decay", {"weight_decay": weight_decay}, mask, toward)
    return transformation(action, _DECOUPLED, is_decay=True)


@checks.known_arguments
def independent_decay(weight_decay: Rate, mask: Mask = None, *, toward: Anchor = None) -> optax.GradientTransformation:
    """Decays weights by a fixed fraction each step, whatever the learning rate is.

    Rule:   u <- u - weight_decay * (p - toward)
    Place:  after the learning rate, where u is added to the parameters unchanged.
    Units:  per step: with zero gradient, a weight is multiplied by 1 - weight_decay each step. To follow the shape of
            the learning rate but not its size, pass `rates.relative(weight_decay, learning_rate, peak=...)`.
    Source: Loshchilov & Hutter 2019, Algorithm 2, which multiplies both by the schedule; TensorFlow Addons' and
            big_vision's weight decay. Before the learning rate, this would be `decoupled_decay` with the wrong sign.

    A sensible weight_decay is that of `decoupled_decay` times the learning rate.

    Args, Returns, Raises: as `decoupled_decay`.

    Warns:
        UserWarning: at `init`, if weight_decay is known by then and so small that it rounds to nothing in the dtype of
            a parameter, or so large (1 or more) that weights overshoot. Of a schedule the largest value counts. Also
            if rounding makes a constant decay toward zero more than a fifth faster or slower.

    Example:

        >>> import jax.numpy as jnp, optax, wdjax
        >>> optimizer = optax.chain(optax.adam(0.5), wdjax.independent_decay(0.1))
        >>> params = {"kernel": jnp.array([2.0])}
        >>> updates, _ = optimizer.update({"kernel": jnp.array([0.0])}, optimizer.init(params), params)
        >>> round(float(optax.apply_updates(params, updates)["kernel"][0]), 6)
        1.8
    """
    action = Action("independent_decay", {"weight_decay": weight_decay}, mask, toward, is_per_step=True)
    return transformation(action, _SUBTRACTED, is_decay=True)


@checks.known_arguments
def continuous_decay(
    weight_decay: Rate, mask: Mask = None, *, learning_rate: Rate, toward: Anchor = None
) -> optax.GradientTransformation:
    """Decays weights exponentially, as in continuous time: never past the anchor, however large the rates are.

    Rule:   u <- u - (1 - exp(-learning_rate * weight_decay)) * (p - toward)
    Place:  after the learning rate, where u is added to the parameters unchanged. Pass the optimizer's learning rate.
    Units:  per step and per unit of learning rate, as `decoupled_decay`, with which it agrees to first order. With
            zero gradient, a weight is multiplied by exp(-learning_rate * weight_decay) each step. Over many steps, only
            the sum of learning_rate * weight_decay matters.
    Source: the solution of dw/dt = -weight_decay * (w - toward) over a time of learning_rate.

    Args, Returns, Raises: as `decoupled_decay`; learning_rate is the optimizer's number or schedule. A schedule is
    called with this transformation's own count of updates, which starts at 0.

    Warns: UserWarning at `init`, if learning_rate * weight_decay is known to round to nothing, in every step.

    Example:

        >>> import jax.numpy as jnp, optax, wdjax
        >>> optimizer = optax.chain(optax.adam(0.5), wdjax.continuous_decay(6.0, learning_rate=0.5))
        >>> params = jnp.array([2.0])
        >>> updates, _ = optimizer.update(jnp.zeros(1), optimizer.init(params), params)
        >>> round(float(optax.apply_updates(params, updates)[0]), 6)  # 2 * exp(-3); 2 * (1 - 3) with decoupled_decay
        0.099574
    """
    rates = {"weight_decay": weight_decay, "learning_rate": learning_rate}
    action = Action("continuous_decay", rates, mask, toward, is_per_step=True, can_overshoot=False)
    return transformation(action, _CONTINUOUS, is_decay=True)


def _decoupled(update: jax.Array, p: jax.Array, a: jax.Array | None, rate: Strength) -> jax.Array:
    return plus(update, rate, away(p, a))


def _continuous(update: jax.Array, p: jax.Array, a: jax.Array | None, rate: Strength) -> jax.Array:
    return minus(update, rate._replace(value=-jnp.expm1(-rate.value)), away(p, a))


_DECOUPLED, _SUBTRACTED, _CONTINUOUS = map(stateless, (_decoupled, subtracted, _continuous))
