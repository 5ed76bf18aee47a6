"""Learning rates by path: closed forms of what `scale_by_path` multiplies, recorded rates of timm, and wrappers.

PyTorch's own groups are in test_torch.py, the recordings of PyTorch and big_vision in test_trajectories.py, and timm's
own code is in peers/test_timm.py.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from slow import slow_but
from timm_models import TABLES, decayed, recorded

import wdjax

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("x64")]  # Peers: Optax's bias correction.

LR, WD, STEPS = 0.05, 0.4, 60
MULTIPLIERS = {"embed": 0.25, "block": 0.5, "head": 1.0}
TABLE = wdjax.by_path(MULTIPLIERS)
RNG = np.random.default_rng(0)
START = {name: RNG.normal(size=3) for name in MULTIPLIERS}
GRADS = {name: RNG.normal(size=(STEPS, 3)) for name in MULTIPLIERS}
Trees = dict[str, np.ndarray]


def trajectory(optimizer: Any, grads: Trees = GRADS, start: Trees = START) -> Trees:
    """The parameters after each step."""

    def step(carry: Any, grads: Any) -> Any:
        params, state = carry
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    params = jax.tree.map(jnp.asarray, start)
    after = jax.jit(lambda carry: jax.lax.scan(step, carry, grads))((params, optimizer.init(params)))[1]
    return jax.tree.map(np.asarray, after)


def assert_close(got: Trees, wanted: Trees, tolerance: float = 1e-13) -> None:
    for name, values in wanted.items():
        np.testing.assert_allclose(got[name], values, rtol=tolerance, atol=tolerance, err_msg=name)


def sgd_with(factor_of: Callable[[float], float]) -> Trees:
    """w_T = f^T w_0 - m lr * sum_s f^(T - 1 - s) g_s: unrolled, where a step leaves the fraction f of a weight."""
    after = {}
    for name, m in MULTIPLIERS.items():
        f = factor_of(m)
        powers = np.array([[f ** (t - s) if s <= t else 0.0 for s in range(STEPS)] for t in range(STEPS)])
        start = f ** np.arange(1, STEPS + 1)[:, None] * START[name]
        after[name] = start - m * LR * powers @ GRADS[name]
    return after


SCALED = wdjax.scale_by_path(TABLE)
RATE = optax.scale_by_learning_rate(LR)
# For each order, the optimizer and what a step without gradient leaves of a weight, by its multiplier.
ORDERS: dict[str, tuple[Any, Callable[[float], float]]] = {
    "L2 in the gradient": (
        optax.chain(wdjax.add_l2_to_grads(WD), RATE, SCALED),
        lambda m: 1 - m * LR * WD,
    ),
    "L2 in the gradient, after the multipliers": (
        optax.chain(SCALED, wdjax.add_l2_to_grads(WD), RATE),
        lambda m: 1 - LR * WD,
    ),
    "decoupled decay, then the multipliers": (
        optax.chain(wdjax.sgdw(LR, WD), SCALED),
        lambda m: 1 - m * LR * WD,
    ),
    "the multipliers, then decoupled decay": (
        optax.chain(SCALED, wdjax.decoupled_decay(WD), RATE),
        lambda m: 1 - LR * WD,
    ),
    "independent decay, then the multipliers": (
        optax.chain(RATE, wdjax.independent_decay(LR * WD), SCALED),
        lambda m: 1 - m * LR * WD,
    ),
    "the multipliers, then independent decay": (
        optax.chain(RATE, SCALED, wdjax.independent_decay(LR * WD)),
        lambda m: 1 - LR * WD,
    ),
    "continuous decay with the same table": (
        optax.chain(RATE, SCALED, wdjax.continuous_decay(WD, learning_rate=LR * TABLE)),
        lambda m: np.exp(-m * LR * WD),
    ),
    "continuous decay, then the multipliers": (
        optax.chain(RATE, wdjax.continuous_decay(WD, learning_rate=LR), SCALED),
        lambda m: 1 - m * (1 - np.exp(-LR * WD)),
    ),
    "a decay around the multipliers": (
        wdjax.with_decoupled_decay(optax.chain(optax.sgd(LR), SCALED), WD, learning_rate=LR),
        lambda m: 1 - LR * WD,
    ),
    "a decay around the multipliers, with the same table": (
        wdjax.with_decoupled_decay(optax.chain(optax.sgd(LR), SCALED), WD, learning_rate=LR * TABLE),
        lambda m: 1 - m * LR * WD,
    ),
    "the multipliers after a wrapped optimizer": (
        optax.chain(wdjax.with_decoupled_decay(optax.sgd(LR), WD, learning_rate=LR), SCALED),
        lambda m: 1 - m * LR * WD,
    ),
}


@pytest.mark.parametrize("order", ORDERS)
def test_what_stands_before_is_multiplied_and_what_follows_is_not(order: str) -> None:
    optimizer, factor_of = ORDERS[order]
    assert_close(trajectory(optimizer), sgd_with(factor_of))


@pytest.mark.parametrize("order", ["the multipliers, then the L2 step", "the L2 step, then the multipliers"])
def test_a_proximal_step_solves_for_what_came_before_it(order: str) -> None:
    if order.startswith("the m"):
        step = wdjax.proximal_step(wdjax.L2(), WD, learning_rate=LR * TABLE)
        assert_close(
            trajectory(optax.chain(RATE, SCALED, step)), proximal(lambda w, u, m: (w + m * u) / (1 + m * LR * WD))
        )
    else:
        # The multipliers scale the whole move, so the end is no longer the minimum. This is no proximal step.
        step = wdjax.proximal_step(wdjax.L2(), WD, learning_rate=LR)
        wanted = proximal(lambda w, u, m: w + m * ((w + u) / (1 + LR * WD) - w))
        assert_close(trajectory(optax.chain(RATE, step, SCALED)), wanted)


def proximal(step: Callable[[np.ndarray, np.ndarray, float], np.ndarray]) -> Trees:
    after = {}
    for name, m in MULTIPLIERS.items():
        w, seen = START[name], []
        for g in GRADS[name]:
            seen.append(w := step(w, -LR * g, m))
        after[name] = np.array(seen)
    return after


def test_adam_undoes_multipliers_that_come_before_it() -> None:
    adam, bare = optax.scale_by_adam(eps=0.0), trajectory(optax.adam(LR, eps=0.0))
    assert_close(trajectory(optax.chain(SCALED, adam, RATE)), bare, 1e-12)
    for name, after in trajectory(optax.chain(adam, SCALED, RATE)).items():
        moved = MULTIPLIERS[name] * (bare[name] - START[name])
        np.testing.assert_allclose(after - START[name], moved, rtol=1e-12, atol=1e-13)


def test_heavy_ball_with_l2_in_the_gradient_has_the_recurrence_of_each_learning_rate() -> None:
    """w_(t+1) = (1 + mu - eta lambda) w_t - mu w_(t-1), with eta the learning rate of the parameter."""
    got = trajectory(optax.chain(wdjax.sgd_l2(LR, WD, momentum=0.9), SCALED), jax.tree.map(np.zeros_like, GRADS))
    for name, m in MULTIPLIERS.items():
        seen = [START[name], START[name]]
        for _ in range(STEPS):
            seen.append((1.9 - m * LR * WD) * seen[-1] - 0.9 * seen[-2])
        np.testing.assert_allclose(got[name], seen[2:], rtol=1e-12, atol=1e-14)


def test_a_multiplier_may_follow_a_schedule_of_its_own() -> None:
    t = np.arange(STEPS)
    at = {"embed": np.minimum(t / 20, 1.0), "block": np.full(STEPS, 0.5), "head": 1 / (1 + t)}
    # Optax's schedules are in float32, so these are looked up.
    table = wdjax.by_path({name: lambda count, at=values: jnp.asarray(at)[count] for name, values in at.items()})
    got = trajectory(optax.chain(wdjax.sgdw(LR, WD), wdjax.scale_by_path(table)), jax.tree.map(np.zeros_like, GRADS))
    assert_close(got, {name: np.cumprod(1 - at[name] * LR * WD)[:, None] * START[name] for name in at})


# Layer-wise learning rates of timm, from its recorded multipliers.


def adamw_in_numpy(w: np.ndarray, grads: np.ndarray, lr: np.ndarray, wd: float) -> np.ndarray:
    m = v = np.zeros_like(w)
    after = []
    for t, g in enumerate(grads):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        adam = (m / (1 - 0.9 ** (t + 1))) / (np.sqrt(v / (1 - 0.999 ** (t + 1))) + 1e-8)
        w = w - lr[t] * (adam + wd * w)
        after.append(w)
    return np.array(after)


@pytest.mark.parametrize("model", slow_but(TABLES, "eva02_tiny_patch14_224"))
def test_adamw_with_the_layer_wise_rates_of_timm(model: str) -> None:
    steps, wd, peak = 50, 0.05, 1e-2
    scales, decays = recorded(model), decayed(model)
    # One parameter for each of timm's groups. That the table gives timm's number to all is in paths/test_scales.py.
    group = {(scale, decays[path], path.partition("/")[0]): path for path, scale in scales.items()}
    paths = sorted(group.values())
    rng = np.random.default_rng(0)
    start = {path: rng.normal(size=2) for path in paths}
    grads = {path: rng.normal(size=(steps, 2)) for path in paths}
    cosine = 0.5 * (1 + np.cos(np.pi * np.arange(steps) / steps))
    adamw = wdjax.adamw(lambda count: jnp.asarray(peak * cosine)[count], wd, {path: decays[path] for path in paths})
    got = trajectory(optax.chain(adamw, wdjax.scale_by_path(TABLES[model])), grads, start)
    wanted = {
        path: adamw_in_numpy(start[path], grads[path], scales[path] * peak * cosine, wd * decays[path])
        for path in paths
    }
    assert_close(got, wanted, 1e-12)


# Around it: accumulated gradients, injected rates, frozen parameters.


def test_under_multi_steps_a_real_step_is_scaled_once_and_counted_once() -> None:
    table = wdjax.by_path({"embed": lambda count: 1.0 / (1.0 + count), "block": 0.5, "head": 1.0})
    optimizer = optax.chain(wdjax.sgdw(LR, WD, momentum=0.9), wdjax.scale_by_path(table))
    # MultiSteps keeps a mean in float32, which is exact for equal gradients in float32.
    grads = {name: np.float64(np.float32(grads)) for name, grads in GRADS.items()}
    parts = trajectory(optax.MultiSteps(optimizer, 3), {name: np.repeat(each, 3, 0) for name, each in grads.items()})
    assert_close({name: values[2::3] for name, values in parts.items()}, trajectory(optimizer, grads), 1e-12)


def test_learning_rate_and_multiplier_can_be_injected() -> None:
    def build(learning_rate: Any, backbone: Any) -> Any:
        table = wdjax.by_path({"head": 1.0}, default=backbone)
        return optax.chain(wdjax.sgdw(learning_rate, WD), wdjax.scale_by_path(table))

    optimizer = optax.inject_hyperparams(build)(learning_rate=LR, backbone=0.5)
    params = jax.tree.map(jnp.asarray, START)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for learning_rate, backbone in ((LR, 0.5), (LR / 2, 0.25)):
        state.hyperparams.update(learning_rate=jnp.asarray(learning_rate), backbone=jnp.asarray(backbone))
        updates, state = update(jax.tree.map(jnp.zeros_like, params), state, params)
        for name in START:
            scale = learning_rate * (1.0 if name == "head" else backbone)
            np.testing.assert_allclose(updates[name], -scale * WD * START[name], rtol=1e-13)
    assert update._cache_size() == 1


def test_around_an_injected_learning_rate_the_multipliers_come_after_the_decay() -> None:
    injected = optax.inject_hyperparams(optax.sgd)(learning_rate=LR)
    after = optax.chain(wdjax.with_decoupled_decay(injected, WD, learning_rate=LR), SCALED)
    assert_close(trajectory(after), sgd_with(lambda m: 1 - m * LR * WD))
    inside = wdjax.with_decoupled_decay(optax.chain(injected, SCALED), WD, learning_rate=LR * TABLE)
    with pytest.raises(ValueError, match=r"the optimizer keeps 0\.05 in its state, and the decay takes that one"):
        inside.init(START)


def test_a_multiplier_of_zero_still_has_a_state_and_what_follows_still_decays() -> None:
    table = wdjax.by_path({"embed": 0.0}, default=1.0)
    grads = {**GRADS, "embed": np.full((STEPS, 3), np.nan)}
    stopped = optax.chain(wdjax.adamw(LR, WD), wdjax.scale_by_path(table))
    after = trajectory(stopped, grads)
    np.testing.assert_array_equal(after["embed"], np.broadcast_to(START["embed"], (STEPS, 3)))
    state = stopped.init(START)
    assert optax.tree.get(state, "mu")["embed"].shape == (3,)
    frozen = wdjax.freeze(wdjax.adamw(LR, WD), wdjax.only("embed"))
    assert_close(after, trajectory(frozen, grads))
    assert jax.tree.leaves(optax.tree.get(frozen.init(START), "mu")["embed"]) == []
    # A decay that follows knows nothing of the multiplier.
    decays = optax.chain(stopped, wdjax.independent_decay(0.01))
    np.testing.assert_allclose(trajectory(decays)["embed"][-1], 0.99**STEPS * START["embed"], rtol=1e-12)
    np.testing.assert_array_equal(trajectory(wdjax.freeze(decays, wdjax.only("embed")))["embed"], after["embed"])


def test_a_multiplier_of_zero_leaves_the_gradient_in_a_global_norm() -> None:
    grads = {"embed": jnp.full(3, 100.0), "block": jnp.ones(3), "head": jnp.ones(3)}
    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0))
    table = wdjax.by_path({"embed": 0.0}, default=1.0)
    norms = {
        "scaled": np.sqrt(3 * 100.0**2 + 6),
        "frozen": np.sqrt(6),
    }
    optimizers = {
        "scaled": optax.chain(clipped, wdjax.scale_by_path(table)),
        "frozen": wdjax.freeze(clipped, wdjax.only("embed")),
    }
    for name, optimizer in optimizers.items():
        updates, _ = optimizer.update(grads, optimizer.init(START), START)
        np.testing.assert_allclose(updates["head"], np.full(3, -1 / norms[name]), rtol=1e-12)
        np.testing.assert_array_equal(updates["embed"], np.zeros(3))


# What plan, audit and monitor say of it.

PARAMS = {
    **{f"Block_{i}": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)} for i in range(2)},
    "head": jnp.ones((4, 1)),
}
DEPTH = wdjax.by_depth("Block_*", 0.5, last="head")
RATES = {"Block_0/kernel": 0.25, "Block_1/kernel": 0.5, "head": 1.0}  # Of LR * WD.
MASK = wdjax.all_but("bias")
LAYER_WISE = {
    "after a recipe": lambda lr: optax.chain(wdjax.adamw(lr, WD, MASK), wdjax.scale_by_path(DEPTH)),
    "within a decay with the table": lambda lr: wdjax.with_decoupled_decay(
        optax.chain(optax.adam(lr), wdjax.scale_by_path(DEPTH)), WD, MASK, learning_rate=lr * DEPTH
    ),
}


def test_a_plan_multiplies_the_table_of_learning_rates() -> None:
    for learning_rate in (LR * DEPTH, optax.cosine_decay_schedule(LR, 5000) * DEPTH):
        plan = wdjax.plan(PARAMS, WD, MASK, learning_rate=learning_rate)
        for path, multiplier in RATES.items():
            np.testing.assert_allclose(plan[path].per_step, multiplier * LR * WD, rtol=1e-6)
            assert plan[path].rate == WD
        assert plan["Block_0/bias"].per_step == 0
    plan = wdjax.plan(PARAMS, WD, MASK, learning_rate=LR * DEPTH)
    np.testing.assert_allclose(plan["Block_0/kernel"].per_thousand, 1 - (1 - LR * WD / 4) ** 1000, rtol=1e-9)


@pytest.mark.parametrize("build", LAYER_WISE.values(), ids=LAYER_WISE)
def test_an_audit_measures_the_products(build: Any) -> None:
    report = wdjax.audit(build, PARAMS, expected=LR * WD * DEPTH, mask=MASK, learning_rate=LR)
    for path, multiplier in RATES.items():
        np.testing.assert_allclose(report[path].rate, multiplier * LR * WD, rtol=1e-3)
        assert report[path].scales_with_learning_rate
        assert report[path].place == "update"
    assert [finding.name for finding in report.findings] == []


def test_an_audit_finds_a_decay_that_the_multipliers_do_not_reach() -> None:
    """Around the multipliers with the bare learning rate, the decay is the same in all layers."""
    inner = optax.chain(optax.adam(LR), wdjax.scale_by_path(DEPTH))
    bare = wdjax.with_decoupled_decay(inner, WD, MASK, learning_rate=LR)
    report = wdjax.audit(bare, PARAMS, expected=LR * WD * DEPTH, mask=MASK)
    np.testing.assert_allclose([report[path].rate for path in RATES], LR * WD, rtol=1e-3)
    assert "Block_0/kernel" in str(report.findings)


def test_an_audit_finds_a_decay_behind_a_multiplier_of_zero() -> None:
    stopped = optax.chain(wdjax.adamw(LR, WD), wdjax.scale_by_path(wdjax.by_path({"head": 0.0}, default=1.0)))
    for optimizer, found in ((stopped, []), (optax.chain(stopped, wdjax.independent_decay(0.01)), ["head"])):
        findings = wdjax.audit(optimizer, PARAMS, frozen=wdjax.only("head")).findings
        assert [path for finding in findings if finding.name == "decays frozen" for path in finding.paths] == found


@pytest.mark.parametrize("build", LAYER_WISE.values(), ids=LAYER_WISE)
def test_the_monitor_reads_the_products(build: Any) -> None:
    optimizer = wdjax.monitor(build(LR), learning_rate=LR, groups=lambda leaf: leaf.path)
    updates = optimizer.update(jax.tree.map(jnp.ones_like, PARAMS), optimizer.init(PARAMS), PARAMS)
    measured = wdjax.scalars(updates[1])
    for path, multiplier in RATES.items():
        np.testing.assert_allclose(measured[f"{path}/effective_rate"], multiplier * LR * WD, rtol=1e-6)
        # It divides by the one learning rate that it knows.
        np.testing.assert_allclose(measured[f"{path}/weight_decay"], multiplier * WD, rtol=1e-6)
    assert measured["Block_0/bias/decay_norm"] == 0


def test_none_in_a_tree_leaves_the_updates_alone() -> None:
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones(2)}
    for optimizer in (
        wdjax.scale_by_path({"a": 0.5, "b": None}),
        wdjax.constrain(wdjax.L2Ball(), {"a": 1.0, "b": None}),
        wdjax.decoupled_decay({"a": 0.5, "b": None}),
    ):
        updates, _ = optimizer.update(params, optimizer.init(params), params)
        np.testing.assert_array_equal(updates["b"], 1.0)
        assert (np.asarray(updates["a"]) != 1.0).all()
