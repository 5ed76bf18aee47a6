"""Multipliers by depth and by width: timm's own numbers, closed forms, and stacked layers that are those of a list."""

import functools
import itertools
import re
from collections.abc import Callable
from typing import Any

import chex
import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from registry import DECAYS, LAYERED, LEARNING_RATE, Row, core_first
from slow import slow
from test_contract import TOLERANCE, assert_same_bits, float64, run_eager, run_jit, run_pmap
from timm_models import DATA, TABLES, recorded

import wdjax
from wdjax import all_but, by_depth, by_path, by_width, only, weights_only
from wdjax.low_rank import decoupled_lora_decay
from wdjax.testing import assert_only_decays

RATE = 0.25  # A power of two: times other powers of two it rounds nowhere.
LAYERS = 3


def fails(message: str, call: Callable[[], Any], error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match=message):
        call()


def by_name(rules: Any, *paths: str) -> dict[str, Any]:
    """The value of each path of a flat tree."""
    return rules.values({path: jnp.ones(1) for path in paths})


# By depth: numbered blocks.


def test_every_recorded_model_of_timm_is_here() -> None:
    assert {path.stem for path in (DATA / "layer_decay").glob("*.json")} == set(TABLES)


@pytest.mark.parametrize("model", TABLES)
def test_the_multipliers_are_those_of_timm(model: str) -> None:
    wanted = recorded(model)
    assert len(wanted) > 150
    got = by_name(TABLES[model], *wanted)
    for path, multiplier in wanted.items():
        np.testing.assert_allclose(got[path], multiplier, rtol=1e-12, err_msg=path)


def test_the_formula_of_beit() -> None:
    count, decay = 12, 0.65
    # run_class_finetuning.py: layer_decay ** (num_layers + 1 - i), where embeddings have i = 0, block k has k + 1, and
    # all else num_layers + 1.
    scales = [decay ** (count + 1 - i) for i in range(count + 2)]
    params = {
        "patch_embed": jnp.ones(1),
        "blocks": [{"attn": {"w": jnp.ones(1)}, "mlp": jnp.ones(1)} for _ in range(count)],
        "head": jnp.ones(1),
    }
    got = by_depth("blocks/*", decay, first="patch_embed", last="head").values(params)
    np.testing.assert_allclose(got["patch_embed"], scales[0], rtol=1e-15)
    np.testing.assert_allclose([block["mlp"] for block in got["blocks"]], scales[1:-1], rtol=1e-15)
    assert [block["attn"]["w"] for block in got["blocks"]] == [block["mlp"] for block in got["blocks"]]
    assert got["head"] == scales[-1] == 1


@pytest.mark.parametrize("name", ["Block_{}", "layers/{}", "layers_{}", "net/~/layer_{}/attn", "h{}"])
def test_the_numbers_of_blocks_are_numbers_however_they_are_written(name: str) -> None:
    paths = [f"{name.format(i)}/kernel" for i in range(12)]  # As text, 10 stands before 2.
    got = by_name(by_depth(name.format("*"), 0.5, last="head"), *reversed(paths), "head")
    assert got == {**{path: 0.5 ** (12 - i) for i, path in enumerate(paths)}, "head": 1.0}


def test_gaps_and_other_starts_do_not_count() -> None:
    assert by_name(by_depth("Block_*", 0.5, last="x"), "Block_2", "Block_7", "Block_31", "x") == {
        "Block_2": 0.125,
        "Block_7": 0.25,
        "Block_31": 0.5,
        "x": 1.0,
    }


def test_two_numbers_are_ordered_by_the_first_and_then_the_second() -> None:
    paths = [f"stages/{s}/blocks/{b}/w" for s, b in [(0, 0), (0, 1), (1, 0), (1, 10), (10, 0), (11, 2)]]
    got = by_name(by_depth("stages/*/blocks/*", 0.5), *paths)
    assert got == {path: 0.5 ** (6 - i) for i, path in enumerate(paths)}


def test_a_pattern_may_go_on_after_the_number() -> None:
    rules = by_depth("**/Block_*/**/w", 0.5, last="**")
    got = by_name(rules, "m/Block_0/a/w", "m/Block_0/b/w", "m/Block_1/w", "m/Block_1/b")
    assert got == {"m/Block_0/a/w": 0.25, "m/Block_0/b/w": 0.25, "m/Block_1/w": 0.5, "m/Block_1/b": 1.0}


def test_what_has_one_number_under_several_patterns_is_of_one_depth() -> None:
    rules = by_depth(("encoder/Block_*", "decoder/Block_*"), 0.5, last="head")
    got = by_name(rules, "encoder/Block_0", "encoder/Block_1", "decoder/Block_0", "head")
    assert got == {"encoder/Block_0": 0.25, "encoder/Block_1": 0.5, "decoder/Block_0": 0.25, "head": 1.0}
    # With fewer numbers it lies before what has more of them.
    rules = by_depth(("stages/*/blocks/*", "stages/*/downsample"), 0.5)
    got = by_name(rules, "stages/0/blocks/0", "stages/1/downsample", "stages/1/blocks/0")
    assert got == {"stages/0/blocks/0": 0.125, "stages/1/downsample": 0.25, "stages/1/blocks/0": 0.5}


def test_the_outermost_of_nested_numbers_is_the_depth() -> None:
    paths = [f"net/layers/{i}/mlp/layers/{j}/w" for i in range(2) for j in range(3)]
    for pattern in ("**/layers/*", "net/**/layers/*", "net/layers/*"):
        assert list(by_name(by_depth(pattern, 0.5), *paths).values()) == [0.25] * 3 + [0.5] * 3


def test_first_is_below_all_blocks_even_where_it_is_in_one() -> None:
    rules = by_depth("Block_*", 0.5, first=("embed", re.compile(".*/table")))
    got = by_name(rules, "embed/w", "Block_0/w", "Block_1/table", "Block_1/w", "Block_1/embedding")
    assert got == {
        "embed/w": 0.125,
        "Block_0/w": 0.25,
        "Block_1/table": 0.125,
        "Block_1/w": 0.5,
        "Block_1/embedding": 0.5,
    }


def test_a_factor_above_one_grows_downward() -> None:
    assert by_name(by_depth("Block_*", 2), "Block_0", "Block_1") == {"Block_0": 4.0, "Block_1": 2.0}


def test_hidden_blocks_still_count() -> None:
    params = {"Block_0": None, "Block_1": optax.MaskedNode(), "Block_2": jnp.ones(1), "embed": jnp.ones(1)}
    got = by_depth("Block_*", 0.5, first="embed").values(params)
    assert got == {"Block_0": None, "Block_1": optax.MaskedNode(), "Block_2": 0.5, "embed": 0.0625}


def test_the_values_scale_updates_as_timm_scales_learning_rates() -> None:
    params = {"Block_0": jnp.ones(2), "Block_1": jnp.ones(2), "head": jnp.ones(2)}
    scales = by_depth("Block_*", 0.5, last="head").values(params)
    optimizer = optax.chain(
        wdjax.sgdw(0.5, 0.25), optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, scales))
    )
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert {name: float(u[0]) for name, u in updates.items()} == {
        "Block_0": -0.625 / 4,
        "Block_1": -0.625 / 2,
        "head": -0.625,
    }


# By depth: layers stacked along an axis are, slice by slice, those of a list.


def listed(dtype: Any = jnp.float32, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def array(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), dtype)

    blocks = {f"Block_{i}": {"kernel": array(4, 2), "norm": {"scale": array(2)}} for i in range(LAYERS)}
    return {"embed": {"kernel": array(5, 4)}, **blocks, "head": {"kernel": array(2, 3)}}


def stacked(tree: dict[str, Any], axis: int) -> dict[str, Any]:
    blocks = [tree[f"Block_{i}"] for i in range(LAYERS)]
    rest = {name: branch for name, branch in tree.items() if not name.startswith("Block_")}
    return {**rest, "blocks": jax.tree.map(lambda *slices: jnp.stack(slices, axis), *blocks)}


def unstacked(tree: dict[str, Any], axis: int) -> dict[str, Any]:
    rest = {name: branch for name, branch in tree.items() if name != "blocks"}
    slices = [jax.tree.map(lambda x, i=i: jnp.take(x, i, axis), tree["blocks"]) for i in range(LAYERS)]
    return {**rest, **{f"Block_{i}": block for i, block in enumerate(slices)}}


