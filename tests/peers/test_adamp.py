"""AdamP and SGDP of timm and pytorch-optimizer: `tangential_update` where their cosine always lets them project."""

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
ALWAYS = 1e9  # The threshold of the cosine.
RNG = np.random.default_rng(0)
SHAPES = {"dense": (5, 4), "conv": (3, 2, 2, 2), "bias": (5,)}  # PyTorch's layout: outputs first.
START = {name: RNG.normal(size=shape) for name, shape in SHAPES.items()}
GRADS = {name: RNG.normal(size=(STEPS, *shape)) for name, shape in SHAPES.items()}
MATRICES = wdjax.only("dense", "conv")


def ours(direction: Any, weight_decay: float, wd_ratio: float = 1.0, projects: bool = True) -> dict[str, np.ndarray]:
    # In these libraries the decay of what is projected is wd_ratio of the other one.
    decays = weight_decay * wdjax.by_path({("dense", "conv"): wd_ratio}, default=1.0)
    tangential = wdjax.in_update.tangential_update(MATRICES, per=0) if projects else optax.identity()
    optimizer = optax.chain(direction, tangential, wdjax.decoupled_decay(decays), optax.scale_by_learning_rate(LR))

    def step(carry: Any, grads: Any) -> Any:
        params, state = carry
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    params = jax.tree.map(jnp.asarray, START)
    return jax.jit(lambda carry: jax.lax.scan(step, carry, GRADS)[1])((params, optimizer.init(params)))


def theirs(build: Any, **options: Any) -> dict[str, np.ndarray]:
    params = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in START.items()}
    optimizer, after = build(params.values(), lr=LR, delta=ALWAYS, **options), []
    for t in range(STEPS):
        for name, p in params.items():
            p.grad = torch.tensor(GRADS[name][t])
        optimizer.step()
        after.append({name: p.detach().numpy().copy() for name, p in params.items()})
    return {name: np.array([each[name] for each in after]) for name in params}


def largest(a: Any, b: Any) -> float:
    return max(float(np.abs(a[name] - b[name]).max()) for name in START)


def peer_of(name: str, file: str) -> Any:
    if name == "pytorch_optimizer":
        return peer("pytorch_optimizer")
    peer_timm()
    return peer(f"timm.optim.{file}")


@pytest.mark.parametrize("name", ["timm", "pytorch_optimizer"])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("wd_ratio", [0.9, 0.1])
def test_adamp(name: str, nesterov: bool, wd_ratio: float) -> None:
    options = {"weight_decay": WD, "wd_ratio": wd_ratio, "nesterov": nesterov}
    want = theirs(peer_of(name, "adamp").AdamP, eps=0.0, **options)
    # Optax's Nesterov corrects its two terms each by its own power of b1; AdamP both by the same one.
    direction = nesterov_of_adamp() if nesterov else optax.scale_by_adam(eps=0.0)
    assert largest(ours(direction, WD, wd_ratio), want) < 1e-12
    assert largest(ours(direction, WD, wd_ratio, projects=False), want) > 0.05


def nesterov_of_adamp(b1: float = 0.9) -> Any:
    adam = optax.scale_by_adam(b1=b1, eps=0.0)

    def update(grads: Any, state: Any, params: Any = None) -> Any:
        _, state = adam.update(grads, state, params)
        of_m, of_v = 1 - b1**state.count, 1 - 0.999**state.count

        def direction(g: Any, m: Any, v: Any) -> Any:
            return (b1 * m + (1 - b1) * g) / of_m / jnp.sqrt(v / of_v)

        return jax.tree.map(direction, grads, state.mu, state.nu), state

    return optax.GradientTransformation(adam.init, update)


@pytest.mark.parametrize("name", ["timm", "pytorch_optimizer"])
def test_sgdp(name: str) -> None:
    want = theirs(peer_of(name, "sgdp").SGDP, momentum=0.9, dampening=0.0, weight_decay=WD, wd_ratio=0.1, eps=0.0)
    # The decay is divided by 1 - momentum, as L2 in the gradient comes to.
    assert largest(ours(optax.trace(0.9), WD / (1 - 0.9), 0.1), want) < 1e-12
