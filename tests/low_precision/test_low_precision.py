"""Low precision: what rounding takes away, and that each writer brings it back, against float64 NumPy.

Of a writer two things are asked: that decay alone follows its closed form over ten thousand steps, in every storage
dtype, and that training with real gradients ends where a float32 run ends. What a test expects is computed in float64
from the bits of the weights, and spacings are those of `ml_dtypes`, not ours.
"""

import functools
import inspect
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import chex
import equinox as eqx
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp
from sklearn.datasets import load_digits
from slow import slow, slow_but

import wdjax
from wdjax.low_precision import rounding

# `optax.apply_updates` adds float32 to bfloat16, and Adam's bias correction mixes dtypes. What is ours alone is tested
# under strict promotion in `test_nothing_of_ours_relies_on_implicit_promotion`.
pytestmark = pytest.mark.peers

LEARNING_RATE, WEIGHT_DECAY, STEPS = 3e-4, 0.1, 10_000
RATE = LEARNING_RATE * WEIGHT_DECAY
WIDE = [jnp.bfloat16, jnp.float16]
FLOAT8 = [jnp.float8_e4m3fn, jnp.float8_e5m2]
WRITERS: dict[str, Callable[..., Any]] = {
    "stochastic_rounding": lambda seed=0: wdjax.stochastic_rounding(seed),
    "compensated": lambda seed=0: wdjax.compensated(),
    "master_weights": lambda seed=0: wdjax.master_weights(),
}
every_writer = pytest.mark.parametrize("writer", WRITERS)
one_writer = pytest.mark.parametrize("writer", slow_but(WRITERS, "stochastic_rounding"))
every_dtype = pytest.mark.parametrize("dtype", WIDE + FLOAT8, ids=lambda dtype: dtype.__name__)


def chain(writer: str, optimizer: Any = None, seed: Any = 0) -> Any:
    optimizer = wdjax.adamw(LEARNING_RATE, WEIGHT_DECAY) if optimizer is None else optimizer
    return optax.chain(wdjax.in_float32(optimizer), WRITERS[writer](seed))


def decaying(rate: float, writer: str, seed: Any = 0) -> Any:
    return chain(writer, optax.chain(optax.set_to_zero(), wdjax.independent_decay(rate)), seed)


def without_gradients(optimizer: Any, params: Any, steps: int, state: Any = None) -> tuple[Any, Any]:
    """The parameters and the state after decay alone."""

    @jax.jit
    def run(params: Any, state: Any) -> Any:
        def step(carry: Any, _: Any) -> Any:
            params, state = carry
            updates, state = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)
            return (wdjax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), length=steps)[0]

    return run(params, optimizer.init(params) if state is None else state)


def normal_weights(dtype: Any, count: int = 4096) -> jax.Array:
    """Weights of 2^-6 to 2 of both signs: so many binades, edges of binades and their crossings are among them."""
    weights = np.random.default_rng(0).normal(size=count)
    weights = np.sign(weights) * np.clip(np.abs(weights), 2.0**-6, 2.0)
    return jnp.asarray(weights.astype(np.dtype(dtype)))


def float64(tree: Any) -> Any:
    with np.errstate(invalid="ignore"):  # Of NaN.
        return jax.tree.map(lambda x: np.asarray(x).astype(np.float64), tree)


def spacing(x: np.ndarray, dtype: Any) -> np.ndarray:
    """The distance to the next larger number of `dtype` of what x is rounded to."""
    return np.spacing(np.abs(x).astype(np.dtype(dtype))).astype(np.float64)


def nearest(x: np.ndarray, dtype: Any) -> np.ndarray:
    return x.astype(np.dtype(dtype)).astype(np.float64)


def same_bits(a: Any, b: Any) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(
        np.asarray(x).dtype == np.asarray(y).dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in pairs
    )


# What happens without a writer.


@pytest.mark.filterwarnings("ignore:.*the decay rounds to nothing")
@pytest.mark.parametrize("library", [optax, wdjax], ids=["optax", "wdjax"])
@pytest.mark.parametrize("dtype", WIDE, ids=lambda dtype: dtype.__name__)
def test_ten_thousand_steps_of_adamw_leave_every_weight_as_it_was(library: Any, dtype: Any) -> None:
    # Adam's own eps of 1e-8 is 0 in float16, and its direction NaN without a gradient.
    optimizer = library.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY, eps=1e-4)
    weights = normal_weights(dtype)
    assert same_bits(without_gradients(optimizer, weights, STEPS)[0], weights)
    wide = normal_weights(jnp.float32)
    np.testing.assert_allclose(without_gradients(optimizer, wide, STEPS)[0], float64(wide) * 0.740814, rtol=2e-4)


@pytest.mark.filterwarnings("ignore:.*the decay rounds to nothing")
def test_adam_in_float16_needs_in_float32_to_be_a_number() -> None:
    weights = jnp.ones(3, jnp.float16)
    assert np.isnan(without_gradients(wdjax.adamw(LEARNING_RATE, WEIGHT_DECAY), weights, 1)[0]).all()
    assert same_bits(
        without_gradients(wdjax.in_float32(wdjax.adamw(LEARNING_RATE, WEIGHT_DECAY)), weights, 1)[0], weights
    )


