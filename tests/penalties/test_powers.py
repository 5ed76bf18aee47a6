"""The penalty of a power of the weights: its proximal map, the flow to zero, and pWD and other libraries beside it."""

from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wdjax
from wdjax import testing
from wdjax.penalties import Lp

pytestmark = pytest.mark.usefixtures("x64")

RNG = np.random.default_rng(0)
POWERS = [0.01, 0.1, 0.5, 0.8, 0.99, 1.0, 1.01, 1.1, 4 / 3, 1.5, 1.9, 2.0, 2.5, 3.0, 4.0, 10.0]
every_power = pytest.mark.parametrize(
    "p", [pytest.param(p, marks=() if p in (0.1, 0.8, 1.0, 1.1, 3.0) else pytest.mark.slow) for p in POWERS]
)


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    """What skglm, pyproximal and PAdam return. `penalties.json` has the versions and the calls."""
    with np.load(Path(__file__).parent.parent / "data" / "penalties.npz") as file:
        return dict(file)


def cubic(p: float, q: float) -> np.ndarray:
    """The real root of x^3 + p x + q = 0 for p > 0, by Cardano's formula, written without cancellation."""
    big = np.cbrt(np.abs(q) / 2 + np.sqrt(q**2 / 4 + p**3 / 27))
    return -np.sign(q) * np.abs(q) / (big**2 + p / 3 + (p / 3 / big) ** 2)


# Closed forms for positive weights (Chaux et al. 2007, proposition 4.8 and others like it).
CLOSED: dict[str, Any] = {
    "4/3": (4 / 3, lambda w, k: cubic(k, -w) ** 3),
    "3/2": (1.5, lambda w, k: (2 * w / (k + np.sqrt(k**2 + 4 * w))) ** 2),
    "3": (3.0, lambda w, k: 2 * w / (1 + np.sqrt(1 + 4 * k * w))),
    "4": (4.0, lambda w, k: cubic(1 / k, -w / k)),
}


@pytest.mark.parametrize("name", CLOSED)
def test_the_proximal_map_is_the_closed_form_for_all_sizes(name: str) -> None:
    p, closed = CLOSED[name]
    w, k = np.meshgrid(np.logspace(-6, 6, 61), np.logspace(-6, 6, 49))
    found = np.asarray(jax.jit(Lp(p).prox)(jnp.asarray(w), jnp.asarray(k)))
    np.testing.assert_allclose(found, closed(w, k), rtol=1e-13)
    with jax.enable_x64(False):
        narrow = jax.jit(Lp(p).prox)(jnp.asarray(w, jnp.float32), jnp.asarray(k, jnp.float32))
        assert narrow.dtype == jnp.float32
        np.testing.assert_allclose(narrow, found, rtol=1e-5, atol=1e-37)


@pytest.mark.parametrize("p", [1.0001, 1.001, 1.01])
def test_near_the_power_one_the_proximal_map_is_exact_up_to_rounding(p: float) -> None:
    v, ratio = np.meshgrid(np.logspace(-3, 3, 61), np.linspace(0.2, 4, 20))
    k = ratio * v
    found = Lp(p).prox(jnp.asarray(v + k * v ** (p - 1)), jnp.asarray(k))
    np.testing.assert_allclose(found, v, rtol=1e-14)


@every_power
def test_the_proximal_map_solves_its_equation_or_is_zero(p: float) -> None:
    w, k = np.meshgrid(np.logspace(-4, 4, 81), np.logspace(-4, 4, 41))
    v = np.asarray(jax.jit(Lp(p).prox)(jnp.asarray(w), jnp.asarray(k)))
    is_zero = v == 0
    solved = np.where(is_zero, w, v + k * np.where(is_zero, 1, v) ** (p - 1))
    np.testing.assert_allclose(solved, w, rtol=1e-12)
    if p <= 1:  # The threshold in the docstring.
        c = 1.0 if p == 1 else (2 - p) / (2 - 2 * p) * ((2 - 2 * p) / p) ** (1 / (2 - p))
        np.testing.assert_array_equal(is_zero, w <= c * k ** (1 / (2 - p)) * (1 + 1e-13))
    else:
        tiny = np.finfo(float).tiny
        assert np.all((w / k)[is_zero] ** (1 / (p - 1)) < tiny)  # It underflows.


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_below_one_the_proximal_map_is_the_lower_of_two_minima(p: float) -> None:
    k = 0.7
    for w in np.linspace(0.05, 4, 80):
        grid = np.linspace(0, w, 20001)
        cost = 0.5 * (grid - w) ** 2 + k * grid**p / p
        found = float(Lp(p).prox(jnp.asarray(w), jnp.asarray(k)))
        assert 0.5 * (found - w) ** 2 + k * found**p / p <= cost.min() + 1e-12
        assert abs(found - grid[np.argmin(cost)]) < 3e-4 or abs(np.diff(np.sort(cost))[0]) < 1e-12


