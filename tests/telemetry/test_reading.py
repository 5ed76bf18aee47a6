"""`monitor` reads the decays from the optimizer: it finds what it would compute from their arguments, and more."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from slow import slow, slow_but

import wdjax
from wdjax import by_depth, by_path, monitor, only, scalars
from wdjax.telemetry import METRICS

pytestmark = pytest.mark.peers  # Optax's schedules and wrappers need the standard promotion of dtypes.

LR, WD = 0.5, 0.03
RATE, DECAY = optax.linear_schedule(0.5, 0.1, 10), optax.linear_schedule(0.1, 0.0, 10)
KERNEL = only("kernel")
PARAMS = {
    "Dense": {"kernel": jnp.sin(jnp.arange(24.0).reshape(2, 3, 4) + 1), "bias": jnp.ones(3)},
    "embed": jnp.cos(jnp.arange(10.0)).reshape(5, 2),
}
ANCHOR = jax.tree.map(lambda p: 0.5 * p, PARAMS)
TABLE = by_path({"kernel": DECAY, "embed": WD}, default=0.0)
LAYERS = 0.1 * by_depth("kernel", 0.5, axis=0)


class Case(NamedTuple):
    """An optimizer, and the arguments that tell a monitor of its decay."""

    build: Callable[[], Any]
    arguments: dict[str, Any]


def told(weight_decay: Any = WD, mask: Any = KERNEL, learning_rate: Any = RATE, **others: Any) -> dict[str, Any]:
    return {"weight_decay": weight_decay, "mask": mask, "learning_rate": learning_rate, **others}


CASES = {
    "number": Case(lambda: wdjax.adamw(LR, WD, KERNEL), told(learning_rate=LR)),
    "schedules": Case(lambda: wdjax.adamw(RATE, DECAY, KERNEL), told(DECAY)),
    "table": Case(lambda: wdjax.adamw(RATE, TABLE), told(TABLE, None)),
    "layers": Case(lambda: wdjax.sgdw(RATE, LAYERS, KERNEL), told(LAYERS)),
    "toward init": Case(lambda: wdjax.adamw(RATE, WD, KERNEL, toward="init"), told(toward="init")),
    "toward a tree": Case(lambda: wdjax.adamw(RATE, WD, KERNEL, toward=ANCHOR), told(toward=ANCHOR)),
    "independent": Case(
        lambda: optax.chain(optax.adam(RATE), wdjax.independent_decay(DECAY, KERNEL)), told(DECAY, learning_rate=1.0)
    ),
    "continuous": Case(
        lambda: optax.chain(optax.sgd(RATE), wdjax.continuous_decay(2.0, KERNEL, learning_rate=RATE)),
        told(lambda count: -jnp.expm1(-2.0 * RATE(count)), learning_rate=1.0),
    ),
    "around": Case(
        lambda: wdjax.with_decoupled_decay(optax.sgd(RATE), WD, KERNEL, learning_rate=RATE, toward="init"),
        told(toward="init"),
    ),
    "around MultiSteps": Case(
        lambda: wdjax.with_decoupled_decay(optax.MultiSteps(optax.sgd(RATE), 2), WD, KERNEL, learning_rate=RATE),
        told(),
    ),
    "MultiSteps": Case(lambda: optax.MultiSteps(wdjax.adamw(RATE, WD, KERNEL), 2), told()),
    "finite": Case(lambda: optax.apply_if_finite(wdjax.adamw(RATE, WD, KERNEL), 3), told()),
    "injected": Case(
        lambda: optax.inject_hyperparams(wdjax.adamw, static_args="mask")(RATE, DECAY, mask=KERNEL), told(DECAY)
    ),
    "shrink and perturb": Case(
        lambda: optax.chain(optax.adam(RATE), wdjax.on_weights.shrink_and_perturb(DECAY, 0.1, KERNEL, seed=0)),
        told(DECAY, learning_rate=1.0),
    ),
    "partition": Case(
        lambda: optax.partition(
            {"kernel": wdjax.adamw(RATE, WD), "rest": optax.sgd(LR)},
            by_path({"kernel": "kernel"}, default="rest").values,
        ),
        told(),
    ),
    "masked": Case(
        lambda: optax.chain(
            optax.adam(RATE), optax.masked(wdjax.independent_decay(WD), KERNEL.mask), optax.clip_by_global_norm(1e9)
        ),
        told(learning_rate=1.0),
    ),
    "frozen": Case(lambda: wdjax.freeze(wdjax.adamw(RATE, WD, KERNEL), only("embed")), told()),
    "two decays": Case(
        lambda: optax.chain(
            optax.sgd(RATE), wdjax.independent_decay(0.01, KERNEL), wdjax.independent_decay(0.02, KERNEL)
        ),
        told(learning_rate=1.0),
    ),
}
SLOW = ("number", "schedules", "masked", "frozen", "around MultiSteps")


def run(optimizer: Any, params: Any = PARAMS, steps: int = 4, jit: Any = jax.jit) -> Any:
    """The parameters and what was measured after each step."""
    state, update, history = optimizer.init(params), jit(optimizer.update), []
    structure = jax.tree.structure(state)
    for t in range(steps):
        updates, state = update(jax.tree.map(lambda p, t=t: jnp.cos(37 * p + t), params), state, params)
        params = optax.apply_updates(params, updates)
        history.append(params)
        assert jax.tree.structure(state) == structure
    return history, state


def merged(measured: dict[str, Any]) -> dict[str, Any]:
    """By the kind of group, since in `partition` the rule that decides is another one."""
    return {"undecayed" if name == "undecayed" else "decayed" + name[:3] * (len(measured) > 2): row
            for name, row in measured.items()}  # fmt: skip


@pytest.mark.parametrize("name", slow_but(CASES, *SLOW))
def test_what_is_read_is_what_is_told_and_nothing_changes(name: str) -> None:
    case = CASES[name]
    optimizer = case.build()
    bare = optax.GradientTransformationExtraArgs(optimizer.init, optimizer.update)
    plain, _ = run(bare)
    read, state = run(monitor(optimizer))
    chex.assert_trees_all_equal(read, plain)
    _, expected = run(monitor(optimizer, **case.arguments))
    got, want = merged(state.measured), merged(expected.measured)
    assert set(got) == set(want) >= {"undecayed"}
    for group, row in want.items():
        chex.assert_trees_all_close(
            {name: got[group][name] for name in METRICS}, {name: row[name] for name in METRICS}, rtol=1e-5, atol=1e-7
        )
    assert any(row["decay_norm"] > 0 for row in got.values())


def test_a_cautious_decay_is_measured_where_it_acts() -> None:
    optimizer = optax.chain(wdjax.cautious(wdjax.decoupled_decay(WD, KERNEL)), optax.scale_by_learning_rate(LR))
    state = monitor(optimizer).init(PARAMS)
    grads = jax.tree.map(lambda p: jnp.cos(37 * p), PARAMS)
    _, state = jax.jit(monitor(optimizer).update)(grads, state, PARAMS)
    w, g = (np.asarray(tree["Dense"]["kernel"], np.float64) for tree in (PARAMS, grads))
    decay = np.where(g * w >= 0, LR * WD * w, 0)
    assert 0 < np.count_nonzero(decay) < decay.size
    np.testing.assert_allclose(state.measured["kernel"]["decay_norm"], np.linalg.norm(decay), rtol=1e-5)
    rate = np.linalg.norm(decay) / np.linalg.norm(w)
    np.testing.assert_allclose(state.measured["kernel"]["effective_rate"], rate, rtol=1e-5)


def test_in_a_schedule_free_optimizer_it_is_the_share_that_reaches_the_weights() -> None:
    for optimizer in (
        optax.contrib.schedule_free(wdjax.sgdw(LR, WD, KERNEL), LR, b1=0.9),
        wdjax.with_decoupled_decay(
            optax.contrib.schedule_free(optax.sgd(LR), LR, b1=0.9), WD, KERNEL, learning_rate=LR
        ),
    ):
        for steps in (1, 2, 3):
            _, state = run(monitor(optimizer), steps=steps)
            share = 1 - 0.9 + 0.9 / steps  # Of constant learning rates, the newest has the weight 1 / steps.
            np.testing.assert_allclose(state.measured["kernel"]["effective_rate"], LR * WD * share, rtol=1e-4)


def test_behind_a_trust_ratio_it_is_what_more_decay_would_change() -> None:
    def chain(weight_decay: float) -> Any:
        decay = wdjax.decoupled_decay(weight_decay, KERNEL)
        return optax.chain(decay, optax.scale_by_trust_ratio(), optax.scale_by_learning_rate(LR))

    grads = jax.tree.map(lambda p: jnp.cos(37 * p), PARAMS)
    with jax.enable_x64(True):
        updates = [
            chain(WD * factor).update(grads, chain(WD).init(PARAMS), PARAMS)[0]["Dense"]["kernel"]
            for factor in (0.99, 1.01)
        ]
    slope = np.linalg.norm((np.asarray(updates[1], np.float64) - np.asarray(updates[0], np.float64)) / 0.02)
    _, state = monitor(chain(WD)).update(grads, monitor(chain(WD)).init(PARAMS), PARAMS)
    np.testing.assert_allclose(state.measured["kernel"]["decay_norm"], slope, rtol=1e-3)


def test_a_decay_that_nothing_reports_is_not_guessed() -> None:
    _, state = run(monitor(optax.adamw(RATE, weight_decay=WD)), steps=1)
    assert set(state.measured) == {"undecayed"}
    assert state.measured["undecayed"]["decay_norm"] == 0
    # L2 in the gradient is a decay of unknown size, as before.
    assert set(monitor(wdjax.adam_l2(LR, WD)).init(PARAMS).measured) == {"undecayed"}


def test_groups_are_named_by_the_rules_of_all_decays() -> None:
    two = optax.chain(optax.sgd(LR), wdjax.independent_decay(WD, KERNEL), wdjax.independent_decay(TABLE))
    assert set(monitor(two).init(PARAMS).measured) == {"kernel", "embed", "undecayed"}
    two = optax.chain(optax.sgd(LR), wdjax.independent_decay(WD), wdjax.independent_decay(WD, KERNEL))
    assert set(monitor(two).init(PARAMS).measured) == {"all + kernel", "all"}
    chosen = monitor(two, groups=by_path({"Dense": "dense"}, default="rest")).init(PARAMS)
    assert set(chosen.measured) == {"dense", "rest"}


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_the_rate_that_acts_and_not_the_first_one(jit: Any) -> None:
    build = optax.inject_hyperparams(wdjax.adamw, static_args="mask")
    optimizer = monitor(optax.chain(optax.clip(1.0), build(LR, WD, mask=KERNEL)))
    state = optimizer.init(PARAMS)
    for rate, decay in ((LR, WD), (0.01, WD), (0.02, 0.5)):
        state.inner_state[1].hyperparams.update(learning_rate=jnp.float32(rate), weight_decay=jnp.float32(decay))
        _, state = jit(optimizer.update)(PARAMS, state, PARAMS)
        logged = jit(functools.partial(scalars, prefix="train/"))(state)
        np.testing.assert_allclose(logged["train/kernel/effective_rate"], rate * decay, rtol=1e-5)
        np.testing.assert_allclose(logged["train/kernel/weight_decay"], decay, rtol=1e-5)
        np.testing.assert_allclose(logged["train/learning_rate"], rate, rtol=1e-6)
        np.testing.assert_allclose(logged["train/weight_decay"], decay, rtol=1e-6)
        assert "train/undecayed/weight_decay" not in logged
        assert {x.dtype for x in logged.values()} == {np.dtype(np.float32)}


def test_a_decay_that_is_told_is_multiplied_by_the_rate_that_acts() -> None:
    inner = optax.inject_hyperparams(optax.adamw, static_args="mask")(LR, weight_decay=WD)
    optimizer = monitor(inner, WD)
    state = optimizer.init(PARAMS)
    state.inner_state.hyperparams["learning_rate"] = jnp.float32(0.01)
    _, state = jax.jit(optimizer.update)(PARAMS, state, PARAMS)
    np.testing.assert_allclose(scalars(state)["all/effective_rate"], 0.01 * WD, rtol=1e-5)
    np.testing.assert_allclose(scalars(state)["all/weight_decay"], WD, rtol=1e-5)


def rates_in(optimizer: Any, steps: int = 3) -> dict[str, float]:
    logged = jax.device_get(scalars(run(optimizer, steps=steps)[1]))
    return {
        name: float(value)
        for name, value in logged.items()
        if name.split("/")[-1].startswith(("learning_rate", "weight_decay"))
    }


def test_weight_decay_is_told_where_it_is_known() -> None:
    def expect(optimizer: Any, **rates: float) -> None:
        got = rates_in(optimizer)
        assert got == pytest.approx({name.replace("_of_", "/"): value for name, value in rates.items()}, rel=1e-5)

    inject = optax.inject_hyperparams(
        lambda learning_rate, weight_decay: wdjax.sgdw(learning_rate, weight_decay, KERNEL)
    )
    # In the third step.
    expect(monitor(inject(RATE, WD)), learning_rate=0.42, weight_decay=WD, **{"kernel/weight_decay": WD})
    expect(monitor(wdjax.sgdw(RATE, DECAY, KERNEL)))
    expect(
        monitor(wdjax.sgdw(RATE, DECAY, KERNEL), learning_rate=RATE),
        learning_rate=0.42,
        **{"kernel/weight_decay": 0.08},
    )
    expect(monitor(CASES["independent"].build()), **{"kernel/weight_decay": 0.08})
    expect(
        monitor(optax.adamw(RATE), WD, KERNEL, learning_rate=RATE), learning_rate=0.42, **{"kernel/weight_decay": WD}
    )
    table = by_path({"kernel": 0.1}, default=0.2)
    expect(monitor(wdjax.sgdw(LR, WD), WD, learning_rate=table))
    # Another optimizer's learning rate is not that of this decay.
    parts = {"dense": inject(RATE, WD), "embed": wdjax.sgdw(LR, WD)}
    other = optax.partition(parts, by_path({"embed": "embed"}, default="dense").values)
    expect(monitor(other), learning_rate=0.42, weight_decay=WD)
    # A group with an independent and a decoupled decay has no single weight decay.
    mixed = optax.chain(wdjax.sgdw(RATE, WD, KERNEL), wdjax.independent_decay(WD, KERNEL))
    expect(monitor(mixed, learning_rate=RATE), learning_rate=0.42)


def test_several_learning_rates_are_numbered() -> None:
    inject = optax.inject_hyperparams(wdjax.sgdw)
    parts = {"dense": inject(RATE, WD), "embed": inject(0.1, WD)}
    both = optax.partition(parts, by_path({"embed": "embed"}, default="dense").values)
    want = {"learning_rate_0": 0.42, "learning_rate_1": 0.1, "weight_decay_0": WD, "weight_decay_1": WD}
    assert rates_in(monitor(both)) == pytest.approx(want, rel=1e-5)
    with pytest.raises(
        ValueError, match=r"monitor: the optimizer holds 2 learning rates\. Say which.*learning_rate=sch"
    ):
        monitor(both, WD).init(PARAMS)
    # Around the monitor they are found, too.
    around = optax.inject_hyperparams(lambda learning_rate: monitor(wdjax.sgdw(learning_rate, WD)))(RATE)
    assert rates_in(around) == pytest.approx({"learning_rate": 0.42}, rel=1e-5)


def test_a_learning_rate_in_a_state_of_nnx_or_of_dictionaries() -> None:
    class Model(nnx.Module):
        def __init__(self) -> None:
            self.linear = nnx.Linear(4, 3, rngs=nnx.Rngs(0))

    model = Model()
    tx = monitor(optax.inject_hyperparams(wdjax.adamw)(LR, WD))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, nnx.grad(lambda model: jnp.sum(model.linear(jnp.ones((1, 4))) ** 2))(model))
    state = tx.init(PARAMS)
    as_dictionaries = {**state._asdict(), "inner_state": state.inner_state._asdict()}
    for holder in (optimizer, nnx.state(optimizer), as_dictionaries):
        assert float(scalars(holder)["learning_rate"]) == pytest.approx(LR)


def test_a_told_schedule_waits_for_real_steps() -> None:
    optimizer = monitor(optax.MultiSteps(wdjax.sgdw(RATE, WD), 2), learning_rate=RATE)
    rates = [rates_in(optimizer, steps)["learning_rate"] for steps in (1, 2, 3, 4)]
    np.testing.assert_allclose(rates, [0.0, 0.5, 0.5, 0.46], rtol=1e-6)


@pytest.mark.parametrize(
    "writer", [wdjax.stochastic_rounding(0), slow(wdjax.compensated()), slow(wdjax.master_weights())]
)
def test_the_decay_is_read_through_a_writer(writer: Any) -> None:
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    grads = jax.tree.map(lambda p: jnp.cos(37 * p.astype(jnp.float32)).astype(jnp.bfloat16), PARAMS)
    optimizer = optax.chain(wdjax.in_float32(wdjax.adamw(LR, 1e-4, KERNEL)), writer)
    state = monitor(optimizer).init(params)
    updates, state = jax.jit(monitor(optimizer).update)(grads, state, params)
    plain, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    chex.assert_trees_all_equal(updates, plain)
    row = state.measured["kernel"]
    np.testing.assert_allclose(row["effective_rate"], LR * 1e-4, rtol=1e-5)
    assert row["rounded_away"] == 0


@pytest.mark.filterwarnings("ignore:.*rounds to nothing")
def test_in_bfloat16_a_decay_that_rounds_away_is_still_read() -> None:
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    optimizer = monitor(wdjax.sgdw(0.1, 1e-3, KERNEL))
    _, state = jax.jit(optimizer.update)(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    row = state.measured["kernel"]
    np.testing.assert_allclose(row["effective_rate"], 1e-4, rtol=4e-3)
    assert (row["rounded_away"], row["decay_landed"]) == (1, 0)


def test_a_monitor_within_a_monitor_reads_the_same_decay() -> None:
    inner = monitor(wdjax.sgdw(LR, WD, KERNEL), groups=lambda leaf: "inner")
    outer = monitor(optax.chain(inner, optax.scale(0.5)), groups=lambda leaf: "outer")
    logged = scalars(run(outer, steps=1)[1])
    np.testing.assert_allclose(logged["outer/decay_norm"], 0.5 * logged["inner/decay_norm"], rtol=1e-6)
    told = monitor(wdjax.sgdw(LR, WD, KERNEL), WD, KERNEL, learning_rate=LR, groups=lambda leaf: "inner")
    again = scalars(run(monitor(optax.chain(told, optax.scale(0.5)), groups=lambda leaf: "outer"), steps=1)[1])
    chex.assert_trees_all_close({k: again[k] for k in logged}, logged, rtol=1e-5)


def test_scan_vmap_and_one_trace() -> None:
    def end(rate: Any, params: Any) -> Any:
        optimizer = monitor(wdjax.adamw(rate, DECAY, KERNEL, toward="init"))

        @chex.assert_max_traces(n=1)
        def step(carry: Any, _: Any) -> Any:
            params, state = carry
            updates, state = optimizer.update(jax.tree.map(lambda p: jnp.cos(37 * p), params), state, params)
            return (optax.apply_updates(params, updates), state), scalars(state)

        return jax.lax.scan(step, (params, optimizer.init(params)), length=4)[1]

    rates = jnp.array([0.1, 0.02])
    many = jax.jit(jax.vmap(end, (0, None)))(rates, PARAMS)
    want = np.asarray(rates)[:, None] * np.array([0.0, 0.09, 0.08, 0.07])  # At first the weights are on the anchor.
    np.testing.assert_allclose(many["kernel/effective_rate"], want, rtol=1e-5)


@pytest.mark.usefixtures("x64")
def test_the_decay_that_is_read_is_a_constant_to_a_derivative() -> None:
    params = jnp.array([1.0, -2.0])

    def end(rate: Any, wrap: Any) -> Any:
        optimizer = wrap(wdjax.sgdw(rate, rate))
        updates, state = optimizer.update(jnp.ones(2), optimizer.init(params), params)
        measured = jax.tree.leaves(scalars(state)) if wrap is monitor else []
        return jnp.sum((params + updates) ** 2) + sum(x.astype(jnp.float64) for x in measured)

    slopes = [jax.grad(end)(0.1, wrap) for wrap in (monitor, lambda optimizer: optimizer)]
    np.testing.assert_allclose(*slopes)


@pytest.mark.parametrize("kind", ["automatic", "explicit"])
def test_sharded_arrays_need_one_all_reduce(kind: str) -> None:
    axis_type = jax.sharding.AxisType.Explicit if kind == "explicit" else jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    made = {"kernel": np.sin(np.arange(512.0, dtype=np.float32)).reshape(64, 8), "bias": np.ones(8, np.float32)}
    specs = {"kernel": P("data"), "bias": P()}
    params = jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), made, specs)
    optimizer = monitor(wdjax.sgdw(LR, DECAY, KERNEL))
    compiled = jax.jit(optimizer.update).lower(params, optimizer.init(params), params).compile()
    updates, state = compiled(params, optimizer.init(params), params)
    assert compiled.as_text().count(" all-reduce(") == 1  # pyright: ignore[reportOptionalMemberAccess]
    assert "all-gather(" not in compiled.as_text()
    assert updates["kernel"].sharding.is_equivalent_to(params["kernel"].sharding, 2)
    np.testing.assert_allclose(state.measured["kernel"]["effective_rate"], LR * 0.1, rtol=1e-5)


@pytest.mark.parametrize("check_vma", [True, False])
def test_within_shard_map(check_vma: bool) -> None:
    mesh = Mesh(np.array(jax.devices()), ("data",))
    params = {"kernel": np.sin(np.arange(64.0, dtype=np.float32)).reshape(16, 4)}
    optimizer = monitor(wdjax.sgdw(LR, WD), axis_name="data")

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("data"), out_specs=P(), check_vma=check_vma)
    def measured(p: Any) -> Any:
        return optimizer.update(p, optimizer.init(p), p)[1].measured

    row = measured(params)["all"]
    np.testing.assert_allclose(row["decay_norm"], LR * WD * np.linalg.norm(params["kernel"]), rtol=1e-5)


def test_leaves_that_no_decay_can_act_on() -> None:
    params = {
        "w": jnp.ones(3),
        "z": jnp.array([1.0 + 2.0j]),
        "count": jnp.array(3),
        "key": jax.random.key(0),
        "none": None,
    }
    updates = {**params, "count": np.zeros((), jax.dtypes.float0)}
    optimizer = monitor(optax.chain(optax.identity(), wdjax.independent_decay(WD)))
    new, state = optimizer.update(updates, optimizer.init(params), params)
    assert new["count"] is updates["count"]
    assert new["none"] is None
    assert set(state.measured) == {"all"}
    norm = np.sqrt(3 + 5)
    np.testing.assert_allclose(state.measured["all"]["decay_norm"], WD * norm, rtol=1e-6)
    assert optax.tree.map_params(optimizer, lambda x: x, state) is not None


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"monitor: mask and toward belong to a weight_decay.*given\. Write"):
        monitor(optax.sgd(LR), mask=KERNEL)

    def update_fn(updates: Any, state: Any, params: Any = None, *, hessian: Any, **extra_args: Any) -> Any:
        return updates, state

    needs_more = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update_fn)
    with pytest.raises(ValueError, match=r"(?s)is traced, and that failed: TypeError: .*hessian.*or 0\.0 if"):
        monitor(needs_more).init(PARAMS)
    monitor(needs_more, 0.0).init(PARAMS)
    with pytest.raises(ValueError, match=r"monitor: a decay in the optimizer sees parameters with other paths, ''"):
        monitor(optax.flatten(wdjax.sgdw(LR, WD))).init(PARAMS)


def test_the_loss_that_an_optimizer_asks_for_need_not_be_known_at_init() -> None:
    optimizer = monitor(optax.chain(wdjax.adamw(LR, WD), optax.contrib.reduce_on_plateau()))
    params = {"w": jnp.ones(3)}
    _, state = optimizer.update({"w": jnp.zeros(3)}, optimizer.init(params), params, value=1.0)
    np.testing.assert_allclose(state.measured["all"]["effective_rate"], LR * WD, rtol=1e-6)


def test_behind_a_function_without_a_derivative_the_error_says_what_to_write() -> None:
    @jax.custom_vjp
    def same(x: jax.Array) -> jax.Array:
        return x

    same.defvjp(lambda x: (x, None), lambda _, x: (x,))
    behind = optax.stateless(lambda updates, params: jax.tree.map(same, updates))
    optimizer = monitor(optax.chain(wdjax.sgdw(LR, WD), behind))
    with pytest.raises(TypeError, match=r"behind a jax\.custom_vjp\. Give the monitor the arguments"):
        optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS)


def test_two_decays_with_different_anchors_are_measured_against_the_weights() -> None:
    params = {"w": jnp.ones(4)}
    zeros = {"w": jnp.zeros(4)}
    both = [wdjax.independent_decay(0.01), wdjax.independent_decay(0.001, toward="init")]
    for decays in (both, both[::-1]):
        optimizer = monitor(optax.chain(optax.sgd(LR), *decays))
        _, state = optimizer.update(zeros, optimizer.init(params), params)
        np.testing.assert_allclose(state.measured["all"]["effective_rate"], 0.01, rtol=1e-6)


def test_without_a_monitor_the_program_of_a_decay_is_the_same() -> None:
    optimizer = wdjax.adamw(RATE, DECAY, KERNEL)
    state = optimizer.init(PARAMS)
    assert "custom_jvp" not in str(jax.make_jaxpr(optimizer.update)(PARAMS, state, PARAMS))


def test_reading_reads_no_more_memory_than_computing() -> None:
    params = {name: jnp.ones((300, 200)) for name in "abc"}
    read = []
    for optimizer in (monitor(wdjax.adamw(LR, WD), WD, learning_rate=LR), monitor(wdjax.adamw(LR, WD))):
        compiled = jax.jit(optimizer.update).lower(params, optimizer.init(params), params).compile()
        cost: Any = compiled.cost_analysis()
        read.append(cost["bytes accessed"])
    assert read[1] < 1.1 * read[0]


def test_the_distance_to_a_moving_average_is_that_of_the_update() -> None:
    params = {"w": jnp.array([3.0, 4.0])}
    ahead = {"w": jnp.array([6.0, 8.0])}
    zeros = {"w": jnp.zeros(2)}
    average = wdjax.EMA(0.5)
    read = wdjax.monitor(wdjax.sgdw(0.5, 0.1, toward=average))
    told = wdjax.monitor(wdjax.sgdw(0.5, 0.1, toward=average), 0.1, toward=average, learning_rate=0.5)
    by_path = wdjax.monitor(wdjax.sgdw(0.5, 0.1, toward=wdjax.by_path({"w": average})))
    for optimizer in (read, told, by_path):
        state = optimizer.init(params)
        for distance in (5.0, 2.5, 1.25):
            _, state = jax.jit(optimizer.update)(zeros, state, ahead)
            (metrics,) = (group for group in state.measured.values() if "effective_rate" in group)
            np.testing.assert_allclose(metrics["decay_norm"], 0.05 * distance, rtol=1e-6)
            np.testing.assert_allclose(metrics["effective_rate"], 0.05, rtol=1e-6)


def test_the_decay_of_rows_is_read() -> None:
    params = {"embedding": jnp.array([[3.0], [4.0]])}
    grads = {"embedding": jnp.array([[0.0], [1.0]])}
    for wrapper, owed in ((wdjax.with_sparse_decay, 0.1), (wdjax.with_lazy_decay, 0.19)):
        optimizer = wdjax.monitor(wrapper(optax.sgd(0.5), 0.2, learning_rate=0.5))
        state = optimizer.init(params)
        for gradient in ({"embedding": jnp.zeros((2, 1))}, grads):
            _, state = jax.jit(optimizer.update)(gradient, state, params)
        (metrics,) = (group for group in state.measured.values() if "effective_rate" in group)
        np.testing.assert_allclose(metrics["decay_norm"], owed * 4, rtol=1e-6)
        np.testing.assert_allclose(metrics["effective_rate"], owed * 4 / 5, rtol=1e-6)  # A mean over all rows.
