"""Sweeps against plain loops and NumPy statistics; hypergradients against finite differences and closed forms."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh
from scipy import stats
from slow import slow, slow_but
from tqdm import tqdm

import wdjax
from wdjax import sweeps

DECAYS, RATES, SEEDS = [0.0, 0.03, 0.3], [0.05, 0.2], [0, 7, 4]
X = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
Y = np.sin(X.sum(axis=1))


def loss_of(params: Any, x: Any, y: Any) -> jax.Array:
    return jnp.mean((jnp.tanh(x @ params["hidden"]) @ params["head"] - y) ** 2) / 2


def train(key: jax.Array, weight_decay: Any, learning_rate: Any) -> dict[str, Any]:
    """A few steps of SGD with decay from weights of the key; the last loss, the curve and the weights."""
    optimizer = wdjax.sgdw(learning_rate, weight_decay, wdjax.only("hidden"), momentum=0.5)
    hidden, head = jax.random.split(key)
    params = {"hidden": jax.random.normal(hidden, (3, 4)), "head": jax.random.normal(head, (4,))}

    def step(carry: Any, _: Any) -> Any:
        params, state = carry
        value, grads = jax.value_and_grad(loss_of)(params, X[:8], Y[:8])
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    (params, _), curve = jax.lax.scan(step, (params, optimizer.init(params)), length=6)
    return {"loss": loss_of(params, X[8:], Y[8:]), "curve": curve, "weights": params}


def swept(**options: Any) -> wdjax.sweeps.Sweep:
    return wdjax.sweep(train, weight_decay=DECAYS, learning_rate=RATES, **({"seeds": SEEDS} | options))


def settings() -> list[Any]:
    return list(itertools.product(DECAYS, RATES, SEEDS))


def stacked(results: list[Any]) -> Any:
    return jax.tree.map(lambda *x: np.stack(x).reshape(3, 2, 3, *x[0].shape), *jax.device_get(results))


def test_a_run_is_bit_for_bit_what_it_is_alone() -> None:
    alone = jax.jit(lambda seed, *rates: train(jax.random.key(seed), *rates))
    expected = stacked([alone(np.uint32(s), np.float32(wd), np.float32(lr)) for wd, lr, s in settings()])
    jax.tree.map(np.testing.assert_array_equal, swept().results, expected)


def test_rates_as_data_are_the_same_as_rates_baked_in() -> None:
    found = swept().results
    for i in (0, 4, 11, 17):
        weight_decay, learning_rate, seed = settings()[i]
        baked = jax.jit(lambda wd=weight_decay, lr=learning_rate, s=seed: train(jax.random.key(s), wd, lr))()
        for name in ("loss", "curve"):
            np.testing.assert_allclose(found[name].reshape(18, -1)[i], np.ravel(baked[name]), rtol=2e-6)
    assert len(np.unique(found["loss"])) == 18


@pytest.mark.parametrize(
    ("chunk", "devices"),
    [
        (None, 5),
        (1, 3),
        (np.int64(7), 3),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(None, 8), (3, 1), (4, 2), (100, 1), (100, 8)]),
    ],
)
def test_chunks_and_devices_change_nothing(chunk: int | None, devices: int) -> None:
    found = swept(chunk=chunk, devices=jax.devices()[:devices]).results
    if chunk in (None, 1):
        jax.tree.map(np.testing.assert_array_equal, found, swept().results)
    # A vmap sums in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), found, swept().results)


def test_the_callers_mesh_and_device_are_no_matter() -> None:
    with jax.set_mesh(jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)):
        jax.tree.map(np.testing.assert_array_equal, swept().results, swept(devices=jax.devices()[2:4]).results)
    with jax.default_device(jax.devices()[3]):
        assert sweeps._checked_devices(None) == (jax.devices()[3],)
        np.testing.assert_array_equal(swept(seeds=2).results["loss"], swept(seeds=[0, 1]).results["loss"])


@pytest.mark.parametrize("chunk", [1, 4])
def test_devices_do_not_communicate(chunk: int) -> None:
    runs = 8 * chunk
    program = sweeps._program(train, Mesh(np.array(jax.devices()), ("runs",)), ("weight_decay", "learning_rate"))
    compiled = program.lower(np.zeros(runs, np.uint32), [np.zeros(runs), np.zeros(runs)]).compile()
    text = compiled.as_text()
    assert not any(word in text for word in ("all-reduce", "all-gather", "all-to-all", "permute", "reduce-scatter"))
    sharded = jax.tree.leaves(compiled.output_shardings)
    assert all(len(s.device_set) == 8 and not s.is_fully_replicated for s in sharded)


@pytest.mark.parametrize("chunk", [1, 4])
def test_one_trace_serves_all_values_and_seeds(chunk: int) -> None:
    traces = []

    def counted(key: jax.Array, weight_decay: Any, learning_rate: Any) -> jax.Array:
        traces.append(1)
        return train(key, weight_decay, learning_rate)["loss"]

    found = [
        wdjax.sweep(counted, weight_decay=decays, learning_rate=(1, 2), seeds=[9, 5, 1], chunk=chunk)
        for decays in ([0.1], [0.2, 0.0, 3])
    ]
    once = jax.make_jaxpr(lambda key: counted(key, 0.1, 1.0))
    traces_of_sweeps = len(traces)
    once(jax.random.key(0))
    assert traces_of_sweeps == 2 * (len(traces) - traces_of_sweeps)  # One for each sweep.
    assert found[1].results["loss"].shape == (3, 2, 3)


@dataclasses.dataclass
class Task:
    """A training that reads its own attribute."""

    scale: float

    def train(self, key: jax.Array, weight_decay: Any) -> jax.Array:
        return self.scale * weight_decay


def test_a_sweep_computes_what_the_function_says_now() -> None:
    task = Task(1.0)
    loss = task.train  # The same object in both sweeps.
    for task.scale in (1.0, 100.0):
        assert wdjax.sweep(loss, weight_decay=[1.0]).results["loss"].item() == task.scale


def test_values_come_in_the_order_in_which_they_are_given() -> None:
    names = []
    found = wdjax.sweep(lambda key, **values: names.extend(values) or values["b"], c=[1.0], a=[2.0, 3.0], b=[4.0])
    assert names == list(found.values) == ["c", "a", "b"]


def test_axes_seeds_and_dtypes(x64: None) -> None:
    def told(key: jax.Array, b: Any, a: Any) -> Any:
        assert b.dtype == jnp.float64
        assert b.shape == ()
        drawn = jax.random.key_data(key)[-1].astype(jnp.int32)
        return {"all": jnp.stack([a, b]), "seed": drawn, "low": b.astype(jnp.bfloat16), "known": 3.0, "sure": a > 1}

    found = wdjax.sweep(told, a=[1.5, 2.5], b=range(3), seeds=4)
    assert list(found.values) == ["a", "b"]
    assert found.results["all"].shape == (2, 3, 4, 2)
    assert found.results["all"].dtype == np.float64
    np.testing.assert_array_equal(found.results["all"][1, 2, 3], [2.5, 2.0])
    np.testing.assert_array_equal(found.results["seed"], np.broadcast_to(np.arange(4), (2, 3, 4)))
    np.testing.assert_array_equal(found.seeds, np.arange(4))
    assert found.results["low"].dtype == jnp.bfloat16
    assert found.results["sure"].dtype == bool
    np.testing.assert_array_equal(found.results["known"], np.full((2, 3, 4), 3.0))
    assert found.best("low").values == {"a": 1.5, "b": 0.0}
    assert repr(found) == "Sweep(a: 2, b: 3, seeds: 4; results: all, known, low, seed, sure)"


def test_progress_wraps_the_calls(capsys: pytest.CaptureFixture[str]) -> None:
    calls = []

    def noted(steps: range) -> Any:
        calls.append(len(steps))
        yield from steps

    np.testing.assert_array_equal(swept(progress=noted).results["loss"], swept(progress=tqdm).results["loss"])
    swept(progress=noted, chunk=4)
    swept(progress=noted, chunk=4, devices=jax.devices()[:2])
    assert calls == [18, 5, 3]
    assert "18/18" in capsys.readouterr().err


def ends_before(steps: range) -> Any:
    return steps[:-1]


@pytest.mark.parametrize(
    ("progress", "error", "words"),
    [
        (
            ends_before,
            ValueError,
            r"yield all of range\(3\) in order, as tqdm\.tqdm does, but number 2 was missing",
        ),
        (
            reversed,
            ValueError,
            r"yield all .*, but number 0 was missing\. Its results would be missing too\. For fewer runs, give fewer",
        ),
        (
            lambda steps: print(end=""),
            TypeError,
            r"be a function .*, got one that returned None\. Write progress=tqdm\.tqdm\.",
        ),
        (True, TypeError, r"be a function that wraps a loop, got True\. Write progress=tqdm\.tqdm\."),
    ],
)
def test_a_progress_that_leaves_runs_out(progress: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=f"^sweep: progress must {words}"):
        wdjax.sweep(lambda key, a: a, a=[1.0, 2.0, 3.0], progress=progress)


def test_too_little_memory_shows_the_chunk() -> None:
    def large(key: jax.Array, a: Any) -> jax.Array:
        row = jax.random.normal(key, (10_000_000,))
        return jnp.sum(jnp.outer(row, row) @ row) * a

    with pytest.raises(jax.errors.JaxRuntimeError, match=r"RESOURCE_EXHAUSTED|Out of memory") as error:
        wdjax.sweep(large, a=[1.0, 2.0, 3.0, 4.0], chunk=4)
    assert error.value.__notes__[-1] == "sweep: each device trained 4 runs at once. Write sweep(..., chunk=2)."


# What may be the best.


def of_losses(losses: Any, **values: Any) -> wdjax.sweeps.Sweep:
    losses = np.asarray(losses, np.float64)
    values = values or {"weight_decay": np.arange(len(losses)) / 10}
    return wdjax.sweeps.Sweep(
        {k: np.asarray(v, float) for k, v in values.items()}, np.arange(losses.shape[-1]), {"loss": losses}
    )


def test_best_and_what_may_be_as_good() -> None:
    rng = np.random.default_rng(3)
    quality = np.array([[0.5, 0.30, 0.31], [0.9, 0.302, 0.6]])
    losses = quality[..., None] + rng.normal(size=6) + 0.01 * rng.normal(size=(2, 3, 6))  # Seeds have much in common.
    found = of_losses(losses, weight_decay=[0.0, 1.0], learning_rate=[0.1, 0.2, 0.3])
    flat = losses.reshape(6, 6)
    others = [np.delete(flat, i, axis=0) for i in range(6)]
    p = [[stats.ttest_rel(flat[i], b, alternative="greater").pvalue for b in others[i]] for i in range(6)]

    def expected_of(confidence: float) -> np.ndarray:
        return (np.array(p) >= (1 - confidence) / 5).all(axis=1).reshape(2, 3)

    for confidence in (0.5, 0.95, 0.9999):
        np.testing.assert_array_equal(found.best(confidence=confidence).alike, expected_of(confidence))
    assert [expected_of(c).sum() for c in (0.5, 0.95, 0.9999)] == [1, 2, 3]
    best = found.best()
    means = losses.mean(axis=-1)
    assert best.index == np.unravel_index(means.argmin(), (2, 3))
    assert best.alike[best.index]
    assert best.values == {"weight_decay": [0.0, 1.0][best.index[0]], "learning_rate": [0.1, 0.2, 0.3][best.index[1]]}
    np.testing.assert_allclose(best.mean, means.min())
    np.testing.assert_allclose(best.standard_error, stats.sem(losses[best.index]))
    may = expected_of(0.95)
    for axis, (name, tried) in enumerate(found.values.items()):
        among = [value for i, value in enumerate(tried) if may.take(i, axis).any()]
        assert best.interval[name] == (min(among), max(among))
    assert found.table().count("may be the best") == best.alike.sum() - 1


def test_the_confidence_is_kept_where_all_are_alike() -> None:
    rng = np.random.default_rng(0)
    kept = 0
    for _ in range(400):
        losses = rng.normal(size=(8, 5)) + rng.normal(size=5) + np.array([0, *[1e-9] * 7])[:, None]
        kept += bool(of_losses(losses).best().alike[0])
    assert kept >= 0.95 * 400  # The bound is not sharp.
    assert kept < 400  # But neither is it idle.


def test_one_seed_rules_nothing_out_and_equal_seeds_leave_no_doubt() -> None:
    best = of_losses([[3.0], [1.0], [2.0]]).best()
    assert best.index == (1,)
    assert best.alike.all()
    assert math.isnan(best.standard_error)
    assert best.interval == {"weight_decay": (0.0, 0.2)}
    best = of_losses([[3.0, 4.0], [1.0, 2.0], [1.0, 2.0]]).best()
    np.testing.assert_array_equal(best.alike, [False, True, True])
    assert of_losses([[3.0, 4.0]]).best().alike.all()


def test_the_ends_of_what_was_tried() -> None:
    assert of_losses([[1.0], [2.0]]).best().at_end == ()  # Nothing is below 0.
    assert of_losses([[2.0], [1.0]]).best().at_end == ("weight_decay",)
    assert of_losses([[2.0], [1.0], [3.0]]).best().at_end == ()
    assert of_losses([[2.0], [1.0]], lr=[0.2, 0.1]).best().at_end == ("lr",)
    assert of_losses([[2.0]], lr=[0.2]).best().at_end == ()
    assert "weight_decay is at the end of the tried values" in str(of_losses([[2.0], [1.0]]).best())


def test_failed_runs_are_reported_and_never_the_best() -> None:
    losses = [[np.nan, 0.1], [1.0, 2.0], [-np.inf, 0.0], [np.nan, np.nan]]
    best = of_losses(losses).best()
    assert best.index == (1,)
    np.testing.assert_array_equal(best.alike, [False, True, False, False])
    lines = of_losses(losses).table().splitlines()
    assert lines[2].endswith("1 of 2 failed")
    assert lines[3].endswith("best")
    assert lines[5].split() == ["0.3", "-", "nan", "2", "of", "2", "failed"]
    with pytest.raises(ValueError, match="every setting has a run whose 'loss' is NaN or infinite"):
        of_losses(losses[2:]).best()
    assert "failed" in of_losses(losses[2:]).table()


def test_a_diverging_rate_is_seen_in_a_sweep() -> None:
    found = wdjax.sweep(train, weight_decay=[0.1], learning_rate=[0.1, 1e30], seeds=2)
    assert found.best().values["learning_rate"] == np.float64(0.1)
    assert "2 of 2 failed" in found.table()


def test_results_of_other_names() -> None:
    assert swept().best("loss").index == swept().best().index
    for name in ("los", "curve", "weights"):
        with pytest.raises(KeyError, match=rf"no scalar named '{name}'\. It returned the scalars \['loss'\]"):
            swept().best(name)
    with pytest.raises(ValueError, match=r"confidence must be in \(0, 1\), got 95\. Write confidence=0\.95"):
        swept().best(confidence=95)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({}, ValueError, r"no values were given\. Write sweep\(train, weight_decay="),
        ({"weight_decay": []}, ValueError, r"weight_decay must be a list of at least one real number, got \[\]"),
        ({"weight_decay": [0.1, 0.1j]}, ValueError, r"at least one real number, got \[0\.1, 0\.1j\]"),
        (
            {"weight_decay": 0.1},
            ValueError,
            r"at least one real number, got 0\.1\. Write weight_decay=\[0\.0, 0\.01, 0\.1\]",
        ),
        ({"weight_decay": "much"}, ValueError, r"must be a list of at least one real number, got 'much'"),
        ({"weight_decay": [0.1, None]}, ValueError, r"must be finite .* got nan"),
        ({"weight_decay": [0.1, -0.1]}, ValueError, r"weight_decay must be finite and not negative, got -0\.1"),
        ({"learning_rate": [np.inf]}, ValueError, r"learning_rate must be finite and not negative, got inf"),
        ({"seeds": 0}, ValueError, r"seeds must be a count > 0 or a list of integers, got 0\. Write seeds=5"),
        ({"seeds": []}, ValueError, r"got \[\]\. Write seeds=5"),
        ({"seeds": True}, ValueError, r"got True"),
        ({"seeds": 2.5}, ValueError, r"got 2\.5"),
        ({"seeds": [1, 1]}, ValueError, r"seeds must be different and between 0 and 2\*\*32 - 1, got \[1, 1\]"),
        ({"seeds": [-1]}, ValueError, r"seeds must be different and between 0"),
        ({"chunk": 0}, ValueError, r"chunk must be an integer > 0, got 0\. Write chunk=8"),
        ({"devices": []}, ValueError, r"devices must be some of this process, got \[\]\. Write devices=jax.local"),
        ({"lr": [0.1]}, TypeError, r"training function cannot be called as train\(key, .*lr=\.\.\.\): .*'lr'"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    given = {"weight_decay": [0.1], "learning_rate": [0.1]} | arguments if arguments else {}
    with pytest.raises(error, match=words):
        wdjax.sweep(train, **given)


@pytest.mark.parametrize(
    "loss",
    [lambda a: jax.lax.complex(a, a), lambda a: 1j, lambda a: {"loss": jax.lax.complex(a, a)}],
    ids=["an array", "a number", "by name"],
)
def test_a_complex_loss_is_refused(loss: Any) -> None:
    with pytest.raises(TypeError, match=r"^sweep: 'loss' is complex, .* no order.*: \{\"loss\": abs\(loss\)\}\."):
        wdjax.sweep(lambda key, a: loss(a), a=[1.0])


def test_a_complex_result_is_kept_and_not_compared() -> None:
    found = wdjax.sweep(lambda key, a: {"phase": jax.lax.complex(a, a)}, a=[1.0])
    assert found.results["phase"].item() == 1 + 1j
    for compare in (found.best, found.table):
        with pytest.raises(TypeError, match=r"^Sweep: 'phase' is complex"):
            compare("phase")


def test_values_that_are_no_rates_may_be_negative() -> None:
    found = wdjax.sweep(lambda key, log_decay: log_decay, log_decay=[-2.0, 1.0])
    assert found.best().values == {"log_decay": -2.0}


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (lambda: None, "returned NoneType"),
        (lambda: jnp.ones(3), r"returned an array of shape \(3,\)"),
        (lambda: (jnp.ones([]), jnp.ones([])), "returned tuple"),
        (dict, "returned dict"),
        (lambda: {1: jnp.ones([])}, "returned dict"),
    ],
)
def test_what_a_training_function_must_not_return(result: Callable[[], Any], words: str) -> None:
    with pytest.raises(
        TypeError, match=f"train must return a scalar, or a dictionary of arrays by name, but it {words}"
    ):
        wdjax.sweep(lambda key, weight_decay: result(), weight_decay=[0.1])
    with pytest.raises(TypeError, match=r"cannot be called as train\(key, a=\.\.\.\): 3 is not .*Write sweep\(train, "):
        wdjax.sweep(3, a=[0.1])


# Hypergradients. A validation loss after k steps, differentiated by the decay and the learning rate.

WEIGHTS = wdjax.only("hidden", "head")
STEPS = 15
OPTIMIZERS: dict[str, Callable[[Any, Any], Any]] = {
    "sgd_l2": lambda wd, lr: wdjax.sgd_l2(lr, wd, WEIGHTS, momentum=0.9),
    "sgdw": lambda wd, lr: wdjax.sgdw(lr, wd, WEIGHTS, momentum=0.9, nesterov=True),
    "sgdw toward init": lambda wd, lr: wdjax.sgdw(lr, wd, WEIGHTS, toward="init"),
    "adam_l2": lambda wd, lr: wdjax.adam_l2(lr, wd, WEIGHTS),
    "adamw": lambda wd, lr: wdjax.adamw(lr, wd, WEIGHTS),
    "independent_decay": lambda wd, lr: optax.chain(optax.adam(lr), wdjax.independent_decay(wd, WEIGHTS)),
    "continuous_decay": lambda wd, lr: optax.chain(
        optax.adam(lr), wdjax.continuous_decay(wd, WEIGHTS, learning_rate=lr)
    ),
    "with_decoupled_decay": lambda wd, lr: wdjax.with_decoupled_decay(optax.adam(lr), wd, WEIGHTS, learning_rate=lr),
    "l2_penalty": lambda wd, lr: optax.sgd(lr, momentum=0.9),
    "l2_penalty, adam": lambda wd, lr: optax.adam(lr),
    "proximal_step[L2]": lambda wd, lr: optax.chain(
        optax.adam(lr), wdjax.proximal_step(wdjax.L2(), wd, WEIGHTS, learning_rate=lr)
    ),
    "proximal_step[L1]": lambda wd, lr: optax.chain(
        optax.sgd(lr), wdjax.proximal_step(wdjax.L1(), wd, WEIGHTS, learning_rate=lr)
    ),
    "cautious": lambda wd, lr: optax.chain(
        optax.scale_by_adam(), wdjax.cautious(wdjax.decoupled_decay(wd, WEIGHTS)), optax.scale_by_learning_rate(lr)
    ),
    "two layers": lambda wd, lr: wdjax.adamw(lr, wdjax.by_path({"hidden": wd, "head": wd**2}, default=0.0)),
    "scheduled": lambda wd, lr: wdjax.adamw(
        lambda count: lr / (1.0 + 0.1 * count), lambda count: wd * (1.0 - count / 20.0), WEIGHTS
    ),
}


def validation_loss(name: str, rates: jax.Array, steps: int = STEPS) -> jax.Array:
    """The loss on validation data after the steps, as a function of (weight decay, learning rate)."""
    rng = np.random.default_rng(1)
    params = {
        "hidden": jnp.array(rng.normal(size=(3, 4))),
        "head": jnp.array(rng.normal(size=4)),
        "bias": jnp.zeros(()),
    }
    optimizer = OPTIMIZERS[name](rates[0], rates[1])

    def loss(params: Any, x: Any, y: Any) -> jax.Array:
        return loss_of(params, x, y - params["bias"])

    def trained(params: Any) -> jax.Array:
        penalty = wdjax.l2_penalty(params, rates[0], WEIGHTS) if name.startswith("l2_penalty") else jnp.zeros(())
        return loss(params, X[:8].astype(np.float64), Y[:8].astype(np.float64)) + penalty

    @jax.checkpoint
    def step(carry: Any, _: Any) -> tuple[Any, None]:
        params, state = carry
        updates, state = optimizer.update(jax.grad(trained)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=steps)
    return loss(params, X[8:].astype(np.float64), Y[8:].astype(np.float64))


def slopes_and_differences(name: str, points: Any, mode: str = "reverse") -> tuple[np.ndarray, np.ndarray]:
    """For each point the derivatives by (weight decay, learning rate), by JAX and by central differences."""

    def value_and_slope(rates: jax.Array) -> Any:
        if mode == "reverse":
            return jax.value_and_grad(lambda rates: validation_loss(name, rates))(rates)
        slope, value = jax.jacfwd(lambda rates: (validation_loss(name, rates),) * 2, has_aux=True)(rates)
        return value, slope

    points, step = np.array(points), 1e-6
    nudged = points[:, None, None] + step * np.array([[[1, 0], [-1, 0]], [[0, 1], [0, -1]]])
    program = jax.jit(jax.vmap(value_and_slope), compiler_options={"xla_backend_optimization_level": 0})
    values, slopes = program(np.concatenate([points, nudged.reshape(-1, 2)]))
    losses = np.array(values)[len(points) :].reshape(len(points), 2, 2)
    return np.array(slopes)[: len(points)], (losses[..., 0] - losses[..., 1]) / (2 * step)


@pytest.mark.peers
@pytest.mark.parametrize("name", slow_but(OPTIMIZERS, "sgdw toward init", "adamw", "proximal_step[L1]"))
def test_hypergradients_are_finite_differences(name: str, x64: None) -> None:
    points = [[0.3, 0.05], [0.03, 0.02]]
    # A decay that is off can still be learned. (These have a corner there.)
    if name not in ("proximal_step[L1]", "cautious"):
        points.append([0.0, 0.05])
    slopes, expected = slopes_and_differences(name, points)
    np.testing.assert_allclose(slopes, expected, rtol=1e-6, atol=1e-8)
    assert (np.abs(expected[:2]) > 1e-4).all()


@pytest.mark.slow
@pytest.mark.peers
@pytest.mark.parametrize("name", ["adamw", slow("proximal_step[L2]")])
def test_hypergradients_in_forward_mode(name: str, x64: None) -> None:
    slopes, expected = slopes_and_differences(name, [[0.3, 0.05]], "forward")
    np.testing.assert_allclose(slopes, expected, rtol=1e-6)


@pytest.mark.peers
def test_adam_needs_eps_root_where_a_gradient_is_zero(x64: None) -> None:
    def end(weight_decay: Any, eps_root: float) -> jax.Array:
        params, target = jnp.array([1.0, 1.0]), jnp.array([0.5, 0.0])
        optimizer = wdjax.adamw(0.1, weight_decay, eps_root=eps_root)
        state = optimizer.init(params)
        for _ in range(3):
            grads = (params - target) * jnp.array([1.0, 0.0])  # The second weight meets no data.
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return jnp.sum((params - target) ** 2)

    assert jnp.isnan(jax.grad(end)(0.1, 0.0))  # The derivative of sqrt(0), times 0.
    slope = (end(0.1 + 1e-6, 1e-16) - end(0.1 - 1e-6, 1e-16)) / 2e-6
    np.testing.assert_allclose(jax.grad(end)(0.1, 1e-16), slope, rtol=1e-7)


def ridge(name: str, lam: Any, eta: float, steps: int, w0: np.ndarray, a: np.ndarray, c: np.ndarray) -> jax.Array:
    """Gradient descent on w.a.w / 2 - c.w and the penalty, in the place of this name."""
    optimizer = {
        "loss": lambda: optax.sgd(eta),
        "gradient": lambda: wdjax.sgd_l2(eta, lam),
        "gradient, momentum": lambda: wdjax.sgd_l2(eta, lam, momentum=0.5),
        "update": lambda: wdjax.sgdw(eta, lam),
        "weights": lambda: optax.chain(optax.sgd(eta), wdjax.proximal_step(wdjax.L2(), lam, learning_rate=eta)),
    }[name]()

    def step(carry: Any, _: Any) -> tuple[Any, None]:
        w, state = carry
        grads = a @ w - c
        if name == "loss":
            grads = grads + jax.grad(wdjax.l2_penalty)(w, lam)
        updates, state = optimizer.update(grads, state, w)
        return (optax.apply_updates(w, updates), state), None

    w = jnp.array(w0)
    return jax.lax.scan(step, (w, optimizer.init(w)), length=steps)[0][0]


@pytest.mark.parametrize("name", ["loss", "gradient", "gradient, momentum", "update", "weights"])
def test_hypergradients_of_ridge_regression(name: str, x64: None) -> None:
    rng = np.random.default_rng(0)
    x, y, x_val, y_val, w0 = (rng.normal(size=s) for s in ((20, 4), 20, (30, 4), 30, 4))
    a, c, lam, eta = x.T @ x / 20, x.T @ y / 20, 0.3, 0.2
    s, v = np.linalg.eigh(a)

    def through(steps: int) -> Any:
        def loss(lam: Any) -> jax.Array:
            return jnp.mean((x_val @ ridge(name, lam, eta, steps, w0, a, c) - y_val) ** 2) / 2

        return jax.jit(jax.grad(loss))(lam)

    def slope(w: np.ndarray, dw: np.ndarray) -> float:
        return float((x_val @ w - y_val) @ (x_val @ dw) / 30)

    # At the end of training: the ridge path, whose derivative is -(A + lam)^-1 w.
    w = np.linalg.solve(a + lam * np.eye(4), c)
    np.testing.assert_allclose(through(600), slope(w, -np.linalg.solve(a + lam * np.eye(4), w)), rtol=1e-9)

    # On the way: in the eigenbasis of A each weight is a geometric sum.
    if name in ("loss", "gradient", "update"):
        k, h, u, b = 7, s + lam, v.T @ w0, v.T @ c
        power, dpower = (1 - eta * h) ** k, -k * eta * (1 - eta * h) ** (k - 1)
        w, dw = (1 - power) * b / h + power * u, -dpower * b / h - (1 - power) * b / h**2 + dpower * u
        np.testing.assert_allclose(through(k), slope(v @ w, v @ dw), rtol=1e-12)


def test_hypergradients_within_a_sweep() -> None:
    def slope(key: jax.Array, weight_decay: Any) -> jax.Array:
        return jax.jacfwd(lambda decay: train(key, decay, jnp.float32(0.1))["loss"])(weight_decay)

    def loss(key: jax.Array, weight_decay: Any) -> jax.Array:
        return train(key, weight_decay, jnp.float32(0.1))["loss"]

    slopes = wdjax.sweep(slope, weight_decay=[0.1, 0.5], seeds=2).results["loss"]
    up, down = (wdjax.sweep(loss, weight_decay=[0.1 + d, 0.5 + d], seeds=2).results["loss"] for d in (0.01, -0.01))
    np.testing.assert_allclose(slopes, (up - down) / 0.02, rtol=1e-2, atol=1e-4)
