"""The arithmetic of one parameter: the rule of a place, computed in safe dtypes.

A place is a `LeafRule`: functions of one parameter. `act` runs it on one parameter as a separate jitted function. It is
traced and compiled once for each shape and dtype, for any number of parameters and any rates. That is why the rate is
an argument and not a constant. Inside the caller's jit, XLA inlines and fuses all of it.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import trees
from .unstable import automatic, is_traced

Scalar = Any  # A NumPy scalar if the value is known during tracing, else a 0-d array.


class Strength(NamedTuple):
    """The rate of one parameter in this step: the product of all its factors.

    Attributes:
        value: a scalar, or an array of the parameter's rank that broadcasts against it, in the real dtype of the
            arithmetic.
        is_known: whether the value is known during tracing. A known rate is never zero here: the loop skips
            parameters whose decay is permanently off.
    """

    value: Any
    is_known: bool = False


class LeafRule(NamedTuple):
    """What a place does to one parameter. Its functions get arrays of one dtype, at least float32.

    Attributes:
        apply: (update, param, anchor, strength, state, totals) -> (update, state). The anchor is None for zero.
        init: param -> the state of this parameter, one array of any shape. None for a rule without a state.
        reduce: (update, param, anchor, strength) -> a tree of partial sums. The engine sums them over all parameters
            that the rule acts on, and over the mesh axes that split them. `apply` gets the totals.
        is_elementwise: whether each element of the result depends only on the same element of the arguments. Any
            other rule is applied to each layer of a stack separately, so that a norm is the norm of one layer.
        acts_on: which parameters the rule may act on.
        is_raw: whether the rule gets arrays in their original dtypes and returns its result without a cast.
        is_kept: whether jit may keep what it compiled for an un-jitted update. A penalty of a user may change.
    """

    apply: Callable[..., tuple[Any, Any]] | None = None
    init: Callable[[jax.Array], Any] | None = None
    reduce: Callable[..., Any] | None = None
    is_elementwise: bool = False
    acts_on: Callable[[Any], bool] = trees.is_decayable
    is_raw: bool = False
    is_kept: bool = True


def stateless(
    function: Callable[[jax.Array, jax.Array, jax.Array | None, Strength], jax.Array],
    *,
    is_elementwise: bool = True,
    is_kept: bool = True,
) -> LeafRule:
    """The rule (update, param, anchor, strength) -> update.

    Equal functions give equal rules, so that an optimizer that is built anew in each step, as
    `optax.inject_hyperparams` does, is not compiled anew.
    """
    return LeafRule(_Stateless(function), is_elementwise=is_elementwise, is_kept=is_kept)


@dataclasses.dataclass(frozen=True)
class _Stateless:
    function: Callable[..., jax.Array]

    def __call__(self, u: Any, p: Any, a: Any, strength: Strength, state: Any, totals: Any) -> tuple[jax.Array, None]:
        return self.function(u, p, a, strength), None


class Term(NamedTuple):
    """The decay of one parameter.

    Attributes:
        factors: the factors of its rate: floats, 0-d arrays, arrays of the parameter's rank, and schedules until the
            loop has called them. As an argument of `act`, the first one is a number, and it is not zero.
        names: the argument that each factor comes from.
        anchor: the value that the decay pulls toward; None for zero.
        stack: the axes that stack layers.
        part: an array of booleans: where the rule acts, if no rate stands for doing nothing; None for everywhere.
    """

    factors: tuple[Any, ...]
    names: tuple[str, ...] = ()
    anchor: Any = None
    stack: tuple[int, ...] = ()
    part: Any = None

    def parted(self) -> tuple[float, tuple[Any, ...]]:
        """The product of the float factors, and the array factors."""
        number, arrays = 1.0, []
        for factor in self.factors:
            if isinstance(factor, float):
                number *= factor
            else:
                arrays.append(factor)
        return number, tuple(arrays)

    def strength(self, dtype: Any) -> Strength:
        """The rate, in the real dtype of `dtype`."""
        number, arrays = self.parted()
        return _product(jnp.finfo(dtype).dtype.type(number), arrays)

    def known(self) -> Any:
        """The rate as a NumPy float64 value; None if it has no value during tracing."""
        if any(callable(f) or is_traced(f) or not getattr(f, "is_fully_addressable", True) for f in self.factors):
            return None
        return functools.reduce(lambda a, b: a * b, (np.asarray(factor, np.float64) for factor in self.factors), 1.0)


def _product(number: Scalar, arrays: Iterable[Any]) -> Strength:
    value, is_known = number, True
    for array in arrays:
        value, is_known = value * jnp.asarray(array, number.dtype), False
    return Strength(value, is_known)


def act(
    rule: LeafRule, stack: tuple[int, ...], update: Any, param: Any, anchor: Any, factors: Any, state: Any, totals: Any
) -> tuple[jax.Array, Any]:
    """Applies a rule to one parameter: the new update, in the dtype of the old one, and the new state."""

    def on_arrays(update: Any, param: Any, anchor: Any, factors: Any, state: Any, totals: Any) -> Any:
        def apply(u: Any, p: Any, a: Any, strength: Strength, state: Any) -> Any:
            assert rule.apply is not None
            return rule.apply(u, p, a, strength, state, totals)

        new, kept = _on_layers(rule, apply, stack, update, param, anchor, factors, state)
        return (new if rule.is_raw else narrowed(new, update)), (None if rule.init is None else kept)

    arguments = update, param, anchor, factors, state, totals
    return automatic(on_arrays, arguments, like=(update, None if rule.init is None else state))


jitted_act = jax.jit(act, static_argnums=(0, 1))


def reduced(rule: LeafRule, stack: tuple[int, ...], update: Any, param: Any, anchor: Any, factors: Any) -> Any:
    """The partial sums of one parameter. The arguments are as for `act`."""

    def reduce(u: Any, p: Any, a: Any, strength: Strength, _: Any) -> Any:
        assert rule.reduce is not None
        return rule.reduce(u, p, a, strength)

    def on_arrays(update: Any, param: Any, anchor: Any, factors: Any) -> Any:
        parts = _on_layers(rule, reduce, stack, update, param, anchor, factors, None, is_reduced=True)
        return jax.tree.map(lambda part: jnp.sum(part, range(len(stack))), parts)

    return automatic(on_arrays, (update, param, anchor, factors), like=None)


def _on_layers(
    rule: LeafRule,
    function: Callable[..., Any],
    stack: tuple[int, ...],
    update: Any,
    param: Any,
    anchor: Any,
    factors: Any,
    state: Any,
    *,
    is_reduced: bool = False,
) -> Any:
    """A function of (update, param, anchor, strength, state) for each layer, on arrays in safe dtypes."""
    # We cast everything. Only a real rate times complex weights still needs promotion.
    with jax.numpy_dtype_promotion("standard"):
        dtype = compute_dtype(update, param)
        number, *arrays = factors
        strength = _product(cast(number, jnp.finfo(dtype).dtype), arrays)
        if not rule.is_raw:
            update, param, anchor = (None if x is None else cast(x, dtype) for x in (update, param, anchor))

        def on_layer(u: Any, p: Any, a: Any, value: Any, state: Any) -> Any:
            return function(u, p, a, strength._replace(value=value), state)

        of_all = for_each_layer(on_layer, stack, is_reduced=is_reduced)
        return of_all(update, param, anchor, strength.value, state)


def for_each_layer(on_layer: Callable[..., Any], stack: Sequence[int], *, is_reduced: bool = False) -> Any:
    """Maps a function of (update, param, anchor, rate, state) over the axes that stack layers.

    An array rate is mapped along those axes where its size is not 1. In a state these axes come first.
    """
    if not stack:
        return on_layer
    *inner, axis = sorted(stack)
    of_layers = for_each_layer(on_layer, inner, is_reduced=is_reduced)

    def of_all(u: Any, p: Any, a: Any, rate: Any, state: Any) -> Any:
        is_shared = jnp.ndim(rate) == 0 or jnp.shape(rate)[axis] == 1
        if is_shared and jnp.ndim(rate):
            rate = jnp.squeeze(rate, axis)
        axes, results = (axis, axis, axis, None if is_shared else axis, 0), 0 if is_reduced else (axis, 0)
        return jax.vmap(of_layers, axes, results)(u, p, a, rate, state)

    return of_all


def init_state(rule: LeafRule, stack: tuple[int, ...], param: Any) -> Any:
    """The rule's initial state for one parameter. For a stack, the states of the layers lie along leading axes."""
    assert rule.init is not None
    init = rule.init
    for axis in sorted(stack):
        init = jax.vmap(init, axis)
    return init(param)


