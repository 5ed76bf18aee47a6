"""Constrained parameter regularization beside its authors' own code, and where that code leaves the paper.

The code takes the penalty and its gradient where Adam puts the weights; Algorithm 1 of the paper, and wdjax, take them
at the weights before the step. `after_the_step` says in wdjax what the code does. Multipliers and bounds are float32 in
the code, and some runs multiply a rounding by a million. So the chain of proof has two parts: NumPy with the code's
float32 is the code, and the same NumPy in float64 is wdjax.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from peer import peer
from test_trajectories import after_the_step

import wdjax
from wdjax.on_weights import InflectionPoint, WarmStart, cpr

torch = peer("torch")
theirs = peer("pytorch_cpr.adamcpr")

pytestmark = [
    pytest.mark.peers,  # Optax's bias correction.
    pytest.mark.usefixtures("x64"),
    # Of PyTorch, about what the code calls.
    pytest.mark.filterwarnings("ignore:Use _accelerator_graph_capture_health_check:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is_compiling. is deprecated"),
]

LR, STEPS, SHAPE = 0.02, 200, (4, 3)
# Ours, and how much of their value and gradient it has.
KINDS = {"l2": (wdjax.L2(), 0.5), "huber": (wdjax.Huber(1.0), 1.0), "l1": (wdjax.L1(), 1.0)}
VALUES = {
    "l2": lambda w: (w**2).sum(),
    "huber": lambda w: np.where(np.abs(w) < 1, w**2 / 2, np.abs(w) - 0.5).sum(),
    "l1": lambda w: np.abs(w).sum(),
}
GRADIENTS = {"l2": lambda w: 2 * w, "huber": lambda w: np.clip(w, -1, 1), "l1": np.sign}


def problem() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    return rng.normal(size=SHAPE), rng.normal(size=(STEPS, *SHAPE)) + rng.normal(size=SHAPE)


def by_their_code(start: np.ndarray, grads: np.ndarray, **options: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The weights, multipliers and bounds after each step of their single-tensor code."""
    w = torch.nn.Parameter(torch.tensor(start))
    optimizer = theirs.AdamCPR([{"params": [w], "regularize": True}], lr=LR, foreach=False, **options)
    after, multipliers, bounds = [], [], []
    for gradient in grads:
        w.grad = torch.tensor(gradient)
        optimizer.step()
        after.append(w.detach().numpy().copy())
        multipliers.append(float(optimizer.state[w]["lagmul"]))
        bounds.append(float(optimizer.state[w]["kappa"]))
    return np.array(after), np.array(multipliers), np.array(bounds)


def in_numpy(start: np.ndarray, grads: np.ndarray, method: str, given: float, name: str, rate: float, rounded: Any):
    """The same, with a rounding of all that the code holds in float32."""
    value, gradient = VALUES[name], GRADIENTS[name]
    bound = {"uniform": rounded(given), "dependent": rounded(rounded(given) * rounded(value(start)))}.get(method, 0.0)
    w, multiplier, after = start, rounded(0.0), []
    m, v = np.zeros(SHAPE), np.zeros(SHAPE)
    for count, g in enumerate(grads, 1):
        m, v = m + 0.1 * (g - m), 0.999 * v + 0.001 * g * g
        w = w - LR / (1 - 0.9**count) * m / (np.sqrt(v) / (1 - 0.999**count) ** 0.5 + 1e-8)
        if method == "warm_start" and count == given:
            bound = rounded(value(w))
        elif method != "warm_start" or count > given:
            growth = rounded(float(rounded(rate / w.size)) * (value(w) - float(bound)))
            multiplier = max(multiplier + growth, rounded(0.0))
            w = w - float(multiplier) * gradient(w)
        after.append(w)
    return np.array(after)


def ours(start: np.ndarray, grads: np.ndarray, transformation: Any) -> np.ndarray:
    optimizer = optax.chain(optax.adam(LR), after_the_step(transformation))

    def step(carry: Any, gradient: Any) -> Any:
        w, state = carry
        updates, state = optimizer.update(gradient, state, w)
        return (optax.apply_updates(w, updates), state), optax.apply_updates(w, updates)

    w = jnp.asarray(start)
    return np.asarray(jax.jit(lambda carry: jax.lax.scan(step, carry, grads)[1])((w, optimizer.init(w))))


CASES = {
    "l2, uniform": ("l2", "uniform", 6.0, 0.05),
    "l2, dependent": ("l2", "dependent", 0.8, 0.05),
    "l2, dependent, their rate": ("l2", "dependent", 0.8, 1.0),
    "l2, warm start": ("l2", "warm_start", 50, 0.05),
    "huber, uniform": ("huber", "uniform", 3.0, 1.0),
    "huber, dependent": ("huber", "dependent", 0.8, 1.0),
    "huber, warm start": ("huber", "warm_start", 50, 1.0),
    "l1, uniform": ("l1", "uniform", 6.0, 0.05),
}


