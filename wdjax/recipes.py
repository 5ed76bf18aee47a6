"""Whole optimizers, each a short chain that you can read, copy and extend.

| | L2 in the gradient | decoupled weight decay |
|---|---|---|
| SGD | `sgd_l2` | `sgdw` |
| Adam | `adam_l2` | `adamw` |

`learning_rate` is a number or a schedule. `mask` selects the parameters that decay. Without a mask everything decays,
including biases. For the rules and units, see the transformations in the chain.
"""

from typing import Any

import optax

from ._engine import checks, trees
from ._engine.loop import Action
from ._engine.types import Anchor, Mask, Rate
from .in_gradient import add_l2_to_grads
from .in_update import decoupled_decay


@checks.known_arguments
def sgd_l2(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: Rate,
    mask: Mask = None,
    *,
    momentum: float | None = None,
    nesterov: bool = False,
    toward: Anchor = None,
) -> optax.GradientTransformation:
    """SGD with L2 regularization in the gradient, so the momentum buffer sees it: `torch.optim.SGD`.

    Rule:   g <- g + weight_decay * (p - toward); m <- momentum * m + g; p <- p - learning_rate * m
            (nesterov: p - learning_rate * (momentum * m + g))
    Place:  a whole optimizer: the last transformation before `optax.apply_updates`.
    Units:  as `add_l2_to_grads`.
    Source: `torch.optim.SGD(lr, momentum, weight_decay, nesterov)` without dampening. They agree except for rounding.

    Args:
        learning_rate: a number, a 0-d array or a schedule.
        weight_decay, mask, toward: as `decoupled_decay`.
        momentum: the decay of the momentum buffer, or None for no momentum.
        nesterov: whether the momentum is Nesterov's.

    Returns: an `optax.GradientTransformation`, a chain with its states. Its `update` needs `params`.
    Raises: as `add_l2_to_grads`.

    Example:

        >>> import wdjax
        >>> optimizer = wdjax.sgd_l2(0.1, 5e-4, wdjax.only("kernel"), momentum=0.9)
    """
    return optax.chain(
        add_l2_to_grads(weight_decay, mask, toward=toward),
        optax.identity() if momentum is None else optax.trace(momentum, nesterov),
        optax.scale_by_learning_rate(checks.unplaced(learning_rate)),
    )


@checks.known_arguments
def sgdw(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: Rate,
    mask: Mask = None,
    *,
    momentum: float | None = None,
    nesterov: bool = False,
    toward: Anchor = None,
) -> optax.GradientTransformation:
    """SGD with decoupled weight decay: the momentum buffer never sees the decay.

    Rule:   m <- momentum * m + g; p <- p - learning_rate * (m + weight_decay * (p - toward))
            (nesterov: momentum * m + g instead of m)
    Place:  a whole optimizer: the last transformation before `optax.apply_updates`.
    Units:  as `decoupled_decay`. To decay as fast as `sgd_l2` with momentum m, divide its rate by 1 - m.
    Source: Loshchilov & Hutter 2019. Deviation: the learning rate also multiplies the decay, as in timm's `SGDW`.

    Args:
        learning_rate: a number, a 0-d array or a schedule.
        weight_decay, mask, toward: as `decoupled_decay`.
        momentum, nesterov: as `sgd_l2`.

    Returns: an `optax.GradientTransformation`, a chain with its states. Its `update` needs `params`.
    Raises: as `decoupled_decay`; the learning rate is checked like the weight decay.
    Warns: UserWarning at `init`, if learning_rate * weight_decay is changed by rounding or overshoots.

    Example:

        >>> import wdjax
        >>> optimizer = wdjax.sgdw(0.1, 5e-3, wdjax.only("kernel"), momentum=0.9)
    """
    checks.rate("sgdw", "learning_rate", learning_rate)
    chain = optax.chain(
        optax.identity() if momentum is None else optax.trace(momentum, nesterov),
        decoupled_decay(weight_decay, mask, toward=toward),
        optax.scale_by_learning_rate(checks.unplaced(learning_rate)),
    )
    return _watched("sgdw", chain, {"learning_rate": learning_rate, "weight_decay": weight_decay}, mask, toward)


