"""What `monitor` measures, against float64 NumPy; what it changes (nothing); what it costs."""

import functools
import itertools
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from slow import slow

import wdjax
from wdjax import by_depth, by_path, monitor, only, scalars
from wdjax.telemetry import METRICS, MonitorState, _sums

LR, WD = 0.1, 0.03
SCHEDULE = optax.linear_schedule(0.1, 0.0, 10)
SIZED = ("weight_norm", "weight_rms", "update_norm", "angular_update", "shrinkage")
OF_DECAY = tuple(name for name in METRICS if name not in SIZED)


class Part(NamedTuple):
    """One array of a group for the oracle: all in float64, and the dtypes that parameter and update are in."""

    w: Any
    u: Any
    rate: Any = 0.0
    anchor: Any = 0.0
    dtype: Any = np.float32
    update_dtype: Any = np.float32


def oracle(parts: Sequence[Part]) -> dict[str, Any]:
    """The metrics of a group, in float64; what lands where is rounded as NumPy rounds."""

    def rounded(x: Any, dtype: Any) -> Any:
        return np.asarray(x, np.float64).astype(np.float32).astype(dtype).astype(np.float64)

    w, u, d, away, step, landed, moving, lost = [], [], [], [], [], [], [], []
    for part in parts:
        pull = np.asarray(part.rate > 0) * (part.w - part.anchor)
        decay = part.rate * pull
        after = rounded(part.w + part.u, part.dtype)
        without = rounded(part.w + rounded(part.u + decay, part.update_dtype), part.dtype)
        low = part.dtype != np.float32
        w, u, d, away = [*w, part.w], [*u, part.u], [*d, decay], [*away, pull]
        step.append(after - part.w if low else part.u)
        landed.append(without - after)
        moving.append(pull != 0)
        lost.append((pull != 0) & (after == without))
    w, u, d, away, step, landed = (np.concatenate([x.ravel() for x in xs]) for xs in (w, u, d, away, step, landed))
    norm = np.linalg.norm
    n_moving, n_lost = sum(x.sum() for x in moving), sum(x.sum() for x in lost)
    across = step - w * (step @ w) / (w @ w)
    decays = norm(d) > 0
    return {
        "weight_norm": norm(w),
        "weight_rms": norm(w) / np.sqrt(w.size),
        "update_norm": norm(u),
        "decay_norm": norm(d),
        "decay_to_update": norm(d) / norm(u),
        "angular_update": np.arctan2(norm(across), norm(w) + (step @ w) / norm(w)),
        "effective_rate": norm(d) / norm(away) if decays else 0.0,
        "shrinkage": -(step @ w) / (w @ w),
        "rounded_away": n_lost / n_moving if decays else 0.0,
        "decay_landed": landed @ d / (d @ d) if decays else 0.0,
    }


def make_params(dtype: Any = jnp.float32) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(4, 30, 20)) * 0.1
    kernel[0, 0] = 0.0  # A zero is moved by no decay.
    shapes = {"Dense_0": {"kernel": kernel, "bias": rng.normal(size=20)}, "embed": rng.normal(size=(50, 8))}
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), shapes)


def grads_at(params: Any, step: int) -> Any:
    return jax.tree.map(lambda p: jnp.cos(37 * p.astype(jnp.float32) + step).astype(p.dtype), params)


def wide(x: Any) -> Any:
    return np.asarray(jnp.asarray(x).astype(jnp.float32), np.float64)


def sgd(learning_rate: float, action: Any) -> optax.GradientTransformation:
    return optax.chain(optax.scale(-learning_rate), action)


def compare(got: dict[str, Any], want: dict[str, Any], where: Any, dtype: Any, rtol: float = 2e-5) -> None:
    # Sums of terms of both signs are precise on the scale of their terms. A narrow weight near the middle between two
    # neighbours may land on the other one: a compiled program multiplies and adds in one rounding where it likes.
    absolute = {"shrinkage": 1e-6, "decay_landed": 1e-5, "rounded_away": 0.0}
    if dtype != jnp.float32:
        absolute = {"shrinkage": 2e-5, "decay_landed": 2e-3, "rounded_away": 1e-3}
    for name in METRICS:
        np.testing.assert_allclose(
            float(got[name]), want[name], rtol, absolute.get(name, 0), err_msg=f"{where}: {name}"
        )


# What the decay is (as both the decay and the monitor get it), and its rate and group for each array at step t.
DECAYS: dict[str, tuple[dict[str, Any], Callable[[int], dict[str, Any]], dict[str, str]]] = {
    "number": (
        {"weight_decay": WD},
        lambda t: {"kernel": WD, "bias": WD, "embed": WD},
        {"kernel": "all", "bias": "all", "embed": "all"},
    ),
    "mask": (
        {"weight_decay": np.float32(WD), "mask": only("kernel")},
        lambda t: {"kernel": WD},
        {"kernel": "kernel"},
    ),
    "schedule": (
        {"weight_decay": SCHEDULE, "mask": wdjax.all_but("bias")},
        lambda t: {"kernel": 0.1 - 0.01 * t, "embed": 0.1 - 0.01 * t},
        {"kernel": "default", "embed": "default"},
    ),
    "table": (
        {"weight_decay": by_path({"kernel": SCHEDULE, "embed": WD}, default=0.0)},
        lambda t: {"kernel": 0.1 - 0.01 * t, "embed": WD},
        {"kernel": "kernel", "embed": "embed"},
    ),
    "layers": (
        {"weight_decay": WD * by_depth("kernel", 0.5, axis=0), "mask": only("kernel")},
        lambda t: {"kernel": WD * 0.5 ** np.arange(4, 0, -1).reshape(4, 1, 1)},
        {"kernel": "kernel · by_depth"},
    ),
}
TOWARD = {"zero": None, "init": "init", "tree": "tree"}


ALL, ONE = "several devices", "one device"