def narrowed(new: jax.Array, update: Any) -> jax.Array:
    """The result in the dtype of the update. For a real update, the real part."""
    is_complex = jnp.iscomplexobj(update) or not jnp.iscomplexobj(new)
    return cast(new if is_complex else jnp.real(new), jnp.result_type(update))


def cast(x: Any, dtype: Any) -> jax.Array:
    """The array in this dtype. An array of that dtype is returned as it is: a no-op conversion costs tracing time."""
    return x if isinstance(x, jax.Array) and x.dtype == dtype else jnp.asarray(x, dtype)


def widened(updates: Any) -> Any:
    """A tree of updates in the dtype of the arithmetic, for rules that run one after the other and are rounded once."""
    return trees.of_each(updates, trees.is_decayable, lambda u: cast(u, compute_dtype(u)), lambda u: u)


def narrowed_like(wide: Any, updates: Any) -> Any:
    """A tree of results in the dtypes of the updates."""
    is_decayable, is_hole = trees.is_decayable, trees.is_hole
    return jax.tree.map(lambda new, u: narrowed(new, u) if is_decayable(u) else u, wide, updates, is_leaf=is_hole)


def compute_dtype(*leaves: Any) -> Any:
    """The dtype to compute in: at least float32, double precision if a leaf has it, complex if a leaf is complex."""
    return _compute_dtype(*(leaf.dtype if isinstance(leaf, jax.Array) else jnp.result_type(leaf) for leaf in leaves))