# What is said of the smallest change, on the page and in the warnings.
@pytest.mark.parametrize(
    ("dtype", "exponent"),
    [(jnp.float32, 25), (jnp.float16, 12), (jnp.bfloat16, 9), (jnp.float8_e4m3fn, 5), (jnp.float8_e5m2, 4)],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_the_smallest_fraction_that_does_not_round_away(dtype: Any, exponent: int) -> None:
    info = jnp.finfo(dtype)
    mantissas = 1 + np.unique(np.linspace(0, 2**info.nmant - 1, 1000).astype(int)) * 2.0**-info.nmant
    weights = jnp.asarray(mantissas.astype(np.dtype(dtype)))

    def moves(fraction: float) -> np.ndarray:
        # The difference in float64: that of the decay's own rounding is not the question.
        return nearest(mantissas * (1 - fraction), dtype) != mantissas

    assert not moves(0.99 * 2.0**-exponent).any()
    assert moves(1.01 * 2.0**-exponent).any()  # Where the weight is a power of two or just below one; others need more.
    assert moves(2.02 * 2.0**-exponent).all()
    assert weights.dtype == dtype


# Decay alone, each writer in each dtype.


@pytest.mark.parametrize("dtype", WIDE, ids=lambda dtype: dtype.__name__)
def test_stochastic_rounding_follows_the_closed_form_on_average(dtype: Any) -> None:
    weights = normal_weights(dtype)
    got = float64(without_gradients(chain("stochastic_rounding"), weights, STEPS)[0])
    error = got / (float64(weights) * (1 - RATE) ** STEPS) - 1
    assert abs(error.mean()) < 0.005
    # One weight walks at random: sqrt(steps * rate * spacing) is what the docstring says of it.
    walk = np.sqrt(STEPS * RATE * 2.0 ** -(jnp.finfo(dtype).nmant + 1))
    assert 0.5 * walk < error.std() < 2 * walk
    # The signs make no difference: the bias of each half is in the noise, too.
    for half in (error[float64(weights) > 0], error[float64(weights) < 0]):
        assert abs(half.mean()) < 5 * half.std() / np.sqrt(half.size)


@pytest.mark.parametrize("dtype", FLOAT8, ids=lambda dtype: dtype.__name__)
def test_stochastic_rounding_follows_the_closed_form_in_float8(dtype: Any) -> None:
    # A float8 weight walks by 16 to 23 percent of itself, so that 4,096 of them have a mean good to 0.3 percent only.
    weights = normal_weights(dtype, count=2**14)
    got = float64(without_gradients(chain("stochastic_rounding"), weights, STEPS)[0])
    error = got / (float64(weights) * (1 - RATE) ** STEPS) - 1
    assert abs(error.mean()) < 0.005
    assert abs(error.mean()) < 5 * error.std() / np.sqrt(error.size)
    assert 0.1 < error.std() < 0.3


@every_dtype
@pytest.mark.parametrize("writer", ["compensated", "master_weights"])
def test_compensation_and_master_weights_follow_the_closed_form_to_an_ulp(writer: str, dtype: Any) -> None:
    weights = normal_weights(dtype)
    got = float64(without_gradients(chain(writer), weights, STEPS)[0])
    want = float64(weights) * (1 - RATE) ** STEPS
    ulps = np.abs(got - want) / spacing(want, dtype)
    # Half an ulp is the rounding itself.
    assert ulps.max() < 0.51
    assert np.mean(got != nearest(want, dtype)) < 0.04
    if dtype in WIDE:
        assert abs((got / want - 1).mean()) < 1e-4


@every_dtype
@pytest.mark.parametrize("writer", ["compensated", "master_weights"])
def test_many_steps_reach_the_subnormal_numbers_and_follow_the_closed_form_there(writer: str, dtype: Any) -> None:
    info = jnp.finfo(dtype)
    if dtype == jnp.bfloat16:
        # Its subnormal numbers are float32's, which XLA flushes to zero; what it can hold above them is wide enough.
        weights = jnp.asarray(np.linspace(1, 2, 100).astype(np.dtype(dtype)) * np.dtype(dtype).type(2.0**-100))
    else:
        # From 16 times the smallest normal number, in steps of which none is less than one subnormal.
        units = np.arange(1, 16 * 2**info.nmant)
        weights = jnp.asarray((units * float(info.smallest_subnormal)).astype(np.dtype(dtype)))
    got = float64(without_gradients(decaying(1e-3, writer), weights, 2_000)[0])
    want = float64(weights) * (1 - 1e-3) ** 2_000
    assert np.max(np.abs(got - want) / spacing(want, dtype)) < 0.6


@pytest.mark.parametrize("dtype", [jnp.float16, *FLOAT8], ids=lambda dtype: dtype.__name__)
def test_stochastic_rounding_of_subnormal_numbers_is_unbiased(dtype: Any) -> None:
    smallest = float(jnp.finfo(dtype).smallest_subnormal)
    weights = jnp.asarray(np.full(4096, 3 * smallest).astype(np.dtype(dtype)))
    got = float64(without_gradients(decaying(1e-3, "stochastic_rounding"), weights, 300)[0]) / smallest
    assert set(np.unique(got)) <= set(range(10))
    assert abs(got.mean() - 3 * (1 - 1e-3) ** 300) < 5 * got.std() / 64


@pytest.mark.filterwarnings("ignore:.*the decay rounds to nothing")  # It knows nothing of the writer.
@pytest.mark.parametrize("rate", [1e-6, 1e-7, 1e-8])
def test_tiny_decays(rate: float) -> None:
    steps, weights = 20_000, normal_weights(jnp.bfloat16)
    want = float64(weights) * (1 - rate) ** steps
    got, state = float64(without_gradients(decaying(rate, "compensated"), weights, steps))
    kept = state[-1].residual
    # Each step rounds the residual by half a part of 2^-16, which of 1e-8 is all: as in float32, nothing happens.
    meant = got + kept * 2.0**-16 * spacing(got, jnp.bfloat16)
    assert np.max(np.abs(meant - want) / spacing(want, jnp.bfloat16)) < steps * 2.0**-17
    assert np.max(np.abs(got - want) / spacing(want, jnp.bfloat16)) < 0.5 + steps * 2.0**-17
    drawn = float64(without_gradients(decaying(rate, "stochastic_rounding"), weights, steps)[0])
    error = drawn / want - 1
    tolerance = 5 * error.std() / np.sqrt(error.size)
    assert abs(error.mean()) < tolerance < 0.5 * steps * rate  # So that no decay at all would be seen.


def test_float32_weights_decay_by_a_billionth_a_step() -> None:
    weights, steps, rate = normal_weights(jnp.float32), 20_000, 1e-9
    want = float64(weights) * (1 - rate) ** steps

    def ulps(optimizer: Any) -> np.ndarray:
        return np.abs(float64(without_gradients(optimizer, weights, steps)[0]) - want) / spacing(want, jnp.float32)

    decay = wdjax.independent_decay(rate)
    with pytest.warns(UserWarning, match=re.escape("less than 2.98e-08 (2**-25) of a float32 weight")):
        lost = ulps(optax.chain(optax.set_to_zero(), decay))
    assert lost.min() > 80
    with pytest.warns(UserWarning, match="compensated"):  # It knows nothing of the link behind it.
        kept = ulps(optax.chain(optax.set_to_zero(), decay, wdjax.compensated()))
    assert kept.max() < 0.7


# One step: where it lands.


def pairs(dtype: Any, count: int = 50_000) -> tuple[np.ndarray, np.ndarray]:
    """Weights of every size that float32 can compute with, and updates from far below to far above them."""
    rng = np.random.default_rng(1)
    info = jnp.finfo(dtype)
    lowest, highest = max(np.log2(float(info.smallest_subnormal)), -80), min(np.log2(float(info.max)) - 2, 80)
    weights = rng.choice([-1, 1], count) * 2 ** rng.uniform(lowest, highest, count)
    updates = (rng.choice([-1, 1], count) * np.abs(weights) * 2 ** rng.uniform(-30, 1, count)).astype(np.float32)
    weights = weights.astype(np.dtype(dtype))
    # And where everything but a little is taken away.
    nearly = slice(0, count // 10)
    updates[nearly] = (-weights[nearly].astype(np.float32)) * np.float32(1 - 1e-5)
    return weights, updates


@pytest.mark.parametrize("dtype", [*WIDE, *FLOAT8, jnp.float32], ids=lambda dtype: dtype.__name__)
def test_weight_and_residual_together_lose_nothing(dtype: Any) -> None:
    weights, updates = pairs(dtype)
    params = jnp.asarray(weights)
    writer = wdjax.compensated()
    residual = np.random.default_rng(2).integers(-30_000, 30_000, weights.shape)
    # At the lower edge of a binade the neighbour below is half as far: no more than a quarter of a spacing is missing.
    state = wdjax.low_precision.CompensatedState(
        jnp.asarray(np.where(np.frexp(float64(weights))[0] == 0.5, 0, residual), jnp.int16)
    )
    step, after = jax.jit(writer.update)(jnp.asarray(updates), state, params)
    new = wdjax.apply_updates(params, step)
    assert new.dtype == dtype

    def meant(params: Any, state: Any) -> np.ndarray:
        return float64(params) + float64(state.residual) * 2.0**-16 * spacing(float64(params), dtype)

    want = meant(params, state) + updates.astype(np.float64)
    # A part is the finest there is; float32's own rounding of what is added counts where that is coarser.
    part = 2.0**-16 * spacing(float64(new), dtype)
    arithmetic = 2.0**-24 * (np.abs(updates) + np.abs(float64(params)) + np.abs(float64(new)))
    assert np.all(np.abs(meant(new, after) - want) <= part + arithmetic)
    assert np.all(np.abs(float64(new) - want) <= 0.5001 * spacing(float64(new), dtype) + arithmetic)


def test_a_large_step_down_and_back() -> None:
    params, writer = jnp.ones(3, jnp.bfloat16), wdjax.compensated()
    state = writer.init(params)
    down = jnp.full(3, -(1 - 1e-5), jnp.float32)
    for update in (down, -down):
        step, state = writer.update(update, state, params)
        params = optax.apply_updates(params, step)
    np.testing.assert_array_equal(params, jnp.ones(3, jnp.bfloat16))
    np.testing.assert_array_equal(state.residual, 0)
    zero = jnp.zeros(3, jnp.bfloat16)
    step, _ = writer.update(jnp.full(3, 1e-5, jnp.float32), writer.init(zero), zero)
    np.testing.assert_array_equal(optax.apply_updates(zero, step), jnp.full(3, 1e-5, jnp.bfloat16))


def test_stochastic_rounding_of_the_largest_number_and_less_than_float32_can_add() -> None:
    largest = np.float32(jnp.finfo(jnp.bfloat16).max)
    params = jnp.full(2**21, largest, jnp.bfloat16)
    updates = jnp.full(2**21, 0.4 * np.spacing(largest), jnp.float32)
    writer = wdjax.stochastic_rounding(0)
    step, _ = jax.jit(writer.update)(updates, writer.init(params), params)
    assert np.all(float64(step) == 0)


def numbers(dtype: Any) -> np.ndarray:
    """Every finite number of the dtype."""
    bits = np.arange(2 ** (8 * np.dtype(dtype).itemsize))
    every = bits.astype(f"uint{8 * np.dtype(dtype).itemsize}").view(np.dtype(dtype)).astype(np.float32)
    return every[np.isfinite(every)]


def anything(dtype: Any, seed: int) -> np.ndarray:
    """Every number of the dtype, what is around the middles between them, and float32 numbers of all magnitudes."""
    every = np.unique(numbers(dtype))
    middles = ((every[1:].astype(np.float64) + every[:-1]) / 2).astype(np.float32)
    around = [np.nextafter(middles, np.float32(side)) for side in (-np.inf, np.inf)]
    rng = np.random.default_rng(seed)
    near = (rng.choice(every, 50_000) * rng.uniform(0.5, 1, 50_000)).astype(np.float32)
    bits = rng.integers(0, 2**32, 50_000, np.uint32)
    tiny = rng.integers(0, 2**27, 50_000, np.uint32) | (bits & np.uint32(2**31))  # Below 2^-111.
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan], np.float32)
    return np.concatenate([every, middles, *around, near, bits.view(np.float32), tiny.view(np.float32), special])


