"""On a mesh with explicit axes, as from `jax.make_mesh`, all results are the same as without a mesh."""

from collections.abc import Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from registry import ROWS, Row, core_first, core_row
from slow import slow

import wdjax
from wdjax.penalties import NuclearNorm, Orthogonality, SpectralNorm

P = PartitionSpec
SHAPES = {"layers": (8, 4, 6), "kernel": (16, 4), "table": (8, 3), "bias": (4,)}
SPECS = {"layers": P("data"), "kernel": P(None, "model"), "table": P("data", None), "bias": P()}
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
TOLERANCE = {"rtol": 2e-6, "atol": 1e-6}
by_element = pytest.mark.parametrize("row", core_first(row for row in ROWS if row.is_elementwise))


@pytest.fixture
def bare_mesh() -> Any:
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)


@pytest.fixture
def mesh(bare_mesh: Any) -> Iterator[Any]:
    with jax.set_mesh(bare_mesh):
        yield bare_mesh


def make(seed: int, dtype: Any = jnp.float32) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.normal(size=shape)).astype(dtype) for name, shape in SHAPES.items()}


def on(mesh: Any, tree: Any, specs: Any = None) -> Any:
    specs = SPECS if specs is None else specs
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs)


def step(optimizer: Any, updates: Any, params: Any, **extra: Any) -> Any:
    """Runs two steps and returns the updates and the state of the second."""
    update = jax.jit(optimizer.update)
    _, state = update(updates, jax.jit(optimizer.init)(params), params, **extra)
    return update(updates, state, params, **extra)


def assert_alike(found: Any, params: Any, want: Any, **tolerance: Any) -> None:
    chex.assert_trees_all_close(jax.device_get(found), jax.device_get(want), **(tolerance or TOLERANCE))
    for name, update in found.items():
        assert update.sharding.is_equivalent_to(params[name].sharding, update.ndim), name


OF_EACH = {"kernel": lambda count: 0.1 * jnp.asarray(count + 1, jnp.float32), "table": jnp.asarray(0.2)}
RATE = wdjax.by_path({"layers": wdjax.by_depth("layers", 0.5, axis=0), **OF_EACH}, default=0.1)


def rate_for(row: Row) -> wdjax.Rules:
    return wdjax.by_path(OF_EACH, default=0.1) if row.is_stateful else RATE


@core_row
def test_every_transformation(row: Row, mesh: Any) -> None:
    params, updates = make(0), make(1)
    optimizer = row.build(rate_for(row), toward="init")
    found, state = step(optimizer, on(mesh, updates), on(mesh, params))
    want, wanted_state = step(optimizer, *jax.tree.map(jnp.asarray, (updates, params)))
    assert_alike(found, on(mesh, params), want)
    chex.assert_trees_all_close(jax.device_get(state), jax.device_get(wanted_state), **TOLERANCE)
    if row.has_anchor:
        anchor = optax.tree.get(state, "anchor")["layers"]
        assert anchor.sharding.is_equivalent_to(NamedSharding(mesh, SPECS["layers"]), 3)


@by_element
def test_arrays_as_rates_and_masks(row: Row, mesh: Any) -> None:
    params, updates = make(0), make(1)
    rows = np.linspace(0.0, 0.4, 8, dtype=np.float32).reshape(8, 1)
    for rate, mask in (
        (wdjax.by_path({"table": rows, "layers": rows.reshape(8, 1, 1)}, default=0.1), None),
        (0.3, wdjax.by_path({"table": rows > 0.2}, default=True)),
    ):
        optimizer = row.build(rate, mask)
        found, _ = step(optimizer, on(mesh, updates), on(mesh, params))
        assert_alike(found, on(mesh, params), step(optimizer, *jax.tree.map(jnp.asarray, (updates, params)))[0])


def test_the_average_of_the_weights(mesh: Any) -> None:
    params, updates = make(0), make(1)
    optimizer = wdjax.independent_decay(0.1, toward=wdjax.by_path({"layers": wdjax.EMA(0.5)}, default="init"))
    found, state = step(optimizer, on(mesh, updates), on(mesh, params))
    want, _ = step(optimizer, *jax.tree.map(jnp.asarray, (updates, params)))
    assert_alike(found, on(mesh, params), want)
    assert state.anchor["layers"].sharding.is_equivalent_to(NamedSharding(mesh, SPECS["layers"]), 3)
    placed = on(mesh, params)
    text = jax.jit(optimizer.update).lower(on(mesh, updates), state, placed).compile().as_text()
    assert [name for name in COLLECTIVES if name in text] == []


@by_element
def test_no_collective(row: Row, mesh: Any) -> None:
    params, updates = on(mesh, make(0)), on(mesh, make(1))
    optimizer = row.build(rate_for(row), toward="init")
    text = jax.jit(optimizer.update).lower(updates, jax.jit(optimizer.init)(params), params).compile().as_text()
    assert [name for name in COLLECTIVES if name in text] == []


@core_row
def test_eager_and_without_the_mesh_in_a_context(row: Row, bare_mesh: Any) -> None:
    params, updates = make(0), make(1)
    optimizer = row.build(rate_for(row))
    placed = on(bare_mesh, params)
    found, _ = optimizer.update(on(bare_mesh, updates), optimizer.init(placed), placed)
    plain = jax.tree.map(jnp.asarray, params)
    assert_alike(found, placed, optimizer.update(jax.tree.map(jnp.asarray, updates), optimizer.init(plain), plain)[0])


