"""Constrained parameter regularization: against NumPy in float64, what it leads to, and when its bounds are taken."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from in_numpy import adam, momentum
from jax.sharding import PartitionSpec as P
from slow import slow_but
from test_contract import assert_same_bits
from test_shard_map import mesh_of, sharded

import wdjax
from wdjax.on_weights import AtInit, InflectionPoint, WarmStart, cpr

STEPS, SHAPE = 120, (6, 4)


class Kind(NamedTuple):
    """A penalty, its value and its gradient in NumPy, and an update rate at which no rounding grows."""

    kind: Any
    value: Callable[[np.ndarray], float]
    gradient: Callable[[np.ndarray], np.ndarray]
    update_rate: float = 0.5


def huber_value(w: np.ndarray) -> float:
    return np.where(np.abs(w) <= 0.5, w**2 / 2, 0.5 * (np.abs(w) - 0.25)).sum()


KINDS = {
    "L2": Kind(wdjax.L2(), lambda w: (w**2).sum() / 2, lambda w: w, 0.1),
    "Huber": Kind(wdjax.Huber(0.5), huber_value, lambda w: np.clip(w, -0.5, 0.5)),
    "L1": Kind(wdjax.L1(), lambda w: np.abs(w).sum(), np.sign, 0.01),
    "ElasticNet": Kind(
        wdjax.ElasticNet(0.3),
        lambda w: (0.3 * np.abs(w) + 0.35 * w**2).sum(),
        lambda w: 0.3 * np.sign(w) + 0.7 * w,
        0.01,
    ),
    "GroupLasso": Kind(
        wdjax.GroupLasso(per=-1),
        lambda w: np.linalg.norm(w, axis=0).sum(),
        lambda w: w / np.linalg.norm(w, axis=0),
        0.02,
    ),
}


class Oracle:
    """The algorithm, without JAX: its bounds are numbers, or taken when the oracle says so."""

    def __init__(self, kind: Kind, bound: Any, update_rate: float) -> None:
        self.kind, self.given, self.update_rate = kind, bound, update_rate
        self.multiplier, self.bound, self.taken_at = 0.0, np.inf, -1
        self.values: list[float] = []
        self.smooth: list[float] = []

    def update(self, u: np.ndarray, w: np.ndarray) -> np.ndarray:
        step, found = len(self.values), self.kind.value(w)
        self.values.append(found)
        due = self.factor(step, found)
        if due is not None and self.taken_at < 0:
            self.bound, self.taken_at = due * found, step
        if isinstance(self.given, (int, float)):
            self.bound = self.given
        elif callable(self.given):
            self.bound = self.given(step)
        self.multiplier = max(self.multiplier + self.update_rate * (found - self.bound) / w.size, 0.0)
        return u - self.multiplier * self.kind.gradient(w)

    def factor(self, step: int, found: float) -> float | None:
        """The multiple of the penalty that becomes the bound in this step, if one does."""
        if isinstance(self.given, AtInit):
            return float(self.given.factor) if step == 0 else None
        if isinstance(self.given, WarmStart):
            return 1.0 if step == self.given.steps else None
        if isinstance(self.given, InflectionPoint):
            share, every = self.given.smoothing, self.given.every
            self.smooth.append(share * self.smooth[-1] + (1 - share) * found if step else found)
            looks = self.smooth[every::every] if step % every == 0 else []
            return 1.0 if len(looks) > 2 and np.diff(looks, 2)[-1] < 0 else None
        return None


def falling(step: Any) -> Any:
    return 12.0 + 20.0 * 0.97**step


BOUNDS: dict[str, Any] = {
    "number": 12.0,
    "schedule": falling,
    "AtInit": AtInit(0.6),
    "WarmStart": WarmStart(30),
    "InflectionPoint": InflectionPoint(every=10, smoothing=0.8),
    "InflectionPoint, not smoothed": InflectionPoint(every=7, smoothing=0.0),
}


def start() -> np.ndarray:
    return np.random.default_rng(0).normal(size=SHAPE)


def targets() -> np.ndarray:
    """Weights are pulled away from zero, at first slowly."""
    rng = np.random.default_rng(1)
    far = 4 * rng.normal(size=SHAPE)
    rise = 1 / (1 + np.exp((40 - np.arange(STEPS)) / 8))
    return rise[:, None, None] * far + 0.1 * rng.normal(size=(STEPS, *SHAPE))


DIRECTIONS: dict[str, tuple[Any, Any, float]] = {
    "SGD with momentum": (lambda: optax.trace(0.9), momentum, 0.02),
    "Adam": (optax.scale_by_adam, adam, 0.05),
}
FAST = ("L2-number-Adam", "L2-AtInit-SGD with momentum", "Huber-WarmStart-Adam", "L2-InflectionPoint-SGD with momentum")
CASES = [f"{kind}-{bound}-{name}" for kind in KINDS for bound in BOUNDS for name in DIRECTIONS]


def leaf(state: Any) -> Any:
    return optax.tree.get(state, "leaf")


@pytest.mark.peers
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", slow_but(CASES, *FAST))
def test_a_hundred_and_twenty_steps_around_an_optimizer(case: str) -> None:
    of_kind, of_bound, of_direction = case.split("-")
    kind, bound, (scale_by, direction, lr) = KINDS[of_kind], BOUNDS[of_bound], DIRECTIONS[of_direction]
    held = cpr(kind.kind, bound, update_rate=kind.update_rate)
    optimizer = optax.chain(scale_by(), optax.scale_by_learning_rate(lr), held)

    @jax.jit
    def step(w: Any, state: Any, target: Any) -> Any:
        updates, state = optimizer.update(w - target, state, w)
        return optax.apply_updates(w, updates), state

    oracle, memory, want = Oracle(kind, bound, kind.update_rate), None, start()
    w = jnp.asarray(want)
    state = optimizer.init(w)
    for count, target in enumerate(targets(), 1):
        w, state = step(w, state, target)
        d, memory = direction(want - target, memory, count)
        want = want + oracle.update(-lr * d, want)
        np.testing.assert_allclose(w, want, rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(leaf(state)[:2], [oracle.multiplier, oracle.bound], rtol=1e-10, atol=1e-12)
    assert np.isfinite(oracle.bound)
    assert np.linalg.norm(want) < 20
    if isinstance(bound, InflectionPoint):
        assert oracle.taken_at > 2 * bound.every


# What it is for: the penalty is at most the bound in the limit, and the weights are the best that obey.


def descend(kind: Any, bound: Any, target: Any, lr: float, steps: int, start: Any = 0.0) -> Any:
    optimizer = optax.chain(optax.sgd(lr), cpr(kind, bound))

    def step(carry: Any, _: Any) -> Any:
        w, state = carry
        updates, state = optimizer.update(w - target, state, w)
        return (optax.apply_updates(w, updates), state), None

    w = jnp.zeros_like(target) + start
    (w, state), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps))((w, optimizer.init(w)))
    return w, leaf(state)[0]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("lr", [0.05, 0.3])
def test_sgd_ends_at_the_projection_and_the_multiplier_at_lagrange_s(lr: float) -> None:
    # Minimize |w - a|^2 / 2 subject to |w| <= r: w = r a / |a|, with the Lagrange multiplier |a| / r - 1.
    target = np.random.default_rng(0).normal(size=12)
    for share in (0.3, 0.9):
        radius = share * np.linalg.norm(target)
        w, multiplier = descend(wdjax.L2(), radius**2 / 2, jnp.asarray(target), lr, 4000)
        np.testing.assert_allclose(w, share * target, rtol=1e-9)
        np.testing.assert_allclose(multiplier, lr * (1 / share - 1), rtol=1e-8)
    w, multiplier = descend(wdjax.L2(), np.sum(target**2) / 2 * 1.01, jnp.asarray(target), lr, 4000)
    np.testing.assert_allclose(w, target, rtol=1e-9)
    assert multiplier == 0


def multiplier_of(kind: Kind, w_of: Callable[[float], np.ndarray], bound: float) -> float:
    low, high = 0.0, 100.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if kind.value(w_of(middle)) > bound else (low, middle)
    return low


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["L2", "Huber"])
def test_the_limit_is_the_minimum_subject_to_the_bound(name: str) -> None:
    # Where the gradients balance, (w - a) + nu dR(w) = 0, so w is the proximal point of a at nu; nu by bisection.
    kind, target = KINDS[name], 2 * np.random.default_rng(0).normal(size=12)
    prox = {
        "L2": lambda nu: target / (1 + nu),
        "Huber": lambda nu: np.where(
            np.abs(target) <= (1 + nu) * 0.5, target / (1 + nu), target - nu * 0.5 * np.sign(target)
        ),
    }[name]
    bound = 0.4 * kind.value(target)
    nu = multiplier_of(kind, prox, bound)
    w, multiplier = descend(kind.kind, bound, jnp.asarray(target), 0.1, 8000)
    np.testing.assert_allclose(w, prox(nu), rtol=1e-8)
    np.testing.assert_allclose([multiplier, kind.value(np.asarray(w))], [0.1 * nu, bound], rtol=1e-8)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("lr", [0.1, 0.5])
def test_the_limit_is_stable_up_to_the_update_rate_in_the_docstring(lr: float) -> None:
    # Along the radius r, the errors of weight and multiplier have the matrix [[1 - lr - m - k r^2, -r], [k r, 1]],
    # with k = update_rate / size: stable for k r^2 < 2 (2 - lr - m), which is about 4 for small lr and m.
    target, radius = np.full(4, 1.0), 1.6
    m = lr * (2.0 / radius - 1)
    most = 2 * (2 - lr - m) * 4 / radius**2
    for share, is_stable in ((0.95, True), (1.05, False)):
        optimizer = optax.chain(optax.sgd(lr), cpr(wdjax.L2(), radius**2 / 2, update_rate=share * most))
        w = jnp.asarray(target * radius / 2 * 1.001)
        state = optimizer.init(w)
        of_sgd, held = cast(tuple[Any, Any], state)
        state = (of_sgd, held._replace(leaf=held.leaf.at[0].set(m)))
        for _ in range(400):
            updates, state = optimizer.update(w - target, state, w)
            w = optax.apply_updates(w, updates)
        assert (abs(float(jnp.linalg.norm(w)) - radius) < 1e-3) == is_stable


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("share", [0.2, 0.05])
def test_with_a_corner_at_zero_and_a_low_bound_a_multiplier_may_run_away(share: float) -> None:
    # Weights cross the corner by up to m in each step, so the penalty stays at about m times their number.
    target = np.random.default_rng(0).normal(size=24)
    for name in ("L2", "Huber", "L1", "ElasticNet", "GroupLasso"):
        kind = wdjax.GroupLasso() if name == "GroupLasso" else KINDS[name].kind
        bound = share * float(kind.value(jnp.asarray(target)))
        w, _ = descend(kind, bound, jnp.asarray(target), 0.1, 3000, start=target)
        runs_away = name == "L1" or (share == 0.05 and name in ("ElasticNet", "GroupLasso"))
        assert bool(kind.value(w) < 1.05 * bound) == (not runs_away), name


def test_in_bfloat16_a_multiplier_grows_until_a_step_no_longer_rounds_to_nothing() -> None:
    w = jnp.ones(4, jnp.bfloat16)
    optimizer = cpr(wdjax.L2(), 1.998)  # An excess of 0.002, so m grows by 0.0005 in each step.
    state, multipliers = optimizer.init(w), []
    while jnp.all(w == 1):
        updates, state = optimizer.update(jnp.zeros_like(w), state, w)
        w = optax.apply_updates(w, updates)
        multipliers.append(float(state.leaf[0]))
    assert multipliers[0] < 2**-9 < multipliers[-1]
    assert wdjax.L2().value(w) < 1.998


@pytest.mark.peers
def test_adam_ends_within_the_bound() -> None:
    target = jnp.asarray(np.random.default_rng(0).normal(size=40), jnp.float32)
    bound = 0.1 * float(wdjax.L2().value(target))
    optimizer = optax.chain(optax.adam(0.01), cpr(wdjax.L2(), bound))
    w, update = jnp.zeros(40), jax.jit(optimizer.update)
    state = optimizer.init(w)
    for _ in range(3000):
        updates, state = update(w - target, state, w)
        w = optax.apply_updates(w, updates)
    np.testing.assert_allclose(wdjax.L2().value(w), bound, rtol=1e-3)


# Where it does nothing.


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("bound", [100.0, AtInit(1.01), WarmStart(5), InflectionPoint(2)], ids=repr)
def test_while_the_bound_is_not_known_or_not_exceeded_every_bit_stays(bound: Any, dtype: Any) -> None:
    params = {"w": jnp.asarray(start(), dtype)}
    updates = {"w": jnp.asarray([[0.0, -0.0, 1e-3, -1e-3]] * 6, dtype)}
    for act in (cpr(wdjax.L2(), bound).update, jax.jit(cpr(wdjax.L2(), bound).update)):
        state = cpr(wdjax.L2(), bound).init(params)
        for _ in range(5):
            new, state = act(updates, state, params)
            assert_same_bits(new, updates)
            assert state.leaf["w"][0] == 0


@pytest.mark.parametrize("weight", [np.inf, np.nan, 1e30])
@pytest.mark.parametrize("bound", [WarmStart(5), InflectionPoint(2)], ids=repr)
def test_while_the_bound_is_not_known_a_penalty_that_is_not_finite_does_nothing(bound: Any, weight: float) -> None:
    params, updates = {"w": jnp.array([weight, 1.0])}, {"w": jnp.array([0.5, -0.0])}
    optimizer = cpr(wdjax.L2(), bound)
    state = optimizer.init(params)
    for _ in range(3):
        new, state = jax.jit(optimizer.update)(updates, state, params)
        assert_same_bits(new, updates)
        assert state.leaf["w"][0] == 0


@pytest.mark.parametrize("factor", [0.0, jnp.zeros([]), 1e-50])
def test_a_factor_of_zero_is_a_bound_of_zero(factor: Any) -> None:
    params, updates = {"w": jnp.ones(2)}, {"w": jnp.zeros(2)}
    new = [o.update(updates, o.init(params), params)[0] for o in (cpr(wdjax.L2(), b) for b in (AtInit(factor), 0.0))]
    np.testing.assert_array_equal(new[0]["w"], new[1]["w"])
    assert np.all(new[0]["w"] < 0)


@pytest.mark.parametrize("kind", [wdjax.L2(), wdjax.GroupLasso(), wdjax.Huber()], ids=repr)
def test_weights_of_zero_and_arrays_without_weights(kind: Any) -> None:
    for w in (jnp.zeros(3), jnp.zeros((0, 2))):
        for bound in (0.0, AtInit(0.5)):
            new, state = cpr(kind, bound).update(w, cpr(kind, bound).init(w), w)
            assert_same_bits(new, w)
            assert state.leaf[0] == 0


# When bounds are taken.


def bounds_of(optimizer: Any, sizes: np.ndarray) -> list[float]:
    """The bound in the state after each step, for weights whose L2 has these values."""
    w = jnp.ones(2, jnp.float64)
    state, update, found = optimizer.init(w), jax.jit(optimizer.update), []
    for size in sizes:
        _, state = update(jnp.zeros_like(w), state, jnp.sqrt(size) * w)
        found.append(float(state.leaf[1]))
    return found


@pytest.mark.usefixtures("x64")
def test_a_warm_start_takes_the_penalty_after_its_steps() -> None:
    sizes = 1.0 + np.arange(20.0)
    found = bounds_of(cpr(wdjax.L2(), WarmStart(7)), sizes)
    np.testing.assert_allclose(found, [np.inf] * 7 + [sizes[7]] * 13)
    np.testing.assert_allclose(bounds_of(cpr(wdjax.L2(), AtInit(0.5)), sizes), [0.5] * 20)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("every", [1, 5, 8])
def test_an_inflection_point_is_found_at_the_first_look_after_it(every: int) -> None:
    # A logistic curve turns where it has grown to the half, at step 43.
    sizes = 1 + 100 / (1 + np.exp((43.3 - np.arange(100.0)) / 6))
    found = bounds_of(cpr(wdjax.L2(), InflectionPoint(every, smoothing=0.0)), sizes)
    steps = np.arange(every, 100, every)
    looked = steps[2:][np.diff(sizes[steps], 2) < 0][0]
    assert 43 < looked <= 44 + 2 * every
    np.testing.assert_allclose(found, [np.inf] * looked + [sizes[looked]] * (100 - looked))


@pytest.mark.usefixtures("x64")
def test_smoothing_keeps_noise_from_being_an_inflection() -> None:
    steps = np.arange(400.0)
    noise = np.random.default_rng(0).normal(size=400)
    sizes = 10 + 1e-3 * steps**2 + 0.5 * noise  # It never turns.
    assert np.isinf(bounds_of(cpr(wdjax.L2(), InflectionPoint(40, smoothing=0.95)), sizes)[-1])
    assert np.isfinite(bounds_of(cpr(wdjax.L2(), InflectionPoint(4, smoothing=0.0)), sizes)[-1])


def test_each_parameter_has_its_own_inflection_point() -> None:
    steps = np.arange(60)
    sizes = {name: 1 + 9 / (1 + np.exp((turn - steps) / 4)) for name, turn in {"a": 15.5, "b": 35.5}.items()}
    optimizer = cpr(wdjax.L2(), InflectionPoint(2, smoothing=0.0))
    params = {"a": jnp.ones(2), "b": jnp.ones(2), "count": jnp.arange(3)}
    state, update, first = optimizer.init(params), jax.jit(optimizer.update), {}
    for step in steps:
        params |= {name: jnp.full(2, np.sqrt(size[step]), jnp.float32) for name, size in sizes.items()}
        _, state = update(params, state, params)
        for name in sizes:
            if np.isfinite(state.leaf[name][1]):
                first.setdefault(name, int(step))
    assert first == {"a": 18, "b": 38}


# By the engine.


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("bound", ["AtInit", "InflectionPoint"])
def test_each_layer_of_a_stack_has_a_multiplier_and_a_bound(bound: str) -> None:
    optimizer = cpr(wdjax.L2(), BOUNDS[bound], stacked_axes={"layers": 1})
    alone = cpr(wdjax.L2(), BOUNDS[bound])
    scale = np.array([0.5, 1.0, 2.0]).reshape(3, 1, 1)
    params = {"layers": jnp.asarray(scale * np.random.default_rng(0).normal(size=(3, 4, 2))), "head": jnp.ones(2)}
    each = [params["layers"][i] for i in range(3)]
    state, states = optimizer.init(params), [alone.init(w) for w in each]
    assert jax.tree.map(np.shape, state.leaf) == {"layers": (3, len(states[0].leaf)), "head": states[0].leaf.shape}
    update, update_alone, acted = jax.jit(optimizer.update), jax.jit(alone.update), []
    for step in range(60):
        noise = 0.1 * np.random.default_rng(step).normal(size=(3, 4, 2))
        moves = jnp.asarray(noise) + (0.05 if step < 25 else 0.02) * params["layers"]
        updates, state = update({"layers": moves, "head": jnp.zeros(2)}, state, params)
        params = optax.apply_updates(params, updates)
        for i in range(3):
            new, states[i] = update_alone(moves[i], states[i], each[i])
            each[i] = each[i] + new
            np.testing.assert_allclose(params["layers"][i], each[i], rtol=1e-12)
            np.testing.assert_allclose(state.leaf["layers"][i], states[i].leaf, rtol=1e-12)
        acted.append(np.asarray(state.leaf["layers"][:, 0]))
    assert len(set(np.max(acted, 0))) == 3


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("check_vma", [True, False], ids=["checked", "unchecked"])
@pytest.mark.parametrize(
    ("kind", "own", "spec"),
    [
        (wdjax.L2(), None, P("data")),
        (wdjax.Huber(0.5), None, P(None, "data")),
        (wdjax.GroupLasso(per=-1), None, P(None, "data")),
        (wdjax.GroupLasso(per=-1), "data", P("data")),
    ],
    ids=["L2", "Huber", "groups that are whole", "groups that are split"],
)
def test_within_shard_map_a_bound_is_that_of_the_whole_parameter(
    kind: Any, own: Any, spec: Any, check_vma: Any
) -> None:
    whole, bound = cpr(kind, AtInit(0.7)), AtInit(0.7)
    split = cpr(wdjax.GroupLasso(per=-1, axis_name=own) if own else kind, bound, axis_name=None if own else "data")
    params, updates = (np.random.default_rng(seed).normal(size=(16, 8)) for seed in (0, 1))
    act = sharded(split.update, mesh_of(8), (spec, P(), spec), (spec, P()), check_vma)
    state = other = whole.init(params)
    w = v = jnp.asarray(params)
    acted = []
    for _ in range(5):
        new, state = whole.update(0.1 * updates, state, w)
        here, other = act(0.1 * updates, other, v)
        w, v = w + new, v + here
        np.testing.assert_allclose(v, w, rtol=1e-12)
        np.testing.assert_allclose(other.leaf, state.leaf, rtol=1e-12)
        acted.append(float(state.leaf[0]))
    assert max(acted) > 0


@pytest.mark.usefixtures("x64")
def test_bounds_by_path_and_a_mask() -> None:
    params = {name: jnp.asarray(start()) for name in ("a", "b", "c")}
    table = wdjax.by_path({"a": 2.0, "b": falling}, default=1.0)
    optimizer = cpr(wdjax.L2(), table, wdjax.all_but("c"))
    state, oracles = (
        optimizer.init(params),
        {"a": Oracle(KINDS["L2"], 2.0, 1.0), "b": Oracle(KINDS["L2"], falling, 1.0)},
    )
    moved = params
    for _ in range(5):
        updates, state = optimizer.update(jax.tree.map(jnp.zeros_like, moved), state, moved)
        want = {name: oracle.update(np.zeros(SHAPE), np.asarray(moved[name])) for name, oracle in oracles.items()}
        for name in oracles:
            np.testing.assert_allclose(updates[name], want[name], rtol=1e-12)
        assert not np.any(updates["c"])
        moved = optax.apply_updates(moved, updates)


# Bounds that are learned or swept.


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("of", [lambda x: x, lambda x: AtInit(x / 10.0)], ids=["number", "AtInit"])
def test_the_end_is_differentiable_in_the_bound_and_can_be_swept(of: Any) -> None:
    target = jnp.asarray(targets()[-1])

    def end(bound: Any) -> Any:
        optimizer = optax.chain(optax.sgd(0.1), cpr(wdjax.L2(), of(bound)))

        def step(carry: Any, _: Any) -> Any:
            w, state = carry
            updates, state = optimizer.update(w - target, state, w)
            return (optax.apply_updates(w, updates), state), None

        w = jnp.asarray(start())
        (w, _), _ = jax.lax.scan(step, (w, optimizer.init(w)), length=60)
        return jnp.sum(w**2)

    step = 1e-6
    slope = (end(5.0 + step) - end(5.0 - step)) / (2 * step)
    assert abs(slope) > 1e-3
    np.testing.assert_allclose(jax.grad(end)(5.0), slope, rtol=1e-6)
    np.testing.assert_allclose(jax.jacfwd(end)(5.0), slope, rtol=1e-6)
    bounds = jnp.array([1.0, 5.0, 1e6])
    np.testing.assert_allclose(jax.vmap(end)(bounds), [end(bound) for bound in bounds], rtol=1e-12)


@pytest.mark.peers
def test_the_monitor_reads_the_multiplier() -> None:
    weights = wdjax.weights_only()
    params = {"kernel": jnp.asarray(start(), jnp.float32), "bias": jnp.ones(4)}
    for bound in (2.0, AtInit(0.5), wdjax.by_path({"kernel": 2.0}, default=3.0)):
        optimizer = wdjax.monitor(optax.chain(optax.adam(0.01), cpr(wdjax.L2(), bound, weights)))
        state = optimizer.init(params)
        for _ in range(3):
            _, state = jax.jit(optimizer.update)(params, state, params)
            scalars = {name: float(x) for name, x in wdjax.scalars(state).items()}
            multiplier = float(leaf(state.inner_state)["kernel"][0])
            assert multiplier > 0
            (label,) = {name.rpartition("/")[0] for name in scalars if name.endswith("weight_decay")}
            np.testing.assert_allclose(scalars[f"{label}/effective_rate"], multiplier, rtol=1e-5)
            np.testing.assert_allclose(scalars[f"{label}/weight_decay"], multiplier, rtol=1e-5)


def test_the_monitor_reads_nothing_of_a_bound_that_is_not_known() -> None:
    optimizer = wdjax.monitor(optax.chain(optax.sgd(0.01), cpr(wdjax.L2(), WarmStart(9))))
    _, state = jax.jit(optimizer.update)(jnp.ones(2), optimizer.init(jnp.ones(2)), jnp.ones(2))
    found = {name.rpartition("/")[2]: float(x) for name, x in wdjax.scalars(state).items()}
    assert found["decay_norm"] == found["effective_rate"] == 0


# Errors.


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: cpr("l2", 1.0), TypeError, r"cpr: kind must be a penalty with the method value.*Write cpr\(L2\(\)"),
        (lambda: cpr(wdjax.L2(), None), TypeError, r"bound must be a number.*AtInit\(factor\).*got None\. Write cpr"),
        (lambda: cpr(wdjax.L2(), "init"), TypeError, r"got 'init'\. Write cpr\(L2\(\), AtInit\(0\.8\)"),
        (lambda: cpr(wdjax.L2(), AtInit), TypeError, r"bound must be a number.*Write cpr"),
        (lambda: cpr(wdjax.L2(), -1.0), ValueError, r"cpr: bound must be finite and not negative, got -1\.0"),
        (lambda: cpr(wdjax.L2(), wdjax.only("w")), TypeError, r"a mask was given as bound\. Write cpr.*mask="),
        (lambda: cpr(wdjax.L2(), {"w": AtInit(0.5)}), TypeError, r"AtInit\(factor=0\.5\) is not for tables and trees"),
        (lambda: cpr(wdjax.L2(), 1.0, update_rate=0.0), ValueError, r"update_rate must be a number > 0, got 0\.0"),
        (lambda: cpr(wdjax.L2(), 1.0, update_rate=jnp.ones([])), TypeError, r"constant of the program.*static_args"),
        (lambda: cpr(wdjax.GroupLasso(axis_name="x"), 1.0, axis_name="x"), ValueError, r"Leave axis_name out of cpr"),
        (
            lambda: AtInit(optax.constant_schedule(0.5)),
            ValueError,
            r"AtInit: factor must be a number >= 0, got .*Write AtI",
        ),
        (lambda: AtInit(-1.0), ValueError, r"AtInit: factor must be finite and not negative, got -1\.0"),
        (
            lambda: WarmStart(0),
            ValueError,
            r"WarmStart: steps must be an integer from 1 to 2\*\*31 - 1, got 0\. Write WarmStart",
        ),
        (lambda: WarmStart(1e3), ValueError, r"WarmStart: steps must be an integer from 1 to 2\*\*31 - 1, got 1000\.0"),
        (
            lambda: WarmStart(2**31),
            ValueError,
            r"WarmStart: steps must be an integer from 1 to 2\*\*31 - 1, got 2147483648\. Write",
        ),
        (lambda: WarmStart(np.bool_(True)), ValueError, r"WarmStart: steps must be .*, got np\.True_\."),
        (
            lambda: InflectionPoint(0),
            ValueError,
            r"InflectionPoint: every must be an integer from 1 to 2\*\*31 - 1, got 0",
        ),
        (
            lambda: InflectionPoint(10**400),
            ValueError,
            r"every must be an integer from 1 to 2\*\*31 - 1, got 10{79}\.\.\.",
        ),
        (lambda: InflectionPoint(9, 1.0), ValueError, r"smoothing must be a number from 0 to less than 1, got 1\.0"),
    ],
)
def test_wrong_arguments(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_numbers_of_numpy_are_numbers() -> None:
    assert repr(WarmStart(np.int64(5))) == repr(WarmStart(5))
    of_numpy = InflectionPoint(np.uint8(5), np.float32(0.5))
    assert repr(of_numpy) == repr(InflectionPoint(5, 0.5))
    assert float(of_numpy.due(jnp.array(5))) == 1.0


def test_wrong_states_bounds_and_masks() -> None:
    params = {"w": jnp.ones((3, 2))}
    old = cpr(wdjax.L2(), 1.0).init(params)
    with pytest.raises(ValueError, match=r"the state has an array of shape \(2,\), and this bound needs \(5,\).*init"):
        cpr(wdjax.L2(), InflectionPoint()).update(params, old, params)
    rows = cpr(wdjax.L2(), {"w": np.ones((3, 1))})
    with pytest.raises(ValueError, match=r"a bound of shape \(3, 1\) differs within a parameter.*by_path"):
        rows.update(params, rows.init(params), params)
    part = cpr(wdjax.L2(), 1.0, {"w": np.array([[True], [False], [True]])})
    with pytest.raises(ValueError, match=r"selects parts of the parameter.*Select whole parameters"):
        part.update(params, part.init(params), params)