def two_forms(axis: int, factor: float = 0.5) -> tuple[Any, Any]:
    outside = {"first": "embed", "last": "head"}
    return by_depth("Block_*", factor, **outside), by_depth("blocks", factor, **outside, axis=axis)


def first_update(optimizer: Any, updates: Any, params: Any, *, run: Any = run_jit, start: Any = None) -> Any:
    return run(optimizer, updates, optimizer.init(params if start is None else start), params)[0]


def assert_forms_agree(
    build: Any, axis: int, rates: tuple[Any, Any], *, dtype: Any = jnp.float32, **kwargs: Any
) -> Any:
    """One update of both forms of one model, compared slice by slice; the stacked one's is given back."""
    params, updates = listed(dtype), listed(dtype, seed=1)
    want = first_update(build(rates[0]), updates, params, **kwargs)
    got = first_update(build(rates[1]), stacked(updates, axis), stacked(params, axis), **kwargs)
    chex.assert_trees_all_equal_shapes_and_dtypes(unstacked(got, axis), want)
    chex.assert_trees_all_close(float64(unstacked(got, axis)), float64(want), **TOLERANCE[dtype])
    assert not np.array_equal(np.asarray(got["blocks"]["kernel"]), stacked(updates, axis)["blocks"]["kernel"])
    return got


KERNELS = only("kernel")
MORE = [
    Row(
        "add_penalty_to_grads[GroupLasso(0)]", lambda rate: wdjax.add_penalty_to_grads(wdjax.GroupLasso(0), rate), None
    ),
    Row(
        "proximal_step[GroupLasso(1)]",
        lambda rate: wdjax.proximal_step(wdjax.GroupLasso(1), rate, KERNELS, learning_rate=LEARNING_RATE),
        None,
    ),
    Row("sgd_l2", lambda rate: wdjax.sgd_l2(LEARNING_RATE, rate, momentum=0.9), None),
    Row("sgdw", lambda rate: wdjax.sgdw(LEARNING_RATE, rate, momentum=0.9, nesterov=True), None),
    Row("adam_l2", lambda rate: wdjax.adam_l2(LEARNING_RATE, rate), None),
    Row("adamw", lambda rate: wdjax.adamw(LEARNING_RATE, rate, all_but("norm")), None, core=True),
    Row(
        "with_decoupled_decay[schedule_free]",
        lambda rate: wdjax.with_decoupled_decay(
            optax.contrib.schedule_free_sgd(LEARNING_RATE), rate, learning_rate=LEARNING_RATE
        ),
        None,
    ),
]
EVERYWHERE = [*LAYERED, *MORE]
FEW = ("add_penalty_to_grads[GroupLasso]", "decoupled_decay", "proximal_step[L1]")
# Layers of a stack are the same for all rows that act on one array alone.
few_rows = pytest.mark.parametrize(
    "row",
    [pytest.param(row, id=row.name, marks=() if row.name in FEW else pytest.mark.slow) for row in LAYERED],
)
few_anchored = pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=row.name, marks=() if row.name in FEW else pytest.mark.slow)
        for row in LAYERED
        if row.has_anchor
    ],
)
core_place = pytest.mark.parametrize("row", core_first(EVERYWHERE))
every_layered = pytest.mark.parametrize("row", LAYERED, ids=lambda row: row.name)
every_axis = pytest.mark.parametrize("axis", [0, 1, -1])


@pytest.mark.peers
@core_place
def test_stacked_as_listed(row: Row) -> None:
    for axis, dtype in ((1, jnp.bfloat16), (0, jnp.float32)):
        plain, deep = (RATE * rules for rules in two_forms(axis))
        got = assert_forms_agree(row.build, axis, (plain, deep), dtype=dtype)
    # It is the depth that matters: with one rate for all layers it is another update.
    uniform = first_update(row.build(RATE), stacked(listed(seed=1), axis), stacked(listed(), axis))
    assert not np.allclose(float64(got["blocks"]["kernel"]), float64(uniform["blocks"]["kernel"]), rtol=0.01)


@every_layered
def test_stacked_against_numpy(row: Row) -> None:
    params, updates = listed(), listed(seed=1)
    new = first_update(row.build(0.3 * two_forms(0, 0.75)[1]), stacked(updates, 0), stacked(params, 0))
    rates = {"embed": 0.3 * 0.75**4, "head": 0.3, **{f"Block_{i}": 0.3 * 0.75 ** (3 - i) for i in range(LAYERS)}}
    want = {
        name: jax.tree.map(lambda u, w, r=rate: row.oracle(u, w, r, 0.0), float64(updates[name]), float64(params[name]))
        for name, rate in rates.items()
    }
    chex.assert_trees_all_close(float64(unstacked(new, 0)), want, **TOLERANCE[jnp.float32])


# A norm sums in another order.
@pytest.mark.parametrize("row", core_first(row for row in LAYERED if row.is_elementwise))
def test_powers_of_two_give_the_same_bits(row: Row) -> None:
    params, updates = listed(), listed(seed=1)
    rules = two_forms(0)
    want = first_update(row.build(RATE * rules[0]), updates, params, run=run_eager)
    got = first_update(row.build(RATE * rules[1]), stacked(updates, 0), stacked(params, 0), run=run_eager)
    assert_same_bits(unstacked(got, 0), want)


@few_rows
def test_stacked_on_eight_devices(row: Row) -> None:
    plain, deep = (RATE * rules for rules in two_forms(1))
    assert_forms_agree(row.build, 1, (plain, deep), run=run_pmap)


@few_anchored
def test_stacked_toward_a_tree_and_toward_init(row: Row) -> None:
    axis = -1
    params, updates, anchor = listed(), listed(seed=1), listed(seed=2)
    deep_params, deep_updates, deep_anchor = (stacked(tree, axis) for tree in (params, updates, anchor))
    plain, deep = (RATE * rules for rules in two_forms(axis))
    want = first_update(row.build(plain, toward="init"), updates, params, start=anchor)
    by_init = first_update(row.build(deep, toward="init"), deep_updates, deep_params, start=deep_anchor)
    by_tree = first_update(row.build(deep, toward=deep_anchor), deep_updates, deep_params)
    for got in (by_init, by_tree):
        chex.assert_trees_all_close(unstacked(got, axis), want, rtol=2e-6, atol=1e-6)
    assert not np.allclose(
        by_init["blocks"]["kernel"], first_update(row.build(deep), deep_updates, deep_params)["blocks"]["kernel"]
    )


@few_rows
def test_stacked_with_a_schedule_and_a_traced_rate(row: Row) -> None:
    params, updates = listed(), listed(seed=1)
    deep_params, deep_updates = stacked(params, 0), stacked(updates, 0)
    plain, deep = two_forms(0)

    def schedule(count: Any) -> Any:
        return 0.1 * jnp.asarray(count + 1, jnp.float32)

    one, other = row.build(schedule * plain), row.build(deep * schedule)
    state, deep_state = one.init(params), other.init(deep_params)
    wanted = []
    for _ in range(3):
        want, state = run_jit(one, updates, state, params)
        got, deep_state = run_jit(other, deep_updates, deep_state, deep_params)
        chex.assert_trees_all_close(unstacked(got, 0), want, rtol=2e-6, atol=1e-6)
        wanted.append(want)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def traced(rate: Any) -> Any:
        optimizer = row.build(rate * deep)
        return optimizer.update(deep_updates, optimizer.init(deep_params), deep_params)[0]

    chex.clear_trace_counter()
    for rate, want in zip((0.1, 0.2, 0.3), wanted, strict=True):
        chex.assert_trees_all_close(unstacked(traced(jnp.array(rate)), 0), want, rtol=2e-6, atol=1e-6)


