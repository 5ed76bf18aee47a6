"""Each unstable part of JAX is taken away once, and what wdjax computes stays the same."""

import contextlib
import importlib.util
import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import wdjax
from wdjax._engine import unstable as _unstable

WDJAX = Path(wdjax.__file__).parent
UNSTABLE = re.compile(
    r"jax\.experimental|jax\.extend|jax\.core|jax\.interpreters|jax\._src|optax\._src|flax\._src|\.aval\b|typeof\("
)
IMPORTS = {
    "Tracer": "jax.core",
    "set_xla_metadata": "jax.experimental.xla_metadata",
    "auto_axes": "jax.sharding",
    "process_allgather": "jax.experimental.multihost_utils",
}


def test_one_file_has_them_all() -> None:
    using = {path.relative_to(WDJAX).as_posix() for path in WDJAX.rglob("*.py") if UNSTABLE.search(path.read_text())}
    assert using == {"_engine/unstable.py"}
    imported = re.findall(r"^    from (jax\.\S+) import (\w+)", (WDJAX / "_engine/unstable.py").read_text(), re.M)
    assert {name: module for module, name in imported} == IMPORTS


@pytest.mark.parametrize("name", IMPORTS)
def test_it_can_be_imported_without(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The module exists but lacks the name. A missing module also raises ImportError.
    monkeypatch.setitem(sys.modules, IMPORTS[name], types.ModuleType(IMPORTS[name]))
    spec = importlib.util.spec_from_file_location("unstable_once_more", WDJAX / "_engine/unstable.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert {other: getattr(module, other) is None for other in IMPORTS} == {other: other == name for other in IMPORTS}


class _JaxWithBareTypes:
    """JAX, whose abstract values have no attribute."""

    def __getattr__(self, name: str) -> Any:
        return (lambda x: object()) if name == "typeof" else getattr(jax, name)


TAKEN_AWAY: dict[str, tuple[str, Any]] = {
    "nothing": ("Tracer", _unstable.Tracer),
    "Tracer": ("Tracer", None),
    "set_xla_metadata": ("set_xla_metadata", None),
    "attributes of types": ("jax", _JaxWithBareTypes()),
}


@pytest.fixture(params=TAKEN_AWAY)
def without(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    jax.clear_caches()  # Otherwise JAX reuses what it traced before.
    monkeypatch.setattr(_unstable, *TAKEN_AWAY[request.param])
    yield request.param
    jax.clear_caches()


def test_what_is_traced_is_known(without: str) -> None:
    seen = []

    def look(x: Any) -> Any:
        seen.append(_unstable.is_traced(x))
        return x

    jax.jit(look)(1.0)
    jax.vmap(look)(jnp.ones(2))
    jax.grad(look)(1.0)
    jax.jit(lambda seed: jax.random.key_data(look(jax.random.key(seed))))(0)
    assert seen == [True] * 4
    concrete = (jnp.ones(2), np.ones(2), np.float32(1), 1.0, None, "x", jax.random.key(0), jnp.ones, int)
    assert not any(map(_unstable.is_traced, concrete))


def test_rates_act_alike(without: str) -> None:
    params = {name: jnp.full(4, 2.0) for name in "abc"}
    grads = jax.tree.map(jnp.zeros_like, params)

    @jax.jit
    def step(rate: Any) -> Any:
        table = wdjax.by_path({"a": 0.25, "b": 0.5}, default=rate)
        optimizer = wdjax.sgdw(0.5, table)
        return optimizer.update(grads, optimizer.init(params), params)[0]

    want = {name: jnp.full(4, update) for name, update in (("a", -0.25), ("b", -0.5), ("c", -0.75))}
    chex.assert_trees_all_equal(step(0.75), want)
    with pytest.raises(ValueError, match="finite and not negative, got -1"):
        wdjax.sgdw(0.5, jnp.float32(-1.0))
    with pytest.raises(TypeError, match="the mask at 'a' is traced"):
        jax.jit(lambda flag: wdjax.sgdw(0.5, 0.1, {"a": flag, "b": True, "c": True}).init(params))(True)


def test_rates_are_data_where_xla_can_be_told(without: str) -> None:
    params = {name: jnp.ones(4) for name in "ab"}
    optimizer = wdjax.decoupled_decay(wdjax.by_path({"a": 0.25, "b": 0.5}))
    text = jax.jit(optimizer.update).lower(params, optimizer.init(params), params).as_text()
    assert ("inlineable" in text) == (without != "set_xla_metadata")


def on_a_mesh(axis_type: AxisType) -> tuple[Any, Callable[[Any], Any], contextlib.AbstractContextManager[Any]]:
    mesh = jax.make_mesh((8,), ("d",), axis_types=(axis_type,))
    return mesh, lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec("d"))), jax.set_mesh(mesh)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_what_is_frozen_stays_and_keeps_its_sharding(without: str, axis_type: AxisType) -> None:
    _, put, entered = on_a_mesh(axis_type)
    with entered:
        params = {name: put(jnp.full((16, 4), 2.0)) for name in ("encoder", "head")}
        optimizer = wdjax.freeze(wdjax.sgdw(0.5, 0.1), wdjax.only("encoder"))
        updates, _ = jax.jit(optimizer.update)(params, optimizer.init(params), params)
    assert np.signbit(updates["encoder"]).all()
    assert not np.any(updates["encoder"])
    assert updates["encoder"].sharding.is_equivalent_to(params["encoder"].sharding, 2)


def test_a_norm_within_shard_map_is_that_of_the_whole(without: str) -> None:
    mesh, put, entered = on_a_mesh(AxisType.Auto)
    with entered:
        params = {"w": put(jnp.arange(16.0).reshape(16, 1))}

        def penalty(params: Any) -> Any:
            return wdjax.l2_penalty(params, 2.0, axis_name="d")

        summed = jax.shard_map(penalty, mesh=mesh, in_specs=PartitionSpec("d"), out_specs=PartitionSpec())(params)
        shared = jax.shard_map(penalty, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=True)
        np.testing.assert_allclose(summed, np.sum(np.arange(16.0) ** 2))
        if without != "attributes of types":  # Then the caller is believed, who says that all is split.
            np.testing.assert_allclose(shared({"w": jnp.ones((3, 1))}), 3.0)


def test_an_array_is_gathered_from_all_devices() -> None:
    _, put, entered = on_a_mesh(AxisType.Auto)
    with entered:
        x = put(jnp.arange(16.0))
    np.testing.assert_array_equal(_unstable._gathered(x), np.arange(16.0))
    np.testing.assert_array_equal(_unstable.whole(x), np.arange(16.0))