@pytest.fixture(params=[ALL, slow(ONE)])
def devices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to sum: with several devices, and with one CPU alone, as the monitor is told."""
    monkeypatch.setattr(jax, "device_count", lambda: 1 if request.param == ONE else 8)


# Each anchor, and each kind of rate: known, scheduled and by layer. What else there is differs in numbers.
FAST = {("mask", "zero"), ("table", "init"), ("layers", "tree")}


@pytest.mark.parametrize("devices", [ALL, slow(ONE)], indirect=True)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "toward"),
    [pytest.param(*case, marks=() if case in FAST else pytest.mark.slow) for case in itertools.product(DECAYS, TOWARD)],
)
def test_each_metric_is_that_of_the_oracle(name: str, toward: str, dtype: Any, devices: None) -> None:
    # Compiled or not is the same program; that both work, one row shows.
    run = (lambda f: f) if name == "mask" else jax.jit
    arguments, rates, groups = DECAYS[name]
    start = make_params(dtype)
    anchor = jax.tree.map(lambda p: (0.5 * p.astype(jnp.float32)).astype(p.dtype), start)
    to = anchor if toward == "tree" else TOWARD[toward]
    bare = sgd(LR, wdjax.independent_decay(**arguments, toward=to))
    optimizer = monitor(bare, **arguments, toward=to)
    params, state, bare_state = start, optimizer.init(start), bare.init(start)
    for t in range(3):
        grads = grads_at(params, t)
        updates, state = run(optimizer.update)(grads, state, params)
        plain, bare_state = run(bare.update)(grads, bare_state, params)
        chex.assert_trees_all_equal(updates, plain)
        arrays = {"kernel": ("Dense_0", "kernel"), "bias": ("Dense_0", "bias"), "embed": ("embed",)}
        parts: dict[str, list[Part]] = {}
        for key, path in arrays.items():
            w, u, a = (
                wide(functools.reduce(lambda tree, k: tree[k], path, tree))
                for tree in (params, updates, {"zero": start, "init": start, "tree": anchor}[toward])
            )
            rate = np.asarray(rates(t).get(key, 0.0))
            part = Part(w, u, rate, 0.0 if toward == "zero" else a, np.dtype(dtype), np.dtype(dtype))
            parts.setdefault(groups.get(key, "undecayed"), []).append(part)
        assert set(state.measured) == set(parts)
        for group, members in parts.items():
            if toward == "init" and t == 0:
                assert state.measured[group]["decay_norm"] == 0
                assert state.measured[group]["effective_rate"] == 0
                continue
            compare(state.measured[group], oracle(members), (group, t), dtype)
        params = optax.apply_updates(params, updates)


def test_a_decay_alone_shows_its_rate_as_the_shrinkage_and_no_angle() -> None:
    params = make_params()
    optimizer = monitor(wdjax.sgdw(LR, WD, momentum=0.9), WD, learning_rate=LR)
    _, state = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    got = {name: float(value) for name, value in state.measured["all"].items()}
    for name in ("effective_rate", "shrinkage"):
        np.testing.assert_allclose(got[name], LR * WD, rtol=1e-5)
    np.testing.assert_allclose([got["decay_to_update"], got["decay_landed"]], 1, rtol=1e-4)
    assert got["angular_update"] < 1e-3 * LR * WD
    assert got["rounded_away"] == 0


def test_small_angles_are_precise() -> None:
    for angle in (1e-7, 1e-5, 1e-3, 0.5, 2.0):
        w = jnp.array([3.0, 4.0])
        turn = np.array([[np.cos(angle) - 1, -np.sin(angle)], [np.sin(angle), np.cos(angle) - 1]])
        u = jnp.asarray(turn @ np.array([3.0, 4.0]))
        optimizer = monitor(optax.identity())
        _, state = optimizer.update(u.astype(jnp.float32), optimizer.init(w), w)
        np.testing.assert_allclose(state.measured["undecayed"]["angular_update"], angle, rtol=1e-5)


ETA, LAMBDA, M = 1e-2, 0.2, 0.9
B1, B2 = 0.9, 0.99
ANGLE = np.sqrt(2 * ETA * LAMBDA)
LION = np.sqrt(np.pi / 2) * ANGLE * np.sqrt((1 - B1) ** 2 + B1**2 * (1 - B2) / (1 + B2))
# An optimizer, the RMS of its weights and the angle of its steps in equilibrium, for noise of standard deviation 1.
EQUILIBRIA: dict[str, tuple[Any, float, float]] = {
    "sgdw": (wdjax.sgdw(ETA, LAMBDA), np.sqrt(ETA / (2 * LAMBDA)), ANGLE),
    "sgdw, momentum": (
        wdjax.sgdw(ETA, LAMBDA, momentum=M),
        np.sqrt(ETA / (2 * LAMBDA)) / (1 - M),
        ANGLE * np.sqrt((1 - M) / (1 + M)),
    ),
    "sgd_l2, momentum": (
        wdjax.sgd_l2(ETA, LAMBDA, momentum=M),
        np.sqrt(ETA / (2 * LAMBDA * (1 - M))),
        ANGLE / np.sqrt(1 + M),
    ),
    "adamw": (
        wdjax.adamw(ETA, LAMBDA, b1=B1),
        np.sqrt(ETA / (2 * LAMBDA)),
        ANGLE * np.sqrt((1 - B1) / (1 + B1)),
    ),
    "lion": (
        wdjax.with_decoupled_decay(optax.lion(ETA, B1, B2, weight_decay=0.0), LAMBDA, learning_rate=ETA),
        ETA / LION,
        LION,
    ),
    "scale-invariant": (wdjax.sgdw(ETA, LAMBDA), (ETA / (2 * LAMBDA)) ** 0.25 * 1000**-0.25, ANGLE),
}


@pytest.mark.peers
@pytest.mark.parametrize("name", EQUILIBRIA)
def test_the_equilibria_of_the_documentation(name: str) -> None:
    bare, rms, angle = EQUILIBRIA[name]
    optimizer = monitor(bare, LAMBDA, learning_rate=ETA)

    def step(carry: Any, t: Any) -> Any:
        w, state = carry
        grads = jax.random.normal(jax.random.key(t), w.shape)
        if name == "scale-invariant":  # Then they are across the weights, and the smaller the larger these are.
            grads = (grads - w * (grads @ w) / (w @ w)) / jnp.linalg.norm(w)
        updates, state = optimizer.update(grads, state, w)
        return (w + updates, state), scalars(state)

    w = jnp.full(1000, rms)
    _, history = jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(6000)))((w, optimizer.init(w)))
    mean = {key.partition("/")[2]: values[3000:].mean() for key, values in history.items()}
    rtol = 0.1 if name == "lion" else 0.05  # Lion's is an approximation for a decay that is far slower than b2.
    np.testing.assert_allclose(mean["weight_rms"], rms, rtol)
    np.testing.assert_allclose(mean["angular_update"], angle, rtol)
    np.testing.assert_allclose(mean["shrinkage"], mean["angular_update"] ** 2 / 2, rtol=0.3)
    if name == "adamw":
        np.testing.assert_allclose(mean["decay_to_update"], np.sqrt(ETA * LAMBDA * 19 / 2), rtol=0.05)
        np.testing.assert_allclose(mean["update_norm"], ETA * np.sqrt(1000 / 19), rtol=0.05)


# Groups.


def groups_of(*args: Any, **kwargs: Any) -> set[str]:
    return set(monitor(optax.sgd(LR), *args, **kwargs).init(make_params()).measured)


def test_groups_are_the_deciding_rules_as_plan_names_them() -> None:
    params = {"Dense_0": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "embed": {"embedding": jnp.ones((3, 2))}}
    for rate, mask in [
        (0.1, None),
        (0.1, wdjax.weights_only()),
        (0.1, only("kernel", "embed")),
        (0.1, lambda tree: jax.tree.map(lambda p: p.ndim > 1, tree)),
        (by_path({"kernel": 0.1, re.compile(".*bias"): 0.2}, default=0.0), None),
        (by_path({"kernel": 0.1}, default=0.2), wdjax.all_but("bias")),
        (optax.constant_schedule(0.1) * by_path({"embed": 0.0}, default=1.0), wdjax.weights_only()),
    ]:
        state = monitor(optax.sgd(LR), rate, mask).init(params)
        with_rules = {
            row.rule.replace("'", "") if row.decays else "undecayed"
            for row in quiet_plan(params, rate, mask).parameters
        }
        assert set(state.measured) == with_rules


def quiet_plan(*args: Any) -> wdjax.Plan:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of what decays too much.
        return wdjax.plan(*args)


def test_groups_by_name_and_by_array() -> None:
    names = by_path({"embed": "embeddings"}, default="rest")
    assert groups_of(WD, groups=names) == {"embeddings", "rest"}
    by_array = {"Dense_0/kernel", "Dense_0/bias", "embed"}
    assert groups_of(WD, only("kernel"), groups=lambda leaf: leaf.path) == by_array
    assert groups_of(WD, groups=lambda leaf: f"rank {leaf.ndim}") == {"rank 1", "rank 2", "rank 3"}
    # A group of one that decays and one that doesn't.
    params = make_params()
    optimizer = monitor(sgd(LR, wdjax.independent_decay(WD, only("kernel"))), WD, only("kernel"), groups=names)
    updates, state = optimizer.update(grads_at(params, 0), optimizer.init(params), params)
    members = [(params["Dense_0"][key], updates["Dense_0"][key], rate) for key, rate in (("kernel", WD), ("bias", 0.0))]
    compare(
        state.measured["rest"],
        oracle([Part(wide(w), wide(u), np.asarray(r)) for w, u, r in members]),
        "rest",
        jnp.float32,
    )
    assert state.measured["embeddings"]["decay_norm"] == 0


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        (by_path({"embed": 0.1}, default=0.2), r"groups must be strings, but by_path.* holds 0\.1.*groups=by_path"),
        (only("embed"), r"groups must be strings, but by_path\(.*\) holds True"),
        ("rest", r"groups must be Rules of strings, or a function from a Leaf.*got 'rest'.*lambda leaf: leaf\.path"),
        (str, r"groups must be Rules of strings"),
    ],
    ids=["rates", "a mask", "a text", "a type"],
)
def test_groups_that_are_none(groups: Any, words: str) -> None:
    with pytest.raises(TypeError, match=rf"^monitor: {words}"):
        monitor(optax.sgd(LR), WD, groups=groups)


def test_groups_that_do_not_fit() -> None:
    with pytest.raises(TypeError, match=r"monitor: groups must return a string, but returned 1 for 'Dense_0/bias'"):
        groups_of(groups=lambda leaf: leaf.ndim)
    with pytest.raises(ValueError, match=r"monitor: the pattern 'emmbed' matches no parameter.*'embed'"):
        groups_of(groups=by_path({"emmbed": "a"}, default="b"))
    with pytest.raises(ValueError, match=r"^monitor: .*'Dense_0/(kernel|bias)'"):
        groups_of(groups=by_path({"embed": "a"}))


# What is not measured, and what has no value.


@pytest.mark.usefixtures("devices")
def test_what_has_no_value_is_zero_and_never_nan() -> None:
    params = {"zero": jnp.zeros(3), "still": jnp.ones(3), "empty": jnp.zeros((0, 4))}
    optimizer = monitor(optax.sgd(LR), WD, only("zero", "empty"), groups=lambda leaf: leaf.path)
    for grads in (jax.tree.map(jnp.zeros_like, params), {**params, "zero": jnp.ones(3), "still": jnp.zeros(3)}):
        _, state = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
        assert all(np.isfinite(x) for x in jax.tree.leaves(state.measured))
        assert state.measured["zero"]["angular_update"] == 0
        assert all(x == 0 for x in state.measured["empty"].values())
        assert state.measured["still"]["weight_rms"] == 1
        assert all(state.measured["still"][name] == 0 for name in ("update_norm", "angular_update", "shrinkage"))
    # What is broken shows.
    _, state = optimizer.update(jax.tree.map(lambda p: p * jnp.nan, params), optimizer.init(params), params)
    assert np.isnan(state.measured["still"]["update_norm"])
    assert state.measured["still"]["weight_norm"] == np.float32(np.sqrt(3))


def test_a_known_rate_of_zero_and_a_scheduled_one() -> None:
    params = make_params()
    for rate in (0.0, 1e-60, jnp.array(0.0), lambda count: 0.0 * jnp.asarray(count, jnp.float32), lambda count: 0.0):
        optimizer = monitor(optax.sgd(LR), rate)
        _, state = jax.jit(optimizer.update)(grads_at(params, 0), optimizer.init(params), params)
        (group,) = state.measured.values()
        assert all(group[name] == 0 for name in OF_DECAY)
        assert all(group[name] != 0 for name in SIZED)
    assert set(monitor(optax.sgd(LR)).init(params).measured) == {"undecayed"}


def test_integers_keys_and_holes_are_not_counted() -> None:
    numbers = {"w": jnp.array([3.0, 4.0]), "frozen": jnp.array([12.0])}
    others = {"int": jnp.arange(3), "key": jax.random.key(0), "none": None, "masked": optax.MaskedNode()}
    params = {**numbers, **others}
    updates = {**params, "w": jnp.array([0.6, 0.8]), "frozen": None, "int": np.zeros(3, jax.dtypes.float0)}
    optimizer = monitor(optax.identity(), WD, toward="init")
    state = optimizer.init(params)
    new, after = optimizer.update(updates, state, params)
    assert all(new[name] is updates[name] for name in params)
    assert set(after.measured) == {"all"}
    np.testing.assert_allclose(after.measured["all"]["weight_norm"], 13)
    np.testing.assert_allclose(after.measured["all"]["weight_rms"], 13 / np.sqrt(3))
    np.testing.assert_allclose(after.measured["all"]["update_norm"], 1)
    chex.assert_trees_all_equal_structs(state, after)
    for groups in (by_path({"w": "a"}, default="b"), lambda leaf: "a" if leaf.path == "w" else "b"):
        by_name = monitor(optax.identity(), groups=groups)
        assert set(by_name.init({**others, "w": numbers["w"]}).measured) == {"a"}
    assert monitor(optax.identity()).init({"int": jnp.arange(3)}).measured == {}
    empty = monitor(optax.identity())
    assert scalars(empty.update({"n": None}, empty.init({"n": None}), {"n": None})[1]) == {}


@pytest.mark.usefixtures("devices")
def test_complex_weights() -> None:
    # Of one phase, so that the metrics are those of the moduli.
    w, g = (np.random.default_rng(0).normal(size=50) for _ in range(2))
    phase = np.exp(0.7j)
    results = []
    for factor, dtype in ((1.0, jnp.float32), (phase, jnp.complex64)):
        params, grads = jnp.asarray(w * factor, dtype), jnp.asarray(np.cos(5 * g) * factor, dtype)
        optimizer = monitor(sgd(LR, wdjax.independent_decay(SCHEDULE)), SCHEDULE)
        _, state = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
        results.append(state.measured["all"])
    del results[0]["rounded_away"], results[1]["rounded_away"]  # None of a modulus, but of single parts.
    chex.assert_trees_all_close(*results, rtol=1e-5)
    assert all(x.dtype == jnp.float32 and np.isreal(x) for x in results[1].values())


@pytest.mark.usefixtures("x64", "devices")
@pytest.mark.parametrize("dtypes", [(jnp.float64, jnp.float64), (jnp.float32, jnp.float64)], ids=["both", "update"])
def test_float64_is_summed_in_float64_and_the_metrics_are_float32(dtypes: Any) -> None:
    w, u = np.full(1000, 1 + 1e-9), np.full(1000, -1e-9)
    params, updates = jnp.asarray(w, dtypes[0]), jnp.asarray(u, dtypes[1])
    optimizer = monitor(optax.identity(), 1e-9)
    state = optimizer.init(params)
    _, after = jax.jit(optimizer.update)(updates, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
    # In float64 the decay lands, in float32 it is rounded away.
    wanted = (0.0, 1.0) if dtypes[0] == jnp.float64 else (1.0, 0.0)
    got = (after.measured["all"]["rounded_away"], after.measured["all"]["decay_landed"])
    np.testing.assert_allclose(got, wanted, atol=1e-6)
    np.testing.assert_allclose(after.measured["all"]["update_norm"], np.linalg.norm(u), rtol=1e-6)


# Rounding.


@pytest.mark.filterwarnings("ignore:.*the decay rounds to nothing")
@pytest.mark.peers
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=str)
@pytest.mark.parametrize("decays", [1e-5, slow(1e-9)])
def test_decay_that_rounds_away(dtype: Any, decays: float) -> None:
    params = jnp.asarray(np.random.default_rng(0).uniform(0.5, 1.5, 1000), dtype)
    inner = wdjax.in_float32(optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(0.0)))
    bare = optax.chain(inner, wdjax.independent_decay(lambda count: jnp.float32(decays)))
    optimizer = monitor(wdjax.in_float32(bare), decays)
    updates, state = jax.jit(optimizer.update)(params, optimizer.init(params), params)
    still = np.mean(np.asarray(optax.apply_updates(params, updates) == params))
    is_kept = dtype == jnp.float32 and decays > 1e-8
    assert still == (0.0 if is_kept else 1.0)
    got = state.measured["all"]
    np.testing.assert_allclose(got["rounded_away"], still)
    np.testing.assert_allclose(got["decay_landed"], 1 - still, rtol=1e-2)
    np.testing.assert_allclose(got["effective_rate"], decays, rtol=1e-5)
    np.testing.assert_allclose(got["shrinkage"], decays if dtype == jnp.float32 else 0.0, rtol=1e-3)


def test_a_decay_lost_in_the_update_itself_is_rounded_away_as_well() -> None:
    # A float32 weight would keep it; the update, in bfloat16, is the gradient's part alone.
    params, grads = jnp.ones(100), jnp.full(100, 1e-2, jnp.bfloat16)
    optimizer = monitor(sgd(1.0, wdjax.independent_decay(lambda count: jnp.float32(1e-5))), 1e-5)
    updates, state = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    assert updates.dtype == jnp.bfloat16
    assert (state.measured["all"]["rounded_away"], state.measured["all"]["decay_landed"]) == (1, 0)


@pytest.mark.usefixtures("devices")
def test_noise_that_dithers_lets_the_decay_land() -> None:
    # The decay is a 50th of the distance of two weights, so 98% of the weights don't see it in a step; but gradients
    # take each weight near the middle of two neighbours once in a while, and then the decay decides.
    rng = np.random.default_rng(0)
    params = jnp.asarray(rng.uniform(0.5, 1.0, 200_000), jnp.bfloat16)
    rate = 2.0**-8 / 50 / 0.75
    action = wdjax.independent_decay(lambda count: jnp.float32(rate))
    optimizer = monitor(wdjax.in_float32(optax.chain(optax.identity(), action)), rate)
    noise = jnp.asarray(rng.normal(size=200_000) * 0.02, jnp.float32)
    _, state = jax.jit(optimizer.update)(noise, optimizer.init(params), params)
    assert 0.95 < state.measured["all"]["rounded_away"] < 0.99
    np.testing.assert_allclose(state.measured["all"]["decay_landed"], 1, atol=0.1)


WRITERS: dict[str, Callable[[], Any]] = {
    "stochastic_rounding": lambda: wdjax.stochastic_rounding(seed=0),
    "compensated": wdjax.compensated,
    "master_weights": wdjax.master_weights,
}


@pytest.mark.filterwarnings("ignore:independent_decay")  # Without a writer it does.
@pytest.mark.parametrize("writer", WRITERS)
def test_behind_a_writer_nothing_is_rounded_away(writer: str) -> None:
    params = {"low": jnp.ones(4000, jnp.bfloat16), "single": jnp.ones(1000)}
    rate = 1e-9
    chain = [wdjax.in_float32(sgd(0.0, wdjax.independent_decay(lambda count: jnp.float32(rate)))), WRITERS[writer]()]
    optimizer = monitor(optax.chain(*chain), rate, groups=lambda leaf: leaf.path)
    updates, state = jax.jit(optimizer.update)(params, optimizer.init(params), params)
    # A single weight of float32 is written by `compensated` alone.
    for name in ("low", "single"):
        lost = name == "single" and writer != "compensated"
        got = (state.measured[name]["rounded_away"], state.measured[name]["decay_landed"])
        np.testing.assert_allclose(got, (1, 0) if lost else (0, 1), rtol=1e-6)
    got = state.measured["low"]["update_norm"]
    np.testing.assert_allclose(got, np.linalg.norm(wide(updates["low"])), rtol=1e-5)


@pytest.mark.usefixtures("devices")
def test_float8_parameters() -> None:
    params = jnp.asarray(np.linspace(0.1, 400, 500), jnp.float8_e4m3fn)
    optimizer = monitor(wdjax.in_float32(sgd(0.0, wdjax.independent_decay(lambda count: jnp.float32(0.05)))), 0.05)
    updates, state = jax.jit(optimizer.update)(params, optimizer.init(params), params)
    part = Part(wide(params), wide(updates), np.float32(0.05), 0.0, ml_dtypes.float8_e4m3fn)
    compare(state.measured["all"], oracle([part]), "float8", params.dtype)
    landed = wdjax.apply_updates(params, updates)
    assert state.measured["all"]["rounded_away"] == np.mean(wide(landed) == wide(params)) > 0.1


# Steps.


def run(optimizer: Any, grads: Sequence[Any], params: Any) -> list[dict[str, Any]]:
    state, seen = optimizer.init(params), []
    step = jax.jit(optimizer.update)
    for grad in grads:
        updates, state = step(grad, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(jax.device_get(scalars(state)))
    return seen


@pytest.mark.peers
@pytest.mark.parametrize("where", ["within", slow("around")])
def test_multi_steps_keeps_the_metrics_of_the_last_real_step(where: str) -> None:
    params = make_params()
    adamw = wdjax.adamw(LR, SCHEDULE)
    grads = [grads_at(params, 0)] * 6
    if where == "within":
        optimizer = monitor(optax.MultiSteps(adamw, 3), SCHEDULE, learning_rate=LR)
    else:
        optimizer = optax.MultiSteps(monitor(adamw, SCHEDULE, learning_rate=LR), 3)
    seen = run(optimizer, grads, params)
    want = run(monitor(adamw, SCHEDULE, learning_rate=LR), grads[:2], params)
    for step, got in enumerate(seen):
        expected = dict.fromkeys(got, 0.0) if step < 2 else want[0] if step < 5 else want[1]
        chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-6)
    rates = [got["all/effective_rate"] for got in seen]
    np.testing.assert_allclose(rates, [0, 0, *[LR * 0.1] * 3, LR * 0.09], rtol=1e-5)


@pytest.mark.peers
@pytest.mark.parametrize("where", ["within", slow("around")])
def test_apply_if_finite_keeps_the_metrics_of_the_last_finite_step(where: str) -> None:
    params = make_params()
    adamw = wdjax.adamw(LR, SCHEDULE)
    good, bad = grads_at(params, 0), jax.tree.map(lambda p: p * jnp.nan, params)
    if where == "within":
        optimizer = monitor(optax.apply_if_finite(adamw, 5), SCHEDULE, learning_rate=LR)
    else:
        optimizer = optax.apply_if_finite(monitor(adamw, SCHEDULE, learning_rate=LR), 5)
    seen = run(optimizer, [good, bad, bad, good], params)
    chex.assert_trees_all_equal(seen[0], seen[1], seen[2])
    # In float32, rounded twice in the schedule and once in the product.
    rates = [got["all/effective_rate"] for got in seen]
    np.testing.assert_allclose(rates, LR * np.array([0.1, 0.1, 0.1, 0.09]), rtol=3 * 2**-24)
    assert seen[3]["all/weight_norm"] != seen[0]["all/weight_norm"]


@pytest.mark.peers
def test_nothing_changes_in_the_updates_nor_in_the_state_within() -> None:
    params = make_params()
    for bare in (wdjax.adamw(LR, WD), optax.MultiSteps(optax.lion(LR), 2), optax.chain(optax.clip(0.1), optax.sgd(LR))):
        bare = bare.gradient_transformation() if isinstance(bare, optax.MultiSteps) else bare
        optimizer = monitor(bare, WD, learning_rate=LR)
        state, plain_state = optimizer.init(params), bare.init(params)
        for step in range(3):
            new_state, new_plain_state = state, plain_state
            for wrap in (lambda f: f, jax.jit) if step == 1 else (jax.jit,):  # MultiSteps makes its step then.
                updates, new_state = wrap(optimizer.update)(grads_at(params, step), state, params)
                plain, new_plain_state = wrap(bare.update)(grads_at(params, step), plain_state, params)
                chex.assert_trees_all_equal(updates, plain)
                chex.assert_trees_all_equal(new_state.inner_state, new_plain_state)
            state, plain_state = new_state, new_plain_state


def test_what_the_decay_within_warns_of_is_told_once() -> None:
    tied = jnp.ones(2, jnp.bfloat16)
    with pytest.warns(UserWarning, match="independent_decay") as told:
        monitor(optax.chain(optax.sgd(LR), wdjax.independent_decay(1e-4)), 1e-4).init({"a": tied, "b": tied})
    assert sorted(str(each.message).partition(":")[0] for each in told) == ["independent_decay"] * 2


def test_extra_arguments_reach_the_optimizer() -> None:
    seen = {}

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        seen.update(extra)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)
    params = make_params()
    optimizer = monitor(inner)
    state = optimizer.init(params)
    optimizer.update(params, state, params, value=3, other=4)
    assert seen.pop("decay_probe").gate.shape == ()  # With it, decays report.
    assert seen == {"value": 3, "other": 4}
    seen.clear()
    monitor(inner, 0.0).update(params, state, params, value=3)
    assert seen == {"value": 3}


# Transformations of JAX, and libraries.


def test_one_trace_and_one_state_from_init_on() -> None:
    params = make_params()
    optimizer = monitor(sgd(LR, wdjax.independent_decay(SCHEDULE)), SCHEDULE, toward="init")
    states = [optimizer.init(params)]

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(state: Any, params: Any) -> Any:
        return optimizer.update(params, state, params)

    chex.clear_trace_counter()
    for _ in range(3):
        _, state = step(states[-1], params)
        states.append(state)
    chex.assert_trees_all_equal_shapes_and_dtypes(*states)
    chex.assert_trees_all_equal_structs(*states)
    assert all(x.shape == () and x.dtype == jnp.float32 for x in jax.tree.leaves(states[0].measured))


@pytest.mark.usefixtures("devices")
def test_scan_vmap_donation_and_pmap() -> None:
    params = make_params()

    def optimizer_of(rate: Any) -> Any:
        return monitor(sgd(LR, wdjax.independent_decay(rate)), rate)

    def end(rate: Any, params: Any) -> Any:
        optimizer = optimizer_of(rate)

        def step(carry: Any, t: Any) -> Any:
            weights, state = carry
            grads = jax.tree.map(lambda p: jnp.cos(37 * p), weights)
            updates, state = optimizer.update(grads, state, weights)
            return (optax.apply_updates(weights, updates), state), scalars(state)

        return jax.lax.scan(step, (params, optimizer.init(params)), length=4)

    rates = jnp.array([0.1, 0.02])
    _, history = jax.jit(end)(rates[0], params)
    assert history["all/weight_norm"].shape == (4,)
    _, many = jax.vmap(end, (0, None))(rates, params)
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[0], many), history, rtol=1e-4)
    np.testing.assert_allclose(many["all/effective_rate"], np.repeat(rates[:, None], 4, 1), rtol=1e-5)

    optimizer = optimizer_of(0.1)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any) -> Any:
        updates, state = optimizer.update(jax.tree.map(lambda p: jnp.cos(37 * p), params), state, params)
        return optax.apply_updates(params, updates), state

    weights = jax.tree.map(jnp.copy, params)
    state = optimizer.init(weights)
    for t in range(4):
        weights, state = step(weights, state)
        for name, value in scalars(state).items():
            np.testing.assert_allclose(value, history[name][t], rtol=1e-3, atol=1e-5)

    stacked = jax.tree.map(lambda x: np.stack([np.asarray(x)] * 8), (params, optimizer.init(params), params))
    _, state = jax.pmap(lambda g, s, p: optimizer.update(g, s, p))(*stacked)
    replicas = jax.device_get(scalars(state))
    assert all(x.shape == (8,) and len(set(x.tolist())) == 1 for x in replicas.values())


@pytest.mark.usefixtures("x64", "devices")
def test_the_metrics_are_constants_to_a_derivative() -> None:
    params = jnp.array([1.0, -2.0])

    def end(rate: Any, wrap: Any) -> Any:
        optimizer = wrap(wdjax.independent_decay(rate), rate)

        def step(carry: Any, _: Any) -> Any:
            weights, state = carry
            updates, state = optimizer.update(jnp.zeros_like(weights), state, weights)
            return (weights + updates, state), None

        (weights, state), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=3)
        measured = jnp.stack(list(scalars(state).values())) if isinstance(state, MonitorState) else jnp.zeros(1)
        return jnp.sum(weights) + jnp.sum(measured.astype(jnp.float64))

    for rate in (0.0, 0.1):
        slopes = [jax.grad(end)(rate, wrap) for wrap in (monitor, lambda optimizer, rate: optimizer)]
        np.testing.assert_allclose(*slopes)
        assert slopes[0] != 0


@pytest.mark.peers
def test_rates_that_are_injected_are_followed() -> None:
    params = make_params()

    @optax.inject_hyperparams
    def build(learning_rate: Any) -> Any:
        return monitor(wdjax.adamw(learning_rate, WD), WD, learning_rate=learning_rate)

    optimizer = build(learning_rate=LR)
    state = optimizer.init(params)
    for learning_rate in (LR, 0.01):
        state.hyperparams["learning_rate"] = jnp.asarray(learning_rate)
        _, state = jax.jit(optimizer.update)(params, state, params)
        np.testing.assert_allclose(scalars(state)["all/effective_rate"], learning_rate * WD, rtol=1e-5)


@pytest.mark.peers
def test_frozen_parameters_are_not_counted() -> None:
    params = make_params()
    optimizer = wdjax.freeze(
        monitor(wdjax.adamw(LR, WD, only("kernel", "embed")), WD, only("kernel", "embed"), learning_rate=LR),
        only("embed"),
    )
    _, state = jax.jit(optimizer.update)(params, optimizer.init(params), params)
    assert set(state.measured) == {"kernel", "undecayed"}
    np.testing.assert_allclose(
        state.measured["kernel"]["weight_norm"], jnp.linalg.norm(params["Dense_0"]["kernel"].ravel()), rtol=1e-6
    )


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(3)(nn.LayerNorm()(x))


@pytest.mark.peers
def test_a_train_state_of_linen() -> None:
    model, x = Net(), jnp.ones((2, 4))
    mask = wdjax.weights_only()
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), monitor(wdjax.adamw(LR, WD, mask), WD, mask))
    state = TrainState.create(apply_fn=model.apply, params=model.init(jax.random.key(0), x)["params"], tx=optimizer)
    norm = jnp.linalg.norm(state.params["Dense_0"]["kernel"].ravel())

    @jax.jit
    def step(state: TrainState) -> Any:
        grads = jax.grad(lambda params: jnp.sum(model.apply({"params": params}, x) ** 2))(state.params)
        state = state.apply_gradients(grads=grads)
        return state, scalars(state, "train/")

    state, logged = step(state)
    chex.assert_trees_all_equal(logged, scalars(state, "train/"), scalars(state.opt_state, "train/"))
    names = {f"{group}/{name}" for group in ("weights_only", "undecayed") for name in METRICS}
    assert set(logged) == {f"train/{name}" for name in (*names, "weights_only/weight_decay")}
    np.testing.assert_allclose(logged["train/weights_only/weight_norm"], norm, rtol=1e-6)


@pytest.mark.peers
def test_an_optimizer_of_nnx() -> None:
    class Model(nnx.Module):
        def __init__(self) -> None:
            self.linear = nnx.Linear(4, 3, rngs=nnx.Rngs(0))

    model = Model()
    norm = jnp.linalg.norm(model.linear.kernel[...].ravel())
    optimizer = nnx.Optimizer(model, monitor(wdjax.adamw(LR, WD, only("kernel")), WD, only("kernel")), wrt=nnx.Param)

    @nnx.jit
    def step(model: Model, optimizer: nnx.Optimizer) -> None:
        grads = nnx.grad(lambda model: jnp.sum(model.linear(jnp.ones((1, 4))) ** 2))(model)
        optimizer.update(model, grads)

    step(model, optimizer)
    step(model, optimizer)
    for holder in (optimizer, optimizer.opt_state, nnx.state(optimizer)):
        logged = jax.device_get(scalars(holder))
        names = {f"{group}/{name}" for group in ("kernel", "undecayed") for name in METRICS}
        assert set(logged) == {*names, "kernel/weight_decay"}
        assert all(isinstance(x, (np.ndarray, np.generic)) and x.dtype == np.float32 for x in logged.values())
        np.testing.assert_allclose(logged["kernel/weight_norm"], norm, rtol=0.5)


@pytest.mark.peers
def test_equinox() -> None:
    model = eqx.nn.MLP(4, 3, 5, 1, key=jax.random.key(0))
    optimizer = monitor(wdjax.adamw(LR, WD, only("weight")), WD, only("weight"), learning_rate=LR)
    state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model: Any, state: Any) -> Any:
        grads = eqx.filter_grad(lambda model: jnp.sum(model(jnp.ones(4)) ** 2))(model)
        updates, state = optimizer.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state

    model, state = step(model, state)
    assert set(state.measured) == {"weight", "undecayed"}
    np.testing.assert_allclose(scalars(state)["weight/effective_rate"], LR * WD, rtol=1e-5)


# Cost.


def big_sums(jaxpr: Any, size: int) -> int:
    """How many reductions of arrays of this size are in a program, with those in what it calls."""
    count = 0
    for equation in jaxpr.eqns:
        assert "callback" not in equation.primitive.name
        is_sum = equation.primitive.name.startswith("reduce_") and equation.primitive.name != "reduce_precision"
        count += is_sum and any(getattr(x.aval, "size", 0) == size for x in equation.invars)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
            if hasattr(inner, "jaxpr"):
                count += big_sums(inner.jaxpr, size)
    return count


@pytest.mark.parametrize(
    ("arguments", "dtype", "sums"),
    [
        ({}, jnp.float32, 3),
        ({"weight_decay": WD}, jnp.float32, 6),
        ({"weight_decay": SCHEDULE}, jnp.bfloat16, 7),
        ({"weight_decay": WD, "toward": "init"}, jnp.float32, 7),
    ],
    ids=["no decay", "decay", "bfloat16", "anchor"],
)
def test_each_array_is_summed_a_few_times_and_nothing_is_called_back(arguments: Any, dtype: Any, sums: int) -> None:
    # As plain sums: those of one array XLA makes one loop of on GPUs and TPUs, and one all-reduce of all.
    params = jnp.ones((257, 31), dtype)
    optimizer = monitor(optax.scale(-LR), **arguments)
    traced = jax.make_jaxpr(optimizer.update)(params, optimizer.init(params), params)
    assert big_sums(traced.jaxpr, params.size) == sums


@pytest.mark.peers
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_on_one_cpu_parameters_and_updates_are_read_once_more(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if dtype == jnp.bfloat16 and jax.__version_info__ < (0, 9):
        pytest.skip("XLA of JAX 0.8 reads bfloat16 arrays more often")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    params = {name: jnp.ones((500, 400), dtype) for name in "abc"}
    bare = wdjax.adamw(LR, SCHEDULE)
    costs = []
    for optimizer in (bare, monitor(bare, SCHEDULE, learning_rate=LR)):

        def step(params: Any, state: Any, optimizer: Any = optimizer) -> Any:
            updates, state = optimizer.update(params, state, params)
            return optax.apply_updates(params, updates), state

        compiled = jax.jit(step).lower(params, optimizer.init(params)).compile()
        array = params["a"].nbytes
        cost: Any = compiled.cost_analysis()
        memory: Any = compiled.memory_analysis()
        costs.append((cost["bytes accessed"] / array / 3, memory.temp_size_in_bytes / array / 3))
    # The update is written, and read by two loops, those of the sums and of the new parameters, not by one of both; so
    # are the parameters. Without the monitor the update is never in memory at all.
    assert costs[1][0] - costs[0][0] < 5.1
    assert costs[1][1] < 1.1


@pytest.mark.filterwarnings("ignore:.*the decay rounds to nothing")
@pytest.mark.slow
@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_ten_million_weights_are_summed_to_five_digits(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    params, grads = (jnp.asarray(rng.normal(size=10_000_019) + 0.5, dtype) for _ in range(2))
    optimizer = monitor(sgd(1e-3, wdjax.independent_decay(lambda count: jnp.float32(1e-3))), 1e-3)
    updates, state = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    part = Part(wide(params), wide(updates), np.float32(1e-3), 0.0, np.dtype(dtype), np.dtype(dtype))
    compare(state.measured["all"], oracle([part]), "ten million", dtype, rtol=1e-5)


@pytest.mark.parametrize("spec", [P("data"), slow(P(None, "data")), slow(P())], ids=["rows", "columns", "replicated"])
def test_sharded_arrays_need_one_all_reduce_of_scalars(spec: Any) -> None:
    mesh = Mesh(np.array(jax.devices()), ("data",))
    shapes = {"a": {"kernel": (64, 32)}, "b": {"kernel": (32, 64)}, "c": {"scale": (64, 8)}}
    rng = np.random.default_rng(0)
    made = jax.tree.map(
        lambda shape: rng.normal(size=shape).astype(np.float32), shapes, is_leaf=lambda x: type(x) is tuple
    )
    params = jax.device_put(made, NamedSharding(mesh, spec))
    optimizer = monitor(sgd(LR, wdjax.independent_decay(SCHEDULE, only("kernel"))), SCHEDULE, only("kernel"))
    state, grads = optimizer.init(params), grads_at(params, 0)
    compiled = jax.jit(optimizer.update).lower(grads, state, params).compile()
    text = compiled.as_text()
    for name in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter", "custom-call"):
        assert name + "(" not in text
    reduced = re.findall(r"= (.*) all-reduce(?:-start)?\(", text)
    assert len(reduced) == (0 if spec == P() else 1)
    for shape in re.findall(r"f32\[([\d,]*)\]", "".join(reduced)):
        assert shape == ""
    updates, state = compiled(grads, state, params)
    _, alone = jax.jit(optimizer.update)(grads, optimizer.init(made), made)
    chex.assert_trees_all_close(jax.device_get(state.measured), jax.device_get(alone.measured), rtol=1e-5, atol=1e-6)
    assert updates["a"]["kernel"].sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(state.measured))


# scalars, and errors.


def test_scalars_of_several_monitors() -> None:
    params = make_params()
    names = by_path({"embed": "embeddings"}, default="rest").values
    parts = {"embeddings": monitor(optax.sgd(LR), WD, groups=lambda leaf: "embeddings"), "rest": monitor(optax.sgd(LR))}
    state = optax.partition(parts, names).init(params)
    assert {key.partition("/")[0] for key in scalars(state)} == {"embeddings", "undecayed"}
    nested = monitor(optax.chain(monitor(optax.sgd(LR)), optax.scale(0.5)), WD).init(params)
    assert {key.partition("/")[0] for key in scalars(nested)} == {"all", "undecayed"}
    twice = optax.partition({"embeddings": monitor(optax.sgd(LR)), "rest": monitor(optax.sgd(LR))}, names).init(params)
    with pytest.raises(
        ValueError, match=r"2 monitors in this state measure 'undecayed/.*Give their groups different names"
    ):
        scalars(twice)


def test_scalars_without_a_monitor() -> None:
    with pytest.raises(ValueError, match=r"no MonitorState in this state\. Wrap the optimizer before init: monitor\("):
        scalars(optax.adam(LR).init(make_params()))


def test_errors() -> None:
    params = make_params()
    with pytest.raises(TypeError, match=r"monitor: optimizer must be a finished Optax optimizer, got 0\.1"):
        monitor(0.1)
    with pytest.raises(ValueError, match=r"monitor: weight_decay must be finite and not negative, got -0\.1"):
        monitor(optax.sgd(LR), -0.1)
    with pytest.raises(TypeError, match=r"monitor\(\) has no argument 'lr'.*Did you mean learning_rate="):
        monitor(optax.sgd(LR), WD, lr=LR)
    with pytest.raises(ValueError, match=r"monitor: the pattern 'kernle' matches no parameter"):
        monitor(optax.sgd(LR), WD, only("kernle")).init(params)
    optimizer = monitor(optax.sgd(LR), WD)
    state = optimizer.init(params)
    with pytest.raises(ValueError, match=r"^monitor needs the parameters.*optimizer\.update\(grads, state, params\)"):
        optimizer.update(params, state)
    reshaped = {**params, "embed": params["embed"].T}
    with pytest.raises(ValueError, match=r"monitor: the update of 'embed' has shape \(8, 50\)"):
        optimizer.update(reshaped, state, params)
    with pytest.raises(ValueError, match=r"monitor: updates and params are trees of different structure"):
        optimizer.update({"embed": params["embed"]}, state, params)


def test_an_eager_step_compiles_nothing_anew() -> None:
    params = make_params()
    optimizer = monitor(optax.sgd(LR), WD, learning_rate=LR)
    state = optimizer.init(params)
    with jax.default_device(jax.devices()[0]):
        for _ in range(2):
            _, state = optimizer.update(grads_at(params, 0), state, params)
        size = _sums._totals._cache_size()
        optimizer.update(grads_at(params, 0), state, params)
        assert _sums._totals._cache_size() == size > 0
