"""Keras' own optimizers and regularizers, on its JAX backend, beside wdjax's places and penalties."""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from peer import peer
from test_trajectories import keras_adam

import wdjax

os.environ.setdefault("KERAS_BACKEND", "jax")  # Keras reads it when it is imported.
keras = peer("keras")
if keras.backend.backend() != "jax":
    pytest.skip("KERAS_BACKEND is another one", allow_module_level=True)

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("x64")]

# Keras holds them in float32, which has these numbers exactly.
LR, WD, STEPS = 1 / 16, 1 / 8, 60
RNG = np.random.default_rng(0)
START = {"kernel": RNG.normal(size=(3, 2)), "bias": RNG.normal(size=2)}
GRADS = [{name: RNG.normal(size=value.shape) for name, value in START.items()} for _ in range(STEPS)]
RATE = optax.scale_by_learning_rate(LR)


def velocity(nesterov: bool = False) -> Any:
    return optax.chain(RATE, optax.trace(0.75, nesterov=nesterov))  # Keras' learning rate is within the velocity.


# For each optimizer of Keras, the same without its decay.
OPTIMIZERS: dict[str, tuple[Any, Any]] = {
    "SGD": (lambda **decay: keras.optimizers.SGD(LR, **decay), optax.sgd(LR)),
    "SGD momentum": (lambda **decay: keras.optimizers.SGD(LR, momentum=0.75, **decay), velocity()),
    "SGD nesterov": (lambda **decay: keras.optimizers.SGD(LR, momentum=0.75, nesterov=True, **decay), velocity(True)),
    "Adam": (
        lambda **decay: keras.optimizers.Adam(LR, beta_1=0.875, beta_2=0.9375, epsilon=2**-20, **decay),
        optax.chain(keras_adam(2**-20, 0.875, 0.9375), RATE),
    ),
    "AdamW": (
        lambda **decay: keras.optimizers.AdamW(LR, beta_1=0.875, beta_2=0.9375, epsilon=2**-20, **decay),
        optax.chain(keras_adam(2**-20, 0.875, 0.9375), RATE),
    ),
    "Lion": (
        lambda **decay: keras.optimizers.Lion(LR, beta_1=0.875, beta_2=0.9375, **decay),
        optax.lion(LR, 0.875, 0.9375, weight_decay=0.0),
    ),
}


def theirs(optimizer: Any, excluded: list[str]) -> list[dict[str, np.ndarray]]:
    variables = {name: keras.Variable(value, dtype="float64", name=name) for name, value in START.items()}
    if excluded:
        optimizer.exclude_from_weight_decay(var_names=excluded)
    optimizer.build(list(variables.values()))
    after = []
    for grads in GRADS:
        optimizer.apply([jnp.asarray(grads[name]) for name in variables])
        after.append({name: np.asarray(variable.value) for name, variable in variables.items()})
    return after


def ours(optimizer: Any) -> list[dict[str, np.ndarray]]:
    params = jax.tree.map(jnp.asarray, START)
    state, update, after = optimizer.init(params), jax.jit(optimizer.update), []
    for grads in GRADS:
        updates, state = update(jax.tree.map(jnp.asarray, grads), state, params)
        params = optax.apply_updates(params, updates)
        after.append({name: np.asarray(p) for name, p in params.items()})
    return after


def farthest(a: list[dict[str, np.ndarray]], b: list[dict[str, np.ndarray]]) -> float:
    return max(float(np.abs(x[name] - y[name]).max()) for x, y in zip(a, b, strict=True) for name in START)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_of_an_optimizer_is_decoupled(name: str) -> None:
    peer_of, bare = OPTIMIZERS[name]
    decayed = wdjax.with_decoupled_decay(bare, WD, wdjax.all_but("bias"), learning_rate=LR)
    got = ours(decayed)
    assert farthest(got, theirs(peer_of(weight_decay=WD), ["bias"])) < 1e-13
    assert farthest(got, theirs(peer_of(), [])) > 0.01


REGULARIZERS: dict[str, tuple[Any, Any, float]] = {
    "L1": (lambda: keras.regularizers.L1(0.25), wdjax.L1(), 0.25),
    "L2": (lambda: keras.regularizers.L2(0.25), wdjax.L2(), 2 * 0.25),  # It lacks the factor 1/2.
    "L1L2": (lambda: keras.regularizers.L1L2(0.25, 0.5), wdjax.ElasticNet(0.25 / 1.25), 0.25 + 2 * 0.5),
}


@pytest.mark.parametrize("name", REGULARIZERS)
def test_a_regularizer_is_a_penalty(name: str) -> None:
    build, kind, strength = REGULARIZERS[name]
    regularizer, params = build(), {"kernel": jnp.asarray(RNG.normal(size=(50, 40)))}
    value, gradient = jax.value_and_grad(lambda params: regularizer(params["kernel"]))(params)
    np.testing.assert_allclose(wdjax.penalty(params, kind, strength), value, rtol=1e-14)
    place = wdjax.add_penalty_to_grads(kind, strength)
    added, _ = place.update(jax.tree.map(jnp.zeros_like, params), place.init(params), params)
    np.testing.assert_allclose(added["kernel"], gradient["kernel"], rtol=1e-14, atol=1e-15)


def test_at_zero_keras_l1_has_a_gradient_and_wdjax_has_none() -> None:
    zero = jnp.zeros(1)
    assert jax.grad(keras.regularizers.L1(0.25))(zero)[0] == 0.25
    assert jax.grad(lambda w: wdjax.penalty(w, wdjax.L1(), 0.25))(zero)[0] == 0


@pytest.mark.parametrize("mode", ["rows", "columns"])
def test_the_orthogonal_regularizer_is_the_mean_cosine_and_orthogonality_the_sum_of_their_squares(mode: str) -> None:
    regularizer, count = keras.regularizers.OrthogonalRegularizer(0.25, mode), 3
    w = RNG.normal(size=(count, 7))
    w /= np.linalg.norm(w, axis=1, keepdims=True)
    # Rows of norm 1 whose cosines are all 0.6.
    equal = np.linalg.cholesky(0.4 * np.eye(count) + 0.6) @ np.linalg.qr(RNG.normal(size=(7, count)))[0].T
    for rows in (w, equal, w[:2]):
        cosines = (rows @ rows.T)[np.triu_indices(len(rows), 1)]
        given = jnp.asarray(rows if mode == "rows" else rows.T)
        theirs, ours = float(regularizer(given)) / 0.25, float(wdjax.penalties.Orthogonality().value(given))
        np.testing.assert_allclose(theirs, np.mean(np.abs(cosines)), rtol=1e-6)  # Keras normalizes with an epsilon.
        np.testing.assert_allclose(ours, np.sum(cosines**2) / 2, rtol=1e-12)
        bound = cosines.size * theirs**2 / 2
        assert ours >= bound * (1 - 1e-6)
        if rows is not w:  # All cosines are equal.
            np.testing.assert_allclose(ours, bound, rtol=1e-6)
        # Keras does not see the norms.
        np.testing.assert_allclose(regularizer(2 * given) / 0.25, theirs, rtol=1e-6)
        np.testing.assert_allclose(
            wdjax.penalties.Orthogonality().value(2 * given), (len(rows) * 9 + 32 * np.sum(cosines**2)) / 4, rtol=1e-12
        )
