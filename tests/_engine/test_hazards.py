"""Rates that do nothing or too much: what `init` warns of, in which words; and the decay that never overshoots."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wdjax
from wdjax._engine.hazards import share_kept

LOW = {jnp.bfloat16: 2.0**-9, jnp.float16: 2.0**-12, jnp.float32: 2.0**-25, jnp.float8_e4m3fn: 2.0**-5}
every_dtype = pytest.mark.parametrize("dtype", LOW, ids=lambda dtype: dtype.__name__)

# Each from a learning rate and a weight decay, of which the product is what a step takes.
DECAYS: dict[str, Callable[[Any, Any], Any]] = {
    "independent_decay": lambda lr, wd: wdjax.independent_decay(lr * wd),
    "with_decoupled_decay": lambda lr, wd: wdjax.with_decoupled_decay(optax.sgd(lr), wd, learning_rate=lr),
    "adamw": lambda lr, wd: wdjax.adamw(lr, wd),
    "sgdw": lambda lr, wd: wdjax.sgdw(lr, wd),
}
every_decay = pytest.mark.parametrize("name", DECAYS)


def said(optimizer: Any, params: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.init(params)
    assert all(each.category is UserWarning and each.filename == __file__ for each in caught)
    return [str(each.message) for each in caught]


def params(dtype: Any = jnp.bfloat16) -> Any:
    return {"Dense_0": {"kernel": jnp.ones((2, 2), dtype), "bias": jnp.ones(2, dtype)}}


@every_decay
@every_dtype
def test_a_decay_that_rounds_to_nothing_is_warned_of_and_one_that_does_not_is_not(name: str, dtype: Any) -> None:
    least = LOW[dtype]
    build = DECAYS[name]
    (message,) = said(build(0.5, 2 * least * 0.99), params(dtype))
    assert "rounds to nothing" in message
    (message,) = said(build(0.5, 2 * least), params(dtype))
    assert "rounding changes the decay" in message
    assert not said(build(0.5, 0.0), params(dtype))


# The rate in units of the smallest that moves all weights, and whether rounding changes it by more than a fifth.
CHANGES = {0.51: True, 0.8: True, 1.01: True, 1.1: True, 1.25: False, 1.5: False, 2.0: False, 10.0: False}


@every_decay
@pytest.mark.parametrize("units", CHANGES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32], ids=lambda dtype: dtype.__name__)
def test_a_decay_that_rounding_changes_by_a_fifth_is_warned_of(name: str, units: float, dtype: Any) -> None:
    rate = units * 2 * LOW[dtype]
    assert (
        any("rounding changes the decay" in each for each in said(DECAYS[name](0.5, 2 * rate), params(dtype)))
        == (CHANGES[units])
    )


@pytest.mark.parametrize("rate", [2e-3, 3e-3, 3.9e-3, 4e-3, 5e-3, 6e-3, 8e-3, 1e-2, 2e-2, 0.1])
def test_the_rate_that_is_said_to_act_is_the_one_that_acts(rate: float) -> None:
    weights = jnp.exp(jnp.linspace(0.0, 4.0, 4096)).astype(jnp.bfloat16)
    optimizer = wdjax.independent_decay(rate)

    @jax.jit
    def after(weights: Any) -> Any:
        def step(_: Any, weights: Any) -> Any:
            updates, _ = optimizer.update(jnp.zeros_like(weights), state, weights)
            return optax.apply_updates(weights, updates)

        return jax.lax.fori_loop(0, 400, step, weights)

    state = wdjax.in_update.DecayState(jnp.zeros([], jnp.int32))
    start, end = (np.asarray(x, np.float64) for x in (after(weights), after(after(weights))))
    acts = 1 - np.exp(np.mean(np.log(end / start)) / 400)
    np.testing.assert_allclose(acts, share_kept(rate, jnp.bfloat16) * rate, rtol=0.02, atol=0)
    assert bool(said(optimizer, weights)) == (abs(acts / rate - 1) > 0.2)


def test_the_warning_of_a_changed_rate_in_full() -> None:
    (message,) = said(wdjax.adamw(1e-2, 0.4), params())
    assert message == (
        "adamw: rounding changes the decay: learning_rate * weight_decay is 0.004 a step, and rounding to bfloat16 "
        "makes it 0.0054 a step: 'Dense_0/bias', 'Dense_0/kernel'. "
        "Keep the parameters in float32 and compute in a narrower dtype, or write "
        "optax.chain(in_float32(optimizer), compensated()) with the decay inside."
    )
    (message,) = said(wdjax.adamw(1e-2, 0.2), params())
    assert "is 0.002 a step, and rounding to bfloat16 makes it 0 a step wherever half the spacing" in message
    assert not said(optax.chain(wdjax.in_float32(wdjax.adamw(1e-2, 0.4)), wdjax.compensated()), params())


def test_what_rounding_changes_is_said_only_of_a_constant_rate_toward_zero() -> None:
    assert not said(wdjax.decoupled_decay(4e-3), params())
    assert not said(wdjax.independent_decay(lambda count: 4e-3 + 0.0 * count), params())
    assert not said(wdjax.adamw(1e-2, 0.4, toward="init"), params())
    assert not said(wdjax.in_update.weight_norm_control(4e-3, 1.0), params())


def test_the_warning_in_full() -> None:
    (message,) = said(wdjax.adamw(3e-4, 0.1), params())
    assert message == (
        "adamw: the decay rounds to nothing: learning_rate * weight_decay is 3e-05 a step, and optax.apply_updates "
        "keeps no change of less than 0.00195 (2**-9) of a bfloat16 weight: 'Dense_0/bias', 'Dense_0/kernel'. "
        "Keep the parameters in float32 and compute in a narrower dtype, or write "
        "optax.chain(in_float32(optimizer), compensated()) with the decay inside."
    )
    (message,) = said(wdjax.independent_decay(1e-8), params(jnp.float32))
    assert message == (
        "independent_decay: the decay rounds to nothing: weight_decay is 1e-08 a step, and optax.apply_updates "
        "keeps no change of less than 2.98e-08 (2**-25) of a float32 weight: 'Dense_0/bias', 'Dense_0/kernel'. "
        "Use a larger rate, or write optax.chain(optimizer, compensated()) and ignore this warning."
    )
    (message,) = said(wdjax.adamw(3e-4, 0.1), {f"layer_{i}": jnp.ones(1, jnp.float16) for i in range(9)})
    assert "(2**-12) of a float16 weight: 'layer_{0..8}'. Keep" in message
    table = wdjax.by_path({"layer_[0-2]": 1e-6, "layer_3": 2e-6, "*": 1e-5})
    (message,) = said(wdjax.independent_decay(table), {f"layer_{i}": jnp.ones(1, jnp.float16) for i in range(9)})
    assert "weight_decay is 1e-06 a step, and" in message
    assert "weight: 'layer_{0..2}' and 6 at other rates. Keep" in message
    (message,) = said(wdjax.with_decoupled_decay(optax.sgd(1e-3), 0.1, learning_rate=1e-3), params())
    assert message.startswith("with_decoupled_decay: the decay rounds to nothing: weight_decay * learning_rate is")


def test_the_remedy_silences_it_and_works() -> None:
    remedy = optax.chain(wdjax.in_float32(wdjax.sgdw(3e-4, 0.1)), wdjax.compensated())
    assert not said(remedy, params())
    assert not said(wdjax.adamw(3e-4, 0.1), params(jnp.float32))


@pytest.mark.peers
def test_it_is_said_once_at_the_line_of_init() -> None:
    optimizer = wdjax.adamw(3e-4, 0.1)
    weights = params()
    with pytest.warns(UserWarning, match="rounds to nothing") as caught:
        state = optimizer.init(weights)  # Here.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            _, state = optimizer.update(weights, state, weights)
    (each,) = caught
    assert each.filename == __file__
    assert "# Here." in Path(__file__).read_text().splitlines()[each.lineno - 1]
    # From within chains and wrappers as well.
    deep = optax.chain(optax.clip(1.0), optax.MultiSteps(optimizer, 2).gradient_transformation())
    with pytest.warns(UserWarning, match="rounds to nothing") as caught:
        optax.apply_if_finite(deep, 3).init(weights)
    (each,) = caught
    assert each.filename == __file__


@every_decay
def test_what_has_no_value_yet_is_not_guessed(name: str) -> None:
    build = DECAYS[name]

    def traced(rate: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            wdjax.independent_decay(lambda count: rate * 0.5).init(params())
            return build(rate, 0.1).init(params())

    jax.jit(traced)(jnp.array(1e-5, jnp.float32))
    jax.vmap(traced)(jnp.array([1e-5, 5.0], jnp.float32))
    # An array that is no tracer has a value.
    assert said(build(jnp.array(1e-5), 0.1), params())


# Schedules: what each multiplies, from the schedule. In all of them the rest of the rate is 0.1.
SCHEDULED: dict[str, Callable[[Any], Any]] = {
    "independent_decay": lambda lr: wdjax.independent_decay(lambda count: 0.1 * lr(count)),
    "independent_decay of a tree": lambda lr: wdjax.independent_decay({"Dense_0": {"kernel": lr, "bias": 0.0}}),
    "independent_decay of a table": lambda lr: wdjax.independent_decay(wdjax.by_path({"kernel": lr}, default=0.0)),
    "independent_decay of a product": lambda lr: wdjax.independent_decay(lr * wdjax.by_path({"*": 0.1})),
    "continuous_decay": lambda lr: wdjax.continuous_decay(0.1, learning_rate=lr),
    "with_decoupled_decay": lambda lr: wdjax.with_decoupled_decay(optax.sgd(lr), 0.1, learning_rate=lr),
    "adamw": lambda lr: wdjax.adamw(lr, 0.1),
    "adamw within others": lambda lr: optax.chain(optax.clip(1.0), wdjax.monitor(wdjax.adamw(lr, 0.1))),
    "sgdw with a scheduled decay": lambda lr: wdjax.sgdw(0.1, lr),
    "adam_l2": lambda lr: wdjax.adam_l2(lr, 0.1),
}


@pytest.mark.peers  # A schedule's own arithmetic.
@pytest.mark.parametrize("name", SCHEDULED)
def test_a_schedule_is_warned_of_once_with_its_largest_rate(name: str) -> None:
    build = SCHEDULED[name]
    quiet = name == "adam_l2"  # Its rate is not the fraction of a step.
    factor = 1.0 if name.endswith((" tree", " table")) else 0.1
    cosine = optax.cosine_decay_schedule(3e-4, 1000)
    found = said(build(cosine), params())
    assert len(found) == (0 if quiet else 1)
    assert quiet or f" is at most {factor * 3e-4:g} a step (at count 0, of " in found[0]
    # Where only some steps are lost, and where none is, nothing is said.
    assert not said(build(optax.warmup_cosine_decay_schedule(0.0, 0.5, 1500, 10_000)), params())
    assert not said(build(optax.constant_schedule(0.0)), params())
    loud = said(build(optax.linear_schedule(30.0, 0.0, 100)), params())
    assert len(loud) == (0 if quiet or name == "continuous_decay" else 1)
    assert not loud or f" is at most {factor * 30:g} a step (at count 0, of " in loud[0]


@pytest.mark.peers
def test_the_peak_of_a_schedule_is_met_wherever_it_is() -> None:
    for warmup in (3, 100, 1500, 23_456, 700_000):
        schedule = optax.warmup_cosine_decay_schedule(0.0, 2.2e-2, warmup, 10 * warmup)  # 2**-9 is 1.95e-2 * 0.1.
        assert not said(wdjax.adamw(schedule, 0.1), params())


@pytest.mark.peers
@pytest.mark.parametrize(
    "schedule",
    [
        lambda count: jnp.where(count % 1000 == 999, 0.05, 1e-6),
        optax.piecewise_constant_schedule(1e-5, {10_250: 1e3, 10_700: 1e-3}),
        optax.join_schedules([optax.constant_schedule(1e-4), optax.constant_schedule(0.01)], [2_000_000]),
    ],
    ids=["one step in 1000", "450 steps", "late"],
)
def test_a_decay_that_acts_in_a_few_steps_is_not_said_to_round_away(schedule: Any) -> None:
    assert not said(wdjax.independent_decay(schedule), params())


def test_schedules_are_multiplied_at_the_same_count() -> None:
    def early(count: Any) -> Any:
        return jnp.where(count < 100, 1.0, 1e-3)

    def late(count: Any) -> Any:
        return jnp.where(count < 100, 1e-3, 1.0)

    (message,) = said(wdjax.adamw(early, late), params())
    assert "learning_rate * weight_decay is at most 0.001 a step (at count 0, of " in message
    (message,) = said(wdjax.adamw(early, early), params(jnp.float32))
    assert "is at most 1 a step (at count 0, of " in message


def test_one_schedule_is_called_for_once_however_many_parameters_and_inits_there_are() -> None:
    traces = []

    def schedule(count: Any) -> Any:
        traces.append(count)
        return 1e-4 * 0.9 ** count.astype(jnp.float32)

    table = wdjax.by_path({"layer_1": schedule}, default=schedule)
    tree = {f"layer_{i}": jnp.ones(1, jnp.bfloat16) for i in range(9)}
    optimizer = wdjax.independent_decay(table)
    (message,) = said(optimizer, tree)
    assert "'layer_{0..8}'. Keep" in message
    said(optimizer, tree)
    assert len(traces) == 1
    # Nothing decays here, so there is nothing to say.
    said(wdjax.independent_decay(schedule), {"int": jnp.arange(3)})
    said(wdjax.independent_decay(schedule, wdjax.only("int", "none")), {"int": jnp.arange(3), "none": None})
    assert len(traces) == 1


@pytest.mark.parametrize(
    "init",
    [jax.jit, lambda init: lambda tree: jax.eval_shape(init, tree), jax.vmap],
    ids=["jit", "eval_shape", "vmap"],
)
def test_a_schedule_is_known_while_init_is_traced(init: Any) -> None:
    optimizer = wdjax.adamw(optax.constant_schedule(3e-4), 0.1)
    (message,) = said(optimizer._replace(init=init(optimizer.init)), params())
    assert "is at most 3e-05 a step (at count 0, of " in message


def raising(count: Any) -> Any:
    raise KeyError(count)


@pytest.mark.peers
@pytest.mark.parametrize(
    ("schedule", "number"),
    [
        (lambda count: 3e-4 if count < 10 else 1e-5, 1),  # Python's `if` can't be traced.
        (lambda count: jnp.array(3e-4, jnp.bfloat16), 1),
        (lambda count: np.float64(3e-4), 1),
        (lambda count: "fast", 0),
        (lambda count: None, 0),
        (lambda count: jnp.full(2, 3e-4), 0),
        (lambda count: jnp.array(3e-4 + 0j), 0),
        (lambda count: jnp.nan, 0),
        (lambda count: 0.1 * jnp.asarray(count + 1, jnp.float32), 0),  # Its largest rate depends on where a run ends.
        (raising, 0),
    ],
    ids=["if", "bfloat16", "NumPy", "text", "None", "vector", "complex", "NaN", "rises", "raises"],
)
def test_a_schedule_that_gives_no_rate_is_left_to_the_step(schedule: Any, number: int) -> None:
    assert len(said(wdjax.independent_decay(schedule), params())) == number


@every_decay
def test_overshoot_and_divergence(name: str) -> None:
    build = DECAYS[name]
    for dtype in (jnp.float32, jnp.bfloat16):
        assert not said(build(0.5, 1.99), params(dtype))
        (message,) = said(build(0.5, 2.0), params(dtype))
        assert "is 1 a step, which moves weights to zero (or their anchor) at once: " in message
        assert message.endswith(
            "'Dense_0/bias', 'Dense_0/kernel'. Is a factor missing? If the rate is intended, "
            "use continuous_decay(...) or proximal_step(L2(), ...), which never overshoot."
        )
        (message,) = said(build(0.5, 4.0), params(dtype))
        assert "is 2 a step, which moves weights past zero, as far again or farther, so they never settle: " in message
        (message,) = said(build(0.5, 3.0), params(dtype))
        assert "is 1.5 a step, which moves weights past zero: " in message


@pytest.mark.filterwarnings("ignore:independent_decay")
def test_what_is_said_of_overshoot_is_so() -> None:
    def walk(rate: float, steps: int = 20) -> list[float]:
        optimizer = wdjax.independent_decay(rate)
        weights = [jnp.array(1.0)]
        state = optimizer.init(weights[0])
        for _ in range(steps):
            update, state = optimizer.update(jnp.zeros([]), state, weights[-1])
            weights.append(weights[-1] + update)
        return [float(w) for w in weights]

    assert min(walk(0.9)) > 0
    assert walk(1.5)[1] == -0.5
    assert abs(walk(1.5)[-1]) < 1e-5
    assert abs(walk(2.5)[-1]) > 1e3


def test_rates_by_path_by_depth_and_masks() -> None:
    tree = {"slow": jnp.ones(2, jnp.bfloat16), "fast": jnp.ones(2, jnp.bfloat16), "wide": jnp.ones(2, jnp.float32)}
    table = wdjax.by_path({"slow": 1e-4, "fast": 0.01, "wide": 1e-4})
    (message,) = said(wdjax.independent_decay(table), tree)
    assert "weight_decay is 0.0001 a step" in message
    assert "weight: 'slow'. Keep" in message
    assert not said(wdjax.independent_decay(table, wdjax.all_but("slow")), tree)
    assert not said(wdjax.independent_decay(wdjax.by_path({"slow": 0.0}, default=0.01)), tree)
    # Both kinds at once are two warnings.
    both = said(wdjax.independent_decay(wdjax.by_path({"slow": 1e-4, "fast": 1.5, "wide": 0.1})), tree)
    assert ["rounds to nothing" in both[0], "'fast'" in both[1]] == [True, True]
    # A schedule without a value leaves that parameter out, and no other.
    table = wdjax.by_path({"slow": 1e-4, "fast": lambda count: None, "wide": 0.1})
    (message,) = said(wdjax.independent_decay(table), tree)
    assert "weight: 'slow'. Keep" in message


def test_layers_of_a_stack_are_warned_of_where_even_the_fastest_is_lost() -> None:
    stack = {"Blocks": {"kernel": jnp.ones((4, 3, 3), jnp.bfloat16)}}

    def decay(rate: float) -> Any:
        return wdjax.independent_decay(rate * wdjax.by_depth("Blocks", 0.5, axis=0))

    (message,) = said(decay(1e-3), stack)
    assert "'Blocks/kernel'" in message
    assert not said(decay(0.1), stack)


def test_what_does_not_decay_is_not_warned_of() -> None:
    tree = {"int": jnp.arange(3), "none": None, "key": jax.random.key(0), "wide": jnp.ones(2)}
    assert not said(wdjax.independent_decay(1e-5), tree)


# The decay in continuous time.


def after(optimizer: Any, steps: int, start: Any) -> np.ndarray:
    def step(carry: Any, _: Any) -> Any:
        weights, state = carry
        updates, state = optimizer.update(jnp.zeros_like(weights), state, weights)
        return (weights + updates, state), weights + updates

    weights = jnp.asarray(start)
    return np.asarray(jax.jit(lambda: jax.lax.scan(step, (weights, optimizer.init(weights)), length=steps)[1])())


START = [2.0, -3.0, 0.5]
SCHEDULES: dict[str, tuple[Any, Callable[[np.ndarray], np.ndarray]]] = {
    "constant": (0.05, lambda t: np.full(t.shape, 0.05)),
    "falling": (lambda count: 0.05 * 0.99**count, lambda t: 0.05 * 0.99**t),
    "warmup": (
        lambda count: 0.05 * jnp.minimum(jnp.asarray(count, jnp.float64) / 100, 1.0),
        lambda t: 0.05 * np.minimum(t / 100, 1),
    ),
}


@pytest.mark.peers  # A schedule's own arithmetic.
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_continuous_decay_is_the_exponential_of_the_sum_of_its_rates(schedule: str) -> None:
    learning_rate, values = SCHEDULES[schedule]
    optimizer = wdjax.continuous_decay(0.7, learning_rate=learning_rate)
    got = after(optimizer, 1_000, np.array(START))
    total = np.cumsum(values(np.arange(1_000.0)))
    np.testing.assert_allclose(got, np.array(START) * np.exp(-0.7 * total)[:, None], rtol=1e-11)


def test_continuous_decay_never_passes_its_anchor() -> None:
    optimizer = wdjax.continuous_decay(20.0, learning_rate=0.5)  # 10 a step.
    assert not said(optimizer, jnp.ones(3))
    got = after(optimizer, 5, np.array(START, np.float32))
    assert np.all(np.sign(got) * np.sign(START) >= 0)
    np.testing.assert_allclose(got[0], np.array(START) * np.exp(-10), rtol=2e-2)  # p - p * (1 - 4.5e-5) in float32.
    anchor = jnp.ones(3)
    pulled = after(wdjax.continuous_decay(20.0, learning_rate=0.5, toward=anchor), 5, np.array(START, np.float32))
    assert np.all((pulled - 1) * (np.array(START) - 1) >= 0)
    # The decay of the same rate by its linear form.
    with pytest.warns(UserWarning, match="10 a step"):
        linear = after(wdjax.independent_decay(10.0), 1, np.array(START, np.float32))
    np.testing.assert_allclose(linear[0], -9 * np.array(START), rtol=1e-6)


@pytest.mark.usefixtures("x64")
def test_continuous_decay_does_not_mind_how_time_is_cut() -> None:
    def once(rate: float, weights: Any) -> np.ndarray:
        return after(wdjax.continuous_decay(1.0, learning_rate=rate), 1, weights)[0]

    start = np.array(START)
    np.testing.assert_allclose(once(0.3, once(0.9, start)), once(1.2, start), rtol=1e-14)
    many = after(wdjax.continuous_decay(1.0, learning_rate=1.2 / 100), 100, start)[-1]
    np.testing.assert_allclose(many, once(1.2, start), rtol=1e-12)
    linear = after(wdjax.independent_decay(0.3), 1, after(wdjax.independent_decay(0.9), 1, start)[0])[0]
    assert np.all(np.abs(linear / once(1.2, start)) < 0.5)  # 0.07 for 0.30.


@pytest.mark.usefixtures("x64")
def test_continuous_decay_agrees_with_decoupled_decay_to_first_order() -> None:
    start = np.array(START)
    for rate in (1e-2, 1e-3, 1e-4):
        continuous = after(wdjax.continuous_decay(1.0, learning_rate=rate), 1, start)[0]
        coupled = optax.chain(wdjax.decoupled_decay(1.0), optax.scale(-rate))
        difference = continuous - after(coupled, 1, start)[0]
        np.testing.assert_allclose(difference, start * rate**2 / 2, rtol=rate)


@pytest.mark.filterwarnings("ignore:continuous_decay")
def test_continuous_decay_of_a_tiny_rate_is_no_zero() -> None:
    # 1 - exp(-1e-9) is 0 in float32, -expm1(-1e-9) is not.
    optimizer = wdjax.continuous_decay(1e-6, learning_rate=1e-3)
    for rate in (optimizer, wdjax.continuous_decay(jnp.array(1e-6), learning_rate=lambda count: jnp.array(1e-3))):
        updates, _ = rate.update(jnp.zeros(1), rate.init(jnp.ones(1)), jnp.ones(1))
        np.testing.assert_allclose(updates, -1e-9, rtol=1e-6)
