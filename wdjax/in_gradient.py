"""In the gradient: before the optimizer's scaling, so that its moments see the decay.

This is classic L2 regularization: the same as a penalty in the loss, at the cost of one pass over the weights. With SGD
it is weight decay. With Adam it is not: Adam divides the penalty's gradient by the same root as the loss's gradient. So
weights with large gradients hardly decay, and a weight with no other gradient moves by the learning rate, whatever the
weight decay is. With Adam most people want `in_update`.

Complex weights: updates must be directions of descent, which are the conjugate of what `jax.grad` returns.
"""

import dataclasses

import jax
import optax

from ._engine import checks
from ._engine.arithmetic import Strength, away, plus
from ._engine.loop import Action, transformation
from ._engine.rules import check_no_mask
from ._engine.text import shown
from ._engine.types import Anchor, Mask, Rate, StackedAxes
from .paths import stacks
from .penalties import L2, Penalty, check_kind, check_strength, gradient, rule_of


@checks.known_arguments
def add_l2_to_grads(weight_decay: Rate, mask: Mask = None, *, toward: Anchor = None) -> optax.GradientTransformation:
    """Adds weight_decay times the weight to its gradient: L2 regularization, without touching the loss.

    Rule:   g <- g + weight_decay * (p - toward)
    Place:  before `scale_by_*` and before momentum; after gradient clipping, unless you want to clip the penalty too.
    Units:  per unit of loss: the gradient of weight_decay / 2 * sum p^2. In plain SGD with zero gradient, a weight is
            multiplied by 1 - learning_rate * weight_decay each step; with momentum m, by about
            1 - learning_rate * weight_decay / (1 - m).
    Source: `torch.optim.SGD(weight_decay=...)` and `torch.optim.Adam(weight_decay=...)`, which do the same; MXNet's
            wd; Keras' `kernel_regularizer=l2(r)` with weight_decay = 2 r.

    Args, Returns, Raises: as `decoupled_decay`.

    Example:

        >>> import jax.numpy as jnp, optax, wdjax
        >>> optimizer = optax.chain(wdjax.add_l2_to_grads(0.1, wdjax.all_but("bias")), optax.sgd(0.5))
        >>> params = {"kernel": jnp.array([2.0]), "bias": jnp.array([2.0])}
        >>> grads = {"kernel": jnp.array([0.0]), "bias": jnp.array([0.0])}
        >>> updates, _ = optimizer.update(grads, optimizer.init(params), params)
        >>> {name: round(float(new[0]), 6) for name, new in optax.apply_updates(params, updates).items()}
        {'bias': 2.0, 'kernel': 1.9}
    """
    action = Action("add_l2_to_grads", {"weight_decay": weight_decay}, mask, toward)
    return transformation(action, _L2)


@checks.known_arguments
def add_penalty_to_grads(
    kind: Penalty, strength: Rate, mask: Mask = None, *, toward: Anchor = None, stacked_axes: StackedAxes | None = None
) -> optax.GradientTransformation:
    """Adds strength times the gradient of any penalty, without touching the loss.

    Rule:   g <- g + strength * kind.gradient(p - toward)
    Place:  before `scale_by_*`, as `add_l2_to_grads`.
    Units:  those of `kind`; see `wdjax.penalties`.
    Source: that of `kind`.

    Args:
        kind: a penalty: `L2()`, `L1()`, `ElasticNet(r)`, `GroupLasso(per=-1)`, `Huber(delta)`, or your own `Penalty`.
        strength, mask, toward: as `decoupled_decay`; the strength is its weight_decay.
        stacked_axes: how many leading axes stack layers: a number for all parameters, or a dictionary from patterns to
            numbers, {"layers": 1}. The penalty is then taken for each layer. This matters for penalties of groups.

    Returns, Raises: as `decoupled_decay`.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> huber = wdjax.add_penalty_to_grads(wdjax.Huber(delta=1.0), 0.5)
        >>> params = {"kernel": jnp.array([0.5, -4.0])}
        >>> huber.update({"kernel": jnp.zeros(2)}, huber.init(params), params)[0]["kernel"].tolist()
        [0.25, -0.5]
    """
    where = "add_penalty_to_grads"
    check_kind(where, kind, "value", "gradient")
    check_no_mask(where, "strength", strength, f"{where}({shown(kind)}, strength=0.1, mask=...)")
    action = Action(where, {"strength": strength}, mask, toward, stacked_axes=stacks(where, stacked_axes))
    return transformation(action, rule_of(kind, _Added(kind)))


@dataclasses.dataclass(frozen=True)
class _Added:
    kind: Penalty

    def __call__(self, update: jax.Array, p: jax.Array, a: jax.Array | None, strength: Strength) -> jax.Array:
        check_strength("add_penalty_to_grads", self.kind, strength.value)
        return plus(update, strength, gradient(self.kind, away(p, a)))


_L2 = rule_of(L2(), _Added(L2()))
