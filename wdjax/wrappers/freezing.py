"""Frozen parameters: hidden from the optimizer, and given updates of -0.0, which change no number."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .._engine import checks, trees
from .._engine.arithmetic import stateless, subtracted
from .._engine.masks import flags
from .._engine.rules import check_booleans
from .._engine.text import listed
from .._engine.types import Mask, Optimizer
from .._engine.unstable import automatic, explicit_spec, is_traced, may_be_split
from ..paths import Rules
from ..states.thawing import matched

PyTree = Any
_SUBTRACTED = stateless(subtracted)


@checks.known_arguments
def freeze(optimizer: Optimizer, mask: Mask) -> optax.GradientTransformationExtraArgs:
    """Keeps the parameters of a mask bit for bit. It goes around the optimizer; `optax.freeze` goes into a chain.

    Later transformations in a chain, such as a decay, can undo zero updates. Here the optimizer never sees a frozen
    parameter: it has no state for it, and no global norm includes its gradient. No transformation inside changes a
    frozen parameter.

    `freeze` stands outermost: `optax.MultiSteps(freeze(...), 2)` adds +0.0 and turns a weight of -0.0 into +0.0. On
    CPUs, the addition of `optax.apply_updates` flushes subnormal numbers to zero, and no update can prevent it. If
    `jit` compiles the whole step for one device, XLA leaves out the addition to arrays that are frozen entirely, and
    their subnormal numbers stay.

    Rule:   u <- -0.0 where the mask is True (p + -0.0 is p, also for p = -0.0, inf and NaN); else the optimizer's u
    Place:  around the whole optimizer: the last thing before `optax.apply_updates`.
    Units:  those of the optimizer.
    Source: big_vision's `schedule=[(regex, None)]`. Optax's `selective_transform` turns a weight of -0.0 into +0.0.

    Args:
        optimizer: an `optax.GradientTransformation` or `optax.MultiSteps`, with any decay inside.
        mask: True for frozen parameters: `only("encoder")`, or any other mask of `decoupled_decay`.

    Returns:
        An `optax.GradientTransformationExtraArgs` with the state of `optimizer` for the other parameters. Its `update`
        needs `params`. Rules inside may still name frozen parameters. To freeze others, or none, carry the state over:
        `thaw`.

    Raises:
        TypeError, ValueError: for the optimizer; for the mask or missing params, as `decoupled_decay`; and at `update`
            for the state of an optimizer with other frozen parameters.

    Example:

        >>> import jax.numpy as jnp, optax, wdjax
        >>> optimizer = wdjax.freeze(wdjax.adamw(0.5, 0.1), wdjax.only("encoder"))
        >>> params = {"encoder": jnp.array([2.0]), "head": jnp.array([2.0])}
        >>> updates, _ = optimizer.update({k: jnp.zeros(1) for k in params}, optimizer.init(params), params)
        >>> {name: round(float(new[0]), 6) for name, new in optax.apply_updates(params, updates).items()}
        {'encoder': 2.0, 'head': 1.9}
    """
    inner = checks.finished("freeze", optimizer, "freeze(optax.adam(1e-3), only('encoder'))")
    if mask is None:
        raise TypeError("freeze: the mask is None. Select the frozen parameters: freeze(optimizer, only('encoder')).")
    if isinstance(mask, Rules):
        check_booleans(mask, "freeze")

    def init_fn(params: PyTree) -> Any:
        trees.parameters("freeze", params)
        return inner.init(_Frozen(mask, params).hidden(params, is_params=True))

    def update_fn(updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any) -> tuple[PyTree, Any]:
        checks.params_given("freeze", params)
        frozen = _Frozen(mask, params)
        extra_args = {name: frozen.hidden_in_argument(name, value) for name, value in extra_args.items()}
        hidden, others = frozen.hidden(updates), frozen.hidden(params, is_params=True)
        try:
            moved, state = inner.update(hidden, state, others, **extra_args)
        except Exception as error:
            _explain(state, inner, others, error)
            raise
        return frozen.kept(updates, moved), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _explain(state: Any, inner: optax.GradientTransformation, params: PyTree, error: Exception) -> None:
    """Raises an error that shows `thaw` if the state of a failed update was made for other frozen parameters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = matched(state, jax.eval_shape(inner.init, params), params)
    lacks = f" It has nothing for {listed(found.thawed)}, which trains now." * bool(found.thawed)
    holds = f" It still has something for {listed(found.frozen)}, which is frozen now." * bool(found.frozen)
    if lacks or holds:
        raise ValueError(
            f"freeze: the state was made for other frozen parameters.{lacks}{holds} Carry it over: "
            "state = wdjax.thaw(state, optimizer, params)."
        ) from error


