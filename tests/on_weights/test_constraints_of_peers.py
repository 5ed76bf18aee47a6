"""The constraints of Keras and PyTorch, from their own code."""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wdjax

STEPS, EPSILON = 60, 1e-7  # Keras and torch.renorm divide by the norm plus this.
pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("x64")]


@pytest.fixture
def keras() -> Any:
    os.environ.setdefault("KERAS_BACKEND", "jax")
    module = pytest.importorskip("keras")
    if module.backend.backend() != "jax":
        pytest.skip("Keras runs on another backend")
    before = module.config.floatx()
    module.config.set_floatx("float64")
    yield module
    module.config.set_floatx(before)


def gradient(shape: Any, count: int) -> np.ndarray:
    # The same for both, whatever the weights are, so that a difference does not grow by itself.
    return np.cos(np.arange(np.prod(shape)).reshape(shape) * (1.7 + count)) - 0.2


def start(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape)


def ours(kind: Any, radius: Any, w: Any) -> list[np.ndarray]:
    optimizer = optax.chain(optax.sgd(0.1, momentum=0.9), wdjax.constrain(kind, radius))
    w = jnp.asarray(w)
    state, update, path = optimizer.init(w), jax.jit(optimizer.update), []
    for count in range(STEPS):
        updates, state = update(jnp.asarray(gradient(w.shape, count)), state, w)
        w = optax.apply_updates(w, updates)
        path.append(np.asarray(w))
    return path


KERAS = {
    "MaxNorm of units": (lambda c: c.MaxNorm(0.8, axis=0), wdjax.L2Ball(per=-1), 0.8, (6, 4)),
    "MaxNorm of filters": (lambda c: c.MaxNorm(0.8, axis=(0, 1, 2)), wdjax.L2Ball(per=-1), 0.8, (2, 2, 3, 4)),
    "UnitNorm": (lambda c: c.UnitNorm(axis=0), wdjax.L2Sphere(per=-1), 1.0, (6, 4)),
    "NonNeg": (lambda c: c.NonNeg(), wdjax.NonNegative(), None, (6, 4)),
}


@pytest.mark.parametrize("name", KERAS)
def test_the_constraints_of_keras_with_its_own_optimizer(name: str, keras: Any) -> None:
    make, kind, radius, shape = KERAS[name]
    # Keras subtracts lr * g from momentum * velocity, which is the same at a constant learning rate.
    variable = keras.Variable(start(*shape), dtype="float64")
    variable.constraint = make(keras.constraints)
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    optimizer.build([variable])
    most = 0.0
    for count, mine in enumerate(ours(kind, radius, start(*shape))):
        optimizer.apply([jnp.asarray(gradient(shape, count))], [variable])
        most = max(most, np.abs(np.asarray(variable.value) - mine).max())
    # Its division by norm + 1e-7 makes weights smaller in each step, within the ball too.
    assert most < (1e-12 if radius is None else 2 * STEPS * EPSILON), most
    assert radius is None or most > 1e-9


def test_renorm_of_torch() -> None:
    torch = pytest.importorskip("torch")
    for shape in ((4, 6), (4, 3, 2, 2)):
        w = torch.tensor(start(*shape))
        velocity, most = torch.zeros_like(w), 0.0
        for count, mine in enumerate(ours(wdjax.L2Ball(per=0), 0.8, start(*shape))):
            velocity = 0.9 * velocity + torch.tensor(gradient(shape, count))
            w = torch.renorm(w - 0.1 * velocity, p=2, dim=0, maxnorm=0.8)
            most = max(most, np.abs(w.numpy() - mine).max())
        assert 1e-9 < most < 20 * EPSILON, most


def test_the_parametrization_of_torch_is_another_thing() -> None:
    # weight_norm learns the radius. At a fixed one, its weights lie on the sphere.
    torch = pytest.importorskip("torch")
    layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(6, 4, bias=False, dtype=torch.float64), dim=0)
    size = torch.linalg.vector_norm(layer.weight, dim=1).detach().numpy()
    sphere = wdjax.L2Sphere(per=0).project(jnp.asarray(layer.weight.detach().numpy()), jnp.asarray(size)[:, None])
    np.testing.assert_allclose(sphere, layer.weight.detach().numpy(), rtol=1e-12)
