"""Rates that a restored state keeps: found where they differ from those of the code, however deep."""

from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import wdjax
from wdjax import stale_hyperparams

pytestmark = pytest.mark.peers  # Optax's bias correction.

PARAMS = {"w": jnp.ones(3)}
adamw = optax.inject_hyperparams(wdjax.adamw, static_args=("b1", "b2", "eps", "eps_root"))


def steps(optimizer: optax.GradientTransformation, count: int = 3) -> Any:
    state = optimizer.init(PARAMS)
    for _ in range(count):
        _, state = optimizer.update(PARAMS, state, PARAMS)
    return state


def test_a_rate_that_the_code_has_changed() -> None:
    state, now = steps(adamw(0.25, 0.125)), adamw(0.25, 0.5)
    assert stale_hyperparams(state, now, PARAMS) == {"hyperparams/weight_decay": (0.125, 0.5)}
    assert stale_hyperparams(state, adamw(0.25, 0.125), PARAMS) == {}
    state = optax.tree.set(state, weight_decay=jnp.asarray(0.5))  # As the docstring says.
    assert stale_hyperparams(state, now, PARAMS) == {}
    updates, _ = now.update({"w": jnp.zeros(3)}, now.init(PARAMS)._replace(hyperparams=state.hyperparams), PARAMS)
    assert updates["w"][0] == -0.25 * 0.5


def test_schedules_are_not_stale() -> None:
    state = steps(adamw(optax.linear_schedule(1.0, 0.0, 10), 0.125))
    assert state.hyperparams["learning_rate"] < 1
    assert stale_hyperparams(state, adamw(optax.linear_schedule(0.5, 0.0, 10), 0.125), PARAMS) == {}


def nested(rate: float) -> optax.GradientTransformation:
    decay = optax.inject_hyperparams(wdjax.decoupled_decay)(weight_decay=rate)

    def inner(learning_rate: Any) -> optax.GradientTransformation:
        return optax.chain(decay, optax.scale_by_learning_rate(learning_rate))

    return optax.MultiSteps(
        optax.chain(optax.clip(1.0), optax.inject_hyperparams(inner)(learning_rate=rate)), 2
    ).gradient_transformation()


def test_numbers_at_any_depth_and_in_restored_dictionaries() -> None:
    state, now = steps(nested(0.125)), nested(0.5)
    base = "inner_opt_state/1/"
    expected = {
        f"{base}hyperparams/learning_rate": (0.125, 0.5),
        f"{base}inner_state/0/hyperparams/weight_decay": (0.125, 0.5),
    }
    assert stale_hyperparams(state, now, PARAMS) == expected
    assert stale_hyperparams(flax.serialization.to_state_dict(state), now, PARAMS) == expected
    assert stale_hyperparams(jax.tree.map(jnp.asarray, state), nested(0.125), PARAMS) == {}


def test_the_state_of_an_nnx_optimizer() -> None:
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    optimizer = nnx.Optimizer(model, adamw(0.25, 0.125), wrt=nnx.Param)
    found = stale_hyperparams(optimizer.opt_state, adamw(0.25, 0.5), params)
    assert found == {"hyperparams/weight_decay": (0.125, 0.5)}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_numbers_are_compared_whatever_their_dtypes(dtype: Any, x64: None) -> None:
    """0.3 is not a bfloat16. What the code says is rounded to it, as the state is."""
    params = {"w": jnp.ones(3, dtype)}
    state = adamw(0.1, 0.3).init(params)
    assert stale_hyperparams(state, adamw(0.1, 0.3), params) == {}
    for new in (0.5, jnp.asarray(0.5), np.float64(0.5), jnp.float32(0.5)):
        assert stale_hyperparams(optax.tree.set(state, weight_decay=new), adamw(0.1, 0.5), params) == {}
    found = stale_hyperparams(optax.tree.set(state, weight_decay=0.5), adamw(0.1, 0), params)  # An integer.
    assert found == {"hyperparams/weight_decay": (0.5, 0)}


def test_what_else_may_be_injected() -> None:
    def noise(seed: int) -> optax.GradientTransformation:
        return optax.inject_hyperparams(optax.add_noise)(jnp.nan, 0.5, key=jax.random.key(seed))

    assert stale_hyperparams(noise(0).init(PARAMS), noise(0), PARAMS) == {}  # NaN is NaN.
    assert stale_hyperparams(noise(0).init(PARAMS), noise(1), PARAMS) == {"hyperparams/key": ([0, 0], [0, 1])}


def test_states_of_other_optimizers_are_refused() -> None:
    scheduled = adamw(optax.linear_schedule(0.5, 0.0, 10), 0.1).init(PARAMS)
    kept = adamw(0.1, 0.1).init(PARAMS)._replace(inner_state=scheduled.inner_state)  # What the error says to write.
    assert stale_hyperparams(kept, adamw(0.1, 0.1), PARAMS) == {}
    for state, fault in (
        (wdjax.sgdw(0.1, 0.1).init(PARAMS), r"Only optimizer\.init\(params\) has .*'hyperparams/learning_rate'"),
        (scheduled, "Only the state has 'hyperparams_states/learning_rate/count'"),
    ):
        with pytest.raises(ValueError, match=f"stale_hyperparams: the state does not fit this optimizer and .*{fault}"):
            stale_hyperparams(state, adamw(0.1, 0.1), PARAMS)
    with pytest.raises(TypeError, match="stale_hyperparams: state and params must be arrays, not shapes"):
        stale_hyperparams(adamw(0.1, 0.1).init(PARAMS), adamw(0.1, 0.1), jax.eval_shape(lambda: PARAMS))
    with pytest.raises(TypeError, match="stale_hyperparams"):
        stale_hyperparams(None, wdjax.sgdw, PARAMS)
    assert stale_hyperparams(wdjax.sgdw(0.1, 0.1).init(PARAMS), wdjax.sgdw(0.1, 0.5), PARAMS) == {}