class _Frozen:
    """The frozen parameters. It hides them from an optimizer and makes the updates that keep them."""

    def __init__(self, mask: Any, params: PyTree):
        self.params = params
        self.leaves = trees.flatten_with_paths(params)
        self.flags = flags("freeze", mask, params, self.leaves, of_all=True)

    def hidden(self, tree: PyTree, *, is_params: bool = False) -> PyTree:
        """A tree like params with empty places for frozen parameters. Frozen parts have gradients of 0."""

        def hide(x: Any, i: int) -> Any:
            flag = self.flags[i]
            if flag is True:
                return trees.Hidden.of(self.leaves[i][1])
            return x if flag is False or is_params or trees.is_hole(x) else _where(flag, jnp.zeros_like(x), x)

        return self._mapped(hide, tree)

    def hidden_in_argument(self, name: str, value: Any) -> Any:
        """The extra arguments of line searches and the like: gradients, and functions of all parameters."""
        if name == "grad":
            return self.hidden(value)
        if name not in ("value_fn", "obj_fn", "grad_fn"):
            return value

        def of_the_others(tree: PyTree, *args: Any, **kwargs: Any) -> Any:
            whole = self._mapped(lambda x, i: self.leaves[i][1] if self.flags[i] is True else x, tree)
            result = value(whole, *args, **kwargs)
            return self.hidden(result) if name == "grad_fn" else result

        return of_the_others

    def kept(self, updates: PyTree, moved: PyTree) -> PyTree:
        """The updates in `moved`, and for frozen parameters updates that change no bit."""
        given, _ = self._beside(updates)

        def update(new: Any, i: int) -> Any:
            flag, param = self.flags[i], self.leaves[i][1]
            if flag is False:
                return new
            if flag is True:
                return _no_update(given[i], param)
            # A hole and the gradient of an integer (float0) change nothing.
            has_bits = not trees.is_hole(new) and getattr(new, "dtype", None) != jax.dtypes.float0
            return _where(flag, _no_update(new, param), new) if has_bits else new

        return self._mapped(update, moved)

    def _mapped(self, leaf_fn: Any, tree: PyTree) -> PyTree:
        found, rebuilt = self._beside(tree)
        return rebuilt([leaf_fn(leaf, i) for i, leaf in enumerate(found)])

    def _beside(self, tree: PyTree) -> Any:
        return trees.beside("freeze", tree, self.params, [path for path, _ in self.leaves])


@jax.jit
def _where(flag: Any, if_frozen: Any, if_not: Any) -> jax.Array:
    return automatic(jnp.where, (flag, if_frozen, if_not), like=if_not)


def _no_update(update: Any, param: Any) -> Any:
    """The update that keeps every bit of a parameter, with the dtype and sharding of its own update: -0.0.

    On one device it is a constant, and XLA omits its addition. On several devices, a constant that is returned from jit
    would be replicated on all of them, unless its type has the explicit axes of a mesh. So there a `select` that XLA
    cannot simplify ties it to the parameter. If it were tied to the update, the frozen gradient would be computed.
    """
    if trees.is_hole(update):
        return _no_update(param, param) if trees.is_decayable(param) else update
    if not trees.is_decayable(update):
        # The gradient of an integer may have the dtype float0, which has no bits. Nothing can be added to a key.
        dtype = getattr(update, "dtype", type(update))
        has_bits = dtype != jax.dtypes.float0 and any(jnp.issubdtype(dtype, kind) for kind in (jnp.integer, jnp.bool_))
        return jnp.zeros_like(update) if has_bits else update
    zeros = -jnp.zeros_like(update)
    if is_traced(param) and may_be_split(param) and explicit_spec(zeros) == explicit_spec(param):
        return jax.lax.select(jax.lax.optimization_barrier(False), param.astype(zeros.dtype), zeros)
    return zeros
