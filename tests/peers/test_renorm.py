"""PyTorch's own renorm and weight_norm, beside `constrain`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from peer import peer

import wdjax

torch = peer("torch")
pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("x64")]


@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 2, 2)], ids=["dense", "convolution"])
def test_renorm_after_each_of_sixty_steps(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    start, grads = rng.normal(size=shape), rng.normal(size=(60, *shape)) - 0.2
    theirs = torch.nn.Parameter(torch.tensor(start))
    sgd = torch.optim.SGD([theirs], lr=0.0625, momentum=0.75)
    optimizer = optax.chain(optax.sgd(0.0625, momentum=0.75), wdjax.constrain(wdjax.L2Ball(per=0), 0.75))
    ours = jnp.asarray(start)
    state, update, most = optimizer.init(ours), jax.jit(optimizer.update), 0.0
    for grad in grads:
        updates, state = update(jnp.asarray(grad), state, ours)
        ours = optax.apply_updates(ours, updates)
        theirs.grad = torch.tensor(grad)
        sgd.step()
        with torch.no_grad():
            theirs.copy_(torch.renorm(theirs, p=2, dim=0, maxnorm=0.75))
        most = max(most, float(np.abs(theirs.detach().numpy() - np.asarray(ours)).max()))
    assert 1e-9 < most < 1e-6, most  # It divides by the norm plus 1e-7.


def test_the_weights_of_weight_norm_lie_on_the_sphere_of_its_radii() -> None:
    # It learns the radii.
    linear = torch.nn.Linear(6, 4, bias=False, dtype=torch.float64)
    layer = torch.nn.utils.parametrizations.weight_norm(linear, dim=0)
    weight, radii = (x.detach().numpy() for x in (layer.weight, layer.parametrizations.weight.original0))
    sphere = wdjax.L2Sphere(per=0).project(jnp.asarray(weight), jnp.asarray(radii))
    np.testing.assert_allclose(sphere, weight, rtol=1e-12)