@few_rows
def test_stacked_under_vmap_and_grad_over_the_rate(row: Row) -> None:
    params, updates = listed(), listed(seed=1)
    plain, deep = two_forms(1)

    def moved(rules: Any, updates: Any, params: Any, rate: Any) -> Any:
        optimizer = row.build(rate * rules)
        return optimizer.update(updates, optimizer.init(params), params)[0]

    of_list = functools.partial(moved, plain, updates, params)
    of_stack = functools.partial(moved, deep, stacked(updates, 1), stacked(params, 1))
    rates = jnp.array([0.0, 0.1, 0.7])
    many = jax.jit(jax.vmap(of_stack))(rates)
    for i, rate in enumerate(rates):
        one = jax.tree.map(lambda x, i=i: x[i], many)
        chex.assert_trees_all_close(unstacked(one, 1), jax.jit(of_list)(rate), rtol=2e-6, atol=1e-6)

    def total(move: Any, rate: Any) -> Any:
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(move(rate)))

    slope_of = [jax.jit(jax.grad(functools.partial(total, move))) for move in (of_list, of_stack)]
    for rate in (0.0, 0.1):
        slopes = [slope(jnp.array(rate)) for slope in slope_of]
        np.testing.assert_allclose(slopes[1], slopes[0], rtol=2e-5, atol=1e-5)
        assert abs(float(slopes[0])) > 1e-3


@few_rows
def test_stacked_under_inject_hyperparams(row: Row) -> None:
    params, updates = stacked(listed(), 0), stacked(listed(seed=1), 0)
    deep = two_forms(0)[1]
    with jax.numpy_dtype_promotion("standard"):
        injected = optax.inject_hyperparams(lambda rate: row.build(rate * deep))(0.1)
        state = injected.init(params)
        for rate in (0.1, 0.2):
            state.hyperparams["rate"] = jnp.asarray(rate)
            got, state = run_jit(injected, updates, state, params)
            want = first_update(row.build(rate * deep), updates, params)
            chex.assert_trees_all_close(got, want, rtol=2e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*the decay rounds to nothing")
@pytest.mark.filterwarnings("ignore:.*independent_decay")
@pytest.mark.parametrize("row", core_first(row for row in DECAYS if not row.is_stateful))
@pytest.mark.parametrize("axis", [0, -1])
def test_stacked_layers_that_are_off_keep_their_bits(row: Row, axis: int) -> None:
    # In float32 the rates are 1e-90 = 0, 1e-60 = 0 and 1e-30.
    rules = by_depth("blocks", 1e-30, last=("embed", "head"), axis=axis)
    tree = listed()
    tree["Block_0"] = jax.tree.map(lambda x: jnp.full_like(x, jnp.inf), tree["Block_0"])
    tree["Block_1"] = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), tree["Block_1"])
    tree["Block_2"] = jax.tree.map(lambda x: jnp.full_like(x, 1e30), tree["Block_2"])
    updates = listed(seed=1)
    updates["Block_2"] = jax.tree.map(jnp.zeros_like, updates["Block_2"])
    got = unstacked(first_update(row.build(rules), stacked(updates, axis), stacked(tree, axis)), axis)
    for off in ("Block_0", "Block_1"):
        assert_same_bits(got[off], updates[off])
    if "add_l2" in row.name or "decoupled" in row.name or "independent" in row.name:
        assert float(jnp.abs(got["Block_2"]["kernel"]).min()) > 0.1

    def traced(rate: Any) -> Any:
        optimizer = row.build(rate * two_forms(axis)[1])
        return optimizer.update(stacked(updates, axis), optimizer.init(stacked(tree, axis)), stacked(tree, axis))[0]

    assert_same_bits(jax.jit(traced)(jnp.array(0.0)), stacked(updates, axis))


@pytest.mark.parametrize(
    "kind", [wdjax.L2(), slow(wdjax.L1()), slow(wdjax.ElasticNet(0.3)), wdjax.GroupLasso(), slow(wdjax.Huber(0.5))]
)
@pytest.mark.parametrize("axis", [slow(0), -1])
def test_stacked_in_the_loss(kind: Any, axis: int) -> None:
    params, anchor = listed(), listed(seed=2)
    plain, deep = (0.3 * rules for rules in two_forms(axis, 0.75))
    deep_params, deep_anchor = stacked(params, axis), stacked(anchor, axis)

    for toward, deep_toward in ((None, None), (anchor, deep_anchor)):
        want, gradient = jax.value_and_grad(lambda p, to=toward: wdjax.penalty(p, kind, plain, toward=to))(params)
        value = jax.value_and_grad(lambda p, to=deep_toward: wdjax.penalty(p, kind, deep, toward=to))
        got, deep_gradient = jax.jit(value)(deep_params)
        np.testing.assert_allclose(got, want, rtol=2e-6)
        chex.assert_trees_all_close(unstacked(deep_gradient, axis), gradient, rtol=1e-5, atol=1e-6)
    added = first_update(wdjax.add_penalty_to_grads(kind, deep), jax.tree.map(jnp.zeros_like, deep_params), deep_params)
    chex.assert_trees_all_close(
        added, jax.grad(lambda p: wdjax.penalty(p, kind, deep))(deep_params), rtol=1e-5, atol=1e-6
    )


def test_stacked_l1_and_l2_penalties() -> None:
    params = listed()
    plain, deep = (0.3 * rules for rules in two_forms(0, 0.75))
    for penalty in (wdjax.l2_penalty, lambda params, rate: wdjax.penalty(params, wdjax.L1(), rate)):
        np.testing.assert_allclose(penalty(stacked(params, 0), deep), penalty(params, plain), rtol=2e-6)
    widths = {"embed": 0.75**4, "head": 1.0, **{f"Block_{i}": 0.75 ** (3 - i) for i in range(LAYERS)}}
    squares = sum(
        width * sum(np.sum(x**2) for x in jax.tree.leaves(float64(params[name]))) for name, width in widths.items()
    )
    np.testing.assert_allclose(wdjax.l2_penalty(params, plain), 0.15 * squares, rtol=2e-6)


@pytest.mark.usefixtures("x64")
def test_stacked_float64_parameters_are_decayed_in_float64() -> None:
    params, updates = listed(jnp.float64), listed(jnp.float64, seed=1)
    plain, deep = (0.3 * rules for rules in two_forms(0, 0.75))
    want = first_update(wdjax.decoupled_decay(plain), updates, params)
    got = first_update(wdjax.decoupled_decay(deep), stacked(updates, 0), stacked(params, 0))
    chex.assert_trees_all_close(unstacked(got, 0), want, rtol=1e-15, atol=1e-16)


@every_axis
def test_stacked_factors_of_lora(axis: int) -> None:
    shapes = {"kernel": (5, 4), "lora_a": (5, 2), "lora_b": (2, 4)}
    rng = np.random.default_rng(0)
    blocks = [
        {"dense": {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}}
        for _ in range(LAYERS)
    ]
    params = {f"Block_{i}": block for i, block in enumerate(blocks)}
    if axis != 0:  # The factors must be (*stack, in, r) and (*stack, r, out): another axis is refused with its shapes.
        deep = {"blocks": jax.tree.map(lambda *slices: jnp.stack(slices, axis), *blocks)}
        fails("the shapes do not fit", lambda: decoupled_lora_decay(0.1).init(deep))
        return
    deep = {"blocks": jax.tree.map(lambda *slices: jnp.stack(slices), *blocks)}

    def pull(tree: Any, rules: Any) -> Any:
        return first_update(decoupled_lora_decay(0.3 * rules, scale=2.0), jax.tree.map(jnp.zeros_like, tree), tree)

    want = pull(params, by_depth("Block_*", 0.75))
    got = pull(deep, by_depth("blocks", 0.75, axis=0))
    for i in range(LAYERS):
        one = jax.tree.map(lambda x, i=i: x[i], got["blocks"])
        chex.assert_trees_all_close(one, want[f"Block_{i}"], rtol=1e-5, atol=1e-5)
        assert float(jnp.abs(one["dense"]["lora_a"]).max()) > 0.01
        assert float(jnp.abs(one["dense"]["kernel"]).max()) == 0


