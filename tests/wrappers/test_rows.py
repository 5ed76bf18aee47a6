"""Decay of rows: only where there is a gradient, or caught up on there."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import wdjax

STEPS, ROWS, WIDTH = 200, 12, 3
RATES = 0.3 / (1 + 0.05 * np.arange(STEPS))


def learning_rate(step: Any) -> Any:
    return 0.3 / (1 + 0.05 * jnp.asarray(step, float))


def weight_decay(step: Any) -> Any:
    return 0.2 + 0.1 * jnp.sin(jnp.asarray(step, float))


def factors() -> np.ndarray:
    """The fraction that each step takes from a weight."""
    return RATES * (0.2 + 0.1 * np.sin(np.arange(STEPS)))


def sparse_gradients(seed: int = 0, share: float = 0.15) -> np.ndarray:
    """Gradients that do not depend on the weights; in each step most rows have none."""
    rng = np.random.default_rng(seed)
    grads = rng.normal(size=(STEPS, ROWS, WIDTH))
    grads[rng.random((STEPS, ROWS)) > share] = 0
    grads[:, -1] = 0  # The last row is never used.
    return grads


def start() -> np.ndarray:
    return 1 + np.random.default_rng(1).random((ROWS, WIDTH))


def walked(optimizer: Any, grads: np.ndarray, params: Any, name: str = "embedding") -> tuple[np.ndarray, Any]:
    step, state, path = jax.jit(optimizer.update), optimizer.init(params), []
    for grad in grads:
        updates, state = step({name: jnp.asarray(grad, params[name].dtype)}, state, params)
        params = optax.apply_updates(params, updates)
        path.append(np.asarray(params[name], np.float64))
    return np.stack(path), state


def dense(grads: np.ndarray, anchor: float = 0.0) -> np.ndarray:
    weight, path = start(), []
    for grad, eta, rate in zip(grads, RATES, factors(), strict=True):
        weight = weight - eta * grad - rate * (weight - anchor)
        path.append(weight)
    return np.stack(path)


LAZY = {
    "zero": (None, 0.0),
    "a tree": ({"embedding": jnp.full((ROWS, WIDTH), 0.5)}, 0.5),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", LAZY)
def test_a_row_that_catches_up_equals_a_dense_one(name: str) -> None:
    toward, anchor = LAZY[name]
    grads = sparse_gradients()
    optimizer = wdjax.with_lazy_decay(
        optax.sgd(learning_rate), weight_decay, learning_rate=learning_rate, toward=toward
    )
    path, state = walked(optimizer, grads, {"embedding": jnp.asarray(start())})
    want, used = dense(grads, anchor), grads.any(-1)
    assert 0.05 < used.mean() < 0.3
    np.testing.assert_allclose(path[used], want[used], rtol=1e-12, atol=1e-13)
    # A row without a gradient keeps every bit, and so lags behind the dense one.
    before = np.concatenate([start()[None], path[:-1]])
    np.testing.assert_array_equal(path[~used], before[~used])
    assert np.max(np.abs(path[~used] - want[~used])) > 0.1
    # What it owes in the end brings it there.
    settled = path[-1] - np.asarray(state.decay.leaf["embedding"]) * (path[-1] - anchor)
    np.testing.assert_allclose(settled, want[-1], rtol=1e-12, atol=1e-13)
    never = anchor + (start()[-1] - anchor) * np.prod(1 - factors())
    np.testing.assert_allclose(settled[-1], never, rtol=1e-12)


def test_float32_rows_catch_up_to_rounding() -> None:
    grads = sparse_gradients()
    optimizer = wdjax.with_lazy_decay(optax.sgd(learning_rate), weight_decay, learning_rate=learning_rate)
    path, _ = walked(optimizer, grads, {"embedding": jnp.asarray(start(), jnp.float32)})
    used = grads.any(-1)
    np.testing.assert_allclose(path[used], dense(grads)[used], rtol=0, atol=2e-6)


def test_a_decay_that_rounds_to_nothing_in_each_step_adds_up() -> None:
    grads = np.zeros((1001, 1, 1))
    grads[-1] = 1e-30
    params = {"embedding": jnp.full((1, 1), 1.5, jnp.bfloat16)}
    path, _ = walked(wdjax.with_lazy_decay(optax.sgd(0.1), 0.004, learning_rate=0.1), grads, params)
    assert path[-2, 0, 0] == 1.5
    np.testing.assert_allclose(path[-1, 0, 0], 1.5 * (1 - 4e-4) ** 1001, rtol=2**-8)


def test_tiny_rates_are_summed_and_a_rate_of_one_or_more_is_a_product() -> None:
    for rate, steps in ((1e-9, 1000), (1.0, 5), (1.5, 5)):
        grads = np.zeros((steps, 1, 1))
        state = walked_lazily(rate, grads)
        np.testing.assert_allclose(
            state.decay.leaf["embedding"][0, 0],
            -np.expm1(steps * np.log1p(-rate)) if rate < 1 else 1 - (1 - rate) ** steps,
            rtol=1e-4,
        )


def walked_lazily(rate: float, grads: np.ndarray) -> Any:
    optimizer = wdjax.with_lazy_decay(optax.identity(), jnp.asarray(rate), learning_rate=1.0)
    return walked(optimizer, grads, {"embedding": jnp.ones((1, 1))})[1]


@pytest.mark.peers
@pytest.mark.usefixtures("x64")
def test_only_rows_with_a_gradient_decay_although_adam_moves_all() -> None:
    grads = sparse_gradients()
    optimizer = wdjax.with_sparse_decay(optax.adam(learning_rate), weight_decay, learning_rate=learning_rate)
    path, _ = walked(optimizer, grads, {"embedding": jnp.asarray(start())})
    weight, m, v = start(), 0.0, 0.0
    for t, grad in enumerate(grads):
        m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
        step = m / (1 - 0.9 ** (t + 1)) / (np.sqrt(v / (1 - 0.999 ** (t + 1))) + 1e-8)
        used = grad.any(-1, keepdims=True)
        weight = weight - RATES[t] * step - factors()[t] * weight * used
        np.testing.assert_allclose(path[t], weight, rtol=1e-10, atol=1e-12)
    np.testing.assert_array_equal(path[-1, -1], start()[-1])  # The row that is never used.


@pytest.mark.parametrize("wrapper", [wdjax.with_sparse_decay, wdjax.with_lazy_decay])
def test_what_a_row_is(wrapper: Callable[..., Any]) -> None:
    shapes: dict[str, tuple[int, ...]] = {"experts": (4, 2, 3), "vector": (5,), "scalar": (), "layers": (2, 3, 2)}
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    grads = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    grads |= {"experts": grads["experts"].at[2, 1, 0].set(1e-37), "vector": grads["vector"].at[1].set(jnp.nan)}
    grads |= {"layers": grads["layers"].at[1, 0, 1].set(3.0), "scalar": jnp.asarray(-0.0)}
    optimizer = wrapper(optax.set_to_zero(), 0.5, learning_rate=1.0, stacked_axes={"layers": 1})
    updates, state = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    decayed = {name: np.argwhere(np.asarray(u) != 0).tolist() for name, u in updates.items()}
    assert decayed == {
        "experts": [[2, i, j] for i in range(2) for j in range(3)],
        "vector": [[1]],
        "scalar": [],
        "layers": [[1, 0, 0], [1, 0, 1]],
    }
    if wrapper is wdjax.with_lazy_decay:
        owed = {name: leaf.shape for name, leaf in state.decay.leaf.items()}
        assert owed == {"experts": (4, 1, 1), "vector": (5,), "scalar": (), "layers": (2, 3, 1)}


@pytest.mark.peers
def test_the_rows_of_an_embedding_in_flax() -> None:
    model = nn.Embed(ROWS, WIDTH)
    tokens = jnp.array([3, 5, 3])
    params = model.init(jax.random.key(0), tokens)["params"]
    grads = jax.grad(lambda p: jnp.sum(model.apply({"params": p}, tokens) ** 2))(params)
    optimizer = wdjax.with_sparse_decay(optax.set_to_zero(), 0.1, wdjax.only("embedding"), learning_rate=1.0)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    rows = np.flatnonzero(np.any(np.asarray(updates["embedding"]), axis=-1))
    assert rows.tolist() == [3, 5]


@pytest.mark.peers
@pytest.mark.parametrize("wrapper", [wdjax.with_sparse_decay, wdjax.with_lazy_decay])
def test_accumulated_gradients_use_the_rows_of_all_their_parts(wrapper: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=rf"^{wrapper.__name__}: .* holds the state MultiStepsState.*MultiSteps\("):
        wrapper(optax.MultiSteps(optax.sgd(0.1), 2), 0.1, learning_rate=0.1).init(jnp.ones((2, 1)))
    with pytest.raises(ValueError, match=rf"^{wrapper.__name__}: the optimizer holds the state ScheduleFreeState"):
        wrapper(optax.contrib.schedule_free_sgd(0.1), 0.1, learning_rate=0.1).init(jnp.ones((2, 1)))
    around = optax.MultiSteps(wrapper(optax.set_to_zero(), 0.5, learning_rate=1.0), 2)
    params, state = jnp.ones((3, 1)), around.init(jnp.ones((3, 1)))
    for row in (0, 2):
        updates, state = around.update(jnp.zeros((3, 1)).at[row].set(1.0), state, params)
    np.testing.assert_array_equal(updates, [[-0.5], [0.0], [-0.5]])


@pytest.mark.peers
def test_the_learning_rate_in_the_state_is_the_factor() -> None:
    optimizer = wdjax.with_lazy_decay(optax.inject_hyperparams(optax.sgd)(0.1), 0.5, learning_rate=0.1)
    params = {"embedding": jnp.ones((1, 1))}
    state = optimizer.init(params)
    for rate in (0.1, 0.2, 0.4):
        state.inner_state.hyperparams["learning_rate"] = jnp.asarray(rate)
        _, state = optimizer.update({"embedding": jnp.zeros((1, 1))}, state, params)
    np.testing.assert_allclose(state.decay.leaf["embedding"][0, 0], 1 - 0.95 * 0.9 * 0.8, rtol=1e-6)
    with pytest.raises(ValueError, match=r"^with_lazy_decay: learning_rate is 0\.3, but the optimizer keeps 0\.1"):
        wdjax.with_lazy_decay(optax.inject_hyperparams(optax.sgd)(0.1), 0.5, learning_rate=0.3).init(params)


@pytest.mark.parametrize("wrapper", [wdjax.with_sparse_decay, wdjax.with_lazy_decay])
def test_rows_that_are_split_over_devices(wrapper: Callable[..., Any]) -> None:
    # The gradient of row 1 is nonzero on one device only, and the whole row decays.
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    params, grads = jnp.ones((2, 16)), jnp.zeros((2, 16)).at[1, 5].set(1.0)
    optimizer = wrapper(optax.set_to_zero(), 0.5, learning_rate=1.0, axis_name="model")

    def step(grads: Any, params: Any) -> Any:
        return optimizer.update(grads, optimizer.init(params), params)[0]

    spec = PartitionSpec(None, "model")
    updates = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(spec, spec), out_specs=spec))(grads, params)
    np.testing.assert_array_equal(updates, np.array([[0.0], [-0.5]]) * np.ones(16))
    with pytest.raises(ValueError, match=rf"^{wrapper.__name__}: there is no mesh axis 'model' here"):
        step(grads, params)


def test_what_a_row_that_waits_can_not_have() -> None:
    params = {"embedding": jnp.ones((4, 2))}
    average = wdjax.EMA(0.9)
    for toward in (average, wdjax.by_path({"embedding": average})):
        with pytest.raises(ValueError, match=r"^with_lazy_decay: toward is EMA\(decay=0\.9\), which moves while a row"):
            wdjax.with_lazy_decay(optax.sgd(0.1), 0.1, learning_rate=0.1, toward=toward)
    within = {"embedding": np.array([[0.1, 0.2]])}
    optimizer = wdjax.with_lazy_decay(optax.sgd(0.1), within, learning_rate=0.1)
    with pytest.raises(ValueError, match=r"^with_lazy_decay: a rate or mask of shape \(1, 2\) differs within a row"):
        optimizer.update(params, optimizer.init(params), params)
    # One rate for each row is what it is for, and a sparse decay takes any.
    of_rows = {"embedding": np.array([[0.0], [0.1], [0.2], [0.3]])}
    for optimizer in (
        wdjax.with_lazy_decay(optax.set_to_zero(), of_rows, learning_rate=1.0),
        wdjax.with_sparse_decay(optax.set_to_zero(), of_rows, learning_rate=1.0),
    ):
        updates, _ = optimizer.update(params, optimizer.init(params), params)
        np.testing.assert_allclose(updates["embedding"][:, 0], [0, -0.1, -0.2, -0.3], rtol=1e-6)
    optimizer = wdjax.with_sparse_decay(optax.set_to_zero(), within, learning_rate=1.0)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    np.testing.assert_allclose(updates["embedding"][0], [-0.1, -0.2], rtol=1e-6)


@pytest.mark.parametrize("wrapper", [wdjax.with_sparse_decay, wdjax.with_lazy_decay])
def test_the_decay_is_added_before_the_update_is_rounded(wrapper: Callable[..., Any]) -> None:
    params = {"embedding": jnp.full((1, 1), 3.0, jnp.bfloat16)}
    grads = {"embedding": jnp.full((1, 1), 1.0, jnp.bfloat16)}
    optimizer = wrapper(optax.identity(), 0.1, learning_rate=0.1)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    assert updates["embedding"].dtype == jnp.bfloat16
    assert float(updates["embedding"][0, 0]) == float(jnp.asarray(1 - 0.01 * 3.0, jnp.bfloat16))


def test_layers_with_rates_of_their_own_have_to_be_declared() -> None:
    params = {"blocks": jnp.ones((3, 4, 2)), "head": jnp.ones((4, 2))}
    rates = 0.1 * wdjax.by_depth("blocks", 0.5, last="head", axis=0)
    with pytest.raises(ValueError, match=r"^with_lazy_decay: the rate of 'blocks' has one number for each layer along"):
        wdjax.with_lazy_decay(optax.identity(), rates, learning_rate=1.0).init(params)
    optimizer = wdjax.with_lazy_decay(optax.set_to_zero(), rates, learning_rate=1.0, stacked_axes={"blocks": 1})
    grads = {"blocks": jnp.zeros((3, 4, 2)).at[:, 1].set(1.0), "head": jnp.zeros((4, 2))}
    state = optimizer.init(params)
    assert state.decay.leaf["blocks"].shape == (3, 4, 1)
    updates, state = optimizer.update(grads, state, params)
    np.testing.assert_allclose(updates["blocks"][:, 1, 0], [-0.0125, -0.025, -0.05], rtol=1e-6)
    np.testing.assert_array_equal(updates["blocks"][:, 0], 0)
    np.testing.assert_allclose(state.decay.leaf["blocks"][:, 0, 0], [0.0125, 0.025, 0.05], rtol=1e-6)


def test_what_rows_owe_is_not_forgotten() -> None:
    params = {"embedding": jnp.ones((2, 1))}
    zeros = {"embedding": jnp.zeros((2, 1))}
    lazy = wdjax.with_lazy_decay(optax.sgd(0.1), 0.1, learning_rate=0.1)
    _, state = lazy.update(zeros, lazy.init(params), params)
    for wrapper in (wdjax.with_sparse_decay, wdjax.with_decoupled_decay):
        other = wrapper(optax.sgd(0.1), 0.1, learning_rate=0.1)
        with pytest.raises(ValueError, match=rf"^{wrapper.__name__}: the state is that of with_lazy_decay, and rows"):
            other.update(zeros, state, params)
