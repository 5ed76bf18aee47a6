"""The proximal step of a penalty."""

import dataclasses

import jax
import optax

from .._engine import checks
from .._engine.arithmetic import Strength, away, unless_off
from .._engine.loop import Action, transformation
from .._engine.rules import check_no_mask
from .._engine.text import shown
from .._engine.types import Anchor, Mask, Rate, StackedAxes
from ..paths import stacks
from ..penalties import ProximalPenalty, check_kind, check_strength, prox, rule_of


@checks.known_arguments
def proximal_step(
    kind: ProximalPenalty,
    strength: Rate,
    mask: Mask = None,
    *,
    learning_rate: Rate,
    toward: Anchor = None,
    stacked_axes: StackedAxes | None = None,
) -> optax.GradientTransformation:
    """Moves the weights from where the optimizer puts them to the minimum of penalty plus squared distance.

    Rule:   p + u <- toward + kind.prox(p + u - toward, learning_rate * strength). For L2 with zero anchor:
            (p + u) / (1 + learning_rate * strength). For L1: soft thresholding by learning_rate * strength.
    Place:  last in the chain, after the learning rate. Pass the optimizer's learning rate.
    Units:  per step and per unit of learning rate, as `decoupled_decay`, with which L2 agrees to first order.
    Source: Parikh & Boyd 2014; AdamProx (arXiv 2202.00089) and Adan (arXiv 2208.06677) for L2.

    Args:
        kind: a penalty: `L2()`, `L1()`, `ElasticNet(r)`, `GroupLasso(per=-1)`, `Huber(delta)`, or your own
            `ProximalPenalty`.
        strength, mask, toward: as `decoupled_decay`; the strength is its weight_decay.
        learning_rate: the optimizer's number or schedule. A schedule is called with this transformation's own count of
            updates, which starts at 0.
        stacked_axes: as `add_penalty_to_grads`.

    Returns, Raises: as `decoupled_decay`; the learning rate is checked like the strength. Exact zeros need updates of
    the parameters' dtype, which Optax's optimizers return.

    Example:

        >>> import jax.numpy as jnp, optax, wdjax
        >>> optimizer = optax.chain(optax.sgd(0.1), wdjax.proximal_step(wdjax.L1(), 5.0, learning_rate=0.1))
        >>> params = jnp.array([2.0, -0.3])
        >>> updates, _ = optimizer.update(jnp.zeros(2), optimizer.init(params), params)
        >>> optax.apply_updates(params, updates).tolist()
        [1.5, 0.0]
    """
    where = "proximal_step"
    check_kind(where, kind, "prox")
    check_no_mask(where, "strength", strength, f"{where}({shown(kind)}, strength=0.1, mask=..., learning_rate=...)")
    rates = {"strength": strength, "learning_rate": learning_rate}
    action = Action(where, rates, mask, toward, stacked_axes=stacks(where, stacked_axes))
    return transformation(action, rule_of(kind, _Solved(kind)))


@dataclasses.dataclass(frozen=True)
class _Solved:
    kind: ProximalPenalty

    def __call__(self, update: jax.Array, p: jax.Array, a: jax.Array | None, rate: Strength) -> jax.Array:
        check_strength("proximal_step", self.kind, rate.value)
        new = prox(self.kind, away(p + update, a), rate.value)
        return unless_off(rate, update, (new if a is None else a + new) - p)
