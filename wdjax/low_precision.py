"""Parameters in bfloat16, float16 or float8: what must stand around a chain so that small steps are not rounded away.

`optax.apply_updates` rounds params + update to the dtype of params. In bfloat16 a change of less than 2^-9 of a
weight is rounded back (float16: 2^-12, float8_e4m3fn: 2^-5), and a decay is such a change in every step, so it never
happens. Two things are lost, and each has its own remedy:

- *Within* the optimizer the decay is a small number beside a large one. `in_float32` wraps the optimizer, so that its
  arithmetic and its state are in float32, whatever the parameters are in.
- *At the end* the step is a small number beside the weight. A writer stands last in the chain and gives
  `optax.apply_updates` an update that lands on a number that it chose: one drawn at random with the right mean
  (`stochastic_rounding`), the nearest to what was meant since the last step (`compensated`), or the nearest to a
  float32 copy of the weights (`master_weights`).

    optax.chain(in_float32(adamw(3e-4, 0.1, mask)), stochastic_rounding(seed=0))

Nothing may follow a writer that changes the update: a decay behind it is rounded away again.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from . import _checks, _leaves

PyTree = Any


class StochasticRoundingState(NamedTuple):
    """The state of `stochastic_rounding`.

    Attributes:
        count: shape (), int32: the updates so far; with the seed it gives the random numbers of the next.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]


class CompensatedState(NamedTuple):
    """The state of `compensated`.

    Attributes:
        residual: a tree like params, int16: how much higher the weights should be, in 2^-16 parts of the distance of
            two neighbouring weights; None for what is not compensated.
    """

    residual: PyTree


class MasterWeightsState(NamedTuple):
    """The state of `master_weights`.

    Attributes:
        weights: a tree like params: the weights in float32; None for those that have at least float32 themselves.
    """

    weights: PyTree


WRITERS = (StochasticRoundingState, CompensatedState, MasterWeightsState)


@_checks.known_arguments
def in_float32(optimizer: Any) -> optax.GradientTransformationExtraArgs:
    """Runs an optimizer in float32 on gradients and parameters of lower precision.

    In bfloat16 the sum of a direction and a decay loses the decay where it is less than 2^-9 of the direction, and a
    second moment with b2 = 0.999 never moves. Here neither does.

    Rule:   u <- optimizer's u for the gradients, the parameters and a state in float32; u stays in float32
    Place:  around the optimizer, and behind it, last in the chain, a writer: `stochastic_rounding`, `compensated` or
            `master_weights`.
    Units:  none. The state has the size of that for float32 parameters: Adam keeps 8 bytes a parameter.
    Source: ours; torchao's low-bit optimizers compute in float32 as well.

    Args:
        optimizer: an `optax.GradientTransformation` or `optax.MultiSteps`, with any decay inside.

    Returns:
        An `optax.GradientTransformationExtraArgs` with the state of `optimizer` for float32 parameters. Where
        parameters and gradients have float32 or more, it changes nothing.

    Raises:
        TypeError: if `optimizer` is no optimizer.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> optimizer = wdjax.in_float32(wdjax.adamw(0.01, 0.1))
        >>> params = {"kernel": jnp.array([2.0], jnp.bfloat16)}
        >>> updates, _ = optimizer.update({"kernel": jnp.zeros(1, jnp.bfloat16)}, optimizer.init(params), params)
        >>> updates["kernel"].dtype, round(float(updates["kernel"][0]), 6)
        (dtype('float32'), -0.002)
    """
    inner = _checks.finished("in_float32", optimizer, "in_float32(optax.adam(1e-3))")

    def update_fn(updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any) -> tuple[PyTree, Any]:
        return inner.update(_widened(updates), state, _widened(params), **extra_args)

    return optax.GradientTransformationExtraArgs(lambda params: inner.init(_widened(params)), update_fn)


