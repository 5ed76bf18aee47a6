"""Rates that follow the learning rate, against float64 recurrences and the peers' own code; schedules of the rate."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from peer import peer

import wdjax
from wdjax import rates

STEPS, PEAK, RATE = 60, 0.02, 0.1
ETAS = PEAK * np.where(np.arange(STEPS) < 10, (np.arange(STEPS) + 1) / 10, np.cos(np.arange(STEPS) / STEPS * 1.5) ** 2)


def learning_rate(step: Any) -> jax.Array:
    """A warmup to the peak, then a decay."""
    return jnp.asarray(ETAS)[step]


def gradients(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(2).normal(size=(STEPS, *shape))


def adam_with_decay(start: np.ndarray, grads: np.ndarray, decays: np.ndarray) -> np.ndarray:
    """Adam in NumPy; step t also removes the share `decays[t]` of the weights."""
    w, m, v, path = start, np.zeros_like(start), np.zeros_like(start), []
    for t, (g, eta, decay) in enumerate(zip(grads, ETAS, decays, strict=True), 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        w = w - eta * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8) - decay * w
        path.append(w)
    return np.array(path)


def trajectory(optimizer: Any, start: np.ndarray, grads: np.ndarray) -> np.ndarray:
    def step(carry: Any, g: jax.Array) -> Any:
        w, state = carry
        update, state = optimizer.update(g, state, w)
        w = optax.apply_updates(w, update)
        return (w, state), w

    w = jnp.asarray(start)
    return np.asarray(jax.jit(lambda w, g: jax.lax.scan(step, (w, optimizer.init(w)), g))(w, jnp.asarray(grads))[1])


DECAYS = {
    "relative": (rates.relative, RATE * ETAS / PEAK),
    "corrected": (rates.corrected, RATE * ETAS**2 / PEAK),
}


@pytest.mark.peers
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", DECAYS)
def test_adam_with_a_decay_that_follows_the_learning_rate(name: str) -> None:
    rate, decays = DECAYS[name]
    start, grads = np.random.default_rng(1).normal(size=(5, 3)), gradients((5, 3))
    decay = wdjax.independent_decay(rate(RATE, learning_rate, peak=PEAK))
    chain = optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(learning_rate), decay)
    np.testing.assert_allclose(trajectory(chain, start, grads), adam_with_decay(start, grads, decays), atol=1e-13)


@pytest.mark.peers
@pytest.mark.usefixtures("x64")
def test_the_corrected_decay_is_the_relative_one_before_the_learning_rate() -> None:
    start, grads = np.random.default_rng(1).normal(size=(5, 3)), gradients((5, 3))
    after = wdjax.independent_decay(rates.corrected(RATE, learning_rate, peak=PEAK))
    before = wdjax.decoupled_decay(rates.relative(RATE, learning_rate, peak=PEAK))
    eta = optax.scale_by_learning_rate(learning_rate)
    paths = [
        trajectory(optax.chain(optax.scale_by_adam(), *rest), start, grads) for rest in ((eta, after), (before, eta))
    ]
    np.testing.assert_allclose(*paths, atol=1e-14)


@pytest.mark.peers
@pytest.mark.usefixtures("x64")
def test_the_corrected_decay_is_pytorch_optimizers_own() -> None:
    """timm's own is in tests/test_trajectories.py, recorded."""
    torch, pytorch_optimizer = peer("torch"), peer("pytorch_optimizer")
    start, grads = np.random.default_rng(1).normal(size=(5, 3)), gradients((5, 3))
    weight = torch.nn.Parameter(torch.tensor(start))
    # It corrects only groups of normalized layers.
    optimizer = pytorch_optimizer.AdamC(
        [{"params": [weight], "normalized": True}], lr=PEAK, weight_decay=RATE, eps=1e-30
    )
    path = []
    for g, eta in zip(grads, ETAS, strict=True):
        optimizer.param_groups[0]["lr"] = float(eta)
        weight.grad = torch.tensor(g)
        optimizer.step()
        path.append(weight.detach().numpy().copy())
    decay = wdjax.independent_decay(rates.corrected(RATE, learning_rate, peak=PEAK))
    # It adds 1e-15 to the second moment before the bias correction.
    adam = optax.scale_by_adam(eps=0.0)
    chain = optax.chain(adam, optax.scale_by_learning_rate(learning_rate), decay)
    np.testing.assert_allclose(trajectory(chain, start, grads), np.array(path), atol=1e-12)


