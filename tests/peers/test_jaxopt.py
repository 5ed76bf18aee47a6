"""jaxopt's proximal operators beside wdjax's, on points and along trajectories of proximal gradient descent."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from peer import peer

import wdjax
from wdjax.penalties import SparseGroupLasso

prox = peer("jaxopt").prox

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("x64")]

LR, STRENGTH, STEPS = 0.1, 0.7, 200
RNG = np.random.default_rng(0)
POINTS = RNG.normal(size=(40, 6)) * np.logspace(-3, 1, 40)[:, None]  # Rows below and above every threshold.

Prox = Callable[[jax.Array, float, float], jax.Array]  # (w, strength, step)


def elastic_net(ratio: float) -> Prox:
    # jaxopt's second number is the ratio of the two strengths, and the first is that of L1 alone.
    return lambda w, strength, step: prox.prox_elastic_net(w, (strength * ratio, (1 - ratio) / ratio), step)


def group_lasso(axis: int | None) -> Prox:
    # jaxopt takes one norm of all it is given, so rows or columns go through vmap.
    if axis is None:
        return prox.prox_group_lasso
    return lambda w, strength, step: jax.vmap(lambda row: prox.prox_group_lasso(row, strength, step), axis, axis)(w)


def sparse_group_lasso(ratio: float) -> Prox:
    groups = group_lasso(1)
    return lambda w, strength, step: groups(prox.prox_lasso(w, strength * ratio, step), strength * (1 - ratio), step)


# For each of wdjax's penalties, jaxopt's operator.
PAIRS: dict[str, tuple[Any, Prox]] = {
    "L1": (wdjax.L1(), prox.prox_lasso),
    "L2": (wdjax.L2(), prox.prox_ridge),  # It lacks the factor 1/2 in its docstring, and has it in its code.
    "ElasticNet": (wdjax.ElasticNet(0.3), elastic_net(0.3)),
    "GroupLasso": (wdjax.GroupLasso(), group_lasso(None)),
    "GroupLasso of columns": (wdjax.GroupLasso(per=-1), group_lasso(1)),
    "GroupLasso of rows": (wdjax.GroupLasso(per=0), group_lasso(0)),
    "SparseGroupLasso of columns": (SparseGroupLasso(per=-1, l1_ratio=0.3), sparse_group_lasso(0.3)),
}
every_pair = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)


@every_pair
def test_the_proximal_map_of_a_point(pair: tuple[Any, Prox]) -> None:
    kind, theirs = pair
    for step in (0.01, 0.5, 3.0):
        w = jnp.asarray(POINTS)
        np.testing.assert_allclose(
            kind.prox(w, jnp.asarray(step * STRENGTH)), theirs(w, STRENGTH, step), rtol=1e-13, atol=1e-15
        )


@every_pair
def test_a_trajectory_of_proximal_gradient_descent(pair: tuple[Any, Prox]) -> None:
    kind, theirs = pair
    inputs = jnp.asarray(RNG.normal(size=(30, 8)))
    # One row and one column of the solution, and three more weights of it, are near zero.
    solution = RNG.normal(size=(8, 5)) * (np.arange(40).reshape(8, 5) % 13 > 0)
    solution[0], solution[:, 0] = 0, 0
    targets = inputs @ solution + 0.1 * RNG.normal(size=(30, 5))

    def loss(w: jax.Array) -> jax.Array:
        return 0.5 * jnp.sum((inputs @ w - targets) ** 2) / 30

    start = jnp.asarray(RNG.normal(size=(8, 5)))
    optimizer = optax.chain(optax.sgd(LR), wdjax.proximal_step(kind, 0.1, learning_rate=LR))
    ours, peer_w, state = start, start, optimizer.init(start)
    update, gradient = jax.jit(optimizer.update), jax.jit(jax.grad(loss))
    for _ in range(STEPS):
        updates, state = update(gradient(ours), state, ours)
        ours = optax.apply_updates(ours, updates)
        peer_w = theirs(peer_w - LR * gradient(peer_w), 0.1, LR)
        np.testing.assert_allclose(ours, peer_w, rtol=1e-12, atol=1e-13)
    np.testing.assert_array_equal(ours == 0, peer_w == 0)
    has_zeros = not isinstance(kind, wdjax.L2) and kind != wdjax.GroupLasso()
    assert bool(jnp.any(ours == 0)) == has_zeros
    assert bool(jnp.any(ours != 0))