@pytest.mark.parametrize("p", [0.5, 2 / 3])
def test_below_one_the_proximal_map_is_the_recorded_thresholding_of_skglm(p: float, recorded: Any) -> None:
    theirs = recorded["L0_5" if p == 0.5 else "L2_3"]
    for step, want in zip(recorded["steps"], theirs, strict=True):
        found = Lp(p).prox(jnp.asarray(recorded["points"]), jnp.asarray(p * step))
        np.testing.assert_allclose(found, want, rtol=1e-13 if p == 0.5 else 1e-6, atol=1e-15)  # Theirs cancels.
        np.testing.assert_array_equal(found == 0, want == 0)


def test_the_powers_one_and_two_are_l1_and_l2() -> None:
    w, step = jnp.asarray(np.r_[0.0, RNG.normal(size=20)]), jnp.asarray(0.3)
    for p, same in ((1, wdjax.L1()), (2, wdjax.L2())):
        chex.assert_trees_all_close(
            (Lp(p).value(w), Lp(p).gradient(w), Lp(p).prox(w, step)),
            (same.value(w), same.gradient(w), same.prox(w, step)),
            rtol=1e-14,
            atol=1e-15,
        )


@every_power
def test_float32_and_every_place_pass_the_assertions(p: float) -> None:
    testing.assert_gradient(Lp(p))
    testing.assert_prox(Lp(p))


# Derivatives.


@every_power
def test_the_derivatives_of_the_proximal_map_are_those_of_its_solution(p: float) -> None:
    w, k = jnp.asarray([-0.02, 0.3, -1.5, 20.0]), jnp.asarray([0.4, 0.4, 0.1, 2.0])
    prox, h, ones, none = jax.jit(Lp(p).prox), 1e-6, jnp.ones(4), jnp.zeros(4)
    moved = (prox(w + h, k) - prox(w - h, k)) / (2 * h), (prox(w, k + h) - prox(w, k - h)) / (2 * h)
    found = tuple(jax.jvp(prox, (w, k), tangents)[1] for tangents in ((ones, none), (none, ones)))
    chex.assert_trees_all_close(found, moved, rtol=1e-6, atol=1e-8)
    chex.assert_trees_all_close(jax.grad(lambda w, k: jnp.sum(prox(w, k)), (0, 1))(w, k), found, rtol=1e-13)
    second = jax.grad(lambda w: jnp.sum(jax.grad(lambda w: jnp.sum(prox(w, k)))(w)))(w)
    slope = jax.grad(lambda w: jnp.sum(prox(w, k)))
    np.testing.assert_allclose(second, (slope(w + h) - slope(w - h)) / (2 * h), rtol=1e-5, atol=1e-6)
    at_zero = jax.grad(lambda w, k: prox(w, k), (0, 1))(0.0, 0.4)
    np.testing.assert_allclose(at_zero, (0 if p < 2 else 1 / 1.4 if p == 2 else 1, 0), rtol=1e-14)


@pytest.mark.parametrize("p", [0.5, 1.5, 3.0])
def test_the_strength_has_a_hypergradient_and_may_be_swept(p: float) -> None:
    params = {"w": jnp.asarray(RNG.normal(size=6) * 2)}

    def end(strength: Any) -> Any:
        optimizer = optax.chain(optax.sgd(0.1), wdjax.proximal_step(Lp(p), strength, learning_rate=0.1))
        weights, state = params, optimizer.init(params)
        for _ in range(5):
            updates, state = optimizer.update(weights, state, weights)
            weights = optax.apply_updates(weights, updates)
        return jnp.sum(weights["w"] ** 2)

    for strength in (0.0, 0.3):
        slope = jax.grad(end)(strength)
        up, here = end(strength + 1e-7), end(strength)
        np.testing.assert_allclose(slope, (up - here) / 1e-7, rtol=1e-5)
    strengths = jnp.asarray([0.0, 0.1, 1.0])
    np.testing.assert_allclose(jax.vmap(end)(strengths), [end(s) for s in (0.0, 0.1, 1.0)], rtol=1e-13)