def gradient_over_weight(decay: Any, schedule: Any, steps: int, size: int = 1024) -> np.ndarray:
    """|g| / |w| at each step of SGD on z . w / |w|, which does not depend on the size of w, with random z."""
    optimizer = optax.chain(optax.scale_by_learning_rate(schedule), decay)

    def step(carry: Any, key: jax.Array) -> Any:
        w, state = carry
        z = jax.random.normal(key, (size,)) / size**0.5
        g = jax.grad(lambda w: z @ w / jnp.linalg.norm(w))(w)
        update, state = optimizer.update(g, state, w)
        return (w + update, state), jnp.linalg.norm(g) / jnp.linalg.norm(w)

    def run(keys: jax.Array) -> jax.Array:
        w = jnp.ones(size) * (0.1 / (2 * 0.5)) ** 0.25 / size**0.5  # The equilibrium of the first steps.
        return jax.lax.scan(step, (w, optimizer.init(w)), keys)[1]

    return np.asarray(jax.jit(run)(jax.random.split(jax.random.key(0), steps)))


@pytest.mark.peers
def test_normalized_weights_keep_their_relative_gradient_under_the_corrected_decay() -> None:
    steps, peak = 2000, 0.1
    schedule = optax.cosine_decay_schedule(peak, steps)
    ratio = {
        name: gradient_over_weight(wdjax.independent_decay(rate), schedule, steps)
        for name, rate in {
            "proportional": rates.relative(0.5 * peak, schedule, peak=peak),  # What AdamW and SGDW do.
            "corrected": rates.corrected(0.5, schedule, peak=peak),
        }.items()
    }
    rise = {name: values[-50:].mean() / values[:200].mean() for name, values in ratio.items()}
    # The recurrence of the squared norm, |w|^2 <- (1 - decay)^2 |w|^2 + eta^2 / |w|^2, gives 4.69 for these windows.
    etas = peak * (1 + np.cos(np.pi * np.arange(steps) / steps)) / 2
    square, expected = (peak / (2 * 0.5)) ** 0.5, []
    for eta in etas:
        expected.append(1 / square)
        square = (1 - 0.5 * eta) ** 2 * square + eta**2 / square
    np.testing.assert_allclose(rise["proportional"], np.mean(expected[-50:]) / np.mean(expected[:200]), rtol=0.02)
    assert rise["proportional"] > 4.3
    np.testing.assert_allclose(rise["corrected"], 1, rtol=0.02)


# What a rate may be, and what comes of it.


def test_for_a_number_the_relative_rate_is_the_weight_decay_itself() -> None:
    table = wdjax.by_path({"kernel": 0.1}, default=0.0)
    schedule = optax.linear_schedule(0.1, 0.0, 10)
    for rate in (0.1, table, schedule):
        assert rates.relative(rate, 1e-3) == rate
    assert rates.relative(0.1, 1e-3, peak=2e-3) == 0.05
    assert rates.corrected(0.1, 1e-3) == 0.1 * 1e-3
    assert rates.corrected(0.1, 1e-3, peak=2e-3) == pytest.approx(0.1 * 1e-3**2 / 2e-3, rel=1e-15)


def test_a_table_times_a_schedule_is_a_table() -> None:
    schedule = optax.linear_schedule(0.5, 0.0, 10)
    rate: Any = rates.corrected(wdjax.by_path({"kernel": 0.2, "bias": 0.0}), schedule, peak=0.5)
    values = rate.values({"kernel": jnp.ones(2), "bias": jnp.ones(2)})
    np.testing.assert_allclose(values["kernel"](5), 0.2 * 0.25**2 / 0.5, rtol=1e-6)
    params = {"kernel": jnp.ones(2), "bias": jnp.ones(2)}
    decay = wdjax.independent_decay(rate)
    updates, _ = decay.update(jax.tree.map(jnp.zeros_like, params), decay.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.2 * 0.5, rtol=1e-6)
    assert np.array_equal(updates["bias"], np.zeros(2))