class ScannedBlock(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return nn.LayerNorm()(nn.Dense(4)(x)), None


class Scanned(nn.Module):
    axis: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        block = nn.scan(ScannedBlock, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=LAYERS)
        return block(name="blocks")(x, None)[0]


@pytest.mark.parametrize("axis", [0, 1])
def test_layers_of_nn_scan(axis: int) -> None:
    params = Scanned(axis).init(jax.random.key(0), jnp.ones((2, 4)))["params"]
    rules = RATE * by_depth("blocks", 0.5, axis=axis)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates = first_update(wdjax.decoupled_decay(rules, weights_only()), zeros, params)["blocks"]
    kernel = np.moveaxis(float64(params["blocks"]["Dense_0"]["kernel"]), axis, 0)
    got = np.moveaxis(float64(updates["Dense_0"]["kernel"]), axis, 0)
    for i in range(LAYERS):
        np.testing.assert_allclose(got[i], RATE * 0.5 ** (LAYERS - i) * kernel[i], rtol=1e-6)
    assert not np.any(updates["LayerNorm_0"]["scale"])


def test_layers_of_equinox_and_nnx_vmap() -> None:
    keys = jax.random.split(jax.random.key(0), LAYERS)
    linear = eqx.filter_vmap(lambda key: eqx.nn.Linear(4, 2, key=key))(keys)
    values = by_depth("blocks", 0.5, axis=0).values({"blocks": linear})["blocks"]
    np.testing.assert_array_equal(values.weight, np.reshape([0.125, 0.25, 0.5], (3, 1, 1)))
    np.testing.assert_array_equal(values.bias, np.reshape([0.125, 0.25, 0.5], (3, 1)))

    @nnx.split_rngs(splits=LAYERS)
    @nnx.vmap(in_axes=0, out_axes=0)
    def build(rngs: nnx.Rngs) -> nnx.Linear:
        return nnx.Linear(4, 2, rngs=rngs)

    params = nnx.state({"blocks": build(nnx.Rngs(0))}, nnx.Param)
    kernel = by_depth("blocks", 0.5, axis=0).values(params)["blocks"]["kernel"]
    assert np.shape(jax.tree.leaves(kernel)[0]) == (3, 1, 1)


@pytest.mark.peers
@every_axis
def test_values_of_stacked_layers_broadcast_along_their_axis(axis: int) -> None:
    params = stacked(listed(), axis)
    rules = two_forms(axis)[1]
    values = rules.values(params)
    decay = first_update(wdjax.decoupled_decay(rules), jax.tree.map(jnp.zeros_like, params), params)
    chex.assert_trees_all_close(decay, jax.tree.map(lambda value, p: value * p, values, params))
    assert np.shape(values["blocks"]["kernel"]) == {0: (3, 1, 1), 1: (1, 3, 1), -1: (1, 1, 3)}[axis]
    assert_only_decays(optax.chain(wdjax.decoupled_decay(0.1 * rules), optax.scale(-0.5)), params, 0.05 * rules)


def test_stacked_and_hidden_by_optax_masked() -> None:
    params = stacked(listed(), 0)
    rules = two_forms(0)[1]
    inner = wdjax.decoupled_decay(RATE * rules)
    outer = optax.masked(inner, {"embed": True, "blocks": True, "head": False})
    zeros = jax.tree.map(jnp.zeros_like, params)
    got, want = first_update(outer, zeros, params), first_update(inner, zeros, params)
    chex.assert_trees_all_close({**got, "head": 0}, {**want, "head": 0})
    hidden = optax.masked(inner, {"embed": True, "blocks": False, "head": True})
    fails(
        r"decoupled_decay: by_depth: the number of layers is unknown, because all that 'blocks' matches is hidden here",
        lambda: hidden.init(params),
    )
    # Where nothing below them is asked for, nobody needs the number.
    optax.masked(inner, {"embed": False, "blocks": False, "head": True}).init(params)


def test_a_rule_before_by_depth_decides_on_what_is_not_stacked() -> None:
    params = {"blocks": {"kernel": jnp.ones((3, 2)), "temperature": jnp.ones(())}, "embed": jnp.ones(2)}
    deep = by_depth("blocks", 0.5, first="embed", axis=0)
    got = by_path({"temperature": 1.0}, default=deep).values(params)
    assert got["blocks"]["temperature"] == 1.0
    assert got["embed"] == 0.0625
    np.testing.assert_array_equal(got["blocks"]["kernel"], [[0.125], [0.25], [0.5]])
    # The number of layers is known, too, where another rule takes them all.
    assert by_path({"blocks": 0.0}, default=deep).values(params)["embed"] == 0.0625


# By depth: what is outside the blocks.

DEEP = {
    "cls_token": jnp.ones((1, 1, 4)),
    "embed": {"embedding": jnp.ones((9, 4))},
    **{f"Block_{i}": {"kernel": jnp.ones((4, 4)), "norm": {"scale": jnp.ones(4)}} for i in range(2)},
    "norm": {"scale": jnp.ones(4)},
    **{f"head_{i}": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)} for i in range(3)},
    "steps": jnp.array(0),
}


@pytest.mark.parametrize("under", [(), ("params",), ("params", "model")])
def test_what_is_outside_the_blocks_has_to_be_said(under: tuple[str, ...]) -> None:
    params: Any = DEEP
    for name in reversed(under):
        params = {name: params}
    start = "".join(f"{name}/" for name in under)
    with pytest.raises(ValueError, match="by_depth") as caught:
        (0.1 * by_depth("Block_*", 0.5, first="embed")).values(params)
    message = str(caught.value)
    assert message.startswith(
        f"Rules.values: by_depth: these parameters are neither in a block, nor in `first`, nor in `last`: "
        f"'{start}cls_token' (1, 1, 4), '{start}head_{{0..2}}/bias' (2,), '{start}head_{{0..2}}/kernel' (4, 2), "
        f"'{start}norm/scale' (4,). `first` is what"
    )
    # The line can be pasted.
    line = re.search(r"Write (by_depth\(.*?\)), or last='\*\*' for everything else\.", message)
    assert line is not None
    told = eval(line[1], vars(wdjax))
    heads = ", ".join(f"'{start}head_{i}'" for i in range(3))
    assert repr(told) == (
        f"by_depth('Block_*', 0.5, first=('embed', '{start}cls_token'), last=({heads}, '{start}norm'))"
    )
    want = {"cls_token": 0.125, "embed": 0.125, "Block_0": 0.25, "Block_1": 0.5, "norm": 1.0}
    for path, value in zip(wdjax.paths.canonical_paths(params), jax.tree.leaves(told.values(params)), strict=True):
        assert value == want.get(path.removeprefix(start).partition("/")[0], 1.0), path
    rest = by_depth("Block_*", 0.5, first=("embed", "cls_token"), last="**")
    assert jax.tree.leaves(rest.values(params)) == jax.tree.leaves(told.values(params))


def test_what_does_not_decay_need_not_be_said() -> None:
    rate = RATE * by_depth("Block_*", 0.5, first="embed", last="head_*")
    fails(
        r"decoupled_decay: by_depth: .*: 'cls_token' \(1, 1, 4\), 'norm/scale'",
        lambda: wdjax.decoupled_decay(rate).init(DEEP),
    )
    params = {name: leaf for name, leaf in DEEP.items() if name != "steps"}
    zeros = jax.tree.map(jnp.zeros_like, params)
    masks = (weights_only(), all_but("cls_token", "norm"), jax.tree.map(lambda p: p.shape == (4, 4), params))
    for mask in masks:
        update = first_update(wdjax.decoupled_decay(rate, mask), zeros, params)
        assert float(update["Block_0"]["kernel"][0, 0]) == RATE * 0.25
        assert not np.any(update["norm"]["scale"])
        assert wdjax.plan(params, rate, mask)["Block_1/kernel"].rate == RATE * 0.5
    # In the loss, frozen, in a monitor, and beside a rule for all others.
    assert float(wdjax.l2_penalty(params, rate, weights_only())) > 0
    frozen = only("cls_token", "norm")
    wdjax.freeze(wdjax.adamw(0.1, rate), frozen).init(params)
    assert wdjax.plan(params, rate, frozen=frozen)["norm/scale"].rate == 0
    monitored = wdjax.monitor(wdjax.adamw(0.1, rate, weights_only()), rate, weights_only(), learning_rate=0.1)
    monitored.init(params)
    assert by_path(
        {"cls_token": 0.0, "norm": 0.5}, default=by_depth("Block_*", 0.5, first="embed", last="head_*")
    ).values(params)["norm"] == {"scale": 0.5}
    # Nor by any other rule of rates.
    table = by_path({"kernel": 0.1, "embedding": 0.2})
    fails("no rule covers the parameter", lambda: wdjax.decoupled_decay(table).init(params))
    wdjax.decoupled_decay(table, weights_only()).init(params)
    wide = by_width(2)
    fails("can't tell the fan-in of 'mix'", lambda: wdjax.decoupled_decay(wide).init({"mix": jnp.ones((2, 2))}))
    wdjax.decoupled_decay(wide, all_but("mix")).init({"mix": jnp.ones((2, 2)), "kernel": jnp.ones((2, 2))})


