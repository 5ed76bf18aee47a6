"""The tangential update: its formula over many steps, what it does to norms, its place beside a decay, and AdamP."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from test_contract import assert_same_bits
from test_norm_control import GROUPS, grads_of, make, new_updates, norm, trained

import wdjax
from wdjax.in_update import tangential_update

STEPS = 60


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("groups", "axes"), GROUPS)
def test_closed_form_and_the_norm_grows_by_the_square_of_the_update(groups: Any, axes: Any) -> None:
    for scale in (1.0, 1e-200, 1e150):  # Where squares underflow and overflow.
        params, updates = ({"conv": factor * make(seed)["conv"]} for seed, factor in ((0, scale), (1, 1.0)))
        for of_update in (1.0, 1e-200, 1e150):
            u, p = np.asarray(make(1)["conv"]), np.asarray(make(0)["conv"])
            updates = {"conv": of_update * make(1)["conv"]}
            new = np.asarray(new_updates(tangential_update(**groups), updates, params)["conv"]) / of_update
            want = u - (u * p).sum(axes, keepdims=True) / norm(p, axes) ** 2 * p
            np.testing.assert_allclose(new, want, rtol=1e-13, atol=1e-15)
            np.testing.assert_allclose((new * p).sum(axes), 0, atol=1e-14)
            squares = norm(p, axes) ** 2 + norm(new, axes) ** 2
            np.testing.assert_allclose(norm(p + new, axes) ** 2, squares, rtol=1e-14)


@pytest.mark.peers
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("groups", "axes"), GROUPS)
def test_the_formula_behind_adam_for_sixty_steps(groups: Any, axes: Any) -> None:
    optimizer = optax.chain(
        optax.scale_by_adam(),
        tangential_update(wdjax.only("conv"), **groups),
        wdjax.decoupled_decay(0.1),
        optax.scale_by_learning_rate(0.05),
    )
    got = trained(optimizer, make(0), grads_of)
    for name, w in make(0).items():
        w = np.asarray(w)
        m, v = np.zeros_like(w), np.zeros_like(w)
        for count in range(STEPS):
            g = np.sin(3 * w) + np.cos(count)
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            d = (m / (1 - 0.9 ** (count + 1))) / (np.sqrt(v / (1 - 0.999 ** (count + 1))) + 1e-8)
            if name == "conv":
                d = d - (d * w).sum(axes, keepdims=True) / norm(w, axes) ** 2 * w
            w = w - 0.05 * (d + 0.1 * w)
        np.testing.assert_allclose(got[name], w, rtol=0, atol=1e-13)


@pytest.mark.peers
@pytest.mark.usefixtures("x64")
def test_momentum_no_longer_inflates_weights_whose_scale_does_not_matter() -> None:
    # The gradient is perpendicular to the weights, but the momentum holds gradients of earlier weights.
    start, target = jnp.asarray([1.0, 0.0, 0.0]), jnp.asarray([0.0, 0.6, 0.8])
    loss = lambda w: -jnp.dot(w, target) / jnp.linalg.norm(w)  # noqa: E731
    grads = lambda w, _: jax.grad(loss)(w)  # noqa: E731
    momentum, lr = optax.trace(0.9), optax.scale_by_learning_rate(0.3)
    sizes = {}
    for name, between in (("plain", optax.identity()), ("tangential", tangential_update())):
        optimizer = optax.chain(momentum, between, lr)
        w, state, squares = start, optimizer.init(start), 1.0
        for count in range(STEPS):
            updates, state = optimizer.update(grads(w, count), state, w)
            w, squares = w + updates, squares + float(jnp.sum(updates**2))
        sizes[name] = float(jnp.sum(w**2))
        if name == "tangential":
            np.testing.assert_allclose(sizes[name], squares, rtol=1e-13)
    assert sizes["plain"] > 1.5 * sizes["tangential"]


@pytest.mark.usefixtures("x64")
def test_a_decay_behind_it_stays_and_one_before_it_is_removed() -> None:
    p, d, lr = make(0)["conv"], make(1)["conv"], optax.scale_by_learning_rate(0.1)
    decay, tangential = wdjax.decoupled_decay(0.3), tangential_update()
    bare = new_updates(optax.chain(tangential, lr), d, p)
    behind = new_updates(optax.chain(tangential, decay, lr), d, p)
    before = new_updates(optax.chain(decay, tangential, lr), d, p)
    np.testing.assert_allclose(behind, bare - 0.03 * p, rtol=1e-12)
    np.testing.assert_allclose(before, bare, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_of_complex_weights_the_phase_may_turn() -> None:
    rng = np.random.default_rng(0)
    p, u = (rng.normal(size=(4, 3)) + 1j * rng.normal(size=(4, 3)) for _ in range(2))
    new = np.asarray(new_updates(tangential_update(per=-1), jnp.asarray(u), jnp.asarray(p)))
    # The same as for the real and imaginary parts, as one real vector.
    parts = lambda z: np.concatenate([z.real, z.imag])  # noqa: E731
    of_parts = np.asarray(new_updates(tangential_update(per=-1), jnp.asarray(parts(u)), jnp.asarray(parts(p))))
    np.testing.assert_allclose(parts(new), of_parts, rtol=1e-12)
    turned = np.asarray(new_updates(tangential_update(), jnp.asarray(1j * p), jnp.asarray(p)))
    np.testing.assert_allclose(turned, 1j * p, rtol=1e-13)
    np.testing.assert_allclose(new_updates(tangential_update(), jnp.asarray(3 * p), jnp.asarray(p)), 0 * p, atol=1e-14)


def test_weights_of_zero_keep_their_update_and_no_derivative_is_nan() -> None:
    zeros, ones = jnp.zeros(3), jnp.ones(3)
    assert_same_bits(new_updates(tangential_update(), ones, zeros), ones)
    assert_same_bits(new_updates(tangential_update(), -zeros, zeros), -zeros)
    assert_same_bits(new_updates(tangential_update(), jnp.inf * ones, zeros), jnp.inf * ones)

    def total(u: Any, p: Any) -> Any:
        return jnp.sum(jnp.sin(tangential_update().update(u, tangential_update().init(p), p)[0]))

    for u, p in ((zeros, ones), (ones, zeros), (zeros, zeros)):
        assert all(np.all(np.isfinite(slope)) for slope in jax.grad(total, (0, 1))(u, p))


@pytest.mark.usefixtures("x64")
def test_layers_of_a_stack() -> None:
    layers, moves = ([make(10 * seed + i)["conv"] for i in range(3)] for seed in (1, 2))
    for groups in ({}, {"per": -1}):
        got = new_updates(tangential_update(stacked_axes=1, **groups), jnp.stack(moves), jnp.stack(layers))
        want = [new_updates(tangential_update(**groups), u, p) for u, p in zip(moves, layers, strict=True)]
        np.testing.assert_allclose(got, jnp.stack(want), rtol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("check_vma", [True, False])
def test_groups_that_are_split_within_shard_map(check_vma: bool) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    params, updates = (jnp.asarray(np.random.default_rng(seed).normal(size=(16, 3))) for seed in (0, 1))
    part = tangential_update(axis_name="data")
    act = jax.shard_map(
        lambda u, p: part.update(u, part.init(p), p)[0],
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P("data"),
        check_vma=check_vma,
    )
    want = new_updates(tangential_update(), updates, params)
    np.testing.assert_allclose(jax.jit(act)(updates, params), want, rtol=1e-12)


def test_a_group_of_one_weight_is_warned_of() -> None:
    params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2), "scale": jnp.ones([])}
    words = r"^tangential_update: each weight is a group of its own at 'bias', 'scale', so it never moves\. Select"
    with pytest.warns(UserWarning, match=words):
        tangential_update(per=-1).init({**params, "scale": jnp.ones(1)})
    tangential_update(wdjax.only("kernel"), per=-1).init(params)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"^tangential_update: axis=0 names .*Write tangential_update\(per=-1\)"):
        tangential_update(axis=0, per=-1)
    with pytest.raises(TypeError, match=r"^tangential_update: per must be an integer.*got 'rows'"):
        tangential_update(per="rows")
    with pytest.raises(ValueError, match=r"^tangential_update: per=1 is out of range for a 1-dimensional array"):
        new_updates(tangential_update(per=1), jnp.ones(2), jnp.ones(2))
    with pytest.raises(ValueError, match=r"^tangential_update: the mask at 'w' selects parts"):
        new_updates(tangential_update({"w": np.array([True, False])}), {"w": jnp.ones(2)}, {"w": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"^tangential_update needs the parameters"):
        tangential_update().update(jnp.ones(2), tangential_update().init(jnp.ones(2)))
