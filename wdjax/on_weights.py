"""On the weights: last in the chain, where the update is rewritten so that `params + update` is what the rule says.

A proximal step does not follow the penalty's gradient; it solves for the penalty after the optimizer has moved. It
never overshoots, however large the strength, and where the penalty has a corner (L1, group lasso) it lands on it:
weights become exactly zero and stay countable. (An anchor other than zero is met to the last bit or so: what reaches
the weights is a difference, and only the one to zero is always exact.)
"""

import dataclasses

import jax
import optax

from ._engine import checks
from ._engine.arithmetic import Strength, away, stateless, unless_off
from ._engine.loop import Action, transformation
from ._engine.types import Anchor, Mask, Rate, StackedAxes
from .paths import stacks
from .penalties import ProximalPenalty, check_kind, check_strength, is_elementwise


@checks.known_arguments
def proximal_step(
    kind: ProximalPenalty,
    strength: Rate,
    mask: Mask = None,
    *,
    learning_rate: Rate,
    toward: Anchor = None,
    stacked_axes: StackedAxes = 0,
) -> optax.GradientTransformation:
    """Moves the weights that the optimizer arrives at to the minimum of penalty plus squared distance.

    Rule:   p + u <- toward + kind.prox(p + u - toward, learning_rate * strength). For L2 with zero anchor:
            (p + u) / (1 + learning_rate * strength). For L1: soft thresholding by learning_rate * strength.
    Place:  last in the chain, after the learning rate; give it the same learning rate as the optimizer.
    Units:  per step and per unit of learning rate, as `decoupled_decay`, with which L2 agrees to first order.
    Source: Parikh & Boyd 2014; AdamProx (arXiv 2202.00089) and Adan (arXiv 2208.06677) for L2.

    Args:
        kind: a penalty: `L2()`, `L1()`, `ElasticNet(r)`, `GroupLasso(axis)`, `Huber(delta)`, or your own
            `ProximalPenalty`.
        strength: a number or 0-d array (traced is fine) >= 0, a schedule, or a `by_path` table of these.
        mask: None, `Rules` of booleans, a tree or prefix tree of booleans, or a function of params that gives one.
        learning_rate: the number or schedule that the optimizer has; a schedule is called with this
            transformation's own count of updates, from 0.
        toward: None for zero; a tree like params, which may leave out what does not decay (it is a constant of the
            compiled step); or "init" for the values at `init`, kept in the state.
        stacked_axes: as `add_penalty_to_grads`.

    Returns:
        An `optax.GradientTransformation` with a `DecayState`; its `update` needs `params`. Updates keep their dtype;
        exact zeros need updates of the parameters' dtype, which Optax's optimizers give.

    Raises:
        TypeError, ValueError: as `add_l2_to_grads`; also for a learning rate that is negative, NaN, infinite or not a
            scalar.

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
    rates = {"strength": strength, "learning_rate": learning_rate}
    action = Action(where, rates, mask, toward, stacked_axes=stacks(where, stacked_axes))

    return transformation(action, stateless(_Solved(kind), is_elementwise=is_elementwise(kind)))


@dataclasses.dataclass(frozen=True)
class _Solved:
    kind: ProximalPenalty

    def __call__(self, update: jax.Array, p: jax.Array, a: jax.Array | None, rate: Strength) -> jax.Array:
        check_strength("proximal_step", self.kind, rate.value)
        new = self.kind.prox(away(p + update, a), rate.value)
        return unless_off(rate, update, (new if a is None else a + new) - p)