@pytest.mark.peers
@pytest.mark.parametrize("p", [0.5, 1.5, 3.0])
def test_the_derivative_for_complex_weights_is_the_one_for_two_real_numbers(p: float) -> None:
    w, k, h = jnp.asarray([1.2 - 0.9j, -3.0j]), jnp.asarray(0.3), 1e-6
    for direction in (1.0, 1j, 0.6 - 0.8j):
        _, found = jax.jvp(lambda w: Lp(p).prox(w, k), (w,), (jnp.full(2, direction, w.dtype),))
        moved = (Lp(p).prox(w + h * direction, k) - Lp(p).prox(w - h * direction, k)) / (2 * h)
        np.testing.assert_allclose(found, moved, rtol=1e-7, atol=1e-9)


@every_power
def test_no_nan_at_extremes_and_none_is_hidden(p: float) -> None:
    for dtype in (jnp.float32, jnp.float64):
        info = jnp.finfo(dtype)
        w = jnp.asarray([0.0, -0.0, info.tiny, -info.tiny / 4, 1e-20, 1.0, -1e20, info.max], dtype)
        for k in (0.0, info.tiny, 1e-20, 1.0, 1e20):
            step = jnp.asarray(k, dtype)
            found = Lp(p).prox(w, step)
            assert found.dtype == dtype
            assert np.all(np.isfinite(found))
            assert np.all(np.abs(found) <= np.abs(w))
            slopes = jax.jvp(Lp(p).prox, (w[:6], step), (jnp.ones_like(w[:6]), jnp.zeros_like(step)))[1]
            assert np.all(np.isfinite(slopes))
        np.testing.assert_array_equal(Lp(p).prox(w, jnp.zeros([], dtype))[4:], w[4:])
        assert np.all(np.isfinite(Lp(p).gradient(w[:6])))
        assert np.all(np.isnan(Lp(p).prox(jnp.full(1, jnp.nan, dtype), jnp.ones([], dtype))))
        assert np.all(np.isnan(Lp(p).gradient(jnp.full(1, jnp.nan, dtype))))


# What it does to weights.


def decayed(p: float, learning_rate: float, steps: int, start: np.ndarray) -> np.ndarray:
    """The weights after steps without a gradient."""
    place = wdjax.proximal_step(Lp(p), 1.0, learning_rate=learning_rate)

    def step(carry: Any, _: Any) -> Any:
        w, state = carry
        updates, state = place.update(jnp.zeros_like(w), state, w)
        return (w + updates, state), w + updates

    w = jnp.asarray(start)
    return np.asarray(jax.jit(lambda w: jax.lax.scan(step, (w, place.init(w)), length=steps)[1])(w))


@pytest.mark.parametrize("p", [0.5, 1.0, 1.5, 2.5, 4.0])
def test_without_a_gradient_weights_follow_the_flow(p: float) -> None:
    # d|w|/dt = -|w|^(p - 1): |w|^(2 - p) falls by 2 - p per unit of time.
    start, rate = np.array([0.5, -1.0, 2.0]), 1e-3
    path = decayed(p, rate, 1000, start)
    time = rate * np.arange(1, 1001)[:, None]
    flow = np.maximum(np.abs(start) ** (2 - p) - (2 - p) * time, 0) ** (1 / (2 - p))
    np.testing.assert_allclose(np.abs(path), flow, atol=0.03 if p < 1 else 4 * rate)
    halved = decayed(p, rate / 2, 2000, start)[1::2]
    early = time[:, 0] < 0.2  # Far from zero, the error is proportional to the step.
    error, smaller = (np.max(np.abs(np.abs(w) - flow)[early]) for w in (path, halved))
    if p != 1:
        np.testing.assert_allclose(error / smaller, 2, rtol=0.05)


