"""The numbers of examples/decoupling.py on grids whose answer is known, and what its text says about its methods."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from load_example import load_example

import wdjax

RATES = 0.001 * 2.0 ** np.arange(8)
DECAYS = 0.02 * 2.0 ** np.arange(13)


@pytest.fixture(scope="module")
def example() -> Any:
    return load_example("decoupling")


def grid(width: int, slope: int) -> np.ndarray:
    """Errors of 10 % for this many decays at each learning rate, of 50 % elsewhere. The middle one has 9 %."""
    errors = np.full((8, 13), 50.0)
    for rate in range(8):
        first = 5 + slope * (rate - 4)
        errors[rate, first : first + width] = 10.0
        errors[rate, first + width // 2] = 9.0
    return errors


@pytest.mark.parametrize("width", [1, 3])
def test_a_box_is_separable(example: Any, width: int) -> None:
    box = grid(width, 0)
    assert example.separability(box) == 1
    assert example.points_lost(box) == 0
    assert example.slope(box, RATES, DECAYS) == pytest.approx(0, abs=1e-12)


def test_a_box_stays_separable_if_some_learning_rates_are_worse(example: Any) -> None:
    box = grid(3, 0) + np.linspace(0, 30, 8)[:, None]
    assert example.separability(box) == 1
    assert example.points_lost(box) == 0


@pytest.mark.parametrize("direction", [1, -1])
def test_a_thin_diagonal_is_not_separable(example: Any, direction: int) -> None:
    diagonal = grid(1, 1)[::direction]
    assert example.separability(diagonal) == 0
    assert example.points_lost(diagonal) == 41
    assert example.slope(diagonal, RATES, DECAYS) == pytest.approx(direction)


def test_a_wide_diagonal_shares_decays_with_its_neighbors(example: Any) -> None:
    # Of 56 pairs of learning rates, 14 are neighbors and share two decays of three, and the next 12 share one.
    assert example.separability(grid(3, 1)) == pytest.approx((14 * 2 / 3 + 12 * 1 / 3) / 56)
    assert example.points_lost(grid(3, 1)) == pytest.approx((14 * 1 + 42 * 41) / 56)


def test_good_is_measured_from_the_lowest_error_at_the_same_learning_rate(example: Any) -> None:
    errors = np.array([[1.0, 3.0, 9.0], [22.0, 20.0, 20.5]])
    assert example.separability(errors, 2.0) == pytest.approx((2 / 2 + 2 / 3) / 2)
    assert example.separability(errors, 1.0) == 0


def test_both_decays_of_adamw_are_one_in_other_units(example: Any) -> None:
    params = {"w": jnp.linspace(-1.0, 1.0, 5)}
    learning_rate, decay = 0.01, 3.0
    ends = []
    with jax.numpy_dtype_promotion("standard"):  # Adam raises a float to the power of an integer.
        for optimizer in (example.independent(learning_rate, learning_rate * decay), wdjax.adamw(learning_rate, decay)):
            now, state = params, optimizer.init(params)
            for step in range(20):
                updates, state = optimizer.update({"w": jnp.sin(now["w"] + step)}, state, now)
                now = optax.apply_updates(now, updates)
            ends.append(now["w"])
    np.testing.assert_allclose(*ends, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layer", ["hidden", "head"])
def test_only_the_normalized_network_ignores_the_size_of_its_weights(example: Any, layer: str) -> None:
    keys = jax.random.split(jax.random.key(0))
    params = {"hidden": jax.random.normal(keys[0], (64, 64)), "head": jax.random.normal(keys[1], (64, 10))}
    larger = params | {layer: 5 * params[layer]}
    images = example.DATA.test_images[:20]

    def difference(normalized: bool) -> jax.Array:
        logits = [example.logits_of(some, images, normalized) for some in (params, larger)]
        return jnp.abs(logits[0] - logits[1]).max()

    assert difference(True) < 1e-3
    assert difference(False) > 1
