"""Hyperball: a normalized update and a sphere at the initial norm, around any optimizer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_constrain import adam, momentum
from test_contract import float64

import wdjax

ETA, MATRICES = 0.03, wdjax.weights_only()
pytestmark = pytest.mark.peers


def hyperball(scale_by: Any, eta: Any = ETA, mask: Any = MATRICES) -> Any:
    return optax.chain(
        scale_by,
        wdjax.normalized_update(mask),
        optax.scale_by_learning_rate(eta),
        wdjax.constrain(wdjax.L2Sphere(), "init", mask),
    )


def start(dtype: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {"kernel": jnp.asarray(rng.normal(size=(24, 16)), dtype), "bias": jnp.asarray(rng.normal(size=16), dtype)}


def gradients(params: Any, count: Any, like: Any = jnp) -> Any:
    """Of a smooth function of the weights, and noise."""
    noise = {name: like.cos(like.arange(p.size).reshape(p.shape) * (1.7 + count)) for name, p in params.items()}
    return {name: like.sin(3 * p) + 0.5 * noise[name].astype(p.dtype) for name, p in params.items()}


def train(optimizer: Any, params: Any, steps: int) -> Any:
    """All weights along the way."""

    def step(carry: Any, count: Any) -> Any:
        params, state = carry
        updates, state = optimizer.update(gradients(params, count), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    return jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(steps)))((params, optimizer.init(params)))[1]


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x)


def published(w: np.ndarray, d: np.ndarray, eta: float, radius: float) -> np.ndarray:
    """The update of the paper: R N(W - eta R N(u)), with R the norm at init."""
    return radius * unit(w - eta * radius * unit(d))


DIRECTIONS: dict[str, tuple[Any, Callable[..., Any]]] = {
    "AdamH": (optax.scale_by_adam(), adam),
    "SGD with momentum": (optax.trace(0.9), momentum),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", DIRECTIONS)
def test_the_published_update_for_a_hundred_steps(name: str) -> None:
    scale_by, direction = DIRECTIONS[name]
    got = train(hyperball(scale_by), start(np.float64), 100)
    want, memory = float64(start(np.float64)), dict.fromkeys(("kernel", "bias"))
    radius = np.linalg.norm(want["kernel"])
    for count in range(100):
        grads = gradients(want, count, np)
        for key in want:
            d, memory[key] = direction(grads[key], memory[key], count + 1)
            want[key] = published(want[key], d, ETA, radius) if key == "kernel" else want[key] - ETA * d
            np.testing.assert_allclose(got[key][count], want[key], rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("x64")
def test_around_the_direction_of_muon() -> None:
    # Without dimension numbers it takes no tree.
    matrices = lambda params: jax.tree.map(lambda w: optax.contrib.MuonDimensionNumbers(), params)  # noqa: E731
    muon = optax.contrib.scale_by_muon(weight_dimension_numbers=matrices)
    params = {"kernel": start(np.float64)["kernel"]}
    got = train(hyperball(muon), params, 60)["kernel"]
    want, state = params["kernel"], muon.init(params)
    radius = float(jnp.linalg.norm(want))
    update = jax.jit(muon.update)
    for count in range(60):
        d, state = update(gradients({"kernel": want}, count), state, {"kernel": want})
        want = jnp.asarray(published(np.asarray(want), np.asarray(d["kernel"]), ETA, radius))
        np.testing.assert_allclose(got[count], want, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("dtype", "most"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2e-3)], ids=["float32", "bfloat16"])
def test_the_norm_stays_for_two_hundred_steps(dtype: Any, most: float) -> None:
    params = start(dtype)
    path = float64(train(hyperball(optax.scale_by_adam()), params, 200)["kernel"])
    norms = np.linalg.norm(path.reshape(200, -1), axis=1)
    radius = np.linalg.norm(float64(params["kernel"]))
    assert np.abs(norms / radius - 1).max() < most
    moved = np.linalg.norm((path[1:] - path[:-1]).reshape(199, -1), axis=1) / radius
    # A step turns the weights by arcsin(eta) at most, and by about eta if it is not along them.
    assert moved.max() <= 2 * np.sin(np.arcsin(ETA) / 2) * (1 + 1e-4) + (dtype == jnp.bfloat16) * 2e-3
    np.testing.assert_allclose(moved[:10], ETA, rtol=0.1)


def test_codes_that_take_the_norm_anew_in_each_step_lose_it_in_bfloat16() -> None:
    # levanter's adamh.py and Paddle's Muon: R is the norm of the present weights.
    def step(w: Any, count: Any) -> Any:
        u = gradients({"w": w}, count)["w"].astype(jnp.float32)
        size = jnp.linalg.norm(w.astype(jnp.float32))
        new = w.astype(jnp.float32) - ETA * size * u / jnp.linalg.norm(u)
        return (w + (new * size / jnp.linalg.norm(new) - w.astype(jnp.float32)).astype(w.dtype)), None

    w = start(jnp.bfloat16)["kernel"]
    end = jax.jit(lambda w: jax.lax.scan(step, w, jnp.arange(2000))[0])(w)
    ours = train(hyperball(optax.identity()), {"kernel": w}, 2000)["kernel"][-1]
    of_peers, of_ours = (np.linalg.norm(float64(x)) / np.linalg.norm(float64(w)) - 1 for x in (end, ours))
    assert abs(of_ours) < 1e-3 < abs(of_peers)


@pytest.mark.usefixtures("x64")
def test_decoupled_weight_decay_on_a_sphere_is_a_larger_learning_rate() -> None:
    # (1 - eta lambda) w - eta d points where w - eta / (1 - eta lambda) d points.
    sphere = wdjax.constrain(wdjax.L2Sphere(), "init")
    decay, eta = 0.5, 0.1
    decayed = optax.chain(wdjax.decoupled_decay(decay), optax.scale_by_learning_rate(eta), sphere)
    plain = optax.chain(optax.scale_by_learning_rate(eta / (1 - eta * decay)), sphere)
    got, want = (train(optimizer, start(np.float64), 50) for optimizer in (decayed, plain))
    for key in ("kernel", "bias"):
        np.testing.assert_allclose(got[key], want[key], rtol=1e-11, atol=1e-12)


def test_weights_that_start_at_zero() -> None:
    # With "init" they stay there; with a radius in numbers the first step puts them on the sphere.
    params = {"kernel": jnp.zeros((4, 3))}
    with pytest.warns(UserWarning, match=r"radius='init' is 0 at 'kernel'"):
        path = train(hyperball(optax.identity()), params, 2)["kernel"]
    assert not np.any(path)
    at_one = optax.chain(
        wdjax.normalized_update(), optax.scale_by_learning_rate(ETA), wdjax.constrain(wdjax.L2Sphere(), 1.0)
    )
    np.testing.assert_allclose(np.linalg.norm(train(at_one, params, 2)["kernel"][-1]), 1, rtol=1e-6)