def test_a_block_counts_before_last_and_first_before_both() -> None:
    rules = by_depth("Block_*", 0.5, first="table", last=("norm", "table"))
    got = by_name(rules, "Block_0/norm", "Block_0/table", "norm/scale", "table/w")
    assert got == {"Block_0/norm": 0.5, "Block_0/table": 0.25, "norm/scale": 1.0, "table/w": 0.25}
    fails("the pattern 'hed' matches no parameter", lambda: by_name(by_depth("B_*", 0.5, last="hed"), "B_0", "head"))


def test_what_is_outside_a_stack_has_to_be_said() -> None:
    params = {**stacked(listed(), 0), "steps": jnp.array(0)}
    fails(
        r"by_depth: these .*: 'embed/kernel' \(5, 4\), 'head/kernel' \(2, 3\)\. .*Write "
        r"by_depth\('blocks', 0\.5, first='embed', last='head', axis=0\), or",
        lambda: by_depth("blocks", 0.5, axis=0).values(params),
    )
    # What isn't stacked and doesn't decay has no layers.
    params["blocks"]["temperature"] = jnp.ones(())
    rates = 0.5 * by_depth("blocks", 0.5, first="embed", last="head", axis=0)
    assert wdjax.plan(params, rates, only("kernel"))["blocks/kernel"].rate == (0.0625, 0.125, 0.25)
    fails("axis=0 does not exist in 'blocks/temperature'", lambda: wdjax.plan(params, rates))


# By depth: users' own assertion.


@pytest.mark.peers
def test_assert_only_decays_knows_depths() -> None:
    rules = two_forms(0, 0.75)
    for params, right, wrong in (
        (listed(), rules[0], by_depth("Block_*", 0.7, first="embed", last="head")),
        (stacked(listed(), 0), rules[1], by_depth("blocks", 0.7, first="embed", last="head", axis=0)),
    ):
        optimizer = wdjax.adamw(0.5, 0.01 * right)
        assert_only_decays(optimizer, params, 0.5 * 0.01 * right)
        for expected in (
            0.5 * 0.01 * wrong,
            0.5 * 0.01,
            0.01 * right,
        ):
            with pytest.raises(AssertionError, match=r"must lose .* of its distance to the anchor"):
                assert_only_decays(optimizer, params, expected)
    deep = stacked(listed(), 0)
    with pytest.raises(AssertionError, match="'blocks/kernel' must lose"):
        assert_only_decays(wdjax.adamw(0.5, 0.01), deep, 0.005 * by_path({"embed": 1.0}, default=rules[1]))
    assert_only_decays(wdjax.adamw(0.5, 0.01 * rules[1], only("kernel")), deep, 0.005 * rules[1], only("kernel"))


# By depth: mistakes.


def test_mistakes_in_by_depth() -> None:
    params = {"Block_0": jnp.ones(2), "Block_1": jnp.ones((2, 3)), "head": jnp.ones(2)}
    fails(
        r"by_depth: 'Block' has no '\*' for the number of a block\. Write 'Block_\*' or 'Block/\*'\. "
        r"For blocks that are stacked .*, add axis=0\.",
        lambda: by_depth("Block", 0.5),
    )
    fails(
        r"Rules\.values: by_depth: 'layers/\*' matches no parameter\. Here '\*' stands for a number\. Write .*"
        r"by_depth\('blocks', \.\.\., axis=0\)\. The nearest paths: '.*'",
        lambda: by_depth("layers/*", 0.5).values(params),
    )
    fails(r"'head_\*' matches no parameter", lambda: by_depth(("Block_*", "head_*"), 0.5).values(params))
    fails(r"re\.compile\('h\(.*matches no parameter", lambda: by_depth(re.compile(r"h(\d+)"), 0.5).values(params))
    fails("the pattern 'embed' matches no parameter", lambda: by_depth("Block_*", 0.5, first="embed").values(params))
    fails(
        r"by_depth: the groups of re\.compile\('\(Block\)_\(.*\)'\) must be numbers, but in 'Block_0' they are "
        r"\('Block', '0'\)\. Write \(\?:\.\.\.\)",
        lambda: by_depth(re.compile(r"(Block)_(\d+)"), 0.5).values(params),
    )
    for blocks in (only("head"), lambda leaf: True, re.compile("Block_.*")):
        fails("blocks must be a string with", functools.partial(by_depth, blocks, 0.5), TypeError)
    fails("no pattern was given", lambda: by_depth((), 0.5))
    fails("a pattern must be a string, .*got 3", lambda: by_depth(3, 0.5), TypeError)
    fails("got None", lambda: by_depth("Block_*", 0.5, first=None), TypeError)


def test_two_blocks_of_one_number() -> None:
    fails(
        r"by_depth: 'Block_\*' finds 'Stage_0/Block_0' and 'Stage_1/Block_0', which have the same number\. Include all "
        r"numbers: by_depth\('stages/\*/blocks/\*', \.\.\.\)\. Or give each stack its own: by_path\(.*\. Or "
        r"give both patterns, if they have equal depth",
        lambda: by_name(by_depth("Block_*", 0.5), "Stage_0/Block_0/w", "Stage_0/Block_1/w", "Stage_1/Block_0/w"),
    )
    fails("finds 'Block_0' and 'Block_00'", lambda: by_name(by_depth("Block_*", 0.5), "Block_0", "Block_00"))
    each = by_path({"encoder": by_depth("encoder/*", 0.5), "decoder": by_depth("decoder/*", 0.5)}, default=1.0)
    assert by_name(each, "encoder/0", "encoder/1", "decoder/0", "x") == {
        "encoder/0": 0.25,
        "encoder/1": 0.5,
        "decoder/0": 0.5,
        "x": 1.0,
    }


@pytest.mark.parametrize("function", [functools.partial(by_depth, "Block_*"), by_width], ids=["by_depth", "by_width"])
def test_factors_and_bases_are_positive_numbers(function: Any) -> None:
    fails(r"(factor|base) must be a number > 0, got 0\. Write by_", lambda: function(0))
    fails("must be finite and not negative, got -0.5", lambda: function(-0.5))
    fails("must be finite and not negative, got nan", lambda: function(float("nan")))
    fails("must be finite and not negative, got inf", lambda: function(float("inf")))
    fails("must be a number > 0, got <function", lambda: function(lambda count: 0.5))
    fails("must be a number > 0, got Array", lambda: function(jnp.array(0.5)))
    fails("must be a number > 0, got True", lambda: function(True), TypeError)
    fails("must be a number > 0, got '0.5'", lambda: function("0.5"), TypeError)
    assert isinstance(function(np.float32(0.5)), wdjax.Rules)


def test_mistakes_in_the_axis_of_by_depth() -> None:
    params = {"blocks": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(3)}, "more": {"kernel": jnp.ones((4, 2))}}
    for axis in (True, 0.0, "0"):
        fails("axis must be an integer, got .* Write axis=0", lambda: by_depth("blocks", 0.5, axis=axis), TypeError)  # noqa: B023
    fails(
        r"Rules\.values: by_depth: axis=1 does not exist in 'blocks/bias', whose shape is \(3,\)\. .*If this array is "
        r"not stacked, exclude it: by_path\(\{'blocks/bias': 1\.0\}, default=by_depth",
        lambda: by_depth("blocks", 0.5, axis=1).values(params),
    )
    fails("axis=-2 does not exist", lambda: by_depth("blocks", 0.5, axis=-2).values(params))
    fails(
        r"the arrays have different numbers of layers along axis 0: 3 in 'blocks/bias', 4 in 'more/kernel'\. Give "
        r"each stack its own: by_path\(\{'stack_1': by_depth",
        lambda: by_depth(("blocks", "more"), 0.5, axis=0).values(params),
    )
    both = by_path({"blocks": by_depth("blocks", 0.5, axis=0), "more": by_depth("more", 0.5, axis=0)})
    np.testing.assert_array_equal(both.values(params)["more"]["kernel"][:, 0], [0.0625, 0.125, 0.25, 0.5])
    fails("the pattern 'layers' matches no parameter", lambda: by_depth("layers", 0.5, axis=0).values(params))