@checks.known_arguments
def adam_l2(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: Rate,
    mask: Mask = None,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    mu_dtype: Any = None,
    nesterov: bool = False,
    toward: Anchor = None,
) -> optax.GradientTransformation:
    """Adam with L2 regularization in the gradient, which is not weight decay: `torch.optim.Adam(weight_decay=...)`.

    Rule:   g <- g + weight_decay * (p - toward); p <- p - learning_rate * adam(g)
    Place:  a whole optimizer: the last transformation before `optax.apply_updates`.
    Units:  as `add_l2_to_grads`, then divided by the root of the second moment. With no other gradient, every weight
            moves by the learning rate, whatever weight_decay is. For weight decay, write `adamw`.
    Source: `torch.optim.Adam(lr, weight_decay=...)`, which agrees except for rounding; Kingma & Ba 2015.

    Args:
        learning_rate: a number, a 0-d array or a schedule.
        weight_decay, mask, toward: as `decoupled_decay`.
        b1, b2, eps, eps_root, mu_dtype, nesterov: as `optax.scale_by_adam`.

    Returns: an `optax.GradientTransformation`, a chain with its states. Its `update` needs `params`.
    Raises: as `add_l2_to_grads`.

    Example:

        >>> import wdjax
        >>> optimizer = wdjax.adam_l2(1e-3, 1e-4, wdjax.only("kernel"))
    """
    return optax.chain(
        add_l2_to_grads(weight_decay, mask, toward=toward),
        optax.scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov),
        optax.scale_by_learning_rate(checks.unplaced(learning_rate)),
    )


@checks.known_arguments
def adamw(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: Rate,
    mask: Mask = None,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    mu_dtype: Any = None,
    nesterov: bool = False,
    toward: Anchor = None,
) -> optax.GradientTransformation:
    """Adam with decoupled weight decay: `optax.adamw`, `torch.optim.AdamW`.

    Rule:   p <- p - learning_rate * (adam(g) + weight_decay * (p - toward))
    Place:  a whole optimizer: the last transformation before `optax.apply_updates`.
    Units:  as `decoupled_decay`: with zero gradient, each step multiplies a weight by 1 - learning_rate * weight_decay.
            There is no default. Optax's is 1e-4, PyTorch's is 1e-2, and language models often use 0.1.
    Source: Loshchilov & Hutter 2019. Deviation: the learning rate itself multiplies the decay, as in PyTorch and Optax.

    Args:
        learning_rate: a number, a 0-d array or a schedule.
        weight_decay, mask, toward: as `decoupled_decay`.
        b1, b2, eps, eps_root, mu_dtype, nesterov: as `optax.scale_by_adam`.

    Returns: an `optax.GradientTransformation`, a chain with its states. Its `update` needs `params`.
    Raises: as `decoupled_decay`; the learning rate is checked like the weight decay.
    Warns: UserWarning at `init`, if learning_rate * weight_decay is changed by rounding or overshoots.

    Example:

        >>> import wdjax
        >>> optimizer = wdjax.adamw(3e-4, 0.1, wdjax.all_but("bias", "LayerNorm_*"))
    """
    checks.rate("adamw", "learning_rate", learning_rate)
    chain = optax.chain(
        optax.scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov),
        decoupled_decay(weight_decay, mask, toward=toward),
        optax.scale_by_learning_rate(checks.unplaced(learning_rate)),
    )
    return _watched("adamw", chain, {"learning_rate": learning_rate, "weight_decay": weight_decay}, mask, toward)


def _watched(where: str, chain: Any, rates: dict[str, Any], mask: Mask, toward: Any) -> optax.GradientTransformation:
    """The chain. Its `init` warns if rounding changes learning_rate * weight_decay, or if that overshoots."""
    action = Action(where, rates, mask, toward)

    def init_fn(params: Any) -> Any:
        trees.parameters(where, params)  # Before Adam's zeros are made of it.
        state = chain.init(params)
        action.warn_of_rates(params)
        return state

    return chain._replace(init=init_fn)