@functools.cache
def _compute_dtype(*dtypes: Any) -> Any:
    wide = any(dtype in (jnp.float64, jnp.complex128) for dtype in dtypes)
    if any(jnp.issubdtype(dtype, jnp.complexfloating) for dtype in dtypes):
        return jnp.dtype(jnp.complex128 if wide else jnp.complex64)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def plus(update: jax.Array, rate: Strength, pull: jax.Array) -> jax.Array:
    """update + rate * pull. Where the rate is 0, the update keeps every bit."""
    return minus(update, rate, -pull)


def minus(update: jax.Array, rate: Strength, pull: jax.Array) -> jax.Array:
    """update - rate * pull. Where the rate is 0, the update keeps every bit.

    There it subtracts +0.0, which changes no number, except that hardware may flush subnormal ones. The derivative with
    respect to the rate is still that of the rule, so that a rate can be learned away from 0. There an infinite pull
    counts as 0, because 0 * inf is NaN.
    """
    if rate.is_known:
        return update - rate.value * pull
    off = rate.value == 0
    step = rate.value * _select(off, _finite(pull), pull)
    return update - _select(off, step - jax.lax.stop_gradient(step), step)


def unless_off(rate: Strength, off: jax.Array, on: jax.Array) -> jax.Array:
    """`off` where the rate is 0, else `on`. Both have the derivative of `on` where it is finite."""
    if rate.is_known:
        return on
    finite = _finite(on)
    off = jax.lax.select_n(jnp.isfinite(on), off, jax.lax.stop_gradient(off))
    return _select(rate.value == 0, off - (jax.lax.stop_gradient(finite) - finite), on)


def _select(off: jax.Array, if_off: jax.Array, if_on: jax.Array) -> jax.Array:
    return jax.lax.select(jnp.broadcast_to(off, if_on.shape) if jnp.ndim(off) else off, if_off, if_on)


def _finite(x: jax.Array) -> jax.Array:
    return jax.lax.select(jnp.isfinite(x), x, jnp.zeros_like(x))


def away(p: jax.Array, anchor: jax.Array | None) -> jax.Array:
    """The parameter minus its anchor; an anchor of None is zero."""
    return p if anchor is None else p - anchor


def subtracted(update: jax.Array, p: jax.Array, anchor: jax.Array | None, rate: Strength) -> jax.Array:
    """The rule that subtracts a fraction of (parameter - anchor) from the finished update."""
    return minus(update, rate, away(p, anchor))
