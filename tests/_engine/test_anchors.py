"""Anchors that a decay keeps in its state: the values at `init`, a moving average, and tables of these."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from registry import ANCHORED, LEARNING_RATE, Row, core_first

import wdjax
from wdjax import EMA, by_path

STEPS = 60


def make(dtype: Any = jnp.float32, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "encoder": {"kernel": jnp.asarray(rng.normal(size=(4, 3)), dtype)},
        "head": {"kernel": jnp.asarray(rng.normal(size=(3, 2)), dtype)},
    }


def walked(optimizer: Any, params: Any, grads: list[Any]) -> tuple[list[Any], Any]:
    """The parameters after each step, and the last state."""
    step, state, path = jax.jit(optimizer.update), optimizer.init(params), []
    for grad in grads:
        updates, state = step(grad, state, params)
        params = optax.apply_updates(params, updates)
        path.append(params)
    return path, state


def averaged(row: Row, weight: np.ndarray, moves: list[np.ndarray], rate: float, decay: float) -> list[np.ndarray]:
    """The closed recurrence: pull to the average of the weights so far, then let it follow the weight."""
    anchor, path = weight, []
    for move in moves:
        new = weight + row.oracle(move, weight, rate, anchor)
        anchor = decay * anchor + (1 - decay) * weight
        weight = new
        path.append(weight)
    return path


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("row", core_first(row for row in ANCHORED if row.is_elementwise))
def test_a_moving_average_against_numpy(row: Row) -> None:
    params = make(jnp.float64)["head"]
    grads = [{"kernel": jnp.asarray(0.1 * np.cos(np.arange(6) + t).reshape(3, 2))} for t in range(STEPS)]
    path, state = walked(row.build(0.05, toward=EMA(0.9)), params, grads)
    moves = [np.asarray(grad["kernel"]) for grad in grads]
    want = averaged(row, np.asarray(params["kernel"]), moves, 0.05, 0.9)
    np.testing.assert_allclose(np.stack([p["kernel"] for p in path]), np.stack(want), rtol=1e-10, atol=1e-12)
    fixed = averaged(row, np.asarray(params["kernel"]), moves, 0.05, 1.0)
    assert np.max(np.abs(fixed[-1] - want[-1])) > 1e-3  # An anchor that stays is another decay.
    assert optax.tree.get(state, "DecayState").anchor["kernel"].dtype == jnp.float64


@pytest.mark.usefixtures("x64")
def test_elastic_averaging_conserves_the_mean_of_weight_and_center() -> None:
    # With zero gradient and equal rates, weight and average move toward each other by the same amount.
    rate = 0.1
    params = make(jnp.float64)
    start = jax.tree.map(lambda p: p + 1, params)
    decay = wdjax.independent_decay(rate, toward=EMA(1 - rate))
    state = decay.init(params)
    weights = start
    for t in range(1, STEPS):
        updates, state = decay.update(jax.tree.map(jnp.zeros_like, params), state, weights)
        weights = optax.apply_updates(weights, updates)
        mean = jax.tree.map(lambda w, a: (w + a) / 2, weights, state.anchor)
        chex.assert_trees_all_close(mean, jax.tree.map(lambda p: p + 0.5, params), rtol=1e-12)
        gap = jax.tree.map(jnp.subtract, weights, state.anchor)
        chex.assert_trees_all_close(gap, jax.tree.map(lambda p, t=t: (1 - 2 * rate) ** t + 0 * p, params), rtol=1e-9)


def test_the_average_of_bfloat16_weights_moves_in_float32() -> None:
    params = {"w": jnp.full(3, 100.0, jnp.bfloat16)}
    decay = wdjax.independent_decay(0.01, toward=EMA(0.999))
    state = decay.init(jax.tree.map(lambda p: p - 1, params))
    assert state.anchor["w"].dtype == jnp.float32
    for _ in range(50):
        _, state = decay.update(jax.tree.map(jnp.zeros_like, params), state, params)
    np.testing.assert_allclose(state.anchor["w"], 100 - 0.999**50, rtol=1e-6)


@pytest.mark.peers
def test_a_step_that_is_skipped_does_not_move_the_average() -> None:
    params, ahead = make(), jax.tree.map(lambda p: p + 1, make())
    around = wdjax.with_decoupled_decay(
        optax.MultiSteps(optax.sgd(LEARNING_RATE), 2), 0.1, learning_rate=LEARNING_RATE, toward=EMA(0.5)
    )
    within = optax.MultiSteps(wdjax.sgdw(LEARNING_RATE, 0.1, toward=EMA(0.5)), 2)
    zeros = jax.tree.map(jnp.zeros_like, params)
    for optimizer in (around, within):
        state = optimizer.init(params)
        for average in (0.0, 0.5, 0.5, 0.75):
            _, state = jax.jit(optimizer.update)(zeros, state, ahead)
            (anchor,) = [node.anchor for node in jax.tree.leaves(state, is_leaf=is_decay) if is_decay(node)]
            chex.assert_trees_all_close(anchor, jax.tree.map(lambda p, a=average: p + a, params), rtol=1e-6)


def is_decay(node: Any) -> bool:
    return isinstance(node, wdjax.in_update.DecayState)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("row", core_first(row for row in ANCHORED if row.is_elementwise))
def test_a_table_of_anchors_is_each_of_them(row: Row) -> None:
    params, start = make(jnp.float64), make(jnp.float64, 1)
    updates = jax.tree.map(jnp.cos, params)
    table = by_path({"encoder": "init"}, default=EMA(0.5))
    by_table, by_init, by_average = (row.build(0.1, toward=toward) for toward in (table, "init", EMA(0.5)))
    states = [optimizer.init(start) for optimizer in (by_table, by_init, by_average)]
    for _ in range(3):
        news = []
        for i, optimizer in enumerate((by_table, by_init, by_average)):
            new, states[i] = jax.jit(optimizer.update)(updates, states[i], params)
            news.append(new)
        chex.assert_trees_all_close(news[0], {"encoder": news[1]["encoder"], "head": news[2]["head"]}, rtol=1e-12)
    zero = row.build(0.1, toward=by_path({"encoder": "init"}, default=0.0))
    new, state = zero.update(updates, zero.init(start), params)
    plain = row.build(0.1)
    want, _ = plain.update(updates, plain.init(start), params)
    chex.assert_trees_all_close(new["head"], want["head"], rtol=1e-12)
    assert optax.tree.get(state, "DecayState").anchor["head"]["kernel"] is None  # Zero needs no memory.


def test_what_does_not_decay_needs_no_average() -> None:
    params = {"w": jnp.ones(2), "count": jnp.arange(2), "none": None, "gone": optax.MaskedNode()}
    decay = wdjax.independent_decay(0.1, toward=EMA(0.9))
    state = decay.init(params)
    assert state.anchor["count"] is None
    _, after = decay.update({**params, "w": jnp.zeros(2)}, state, params)
    chex.assert_trees_all_equal_structs(state, after)


def test_the_average_does_not_share_buffers_with_params() -> None:
    params = {"w": jnp.ones(2)}
    state = wdjax.independent_decay(0.1, toward=EMA(0.9)).init(params)
    assert state.anchor["w"].unsafe_buffer_pointer() != params["w"].unsafe_buffer_pointer()


@pytest.mark.parametrize(
    ("make_toward", "words"),
    [
        (lambda: EMA(1.0), "EMA: decay must be a number from 0 to less than 1, got 1.0. Write toward=EMA(0.999); for"),
        (lambda: EMA(-0.1), "got -0.1"),
        (lambda: EMA(True), "got True"),
        (lambda: "ema", "toward must be None (zero), a tree like params, 'init', EMA(...), or a table by path"),
        (lambda: EMA, "got <class"),
        (lambda: by_path({"head": 0.5}, default=0.0), "a table of anchors holds 0.0, 'init' and EMA(...), but"),
        (lambda: 0.5 * by_path({"head": 1.0}, default=0.0), "holds 1.0"),
        (lambda: by_path({"heda": "init"}, default=0.0), "the pattern 'heda' matches no parameter"),
    ],
)
def test_what_is_no_anchor(make_toward: Any, words: str) -> None:
    with pytest.raises(ValueError, match=r"^(EMA|independent_decay): ") as caught:
        wdjax.independent_decay(0.1, toward=make_toward()).init(make())
    assert words in str(caught.value)


def test_a_state_without_the_average() -> None:
    params = make()
    state = wdjax.independent_decay(0.1).init(params)
    with pytest.raises(ValueError, match=r"toward=EMA\(decay=0\.9\), but the state holds no anchor"):
        wdjax.independent_decay(0.1, toward=EMA(0.9)).update(params, state, params)
    with pytest.raises(ValueError, match=r"l2_penalty: toward=EMA\(decay=0\.9\) needs a state, but a loss has none"):
        wdjax.l2_penalty(params, 0.1, toward=EMA(0.9))


def test_a_table_with_an_average_is_not_written_to_a_file() -> None:
    assert by_path({"head": "init"}, default=0.0).to_dict()["by_path"]["default"] == 0.0
    with pytest.raises(TypeError, match=r"Rules\.to_dict: EMA\(decay=0\.9\) can't be written to a file"):
        by_path({"head": EMA(0.9)}, default=0.0).to_dict()


def test_a_state_of_init_goes_on_as_an_average_of_full_width() -> None:
    params = {"w": jnp.ones(2, jnp.bfloat16)}
    decay = wdjax.independent_decay(0.1, toward=EMA(0.999))
    state = wdjax.independent_decay(0.1, toward="init").init(params)
    for _ in range(50):
        _, state = jax.jit(decay.update)(params, state, {"w": jnp.full(2, 2, jnp.bfloat16)})
    # In bfloat16 the average would stay at 1.
    np.testing.assert_allclose(np.asarray(state.anchor["w"]), 2 - 0.999**50, rtol=1e-5)


def test_a_state_that_lacks_a_part_of_the_anchors() -> None:
    params = make()
    state = wdjax.independent_decay(0.1, toward=by_path({"head": EMA(0.9)}, default=0.0)).init(params)
    with pytest.raises(ValueError, match=r"^independent_decay: toward='init', but the state holds no anchor of 'enc"):
        wdjax.independent_decay(0.1, toward="init").update(params, state, params)


@pytest.mark.parametrize("kept", ["init", EMA(0.9)], ids=str)
def test_anchors_in_a_tree_are_written_by_path(kept: Any) -> None:
    toward = {**make(), "head": kept}
    with pytest.raises(ValueError, match=r"toward holds .*Write 'init' and EMA\(\.\.\.\) by path: toward=by_path"):
        wdjax.decoupled_decay(0.1, toward=toward)
    with pytest.raises(TypeError, match=r"a table of rates holds .*A table of anchors is written toward=by_path"):
        wdjax.decoupled_decay(by_path({"head": kept}, default=0.0))


@pytest.mark.parametrize("array", [np.array(0.9), jnp.float32(0.9)], ids=["NumPy", "JAX"])
def test_the_decay_of_an_average_is_a_constant(array: Any) -> None:
    with pytest.raises(ValueError, match=r"constant of the program, so it can't be an array or traced"):
        EMA(array)