def test_two_axes_in_one_product() -> None:
    params = {"blocks": {"kernel": jnp.ones((3, 2))}}
    rules = 0.1 * by_depth("blocks", 0.5, axis=0) * by_depth("blocks", 0.5, axis=1)
    for where, call in (
        ("decoupled_decay", lambda: wdjax.decoupled_decay(rules).init(params)),
        ("plan", lambda: wdjax.plan(params, rules)),
        ("l2_penalty", lambda: wdjax.l2_penalty(params, rules)),
    ):
        fails(rf"{where}: by_depth: the multipliers of 'blocks/kernel' lie along several axes, \[0, 1\]", call)
    same = by_depth("blocks", 0.5, axis=0) * by_depth("blocks", 0.5, axis=-2)  # One axis, counted from both ends.
    np.testing.assert_allclose(wdjax.plan(params, same)["blocks/kernel"].rate, [0.015625, 0.0625, 0.25])  # pyright: ignore
    twice = 0.25 * by_depth("blocks", 0.5, axis=0) * by_depth("blocks", 0.5, axis=0)
    update = first_update(wdjax.decoupled_decay(twice), jax.tree.map(jnp.zeros_like, params), params)
    np.testing.assert_array_equal(update["blocks"]["kernel"][:, 0], 0.25 * np.array([0.125, 0.25, 0.5]) ** 2)


# By width.


def test_fan_in_of_the_layouts_of_flax_linen() -> None:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, image: jax.Array) -> Any:
            nn.Conv(6, (3, 3))(image)
            nn.Conv(8, (3, 3), feature_group_count=4, use_bias=False, name="grouped")(image)
            nn.DenseGeneral((3, 2, 5), name="qkv")(x)
            nn.MultiHeadDotProductAttention(num_heads=4)(x)
            return nn.LayerNorm()(nn.Dense(5)(x))

    shapes = jax.eval_shape(Model().init, jax.random.key(0), jnp.ones((2, 7, 16)), jnp.ones((1, 8, 8, 4)))["params"]
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), shapes)
    values = by_width(4).values(params)
    attention = values["MultiHeadDotProductAttention_0"]
    assert values["Dense_0"] == {"kernel": 16 / 4, "bias": 1.0}
    assert values["Conv_0"] == {"kernel": 9 * 4 / 4, "bias": 1.0}
    assert values["grouped"] == {"kernel": 9 / 4}
    assert values["qkv"] == {"kernel": 16 / 4, "bias": 1.0}
    assert attention["query"]["kernel"] == attention["value"]["kernel"] == 16 / 4
    assert attention["out"]["kernel"] == 4 * 4 / 4
    assert values["LayerNorm_0"] == {"scale": 1.0, "bias": 1.0}


def test_fan_in_of_flax_nnx_haiku_and_equinox() -> None:
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.attention = nnx.MultiHeadAttention(num_heads=2, in_features=8, use_bias=False, rngs=rngs)
            self.linear = nnx.Linear(8, 3, rngs=rngs)

    state = by_width(2).values(nnx.state(Net(nnx.Rngs(0)), nnx.Param))
    got = {"/".join(map(str, path)): float(jax.tree.leaves(leaf)[0]) for path, leaf in nnx.to_flat_state(state)}
    assert got == {
        **{f"attention/{name}/kernel": 4.0 for name in ("query", "key", "value", "out")},
        "linear/kernel": 4.0,
        "linear/bias": 1.0,
    }

    def forward(x: Any) -> Any:
        hk.Conv2D(5, 3, data_format="NCHW")(jnp.ones((1, 6, 8, 8)))
        hk.BatchNorm(True, True, 0.9)(x, True)
        return hk.Linear(3)(x)

    params, _ = hk.transform_with_state(forward).init(jax.random.key(0), jnp.ones((2, 6)))
    got = by_width(2).values(params)
    assert got["conv2_d"] == {"w": 9 * 6 / 2, "b": 1.0}
    assert got["linear"] == {"w": 3.0, "b": 1.0}
    assert got["batch_norm"] == {"scale": 1.0, "offset": 1.0}

    key = jax.random.key(0)
    model = {
        "linear": eqx.nn.Linear(6, 3, key=key),
        "conv": eqx.nn.Conv2d(6, 5, 3, groups=2, key=key),
        "attention": eqx.nn.MultiheadAttention(2, 8, key=key),
        "embedding": eqx.nn.Embedding(9, 4, key=key),
        "norm": eqx.nn.LayerNorm(4),
    }
    got = by_width(2).values(eqx.filter(model, eqx.is_array))
    assert (got["linear"].weight, got["linear"].bias) == (3.0, 1.0)
    assert (got["conv"].weight, got["conv"].bias) == (9 * 3 / 2, 1.0)
    assert got["attention"].query_proj.weight == got["attention"].output_proj.weight == 4.0
    assert got["embedding"].weight == got["norm"].weight == got["norm"].bias == 1.0


def test_stacked_axes_are_no_inputs() -> None:
    params = {"blocks": {"kernel": jnp.ones((3, 8, 2)), "bias": jnp.ones((3, 2)), "scale": jnp.ones((3, 2))}}
    want = {"blocks": {"kernel": 4.0, "bias": 1.0, "scale": 1.0}}
    assert by_width(2, stacked_axes=1).values(params) == want
    # Forgotten, the bias tells.
    fails(
        r"Rules\.values: by_width can't tell the fan-in of 'blocks/kernel', of shape \(3, 8, 2\)\. If layers are "
        r"stacked, write by_width\(256, stacked_axes=1\)\.",
        lambda: by_width(2).values(params),
    )
    torch = {"blocks": {"weight": jnp.ones((3, 2, 8)), "bias": jnp.ones((3, 2))}}
    assert by_width(2, stacked_axes=1).values(torch)["blocks"]["weight"] == 4.0
    fails("can't tell the fan-in of 'blocks/weight'", lambda: by_width(2).values(torch))
    attention = {"query": {"kernel": jnp.ones((3, 8, 2, 5))}}
    assert by_width(2, stacked_axes=1).values(attention)["query"]["kernel"] == 4.0