@pytest.mark.parametrize(("p", "steps"), [(0.5, 900), (1.0, 1200), (1.5, 2020)])
def test_below_two_weights_become_exactly_zero_after_finitely_many_steps(p: float, steps: int) -> None:
    # The flow from 1 ends at the time 1 / (2 - p).
    (path,) = decayed(p, 1e-3, steps, np.array([1.0])).T
    first = int(np.argmax(path == 0))
    assert path[first] == 0
    assert abs(1e-3 * first - 1 / (2 - p)) < (0.05 if p < 1 else 0.01)
    assert np.all(path[first:] == 0)


def test_above_two_weights_fall_as_a_power_of_time() -> None:
    path = decayed(4.0, 0.01, 20_000, np.array([1.0, 100.0]))
    np.testing.assert_allclose(path[-1], (2 * 200) ** -0.5, rtol=0.01)  # Wherever they started.


@pytest.mark.parametrize("p", [0.5, 1.5])
def test_the_explicit_form_jumps_around_zero_where_the_proximal_step_is_zero(p: float) -> None:
    w = {"w": jnp.asarray([1e-6])}
    zeros = {"w": jnp.zeros(1)}
    explicit = optax.chain(wdjax.add_penalty_to_grads(Lp(p), 1.0), optax.scale(-0.1))
    moved = optax.apply_updates(w, explicit.update(zeros, explicit.init(w), w)[0])["w"]
    np.testing.assert_allclose(moved, 1e-6 - 0.1 * 1e-6 ** (p - 1), rtol=1e-13)
    assert (abs(moved[0]) > 99) == (p == 0.5)
    solved = wdjax.proximal_step(Lp(p), 1.0, learning_rate=0.1)
    assert abs((w["w"] + solved.update(zeros, solved.init(w), w)[0]["w"])[0]) < 1e-9


@pytest.mark.parametrize("p", [0.5, 0.8, 1.2, 1.5, 3.0])
def test_on_an_orthogonal_problem_the_solution_is_the_proximal_map(p: float) -> None:
    # Half the squared distance to `best`, plus the penalty: its minimum is prox(best, strength), whatever the steps.
    best, strength = np.array([3.0, -2.5, 0.05, -0.02, 0.0]), 0.4
    optimizer = optax.chain(optax.sgd(1.0), wdjax.proximal_step(Lp(p), strength, learning_rate=1.0))
    w, state = jnp.ones(5), optimizer.init(jnp.ones(5))
    for _ in range(3):
        updates, state = optimizer.update(w - best, state, w)
        w = w + updates
    np.testing.assert_allclose(w, Lp(p).prox(jnp.asarray(best), jnp.asarray(strength)), atol=1e-15)
    assert np.count_nonzero(w) == (2 if p < 1 else 4)


@pytest.mark.parametrize("p", [0.7, 1.3, 3.0])
def test_on_least_squares_the_gradients_of_loss_and_penalty_cancel(p: float) -> None:
    x = RNG.normal(size=(40, 6))
    y = x @ np.array([3.0, -2.0, 1.5, 0.05, 0.0, 0.0]) + 0.1 * RNG.normal(size=40)
    strength, rate = 0.3, 0.2
    optimizer = optax.chain(optax.sgd(rate), wdjax.proximal_step(Lp(p), strength, learning_rate=rate))

    def step(carry: Any, _: Any) -> Any:
        w, state = carry
        updates, state = optimizer.update(x.T @ (x @ w - y) / 40, state, w)
        return (w + updates, state), None

    start = jnp.zeros(6) if p >= 1 else jnp.ones(6)
    w = np.asarray(jax.jit(lambda w: jax.lax.scan(step, (w, optimizer.init(w)), length=4000)[0][0])(start))
    slope = x.T @ (x @ w - y) / 40
    moves = w != 0
    assert np.count_nonzero(moves) == (3 if p < 1 else 6)
    np.testing.assert_allclose(slope[moves], -strength * (np.sign(w[moves]) * np.abs(w[moves]) ** (p - 1)), atol=1e-10)


# pWD (arXiv 2404.10824): w <- (w + u) / (1 + k |w|^(p - 2)), in the form of the authors' code.