def flushed(x: np.ndarray) -> np.ndarray:
    """What arithmetic on CPUs takes a float32 for: subnormal numbers are zeros."""
    return np.where(np.abs(x) < 2.0**-126, np.copysign(np.float32(0), x), x)


# Arithmetic that keeps subnormal numbers, as that of most GPUs.
NAMES = ("abs", "clip", "float32", "floor", "int32", "round", "where")
NUMPY = SimpleNamespace(finfo=jnp.finfo, **{name: getattr(np, name) for name in NAMES})
BITS = SimpleNamespace(lax=SimpleNamespace(bitcast_convert_type=lambda x, dtype: x.view(dtype)))


@pytest.fixture(params=["flushing", "keeping"])
def rounded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Our rounding, and what becomes of its argument before."""
    if request.param == "flushing":
        return jax.jit(rounding.rounded, static_argnums=1), flushed
    monkeypatch.setattr(rounding, "jnp", NUMPY)
    monkeypatch.setattr(rounding, "jax", BITS)
    return rounding.rounded, lambda x: x


@every_dtype
@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")
def test_nearest_rounding_is_the_cast(dtype: Any, rounded: Any) -> None:
    function, seen = rounded
    x = anything(dtype, seed=0)
    got, x = np.asarray(function(x, dtype)), seen(x)
    want = np.where(np.abs(x) <= np.float32(jnp.finfo(dtype).max), x.astype(np.dtype(dtype)).astype(np.float32), x)
    is_nan = np.isnan(x)
    np.testing.assert_array_equal(got.view(np.uint32)[~is_nan], want.view(np.uint32)[~is_nan])
    assert np.isnan(got[is_nan]).all()


@every_dtype
@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")
def test_rounding_down_with_a_fraction_is_the_closed_form(dtype: Any, rounded: Any) -> None:
    function, seen = rounded
    x = anything(dtype, seed=1)
    x = x[np.abs(x) <= np.float32(jnp.finfo(dtype).max)]
    fraction = (np.random.default_rng(2).integers(0, 2**8, x.shape) * 2.0**-8).astype(np.float32)
    got, x = np.asarray(function(x, dtype, np.float32(0), fraction)), seen(x)
    info = jnp.finfo(dtype)
    unit = 2.0 ** (np.maximum(np.frexp(x.astype(np.float64))[1] - 1, int(info.minexp)) - int(info.nmant))
    steps = x / unit
    want = np.clip(np.floor(steps + fraction) * unit, -float(info.max), float(info.max))
    # In float32, the sum of the two fractions is rounded to 2^-24.
    is_clear = (np.abs(steps + fraction - np.round(steps + fraction)) > 2.0**-23) | (steps == np.round(steps))
    assert is_clear.mean() > 0.7
    np.testing.assert_array_equal(got[is_clear], want[is_clear])


@every_dtype
def test_stochastic_rounding_takes_one_of_the_two_neighbours_and_the_right_one_as_often_as_it_should(
    dtype: Any,
) -> None:
    every = np.unique(numbers(dtype)).astype(np.float64)
    every = every[(np.abs(every) >= 2.0**-100) & (np.abs(every) <= np.max(every) / 2)]
    at = np.random.default_rng(0).integers(0, len(every) - 1, 12)
    lower, upper = every[at], every[at + 1]
    fractions = np.array([0.5, 0.01, 0.99, 0.25, 0.123, 0.9, 0.5, 0.001, 0.999, 0.75, 0.4, 0.6])
    count = 2**14
    # From the upper neighbour down: a decay where weights are positive, and a growth where they are not.
    update = ((1 - fractions) * (lower - upper)).astype(np.float32)
    params = jnp.asarray(np.repeat(upper[:, None], count, 1).astype(np.dtype(dtype)))
    updates = jnp.asarray(np.repeat(update[:, None], count, 1))
    writer = wdjax.stochastic_rounding(seed=3)
    step, _ = jax.jit(writer.update)(updates, writer.init(params), params)
    got = float64(wdjax.apply_updates(params, step))
    assert np.all((got == lower[:, None]) | (got == upper[:, None]))
    up = (got == upper[:, None]).sum(1)
    deviation = (up - count * fractions) / np.sqrt(count * fractions * (1 - fractions))
    assert np.abs(deviation).max() < 5
    assert np.sum(deviation**2) < 40  # Chi-square with 12 degrees of freedom: 7e-5 beyond.


@every_dtype
def test_stochastic_rounding_does_not_round_what_is_exact(dtype: Any) -> None:
    every = np.unique(numbers(dtype))
    every = every[((np.abs(every) >= 2.0**-126) | (every == 0)) & (np.abs(every) <= 2.0**100)]
    params = jnp.asarray(np.random.default_rng(0).permutation(every).astype(np.dtype(dtype)))
    # From any number to any other, where their difference is a float32.
    update = every - float64(params).astype(np.float32)
    exact = (float64(update) + float64(params) == every) & (flushed(update) == update)
    assert exact.mean() > 0.1

    @jax.jit
    def written(seed: Any) -> Any:
        writer = wdjax.stochastic_rounding(seed)
        return wdjax.apply_updates(params, writer.update(jnp.asarray(update), writer.init(params), params)[0])

    for seed in range(3):
        np.testing.assert_array_equal(float64(written(seed))[exact], every[exact])


@every_writer
@every_dtype
def test_an_update_of_zero_changes_no_bit_and_what_is_not_finite_stays_so(writer: str, dtype: Any) -> None:
    every = np.arange(2 ** (8 * np.dtype(dtype).itemsize)).astype(f"uint{8 * np.dtype(dtype).itemsize}")
    params = jnp.asarray(every.view(np.dtype(dtype)))
    is_number = np.isfinite(float64(params))
    tool = WRITERS[writer]()
    for zero in (0.0, -0.0):
        updates = jnp.full(params.shape, zero, jnp.float32)
        step, _ = jax.jit(tool.update)(updates, tool.init(params), params)
        new = jax.jit(wdjax.apply_updates)(params, step)
        tiny = (np.abs(float64(params)) < 2.0**-126) & (float64(params) != 0)  # XLA flushes it in any addition.
        kept = is_number & ~tiny
        assert np.asarray(new)[kept].tobytes() == np.asarray(params)[kept].tobytes()
        np.testing.assert_array_equal(float64(new)[tiny], 0)
        np.testing.assert_array_equal(float64(new)[~is_number], float64(params)[~is_number])
    # Neither does what is not finite spoil the state of what is.
    hard = jnp.asarray(np.array([1.0, np.nan, 1.0, 1.0, 0.0, -0.0]).astype(np.dtype(dtype)))
    moves = jnp.array([1.0, 1.0, np.nan, -1.0, 0.0, 1.0], jnp.float32)
    step, state = jax.jit(tool.update)(moves, tool.init(hard), hard)
    new = wdjax.apply_updates(hard, step)
    np.testing.assert_array_equal(float64(new), [2.0, np.nan, np.nan, 0.0, 0.0, 1.0])
    if writer == "compensated":
        np.testing.assert_array_equal(state.residual, 0)


@every_writer
def test_bfloat16_weights_next_to_the_smallest_normal_number(writer: str) -> None:
    params = jnp.asarray((np.array([1.5, -1.5, 3.0, 129 / 16]) * 2.0**-126).astype(jnp.bfloat16))
    updates = jnp.asarray((np.array([0.75, -0.5, 1.5, -1.0]) * 2.0**-126).astype(np.float32))
    tool = WRITERS[writer]()
    new = wdjax.apply_updates(params, jax.jit(tool.update)(updates, tool.init(params), params)[0])
    # Updates below it count as zero. The others are exact.
    np.testing.assert_array_equal(float64(new), np.array([1.5, -1.5, 4.5, 113 / 16]) * 2.0**-126)


@every_writer
@every_dtype
def test_what_is_finite_stays_finite_near_the_largest_number(writer: str, dtype: Any) -> None:
    info = jnp.finfo(dtype)
    largest = float(info.max)
    gap = 2.0 ** (np.floor(np.log2(largest)) - info.nmant)
    params = jnp.asarray(np.array([largest, -largest, largest - gap, largest]).astype(np.dtype(dtype)))
    updates = jnp.array([0.2 * gap, -0.2 * gap, 0.9 * gap, -1e-3 * gap], jnp.float32)

    @jax.jit
    def written(seed: Any) -> Any:
        tool = WRITERS[writer](seed)
        return wdjax.apply_updates(params, tool.update(updates, tool.init(params), params)[0])

    for seed in range(5):
        new = float64(written(seed))
        assert np.all(np.isfinite(new))
        assert np.all(np.abs(new) >= largest - 2 * gap)


# Two ways to lose a decay although there is a writer.


@every_writer
def test_a_decay_behind_a_writer_is_lost(writer: str) -> None:
    weights = normal_weights(jnp.bfloat16)
    inner = wdjax.in_float32(optax.adam(LEARNING_RATE))
    for decay in (wdjax.independent_decay(RATE), optax.add_decayed_weights(-RATE)):
        behind = optax.chain(inner, WRITERS[writer](), decay)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*the decay rounds to nothing")
            new, _ = without_gradients(behind, weights, 1_000)
        assert same_bits(new, weights)
    new, _ = without_gradients(chain(writer), weights, 1_000)
    assert abs(np.abs(float64(new)).mean() / np.abs(float64(weights)).mean() - (1 - RATE) ** 1_000) < 2e-3


@every_writer
def test_a_decay_beside_a_large_direction_is_lost_without_in_float32_and_the_writer_says_so(writer: str) -> None:
    weight_decay = 1e-3  # Beside a direction of 1: less than 2^-9 of it.
    params = {"a": {"kernel": jnp.full((64, 64), 0.75, jnp.bfloat16)}, "b": jnp.full(5, 0.75, jnp.bfloat16)}
    grads = jax.tree.map(jnp.ones_like, params)

    def moved(wrap: Any, rate: float) -> Any:
        optimizer = optax.chain(wrap(wdjax.sgdw(1.0, rate)), WRITERS[writer]())
        updates, state = optimizer.update(grads, optimizer.init(params), params)
        return updates, state[-1]

    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        assert same_bits(moved(lambda optimizer: optimizer, weight_decay), moved(lambda optimizer: optimizer, 0.0))
    caught = [each for each in recorded if str(each.message).startswith(writer)]
    assert not same_bits(moved(wdjax.in_float32, weight_decay), moved(wdjax.in_float32, 0.0))
    assert str(caught[0].message) == (
        f"{writer}: the update of 'a/kernel' has dtype bfloat16 (and 1 more): a decay that is much smaller than the "
        "gradient's part is rounded away before it gets here. "
        f"Write optax.chain(in_float32(optimizer), {writer}(...))."
    )
    assert caught[0].filename == __file__


@every_writer
def test_the_warning_of_narrow_updates_comes_once_a_trace_at_the_line_of_the_call(writer: str) -> None:
    optimizer = WRITERS[writer]()
    params = jnp.ones(4, jnp.bfloat16)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        updates, state = optimizer.update(jnp.ones_like(params), state, params)  # Here.
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            params, state = step(params, state)
    assert len(caught) == 1
    assert str(caught[0].message).startswith(f"{writer}: the update of '' has dtype bfloat16")
    assert Path(caught[0].filename) == Path(__file__)
    assert "# Here." in Path(__file__).read_text().splitlines()[caught[0].lineno - 1]


# With real gradients.


SEEDS = 3


@functools.cache
def digits() -> tuple[jax.Array, jax.Array]:
    images, labels = load_digits(return_X_y=True)
    return jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels, jnp.int32)


def network(seed: Any) -> Any:
    keys = jax.random.split(jax.random.key(seed), 2)
    params = {
        "hidden": {"kernel": jax.random.normal(keys[0], (64, 24)) / 8, "bias": jnp.zeros(24)},
        "output": {"kernel": jax.random.normal(keys[1], (24, 10)) / 5, "bias": jnp.zeros(10)},
    }
    return jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)


def loss_of(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    params = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    hidden = jax.nn.relu(images @ params["hidden"]["kernel"] + params["hidden"]["bias"][None])
    logits = hidden @ params["output"]["kernel"] + params["output"]["bias"][None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def trained(build: Callable[[Any], Any], dtype: Any, order: int = 0, steps: int = 1_000) -> tuple[Any, np.ndarray]:
    """Kernels and losses of `SEEDS` networks after training; the same start and the same batches in every dtype."""
    images, labels = digits()
    batches = jnp.asarray(np.random.default_rng(order).integers(0, len(images), (steps, 32)))

    def train(seed: Any) -> Any:
        optimizer = build(seed)
        params = jax.tree.map(lambda p: p.astype(dtype), network(seed))

        def step(carry: Any, batch: Any) -> Any:
            params, state = carry
            grads = jax.grad(loss_of)(params, images[batch], labels[batch])
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), batches)
        return params, loss_of(params, images, labels)

    params, losses = jax.jit(jax.vmap(train))(jnp.arange(SEEDS))
    kernels = [float64(params[layer]["kernel"]).reshape(SEEDS, -1) for layer in ("hidden", "output")]
    return np.concatenate(kernels, 1), float64(losses)


def adamw() -> Any:
    return wdjax.adamw(LEARNING_RATE, WEIGHT_DECAY, wdjax.only("kernel"))


@functools.cache
def distances(name: str) -> dict[str, np.ndarray]:
    """How far a run is from that in float32, per seed: in weights (RMS, relative), in their norm, and in the loss."""
    runs: dict[str, Callable[[], Any]] = {
        "float32": lambda: trained(lambda seed: adamw(), jnp.float32),
        "other batches": lambda: trained(lambda seed: adamw(), jnp.float32, order=1),
        "no writer": lambda: trained(lambda seed: wdjax.in_float32(adamw()), jnp.bfloat16),
        **{
            writer: lambda writer=writer: trained(lambda seed: chain(writer, adamw(), seed), jnp.bfloat16)
            for writer in WRITERS
        },
    }
    if name == "float32":
        kernels, losses = runs[name]()
        return {"kernels": kernels, "losses": losses}
    want = distances("float32")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*the decay rounds to nothing")
        kernels, losses = runs[name]()
    size = np.linalg.norm(want["kernels"], axis=1)
    return {
        "weights": np.linalg.norm(kernels - want["kernels"], axis=1) / size,
        "norm": np.linalg.norm(kernels, axis=1) / size - 1,
        "loss": losses - want["losses"],
    }


@pytest.mark.slow
def test_compensated_training_is_as_close_to_float32_as_with_master_weights() -> None:
    master, ours = distances("master_weights"), distances("compensated")
    assert np.all(master["weights"] < 0.03)
    assert np.all(ours["weights"] < 1.5 * master["weights"] + 0.002)
    for name in ("norm", "loss"):
        assert np.all(np.abs(ours[name]) < 2e-3)
        assert np.all(np.abs(master[name]) < 2e-3)


@pytest.mark.slow
def test_stochastically_rounded_training_ends_at_the_same_loss_and_norm_but_not_at_the_same_weights() -> None:
    ours, other = distances("stochastic_rounding"), distances("other batches")
    assert np.all(np.abs(ours["loss"]) < 5e-3)
    assert np.all(np.abs(ours["norm"]) < 1e-2)
    # Its weights are no nearer than the noise in it lets them be, which is that of another order of the batches.
    assert 3 * distances("master_weights")["weights"].mean() < ours["weights"].mean() < 1.5 * other["weights"].mean()


@pytest.mark.slow
def test_training_without_a_writer_ends_elsewhere() -> None:
    lost = distances("no writer")
    assert np.all(lost["weights"] > 0.3)
    assert np.all(lost["loss"] > 0.2)
    assert np.all(lost["norm"] < -0.1)


def test_stochastically_rounded_training_is_on_average_the_float32_run() -> None:
    # Of a linear model with SGD the mean of the weights obeys the recurrence of the weights.
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(64, 16)).astype(np.float32)
    outputs = (inputs @ rng.normal(size=16) + rng.normal(size=64)).astype(np.float32)
    rate, weight_decay, steps = 0.01, 0.1, 1_000
    start = (rng.normal(size=16) * 3).astype(np.dtype(jnp.bfloat16))

    def train(seed: Any) -> Any:
        optimizer = chain("stochastic_rounding", wdjax.sgdw(rate, weight_decay), seed)
        weights = jnp.asarray(start)

        def step(carry: Any, _: Any) -> Any:
            weights, state = carry
            wide = weights.astype(jnp.float32)
            grads = jnp.asarray(inputs).T @ (jnp.asarray(inputs) @ wide - jnp.asarray(outputs)) / 64
            updates, state = optimizer.update(grads, state, weights)
            return (optax.apply_updates(weights, updates), state), None

        return jax.lax.scan(step, (weights, optimizer.init(weights)), length=steps)[0][0]

    got = float64(jax.jit(jax.vmap(train))(jnp.arange(1024)))
    want = start.astype(np.float64)
    for _ in range(steps):
        want = want - rate * (inputs.T @ (inputs @ want - outputs) / 64 + weight_decay * want)
    deviation = (got.mean(0) - want) / (got.std(0) / np.sqrt(len(got)))
    assert np.abs(deviation).max() < 5
    assert np.all(got.std(0) < 0.05)


# Reproducible, anywhere.


def tree(dtype: Any = jnp.bfloat16) -> Any:
    rng = np.random.default_rng(0)
    return {
        "kernel": jnp.asarray(rng.normal(size=(64, 32)), dtype),
        "bias": jnp.asarray(rng.normal(size=64), dtype),
    }


GRADS = jax.tree.map(lambda p: p * p, tree())


def stepped(optimizer: Any) -> Any:
    def step(params: Any, state: Any) -> Any:
        updates, state = optimizer.update(GRADS, state, params)
        return optax.apply_updates(params, updates), state

    return step


def after(optimizer: Any, params: Any, steps: int = 5) -> Any:
    step, state = jax.jit(stepped(optimizer)), optimizer.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def test_the_same_seed_gives_the_same_bits_and_another_seed_others() -> None:
    one, again, other = (after(chain("stochastic_rounding", seed=seed), tree())[0] for seed in (7, 7, 8))
    assert same_bits(one, again)
    differs = np.mean(np.asarray(one["kernel"]) != np.asarray(other["kernel"]))
    assert differs > 0.2
    assert same_bits(one, after(chain("stochastic_rounding", seed=jnp.array(7)), tree())[0])
    # Neither do steps, nor leaves of one shape, share their random numbers.
    writer = wdjax.stochastic_rounding(0)
    params = {name: jnp.ones(1000, jnp.bfloat16) for name in "ab"}
    updates = {name: jnp.full(1000, -0.002, jnp.float32) for name in "ab"}
    update = jax.jit(writer.update)
    first, state = update(updates, writer.init(params), params)
    second, _ = update(updates, state, params)
    for one, other in ((first["a"], first["b"]), (first["a"], second["a"])):
        agree = np.mean(np.asarray(one) == np.asarray(other))
        assert 0.4 < agree < 0.6  # One in two goes down.


@pytest.mark.parametrize("spec", [("d",), slow((None, "d")), slow(())], ids=["rows", "columns", "replicated"])
@every_writer
def test_eight_devices_give_the_bits_of_one_without_a_collective(writer: str, spec: tuple[Any, ...]) -> None:
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    optimizer = chain(writer)
    one = tree()["kernel"]
    grads = GRADS["kernel"]

    @jax.jit
    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    many, many_grads = jax.device_put((one, grads), sharding)
    state, many_state = optimizer.init(one), optimizer.init(many)
    for _ in range(5):
        one, state = step(one, state, grads)
        many, many_state = step(many, many_state, many_grads)
    assert same_bits((one, state), (many, many_state))
    assert many.sharding.is_equivalent_to(sharding, 2)
    for leaf in jax.tree.leaves(many_state[-1]):
        assert leaf.ndim == 0 or leaf.sharding.is_equivalent_to(sharding, 2)
    compiled = step.lower(many, many_state, many_grads).compile().as_text()
    assert not re.search(r"all-(gather|reduce|to-all)|collective-|reduce-scatter", compiled)
    # A device draws the random numbers of its shard only.
    assert spec == () or "[64,32]" not in compiled


@one_writer
def test_replicas_of_pmap_stay_bit_identical(writer: str) -> None:
    optimizer = chain(writer)
    params, state = jax.tree.map(lambda x: np.stack([np.asarray(x)] * 8), (tree(), optimizer.init(tree())))
    step = jax.pmap(stepped(optimizer))
    for _ in range(20):
        params, state = step(params, state)
    params = jax.device_get(params)
    chex.assert_trees_all_equal(*(jax.tree.map(lambda x, i=i: x[i], params) for i in range(8)))
    assert same_bits(jax.tree.map(lambda x: x[0], params), after(optimizer, tree(), 20)[0])


def test_seeds_under_vmap() -> None:
    def run(seed: Any) -> Any:
        optimizer = chain("stochastic_rounding", seed=seed)
        return stepped(optimizer)(tree(), optimizer.init(tree()))[0]

    together, alone = jax.jit(jax.vmap(run))(jnp.arange(3)), jax.jit(run)
    for seed in range(3):
        assert same_bits(jax.tree.map(lambda x, seed=seed: x[seed], together), alone(seed))


def test_parts_in_shard_map_draw_their_own_numbers_and_whole_arrays_the_same() -> None:
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    params = {"part": jnp.ones((64, 32), jnp.bfloat16), "whole": jnp.ones(256, jnp.bfloat16)}
    specs = {"part": PartitionSpec("d"), "whole": PartitionSpec()}

    def run(check_vma: bool, with_index: bool = False) -> Any:
        def step(params: Any) -> Any:
            optimizer = decaying(1e-3, "stochastic_rounding", jax.lax.axis_index("d") if with_index else 0)
            updates, _ = optimizer.update(params, optimizer.init(params), params)
            return optax.apply_updates(params, updates)

        out_specs = {"part": specs["part"], "whole": PartitionSpec(None if check_vma else "d")}
        act = jax.shard_map(step, mesh=mesh, in_specs=(specs,), out_specs=out_specs, check_vma=check_vma)
        return {name: float64(leaf).reshape(-1, 256) for name, leaf in jax.jit(act)(params).items()}

    def draws(found: Any) -> dict[str, int]:
        return {name: len(np.unique(rows, axis=0)) for name, rows in found.items()}

    assert draws(run(True)) == {"part": 8, "whole": 1}
    # Where JAX does not know which arrays are split, the seed has to say who a device is.
    assert draws(run(False)) == {"part": 1, "whole": 1}
    assert draws(run(False, with_index=True)) == {"part": 8, "whole": 8}


@every_writer
def test_one_trace_one_structure_under_scan_and_with_donated_buffers(writer: str) -> None:
    optimizer = chain(writer)
    want, want_state = after(optimizer, tree())
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(stepped(optimizer), n=1), donate_argnums=(0, 1))
    # Every array its own: a state that shares one with the parameters could not be donated beside them.
    params, state = jax.tree.map(jnp.copy, tree()), optimizer.init(tree())
    for _ in range(5):
        params, after_step = step(params, state)
        chex.assert_trees_all_equal_shapes_and_dtypes(after_step, want_state)
        state = after_step
    assert same_bits((params, state), (want, want_state))
    scanned, _ = jax.lax.scan(
        lambda carry, _: (stepped(optimizer)(*carry), None), (tree(), optimizer.init(tree())), length=5
    )
    assert same_bits(scanned, (want, want_state))
    # The state of float32 parameters beside them can be donated too.
    mixed = {**tree(), "bias": jnp.ones(64)}
    fresh = optimizer.init(mixed)
    jax.jit(stepped(optimizer), donate_argnums=(0, 1))(mixed, fresh)


@every_writer
def test_nothing_of_ours_relies_on_implicit_promotion(writer: str) -> None:
    for dtype in (jnp.bfloat16, jnp.float8_e4m3fn):
        params = tree(dtype)
        optimizer = chain(writer, wdjax.sgdw(LEARNING_RATE, WEIGHT_DECAY))
        with jax.numpy_dtype_promotion("strict"):
            updates, state = jax.jit(optimizer.update)(tree(dtype), optimizer.init(params), params)
            new = wdjax.apply_updates(params, updates)
        chex.assert_trees_all_equal_shapes_and_dtypes(new, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, optimizer.init(params))
        assert all(update.dtype == jnp.float32 for update in jax.tree.leaves(updates))


def test_the_sharding_of_explicit_meshes_is_kept() -> None:
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        for spec in (PartitionSpec("d", None), PartitionSpec(None, "d")):
            params = jax.device_put(jnp.ones((64, 32), jnp.bfloat16), NamedSharding(mesh, spec))
            for writer in WRITERS:
                optimizer = decaying(0.01, writer)
                updates, _ = jax.jit(optimizer.update)(params, optimizer.init(params), params)
                assert jax.typeof(updates).sharding.spec == spec


# Among Optax's wrappers. Writers stand last and outermost; what also works, and what does not.


MASK = {"kernel": True, "bias": False}
INSIDE: dict[str, Callable[[], Any]] = {
    "MultiSteps": lambda: optax.MultiSteps(wdjax.adamw(LEARNING_RATE, WEIGHT_DECAY), 2),
    "apply_if_finite": lambda: optax.apply_if_finite(wdjax.adamw(LEARNING_RATE, WEIGHT_DECAY), 2),
    "freeze": lambda: wdjax.freeze(wdjax.adamw(LEARNING_RATE, WEIGHT_DECAY), wdjax.only("bias")),
    "masked": lambda: optax.masked(wdjax.adamw(LEARNING_RATE, WEIGHT_DECAY), MASK),
    "partition": lambda: optax.partition(
        {True: wdjax.adamw(LEARNING_RATE, WEIGHT_DECAY), False: optax.set_to_zero()}, MASK
    ),
    "inject_hyperparams": lambda: optax.inject_hyperparams(wdjax.adamw)(LEARNING_RATE, WEIGHT_DECAY),
    "with_decoupled_decay": lambda: wdjax.with_decoupled_decay(
        optax.adam(LEARNING_RATE), WEIGHT_DECAY, learning_rate=LEARNING_RATE
    ),
    "clip": lambda: optax.chain(optax.clip_by_global_norm(1.0), wdjax.adamw(LEARNING_RATE, WEIGHT_DECAY)),
}


@pytest.mark.parametrize("wrapper", INSIDE)
def test_wrappers_inside_in_float32_with_the_writer_last(wrapper: str) -> None:
    params = tree()
    optimizer = chain("compensated", INSIDE[wrapper]())
    steps = 600
    new, state = without_gradients(optimizer, params, steps)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, optimizer.init(params))
    real = steps // 2 if wrapper == "MultiSteps" else steps
    ratio = np.abs(float64(new["kernel"])).mean() / np.abs(float64(params["kernel"])).mean()
    # A decay that was lost is 9 to 18 times as far.
    assert abs(ratio - (1 - RATE) ** real) < 1e-3
    if wrapper in ("freeze", "masked", "partition"):
        assert same_bits(new["bias"], params["bias"])


@one_writer
def test_a_gradient_that_is_not_finite_is_skipped_inside(writer: str) -> None:
    params = tree()
    optimizer = chain(writer, INSIDE["apply_if_finite"]())
    bad = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), params)
    state = optimizer.init(params)
    updates, skipped = jax.jit(optimizer.update)(bad, state, params)
    assert same_bits(optax.apply_updates(params, updates), params)
    if writer != "stochastic_rounding":  # Whose random numbers go on.
        assert same_bits(skipped[-1], state[-1])


@one_writer
def test_apply_if_finite_around_a_writer_needs_gradients_in_float32(writer: str) -> None:
    params = tree()
    optimizer = optax.apply_if_finite(chain(writer), 2)
    with pytest.raises(TypeError, match="cond branches must have equal output types"):
        optimizer.update(GRADS, optimizer.init(params), params)
    wide = jax.tree.map(lambda g: g.astype(jnp.float32), GRADS)
    updates, _ = jax.jit(optimizer.update)(wide, optimizer.init(params), params)
    plain = chain(writer)
    assert same_bits(updates, jax.jit(plain.update)(wide, plain.init(params), params)[0])


@every_writer
def test_a_frozen_negative_zero_before_a_writer(writer: str) -> None:
    params = {"kernel": jnp.full((64, 32), -0.0), "bias": jnp.full(64, -0.0, jnp.bfloat16)}
    optimizer = chain(writer, wdjax.freeze(optax.sgd(0.1), wdjax.only("kernel", "bias")))
    assert same_bits(after(optimizer, params)[0], params)


@one_writer
def test_freeze_and_partition_around_a_writer(writer: str) -> None:
    params = tree()
    frozen = wdjax.freeze(chain(writer), wdjax.only("bias"))
    new, _ = after(frozen, params)
    assert same_bits(new["bias"], params["bias"])
    assert not same_bits(new["kernel"], params["kernel"])
    by_part = optax.partition({True: chain(writer), False: optax.adam(0.0)}, MASK)
    new, _ = after(by_part, params)
    assert same_bits(new["bias"], params["bias"])
    assert not same_bits(new["kernel"], params["kernel"])


@pytest.mark.skipif("accumulator_dtype" not in inspect.signature(optax.MultiSteps).parameters, reason="Optax 0.2.7")
def test_multi_steps_around_a_writer() -> None:
    params = tree()
    new, _ = without_gradients(optax.MultiSteps(chain("compensated"), 2).gradient_transformation(), params, 600)
    ratio = np.abs(float64(new["kernel"])).mean() / np.abs(float64(params["kernel"])).mean()
    assert abs(ratio - (1 - RATE) ** 300) < 1e-3


@every_writer
def test_in_float32_around_a_writer_is_refused(writer: str) -> None:
    # The writer would be shown float32 copies, and what it writes be rounded behind it.
    around = wdjax.in_float32(optax.chain(wdjax.adamw(LEARNING_RATE, WEIGHT_DECAY), WRITERS[writer]()))
    with pytest.raises(ValueError, match=r"in_float32: the optimizer holds a writer.*in_float32\(optimizer\), comp"):
        around.init(tree())
    around.init(jax.tree.map(lambda p: p.astype(jnp.float32), tree()))


# In the training loops of libraries.


class Dense(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(4, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16)(x)


@one_writer
def test_linen_train_state(writer: str) -> None:
    params = Dense().init(jax.random.key(0), jnp.ones((1, 3), jnp.bfloat16))["params"]
    state = TrainState.create(apply_fn=Dense().apply, params=params, tx=decaying(0.01, writer))
    step = jax.jit(lambda state: state.apply_gradients(grads=jax.tree.map(jnp.ones_like, state.params)))
    for _ in range(10):
        state = step(state)
    kernel = state.params["Dense_0"]["kernel"]
    assert kernel.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.abs(float64(kernel)).sum(), np.abs(float64(params["Dense_0"]["kernel"])).sum() * 0.99**10, rtol=0.02
    )


@one_writer
def test_nnx_optimizer(writer: str) -> None:
    model = nnx.Linear(64, 64, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    before = np.abs(float64(model.kernel[...])).sum()
    optimizer = nnx.Optimizer(model, decaying(0.01, writer), wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any) -> None:
        optimizer.update(model, nnx.grad(lambda model: model(jnp.ones((2, 64), jnp.bfloat16)).sum())(model))

    for _ in range(10):
        step(model, optimizer)
    assert model.kernel[...].dtype == jnp.bfloat16
    np.testing.assert_allclose(np.abs(float64(model.kernel[...])).sum(), before * 0.99**10, rtol=0.01)


@one_writer
def test_equinox_with_the_right_apply_updates(writer: str) -> None:
    model = eqx.nn.Linear(64, 64, dtype=jnp.bfloat16, key=jax.random.key(0))
    before = np.abs(float64(model.weight)).sum()
    optimizer = decaying(0.01, writer)
    params = eqx.filter(model, eqx.is_inexact_array)
    state = optimizer.init(params)
    updates = params
    for _ in range(10):
        updates, state = optimizer.update(params, state, params)
        params = optax.apply_updates(params, updates)
    assert params.weight.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.abs(float64(params.weight)).sum(), before * 0.99**10, rtol=0.01)
    # Equinox's own adds and leaves the dtype to promotion: the weights are float32 from the first step on.
    assert eqx.apply_updates(model, updates).weight.dtype == jnp.float32


def test_float8_needs_our_apply_updates() -> None:
    params = jnp.ones(3, jnp.float8_e4m3fn)
    updates = jnp.full(3, 0.1, jnp.float32)
    with pytest.raises(ValueError, match="8-bit floats do not support implicit promotion"):
        optax.apply_updates(params, updates)
    new = wdjax.apply_updates(params, updates)
    assert new.dtype == jnp.float8_e4m3fn
    np.testing.assert_array_equal(float64(new), 1.125)


def test_our_apply_updates_is_optax_for_all_else() -> None:
    params = {
        "float32": jnp.ones(3),
        "bfloat16": jnp.ones(3, jnp.bfloat16),
        "int": jnp.arange(3),
        "complex": jnp.ones(3, jnp.complex64),
        "none": None,
        "python": 1.0,
    }
    updates = {
        "float32": jnp.full(3, 0.1),
        "bfloat16": jnp.full(3, 0.1),
        "int": jnp.ones(3, int),
        "complex": jnp.full(3, 0.1j),
        "none": None,
        "python": 0.5,
    }
    got, want = wdjax.apply_updates(params, updates), optax.apply_updates(params, updates)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
    assert same_bits(got, want)
    with pytest.raises(ValueError, match="a"):
        wdjax.apply_updates({"a": jnp.ones(2)}, {"b": jnp.ones(2)})


@pytest.mark.parametrize("by", ["flax", "orbax"])
def test_checkpoints_of_what_has_holes(by: str, tmp_path: Path) -> None:
    params = {**tree(), "float32": jnp.ones(3), "none": None}
    grads = {**GRADS, "float32": jnp.ones(3), "none": None}
    optimizer = chain("master_weights")

    update = jax.jit(optimizer.update)

    def walk(params: Any, state: Any) -> Any:
        for _ in range(3):
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    middle = walk(params, optimizer.init(params))
    like = params, optimizer.init(params)
    if by == "flax":
        restored = flax.serialization.from_bytes(like, flax.serialization.to_bytes(middle))
        restored = jax.tree.map(jnp.asarray, restored)
    else:
        with ocp.training.Checkpointer(tmp_path) as checkpointer:
            assert checkpointer.save(0, middle)
            restored = checkpointer.load(0, like)
    assert same_bits(walk(*restored), walk(*middle))


# What the pieces leave alone, and refuse.


def test_in_float32_is_the_optimizer_on_float32_copies() -> None:
    params, grads = tree(), GRADS
    wide_params, wide_grads = jax.tree.map(lambda x: x.astype(jnp.float32), (params, grads))
    inner = wdjax.adamw(LEARNING_RATE, WEIGHT_DECAY)
    outer = wdjax.in_float32(inner)
    state, inner_state = outer.init(params), inner.init(wide_params)
    assert same_bits(state, inner_state)
    for _ in range(3):
        # Not compiled, where the compiler may contract other sums in one than in the other.
        updates, state = outer.update(grads, state, params)
        want, inner_state = inner.update(wide_grads, inner_state, wide_params)
        assert same_bits((updates, state), (want, inner_state))
        chex.assert_trees_all_equal_shapes_and_dtypes(state, inner_state)


def test_in_float32_shows_the_optimizer_float32_only() -> None:
    seen = optax.stateless(lambda updates, params: jax.tree.map(lambda u, p: (u, p), updates, params))
    optimizer = wdjax.in_float32(seen)
    params = tree()
    shown, _ = optimizer.update(GRADS, optimizer.init(params), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(shown)} == {jnp.dtype(jnp.float32)}


@pytest.mark.usefixtures("x64")
def test_what_is_not_of_low_precision_passes_all_of_it() -> None:
    params = {
        "float32": jnp.ones(2, jnp.float32),
        "float64": jnp.ones(2, jnp.float64),
        "complex": jnp.ones(2, jnp.complex64),
        "int": jnp.arange(2),
        "bool": jnp.array([True]),
        "key": jax.random.key(0),
        "none": None,
        "masked": optax.MaskedNode(),
    }
    optimizer = wdjax.in_float32(optax.identity())
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    del params["masked"]
    assert all(updates[name] is params[name] for name in params)
    for writer, make in WRITERS.items():
        tool = make()
        updates, state = tool.update(params, tool.init(params), params)
        changed = {name for name in params if updates[name] is not params[name]}
        assert changed == ({"float32"} if writer == "compensated" else set())
        chex.assert_trees_all_equal_shapes_and_dtypes(state, tool.init(params))


@every_writer
def test_abstract_parameters(writer: str) -> None:
    optimizer = chain(writer)
    shapes = jax.eval_shape(lambda: tree())
    abstract = optimizer.init(shapes) if writer != "stochastic_rounding" else jax.eval_shape(optimizer.init, shapes)
    want = jax.eval_shape(optimizer.init, tree())
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(abstract)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(want)
    ]


def test_bytes_of_the_states() -> None:
    params = jnp.ones(1000, jnp.bfloat16)

    def size(writer: str) -> int:
        return sum(x.nbytes for x in jax.tree.leaves(WRITERS[writer]().init(params)))

    assert {writer: size(writer) for writer in WRITERS} == {
        "stochastic_rounding": 4,
        "compensated": 2_000,
        "master_weights": 4_000,
    }


def test_what_is_refused() -> None:
    params = jnp.ones(2, jnp.bfloat16)
    for seed in (0.5, True, "0", jnp.zeros(2, jnp.int32)):
        with pytest.raises(TypeError):
            wdjax.stochastic_rounding(seed)
    with pytest.raises(TypeError, match=r"seed must be an integer, got 0.5. Write stochastic_rounding\(seed=0\)"):
        wdjax.stochastic_rounding(0.5)
    with pytest.raises(TypeError, match=r"in_float32: optimizer must be a finished Optax optimizer, got 0\.1"):
        wdjax.in_float32(0.1)
    for writer, make in WRITERS.items():
        tool = make()
        with pytest.raises(ValueError, match=f"{writer} needs the parameters"):
            tool.update(jnp.ones(2), tool.init(params))
        with pytest.raises(ValueError, match="has shape"):
            tool.update(jnp.ones(3), tool.init(params), params)
    for writer in ("compensated", "master_weights"):
        tool = WRITERS[writer]()
        with pytest.raises(ValueError, match=f"{writer}: the state has nothing for 'a'"):
            tool.update({"a": jnp.ones(2)}, tool.init({"a": jnp.arange(2)}), {"a": params})