RATES = {
    "number": RATE,
    "NumPy scalar": np.float64(RATE),
    "int32 array": jnp.asarray(1, jnp.int32),
    "float32 array": jnp.asarray(RATE, jnp.float32),
    "bfloat16 array": jnp.asarray(RATE, jnp.bfloat16),
    "schedule": lambda step: 0.1 * (1 + jnp.asarray(step, jnp.float32)),
    "Python schedule": lambda step: RATE,
    "cosine": rates.cosine(0.0, 0.4, 20),
}


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("rate", RATES.values(), ids=RATES)
@pytest.mark.parametrize("follow", [rates.relative, rates.corrected])
def test_the_product_has_the_dtype_of_the_learning_rate(follow: Any, rate: Any, bits: int) -> None:
    with jax.enable_x64(bits == 64):
        eta = lambda step: jnp.asarray([0.1, 0.3, 0.2], f"float{bits}")[step]  # noqa: E731
        value = jax.jit(follow(rate, eta, peak=np.float64(0.3)))(jnp.asarray(2, jnp.int32))
        assert value.dtype == f"float{bits}"
        wd = float(rate(2) if callable(rate) else rate)
        expected = wd * 0.2 / 0.3 * (0.2 if follow is rates.corrected else 1)
        np.testing.assert_allclose(float(value), expected, rtol=1e-6 if bits == 32 else 1e-7)


