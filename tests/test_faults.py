"""Half-finished, wrong and hostile values: what a decay does to each, and that it does nothing to its neighbors."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import sparse
from optax import contrib
from registry import Row, core_decay, core_row, every_row
from slow import slow

import wdjax

RATE = 0.3


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def step(optimizer: Any, params: Any, grads: Any) -> Any:
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    return optax.apply_updates(params, updates)


# NaN and infinity.

BAD_WEIGHTS = np.array([np.nan, np.inf, -np.inf, 2.0, -2.0, 2.0], np.float32)
BAD_UPDATES = np.array([1.0, 1.0, 1.0, np.nan, np.inf, -np.inf], np.float32)
GOOD_WEIGHTS, GOOD_UPDATES = np.array([2.0, -0.5], np.float32), np.array([1.0, -0.25], np.float32)


@every_row
def test_what_is_not_finite_stays_so_and_touches_nothing_else(row: Row) -> None:
    weights, moves = (np.concatenate(pair) for pair in ((BAD_WEIGHTS, GOOD_WEIGHTS), (BAD_UPDATES, GOOD_UPDATES)))
    optimizer = row.build(RATE)
    params, updates = (
        {"mixed": jnp.array(weights), "good": jnp.array(GOOD_WEIGHTS)},
        {
            "mixed": jnp.array(moves),
            "good": jnp.array(GOOD_UPDATES),
        },
    )
    new, _ = jax.jit(optimizer.update)(updates, optimizer.init(params), params)
    after = np.asarray(optax.apply_updates(params, new)["mixed"])
    assert not np.any(np.isfinite(after[: len(BAD_WEIGHTS)]))
    want = row.oracle(GOOD_UPDATES.astype(np.float64), GOOD_WEIGHTS.astype(np.float64), RATE, 0.0)
    np.testing.assert_allclose(new["good"], want, rtol=1e-6, atol=1e-6)
    if row.has_norm:  # Its neighbors are one group with them, which has one norm. Without a norm, some rows do nothing.
        is_off = np.array_equal(new["mixed"][len(BAD_WEIGHTS) :], GOOD_UPDATES)
        assert is_off or not np.any(np.isfinite(after))
    else:
        np.testing.assert_allclose(new["mixed"][len(BAD_WEIGHTS) :], want, rtol=1e-6)


@pytest.mark.peers
@pytest.mark.parametrize("recipe", [wdjax.sgdw, wdjax.sgd_l2, wdjax.adamw, wdjax.adam_l2], ids=lambda f: f.__name__)
def test_an_infinite_weight_becomes_nan_where_it_decays(recipe: Any) -> None:
    params = {"kernel": jnp.array(BAD_WEIGHTS), "bias": jnp.array(BAD_WEIGHTS)}
    new = step(recipe(0.1, 0.5, wdjax.only("kernel")), params, jax.tree.map(jnp.zeros_like, params))
    np.testing.assert_array_equal(np.isnan(new["kernel"]), [True] * 3 + [False] * 3)
    np.testing.assert_array_equal(new["bias"], BAD_WEIGHTS)


# Sizes.

NONE_AND_ONE = {
    "none": np.zeros(0, np.float32),
    "no rows": np.zeros((0, 3), np.float32),
    "scalar": np.array(2.0, np.float32),
    "NumPy": np.float32(2.0),
    "Python": 2.0,
}


@pytest.mark.filterwarnings("ignore:.*each weight is a group of its own")
@core_row
def test_leaves_of_no_element_and_of_one(row: Row) -> None:
    params = {**NONE_AND_ONE, "scalar": jnp.array(2.0)}
    updates = {name: 1.0 if name == "Python" else jnp.ones_like(leaf) for name, leaf in params.items()}
    anchor = {name: 0.5 if name == "Python" else jnp.full_like(leaf, 0.5) for name, leaf in params.items()}
    optimizer = row.build(RATE, toward=anchor)
    for run in (lambda f: f, jax.jit):
        new, _ = run(optimizer.update)(updates, optimizer.init(params), params)
        assert {name: leaf.shape for name, leaf in new.items()} == {name: np.shape(x) for name, x in params.items()}
        assert {leaf.dtype for leaf in new.values()} == {np.dtype(np.float32)}
        want = row.oracle(np.array(1.0), np.array(2.0), RATE, 0.5)
        for name in ("scalar", "NumPy", "Python"):
            np.testing.assert_allclose(new[name], want, rtol=1e-6)
    assert wdjax.l2_penalty({"none": NONE_AND_ONE["none"]}, RATE) == 0


@pytest.mark.parametrize("many", [100, slow(10_000)])
def test_ten_thousand_leaves_each_by_its_own_rule(many: int) -> None:
    params = {f"layer_{i}": np.full(2, 1 + i % 7, np.float32) for i in range(many)}
    zeros = jax.tree.map(np.zeros_like, params)
    calls = []

    def schedule(count: Any) -> Any:
        calls.append(1)
        return jnp.asarray(0.25, jnp.float32)

    rates = wdjax.by_path({"layer_*[0-4]": 0.5, "layer_*[5-8]": schedule}, default=0.0)
    for optimizer in (
        wdjax.independent_decay(rates),
        wdjax.with_decoupled_decay(optax.identity(), rates, learning_rate=1.0),
    ):
        calls.clear()
        new = step(optimizer, params, zeros)
        assert len(calls) == 2  # Once for the warnings of `init` and once in the step, not once a leaf.
        for i in range(many):
            share = 0.5 if i % 10 < 5 else 0.25 if i % 10 < 9 else 0.0
            assert new[f"layer_{i}"][0] == (1 + i % 7) * (1 - share)


@core_row
def test_what_is_traced_for_a_leaf_does_not_grow_with_their_number(row: Row) -> None:
    def equations(leaves: int) -> int:
        params = {str(i): jnp.ones(2) for i in range(leaves)}
        optimizer = row.build(RATE)
        return len(jax.make_jaxpr(optimizer.update)(params, optimizer.init(params), params).eqns)

    ten, twenty, forty = map(equations, (10, 20, 40))
    assert forty - twenty == 2 * (twenty - ten)


HUGE = 2**31


@pytest.mark.filterwarnings("ignore:.*each weight is a group of its own")
@core_row
def test_more_elements_than_an_int32_can_count(row: Row) -> None:
    shape = jax.ShapeDtypeStruct
    params = {
        "flat": shape((HUGE,), jnp.float32),
        "matrix": shape((2**16, 2**17), jnp.bfloat16),
        "complex": shape((HUGE,), jnp.float32 if row.is_real else jnp.complex64),
        "one": shape((), jnp.float32),
    }
    optimizer = row.build(lambda count: jnp.asarray(RATE, jnp.float32))
    state = jax.eval_shape(optimizer.init, params)
    updates, after = jax.eval_shape(optimizer.update, params, state, params)
    assert updates == params
    assert after == state
    if not row.is_stateful:
        assert all(leaf.shape == () for leaf in jax.tree.leaves(state))  # A decay keeps no copy of the weights,
    if not row.has_anchor:
        return
    anchored = jax.eval_shape(row.build(RATE, toward="init").init, params)
    assert optax.tree.get(anchored, "anchor") == params  # except where it is asked to.


def test_penalties_and_plans_of_more_elements_than_an_int32_can_count() -> None:
    params = {"kernel": jax.ShapeDtypeStruct((2, HUGE), jnp.float32), "bias": jax.ShapeDtypeStruct((2,), jnp.float32)}
    for kind in (wdjax.L2(), wdjax.L1(), wdjax.GroupLasso()):
        assert jax.eval_shape(lambda p, kind=kind: wdjax.penalty(p, kind, RATE), params).shape == ()
    by_layer = RATE * wdjax.by_depth("kernel", 0.5, axis=0)
    decay = wdjax.decoupled_decay(by_layer, wdjax.weights_only())
    assert jax.eval_shape(decay.update, params, jax.eval_shape(decay.init, params), params)[0] == params
    totals = wdjax.plan(params, RATE, wdjax.weights_only()).totals
    assert (totals.decayed, totals.parameters) == (2 * HUGE, 2 * HUGE + 2)


# Complex weights.

COMPLEX = np.array([3 + 4j, -1 + 2j, -2j], np.complex64)


@pytest.mark.peers
def test_a_decay_multiplies_a_complex_weight_so_that_both_parts_shrink_alike() -> None:
    params, zeros = {"w": jnp.array(COMPLEX)}, {"w": jnp.zeros(3, jnp.complex64)}
    by_parts = contrib.split_real_and_imaginary(wdjax.sgdw(0.1, 0.5, wdjax.only("w")))
    around = wdjax.with_decoupled_decay(optax.sgd(0.1), 0.5, learning_rate=0.1)
    for optimizer in (wdjax.sgdw(0.1, 0.5), wdjax.sgd_l2(0.1, 0.5), around, by_parts):
        new = step(optimizer, params, zeros)["w"]
        assert new.dtype == jnp.complex64
        np.testing.assert_allclose(new, COMPLEX * 0.95, rtol=1e-6)
    # The phase stays; of L1 too, which shortens the modulus, where one L1 for each part would turn it.
    new = step(wdjax.proximal_step(wdjax.L1(), 5.0, learning_rate=0.1), params, zeros)["w"]
    np.testing.assert_allclose(new, COMPLEX / np.abs(COMPLEX) * (np.abs(COMPLEX) - 0.5), rtol=1e-6)
    parts = contrib.split_real_and_imaginary(wdjax.proximal_step(wdjax.L1(), 5.0, learning_rate=0.1))
    np.testing.assert_allclose(step(parts, params, zeros)["w"], [2.5 + 3.5j, -0.5 + 1.5j, -1.5j], rtol=1e-6)


@pytest.mark.peers
def test_complex_gradients_of_the_loss_are_conjugated_before_the_optimizer() -> None:
    weights = jnp.array(COMPLEX)
    penalty, grads = jax.value_and_grad(lambda w: wdjax.l2_penalty(w, 0.5))(weights)
    np.testing.assert_allclose(penalty, 0.25 * np.sum(np.abs(COMPLEX) ** 2), rtol=1e-6)
    optimizer = optax.sgd(0.1)
    np.testing.assert_allclose(step(optimizer, weights, grads.conj()), COMPLEX * 0.95, rtol=1e-6)
    # As jax.grad returns them they make imaginary parts grow.
    grown = COMPLEX.real * 0.95 + 1j * COMPLEX.imag * 1.05
    np.testing.assert_allclose(step(optimizer, weights, grads), grown, rtol=1e-6)


# Integers and keys.


@pytest.mark.peers
def test_int8_weights_never_decay_and_those_of_optax_lose_a_unit_a_step() -> None:
    start = {"kernel": jnp.array([2.0, -1.0]), "quantized": jnp.array([3, -4, 127], jnp.int8)}
    zeros = jax.tree.map(jnp.zeros_like, start)

    def after(optimizer: Any, steps: int) -> Any:
        params, state = start, optimizer.init(start)
        for _ in range(steps):
            updates, state = optimizer.update(zeros, state, params)
            params = optax.apply_updates(params, updates)
        return params

    for optimizer in (
        wdjax.sgdw(0.1, 0.5),
        wdjax.adamw(0.1, 0.5, toward="init"),
        wdjax.adamw(0.1, 0.5, wdjax.only("*")),
        wdjax.with_decoupled_decay(optax.adam(0.1), 0.5, learning_rate=0.1),
        wdjax.freeze(wdjax.adamw(0.1, 0.5), wdjax.only("quantized")),
    ):
        new = after(optimizer, 3)
        assert bits(new["quantized"]) == bits(start["quantized"])
        assert new["quantized"].dtype == jnp.int8
    np.testing.assert_allclose(after(wdjax.adamw(0.1, 0.5), 3)["kernel"], np.array([2.0, -1.0]) * 0.95**3, rtol=1e-6)
    assert after(optax.adamw(0.1, weight_decay=0.5), 3)["quantized"].tolist() == [0, -1, 108]


@core_decay
def test_a_straight_through_gradient_of_an_int8_weight_is_not_decayed(row: Row) -> None:
    params, updates = {"q": jnp.array([3, -4], jnp.int8)}, {"q": jnp.array([0.5, 0.25])}
    optimizer = row.build(RATE)
    new, _ = optimizer.update(updates, optimizer.init(params), params)
    assert new["q"] is updates["q"]


@pytest.mark.peers
def test_a_model_that_holds_a_key_is_trained_without_it() -> None:
    model = {"kernel": jnp.array([2.0, -1.0]), "key": jax.random.key(0), "count": jnp.array(3)}
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)
    new = eqx.combine(step(wdjax.adamw(0.1, 0.5), arrays, jax.tree.map(jnp.zeros_like, arrays)), rest)
    np.testing.assert_allclose(new["kernel"], [1.9, -0.95], rtol=1e-6)
    assert new["key"] is model["key"]
    assert new["count"] is model["count"]
    # A decay lets the key through; it is Optax that has no way to add to one.
    decay = wdjax.independent_decay(0.05)
    updates = {**model, "kernel": jnp.zeros(2)}
    moved, _ = decay.update(updates, decay.init(model), model)
    assert moved["key"] is model["key"]
    with pytest.raises(TypeError, match="key"):
        optax.apply_updates(model, moved)


# Sparse matrices.

DENSE = np.array([[1.0, 0.0, -2.0], [0.0, 0.0, 3.0]], np.float32)


def sparse_model() -> dict[str, Any]:
    return {"kernel": sparse.BCOO.fromdense(jnp.array(DENSE)), "bias": jnp.ones(2)}


def sparse_loss(params: Any) -> Any:
    return jnp.sum((params["kernel"] @ jnp.ones(3) + params["bias"]) ** 2)


@core_decay
def test_of_a_sparse_matrix_the_data_decays_and_the_indices_never(row: Row) -> None:
    params = sparse_model()
    updates = jax.tree.map(jnp.ones_like, params)
    for run in (lambda f: f, jax.jit):
        optimizer = row.build(RATE, wdjax.only("kernel"))
        new, _ = run(optimizer.update)(updates, optimizer.init(params), params)
        want = row.oracle(np.ones(3), np.asarray(params["kernel"].data, np.float64), RATE, 0.0)
        np.testing.assert_allclose(new["kernel"].data, want, rtol=2e-6)
        assert bits(new["kernel"].indices) == bits(updates["kernel"].indices)
        assert bits(new["bias"]) == bits(updates["bias"])
        assert isinstance(new["kernel"], sparse.BCOO)
        assert new["kernel"].shape == (2, 3)
    start = jax.tree.map(jnp.zeros_like, params)
    optimizer = row.build(RATE, wdjax.only("kernel"), toward="init")
    by_init, _ = optimizer.update(updates, optimizer.init(start), params)
    np.testing.assert_allclose(by_init["kernel"].data, want, rtol=2e-6)


@pytest.mark.peers
def test_a_sparse_matrix_that_is_trained_keeps_its_indices_if_the_optimizer_does_not_see_them() -> None:
    params = sparse_model()
    grads = sparse.grad(sparse_loss)(params)
    want = DENSE[DENSE != 0] - 0.1 * (np.asarray(grads["kernel"].data) + 0.5 * DENSE[DENSE != 0])
    arrays, rest = eqx.partition(params, eqx.is_inexact_array)
    new = eqx.combine(step(wdjax.sgdw(0.1, 0.5), arrays, eqx.filter(grads, eqx.is_inexact_array)), rest)
    integers = wdjax.only(lambda leaf: not jnp.issubdtype(leaf.dtype, jnp.inexact))
    frozen = step(wdjax.freeze(wdjax.sgdw(0.1, 0.5), integers), params, grads)
    for after in (new, frozen):
        np.testing.assert_allclose(after["kernel"].data, want, rtol=1e-6)
        assert bits(after["kernel"].indices) == bits(params["kernel"].indices)
    # The gradient that jax.experimental.sparse gives has the indices in it, and Optax takes them for numbers: plain
    # SGD moves them, and so does the decay of adamw, also with gradients of zero.
    zeros = jax.tree.map(jnp.zeros_like, params)
    assert step(optax.sgd(0.1), params, grads)["kernel"].indices.tolist() == [[0, 0], [0, 1], [0, 1]]
    decayed = step(optax.adamw(0.1, weight_decay=0.5), params, zeros)
    assert decayed["kernel"].indices.tolist() == [[0, 0], [0, 1], [0, 1]]
    ours = step(wdjax.adamw(0.1, 0.5), params, zeros)
    assert bits(ours["kernel"].indices) == bits(params["kernel"].indices)


def test_a_sparse_matrix_is_as_the_dense_one() -> None:
    params = sparse_model()["kernel"]
    np.testing.assert_allclose(wdjax.l2_penalty(params, RATE), wdjax.l2_penalty(jnp.array(DENSE), RATE), rtol=1e-6)
    # Entries at one place are a sum, and so is their decay.
    twice = sparse.BCOO((jnp.array([1.0, 2.0, 4.0]), jnp.array([[0, 1], [0, 1], [1, 0]])), shape=(2, 3))
    new = step(wdjax.independent_decay(RATE), twice, jax.tree.map(jnp.zeros_like, twice))
    np.testing.assert_allclose(new.todense(), twice.todense() * (1 - RATE), rtol=1e-6)


def test_weights_only_asks_what_a_sparse_matrix_is() -> None:
    params = sparse_model()
    with pytest.raises(ValueError, match=r"can't tell what this parameter is: 'kernel/0'"):
        wdjax.decoupled_decay(RATE, wdjax.weights_only()).init(params)
    rules = wdjax.by_path({"kernel": True}, default=wdjax.weights_only())
    plan = wdjax.plan(params, RATE, rules)
    assert plan["kernel/0"].decays
    assert not plan["kernel/1"].decays
    assert not plan["bias"].decays
