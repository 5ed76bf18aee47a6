"""The normalized update: in closed form, beside Optax's trust ratio, and at the edges."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from test_contract import assert_same_bits

import wdjax
from wdjax import normalized_update


def make(seed: int, dtype: Any = np.float64) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {"conv": jnp.asarray(rng.normal(size=(3, 2, 4)), dtype), "bias": jnp.asarray(rng.normal(size=4), dtype)}


def new_updates(optimizer: Any, updates: Any, params: Any) -> Any:
    return jax.jit(optimizer.update)(updates, optimizer.init(params), params)[0]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("groups", "axes"), [({}, (0, 1, 2)), ({"per": -1}, (0, 1)), ({"per": (0, -1)}, (1,)), ({"axis": 0}, (0,))]
)
def test_closed_form(groups: Any, axes: tuple[int, ...]) -> None:
    mask = wdjax.only("conv")
    for scale in (1.0, 1e-200, 1e200):  # Where squares underflow and overflow.
        params, updates = make(0), jax.tree.map(lambda u: scale * u, make(1))  # noqa: B023
        new = new_updates(normalized_update(mask, **groups), updates, params)
        p, u = np.asarray(params["conv"]), np.asarray(make(1)["conv"])
        norm = lambda x: np.sqrt((x**2).sum(axes, keepdims=True))  # noqa: E731
        np.testing.assert_allclose(new["conv"], u * norm(p) / norm(u), rtol=1e-13)
        assert_same_bits(new["bias"], updates["bias"])


@pytest.mark.peers
@pytest.mark.usefixtures("x64")
def test_lamb_is_optaxs_lamb_for_sixty_steps() -> None:
    theirs = optax.lamb(0.1, weight_decay=0.01)
    ours = optax.chain(
        optax.scale_by_adam(eps=1e-6),
        wdjax.decoupled_decay(0.01),
        normalized_update(),
        optax.scale_by_learning_rate(0.1),
    )
    found = []
    for optimizer in (ours, theirs):
        params = make(0)
        state, step = optimizer.init(params), jax.jit(optimizer.update)
        for count in range(60):
            grads = jax.tree.map(lambda p: jnp.sin(3 * p) + np.cos(count), params)  # noqa: B023
            updates, state = step(grads, state, params)
            params = optax.apply_updates(params, updates)
        found.append(params)
    chex.assert_trees_all_close(*found, rtol=1e-11)


@pytest.mark.peers
def test_the_trust_ratio_of_optax_also_where_norms_are_zero() -> None:
    zero = {"conv": jnp.zeros((3, 2, 4)), "bias": jnp.zeros(4)}
    ours, theirs = normalized_update(), optax.scale_by_trust_ratio()
    for params, updates in ((make(0, np.float32), make(1, np.float32)), (zero, make(1, np.float32)), (zero, zero)):
        got, want = (new_updates(optimizer, updates, params) for optimizer in (ours, theirs))
        chex.assert_trees_all_close(got, want, rtol=1e-6)
    assert not np.any(new_updates(ours, zero, make(0, np.float32))["conv"])


@pytest.mark.usefixtures("x64")
def test_layers_of_a_stack_and_radii_of_groups() -> None:
    layers, moves = ([make(10 * seed + i)["conv"] for i in range(3)] for seed in (1, 2))
    for groups in ({}, {"per": -1}):
        got = new_updates(normalized_update(stacked_axes=1, **groups), jnp.stack(moves), jnp.stack(layers))
        want = [new_updates(normalized_update(**groups), u, p) for u, p in zip(moves, layers, strict=True)]
        np.testing.assert_allclose(got, jnp.stack(want), rtol=1e-13)


@pytest.mark.usefixtures("x64")
def test_norms_of_whole_arrays_within_shard_map() -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    params, updates = (jnp.asarray(np.random.default_rng(seed).normal(size=(16, 3))) for seed in (0, 1))
    part = normalized_update(axis_name="data")
    act = jax.shard_map(
        lambda u, p: part.update(u, part.init(p), p)[0], mesh=mesh, in_specs=P("data"), out_specs=P("data")
    )
    want = new_updates(normalized_update(), updates, params)
    np.testing.assert_allclose(jax.jit(act)(updates, params), want, rtol=1e-13)


def test_no_derivative_is_nan_at_zero() -> None:
    zeros, ones = jnp.zeros(3), jnp.ones(3)

    def total(u: Any, p: Any) -> Any:
        return jnp.sum(jnp.sin(normalized_update().update(u, normalized_update().init(p), p)[0]))

    for u, p in ((zeros, ones), (ones, zeros), (zeros, zeros)):
        assert all(np.all(np.isfinite(slope)) for slope in jax.grad(total, (0, 1))(u, p))


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"^normalized_update: axis=0 names .*Write normalized_update\(per=-1\)"):
        normalized_update(axis=0, per=-1)
    with pytest.raises(TypeError, match=r"^normalized_update: per must be an integer.*got 'rows'"):
        normalized_update(per="rows")
    with pytest.raises(ValueError, match=r"^normalized_update: per=1 is out of range for a 1-dimensional array"):
        new_updates(normalized_update(per=1), jnp.ones(2), jnp.ones(2))
    with pytest.raises(ValueError, match=r"^normalized_update: the mask at 'w' selects parts"):
        new_updates(normalized_update({"w": np.array([True, False])}), {"w": jnp.ones(2)}, {"w": jnp.ones(2)})


def test_axes_under_inject_hyperparams_are_static() -> None:
    params = {"a": jnp.ones((2, 3))}
    for name in ("axis", "per", "stacked_axes"):
        with pytest.raises(TypeError, match=rf"inject_hyperparams, name it in static_args=\('{name}',\)"):
            jax.jit(optax.inject_hyperparams(normalized_update)(**{name: 1}).init)(params)
        optax.inject_hyperparams(normalized_update, static_args=(name,))(**{name: 1}).init(params)
