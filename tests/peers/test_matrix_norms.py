"""PyTorch's matrix norms, differentiated by PyTorch, beside the penalties of matrices."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from peer import peer

import wdjax
from wdjax.penalties import NuclearNorm, Orthogonality, SpectralNorm

torch = peer("torch")

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("x64")]

RNG = np.random.default_rng(0)
LR, STRENGTH, STEPS = 0.1, 0.3, 60
GRADS = RNG.normal(size=(STEPS, 6, 4))


def gram(w: Any) -> Any:
    return w.mH @ w if w.shape[0] >= w.shape[1] else w @ w.mH


PAIRS: dict[str, tuple[Any, Any]] = {
    "nuclear": (NuclearNorm(), lambda w: torch.linalg.matrix_norm(w, "nuc")),
    "spectral": (SpectralNorm(), lambda w: torch.linalg.matrix_norm(w, 2) ** 2 / 2),
    "orthogonality": (
        Orthogonality(),
        lambda w: torch.linalg.matrix_norm(gram(w) - torch.eye(min(w.shape), dtype=w.dtype)) ** 2 / 4,
    ),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("is_complex", [False, True])
def test_values_and_gradients(name: str, is_complex: bool) -> None:
    kind, theirs = PAIRS[name]
    for shape in ((6, 4), (3, 8)):
        w = RNG.normal(size=shape) + (1j * RNG.normal(size=shape) if is_complex else 0)
        peer_w = torch.tensor(w, requires_grad=True)
        value = theirs(peer_w)
        value.backward()
        np.testing.assert_allclose(kind.value(jnp.asarray(w)), value.item(), rtol=1e-13)
        np.testing.assert_allclose(kind.gradient(jnp.asarray(w)), peer_w.grad.numpy(), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", PAIRS)
def test_a_trajectory_in_the_loss_and_in_the_gradient(name: str) -> None:
    kind, theirs = PAIRS[name]
    start = RNG.normal(size=(6, 4))
    peer_w = torch.tensor(start, requires_grad=True)
    optimizer = torch.optim.SGD([peer_w], LR, momentum=0.5)
    ours = optax.chain(wdjax.add_penalty_to_grads(kind, STRENGTH), optax.sgd(LR, momentum=0.5))
    w, state, update = jnp.asarray(start), ours.init(jnp.asarray(start)), jax.jit(ours.update)
    most = 0.0
    for grads in 0.1 * GRADS:
        optimizer.zero_grad()
        (STRENGTH * theirs(peer_w) + (torch.tensor(grads) * peer_w).sum()).backward()
        optimizer.step()
        updates, state = update(jnp.asarray(grads), state, w)
        w = optax.apply_updates(w, updates)
        most = max(most, float(np.max(np.abs(w - peer_w.detach().numpy()))))
    # Where the two largest singular values are nearly equal, rounding turns their vectors.
    assert most < (1e-10 if name == "spectral" else 1e-13)
