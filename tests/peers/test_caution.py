"""The `caution` of timm and of pytorch-optimizer masks the step, `cautious` the decay: two things of one name."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from peer import peer, peer_timm

import wdjax

torch = peer("torch")

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("x64")]  # Peers: Optax's bias correction.

LR, WD, STEPS = 0.01, 0.5, 60
RNG = np.random.default_rng(0)
START, GRADS = RNG.normal(size=40), RNG.normal(size=(STEPS, 40))


def caution(inner: Any, scale: Callable[[jax.Array], jax.Array]) -> Any:
    """Keeps a direction only where it agrees with the gradient, and scales up what it keeps: arXiv 2411.16085."""

    def update(grads: Any, state: Any, params: Any = None) -> Any:
        updates, state = inner.update(grads, state, params)
        mask = (updates * grads > 0).astype(updates.dtype)
        return updates * mask * scale(mask), state

    return optax.GradientTransformation(inner.init, update)


def by_mean(mask: jax.Array) -> jax.Array:
    return 1 / jnp.maximum(jnp.mean(mask), 1e-3)


def by_sum(mask: jax.Array) -> jax.Array:
    return mask.size / (jnp.sum(mask) + 1)


def ours(*parts: Any) -> np.ndarray:
    optimizer = optax.chain(*parts, optax.scale_by_learning_rate(LR))

    def step(carry: Any, grads: Any) -> Any:
        params, state = carry
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    params = jnp.asarray(START)
    return np.asarray(jax.jit(lambda carry: jax.lax.scan(step, carry, GRADS)[1])((params, optimizer.init(params))))


def theirs(build: Callable[..., Any]) -> np.ndarray:
    w = torch.nn.Parameter(torch.tensor(START))
    optimizer, after = build([w], lr=LR, weight_decay=WD), []
    for grads in GRADS:
        w.grad = torch.tensor(grads)
        optimizer.step()
        after.append(w.detach().numpy().copy())
    return np.array(after)


DECAY = wdjax.decoupled_decay(WD)


def timm_adamw(params: Any, **options: Any) -> Any:
    peer_timm()
    return peer("timm.optim.adamw").AdamWLegacy(params, caution=True, **options)


def timm_lion(params: Any, **options: Any) -> Any:
    peer_timm()
    return peer("timm.optim.lion").Lion(params, betas=(0.9, 0.99), caution=True, **options)


def kozistr_lion(params: Any, **options: Any) -> Any:
    return peer("pytorch_optimizer").Lion(params, betas=(0.9, 0.99), cautious=True, **options)


# For each optimizer, Optax's direction, and how it scales up what the mask keeps.
CAUTIOUS: dict[str, tuple[Any, Any, Any]] = {
    "timm's AdamW": (timm_adamw, optax.scale_by_adam(), by_mean),
    "timm's Lion": (timm_lion, optax.scale_by_lion(0.9, 0.99), by_mean),
    "pytorch-optimizer's Lion": (kozistr_lion, optax.scale_by_lion(0.9, 0.99), by_sum),
}


@pytest.mark.parametrize("name", CAUTIOUS)
def test_they_mask_the_step_and_decay_everywhere(name: str) -> None:
    build, direction, scale = CAUTIOUS[name]
    got = theirs(build)
    np.testing.assert_allclose(ours(caution(direction, scale), DECAY), got, rtol=1e-13, atol=1e-13)
    assert np.abs(ours(direction, wdjax.cautious(DECAY)) - got).max() > 0.01
