"""The promises that every transformation keeps, checked on each row of the registry."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from registry import (
    ANCHOR,
    ANCHORED,
    ROWS,
    Row,
    core_anchored,
    core_decay,
    core_first,
    core_row,
    every_decay,
    every_row,
)
from slow import slow

import wdjax

RATE = 0.3
RATES = {
    "number": RATE,
    "NumPy scalar": np.float32(RATE),
    "0-d array": jnp.array(RATE, jnp.float32),
    "schedule": lambda count: 0.1 * jnp.asarray(count + 1, jnp.float32),
    "Python schedule": lambda count: RATE,
}
TOLERANCE = {jnp.float32: {"rtol": 2e-6, "atol": 1e-6}, jnp.bfloat16: {"rtol": 2**-7, "atol": 2**-8}}


def make_params(dtype: Any = jnp.float32) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(4, 3))
    kernel[0, 0] = 0.0
    return {"Dense_0": {"kernel": jnp.asarray(kernel, dtype), "bias": jnp.asarray(rng.normal(size=3), dtype)}}


def make_updates(dtype: Any = jnp.float32) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    kernel = rng.normal(size=(4, 3))
    kernel[1] = 0.0
    return {"Dense_0": {"kernel": jnp.asarray(kernel, dtype), "bias": jnp.asarray(rng.normal(size=3), dtype)}}


def float64(tree: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(x).astype(np.float64), tree)


def expected(row: Row, updates: Any, params: Any, rate: float = RATE, anchor: float = 0.0) -> Any:
    return jax.tree.map(lambda u, w: row.oracle(u, w, rate, anchor), float64(updates), float64(params))


def expected_by_path(row: Row, updates: Any, params: Any, **rates: float) -> Any:
    return {"Dense_0": {key: expected(row, updates, params, rate)["Dense_0"][key] for key, rate in rates.items()}}


def state_of(row: Row, rate: Any, params: Any, **kwargs: Any) -> Any:
    return row.build(rate, **kwargs).init(params)


def run_eager(optimizer: Any, updates: Any, state: Any, params: Any) -> Any:
    return optimizer.update(updates, state, params)


def run_jit(optimizer: Any, updates: Any, state: Any, params: Any) -> Any:
    return jax.jit(optimizer.update)(updates, state, params)


def run_pmap(optimizer: Any, updates: Any, state: Any, params: Any) -> Any:
    devices = jax.local_device_count()
    assert devices == 8
    stacked = jax.tree.map(lambda x: np.stack([np.asarray(x)] * devices), (updates, state, params))
    results = jax.device_get(jax.pmap(optimizer.update, axis_name="batch")(*stacked))
    replicas = [jax.tree.map(lambda x, i=i: x[i], results) for i in range(devices)]
    chex.assert_trees_all_equal(*replicas)
    return replicas[0]


RUNS = {"eager": run_eager, "jit": run_jit, "pmap": run_pmap}


# Compiled and in float32 on every row; un-jitted, on replicas and in bfloat16 is what the engine makes of the same.
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
CLOSED_FORMS = [
    pytest.param(
        row,
        RUNS[run],
        DTYPES[dtype],
        id=f"{dtype}-{run}-{row.name}",
        marks=() if row.core or (run, dtype) == ("jit", "float32") else pytest.mark.slow,
    )
    for dtype in DTYPES
    for run in RUNS
    for row in ROWS
]
ANCHORED_FORMS = [
    pytest.param(
        row,
        DTYPES[dtype],
        id=f"{dtype}-{row.name}",
        marks=() if row.core or dtype == "float32" else pytest.mark.slow,
    )
    for dtype in DTYPES
    for row in ANCHORED
]


@pytest.mark.parametrize(("row", "run", "dtype"), CLOSED_FORMS)
def test_closed_form(row: Row, run: Any, dtype: Any) -> None:
    params, updates = make_params(dtype), make_updates(dtype)
    for name, rate in RATES.items():
        optimizer = row.build(rate)
        state = optimizer.init(params)
        steps = [0.1, 0.2, 0.3] if name == "schedule" else [RATE]
        for value in steps:
            new, new_state = run(optimizer, updates, state, params)
            chex.assert_trees_all_equal_shapes_and_dtypes(new, updates)
            chex.assert_trees_all_equal_structs(new_state, state)
            chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
            chex.assert_trees_all_close(float64(new), expected(row, updates, params, value), **TOLERANCE[dtype])
            state = new_state


@pytest.mark.parametrize(("row", "dtype"), ANCHORED_FORMS)
def test_toward_a_tree_and_toward_init(row: Row, dtype: Any) -> None:
    params, updates = make_params(dtype), make_updates(dtype)
    start = jax.tree.map(lambda p: jnp.full_like(p, ANCHOR), params)
    by_tree, by_init = row.build(RATE, toward=start), row.build(RATE, toward="init")
    want = expected(row, updates, params, anchor=ANCHOR)
    for optimizer, state in ((by_tree, by_tree.init(params)), (by_init, by_init.init(start))):
        new, new_state = jax.jit(optimizer.update)(updates, state, params)
        chex.assert_trees_all_close(float64(new), want, **TOLERANCE[dtype])
        chex.assert_trees_all_equal_shapes_and_dtypes(new, updates)
        chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
    again, _ = by_init.update(updates, new_state, params)
    chex.assert_trees_all_close(float64(again), want, **TOLERANCE[dtype])


@every_row
def test_mixed_dtypes_keep_the_dtype_of_the_update(row: Row) -> None:
    for update_dtype, param_dtype in ((jnp.bfloat16, jnp.float32), (jnp.float32, jnp.bfloat16)):
        params, updates = make_params(param_dtype), make_updates(update_dtype)
        optimizer = row.build(RATE)
        new, _ = optimizer.update(updates, optimizer.init(params), params)
        chex.assert_trees_all_equal_shapes_and_dtypes(new, updates)
        chex.assert_trees_all_close(float64(new), expected(row, updates, params), **TOLERANCE[update_dtype])


@core_row
@pytest.mark.usefixtures("x64")
def test_float64_parameters_are_decayed_in_float64(row: Row) -> None:
    params, updates = make_params(jnp.float64), make_updates(jnp.float64)
    third = 1 / 3  # Not a float32.
    rates = (third, np.float64(third), jnp.array(third, jnp.float64), lambda count: jnp.asarray(third, jnp.float64))
    for rate in rates:
        optimizer = row.build(rate)
        state = optimizer.init(params)
        new, new_state = jax.jit(optimizer.update)(updates, state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(new, updates)
        chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
        chex.assert_trees_all_close(new, expected(row, updates, params, third), rtol=1e-14, atol=1e-15)


@core_row
@pytest.mark.usefixtures("x64")
def test_the_x64_flag_changes_no_float32_result(row: Row) -> None:
    params, updates = make_params(), make_updates()
    scheduled = [lambda count, dtype=dtype: jnp.asarray(RATE, dtype) for dtype in (jnp.float64, jnp.float32)]
    for rate, in_float32 in ((RATE, RATE), (np.float64(RATE), RATE), scheduled):
        optimizer = row.build(rate)
        new, new_state = optimizer.update(updates, optimizer.init(params), params)
        chex.assert_trees_all_equal_shapes_and_dtypes(new, updates)
        with jax.enable_x64(False):
            plain = row.build(in_float32)
            reference, state = plain.update(updates, plain.init(params), params)
        chex.assert_trees_all_equal(new, reference)
        chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)


@core_row
def test_one_state_structure_for_every_rate_and_mask(row: Row) -> None:
    params, updates = make_params(), make_updates()
    masks: dict[str, Any] = {
        "none": None,
        "rules": wdjax.only("kernel"),
        "tree": {"Dense_0": {"kernel": True, "bias": False}},
        "prefix": {"Dense_0": False},
        "function": lambda tree: jax.tree.map(lambda p: p.ndim > 1, tree),
    }
    table = wdjax.by_path({"bias": 0.0, "kernel": lambda count: RATE})
    optimizers = [row.build(rate) for rate in (*RATES.values(), 0.0, table)]
    optimizers += [row.build(RATE, mask) for mask in masks.values()]
    states = [optimizer.init(params) for optimizer in optimizers]
    chex.assert_trees_all_equal_shapes_and_dtypes(*states)
    chex.assert_trees_all_equal_structs(*states)
    # A state taken with one setting serves every other.
    _, state = optimizers[0].update(updates, states[0], params)
    for optimizer in optimizers:
        _, after = optimizer.update(updates, state, params)
        assert optax.tree.get(after, "DecayState").count == 2


@core_decay
def test_masks_of_every_kind_agree(row: Row) -> None:
    params, updates = make_params(), make_updates()
    masks = [
        wdjax.only("kernel"),
        wdjax.all_but("bias"),
        wdjax.only("kernel").mask,
        {"Dense_0": {"kernel": True, "bias": False}},
        {"Dense_0": {"kernel": np.bool_(True), "bias": np.array(False)}},
        lambda tree: jax.tree.map(lambda p: p.ndim > 1, tree),
    ]
    want = expected(row, updates, params)["Dense_0"]["kernel"]
    for mask in masks:
        optimizer = row.build(RATE, mask)
        new, _ = optimizer.update(updates, optimizer.init(params), params)
        chex.assert_trees_all_close(float64(new["Dense_0"]["kernel"]), want, **TOLERANCE[jnp.float32])
        assert_same_bits(new["Dense_0"]["bias"], updates["Dense_0"]["bias"])


@core_row
def test_rates_by_path_each_with_its_own(row: Row) -> None:
    params, updates = make_params(), make_updates()
    rates = {"kernel": lambda count: 0.1, "bias": jnp.array(0.2)}
    optimizer = row.build(wdjax.by_path(rates))
    new, _ = optimizer.update(updates, optimizer.init(params), params)
    want = expected_by_path(row, updates, params, kernel=0.1, bias=0.2)
    chex.assert_trees_all_close(float64(new), want, **TOLERANCE[jnp.float32])


@core_row
def test_multipliers_by_path_times_a_number_an_array_or_a_schedule(row: Row) -> None:
    params, updates = make_params(), make_updates()
    table = wdjax.by_path({"kernel": 2.0}, default=0.5)
    for base in (0.1, np.float32(0.1), jnp.array(0.1), lambda count: 0.1 * jnp.asarray(count + 1, jnp.float32)):
        for rate in (base * table, table * base):
            optimizer = row.build(rate)
            new, _ = optimizer.update(updates, optimizer.init(params), params)
            want = expected_by_path(row, updates, params, kernel=0.2, bias=0.05)
            chex.assert_trees_all_close(float64(new), want, **TOLERANCE[jnp.float32])


def assert_same_bits(new: Any, old: Any) -> None:
    chex.assert_trees_all_equal_shapes_and_dtypes(new, old)
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


HARD = [np.inf, -np.inf, np.nan, 0.0, -0.0, 3.0]
DENORMAL = (
    1e-40  # Adding nothing to it gives zero on hardware that flushes denormals: only what is never added to keeps it.
)


@pytest.mark.filterwarnings("ignore:.*the decay rounds to nothing")  # A rate of 1e-60 is 0 in float32.
@every_decay
@pytest.mark.parametrize("dtype", [jnp.float32, slow(jnp.bfloat16)], ids=["float32", "bfloat16"])
def test_a_decay_that_is_off_leaves_the_bits(row: Row, dtype: Any) -> None:
    weights, moves = (jnp.asarray(grid.ravel(), dtype) for grid in np.meshgrid(HARD, HARD))
    params, updates = {"w": weights}, {"w": moves}
    off = {"zero": 0.0, "array": jnp.array(0.0), "schedule": lambda count: jnp.asarray(0.0), "table": None}
    for name, rate in off.items():
        optimizer = row.build(wdjax.by_path({"w": 0}) if name == "table" else rate)
        for run in (run_eager, run_jit):
            new, _ = run(optimizer, updates, optimizer.init(params), params)
            assert_same_bits(new, updates)
    # 1e-60 is no zero, but nothing in float32.
    rates = (0.0, 1e-60, wdjax.by_path({"w": 0}))
    for never in (*map(row.build, rates), row.build(RATE, {"w": False})):
        tiny = {"w": jnp.full_like(moves, DENORMAL)}
        for grads in (updates, tiny):
            assert_same_bits(run_jit(never, grads, never.init(params), params)[0], grads)

    def traced(rate: Any) -> Any:
        optimizer = row.build(rate)
        return optimizer.update(updates, optimizer.init(params), params)[0]

    assert_same_bits(jax.jit(traced)(jnp.array(0.0)), updates)
    anchored = row.build(jnp.array(0.0), toward="init")
    assert_same_bits(run_jit(anchored, updates, anchored.init(params), params)[0], updates)


@core_decay
def test_what_is_no_number_passes_through(row: Row) -> None:
    key = jax.random.key(0)
    params = {
        "w": jnp.ones(3),
        "int": jnp.arange(3),
        "bool": jnp.array([True, False]),
        "key": key,
        "none": None,
        "masked": optax.MaskedNode(),
        "gone": jnp.ones(2),
        "float0": jnp.arange(2),
    }
    updates = {**params, "gone": None, "float0": np.zeros(2, jax.dtypes.float0), "w": jnp.ones(3)}
    optimizer = row.build(RATE, toward="init")
    state = optimizer.init(params)
    new, new_state = optimizer.update(updates, state, params)
    assert all(new[name] is updates[name] for name in updates if name != "w")
    chex.assert_trees_all_equal_structs(state, new_state)
    assert new["w"] is not updates["w"]


@core_row
def test_no_recompilation_from_step_to_step_or_when_a_traced_rate_changes(row: Row) -> None:
    params, updates = make_params(), make_updates()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(rate: Any, state: Any) -> Any:
        return row.build(rate).update(updates, state, params)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def scheduled(state: Any) -> Any:
        return row.build(RATES["schedule"]).update(updates, state, params)

    chex.clear_trace_counter()
    state = other = state_of(row, RATE, params)
    for rate in (0.0, 0.1, 0.2):
        new, state = step(jnp.array(rate), state)
        chex.assert_trees_all_close(float64(new), expected(row, updates, params, rate), **TOLERANCE[jnp.float32])
        _, other = scheduled(other)


@core_row
def test_inject_hyperparams(row: Row) -> None:
    params, updates = make_params(), make_updates()
    rules = wdjax.only("kernel")
    with jax.numpy_dtype_promotion("standard"):
        injected = optax.inject_hyperparams(lambda rate, mask: row.build(rate, mask))(RATE, rules)
        state = injected.init(params)
        assert set(state.hyperparams) == {"rate"}
        for rate in (RATE, 0.1):
            state.hyperparams["rate"] = jnp.asarray(rate)
            new, state = jax.jit(injected.update)(updates, state, params)
            want = expected(row, updates, params, rate)
            chex.assert_trees_all_close(
                float64(new["Dense_0"]["kernel"]), want["Dense_0"]["kernel"], rtol=2e-6, atol=1e-6
            )
        scheduled = optax.inject_hyperparams(row.build)(RATES["schedule"])
        new, _ = scheduled.update(updates, scheduled.init(params), params)
        chex.assert_trees_all_close(float64(new), expected(row, updates, params, 0.1), **TOLERANCE[jnp.float32])


@pytest.mark.peers
@core_row
def test_multi_steps_acts_once_a_step(row: Row) -> None:
    params, updates = make_params(), make_updates()
    optimizer = optax.MultiSteps(row.build(RATE), every_k_schedule=3)
    state = optimizer.init(params)
    for step in range(6):
        new, state = jax.jit(optimizer.update)(updates, state, params)
        want = expected(row, updates, params) if step % 3 == 2 else jax.tree.map(np.zeros_like, float64(updates))
        chex.assert_trees_all_close(float64(new), want, **TOLERANCE[jnp.float32])


@pytest.mark.peers
@core_row
def test_apply_if_finite_skips_the_decay_with_the_step(row: Row) -> None:
    params, updates = make_params(), make_updates()
    optimizer = optax.apply_if_finite(row.build(RATES["schedule"]), max_consecutive_errors=3)
    state = optimizer.init(params)
    broken = jax.tree.map(lambda u: u * jnp.nan, updates)
    for moves, rate in ((updates, 0.1), (broken, None), (updates, 0.2)):
        new, state = jax.jit(optimizer.update)(moves, state, params)
        want = jax.tree.map(np.zeros_like, float64(updates)) if rate is None else expected(row, updates, params, rate)
        chex.assert_trees_all_close(float64(new), want, **TOLERANCE[jnp.float32])


@pytest.mark.peers
@core_row
def test_flatten(row: Row) -> None:
    params, updates = make_params(), make_updates()
    optimizer = optax.flatten(row.build(RATE))
    new, _ = jax.jit(optimizer.update)(updates, optimizer.init(params), params)
    if not row.is_elementwise:  # One array is one group, and there is one array now.
        flat = [np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(float64(tree))]) for tree in (updates, params)]
        want = row.oracle(flat[0], flat[1], RATE, 0.0)
        new, want = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(float64(new))]), want
    else:
        new, want = float64(new), expected(row, updates, params)
    chex.assert_trees_all_close(new, want, **TOLERANCE[jnp.float32])


@core_row
def test_scan_over_steps(row: Row) -> None:
    params, updates = make_params(), make_updates()
    optimizer = row.build(RATES["schedule"])

    def step(carry: Any, _: Any) -> Any:
        weights, state = carry
        new, state = optimizer.update(updates, state, weights)
        return (optax.apply_updates(weights, new), state), None

    (final, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=4))((params, optimizer.init(params)))
    weights, moves = float64(params), float64(updates)
    for count in range(4):
        rate = 0.1 * (count + 1)
        weights = jax.tree.map(lambda w, u: w + row.oracle(u, w, rate, 0.0), weights, moves)  # noqa: B023
    chex.assert_trees_all_close(float64(final), weights, rtol=1e-5, atol=1e-5)


@core_row
def test_vmap_over_the_rate(row: Row) -> None:
    params, updates = make_params(), make_updates()

    def act(rate: Any) -> Any:
        optimizer = row.build(rate)
        return optimizer.update(updates, optimizer.init(params), params)[0]

    rates = jnp.array([0.0, 0.1, 0.3])
    many = jax.vmap(act)(rates)
    for i, rate in enumerate((0.0, 0.1, 0.3)):
        one = float64(jax.tree.map(lambda x: x[i], many))  # noqa: B023
        chex.assert_trees_all_close(one, expected(row, updates, params, rate), **TOLERANCE[jnp.float32])


@every_row
@pytest.mark.usefixtures("x64")
def test_gradient_with_respect_to_the_rate(row: Row) -> None:
    params, updates = make_params(jnp.float64), make_updates(jnp.float64)
    params["Dense_0"]["kernel"] = params["Dense_0"]["kernel"].at[0, 0].set(0.7)  # Off the corner of |w|.

    def total(rate: Any) -> Any:
        optimizer = row.build(rate)
        new = optimizer.update(updates, optimizer.init(params), params)[0]
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(new))

    def oracle(rate: float) -> float:
        return sum(np.sum(np.sin(leaf)) for leaf in jax.tree.leaves(expected(row, updates, params, rate)))

    step = 1e-6
    slope = (oracle(0.03 + step) - oracle(0.03 - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(total)(0.03), slope, rtol=1e-6)
    if row.off_at != 0:
        return
    # At a rate of 0 the value is the update itself, and still the rate can be learned (a one-sided slope: a rate
    # below zero is not defined). There every term of a cautious decay is a tie: it has the plain decay's slope.
    if row.name.startswith("cautious"):
        plain = next(plain for plain in ROWS if plain.name == row.name[len("cautious[") : -1])
        row = row._replace(oracle=plain.oracle)
    slope = (-3 * oracle(0.0) + 4 * oracle(step) - oracle(2 * step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(total)(0.0), slope, rtol=1e-5)


@core_anchored
@pytest.mark.parametrize("toward", [None, "init"])
def test_donation_of_params_updates_and_state(row: Row, toward: str | None) -> None:
    params, updates = make_params(), make_updates()
    want = expected(row, updates, params) if toward is None else None
    optimizer = row.build(RATE, toward=toward)
    state = optimizer.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(updates: Any, state: Any, params: Any) -> Any:
        new, state = optimizer.update(updates, state, params)
        return new, state, optax.apply_updates(params, new)

    new, state, params = step(updates, state, params)
    if want is not None:
        chex.assert_trees_all_close(float64(new), want, **TOLERANCE[jnp.float32])
    jax.block_until_ready((state, params))


@pytest.mark.parametrize("row", core_first(row for row in ANCHORED if row.is_elementwise))
def test_sharded_in_and_sharded_out_without_a_collective(row: Row) -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    params, updates = ({"w": jax.device_put(jnp.linspace(-1.0, x, 32).reshape(8, 4), sharding)} for x in (1.0, 2.0))
    optimizer = row.build(RATES["schedule"], toward="init")
    state = optimizer.init(params)
    compiled = jax.jit(optimizer.update).lower(updates, state, params).compile()
    for name in ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert name not in compiled.as_text()
    new, state = compiled(updates, state, params)
    assert new["w"].sharding.is_equivalent_to(sharding, 2)
    assert optax.tree.get(state, "anchor")["w"].sharding.is_equivalent_to(sharding, 2)


@core_row
def test_params_left_out(row: Row) -> None:
    params, updates = make_params(), make_updates()
    optimizer = row.build(RATE)
    name = row.name.partition("[")[0]
    with pytest.raises(ValueError, match=rf"^{name} needs the parameters.*optimizer\.update\(grads, state, params\)"):
        optimizer.update(updates, optimizer.init(params))


@core_row
def test_updates_of_another_structure_or_shape(row: Row) -> None:
    params, updates = make_params(), make_updates()
    optimizer = row.build(RATE)
    state = optimizer.init(params)
    with pytest.raises(ValueError, match=r"different structure.*Dense_0/bias"):
        optimizer.update({"Dense_0": {"kernel": updates["Dense_0"]["kernel"]}}, state, params)
    wrong = {"Dense_0": {**updates["Dense_0"], "bias": jnp.ones(4)}}
    with pytest.raises(ValueError, match=r"'Dense_0/bias' has shape \(4,\) and the parameter \(3,\)"):
        optimizer.update(wrong, state, params)


@pytest.mark.peers
@pytest.mark.usefixtures("x64")  # In float32 an injected b2 costs Adam's bias correction its last digits.
def test_the_public_functions_themselves_go_into_inject_hyperparams() -> None:
    params, updates = make_params(jnp.float64), make_updates(jnp.float64)
    rules = wdjax.only("kernel")
    rates = optax.linear_schedule(0.1, 0.0, 10)
    for recipe in (wdjax.sgd_l2, wdjax.sgdw, wdjax.adam_l2, wdjax.adamw):
        injected = optax.inject_hyperparams(recipe)(learning_rate=rates, weight_decay=RATE, mask=rules, toward="init")
        state, plain = injected.init(params), recipe(rates, RATE, rules, toward="init")
        assert {"learning_rate", "weight_decay"} <= set(state.hyperparams)
        assert not {"mask", "toward"} & set(state.hyperparams)
        plain_state = plain.init(params)
        moved = jax.tree.map(lambda p: p + 1, params)
        for _ in range(3):
            got, state = jax.jit(injected.update)(updates, state, moved)
            want, plain_state = plain.update(updates, plain_state, moved)
            chex.assert_trees_all_close(got, want, rtol=1e-12, atol=1e-13)
    table = wdjax.by_path({"kernel": 0.1}, default=0.0)
    injected = optax.inject_hyperparams(wdjax.decoupled_decay)(weight_decay=table)
    assert not injected.init(params).hyperparams


@pytest.mark.usefixtures("x64")
def test_second_derivatives_with_respect_to_a_rate_of_zero_through_scan() -> None:
    def end(rate: Any) -> Any:
        optimizer = wdjax.independent_decay(rate)

        def step(carry: Any, _: Any) -> Any:
            w, state = carry
            updates, state = optimizer.update(jnp.zeros_like(w), state, w)
            return (w + updates, state), None

        w = jnp.array(2.0)
        return jax.lax.scan(step, (w, optimizer.init(w)), length=3)[0][0]

    # 2 (1 - rate)^3
    np.testing.assert_allclose([jax.grad(end)(0.0), jax.hessian(end)(0.0), jax.grad(jax.grad(end))(0.0)], [-6, 12, 12])
    np.testing.assert_allclose(jax.jacfwd(jax.jacfwd(end))(0.0), 12)


@pytest.mark.parametrize("row", [row for row in ROWS if not row.is_real], ids=lambda row: row.name)
def test_complex_weights(row: Row) -> None:
    # Of one phase, so that the rule for the modulus is the one for real weights.
    phase = np.exp(0.7j)
    moduli, moves = (
        np.abs(float64(make_params())["Dense_0"]["kernel"]) + 0.1,
        float64(make_updates())["Dense_0"]["kernel"],
    )
    params, updates = jnp.asarray(moduli * phase, jnp.complex64), jnp.asarray(moves * phase, jnp.complex64)
    optimizer = row.build(RATES["schedule"])
    new, _ = jax.jit(optimizer.update)(updates, optimizer.init(params), params)
    assert new.dtype == jnp.complex64
    np.testing.assert_allclose(new, row.oracle(moves, moduli, 0.1, 0.0) * phase, rtol=1e-5, atol=1e-6)


@every_decay
def test_a_complex_decay_that_is_off_leaves_the_bits(row: Row) -> None:
    parts = np.array([0.0, -0.0, 1.0, -2.0], np.float32)
    updates = jax.lax.complex(*(jnp.asarray(x.ravel()) for x in np.meshgrid(parts, parts)))
    params = jnp.ones(16, jnp.complex64)
    for rate in (0.0, jnp.array(0.0), lambda count: jnp.asarray(0.0)):
        optimizer = row.build(rate)
        assert_same_bits(run_jit(optimizer, updates, optimizer.init(params), params)[0], updates)


def test_an_anchor_is_needed_only_where_there_is_a_decay() -> None:
    params, updates = make_params(), make_updates()
    part = {"Dense_0": {"kernel": jnp.ones((4, 3)), "bias": None}}
    with_head = {**params, "head": {"w": jnp.ones(2)}}
    wdjax.decoupled_decay(RATE, wdjax.only("kernel"), toward={**part, "head": None}).init(with_head)
    for place in (
        wdjax.decoupled_decay(RATE, wdjax.only("kernel"), toward=part),
        wdjax.decoupled_decay(
            wdjax.by_path({"kernel": RATE}, default=0.0), toward={"Dense_0": {"kernel": jnp.ones((4, 3))}}
        ),
    ):
        new, _ = place.update(updates, place.init(params), params)
        want = float64(updates)["Dense_0"]["kernel"] + RATE * (float64(params)["Dense_0"]["kernel"] - 1)
        chex.assert_trees_all_close(float64(new)["Dense_0"]["kernel"], want, **TOLERANCE[jnp.float32])