def test_a_sweep_may_trace_the_weight_decay_and_the_peak() -> None:
    def rate(weight_decay: jax.Array, peak: jax.Array) -> Any:
        corrected: Any = rates.corrected(weight_decay, optax.linear_schedule(1.0, 0.0, 10), peak=peak)
        return corrected(jnp.asarray(5))

    found = jax.vmap(rate)(jnp.array([0.1, 0.2]), jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(found, [0.1 * 0.25, 0.2 * 0.125], rtol=1e-6)
    np.testing.assert_allclose(jax.jit(rates.corrected)(jnp.asarray(0.1), jnp.asarray(0.5)), 0.05, rtol=1e-6)


# Schedules of the weight decay.

SCHEDULES = {
    "cosine": rates.cosine(0.04, 0.4, 50),
    "cosine from zero": rates.cosine(0.0, 0.4, 50),
    "log_time": rates.log_time(0.1, 20),
}


@pytest.mark.peers
@pytest.mark.parametrize(("start", "end"), [(0.04, 0.4), (0.28, 0.0), (0.1, 0.1)])
def test_cosine_is_optaxs_and_dinov2s(start: float, end: float) -> None:
    steps = np.arange(80)
    found = np.array([rates.cosine(start, end, 50)(step) for step in steps])
    optaxs = optax.cosine_decay_schedule(start, 50, alpha=end / start)
    np.testing.assert_allclose(found, [optaxs(step) for step in steps], atol=1e-7)
    # DINOv2's list for each step, in float64.
    listed = end + 0.5 * (start - end) * (1 + np.cos(np.pi * np.minimum(steps, 50) / 50))
    np.testing.assert_allclose(found, listed, atol=1e-7)


def test_cosine_is_exact_at_both_ends() -> None:
    schedule = SCHEDULES["cosine from zero"]
    assert float(schedule(0)) == 0.0
    assert all(schedule(step) == jnp.float32(0.4) for step in (50, 51, 10**9))
    assert float(rates.cosine(0.4, 0.0, 50)(50)) == 0.0


def test_log_time_halves_after_the_timescale_and_is_the_papers_for_a_tenth_of_the_run() -> None:
    total, omega = 1000, 4.0
    schedule = rates.log_time(10 * omega / total, total / 10)
    steps = np.arange(total)
    np.testing.assert_allclose(schedule(steps), omega / (total / 10 + steps), rtol=1e-6)
    np.testing.assert_allclose(rates.log_time(0.1, 20)(20), 0.05, rtol=1e-6)


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_schedule_gives_strong_float32_for_every_kind_of_step(schedule: Any, x64: bool) -> None:
    with jax.enable_x64(x64):
        counts = [3, np.int32(3), np.int64(3), 3.0, jnp.asarray(3, jnp.int32), jnp.asarray(3, jnp.uint32)]
        for count in counts:
            value = schedule(count)
            assert (value.dtype, value.weak_type) == (jnp.float32, False)
            assert value == schedule(3)
        many = jax.jit(schedule)(jnp.arange(5, dtype=jnp.int32))
        assert many.dtype == jnp.float32
        np.testing.assert_allclose(many[3], schedule(3), rtol=1e-6)


def test_a_schedule_may_have_traced_arguments() -> None:
    ends = jax.vmap(lambda end: rates.cosine(0.0, end, 10)(jnp.asarray(5)))(jnp.array([0.2, 0.4]))
    np.testing.assert_allclose(ends, [0.1, 0.2], rtol=1e-6)
    halves = jax.vmap(lambda steps: rates.log_time(0.1, steps)(jnp.asarray(8)))(jnp.array([8, 4]))
    np.testing.assert_allclose(halves, [0.05, 0.1 / 3], rtol=1e-6)


def test_the_plan_names_a_rate_after_its_function() -> None:
    params, eta = {"kernel": jnp.ones((2, 3))}, optax.linear_schedule(0.5, 0.0, 10)
    for rate, shown in (
        (rates.relative(0.1, eta, peak=0.5), "relative"),
        (rates.corrected(wdjax.by_path({"kernel": 0.02}), eta, peak=0.5), "0.02 × corrected"),
        (rates.cosine(0.0, 0.4, 10), "cosine"),
        (rates.log_time(0.1, 10), "log_time"),
    ):
        assert shown in str(wdjax.plan(params, rate))


# Mistakes.

SCHEDULE = optax.linear_schedule(0.5, 0.0, 10)
WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "no peak": (
        lambda: rates.corrected(0.1, SCHEDULE),
        r"corrected: a learning-rate schedule needs its peak.*peak=None.*corrected\(0.1, learning_rate, peak=1e-3\)",
    ),
    "no peak, relative": (lambda: rates.relative(0.1, SCHEDULE), r"Write relative\(0.1, learning_rate, peak=1e-3\)"),
    "peak 0": (lambda: rates.relative(0.1, SCHEDULE, peak=0.0), r"relative: peak must be a number > 0.*got 0.0"),
    "peak 0 as an array": (lambda: rates.relative(0.1, SCHEDULE, peak=jnp.zeros(())), "peak must be a number > 0"),
    "peak a schedule": (
        lambda: rates.relative(0.1, SCHEDULE, peak=SCHEDULE),
        "peak must be a number > 0.*Of a learning-rate schedule, give the peak",
    ),
    "negative": (lambda: rates.relative(-0.1, SCHEDULE, peak=0.5), "relative: weight_decay must be finite and not"),
    "learning rates by path": (
        lambda: rates.relative(0.1, wdjax.by_path({"kernel": 0.1}, default=0.2), peak=0.2),
        "learning_rate must be a number or a schedule.*multiply the result by the table",
    ),
    "a mask as the rate": (lambda: rates.corrected(wdjax.only("kernel"), 0.1), "corrected: a table of rates holds"),
    "negative start": (lambda: rates.cosine(-0.1, 0.4, 10), r"cosine: start must be a number >= 0.*got -0.1.*Write"),
    "NaN end": (lambda: rates.cosine(0.1, np.nan, 10), "cosine: end must be a number >= 0.*got nan"),
    "no steps": (lambda: rates.cosine(0.1, 0.4, 0), "cosine: steps must be a number > 0.*got 0"),
    "many starts": (lambda: rates.cosine(np.ones(2), 0.4, 10), r"cosine: start must be a scalar.*\(2,\)"),
    "a word": (lambda: rates.log_time("0.1", 10), "log_time: weight_decay must be a number >= 0, got '0.1'"),
    "a flag": (lambda: rates.log_time(True, 10), "log_time: weight_decay must be a number >= 0, got True"),
    "timescale 0": (lambda: rates.log_time(0.1, 0), "log_time: timescale must be a number > 0"),
    "another name": (lambda: rates.relative(0.1, lr=SCHEDULE), "relative.*'lr'.*Did you mean learning_rate"),
}


@pytest.mark.parametrize(("call", "words"), WRONG.values(), ids=WRONG)
def test_the_error_names_the_mistake_and_the_remedy(call: Callable[[], Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        call()