class Adapted(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear = nnx.LoRALinear(1280, 640, lora_rank=16, rngs=rngs)
        self.embed = nnx.Embed(50, 1280, rngs=rngs)


def test_fan_in_of_lora_factors() -> None:
    params = nnx.state(Adapted(nnx.Rngs(0)), nnx.Param)
    values = nnx.to_pure_dict(by_width(16).values(params))
    assert values["linear"]["lora"] == {"lora_a": 80.0, "lora_b": 1.0}
    assert wdjax.plan(params, by_width(16), weights_only())["linear/lora/lora_a"].reason.endswith("; fan-in 1280")
    for first, second, shapes in (
        ("q/lora_a", "q/lora_b", [(64, 4), (4, 32)]),
        ("q/lora_A", "q/lora_B", [(4, 64), (32, 4)]),
        ("q_lora/a", "q_lora/b", [(64, 4), (4, 64)]),  # Where in = out, the rank is the smaller one.
        ("q_lora/A", "q_lora/B", [(4, 64), (64, 4)]),
        ("q/lora_down", "q/lora_up", [(64, 4), (4, 32)]),
        ("q/lora/w_a", "q/lora/w_b", [(64, 4), (4, 4)]),
        ("q/lora_a/kernel", "q/lora_b/kernel", [(64, 4), (4, 32)]),
        ("q/lora_A/default/weight", "q/lora_B/default/weight", [(4, 64), (32, 4)]),
        ("q/lora_a/w", "q/lora_b/w", [(64, 4), (4, 32)]),
        ("q/lora_down/weight", "q/lora_up/weight", [(4, 64), (32, 4)]),
    ):
        pair = {first: jnp.ones(shapes[0]), second: jnp.ones(shapes[1])}
        assert by_width(2).values(pair) == {first: 32.0, second: 2.0}, first
    stack = {"q/lora_a": jnp.ones((3, 64, 4)), "q/lora_b": jnp.ones((3, 4, 32))}
    assert by_width(2, stacked_axes=1).values(stack) == {"q/lora_a": 32.0, "q/lora_b": 2.0}
    heads = {"q/lora_a/kernel": jnp.ones((64, 4)), "q/lora_b/kernel": jnp.ones((4, 2, 8))}
    fails("can't tell the fan-in of 'q/lora_b/kernel'", lambda: by_width(2).values(heads))
    for untold in (stack, {"q/lora_a": jnp.ones((64, 4))}, {"lora_a": jnp.ones((64, 4)), "lora_b": jnp.ones((8, 32))}):
        fails(r"by_width can't tell the fan-in of '(q/)?lora_a', .*fan_in=", lambda: by_width(2).values(untold))  # noqa: B023
    # The input of an embedding is one-hot, and so is that of its first factor.
    table = {"embedding": np.ones((1000, 64)), "lora_a": np.ones((1000, 8)), "lora_b": np.ones((8, 64))}
    assert by_width(16).values({"embed": table}) == {"embed": {"embedding": 1.0, "lora_a": 1.0, "lora_b": 0.5}}


def test_every_role_that_decays_has_a_fan_in_or_a_reason() -> None:
    params = {"embed": {"embedding": jnp.ones((9, 4))}, "kernel": jnp.ones((4, 4)), "scale": jnp.ones(4)}
    plan = wdjax.plan(params, by_width(2), weights_only())
    assert plan["embed/embedding"].rate == 1
    assert plan["embed/embedding"].reason == "embedding: named 'embedding'; an embedding, whose input is one-hot"
    assert plan["kernel"].reason == "kernel: named 'kernel'; fan-in 4"
    assert wdjax.plan(params, by_width(2))["scale"].reason == "not a matrix"


def test_power_and_a_fan_in_of_ones_own() -> None:
    params = {"kernel": jnp.ones((64, 2)), "gate": jnp.ones((4, 9)), "bias": jnp.ones(2)}

    def fan_in(leaf: Any) -> Any:
        return None if leaf.ndim < 2 else np.int64(leaf.shape[0] if leaf.path == "kernel" else leaf.shape[1])

    assert by_width(16, fan_in=fan_in).values(params) == {"kernel": 4.0, "gate": 9 / 16, "bias": 1.0}
    assert by_width(16, fan_in=fan_in, power=0.5).values(params) == {"kernel": 2.0, "gate": 0.75, "bias": 1.0}
    assert by_width(16, fan_in=fan_in, power=-1).values(params)["kernel"] == 0.25
    assert by_width(16, fan_in=fan_in, power=np.float32(0)).values(params)["gate"] == 1.0
    empty = {"Dense_0": {"kernel": jnp.ones((0, 3))}}
    assert by_width(16, power=-1).values(empty) == {"Dense_0": {"kernel": 1.0}}


@pytest.mark.parametrize(
    "rules", [by_width(2, power=10**30), by_width(2, power=10**5), by_depth("Block_*", 1e300, last="**")]
)
def test_a_multiplier_too_large_for_a_float(rules: Any) -> None:
    params = {f"Block_{k}": {"Dense_0": {"kernel": jnp.ones((512, 2))}} for k in range(3)}
    fails(rf"^Rules\.values: {rules.kind}: .* is too large for a float\. Write by_", lambda: rules.values(params))


HUGE = by_path({"a": 1e308, "b": 0.0})


@pytest.mark.parametrize(
    ("rules", "written"),
    [
        (
            wdjax.Rules.from_dict({"by_path": {"rules": [], "default": 1.0}, "times": [1e308, 1e308]}),
            "1e+308 * 1e+308 * 1",
        ),
        (10 * HUGE, "10 * 1e+308"),
        (by_path({"a": 10 * by_path({}, default=1e308), "b": 1.0}), "10 * 1e+308"),
        (10 * by_path({"a": by_path({"a": 1e308}), "b": 1.0}), "10 * 1e+308"),
        (10 * HUGE * jnp.array(0.5), "10 * 1e+308"),
        (1e308 * by_depth("a", 1e2, last="b", axis=0), "1e+308 * 10000"),
        (HUGE * by_path({"b": 1e10}, default=10.0), "10 * 1e+308"),
    ],
)
def test_a_product_too_large_for_a_float(rules: Any, written: str) -> None:
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones(2)}
    for where, call in (
        ("Rules.values", rules.values),
        ("plan", lambda params: wdjax.plan(params, rules)),
        ("add_l2_to_grads", wdjax.add_l2_to_grads(rules).init),
    ):
        message = f"{where}: the rate of 'a' is {written}, which is too large for a float. Write smaller factors."
        fails(f"^{re.escape(message)}$", lambda: call(params))  # noqa: B023


def test_mistakes_in_by_width() -> None:
    params = {"gate": jnp.ones((4, 9)), "Dense_0": {"kernel": jnp.ones((2, 3))}}
    fails(
        r"decoupled_decay: by_width can't tell the fan-in of 'gate', of shape \(4, 9\)\..*fan_in=lambda leaf: "
        r"leaf\.shape\[0\]\), or exclude the parameter: by_path\(\{'gate': 1\.0\}, default=by_width\(256\)\)",
        lambda: wdjax.decoupled_decay(0.1 * by_width(2)).init(params),
    )
    assert by_path({"gate": 1.0}, default=by_width(1)).values(params) == {"gate": 1.0, "Dense_0": {"kernel": 2.0}}
    fails("can't tell .*'Einsum_0/kernel'", lambda: by_width(2).values({"Einsum_0": {"kernel": jnp.ones((2, 3, 4))}}))
    fails("fan_in must be a function of a Leaf, got 64", lambda: by_width(2, fan_in=64), TypeError)  # pyright: ignore[reportArgumentType]
    for width in (0, -3, float("nan"), "8", True):
        fails(
            rf"Rules\.values: by_width: fan_in must return a number > 0, or None, but for 'gate' it gave {width!r}\.",
            lambda: by_width(2, fan_in=lambda leaf: width if leaf.path == "gate" else None).values(params),  # noqa: B023
        )
    for power in (True, "1", float("inf"), None):
        fails("power must be a finite number, got", lambda: by_width(2, power=power), TypeError)  # noqa: B023 # pyright: ignore[reportArgumentType]
    for axes in (-1, True, 1.0, None):
        fails("stacked_axes must be a number of leading axes >= 0, got", lambda: by_width(2, stacked_axes=axes))  # noqa: B023 # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("width", [8, 16, 64])
def test_width_transfer(width: int) -> None:
    """Under μP a hidden matrix has the learning rate eta / m at m times the width; its decay per step stays."""
    base, eta, decay = 8, 0.5, 0.25
    m = width / base
    params = {"hidden": {"kernel": jnp.ones((width, width)), "bias": jnp.ones(width)}}
    rates = optax.partition(
        {"matrix": optax.scale(-eta / m), "rest": optax.scale(-eta)},
        by_path({"kernel": "matrix"}, default="rest").values,
    )
    optimizer = optax.chain(wdjax.decoupled_decay(decay * by_width(base)), rates)
    update = first_update(optimizer, jax.tree.map(jnp.zeros_like, params), params)
    np.testing.assert_array_equal(update["hidden"]["kernel"], -eta * decay)
    np.testing.assert_array_equal(update["hidden"]["bias"], -eta * decay)


# Products and nesting.

NET = {
    "embed": {"embedding": jnp.ones((9, 4))},
    "Block_0": {"Dense_0": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}, "LayerNorm_0": {"scale": jnp.ones(4)}},
    "Block_1": {"Dense_0": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}, "LayerNorm_0": {"scale": jnp.ones(4)}},
    "head": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)},
}
FACTORS: dict[str, tuple[Any, Callable[[str], float]]] = {
    "number": (0.1, lambda path: 0.1),
    "array": (jnp.array(0.5), lambda path: 0.5),
    "depth": (
        by_depth("Block_*", 0.75, first="embed", last="head"),
        lambda path: 0.75 ** {"embed": 3, "Block_0": 2, "Block_1": 1, "head": 0}[path.split("/")[0]],
    ),
    "width": (by_width(16, power=0.5), lambda path: 0.5 if path.endswith("kernel") else 1.0),
    "path": (
        by_path({"bias": 0.0, "head": 3.0}, default=2.0),
        lambda path: 0.0 if path.endswith("bias") else 3.0 if path.startswith("head") else 2.0,
    ),
}


