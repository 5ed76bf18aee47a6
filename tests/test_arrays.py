"""Rates and masks that are arrays: for rows, for slices of a stack, and for each weight."""

from typing import Any

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from registry import DECAYS, ROWS, Row, core_first
from test_contract import assert_same_bits, float64

import wdjax

SHAPE = (4, 3)
by_element = [row for row in ROWS if row.is_elementwise]
row_by_element = pytest.mark.parametrize("row", core_first(by_element))
ARRAYS = {
    "rows": np.array([[0.3], [0.0], [0.1], [0.2]], np.float32),
    "columns": np.array([0.1, 0.0, 0.4], np.float32),
    "each weight": np.linspace(0.0, 0.5, 12, dtype=np.float32).reshape(SHAPE),
}


def make(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "kernel": jnp.asarray(rng.normal(size=SHAPE), jnp.float32),
        "bias": jnp.asarray(rng.normal(size=3), jnp.float32),
    }


def expected(row: Row, u: Any, w: Any, rates: Any, anchor: float = 0.0) -> np.ndarray:
    """The oracle's result, element by element, with the rate of each weight."""
    triples = zip(np.ravel(u), np.ravel(w), np.ravel(np.broadcast_to(rates, SHAPE)), strict=True)
    with np.errstate(invalid="ignore"):
        return np.array([row.oracle(*map(np.float64, (u, w, rate)), anchor) for u, w, rate in triples]).reshape(SHAPE)