@_checks.known_arguments
def stochastic_rounding(seed: Any) -> optax.GradientTransformation:
    """Rounds weights of low precision up or down at random, so that on average they are where they should be.

    Rule:   p + u is rounded to one of its two neighbours in the dtype of p, to the upper with the probability
            (p + u - lower) / (upper - lower): the mean is p + u. What p can hold exactly is not rounded.
    Place:  last in the chain, right before `optax.apply_updates`; around the rest of it `in_float32`.
    Units:  none. With zero gradient the mean of many weights follows the closed form of the decay; one weight
            walks around it at random, by about sqrt(steps * rate * 2^-8) of itself in bfloat16.
    Source: Gupta et al. 2015; for weight decay Zamirai et al. 2020 (arXiv 2010.06192).

    Args:
        seed: an integer or 0-d integer array (traced is fine). The same seed and count give the same random numbers
            on any number of devices, whatever the sharding, and on every replica of `pmap`. Inside `shard_map` a
            device sees its shard only: there add `jax.lax.axis_index` of the axes that params are sharded over.

    Returns:
        An `optax.GradientTransformation` with a `StochasticRoundingState`; its `update` needs `params`. The updates of
        parameters below float32 come out in float32, all others as they came in.

    Raises:
        TypeError: if the seed is no integer.

    Warns:
        UserWarning: at `update`, if updates come in with less than float32: what was lost before, stays lost.

    Example:

        >>> import jax.numpy as jnp, optax, wdjax
        >>> optimizer = optax.chain(wdjax.in_float32(wdjax.adamw(0.01, 0.1)), wdjax.stochastic_rounding(seed=0))
        >>> params = jnp.full(10_000, 2.0, jnp.bfloat16)
        >>> updates, _ = optimizer.update(jnp.zeros_like(params), optimizer.init(params), params)
        >>> params = optax.apply_updates(params, updates)
        >>> sorted(set(params.tolist())), round(float(params.astype(float).mean()), 3)
        ([1.9921875, 2.0], 1.998)
    """
    where = "stochastic_rounding"
    if isinstance(seed, (bool, np.bool_)) or not jnp.issubdtype(jnp.result_type(seed), jnp.integer) or jnp.ndim(seed):
        raise TypeError(f"{where}: seed must be an integer, got {seed!r}. Write {where}(seed=0).")

    def update_fn(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), state.count)

        def write(update: jax.Array, p: jax.Array, _: Any, i: int) -> tuple[jax.Array, None]:
            bits = jax.random.bits(jax.random.fold_in(key, i), p.shape, jnp.uint32)
            fraction = (bits >> 8).astype(jnp.float32) * 2.0**-24
            total, lost = _two_sum(p.astype(jnp.float32), update)
            return _step_to(p, _rounded(total, p.dtype, lost, fraction), update), None

        updates, _ = _written(where, write, is_low, updates, params)
        return updates, StochasticRoundingState(jnp.asarray(optax.safe_increment(state.count)))

    return optax.GradientTransformation(lambda params: StochasticRoundingState(jnp.zeros([], jnp.int32)), update_fn)


