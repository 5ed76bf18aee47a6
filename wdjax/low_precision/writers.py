"""Writers come last in a chain. They choose the new weights and return updates with which `apply_updates` hits them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .._engine import checks, draws, trees
from .._engine.arithmetic import LeafRule
from .._engine.loop import Action, DecayState
from .rounding import in_spacings, is_low, is_narrow, remainder, rounded, step_to, times_spacing, two_sum

PyTree = Any
NARROW_UPDATES = "a decay that is much smaller than the gradient's part is rounded away before it gets here"


class StochasticRoundingState(NamedTuple):
    """The state of `stochastic_rounding`.

    Attributes:
        count: shape (), int32: the number of updates so far. With the seed, it determines the next random numbers.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> int(wdjax.stochastic_rounding(seed=0).init(jnp.ones(2, jnp.bfloat16)).count)
        0
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]


class CompensatedState(NamedTuple):
    """The state of `compensated`.

    Attributes:
        residual: a tree like params, int16: what is missing from the weights, in units of 2^-16 of the spacing of
            neighboring weights. None for leaves that are not compensated.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> wdjax.compensated().init(jnp.ones(2, jnp.bfloat16)).residual.dtype
        dtype('int16')
    """

    residual: PyTree


class MasterWeightsState(NamedTuple):
    """The state of `master_weights`.

    Attributes:
        weights: a tree like params: the weights in float32. None for leaves that already have at least float32.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> wdjax.master_weights().init(jnp.ones(2, jnp.bfloat16)).weights.dtype
        dtype('float32')
    """

    weights: PyTree


WRITERS = (StochasticRoundingState, CompensatedState, MasterWeightsState)


@checks.known_arguments
def stochastic_rounding(seed: int | np.integer[Any] | jax.Array) -> optax.GradientTransformation:
    """Rounds weights of low precision up or down at random, so that they are correct on average.

    Rule:   p + u is rounded to one of its two neighbors in the dtype of p, to the upper one with the probability
            (p + u - lower) / (upper - lower), so the mean is p + u. Values that the dtype can hold are not rounded.
            Where float32 flushes subnormal numbers, as on CPUs and TPUs, magnitudes below 2^-126 count as zero.
    Place:  last in the chain, right before `optax.apply_updates`. Wrap the rest of the chain in `in_float32`.
    Units:  those of the update. With zero gradient, the mean of many weights follows the closed form of the decay. A
            single weight deviates from it in a random walk, by about sqrt(steps * rate * 2^-8) of itself in bfloat16.
    Source: Gupta et al. 2015; for weight decay Zamirai et al. 2020 (arXiv 2010.06192).

    Args:
        seed: an integer or 0-d integer array (may be traced), of which the low 32 bits count. Seed, count and path of a
            parameter give the same random numbers on any number of devices, with any sharding, and on every replica of
            `pmap`. Inside `shard_map` a device draws for its part. With `check_vma=False` all parts get the same
            numbers: then add `jax.lax.axis_index` of the axes that params are sharded over to the seed. Under `vmap`
            all members draw the same numbers, unless the seed is mapped.

    Returns:
        An `optax.GradientTransformation` with a `StochasticRoundingState`. Its `update` needs `params`. The updates of
        parameters below float32 become float32. All others keep their dtype.

    Raises:
        TypeError: if the seed is not an integer.
        ValueError: at `update`, if params are missing.

    Warns:
        UserWarning: at `update`, if updates arrive in less than float32, since what they lost can't be restored.

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
    draws.check_seed(where, seed, f"{where}(seed=0)")

    def update_fn(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        leaves = trees.flatten_with_paths(params)
        keys = draws.keys_of_leaves(where, seed, state.count, [(path, leaf) for path, leaf in leaves if is_low(leaf)])
        updates, _ = _run(where, _AT_RANDOM, updates, params, inputs=[keys.get(path) for path, _ in leaves])
        return updates, StochasticRoundingState(jnp.asarray(optax.safe_increment(state.count)))

    return optax.GradientTransformation(lambda params: StochasticRoundingState(jnp.zeros([], jnp.int32)), update_fn)


@checks.known_arguments
def compensated() -> optax.GradientTransformation:
    """Keeps the rounding error of each weight and adds it to the next step: Kahan summation.

    Rule:   y <- u + residual; p <- p + y, rounded to the dtype of p; residual <- p before + y - p after. Where float32
            flushes subnormal numbers, as on CPUs and TPUs, magnitudes below 2^-126 count as zero.
    Place:  last in the chain, right before `optax.apply_updates`. Wrap the rest of the chain in `in_float32`. The decay
            is part of u, so it is compensated too.
    Units:  those of the update. With zero gradient, a weight is within 0.51 units in the last place of the closed form
            of the decay after 10,000 steps of 3e-5. In bfloat16, steps down to 1e-7 of a weight are kept.
    Source: Kahan 1965; for bfloat16 weights Zamirai et al. 2020 (arXiv 2010.06192). Deviation: a bfloat16 residual
            would lose decays again (3 units in the last place after 10,000 steps of 3e-5). Here it counts units of
            2^-16 of the spacing of neighboring weights, which is as fine as float32 for bfloat16 weights.

    Returns:
        An `optax.GradientTransformation` with a `CompensatedState`, 2 bytes a parameter. Its `update` needs `params`.
        It acts on real parameters of less than 64 bits, including float32. Their updates become float32. All others
        keep their dtype.

    Raises, Warns: as `stochastic_rounding`; a ValueError also if the state has nothing for one of the parameters.

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
    return _with_memory("compensated", _WITH_RESIDUAL, CompensatedState)


