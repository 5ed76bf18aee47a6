"""Keras' own constraints with its own optimizer, on its JAX backend, beside `constrain`."""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from peer import peer

import wdjax

os.environ.setdefault("KERAS_BACKEND", "jax")  # Keras reads it when it is imported.
keras = peer("keras")
if keras.backend.backend() != "jax":
    pytest.skip("KERAS_BACKEND is another one", allow_module_level=True)

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("x64")]

LR, MOMENTUM, STEPS = 1 / 16, 0.75, 60  # Keras holds them in float32, which has these numbers exactly.
CASES = {
    "MaxNorm of units": (lambda: keras.constraints.MaxNorm(0.75, axis=0), wdjax.L2Ball(per=-1), 0.75, (6, 4)),
    "MaxNorm of filters": (
        lambda: keras.constraints.MaxNorm(0.75, axis=(0, 1, 2)),
        wdjax.L2Ball(per=-1),
        0.75,
        (2, 2, 3, 4),
    ),
    "MaxNorm of a convolution by default": (
        lambda: keras.constraints.MaxNorm(0.75),
        wdjax.L2Ball(axis=0),
        0.75,
        (2, 2, 3, 4),
    ),
    "MaxNorm of rows": (lambda: keras.constraints.MaxNorm(0.75, axis=1), wdjax.L2Ball(axis=1), 0.75, (6, 4)),
    "UnitNorm": (lambda: keras.constraints.UnitNorm(axis=0), wdjax.L2Sphere(per=-1), 1.0, (6, 4)),
    "NonNeg": (keras.constraints.NonNeg, wdjax.NonNegative(), None, (6, 4)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_constraint_of_keras(name: str) -> None:
    build, kind, radius, shape = CASES[name]
    rng = np.random.default_rng(0)
    start, grads = rng.normal(size=shape), rng.normal(size=(STEPS, *shape)) - 0.2
    theirs = keras.Variable(start, dtype="float64")
    theirs.constraint = build()
    peers = keras.optimizers.SGD(LR, momentum=MOMENTUM)
    peers.build([theirs])
    # At a constant learning rate it does not matter that Keras has it within the velocity.
    optimizer = optax.chain(optax.sgd(LR, momentum=MOMENTUM), wdjax.constrain(kind, radius))
    ours: Any = jnp.asarray(start)
    state, update, most = optimizer.init(ours), jax.jit(optimizer.update), 0.0
    for grad in grads:
        updates, state = update(jnp.asarray(grad), state, ours)
        ours = optax.apply_updates(ours, updates)
        peers.apply([jnp.asarray(grad)], [theirs])
        most = max(most, float(jnp.abs(theirs.value - ours).max()))
    # MaxNorm and UnitNorm divide by the norm plus 1e-7.
    assert most < (1e-13 if radius is None else 2e-6), most
    assert radius is None or most > 1e-9


def test_max_norm_shrinks_weights_within_the_ball() -> None:
    small = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4))) * 1e-3
    norms = jnp.linalg.norm(small, axis=0)
    factor = jnp.linalg.norm(keras.constraints.MaxNorm(0.75, axis=0)(small), axis=0) / norms
    np.testing.assert_allclose(1 - factor, 1e-7 / norms, rtol=1e-3)  # About 5e-5 in each step.
    np.testing.assert_array_equal(wdjax.L2Ball(per=-1).project(small, 0.75), small)