@_checks.known_arguments
def compensated() -> optax.GradientTransformation:
    """Keeps what rounding takes from each weight, and adds it to the next step: Kahan summation.

    Rule:   y <- u + residual; p <- p + y, rounded to the dtype of p; residual <- p before + y - p after
    Place:  last in the chain, right before `optax.apply_updates`; around the rest of it `in_float32`. The decay is in
            u, hence inside the compensation.
    Units:  none. With zero gradient a weight is always the closed form of the decay, rounded once.
    Source: Kahan 1965; for bfloat16 weights Zamirai et al. 2020 (arXiv 2010.06192). Deviation: the residual is no
            bfloat16, which loses decays again (3 units in the last place after 10,000 steps of 3e-5), but counts
            2^-16 parts of the distance of two neighbouring weights: as fine as float32 for bfloat16 weights.

    Returns:
        An `optax.GradientTransformation` with a `CompensatedState`, 2 bytes a parameter; its `update` needs `params`.
        It acts on real parameters of less than 64 bits, float32 too; their updates come out in float32, all others
        as they came in.

    Raises:
        ValueError: at `update`, if params are left out or have other dtypes than at `init`.

    Warns:
        UserWarning: at `update`, if updates come in with less than float32: what was lost before, stays lost.

    Example:

        >>> import jax.numpy as jnp, optax, wdjax
        >>> optimizer = optax.chain(wdjax.in_float32(wdjax.adamw(0.01, 0.1)), wdjax.compensated())
        >>> params = jnp.array([2.0], jnp.bfloat16)
        >>> state = optimizer.init(params)
        >>> for _ in range(5):
        ...     updates, state = optimizer.update(jnp.zeros_like(params), state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> float(params[0]), int(state[-1].residual[0])  # 2 * 0.999**5 = 1.99002 = 1.9921875 - 18155 / 2**16 / 2**7
        (1.9921875, -18155)
    """
    where = "compensated"

    def init_fn(params: PyTree) -> CompensatedState:
        return CompensatedState(_for_each(params, _is_compensated, lambda p: jnp.zeros_like(p, jnp.int16)))

    def write(update: jax.Array, p: jax.Array, residual: jax.Array, _: int) -> tuple[jax.Array, jax.Array]:
        before = p.astype(jnp.float32)
        step = update + residual.astype(jnp.float32) * 2.0**-16 * _spacing(before, p.dtype)[0]
        if is_low(p):
            landed = _rounded(before + step, p.dtype)
            lost = jnp.where(step == 0, 0, _remainder(landed, before, step))
            step = _step_to(p, landed, step)
        else:
            landed, lost = _two_sum(before, step)
        parts = jnp.round(lost * _spacing(landed, p.dtype)[1] * 2.0**16)
        return step, jnp.where(jnp.isfinite(parts), jnp.clip(parts, -(2**15), 2**15 - 1), 0).astype(jnp.int16)

    def update_fn(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        updates, residual = _written(where, write, _is_compensated, updates, params, state.residual)
        return updates, CompensatedState(residual)

    return optax.GradientTransformation(init_fn, update_fn)


@_checks.known_arguments
def master_weights() -> optax.GradientTransformation:
    """Keeps a float32 copy of weights of low precision, moves the copy, and rounds it to the weights.

    Rule:   copy <- copy + u; p <- copy, rounded to the dtype of p
    Place:  last in the chain, right before `optax.apply_updates`; around the rest of it `in_float32`.
    Units:  none. With zero gradient the copy follows the closed form of the decay, but for the decay's being that of
            the rounded weight.
    Source: Micikevicius et al. 2018 (arXiv 1710.03740).

    Returns:
        An `optax.GradientTransformation` with a `MasterWeightsState`, 4 bytes a parameter; its `update` needs
        `params`. The updates of parameters below float32 come out in float32, all others as they came in. Whatever
        else changes the parameters (a restored checkpoint of the weights alone) is undone by the copy: make a new
        state then.

    Raises:
        ValueError: at `update`, if params are left out.

    Warns:
        UserWarning: at `update`, if updates come in with less than float32: what was lost before, stays lost.

    Example:

        >>> import jax.numpy as jnp, optax, wdjax
        >>> optimizer = optax.chain(wdjax.in_float32(wdjax.adamw(0.01, 0.1)), wdjax.master_weights())
        >>> params = jnp.array([2.0], jnp.bfloat16)
        >>> updates, state = optimizer.update(jnp.zeros_like(params), optimizer.init(params), params)
        >>> float(optax.apply_updates(params, updates)[0]), round(float(state[-1].weights[0]), 6)
        (2.0, 1.998)
    """
    where = "master_weights"

    def write(update: jax.Array, p: jax.Array, weights: jax.Array, _: int) -> tuple[jax.Array, jax.Array]:
        weights = weights + update
        return _step_to(p, _rounded(weights, p.dtype), weights - p.astype(jnp.float32)), weights

    def init_fn(params: PyTree) -> MasterWeightsState:
        return MasterWeightsState(_for_each(params, is_low, lambda p: p.astype(jnp.float32)))

    def update_fn(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        updates, weights = _written(where, write, is_low, updates, params, state.weights)
        return updates, MasterWeightsState(weights)

    return optax.GradientTransformation(init_fn, update_fn)


def apply_updates(params: PyTree, updates: PyTree) -> PyTree:
    """Adds updates to parameters of any dtype: `optax.apply_updates`, for float8 as well.

    Optax leaves the sum to JAX's promotion of dtypes, and of float8 and float32 there is none.

    Rule:   p <- p + u, computed in at least float32, rounded to the nearest in the dtype of p
    Place:  in the training step, in the place of `optax.apply_updates`; for other dtypes they do the same.
    Units:  none.
    Source: Optax.

    Args:
        params: a tree of parameters.
        updates: a tree of the same structure.

    Returns:
        The new parameters, in the dtypes of the old. None stays None.

    Raises:
        ValueError: if the trees differ in structure.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> wdjax.apply_updates(jnp.ones(2, jnp.float8_e4m3fn), jnp.array([0.1, 0.2])).tolist()
        [1.125, 1.25]
    """

    def add(p: Any, u: Any) -> Any:
        if p is None or u is None or not (_leaves.is_decayable(p) and _leaves.is_decayable(u)):
            return optax.apply_updates(p, u)  # pyright: ignore[reportArgumentType]
        dtype = jnp.promote_types(*(jnp.float32 if is_low(x) else jnp.result_type(x) for x in (p, u)))
        return (jnp.asarray(p, dtype) + jnp.asarray(u, dtype)).astype(jnp.result_type(p))

    return jax.tree.map(add, params, updates, is_leaf=lambda x: x is None)


def is_low(leaf: Any) -> bool:
    """Whether the leaf is real, floating and has less than 32 bits."""
    return _is_compensated(leaf) and jnp.finfo(leaf.dtype).bits < 32


def _is_compensated(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    is_floating = isinstance(dtype, np.dtype) and jnp.issubdtype(dtype, jnp.floating)
    return is_floating and jnp.finfo(dtype).bits < 64


def _widened(tree: PyTree) -> PyTree:
    return _for_each(tree, is_low, lambda x: x.astype(jnp.float32), lambda x: x)


def _for_each(
    tree: PyTree,
    acts: Callable[[Any], bool],
    leaf_fn: Callable[[Any], Any],
    other_fn: Callable[[Any], Any] = lambda x: None,
) -> PyTree:
    def act(x: Any) -> Any:
        if not acts(x):
            return other_fn(x)
        return jax.eval_shape(leaf_fn, x) if isinstance(x, jax.ShapeDtypeStruct) else leaf_fn(jnp.asarray(x))

    return jax.tree.map(act, tree)


def _written(
    where: str,
    write: Callable[[jax.Array, jax.Array, Any, int], tuple[jax.Array, Any]],
    acts: Callable[[Any], bool],
    updates: PyTree,
    params: PyTree,
    states: PyTree = None,
) -> tuple[PyTree, PyTree]:
    """The updates after `write(update, param, state, index) -> (update, state)` of each leaf that it acts on."""
    _checks.params_given(where, params)
    leaves = _leaves.flatten_with_paths(params)
    kept = dict(_leaves.flatten_with_paths(states))
    narrow: dict[str, Any] = {}

    def act(update: Any, i: int) -> Any:
        path, p = leaves[i]
        if not acts(p):
            return update
        _checks.same_shape(where, path, update, p)
        if states is not None and _leaves.is_hole(kept.get(path)):
            raise ValueError(
                f"{where}: the state has nothing for {path!r}, which is {p.dtype} now: it was made for other "
                "parameters. Make a new one: optimizer.init(params)."
            )
        if is_low(update):
            narrow[path] = update.dtype
        update, kept[path] = write(jnp.asarray(update, jnp.float32), jnp.asarray(p), kept.get(path), i)
        return update

    updates = _leaves.map_with_params(act, where, updates, params, [path for path, _ in leaves])
    if narrow:
        path, dtype = next(iter(narrow.items()))
        _checks.warn(
            f"{where}: the update of {path!r} comes in {dtype} (and {len(narrow) - 1} more like it): a decay that is "
            "small beside the gradient's part is rounded away before it gets here. "
            f"Write optax.chain(in_float32(optimizer), {where}(...))."
        )
    if states is None:
        return updates, None
    order = [path for path, _ in _leaves.flatten_with_paths(states)]
    return updates, jax.tree.unflatten(_leaves.structure(states), [kept[path] for path in order])


def _two_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The rounded sum, and what rounding took from it: together they are a + b exactly."""
    total = a + b
    return total, _remainder(total, a, b)


def _remainder(total: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    part = total - a
    return (a - (total - part)) + (b - part)


def _rounded(x: jax.Array, dtype: Any, lost: Any = 0.0, fraction: jax.Array | None = None) -> jax.Array:
    """x + lost as a number of `dtype`, in float32: the nearest, or with a fraction the next one up where that carries.

    It is done in arithmetic, since compilers may take out a conversion to a narrower dtype and back.
    """
    spacing, inverse = _spacing(x, dtype)
    steps = x * inverse
    if fraction is None:
        steps = jnp.round(steps)
    else:
        whole = jnp.floor(steps)
        steps = whole + jnp.floor((steps - whole) + lost * inverse + fraction)
    # What is finite stays finite; what is beyond the dtype is left to the conversion.
    largest = float(jnp.finfo(dtype).max)
    return jnp.where(jnp.abs(x) <= largest, jnp.clip(steps * spacing, -largest, largest), x)


def _spacing(x: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """The distance of the neighbours of x in `dtype`, and its inverse, in float32."""
    info = jnp.finfo(dtype)
    # Both are powers of two, so that their exponents can be written into the bits of a float32.
    exponent = (jax.lax.bitcast_convert_type(x, jnp.int32) >> 23) & 255
    exponent = jnp.maximum(exponent, max(int(info.minexp) + 127, int(info.nmant) + 1)) - int(info.nmant)
    bits = exponent << 23, (254 - exponent) << 23
    spacing, inverse = (jax.lax.bitcast_convert_type(each, jnp.float32) for each in bits)
    return spacing, inverse


def _step_to(p: jax.Array, target: jax.Array, step: jax.Array) -> jax.Array:
    """The update, in float32, with which `optax.apply_updates` lands on the target; no bit changes without a step."""
    p = p.astype(jnp.float32)
    return jnp.where((target == p) | (step == 0), jnp.float32(-0.0), target - p)
