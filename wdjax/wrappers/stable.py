"""Stable weight decay: a decay that is divided by the size of the gradients, as Adam divides its step.

Why a wrapper: the size is a mean over the second moments of all parameters, which the optimizer keeps in its state. In
a chain, no transformation sees the state of another one.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .._engine import checks, mesh_axes, trees
from .._engine.arithmetic import LeafRule
from .._engine.loop import Action
from .._engine.steps import injected
from .._engine.text import listed, shown
from .._engine.types import Anchor, Mask, Number, Optimizer, Rate
from .._engine.unstable import is_traced
from .decay import Factor, around

PyTree = Any

# The states that hold second moments, by name, as Optax does not export all of them: the field whose root divides the
# step, and whether it is first divided by 1 - b2**count. The maximum of AMSGrad is one of such quotients.
_MOMENTS = {
    "ScaleByAdamState": ("nu", True),
    "ScaleByRmsWithCountState": ("nu", True),
    "ScaleByRmsState": ("nu", False),
    "ScaleByAmsgradState": ("nu_max", False),
}


@checks.known_arguments
def with_stable_decay(
    optimizer: Optimizer,
    weight_decay: Rate,
    mask: Mask = None,
    *,
    learning_rate: Rate,
    b2: Number = 0.999,
    toward: Anchor = None,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Adds decoupled weight decay that is divided by the root of the mean second moment in Adam: AdamS.

    Adam divides its step by the root of each second moment, and the decay of AdamW by nothing. Here the decay is
    divided too, by one number for all parameters. So the balance of gradient and decay is that of an L2 penalty.

    Rule:   u <- optimizer's u - learning_rate * weight_decay / sqrt(v) * (p - toward), where v is the mean over all
            elements of all parameters of the second moment that the optimizer divides by in this step. As long as v is
            0, nothing decays.
    Place:  around the whole optimizer, because v is in its state. As `with_decoupled_decay`, in real steps only.
    Units:  those of L2 in the loss: a loss and a weight_decay that are both multiplied by c lead to the same weights.
            The weight_decay of AdamW that does the same is this one divided by sqrt(v). So the decay grows as the
            gradients vanish, and overshoots once sqrt(v) < learning_rate * weight_decay.
    Source: AdamS, Xie et al., NeurIPS 2023, arXiv 2011.11152, by its code. As there, v includes the parameters that the
            mask leaves out. Deviation: while v is 0, their code divides by 0.

    Args:
        optimizer: an optimizer that keeps second moments: `optax.adam`, `nadam`, `yogi`, `radam`, `amsgrad`, `rmsprop`
            (not centered), also in chains and wrappers. Do not wrap `adamax` or `contrib.adopt`: their states look like
            that of `adam`, but hold something else.
        weight_decay, mask, toward: as `decoupled_decay`.
        learning_rate: as `with_decoupled_decay`.
        b2: the optimizer's b2, for the bias correction of v, which the state does not hold. If `inject_hyperparams`
            keeps one b2 in the state, the decay takes that one. A wrong b2 matters only in the first steps: in step
            t it multiplies the decay by sqrt((1 - wrong**t) / (1 - b2**t)).
        axis_name: within `shard_map`, the mesh axis, or a tuple of axes, that splits parameters. With check_vma=False,
            every parameter counts as split, so give it only if all of them are.

    Returns:
        An `optax.GradientTransformationExtraArgs` with a `WithDecoupledDecayState`; its `update` needs `params`.

    Raises:
        TypeError, ValueError: as `with_decoupled_decay`; for b2; and at `init`, if the optimizer keeps no second moment
            of a parameter that decays.

    Example:

        >>> import jax.numpy as jnp, optax, wdjax.wrappers
        >>> optimizer = wdjax.wrappers.with_stable_decay(optax.adam(0.5), 0.2, learning_rate=0.5)
        >>> params = {"w": jnp.array([10.0]), "b": jnp.array([0.0])}
        >>> grads = {"w": jnp.array([1.0]), "b": jnp.array([7.0])}  # Their mean square is 25.
        >>> updates, _ = optimizer.update(grads, optimizer.init(params), params)
        >>> round(float(updates["w"][0]), 5)  # -0.5 * 1 - 0.5 * 0.2 / 5 * 10
        -0.7
    """
    where = "with_stable_decay"
    action = Action(where, {"weight_decay": weight_decay, "learning_rate": learning_rate}, mask, toward)
    size = _Size(where, _checked(where, b2), mesh_axes.names(where, axis_name))
    return around(optimizer, action, Factor(_check_moments, size))


