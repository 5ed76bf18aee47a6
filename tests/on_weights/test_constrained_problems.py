"""What constraints are for: projected gradient descent ends at the solution of the constrained problem."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from sklearn.linear_model import Lasso

import wdjax

pytestmark = pytest.mark.usefixtures("x64")
RNG = np.random.default_rng(0)
X, NOISE = RNG.normal(size=(40, 8)), 0.1 * RNG.normal(size=40)
Y = X @ np.array([2.0, -1.5, 0.0, 0.0, 0.5, 0.0, -0.2, 0.1]) + NOISE


def solved(kind: Any, radius: Any = None, steps: int = 2000) -> np.ndarray:
    """Projected gradient descent on the least squares of X and Y."""
    optimizer = optax.chain(optax.sgd(0.3), wdjax.constrain(kind, radius))

    def step(carry: Any, _: Any) -> Any:
        w, state = carry
        updates, state = optimizer.update(X.T @ (X @ w - Y) / len(Y), state, w)
        return (optax.apply_updates(w, updates), state), None

    w = jnp.zeros(8)
    return np.asarray(jax.jit(lambda c: jax.lax.scan(step, c, length=steps))((w, optimizer.init(w)))[0][0])


def test_least_squares_in_an_l2_ball() -> None:
    radius = 1.0
    gram, moment = X.T @ X / len(Y), X.T @ Y / len(Y)
    ridge = lambda penalty: np.linalg.solve(gram + penalty * np.eye(8), moment)  # noqa: E731
    penalty = scipy.optimize.brentq(lambda x: np.linalg.norm(ridge(x)) - radius, 0, 100, xtol=1e-15, rtol=1e-14)
    np.testing.assert_allclose(solved(wdjax.L2Ball(), radius), ridge(penalty), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(solved(wdjax.L2Ball(), 100.0), ridge(0.0), rtol=1e-10, atol=1e-12)


def test_least_squares_in_an_l1_ball_is_the_lasso() -> None:
    lasso = Lasso(alpha=0.3, fit_intercept=False, tol=1e-14, max_iter=100_000).fit(X, Y).coef_
    found = solved(wdjax.L1Ball(), np.abs(lasso).sum())
    np.testing.assert_allclose(found, lasso, rtol=1e-7, atol=1e-8)
    np.testing.assert_array_equal(found == 0, lasso == 0)
    assert np.any(lasso == 0)


def test_nonnegative_least_squares() -> None:
    want, _ = scipy.optimize.nnls(X, Y)
    found = solved(wdjax.NonNegative())
    np.testing.assert_allclose(found, want, rtol=1e-10, atol=1e-12)
    np.testing.assert_array_equal(found == 0, want == 0)


def test_a_cap_on_singular_values_holds_in_every_step_and_ends_at_the_nearest_matrix() -> None:
    target = RNG.normal(size=(6, 4))
    optimizer = optax.chain(optax.sgd(0.3, momentum=0.5), wdjax.constrain(wdjax.SpectralBall(), 0.8))
    w = jnp.asarray(RNG.normal(size=(6, 4)))
    state, update = optimizer.init(w), jax.jit(optimizer.update)
    for _ in range(100):
        updates, state = update(w - target, state, w)
        w = optax.apply_updates(w, updates)
        assert np.linalg.svd(w, compute_uv=False)[0] <= 0.8 * (1 + 1e-14)
    u, s, vh = np.linalg.svd(target, full_matrices=False)
    np.testing.assert_allclose(w, u * np.minimum(s, 0.8) @ vh, rtol=1e-10, atol=1e-12)


def test_units_of_unit_norm_find_the_eigenvector_by_ascent() -> None:
    matrix = X.T @ X
    optimizer = optax.chain(optax.sgd(0.02), wdjax.constrain(wdjax.L2Sphere(per=-1), 1.0))
    w = jnp.asarray(RNG.normal(size=(8, 1)))
    state, update = optimizer.init(w), jax.jit(optimizer.update)
    for _ in range(1000):
        updates, state = update(-matrix @ w, state, w)
        w = optax.apply_updates(w, updates)
    largest = np.linalg.eigh(matrix)[1][:, -1:]
    np.testing.assert_allclose(np.abs(w), np.abs(largest), rtol=1e-9, atol=1e-10)