def test_products_in_any_order() -> None:
    paths = wdjax.paths.canonical_paths(NET)
    want = {path: np.prod([of_path(path) for _, of_path in FACTORS.values()]) for path in paths}
    zeros = jax.tree.map(jnp.zeros_like, NET)
    for k, order in enumerate(itertools.permutations(factor for factor, _ in FACTORS.values())):
        rules = functools.reduce(lambda one, other: one * other, order)
        values = dict(zip(paths, jax.tree.leaves(rules.values(NET)), strict=True))
        for path in paths:
            np.testing.assert_allclose(values[path], want[path], rtol=1e-6)
        if k % 30 == 0:
            update = first_update(wdjax.decoupled_decay(rules), zeros, NET, run=run_eager)
            for path, leaf in zip(paths, jax.tree.leaves(update), strict=True):
                np.testing.assert_allclose(leaf, want[path], rtol=1e-6)


def test_a_product_of_stacked_multipliers() -> None:
    params = {"embed": jnp.ones((9, 4)), "blocks": {"kernel": jnp.ones((3, 4, 4)), "bias": jnp.ones((3, 4))}}
    depth = by_depth("blocks", 0.5, first="embed", axis=0)
    rules = (
        jnp.array(0.25)
        * depth
        * by_width(2, stacked_axes=1, fan_in=lambda leaf: {2: None, 3: 4}[leaf.ndim])
        * only_kernels()
    )
    values = rules.values(params)
    np.testing.assert_array_equal(values["blocks"]["kernel"], np.reshape([0.0625, 0.125, 0.25], (3, 1, 1)))
    np.testing.assert_array_equal(values["blocks"]["bias"], np.zeros((3, 1)))
    assert float(values["embed"]) == 0.25 * 0.0625
    update = first_update(wdjax.decoupled_decay(rules), jax.tree.map(jnp.zeros_like, params), params)
    chex.assert_trees_all_close(update, jax.tree.map(lambda v, p: np.broadcast_to(v, p.shape), values, params))


def only_kernels() -> Any:
    return by_path({"bias": 0.0}, default=1.0)


def test_values_with_schedules_and_stacks() -> None:
    params = {"blocks": {"kernel": jnp.ones((3, 2))}, "head": jnp.ones(2), "off": jnp.ones(2)}
    schedule = optax.linear_schedule(1.0, 0.0, 4)
    values = (schedule * (2.0 * by_path({"off": 0.0}, default=by_depth("blocks", 0.5, last="head", axis=0)))).values(
        params
    )
    assert float(values["head"](1)) == 1.5
    assert float(values["off"](1)) == 0.0
    np.testing.assert_array_equal(values["blocks"]["kernel"](2), [[0.125], [0.25], [0.5]])
    per_path = by_path({"head": schedule, "off": 0.5}, default=jnp.array(0.25)).values(params)
    assert per_path["head"] is schedule
    assert per_path["off"] == 0.5
    assert isinstance(per_path["blocks"]["kernel"], jax.Array)


def test_rule_sets_as_patterns() -> None:
    rates = by_path({weights_only(): 0.1}, default=0.0)
    got = rates.values(NET)
    assert got["Block_0"] == {"Dense_0": {"kernel": 0.1, "bias": 0.0}, "LayerNorm_0": {"scale": 0.0}}
    assert got["embed"]["embedding"] == got["head"]["kernel"] == 0.1
    rates = by_path({"head": 1.0, (all_but("Dense_0"), "bias"): 2.0}, default=3.0).values(NET)
    assert rates["head"] == {"kernel": 1.0, "bias": 1.0}
    assert rates["Block_1"] == {"Dense_0": {"kernel": 3.0, "bias": 2.0}, "LayerNorm_0": {"scale": 2.0}}
    # It is asked only of what earlier rules leave: of the odd one it could not tell.
    odd = {**NET, "odd": jnp.ones((2, 2))}
    fails("weights_only can't tell", lambda: rates_of(odd))
    assert by_path({"odd": 7.0, weights_only(): 0.1}, default=0.0).values(odd)["odd"] == 7.0


def rates_of(params: Any) -> Any:
    return by_path({weights_only(): 0.1}, default=0.0).values(params)


def test_rule_sets_as_values_and_defaults() -> None:
    rules = by_path(
        {"embed": 0.5, "Block_0": by_path({"bias": 0.0}, default=0.25), "scale": 0.0},
        default=by_depth("Block_*", 0.5, last="head"),
    )
    got = rules.values(NET)
    assert got["embed"]["embedding"] == 0.5
    assert got["Block_0"] == {"Dense_0": {"kernel": 0.25, "bias": 0.0}, "LayerNorm_0": {"scale": 0.25}}
    assert got["Block_1"] == {"Dense_0": {"kernel": 0.5, "bias": 0.5}, "LayerNorm_0": {"scale": 0.0}}
    assert got["head"]["kernel"] == 1.0
    doubled = by_path({"Block_0": 2 * by_path({"bias": 0.0}, default=0.25)}, default=1.0) * 3
    assert doubled.values(NET)["Block_0"]["Dense_0"] == {"kernel": 1.5, "bias": 0.0}
    mask = by_path({"head": False}, default=weights_only()).mask(NET)
    assert mask["head"] == {"kernel": False, "bias": False}
    assert mask["Block_0"]["Dense_0"] == {"kernel": True, "bias": False}


def test_mistakes_in_nested_rule_sets() -> None:
    inner = by_path({"bais": 0.0}, default=0.25)
    fails(
        r"the pattern 'bais' matches none of the parameters that its rule set decides on \(3 of 9\)\. Did you mean",
        lambda: by_path({"Block_0": inner}, default=1.0).values(NET),
    )
    fails(
        r"the pattern 'embedding' matches none of the parameters that its rule set decides on \(3 of 9\)",
        lambda: by_path({"Block_0": by_path({"embedding": 0.0}, default=1.0)}, default=1.0).values(NET),
    )
    fails(
        "no rule covers the parameter 'Block_0/Dense_0/kernel'",
        lambda: by_path({"Block_0": by_path({"bias": 0.0, "scale": 0.0})}, default=1.0).values(NET),
    )
    fails("holds True", lambda: 0.1 * by_path({"head": 0.5}, default=weights_only()), TypeError)
    fails(
        r"holds 0\.5",
        lambda: wdjax.decoupled_decay(0.1, by_path({"head": by_path({"bias": 0.5}, default=1.0)}, default=True)),
        TypeError,
    )
    fails(r"a mask says True or False, but by_depth\(", lambda: by_path({by_depth("Block_*", 0.5): 0.1}), TypeError)
    fails(r"a mask says True or False, but 0\.1 \* by_path", lambda: only(0.1 * by_path({"a": 1.0})), TypeError)


def test_rule_sets_as_patterns_that_never_decide() -> None:
    fails(
        r"the rule weights_only\(\) never decides: '\*\*' comes first and matches the same parameters",
        lambda: by_path({"**": 0.0, weights_only(): 0.1}).values(NET),
    )
    fails(
        r"the pattern weights_only\(\) matches none of the 5 parameters that earlier rules leave undecided",
        lambda: by_path({("kernel", "embedding"): 0.0, weights_only(): 0.1}, default=0.0).values(NET),
    )
    fails(
        r"the pattern 'bias' matches none of the parameters that its rule set decides on \(4 of 9\)",
        lambda: by_path({"bias": 0.0, "Dense_0": 0.2, all_but("bias"): 0.1}, default=0.3).values(NET),
    )


def test_how_they_are_written() -> None:
    for rules, text in {
        by_depth("Block_*", 0.75): "by_depth('Block_*', 0.75)",
        by_depth(("a_*", re.compile(r"b(\d+)")), 0.5, first=("x", "y"), axis=None): (
            r"by_depth(('a_*', re.compile('b(\\d+)')), 0.5, first=('x', 'y'))"
        ),
        by_depth("Block_*", 0.75, last="**"): "by_depth('Block_*', 0.75, last='**')",
        by_depth("blocks", 0.5, axis=-1): "by_depth('blocks', 0.5, axis=-1)",
        by_width(256): "by_width(256)",
        by_width(1234567): "by_width(1234567)",
        by_width(256, power=0.5, stacked_axes=1): "by_width(256, power=0.5, stacked_axes=1)",
        0.1 * by_depth("b*", 0.5): "0.1 * by_depth('b*', 0.5)",
    }.items():
        assert repr(rules) == text
