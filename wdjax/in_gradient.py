"""In the gradient: before the optimizer's scaling, so that its moments see it.

This is L2 regularization in the old sense: as if the penalty stood in the loss, at the price of one pass over the
weights. For SGD it is weight decay. For Adam it is not: the penalty's gradient is divided by the same root as the
loss's, so weights with large gradients hardly decay, and with no other gradient every weight moves by the learning
rate whatever the weight decay is. What most people want beside Adam is `in_update`.

Complex weights: updates are taken as directions of descent, that is the conjugate of what `jax.grad` returns.
"""

import dataclasses

import jax
import optax

from ._engine import checks
from ._engine.arithmetic import Strength, away, plus, stateless
from ._engine.loop import Action, transformation
from ._engine.types import Anchor, Mask, Rate, StackedAxes
from .paths import stacks
from .penalties import L2, Penalty, check_kind, check_strength, gradient, is_elementwise


@checks.known_arguments
def add_l2_to_grads(weight_decay: Rate, mask: Mask = None, *, toward: Anchor = None) -> optax.GradientTransformation:
    """Adds weight_decay times the weight to its gradient: L2 regularization, without touching the loss.

    Rule:   g <- g + weight_decay * (p - toward)
    Place:  before `scale_by_*` and before momentum; after gradient clipping, unless the penalty is to be clipped too.
    Units:  per unit of loss: the gradient of weight_decay / 2 * sum p^2. In plain SGD with zero gradient a weight is
            multiplied by 1 - learning_rate * weight_decay each step; with momentum m, by about
            1 - learning_rate * weight_decay / (1 - m).
    Source: `torch.optim.SGD(weight_decay=...)` and `torch.optim.Adam(weight_decay=...)`, which do the same; MXNet's
            wd; Keras' `kernel_regularizer=l2(r)` with weight_decay = 2 r.

    Args:
        weight_decay: a number or 0-d array (traced is fine) >= 0, a schedule, or a `by_path` table of these.
        mask: None, `Rules` of booleans, a tree or prefix tree of booleans, or a function of params that gives one.
        toward: None for zero; a tree like params, which may leave out what does not decay (it is a constant of the
            compiled step); or "init" for the values at `init`, kept in the state.

    Returns:
        An `optax.GradientTransformation` with a `DecayState`; its `update` needs `params`. Updates keep their dtype.

    Raises:
        TypeError, ValueError: for a rate that is negative, NaN, infinite or not a scalar. At `init` and `update`: for
            a mask or anchor that does not fit params, a rule that matches nothing, or params left out.

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
    kind: Penalty, strength: Rate, mask: Mask = None, *, toward: Anchor = None, stacked_axes: StackedAxes = 0
) -> optax.GradientTransformation:
    """Adds strength times the gradient of any penalty, without touching the loss.

    Rule:   g <- g + strength * kind.gradient(p - toward)
    Place:  before `scale_by_*`, as `add_l2_to_grads`.
    Units:  those of the kind; see `wdjax.penalties`.
    Source: the kind's.

    Args:
        kind: a penalty: `L2()`, `L1()`, `ElasticNet(r)`, `GroupLasso(axis)`, `Huber(delta)`, or your own `Penalty`.
        strength, mask, toward: as `add_l2_to_grads`.
        stacked_axes: how many leading axes stack layers, so that the penalty is that of each layer: a number for all
            parameters, or a dictionary from patterns to numbers, {"layers": 1}. It matters for penalties of groups.

    Returns, Raises: as `add_l2_to_grads`.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> huber = wdjax.add_penalty_to_grads(wdjax.Huber(delta=1.0), 0.5)
        >>> params = {"kernel": jnp.array([0.5, -4.0])}
        >>> huber.update({"kernel": jnp.zeros(2)}, huber.init(params), params)[0]["kernel"].tolist()
        [0.25, -0.5]
    """
    where = "add_penalty_to_grads"
    check_kind(where, kind, "value", "gradient")
    action = Action(where, {"strength": strength}, mask, toward, stacked_axes=stacks(where, stacked_axes))
    return transformation(action, stateless(_Added(kind), is_elementwise=is_elementwise(kind)))


@dataclasses.dataclass(frozen=True)
class _Added:
    kind: Penalty

    def __call__(self, update: jax.Array, p: jax.Array, a: jax.Array | None, strength: Strength) -> jax.Array:
        check_strength("add_penalty_to_grads", self.kind, strength.value)
        return plus(update, strength, gradient(self.kind, away(p, a)))


_L2 = stateless(_Added(L2()))