@pytest.mark.parametrize("kind", [wdjax.L2(), slow(wdjax.L1()), wdjax.GroupLasso(), slow(wdjax.Huber(0.5))], ids=repr)
def test_the_loss_and_its_gradient(kind: Any, mesh: Any) -> None:
    params = make(0)
    for rate in (0.3, wdjax.by_path({"layers": wdjax.by_depth("layers", 0.5, axis=0)}, default=0.1)):
        of = jax.value_and_grad(lambda params, rate=rate: wdjax.penalty(params, kind, rate, stacked_axes={"layers": 1}))
        want, want_grads = of(jax.tree.map(jnp.asarray, params))
        for run in (of, jax.jit(of)):
            found, grads = run(on(mesh, params))
            np.testing.assert_allclose(found, want, rtol=1e-5)
            assert_alike(grads, on(mesh, params), want_grads)


OF_MATRICES = [NuclearNorm(), *map(slow, (SpectralNorm(), SpectralNorm(iterations=10), Orthogonality()))]


@pytest.mark.parametrize("kind", OF_MATRICES, ids=repr)
def test_the_loss_of_matrices_and_its_gradient(kind: Any, mesh: Any) -> None:
    params, mask = make(0), wdjax.all_but("bias")
    of = jax.value_and_grad(lambda params: wdjax.penalty(params, kind, 0.3, mask, stacked_axes={"layers": 1}))
    want, want_grads = of(jax.tree.map(jnp.asarray, params))
    for run in (of, jax.jit(of)):
        found, grads = run(on(mesh, params))
        np.testing.assert_allclose(found, want, rtol=1e-5)
        assert_alike(grads, on(mesh, params), want_grads, rtol=1e-5, atol=1e-5)


FACTORS = {"W": {"kernel": P("data", "model"), "lora_a": P("data", None), "lora_b": P(None, "model")}}


@pytest.mark.parametrize("is_stacked", [False, True])
@pytest.mark.parametrize("scale", [2.0, jnp.asarray(2.0)], ids=["number", "array"])
def test_the_product_of_lora_factors_as_fsdp_splits_them(is_stacked: bool, scale: Any, mesh: Any) -> None:
    rng = np.random.default_rng(0)
    shapes = {"kernel": (8, 6), "lora_a": (8, 2), "lora_b": (2, 6)}
    stack = (4,) if is_stacked else ()
    params = {"W": {k: np.asarray(rng.normal(size=(*stack, *s)), np.float32) for k, s in shapes.items()}}
    specs = FACTORS
    if is_stacked:
        specs = {"W": {name: P("data", None, *spec[1:]) for name, spec in FACTORS["W"].items()}}
    optimizer = wdjax.decoupled_lora_decay(0.1, scale=scale)
    placed = on(mesh, params, specs)
    found, _ = step(optimizer, placed, placed)
    plain = jax.tree.map(jnp.asarray, params)
    assert_alike(found["W"], placed["W"], step(optimizer, plain, plain)[0]["W"], rtol=1e-5, atol=1e-5)


@pytest.mark.peers
@pytest.mark.parametrize("recipe", [wdjax.adamw, wdjax.adam_l2, wdjax.sgdw, wdjax.sgd_l2], ids=lambda r: r.__name__)
def test_recipes_around_them_the_monitor_and_freeze(recipe: Any, mesh: Any) -> None:
    params, updates = make(0), make(1)
    mask = wdjax.by_path({"table": np.arange(8).reshape(8, 1) < 4, "bias": True}, default=False)

    def build() -> Any:
        return wdjax.freeze(wdjax.monitor(recipe(0.1, 0.2), 0.2, learning_rate=0.1), mask)

    found, state = step(build(), on(mesh, updates), on(mesh, params))
    want, wanted_state = step(build(), *jax.tree.map(jnp.asarray, (updates, params)))
    assert_alike(found, on(mesh, params), want)
    chex.assert_trees_all_close(
        jax.device_get(wdjax.scalars(state)), jax.device_get(wdjax.scalars(wanted_state)), rtol=1e-4, atol=1e-6
    )


WRITERS = {
    "compensated": wdjax.compensated(),
    "master_weights": wdjax.master_weights(),
    "stochastic_rounding": wdjax.stochastic_rounding(0),
}


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_the_writers_of_low_precision(writer: Any, mesh: Any) -> None:
    params, updates = make(0, jnp.bfloat16), make(1, jnp.bfloat16)
    optimizer = optax.chain(wdjax.in_float32(wdjax.sgdw(0.1, 0.2)), writer)
    found, _ = step(optimizer, on(mesh, updates), on(mesh, params))
    want, _ = step(optimizer, *jax.tree.map(jnp.asarray, (updates, params)))
    assert_alike(found, on(mesh, params), want)


@pytest.mark.peers
@pytest.mark.parametrize(
    "inner", [optax.adam(0.1), optax.contrib.schedule_free_sgd(0.1)], ids=["adam", "schedule-free"]
)
def test_a_decay_around_an_optimizer(inner: Any, mesh: Any) -> None:
    params, updates = make(0), make(1)
    optimizer = wdjax.with_decoupled_decay(inner, RATE, learning_rate=0.1)
    found, _ = step(optimizer, on(mesh, updates), on(mesh, params))
    assert_alike(found, on(mesh, params), step(optimizer, *jax.tree.map(jnp.asarray, (updates, params)))[0])


def test_within_a_shard_map_over_one_of_the_axes(mesh: Any) -> None:
    params = on(mesh, make(0))
    optimizer = wdjax.decoupled_decay(0.3)

    def act(params: Any) -> Any:
        return optimizer.update(params, optimizer.init(params), params)[0]

    specs = {"layers": P("data"), "kernel": P(), "table": P("data"), "bias": P()}
    found = jax.jit(jax.shard_map(act, in_specs=(specs,), out_specs=specs, axis_names={"data"}))(params)
    chex.assert_trees_all_close(jax.device_get(found), jax.tree.map(lambda p: 1.3 * p, make(0)), rtol=1e-6)