def pwd(w: np.ndarray, u: np.ndarray, k: float, p: float) -> np.ndarray:
    x = np.abs(w) ** (2 - p)
    return (w + u) * x / (x + k)


def adam(grads: np.ndarray, learning_rate: float) -> np.ndarray:
    """Adam's updates. They depend on the gradients only."""
    m, v, updates = np.zeros(grads[0].shape), np.zeros(grads[0].shape), []
    for t, g in enumerate(grads, 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        updates.append(-learning_rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8))
    return np.array(updates)


LR, LAMBDA = 0.01, 0.05


@pytest.mark.parametrize("p", [0.8, 1.5, 2.0])
def test_padam_is_the_formula_of_pwd_with_a_factor_p(p: float, recorded: Any) -> None:
    w = recorded["padam/start"]
    for u, theirs in zip(adam(recorded["padam/grads"], LR), recorded[f"padam/{p}"], strict=True):
        w = pwd(w, u, p * LR * LAMBDA, p)
        np.testing.assert_allclose(w, theirs, rtol=1e-11, atol=1e-14)


@pytest.mark.peers
@pytest.mark.parametrize(("p", "largest"), [(0.8, 4e-4), (1.5, 4e-4), (2.0, 1e-14)])
def test_a_proximal_step_is_near_padam_and_equal_for_the_power_two(p: float, largest: float, recorded: Any) -> None:
    optimizer = optax.chain(optax.adam(LR), wdjax.proximal_step(Lp(p), p * LAMBDA, learning_rate=LR))
    start = jnp.asarray(recorded["padam/start"])
    w, state, found = start, optimizer.init(start), []
    for grads in recorded["padam/grads"]:
        updates, state = jax.jit(optimizer.update)(jnp.asarray(grads), state, w)
        w = optax.apply_updates(w, updates)
        found.append(w)
    theirs = recorded[f"padam/{p}"]
    is_large = np.min(np.abs(theirs), axis=0) > 0.1
    error = np.max(np.abs(np.array(found) - theirs), axis=0)
    assert np.max(error[is_large]) < largest
    # A weight that starts at zero stays there in PAdam, except for the power two.
    assert np.all(theirs[:, 0, 0] == 0) == (p < 2)
    assert found[-1][0, 0] < -0.05


@pytest.mark.parametrize("p", [0.5, 1.5, 3.0])
def test_pwd_and_the_proximal_map_agree_to_first_order(p: float) -> None:
    w = np.array([0.5, -1.0, 2.0])
    errors = []
    for k in (1e-3, 5e-4):
        ours = np.asarray(Lp(p).prox(jnp.asarray(w), jnp.asarray(k)))
        errors.append(np.max(np.abs(ours - pwd(w, 0 * w, k, p))))
    np.testing.assert_allclose(errors[0] / errors[1], 4, rtol=0.02)
    # The second order: w (k |w|^(p - 2))^2 (p - 2).
    np.testing.assert_allclose(errors[0], np.max(np.abs(w) ** (2 * p - 3)) * 1e-6 * abs(p - 2), rtol=0.02)


def test_a_weight_of_zero_moves_here_and_never_in_pwd() -> None:
    w, u, k = np.zeros(2), np.array([0.5, 0.001]), 0.01
    np.testing.assert_array_equal(pwd(w, u, k, 0.8), 0)
    place = wdjax.proximal_step(Lp(0.8), k, learning_rate=1.0)
    moved = place.update(jnp.asarray(u), place.init(jnp.asarray(w)), jnp.asarray(w))[0]
    assert 0.48 < moved[0] < 0.5
    assert moved[1] == 0


@pytest.mark.parametrize("p", [0, -1.0, float("inf"), float("nan"), "2", True, None, np.ones(2), 10**400])
def test_a_power_that_is_not_positive_is_refused(p: Any) -> None:
    with pytest.raises(ValueError, match=r"Lp: p must be a positive finite number, got .*Write Lp\(p=1\.5\)"):
        Lp(p)


def test_a_power_may_be_numpys() -> None:
    for p in (np.float32(1.5), np.float64(1.5), 1.5):
        assert repr(Lp(p)) == "Lp(p=1.5)"
    assert hash(Lp(np.int64(2))) == hash(Lp(2))
