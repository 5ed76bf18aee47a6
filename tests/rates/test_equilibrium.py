"""Where AdamW leads weights under gradients of pure noise: the size and the angle that the rates imply."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wdjax
from wdjax import rates


@pytest.mark.peers
@pytest.mark.parametrize("b1", [0.9, 0.0])
def test_adamws_weights_come_to_the_size_and_the_angle_that_the_rates_imply(b1: float) -> None:
    eta, rate, size = 2e-3, 0.5, 2000
    optimizer = wdjax.adamw(eta, rate, b1=b1, b2=0.99)

    def step(carry: Any, key: jax.Array) -> Any:
        w, state = carry
        update, state = optimizer.update(jax.random.normal(key, (size,)), state, w)
        new = w + update
        cosine = w @ new / (jnp.linalg.norm(w) * jnp.linalg.norm(new))
        return (new, state), (jnp.sqrt(jnp.mean(new**2)), jnp.arccos(cosine))

    def run(keys: jax.Array) -> Any:
        w = jnp.full(size, 0.01)  # A quarter of the size in equilibrium.
        return jax.lax.scan(step, (w, optimizer.init(w)), keys)[1]

    steps = 4 * round(rates.timescale(rate, eta))
    rms, angle = (np.asarray(part) for part in jax.jit(run)(jax.random.split(jax.random.key(0), steps)))
    assert rms[0] < 0.015
    np.testing.assert_allclose(rms[-1000:].mean(), rates.equilibrium_rms(rate, eta), rtol=0.02)
    np.testing.assert_allclose(angle[-1000:].mean(), rates.equilibrium_angle(rate, eta, b1), rtol=0.02)


def test_the_formulas_are_the_limit_of_the_exact_sums() -> None:
    """The weights are a sum of gradients of unit variance; both variances are sums of squares of its coefficients."""
    eta, rate, b1 = 1e-3, 0.1, 0.9
    ages = np.arange(400_000)
    keep = 1 - eta * rate
    # A gradient of this age has the weight (1 - b1) * sum of b1^i * keep^(age - i) in the weights.
    coefficients = eta * (1 - b1) * (keep ** (ages + 1) - b1 ** (ages + 1)) / (keep - b1)
    rms = np.sqrt(np.sum(coefficients**2))
    np.testing.assert_allclose(rms, rates.equilibrium_rms(rate, eta), rtol=1e-3)
    step = eta * np.sqrt((1 - b1) ** 2 / (1 - b1**2))
    np.testing.assert_allclose(step / rms, rates.equilibrium_angle(rate, eta, b1), rtol=1e-3)


def test_the_three_formulas_fit_together() -> None:
    eta, rate = 2e-3, 0.5
    # Without momentum, a step of unit variance turns the weights by eta / rms.
    assert rates.equilibrium_angle(rate, eta, 0.0) == pytest.approx(eta / rates.equilibrium_rms(rate, eta), rel=1e-14)
    assert rates.equilibrium_angle(rate, eta, 0.0) == pytest.approx((2 / rates.timescale(rate, eta)) ** 0.5, rel=1e-14)
    # The corrected decay keeps the size while the learning rate falls: see tests/rates/test_schedules.py.
    schedule = optax.linear_schedule(eta, 0.0, 10)
    corrected = rates.corrected(rate, schedule, peak=eta)
    assert float(corrected(5)) == pytest.approx(eta / 2 * rate / 2, rel=1e-6)
