"""Shrink and perturb after the steps of PyTorch's own optimizers, in the order of the code of L2 Init.

That code is not a package. It multiplies all parameters by 1 - shrink after `optimizer.step()`, and adds a multiple of
the parameters of a new model. Here both loops get the same new models.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from peer import peer

from wdjax.on_weights import shrink_and_perturb

torch: Any = peer("torch")
pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("x64")]
STEPS, SHRINK, NOISE = 60, 0.02, 0.05
SHAPES = {"kernel": (4, 3), "bias": (3,)}


def fresh(key: jax.Array) -> dict[str, jax.Array]:
    return {"kernel": jax.random.normal(key, SHAPES["kernel"]) / 2, "bias": jax.random.uniform(key, SHAPES["bias"])}


def gradient(weights: Any, targets: Any) -> Any:
    return {name: weights[name] ** 3 - targets[name] for name in SHAPES}


OPTIMIZERS = {
    "SGD": (lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), optax.sgd(0.05, momentum=0.9)),
    "Adam": (lambda p: torch.optim.Adam(p, lr=0.05), optax.adam(0.05)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sixty_steps_are_those_of_pytorch_with_the_loop_of_l2_init(name: str) -> None:
    theirs, ours = OPTIMIZERS[name]
    rng = np.random.default_rng(0)
    start, targets = ({key: rng.normal(size=shape) for key, shape in SHAPES.items()} for _ in range(2))
    new_models = []

    def noted(key: jax.Array) -> dict[str, jax.Array]:
        new_models.append(fresh(key))
        return new_models[-1]

    params = jax.tree.map(jnp.asarray, start)
    optimizer = optax.chain(ours, shrink_and_perturb(SHRINK, NOISE, seed=0, fresh=noted))
    weights = {key: torch.tensor(value, requires_grad=True) for key, value in start.items()}
    state, other = optimizer.init(params), theirs(weights.values())
    for _ in range(STEPS):
        updates, state = optimizer.update(gradient(params, targets), state, params)
        params = optax.apply_updates(params, updates)
        for key, grad in gradient({key: w.detach().numpy() for key, w in weights.items()}, targets).items():
            weights[key].grad = torch.tensor(grad)
        other.step()
        with torch.no_grad():
            for key, w in weights.items():
                w.mul_(1 - SHRINK).add_(torch.tensor(np.asarray(new_models[-1][key])), alpha=NOISE)
        for key in SHAPES:
            np.testing.assert_allclose(params[key], weights[key].detach().numpy(), rtol=0, atol=1e-13)
    assert len(new_models) == STEPS
    assert not np.array_equal(new_models[0]["kernel"], new_models[1]["kernel"])