@row_by_element
@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_in_a_tree_or_by_path_is_a_rate_for_each_weight(row: Row, name: str) -> None:
    params, updates, array = make(0), make(1), ARRAYS[name]
    want = expected(row, updates["kernel"], params["kernel"], array)
    of_bias = row.oracle(*map(float64, (updates["bias"], params["bias"])), 0.1, 0.0)
    rates = (
        {"kernel": array, "bias": 0.1},
        {"kernel": jnp.asarray(array), "bias": jnp.asarray(0.1)},
        wdjax.by_path({"kernel": array}, default=0.1),
        0.5 * wdjax.by_path({"kernel": 2 * array}, default=0.2),
    )
    for rate in rates:
        optimizer = row.build(rate)
        for update in (optimizer.update, jax.jit(optimizer.update)):
            new, _ = update(updates, optimizer.init(params), params)
            np.testing.assert_allclose(new["kernel"], want, rtol=2e-6, atol=1e-6)
            np.testing.assert_allclose(new["bias"], of_bias, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("row", core_first(row for row in DECAYS if row in by_element))
def test_where_an_array_is_zero_or_false_no_bit_changes(row: Row) -> None:
    hard = np.array([[np.inf, -np.inf, np.nan], [0.0, -0.0, 3.0], [1.0, -0.0, 2.0], [1.0, 2.0, 3.0]], np.float32)
    params, updates = make(0), make(1)
    params["kernel"], updates["kernel"] = jnp.asarray(hard), jnp.asarray(np.flip(hard, 1))
    on = np.array([[False], [False], [True], [True]])
    for rate, mask in (
        ({"kernel": np.where(on, 0.3, 0.0).astype(np.float32), "bias": 0.0}, None),
        (0.3, {"kernel": on, "bias": False}),
        (0.3, wdjax.by_path({"kernel": on}, default=False)),
    ):
        optimizer = row.build(rate, mask)
        new, _ = jax.jit(optimizer.update)(updates, optimizer.init(params), params)
        assert_same_bits(new["kernel"][:2], updates["kernel"][:2])
        assert_same_bits(new["bias"], updates["bias"])
        want = expected(row, updates["kernel"], params["kernel"], np.where(on, 0.3, 0.0))[2:]
        np.testing.assert_allclose(new["kernel"][2:], want, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("row", [row for row in by_element if row.off_at != 0], ids=lambda row: row.name)
def test_where_a_mask_is_false_no_bit_changes_though_no_rate_does_nothing(row: Row) -> None:
    params, updates = make(0), make(1)
    on = np.array([[False], [True], [False], [True]])
    optimizer = row.build(0.3, {"kernel": on, "bias": False})
    for update in (optimizer.update, jax.jit(optimizer.update)):
        new, _ = update(updates, optimizer.init(params), params)
        assert_same_bits(new["kernel"][::2], updates["kernel"][::2])
        assert_same_bits(new["bias"], updates["bias"])
        want = expected(row, updates["kernel"], params["kernel"], 0.3)[1::2]
        np.testing.assert_allclose(new["kernel"][1::2], want, rtol=2e-6, atol=1e-6)


@pytest.mark.usefixtures("x64")
def test_elastic_weight_consolidation_in_the_loss_and_in_the_gradient() -> None:
    # Kirkpatrick et al. 2017: (lambda / 2) sum F_i (w_i - a_i)^2.
    rng = np.random.default_rng(0)
    w, a, fisher = rng.normal(size=SHAPE), rng.normal(size=SHAPE), rng.uniform(size=SHAPE)
    params, anchor, strength = {"w": jnp.asarray(w)}, {"w": jnp.asarray(a)}, {"w": jnp.asarray(0.5 * fisher)}
    loss = lambda params: wdjax.l2_penalty(params, strength, toward=anchor)  # noqa: E731
    np.testing.assert_allclose(loss(params), 0.25 * (fisher * (w - a) ** 2).sum(), rtol=1e-12)
    np.testing.assert_allclose(jax.grad(loss)(params)["w"], 0.5 * fisher * (w - a), rtol=1e-12)
    place = wdjax.add_l2_to_grads(strength, toward=anchor)
    new, _ = place.update({"w": jnp.zeros(SHAPE)}, place.init(params), params)
    np.testing.assert_allclose(new["w"], 0.5 * fisher * (w - a), rtol=1e-12)
    # Importances are data, so they may be traced.
    traced = jax.jit(lambda f: wdjax.l2_penalty(params, {"w": 0.5 * f}, toward=anchor))
    np.testing.assert_allclose(traced(jnp.asarray(fisher)), loss(params), rtol=1e-12)


@pytest.mark.parametrize("kind", [wdjax.L1(), wdjax.L2(), wdjax.ElasticNet(0.3), wdjax.Huber(0.5)], ids=repr)
@pytest.mark.parametrize("name", ARRAYS)
def test_the_penalty_of_an_array_is_the_sum_over_its_weights(kind: Any, name: str) -> None:
    w = make(0)["kernel"]
    rates = np.broadcast_to(ARRAYS[name], SHAPE)
    want = sum(float(rate * kind.value(x[None])) for rate, x in zip(rates.ravel(), w.ravel(), strict=True))
    np.testing.assert_allclose(wdjax.penalty({"w": w}, kind, {"w": ARRAYS[name]}), want, rtol=1e-5)


def test_a_penalty_of_groups_takes_one_strength_for_each_group() -> None:
    params, updates = make(0), make(1)
    of_columns = np.array([0.3, 0.0, 0.1], np.float32)
    kind, rate = wdjax.GroupLasso(axis=0), {"kernel": of_columns, "bias": 0.0}
    w, u = float64(params["kernel"]), float64(updates["kernel"])
    norms = np.linalg.norm(w, axis=0)
    np.testing.assert_allclose(wdjax.penalty(params, kind, rate), (of_columns * norms).sum(), rtol=1e-5)
    place = wdjax.add_penalty_to_grads(kind, rate)
    new, _ = place.update(updates, place.init(params), params)
    np.testing.assert_allclose(new["kernel"], u + of_columns * w / norms, rtol=1e-5)
    step = wdjax.proximal_step(kind, rate, learning_rate=0.5)
    new, _ = step.update(updates, step.init(params), params)
    landed = np.linalg.norm(w + u, axis=0)
    np.testing.assert_allclose(
        w + float64(new["kernel"]), (w + u) * np.maximum(1 - 0.5 * of_columns / landed, 0), rtol=1e-5, atol=1e-6
    )
    for act in (
        lambda: wdjax.penalty(params, kind, {"kernel": ARRAYS["rows"], "bias": 0.0}),
        lambda: wdjax.add_penalty_to_grads(kind, {"kernel": ARRAYS["rows"], "bias": 0.0}).update(
            updates, place.init(params), params
        ),
        lambda: wdjax.proximal_step(wdjax.GroupLasso(), rate, learning_rate=0.5).update(
            updates, place.init(params), params
        ),
    ):
        with pytest.raises(
            ValueError, match=r"a strength of shape \(.*\) differs within a group of GroupLasso.*one strength for each"
        ):
            act()


def test_stacked_axes_take_the_norm_of_each_layer() -> None:
    rng = np.random.default_rng(0)
    params = {
        "layers": jnp.asarray(rng.normal(size=(3, 4, 2)), jnp.float32),
        "head": jnp.asarray(rng.normal(size=(4, 2)), jnp.float32),
    }
    w = float64(params)
    norms = np.sqrt((w["layers"] ** 2).sum((1, 2)))
    found = wdjax.penalty(params, wdjax.GroupLasso(), 0.5, stacked_axes={"layers": 1})
    np.testing.assert_allclose(found, 0.5 * (norms.sum() + np.linalg.norm(w["head"])), rtol=1e-6)
    place = wdjax.add_penalty_to_grads(wdjax.GroupLasso(), 0.5, stacked_axes={"layers": 1})
    new, _ = place.update(jax.tree.map(jnp.zeros_like, params), place.init(params), params)
    np.testing.assert_allclose(new["layers"], 0.5 * w["layers"] / norms.reshape(3, 1, 1), rtol=1e-5)
    step = wdjax.proximal_step(wdjax.GroupLasso(), 0.5, learning_rate=1.0, stacked_axes={"layers": 1})
    new, _ = step.update(jax.tree.map(jnp.zeros_like, params), step.init(params), params)
    np.testing.assert_allclose(new["layers"], -0.5 * w["layers"] / norms.reshape(3, 1, 1), rtol=1e-5)


@pytest.mark.peers
@pytest.mark.parametrize(
    "optimizer",
    [optax.adam(0.1), wdjax.adamw(0.1, 0.5), optax.MultiSteps(optax.sgd(0.1), 2)],
    ids=["adam", "adamw", "MultiSteps"],
)
def test_a_frozen_row_keeps_every_bit(optimizer: Any) -> None:
    params = make(0)
    params["kernel"] = params["kernel"].at[0].set(jnp.array([-0.0, jnp.inf, jnp.nan])).at[2, 0].set(-0.0)
    frozen = np.array([[True], [False], [True], [False]])
    start = params
    for mask in ({"kernel": frozen, "bias": True}, wdjax.by_path({"kernel": frozen}, default=True)):
        params, outer = start, wdjax.freeze(optimizer, mask)
        state = outer.init(params)
        for seed in range(4):
            updates, state = jax.jit(outer.update)(make(seed), state, params)
            params = optax.apply_updates(params, updates)
        assert_same_bits(params["kernel"][::2], start["kernel"][::2])
        assert_same_bits(params["bias"], start["bias"])
        assert np.all(np.asarray(params["kernel"][1::2]) != np.asarray(start["kernel"][1::2]))


@pytest.mark.peers
def test_the_gradient_of_a_frozen_row_is_in_no_global_norm() -> None:
    params, grads = make(0), make(1)
    frozen = {"kernel": np.array([[True], [False], [False], [False]]), "bias": False}
    outer = wdjax.freeze(optax.clip_by_global_norm(0.1), frozen)
    grads["kernel"] = grads["kernel"].at[0].set(1e6)
    updates, _ = outer.update(grads, outer.init(params), params)
    np.testing.assert_allclose(optax.tree.norm(updates), 0.1, rtol=1e-5)


def test_one_state_for_numbers_arrays_and_masks_of_arrays() -> None:
    params = make(0)
    on = {"kernel": ARRAYS["rows"] > 0, "bias": True}
    arguments = [(0.1,), ({"kernel": ARRAYS["rows"], "bias": 0.1},), (0.1, on)]
    for row in by_element:
        chex.assert_trees_all_equal_shapes_and_dtypes(*(row.build(*each).init(params) for each in arguments))


@pytest.mark.filterwarnings("ignore:plan. everything decays")
def test_a_plan_shows_the_range_of_an_array() -> None:
    params = make(0)
    plan = wdjax.plan(params, {"kernel": ARRAYS["rows"], "bias": 0.1})
    assert (plan["kernel"].rate, plan["bias"].rate) == ("0 to 0.3", 0.1)
    masked = wdjax.plan(params, 0.1, {"kernel": ARRAYS["rows"] > 0, "bias": np.ones(3, bool)})
    assert (masked["kernel"].rate, masked["bias"].rate) == ("0 to 0.1", 0.1)
    frozen = wdjax.plan(params, 0.1, frozen={"kernel": ARRAYS["rows"] > 0, "bias": np.ones(3, bool)})
    assert (frozen["kernel"].rate, frozen["bias"].rate) == ("0 to 0.1", 0.0)


def fails(words: str, rate: Any, mask: Any = None, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match=words):
        wdjax.decoupled_decay(rate, mask).init(make(0))


def test_wrong_arrays() -> None:
    array, cube = ARRAYS["rows"], np.ones((1, 4, 3), np.float32)
    three = np.array([[True], [False], [True]])
    fails(r"weight_decay must be a scalar, got an array of shape \(4, 1\)\..*by_path\(\{'embedding': array\}", array)
    fails(
        r"weight_decay at 'kernel' is an array of shape \(4,\), which does not broadcast .* \(4, 3\)",
        {"kernel": array[:, 0], "bias": 0.1},
    )
    fails(
        r"is an array of shape \(1, 4, 3\), which does not broadcast",
        {"kernel": cube, "bias": 0.1},
    )
    fails(
        r"weight_decay at 'kernel' must be finite and not negative, got an array with -0\.3",
        {"kernel": -array, "bias": 0.1},
    )
    with pytest.raises(
        ValueError, match=r"by_path: a value of the table must be finite and not negative, got an array with -0\.3"
    ):
        wdjax.by_path({"kernel": -array})
    fails(r"It lacks 'bias'\. Write", {"kernel": array})
    fails(r"Params lack 'head'\. Write", {"kernel": array, "bias": 0.1, "head": 0.1})
    fails(r"Write rates by pattern as by_path", {"kernel": 0.1})
    fails(r"weight_decay at 'bias' must be a rate, got True", {"kernel": array, "bias": True}, error=TypeError)
    fails(
        r"the mask at 'kernel' is an array of shape \(3, 1\), which does not broadcast",
        0.1,
        {"kernel": three, "bias": True},
    )
    with pytest.raises(TypeError, match=r"(?s)Rules\.to_dict: .* can't be written to a file"):
        wdjax.by_path({"kernel": array}, default=0.0).to_dict()
    with pytest.raises(TypeError, match="the mask at 'kernel' is traced"):
        jax.jit(lambda on: wdjax.decoupled_decay(0.1, {"kernel": on, "bias": True}).init(make(0)))(array > 0)


def test_none_in_a_tree_of_rates_means_no_decay() -> None:
    params, updates = make(0), make(1)
    optimizer = wdjax.decoupled_decay({"kernel": 0.1, "bias": None})
    new, _ = optimizer.update(updates, optimizer.init(params), params)
    assert_same_bits(new["bias"], updates["bias"])
    np.testing.assert_allclose(new["kernel"], updates["kernel"] + 0.1 * params["kernel"], rtol=1e-6)


def test_in_the_loss_an_infinite_weight_that_is_off_counts_for_nothing() -> None:
    params = {"w": jnp.array([[1.0], [jnp.nan], [jnp.inf]])}
    on = np.array([[True], [False], [False]])
    for rate, mask in ((0.1, {"w": on}), ({"w": 0.1 * on.astype(np.float32)}, None)):
        value, grads = jax.value_and_grad(lambda p, rate=rate, mask=mask: wdjax.l2_penalty(p, rate, mask))(params)
        np.testing.assert_allclose(value, 0.05, rtol=1e-6)
        np.testing.assert_allclose(grads["w"], [[0.1], [0.0], [0.0]], rtol=1e-6)
    # And still a rate of 0 can be learned.
    weights = {"w": jnp.array([2.0])}
    np.testing.assert_allclose(jax.grad(lambda rate: wdjax.l2_penalty(weights, rate))(0.0), 2.0)


def test_empty_parameters() -> None:
    params = {"w": jnp.zeros((0, 3))}
    assert wdjax.l2_penalty(params, {"w": np.ones((0, 3), np.float32)}) == 0
    place = wdjax.decoupled_decay(0.1, {"w": np.ones((0, 1), bool)})
    assert place.update(params, place.init(params), params)[0]["w"].shape == (0, 3)


def test_a_bare_array_is_no_mask_for_a_tree() -> None:
    for mask in (np.array([True, False, True]), jnp.array(True)):
        fails(r"the mask is one array of shape .* for the whole tree.*by_path", 0.1, mask, TypeError)
        with pytest.raises(TypeError, match=r"freeze: the mask is one array of shape"):
            wdjax.freeze(optax.sgd(0.1), mask).init(make(0))


def test_masks_of_parts_are_for_wdjax_alone() -> None:
    rules = wdjax.by_path({"kernel": ARRAYS["rows"] > 0}, default=False)
    with pytest.raises(TypeError, match=r"Rules\.mask: an array of shape \(4, 1\) selects parts of a parameter"):
        rules.mask(make(0))
    with pytest.raises(TypeError, match=r"only: an array of shape \(4, 1\) selects parts"):
        wdjax.only(rules)


def test_integers_are_frozen_by_an_array_too() -> None:
    params = {"i": jnp.arange(4), "w": jnp.ones(4)}
    for on, kept in ((np.ones(4, bool), [0, 0, 0, 0]), (np.array([True, False, True, False]), [0, 1, 0, 3])):
        outer = wdjax.freeze(optax.identity(), {"i": on, "w": True})
        updates, _ = outer.update(params, outer.init(params), params)
        assert updates["i"].tolist() == kept
    with pytest.raises(ValueError, match="does not broadcast"):
        wdjax.freeze(optax.sgd(1.0), {"i": np.ones(3, bool), "w": True}).init(params)


def test_rates_in_the_tree_of_an_equinox_model_that_can_be_called() -> None:
    model = eqx.filter(eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0)), eqx.is_inexact_array)
    rates = jax.tree.map(lambda x: jnp.full_like(x, 0.1), model)
    place = wdjax.decoupled_decay(rates)
    zeros = jax.tree.map(jnp.zeros_like, model)
    new, _ = place.update(zeros, place.init(model), model)
    chex.assert_trees_all_close(new, jax.tree.map(lambda p: 0.1 * p, model), rtol=1e-6)
    np.testing.assert_allclose(wdjax.l2_penalty(model, rates), wdjax.l2_penalty(model, 0.1), rtol=1e-6)


def test_places_that_optax_masked_are_holes_in_a_tree_of_rates() -> None:
    params = {"kernel": make(0)["kernel"], "bias": optax.MaskedNode()}
    place = wdjax.decoupled_decay(jax.tree.map(lambda p: 0.1, params))
    new, _ = place.update(params, place.init(params), params)
    np.testing.assert_allclose(new["kernel"], 1.1 * params["kernel"], rtol=1e-6)


def test_stacked_axes_matter_only_where_the_rule_acts() -> None:
    params = {"layers": jnp.ones((2, 3)), "temperature": jnp.ones([])}
    wdjax.add_penalty_to_grads(wdjax.GroupLasso(), 0.1, wdjax.only("layers"), stacked_axes=1).init(params)
    with pytest.raises(ValueError, match=r"stacked_axes=1 for 'temperature', whose shape is \(\)"):
        wdjax.add_penalty_to_grads(wdjax.GroupLasso(), 0.1, stacked_axes=1).init(params)