@checks.known_arguments
def master_weights() -> optax.GradientTransformation:
    """Keeps a float32 copy of weights of low precision, updates the copy, and rounds it to the weights.

    Rule:   copy <- copy + u; p <- copy, rounded to the dtype of p. Where float32 flushes subnormal numbers, as on CPUs
            and TPUs, magnitudes below 2^-126 count as zero.
    Place:  last in the chain, right before `optax.apply_updates`. Wrap the rest of the chain in `in_float32`.
    Units:  those of the update. With zero gradient, the copy follows the closed form of the decay, except that the
            decay is computed from the rounded weight.
    Source: Micikevicius et al. 2018 (arXiv 1710.03740).

    Returns:
        An `optax.GradientTransformation` with a `MasterWeightsState`, 4 bytes a parameter. Its `update` needs `params`.
        The updates of parameters below float32 become float32. All others keep their dtype. The copy undoes any other
        change of the parameters (such as a restored checkpoint of only the weights), and a NaN update stays in it. Make
        a new state in these cases.

    Raises, Warns: as `stochastic_rounding`; a ValueError also if the state has nothing for one of the parameters.

    Example:

        >>> import jax.numpy as jnp, optax, wdjax
        >>> optimizer = optax.chain(wdjax.in_float32(wdjax.adamw(0.01, 0.1)), wdjax.master_weights())
        >>> params = jnp.array([2.0], jnp.bfloat16)
        >>> updates, state = optimizer.update(jnp.zeros_like(params), optimizer.init(params), params)
        >>> float(optax.apply_updates(params, updates)[0]), round(float(state[-1].weights[0]), 6)
        (2.0, 1.998)
    """
    return _with_memory("master_weights", _WITH_COPY, MasterWeightsState)


def _with_memory(where: str, rule: LeafRule, kind: Any) -> optax.GradientTransformation:
    """A writer whose state has one field: what the rule remembers of each leaf."""

    def init_fn(params: PyTree) -> Any:
        return kind(Action(where).init(params, rule, aliases=lambda path: False).leaf)

    def update_fn(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        updates, memory = _run(where, rule, updates, params, state[0])
        return updates, kind(memory)

    return optax.GradientTransformation(init_fn, update_fn)


def _run(
    where: str, rule: LeafRule, updates: PyTree, params: PyTree, leaf: PyTree = None, inputs: Any = None
) -> tuple[PyTree, PyTree]:
    checks.params_given(where, params)
    state = DecayState(jnp.zeros([], jnp.int32), None, leaf)
    new, kept = Action(where).run(rule, updates, state, params, inputs=inputs)
    written = {path for path, leaf in trees.flatten_with_paths(params) if rule.acts_on(leaf)}
    narrow = [(path, u.dtype) for path, u in trees.flatten_with_paths(updates) if path in written and is_low(u)]
    if narrow:
        path, dtype = narrow[0]
        checks.warn(
            f"{where}: the update of {path!r} has dtype {dtype} (and {len(narrow) - 1} more): {NARROW_UPDATES}. "
            f"Write optax.chain(in_float32(optimizer), {where}(...))."
        )
    return new, kept


def _at_random(update: jax.Array, p: jax.Array, _: Any, __: Any, key: jax.Array, ___: Any) -> tuple[jax.Array, None]:
    update = jnp.asarray(update, jnp.float32)
    bits = jax.random.bits(key, p.shape, jnp.uint32)
    fraction = (bits >> 8).astype(jnp.float32) * 2.0**-24
    total, lost = two_sum(p.astype(jnp.float32), update)
    return step_to(p, rounded(total, p.dtype, lost, fraction), update), None


def _with_residual(update: jax.Array, p: jax.Array, _: Any, __: Any, residual: jax.Array, ___: Any) -> Any:
    before = p.astype(jnp.float32)
    # Where nothing is missing, it subtracts +0.0, which leaves an update of -0.0 as it is.
    extra = (-residual.astype(jnp.int32)).astype(jnp.float32) * 2.0**-16
    step = jnp.asarray(update, jnp.float32) - times_spacing(extra, before, p.dtype)
    if is_low(p):
        landed = rounded(before + step, p.dtype)
        lost = jnp.where(step == 0, 0, remainder(landed, before, step))
        step = step_to(p, landed, step)
    else:
        landed, lost = two_sum(before, step)
    parts = jnp.round(in_spacings(lost, landed, p.dtype) * 2.0**16)
    return step, jnp.where(jnp.isfinite(parts), jnp.clip(parts, -(2**15), 2**15 - 1), 0).astype(jnp.int16)


def _with_copy(update: jax.Array, p: jax.Array, _: Any, __: Any, weights: jax.Array, ___: Any) -> Any:
    weights = weights + jnp.asarray(update, jnp.float32)
    return step_to(p, rounded(weights, p.dtype), weights - p.astype(jnp.float32)), weights


_AT_RANDOM = LeafRule(_at_random, is_elementwise=True, acts_on=is_low, is_raw=True)
_WITH_RESIDUAL = LeafRule(
    _with_residual, lambda p: jnp.zeros_like(p, jnp.int16), is_elementwise=True, acts_on=is_narrow, is_raw=True
)
_WITH_COPY = LeafRule(_with_copy, lambda p: p.astype(jnp.float32), is_elementwise=True, acts_on=is_low, is_raw=True)