@pytest.mark.parametrize("case", CASES)
def test_their_code_is_this_numpy_in_float32_and_ours_is_it_in_float64(case: str) -> None:
    (name, method, given, rate), (start, grads) = CASES[case], problem()
    options = {"kappa_init_method": method, "kappa_init_param": given, "kappa_update": rate, "reg_function": name}
    peers, multipliers, _ = by_their_code(start, grads, **options)
    replica = in_numpy(start, grads, method, given, name, rate, np.float32)
    np.testing.assert_allclose(replica, peers, rtol=1e-12, atol=1e-12)
    assert multipliers.max() > 1e-3

    kind, share = KINDS[name]
    bounds = {"uniform": share * given, "dependent": given * float(kind.value(start)), "warm_start": WarmStart(49)}
    mine = ours(start, grads, cpr(kind, bounds[method], update_rate=rate / share**2))
    exact = in_numpy(start, grads, method, given, name, rate, np.float64)
    early = slice(0, 20) if case == "l2, dependent, their rate" else slice(None)  # Chaos: a rounding grows.
    np.testing.assert_allclose(mine[early], exact[early], rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(mine[early], peers[early], rtol=0, atol=1e-6)


def test_with_their_rate_and_l2_a_rounding_grows() -> None:
    start, grads = problem()
    once, again = (in_numpy(w, grads, "dependent", 0.8, "l2", 1.0, np.float64) for w in (start, start * (1 + 1e-12)))
    assert np.abs(once[0] - again[0]).max() < 1e-11
    assert np.abs(once - again).max() > 1e-2  # It was 0.08.


def test_the_paper_s_rule_is_one_step_behind_the_code() -> None:
    start, grads = problem()
    peers, *_ = by_their_code(
        start, grads, kappa_init_method="uniform", kappa_init_param=6.0, kappa_update=0.05, reg_function="l2"
    )
    optimizer = optax.chain(optax.adam(LR), cpr(wdjax.L2(), 3.0, update_rate=0.2))
    w = jnp.asarray(start)
    state, after = optimizer.init(w), []
    for gradient in grads:
        updates, state = optimizer.update(jnp.asarray(gradient), state, w)
        w = optax.apply_updates(w, updates)
        after.append(float(jnp.sum(w**2)))
    code = (peers**2).sum((1, 2))
    assert np.abs(np.array(after) - code).max() > 0.1
    # Both hold the bound in the end: the code before it acts, the rule at the weights that are trained.
    np.testing.assert_allclose(np.mean(after[100:]), 6.0, rtol=0.05)
    assert np.mean(code[100:]) < np.mean(after[100:])


# Inflection points.


def rising() -> tuple[np.ndarray, np.ndarray]:
    """Gradients that move the weights away from zero, faster and faster until the 110th step."""
    speed = np.minimum(np.arange(1, STEPS + 1), 110) / 110
    speed = np.where(np.arange(STEPS) < 110, speed, speed * 0.97 ** np.maximum(np.arange(STEPS) - 110, 0))
    direction = np.sign(problem()[0])
    return 0.1 * direction, -speed[:, None, None] * direction


def test_in_their_code_no_inflection_point_is_ever_found() -> None:
    start, grads = rising()
    _, multipliers, bounds = by_their_code(start, grads, kappa_init_method="inflection_point", reg_step_size=10)
    assert set(bounds) == {1e6}
    assert set(multipliers) == {0.0}


@pytest.mark.parametrize("every", [10, 16])
def test_with_its_number_set_right_it_finds_the_inflection_point_that_we_find(
    every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(theirs, "HIGHKAPPA", 1000)  # The number that its branch compares with.
    # Their moving average starts at 0, which a short memory forgets before the first look.
    start, grads = rising()
    options = {"kappa_init_method": "inflection_point", "reg_step_size": every, "reg_ema_decay": 0.3}
    peers, _, bounds = by_their_code(start, grads, **options)
    found = int(np.flatnonzero(bounds != 1000)[0]) + 1  # After so many steps.
    optimizer = cpr(wdjax.L2(), InflectionPoint(every, smoothing=0.3))
    w = jnp.asarray(start)
    state = optimizer.init(w)
    for count in range(found + 1):
        assert np.isinf(state.leaf[1])
        w = peers[count - 1] if count else start
        _, state = optimizer.update(jnp.zeros(SHAPE), state, jnp.asarray(w))
    np.testing.assert_allclose(2 * state.leaf[1], bounds[found - 1], rtol=1e-6)
    assert found > 4 * every
