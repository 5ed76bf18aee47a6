"""Stable weight decay: AdamS in NumPy, what scaling a loss does to it, and whose second moments it reads."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from optax import contrib
from slow import slow_but

import wdjax
from wdjax.wrappers import with_decoupled_decay, with_stable_decay

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("x64")]  # Optax's bias correction.

STEPS, LR, WD = 100, 0.05, 0.3
SHAPES = {"w": (4, 3), "b": (3,)}
SCHEDULE = optax.cosine_decay_schedule(LR, STEPS)


def make_params(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {key: rng.normal(size=shape) for key, shape in SHAPES.items()}


def make_grads(steps: int = STEPS) -> dict[str, np.ndarray]:
    """Of quite different sizes: 0.1 in the matrix, 2 in the vector."""
    rng = np.random.default_rng(1)
    sizes = {"w": 0.1, "b": 2.0}
    return {key: sizes[key] * rng.normal(size=(steps, *shape)) for key, shape in SHAPES.items()}


def walked(optimizer: Any, grads: Any, params: Any = None) -> Any:
    """The parameters after each step."""
    params = jax.tree.map(jnp.asarray, make_params() if params is None else params)

    def step(carry: Any, grad: Any) -> Any:
        params, state = carry
        updates, state = optimizer.update(grad, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, jax.tree.map(jnp.asarray, grads))[1])
    return run((params, optimizer.init(params)))


def adam_s(grads: Any, decayed: tuple[str, ...], anchors: Any, b2: float = 0.999) -> Any:
    """AdamS in NumPy, with the mean over all parameters, and the learning rate of SCHEDULE."""
    params = make_params()
    first, second = ({key: np.zeros(shape) for key, shape in SHAPES.items()} for _ in range(2))
    path: dict[str, list[np.ndarray]] = {key: [] for key in SHAPES}
    for t in range(STEPS):
        lr = LR * 0.5 * (1 + np.cos(np.pi * t / STEPS))
        for key in SHAPES:
            first[key] = 0.9 * first[key] + 0.1 * grads[key][t]
            second[key] = b2 * second[key] + (1 - b2) * grads[key][t] ** 2
        corrected = {key: v / (1 - b2 ** (t + 1)) for key, v in second.items()}
        mean = np.mean(np.concatenate([v.ravel() for v in corrected.values()]))
        for key in SHAPES:
            pull = lr * WD / np.sqrt(mean) * (params[key] - anchors[key]) if key in decayed else 0.0
            step = first[key] / (1 - 0.9 ** (t + 1)) / (np.sqrt(corrected[key]) + 1e-8)
            params[key] = params[key] - pull - lr * step
            path[key].append(params[key])
    return {key: np.stack(steps) for key, steps in path.items()}


ZERO = {"w": 0.0, "b": 0.0}


@pytest.mark.parametrize("b2", [0.999, 0.9])
@pytest.mark.parametrize("mask", [("w", "b"), ("w",)], ids=["all", "w"])
@pytest.mark.parametrize("toward", [None, "init"])
def test_adam_s_in_numpy(b2: float, mask: tuple[str, ...], toward: Any) -> None:
    # The mean includes the vector, whether it decays or not.
    optimizer = with_stable_decay(
        optax.adam(SCHEDULE, b2=b2), WD, wdjax.only(*mask), learning_rate=SCHEDULE, b2=b2, toward=toward
    )
    want = adam_s(make_grads(), mask, make_params() if toward else ZERO, b2)
    chex.assert_trees_all_close(walked(optimizer, make_grads()), want, rtol=1e-12, atol=1e-13)


def signs(size: float, steps: int = 60) -> Any:
    return {key: size * np.sign(grads) for key, grads in make_grads(steps).items()}


@pytest.mark.parametrize("size", [1.0, 0.1, 30.0])
def test_with_equal_second_moments_it_is_a_decay_divided_by_their_root(size: float) -> None:
    stable = with_stable_decay(optax.adam(LR), WD, learning_rate=LR)
    plain = with_decoupled_decay(optax.adam(LR), WD / size, learning_rate=LR)
    chex.assert_trees_all_close(walked(stable, signs(size)), walked(plain, signs(size)), rtol=1e-12, atol=1e-13)


def test_a_loss_and_a_weight_decay_times_a_number_lead_to_the_same_weights() -> None:
    grads, scaled = make_grads(), jax.tree.map(lambda g: 1000 * g, make_grads())
    adam = optax.adam(LR, eps=0.0)
    want = walked(with_stable_decay(adam, WD, learning_rate=LR), grads)
    got = walked(with_stable_decay(adam, 1000 * WD, learning_rate=LR), scaled)
    chex.assert_trees_all_close(got, want, rtol=1e-11, atol=1e-12)
    # The loss alone: a step of Adam stays as it is, and the decay is divided.
    alone = walked(with_stable_decay(adam, WD, learning_rate=LR), scaled)
    divided = walked(with_stable_decay(adam, WD / 1000, learning_rate=LR), grads)
    chex.assert_trees_all_close(alone, divided, rtol=1e-11, atol=1e-12)


def test_beside_noise_of_one_size_weights_end_at_the_ridge_solution() -> None:
    curvatures, minimum, size = jnp.array([0.5, 1.0, 2.0]), jnp.array([1.0, -2.0, 3.0]), 40.0

    def end(optimizer: Any) -> jax.Array:
        def step(carry: Any, sign: Any) -> Any:
            w, state = carry
            updates, state = optimizer.update(curvatures * (w - minimum) + size * sign, state, w)
            return (w + updates, state), w

        signs = jnp.tile(jnp.array([1.0, -1.0]), 10_000)
        _, path = jax.jit(lambda w: jax.lax.scan(step, (w, optimizer.init(w)), signs))(jnp.zeros(3))
        return path[-100:].mean(0)

    decay = 1.0
    ridge = curvatures * minimum / (curvatures + decay)
    np.testing.assert_allclose(end(with_stable_decay(optax.adam(LR), decay, learning_rate=LR)), ridge, rtol=0.01)
    # The decay of AdamW is stronger by the size of the noise.
    np.testing.assert_allclose(
        end(wdjax.adamw(LR, decay)), curvatures * minimum / (curvatures + decay * size), rtol=0.01
    )


def test_nothing_decays_before_the_first_gradient() -> None:
    grads = {key: np.concatenate([np.zeros_like(g[:3]), g[:2]]) for key, g in make_grads().items()}
    path = walked(with_stable_decay(optax.adam(LR), WD, learning_rate=LR), grads)
    for key, start in make_params().items():
        np.testing.assert_array_equal(path[key][:3], np.stack([start] * 3))
        assert np.all(path[key][3] != start)
        assert np.all(np.isfinite(path[key]))


def rms_of(grads: Any, b2: float, *, corrected: bool) -> float:
    """The root of the mean second moment after all steps."""
    v = {key: np.zeros(SHAPES[key]) for key in SHAPES}
    for t in range(len(grads["w"])):
        v = {key: b2 * v[key] + (1 - b2) * grads[key][t] ** 2 for key in v}
    correction = 1 - b2 ** len(grads["w"]) if corrected else 1.0
    return float(np.sqrt(np.mean(np.concatenate([x.ravel() for x in v.values()])) / correction))


def rms_of_amsgrad(grads: Any, b2: float = 0.999) -> float:
    v, largest = ({key: np.zeros(SHAPES[key]) for key in SHAPES} for _ in range(2))
    for t in range(len(grads["w"])):
        v = {key: b2 * v[key] + (1 - b2) * grads[key][t] ** 2 for key in v}
        largest = {key: np.maximum(largest[key], v[key] / (1 - b2 ** (t + 1))) for key in v}
    return float(np.sqrt(np.mean(np.concatenate([x.ravel() for x in largest.values()]))))


# The optimizer; and the root of the mean second moment that its last step is divided by.
OPTIMIZERS: dict[str, tuple[Any, Any]] = {
    "adam": (optax.adam(LR), lambda g: rms_of(g, 0.999, corrected=True)),
    "nadam": (optax.nadam(LR), lambda g: rms_of(g, 0.999, corrected=True)),
    "radam": (optax.radam(LR), lambda g: rms_of(g, 0.999, corrected=True)),
    "amsgrad": (optax.amsgrad(LR), rms_of_amsgrad),
    "rmsprop": (optax.rmsprop(LR, decay=0.9), lambda g: rms_of(g, 0.9, corrected=False)),
    "rmsprop, corrected": (
        optax.chain(optax.scale_by_rms(0.999, bias_correction=True), optax.scale_by_learning_rate(LR)),
        lambda g: rms_of(g, 0.999, corrected=True),
    ),
    "lamb": (optax.lamb(LR), lambda g: rms_of(g, 0.999, corrected=True)),
    "in a chain": (
        optax.chain(optax.scale(10.0), optax.adam(LR)),
        lambda g: 10 * rms_of(g, 0.999, corrected=True),
    ),
    "two Adams": (
        optax.partition({"a": optax.adam(LR), "b": optax.adam(LR, b1=0.5)}, wdjax.by_path({"w": "a", "b": "b"}).values),
        lambda g: rms_of(g, 0.999, corrected=True),
    ),
    "its own b2": (
        optax.inject_hyperparams(optax.adam)(LR, b2=0.9),
        lambda g: rms_of(g, 0.9, corrected=True),
    ),
}


def decays(optimizer: Any, grads: Any, *, learning_rate: Any = LR, **options: Any) -> tuple[Any, Any]:
    """The last step with the decay minus the one without, as a fraction of the weights; and the last state."""
    ours = with_stable_decay(optimizer, WD, learning_rate=learning_rate, **options)
    plain = optax.with_extra_args_support(optimizer)
    params = jax.tree.map(jnp.asarray, make_params())
    states, updates = [ours.init(params), plain.init(params)], [params, params]
    for t in range(len(grads["w"])):
        for i, each in enumerate((ours, plain)):
            grad = {key: jnp.asarray(grads[key][t]) for key in grads}
            updates[i], states[i] = jax.jit(each.update)(grad, states[i], params)
    return jax.tree.map(lambda a, b, p: (b - a) / p, *updates, params), states[0]


@pytest.mark.parametrize("name", slow_but(OPTIMIZERS, "adam", "amsgrad", "rmsprop", "two Adams", "its own b2"))
def test_the_second_moment_is_the_one_that_the_step_is_divided_by(name: str) -> None:
    optimizer, rms = OPTIMIZERS[name]
    grads = make_grads(7)
    found, _ = decays(optimizer, grads)
    for part in jax.tree.leaves(found):
        np.testing.assert_allclose(part, LR * WD / rms(grads), rtol=1e-9)


def test_a_wrong_b2_matters_only_in_the_first_steps() -> None:
    grads = make_grads(1000)
    right, wrong = (walked_rates(b2, grads) for b2 in (0.99, 0.999))
    t = np.arange(1, 1001)
    np.testing.assert_allclose(wrong / right, np.sqrt((1 - 0.999**t) / (1 - 0.99**t)), rtol=1e-6)
    assert wrong[0] / right[0] < 0.32
    # With the default for an optimizer with b2 = 0.95, 1 % is left after 4000 steps.
    assert abs(np.sqrt(1 - 0.999**4000) - 1) < 0.01


def walked_rates(b2: float, grads: Any) -> np.ndarray:
    """The fraction of a weight that each step removes, where the optimizer itself moves nothing."""
    optimizer = optax.chain(optax.scale_by_adam(b2=0.99), optax.scale(0.0))
    path = walked(with_stable_decay(optimizer, 1e-6, learning_rate=LR, b2=b2), grads)["w"][:, 0, 0]
    return 1 - path / np.concatenate([[make_params()["w"][0, 0]], path[:-1]])


def test_steps_that_are_skipped_do_not_decay() -> None:
    grads = make_grads(6)
    accumulated = {key: np.stack([g[:3].mean(0), g[3:].mean(0)]) for key, g in grads.items()}
    found, state = decays(optax.MultiSteps(optax.adam(LR), 3).gradient_transformation(), grads)
    rms = rms_of(accumulated, 0.999, corrected=True)
    for part in jax.tree.leaves(found):
        np.testing.assert_allclose(part, LR * WD / rms, rtol=1e-6)  # MultiSteps accumulates in float32.
    assert state.decay.count == 2
    for optimizer, steps in ((optax.MultiSteps(optax.adam(LR), 3).gradient_transformation(), 2), (broken(), 3)):
        found, _ = decays(optimizer, {key: g[:steps] * [1, 1, np.inf][steps - 1] for key, g in grads.items()})
        for part in jax.tree.leaves(found):
            np.testing.assert_array_equal(part, 0)


def broken() -> Any:
    return optax.apply_if_finite(optax.adam(LR), 5)


def test_a_moment_that_is_not_a_number_leaves_the_other_parameters_alone() -> None:
    grads = {"w": np.full((2, 4, 3), np.nan), "b": np.ones((2, 3))}
    ours, plain = (
        walked(o, grads)["b"] for o in (with_stable_decay(optax.adam(LR), WD, learning_rate=LR), optax.adam(LR))
    )
    np.testing.assert_array_equal(ours, plain)


def test_moments_of_low_precision_are_summed_in_float32() -> None:
    params, grads = {"w": jnp.ones((64, 1024), jnp.bfloat16)}, {"w": jnp.ones((64, 1024), jnp.bfloat16)}
    optimizer = with_stable_decay(
        optax.chain(optax.scale_by_adam(b2=0.5), optax.scale(0.0)), 1.0, learning_rate=0.5, b2=0.5
    )
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    np.testing.assert_array_equal(updates["w"].astype(np.float32), -0.5)


def test_frozen_parameters_are_not_part_of_the_mean() -> None:
    grads = make_grads(5)
    alone = walked(
        with_stable_decay(optax.adam(LR), WD, learning_rate=LR), {"w": grads["w"]}, {"w": make_params()["w"]}
    )
    for optimizer in (
        wdjax.freeze(with_stable_decay(optax.adam(LR), WD, learning_rate=LR), wdjax.only("b")),
        with_stable_decay(wdjax.freeze(optax.adam(LR), wdjax.only("b")), WD, wdjax.only("w"), learning_rate=LR),
    ):
        path = walked(optimizer, grads)
        chex.assert_trees_all_close(path["w"], alone["w"], rtol=1e-13)
        np.testing.assert_array_equal(path["b"][-1], make_params()["b"])


WITHOUT: dict[str, Any] = {
    "sgd": optax.sgd(LR, momentum=0.9),
    "lion": optax.lion(LR, weight_decay=0.0),
    "adafactor": optax.adafactor(LR),
    "adabelief": optax.adabelief(LR),
    "muon": contrib.muon(LR),
    "partition": optax.partition({"a": optax.adam(LR), "b": optax.sgd(LR)}, wdjax.by_path({"w": "b", "b": "a"}).values),
    "frozen": wdjax.freeze(optax.adam(LR), wdjax.only("w")),
}


@pytest.mark.parametrize("name", WITHOUT)
def test_without_a_second_moment_of_what_decays_init_says_so(name: str) -> None:
    params = jax.tree.map(jnp.asarray, make_params())
    optimizer = with_stable_decay(WITHOUT[name], WD, learning_rate=LR)
    with pytest.raises(
        ValueError, match=r"^with_stable_decay: the optimizer keeps no second moment of .*'w'.* Wrap optax\.adam"
    ):
        optimizer.init(params)
    if name in ("partition", "frozen", "muon"):
        with_stable_decay(WITHOUT[name], WD, wdjax.only("b"), learning_rate=LR).init(params)


@pytest.mark.parametrize("b2", [1.0, 1.5, jnp.array(1.0), -0.1, np.nan, lambda count: 0.9])
def test_a_b2_that_is_none_is_refused(b2: Any) -> None:
    with pytest.raises(ValueError, match=r"^with_stable_decay: b2 must be .*b2=0\.95"):
        with_stable_decay(optax.adam(LR), WD, learning_rate=LR, b2=b2)


@pytest.mark.parametrize("b2", ["a", None, True, wdjax.by_path({"w": 0.9}), {"w": 0.9}])
def test_a_b2_of_another_type_is_refused_without_offering_a_schedule_or_a_table(b2: Any) -> None:
    with pytest.raises(
        TypeError, match=r"^with_stable_decay: b2 must be a number from 0 to less than 1, got .*"
    ) as error:
        with_stable_decay(optax.adam(LR), WD, learning_rate=LR, b2=b2)
    assert "schedule" not in str(error.value)
    assert "rates by path" not in str(error.value)


def test_the_learning_rate_is_the_one_in_the_state() -> None:
    optimizer = with_stable_decay(optax.inject_hyperparams(optax.adam)(LR), WD, learning_rate=LR)
    params = jax.tree.map(jnp.asarray, make_params())
    state, grads = optimizer.init(params), jax.tree.map(jnp.ones_like, params)
    state.inner_state.hyperparams["learning_rate"] = jnp.asarray(2 * LR)
    updates, _ = optimizer.update(grads, state, params)
    want = jax.tree.map(lambda p: -2 * LR * (1 + WD * p), params)
    chex.assert_trees_all_close(updates, want, rtol=1e-6)
    with pytest.raises(ValueError, match=r"^with_stable_decay: learning_rate is 0\.1, but the optimizer keeps 0\.05"):
        with_stable_decay(optax.inject_hyperparams(optax.adam)(LR), WD, learning_rate=0.1).init(params)


def test_monitor_reads_it() -> None:
    optimizer = wdjax.monitor(with_stable_decay(optax.adam(LR), WD, wdjax.only("w"), learning_rate=LR))
    params = jax.tree.map(jnp.asarray, make_params())
    grads = jax.tree.map(lambda p: jnp.full_like(p, 3.0), params)
    _, state = optimizer.update(grads, optimizer.init(params), params)
    rates = {key: value for key, value in wdjax.scalars(state).items() if "rate" in key}
    assert rates
    np.testing.assert_allclose(max(rates.values()), LR * WD / 3, rtol=1e-5)


@pytest.mark.parametrize("check_vma", [True, False], ids=["checked", "unchecked"])
def test_within_shard_map_the_mean_is_that_of_all_devices(check_vma: bool) -> None:
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4], axis_types=(AxisType.Auto,))
    params = {"w": jnp.asarray(make_params()["w"])}
    # Each device has a row, and the gradients of the rows differ.
    grads = {"w": jnp.arange(1.0, 5)[:, None] * jnp.ones((4, 3))}
    optimizer = with_stable_decay(optax.adam(LR), WD, learning_rate=LR, axis_name="data")

    def step(grads: Any, params: Any) -> Any:
        return optimizer.update(grads, optimizer.init(params), params)[0]

    split = {"w": P("data")}
    run = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(split, split), out_specs=split, check_vma=check_vma))
    whole = with_stable_decay(optax.adam(LR), WD, learning_rate=LR)
    want, _ = whole.update(grads, whole.init(params), params)
    chex.assert_trees_all_close(run(grads, params), want, rtol=1e-12)
    text = run.lower(grads, params).compile().as_text()
    assert text is not None
    assert text.count(" all-reduce(") == 1


def test_of_sharded_arrays_the_mean_is_that_of_whole_arrays() -> None:
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4], axis_types=(AxisType.Auto,))
    params = {"w": jnp.asarray(make_params()["w"])}
    grads = {"w": jnp.arange(1.0, 5)[:, None] * jnp.ones((4, 3))}
    optimizer = with_stable_decay(optax.adam(LR), WD, learning_rate=LR)
    want, _ = optimizer.update(grads, optimizer.init(params), params)
    split = jax.device_put((grads, params), jax.sharding.NamedSharding(mesh, P("data")))
    got = jax.jit(lambda grads, params: optimizer.update(grads, optimizer.init(params), params)[0])(*split)
    chex.assert_trees_all_close(got, want, rtol=1e-12)


def test_on_an_explicit_mesh_it_is_the_same() -> None:
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4], axis_types=(AxisType.Explicit,))
    params, grads = {"w": jnp.asarray(make_params()["w"])}, {"w": jnp.asarray(make_grads()["w"][:5])}
    optimizer = with_stable_decay(optax.adam(LR), WD, learning_rate=LR)
    want = walked(optimizer, grads, params)
    with jax.set_mesh(mesh):
        split = {"w": jax.device_put(params["w"], jax.sharding.NamedSharding(mesh, P("data")))}
        of_steps = {"w": jax.device_put(grads["w"], jax.sharding.NamedSharding(mesh, P(None, "data")))}
        got = walked(optimizer, of_steps, split)
        assert jax.typeof(got["w"]).sharding.spec == P(None, "data", None)
    chex.assert_trees_all_close(jax.device_get(got), jax.device_get(want), rtol=1e-12)