def _checked(where: str, b2: Any) -> Any:
    write = f"{where}(optax.adam(1e-3, b2=0.95), 0.1, learning_rate=1e-3, b2=0.95)"
    wanted = "a number from 0 to less than 1"
    number = checks.number(where, "b2", b2, write, wanted)
    if not is_traced(number) and np.asarray(number) >= 1:
        raise ValueError(f"{where}: b2 must be {wanted}, got {shown(b2)}. Write {write}.")
    return number


def _moments(state: Any) -> list[Any]:
    """The nodes of an optimizer's state that hold second moments."""
    is_one = lambda node: type(node).__name__ in _MOMENTS  # noqa: E731
    return [node for node in jax.tree.leaves(state, is_leaf=is_one) if is_one(node)]


def _check_moments(action: Action, params: PyTree, state: Any) -> None:
    """Raises an error if a parameter decays whose second moment is not in the state."""
    held = {
        path
        for node in _moments(state)
        for path, moment in trees.flatten_with_paths(getattr(node, _MOMENTS[type(node).__name__][0]))
        if trees.is_decayable(moment)
    }
    leaves = trees.flatten_with_paths(params)
    each = zip(leaves, action.acts_on(params, leaves), strict=True)
    if missing := [path for (path, leaf), acts in each if acts and trees.is_decayable(leaf) and path not in held]:
        raise ValueError(
            f"{action.where}: the optimizer keeps no second moment of {listed(missing)}, and the decay is divided by "
            "the root of the mean second moment. Wrap optax.adam, amsgrad or rmsprop (not centered), or leave these "
            "parameters out by the mask. For other optimizers there is with_decoupled_decay."
        )


@dataclasses.dataclass(frozen=True)
class _Size:
    """1 / sqrt(v) for the state of an optimizer after a step; 0 as long as v is 0."""

    where: str
    b2: Any
    axes: mesh_axes.Names

    def __call__(self, state: Any) -> tuple[jax.Array, ...]:
        kept = [table["b2"] for table in injected(state) if "b2" in table]
        b2, sums, sizes = kept[0] if len(kept) == 1 else self.b2, [], []
        with jax.numpy_dtype_promotion("standard"):
            for node in _moments(state):
                field, is_corrected = _MOMENTS[type(node).__name__]
                found = Action(self.where).total(_SUM, getattr(node, field), self.axes)
                if found is None:
                    continue
                moment, size = found
                if is_corrected:  # Before the first step, count and moments are 0.
                    moment /= 1 - jnp.asarray(b2, moment.dtype) ** jnp.maximum(node.count, 1)
                sums.append(moment)
                sizes.append(size)
            v = sum(sums) / sum(sizes) if sums else jnp.zeros([])
            # NaN in a moment leaves the other parameters alone, as it does in Adam.
            is_known = v > 0
            return (jnp.where(is_known, jax.lax.rsqrt(jnp.where(is_known, v, 1)), 0),)


def _summed(moment: jax.Array, p: Any, a: Any, strength: Any) -> tuple[jax.Array, jax.Array]:
    moment = jnp.real(moment)
    return jnp.sum(moment), jnp.asarray(np.size(moment), moment.dtype)


_SUM = LeafRule(reduce=_summed)
