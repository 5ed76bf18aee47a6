"""`shrink_and_perturb`: its formula, its statistics, and noise that depends on seed, count and path alone."""

import functools
import hashlib
import re
from typing import Any

import chex
import equinox as eqx
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from slow import slow

import wdjax
from wdjax._engine import draws
from wdjax.on_weights import shrink_and_perturb

STEPS = 60
SHAPES = {"kernel": (8, 16), "bias": (8,), "other": (8, 16)}


def make_params(seed: int = 0, dtype: Any = None) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in SHAPES.items()}


def still(params: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, params)


def documented_key(seed: int, count: int, path: str, where: str = "shrink_and_perturb") -> jax.Array:
    digest = hashlib.sha256(f"{where} {path}".encode()).digest()
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), count)
    for word in (digest[:4], digest[4:8]):
        key = jax.random.fold_in(key, int.from_bytes(word, "big"))
    return key


def noise_of(optimizer: Any, params: Any, count: int = 0) -> Any:
    """The noise that is added to each parameter at this count."""
    state = optimizer.init(params)
    state = optax.tree.set(state, count=jnp.array(count, jnp.int32))
    return jax.jit(optimizer.update)(still(params), state, params)[0]


def assert_same_bits(one: Any, other: Any) -> None:
    assert np.asarray(one).dtype == np.asarray(other).dtype
    assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


# The formula.


def schedules() -> tuple[Any, Any, Any, Any]:
    """Shrink and noise at each count: neither in most steps, both in some, one of them in others."""
    shrinks, noises = np.zeros(STEPS), np.zeros(STEPS)
    shrinks[[3, 20, 40]] = 0.25, 0.5, 1.0
    noises[[3, 30, 40]] = 0.5, 0.125, 1.0
    return shrinks, noises, lambda count: jnp.asarray(shrinks)[count], lambda count: jnp.asarray(noises)[count]


def drawn(key: jax.Array) -> Any:
    keys = jax.random.split(key, len(SHAPES))
    return {name: jax.random.uniform(k, SHAPES[name]) for k, name in zip(keys, SHAPES, strict=True)}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("is_fresh", [False, True], ids=["Gaussian", "fresh"])
def test_sixty_steps_of_sgd_with_momentum_follow_the_formula(is_fresh: bool) -> None:
    shrinks, noises, shrink, noise = schedules()
    optimizer = optax.chain(
        optax.sgd(0.1, momentum=0.9), shrink_and_perturb(shrink, noise, seed=3, fresh=drawn if is_fresh else None)
    )
    params = make_params()
    targets = make_params(1)
    weights, velocity = jax.device_get(params), {name: np.zeros(shape) for name, shape in SHAPES.items()}
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for step in range(STEPS):
        updates, state = update(jax.tree.map(lambda p, t: p - t, params, targets), state, params)
        params = optax.apply_updates(params, updates)
        if is_fresh:
            numbers = drawn(documented_key(3, step, "", "shrink_and_perturb fresh"))
        else:
            numbers = {name: jax.random.normal(documented_key(3, step, name), SHAPES[name]) for name in SHAPES}
        for name in SHAPES:
            velocity[name] = 0.9 * velocity[name] + weights[name] - np.asarray(targets[name])
            moved = weights[name] - 0.1 * velocity[name]
            weights[name] = (1 - shrinks[step]) * moved + noises[step] * np.asarray(numbers[name])
        chex.assert_trees_all_close(jax.device_get(params), weights, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_a_step_in_which_both_are_zero_keeps_every_bit() -> None:
    _, _, shrink, noise = schedules()
    optimizer, params = shrink_and_perturb(shrink, noise, seed=0), make_params()
    updates = jax.tree.map(jnp.sin, make_params(2))
    state = optimizer.init(params)
    acted = []
    update = jax.jit(optimizer.update)
    for count in range(STEPS):
        new, state = update(updates, state, params)
        leaves = zip(jax.tree.leaves(new), jax.tree.leaves(updates), strict=True)
        if any(np.asarray(a).tobytes() != np.asarray(b).tobytes() for a, b in leaves):
            acted.append(count)
    assert acted == [3, 20, 30, 40]


@pytest.mark.peers
def test_all_shrink_and_all_noise_is_a_fresh_start_whatever_the_step_was() -> None:
    optimizer = optax.chain(optax.adam(0.1), shrink_and_perturb(1.0, 1.0, seed=0, fresh=drawn))
    params = make_params()
    updates, _ = optimizer.update(make_params(1), optimizer.init(params), params)
    want = drawn(documented_key(0, 0, "", "shrink_and_perturb fresh"))
    chex.assert_trees_all_close(optax.apply_updates(params, updates), want, rtol=0, atol=1e-6)


# Statistics. Each bound is five standard errors, and the seeds are fixed.

SIZE = 200_000


@pytest.mark.parametrize("steps", [1, 10, slow(150)])
def test_without_gradients_mean_and_variance_are_those_of_an_autoregression(steps: int) -> None:
    shrink, noise, start = 0.05, 0.1, 2.0
    optimizer, params = shrink_and_perturb(shrink, noise, seed=1), jnp.full(SIZE, start)

    def step(carry: Any, _: Any) -> Any:
        weights, state = carry
        updates, state = optimizer.update(jnp.zeros_like(weights), state, weights)
        return (optax.apply_updates(weights, updates), state), None

    (weights, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=steps)
    found = np.asarray(weights, np.float64)
    kept = (1 - shrink) ** steps
    variance = noise**2 * (1 - kept**2) / (1 - (1 - shrink) ** 2)
    assert abs(found.mean() - kept * start) < 5 * np.sqrt(variance / SIZE)
    assert abs(found.var() / variance - 1) < 5 * np.sqrt(2 / SIZE)
    if steps > 100:  # Within 1e-6 of the limit in the docstring.
        assert abs(variance / (noise**2 / (1 - (1 - shrink) ** 2)) - 1) < 1e-6


def correlation(one: Any, other: Any) -> float:
    return float(np.abs(np.corrcoef(np.ravel(one), np.ravel(other))[0, 1]))


def test_parameters_layers_steps_and_seeds_draw_independently() -> None:
    params = {"a": jnp.zeros((2, SIZE)), "b": jnp.zeros((2, SIZE)), "deep": {"a": jnp.zeros((2, SIZE))}}
    noise = functools.partial(noise_of, params=params)
    first = noise(shrink_and_perturb(0.0, 1.0, seed=0))
    others = [
        (first["a"], first["b"]),
        (first["a"], first["deep"]["a"]),
        (first["a"][0], first["a"][1]),
        (first["a"], noise(shrink_and_perturb(0.0, 1.0, seed=0), count=1)["a"]),
        (first["a"], noise(shrink_and_perturb(0.0, 1.0, seed=1))["a"]),
    ]
    for one, other in others:
        assert correlation(one, other) < 5 / np.sqrt(np.size(one))


def test_the_noise_beside_stochastic_rounding_with_the_same_seed_is_independent_of_the_rounding() -> None:
    params = {"w": jnp.ones(SIZE, jnp.bfloat16)}
    noise = noise_of(shrink_and_perturb(0.0, 1.0, seed=0), params)["w"]
    writer = wdjax.stochastic_rounding(0)
    moves = {"w": jnp.full(SIZE, -(2.0**-9) / 2, jnp.float32)}
    rounding, _ = writer.update(moves, writer.init(params), params)
    assert correlation(noise.astype(jnp.float32), rounding["w"]) < 5 / np.sqrt(SIZE)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.complex128])
def test_complex_noise_has_a_mean_square_of_one(dtype: Any) -> None:
    noise = noise_of(shrink_and_perturb(0.0, 1.0, seed=0), jnp.ones(SIZE, dtype))
    assert noise.dtype == dtype
    square = np.abs(noise) ** 2  # Exponential: its variance is 1.
    assert abs(square.mean() - 1) < 5 / np.sqrt(SIZE)
    assert correlation(np.real(noise), np.imag(noise)) < 5 / np.sqrt(SIZE)


# The noise depends on nothing but seed, count, path and shape.


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float64])
def test_the_noise_is_that_of_the_documented_key(dtype: Any) -> None:
    params = make_params(dtype=dtype)
    found = noise_of(shrink_and_perturb(0.0, 1.0, seed=7), params, count=5)
    drawn_in = jnp.float64 if dtype == jnp.float64 else jnp.float32  # Narrower ones are rounded once.
    for name, shape in SHAPES.items():
        want = jax.random.normal(documented_key(7, 5, name), shape, drawn_in)
        assert_same_bits(found[name], want.astype(dtype))


def test_the_sum_of_both_parts_is_rounded_once() -> None:
    params, updates = make_params(dtype=jnp.bfloat16), make_params(1, jnp.bfloat16)
    optimizer = shrink_and_perturb(0.3, 0.1, seed=0)
    new, _ = jax.jit(optimizer.update)(updates, optimizer.init(params), params)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (params, updates))
    exact, _ = jax.jit(optimizer.update)(wide[1], optimizer.init(wide[0]), wide[0])
    for name in SHAPES:
        assert_same_bits(new[name], exact[name].astype(jnp.bfloat16))


def test_other_parameters_do_not_change_the_noise() -> None:
    params = make_params()
    optimizer = shrink_and_perturb(0.0, 1.0, seed=0)
    want = noise_of(optimizer, params)["kernel"]
    only_kernel = shrink_and_perturb(0.0, 1.0, wdjax.only("kernel"), seed=0)
    others = {
        "more": noise_of(optimizer, {**params, "a": jnp.ones(3), "z": {"kernel": jnp.ones((8, 16))}}),
        "fewer": noise_of(optimizer, {"kernel": params["kernel"]}),
        "renamed": noise_of(optimizer, {"kernel": params["kernel"], "new": params["bias"]}),
        "masked": noise_of(only_kernel, params),
        "by path": noise_of(shrink_and_perturb(0.0, wdjax.by_path({"bias": 0.5}, default=1.0), seed=0), params),
        "hidden": noise_of(optax.masked(optimizer, {"kernel": True, "bias": False, "other": False}), params),
        "frozen": noise_of(wdjax.freeze(optimizer, wdjax.only("bias")), params),
        "partition": noise_of(
            optax.partition({"a": optimizer, "b": optax.sgd(0.1)}, {"kernel": "a", "bias": "b", "other": "b"}),
            params,
        ),
        "ordered": noise_of(optimizer, Model()),
    }
    for name, found in others.items():
        noise = found.kernel if name == "ordered" else found["kernel"]
        assert_same_bits(noise, want)
    assert not np.any(others["masked"]["bias"])


class Model(eqx.Module):
    """Its fields are in another order than the keys of a dict."""

    other: jax.Array = eqx.field(default_factory=lambda: jnp.ones((8, 16)))
    kernel: jax.Array = eqx.field(default_factory=lambda: jnp.ones((8, 16)))
    bias: jax.Array = eqx.field(default_factory=lambda: jnp.ones(8))


@pytest.mark.parametrize("partitionable", [True, False], ids=["partitionable", "not partitionable"])
@pytest.mark.parametrize("spec", [P("d"), slow(P(None, "d")), P()], ids=["rows", "columns", "replicated"])
def test_eight_devices_draw_the_numbers_of_one_without_a_collective(spec: Any, partitionable: bool) -> None:
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    optimizer = shrink_and_perturb(0.1, 0.5, seed=0)
    one, moves = (jnp.asarray(np.random.default_rng(n).normal(size=(64, 32)), jnp.float32) for n in range(2))
    many, many_moves = jax.device_put((one, moves), NamedSharding(mesh, spec))
    with jax.threefry_partitionable(partitionable):
        step = jax.jit(lambda u, s, p: optimizer.update(u, s, p))
        state, many_state = optimizer.init(one), optimizer.init(many)
        for _ in range(3):
            new, state = step(moves, state, one)
            many_new, many_state = step(many_moves, many_state, many)
            np.testing.assert_allclose(new, many_new, rtol=0, atol=3e-7)
            assert many_new.sharding.is_equivalent_to(many.sharding, 2)
        compiled = step.lower(many_moves, many_state, many).compile().as_text()
    if partitionable:
        assert not re.search(r"all-(gather|reduce|to-all)|collective-|reduce-scatter", compiled)
        assert spec == P() or "[64,32]" not in compiled  # A device draws the numbers of its part only.


def test_an_explicit_mesh_and_replicas_of_pmap_draw_the_same() -> None:
    params, optimizer = make_params(), shrink_and_perturb(0.1, 0.5, seed=0)
    want, _ = jax.jit(optimizer.update)(params, optimizer.init(params), params)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        split = jax.device_put(params, NamedSharding(mesh, P("d")))
        for run in (jax.jit(optimizer.update), optimizer.update):
            found, _ = run(split, optimizer.init(split), split)
            assert all(leaf.sharding.spec[0] == "d" for leaf in jax.tree.leaves(found))
            chex.assert_trees_all_close(jax.device_get(found), want, rtol=0, atol=3e-7)
    stacked = jax.tree.map(lambda x: np.stack([np.asarray(x)] * 8), (params, optimizer.init(params)))
    replicas, _ = jax.device_get(jax.pmap(lambda p, s: optimizer.update(p, s, p))(*stacked))
    for replica in range(8):
        chex.assert_trees_all_equal(*(jax.tree.map(lambda x, r=r: x[r], replicas) for r in (0, replica)))
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[0], replicas), want, rtol=0, atol=3e-7)


def test_within_shard_map_parts_differ_and_whole_arrays_agree() -> None:
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    params = {"part": jnp.ones((4, 8)), "both": jnp.ones((2, 4)), "whole": jnp.ones((4, 8))}
    specs = {"part": P(None, "model"), "both": P("data", "model"), "whole": P()}
    optimizer = shrink_and_perturb(0.0, 1.0, seed=0)

    def act(params: Any) -> Any:
        return optimizer.update(still(params), optimizer.init(params), params)[0]

    found = jax.jit(jax.shard_map(act, mesh=mesh, in_specs=(specs,), out_specs=specs))(params)
    assert len(np.unique(np.reshape(found["part"], (4, 4, 2)).swapaxes(0, 1).reshape(4, 8), axis=0)) == 4
    assert len(np.unique(found["both"])) == 8
    chex.assert_trees_all_close(found["whole"], noise_of(optimizer, params)["whole"], rtol=0, atol=3e-7)


@pytest.mark.parametrize("seed", [-1, 2**32 + 5, 2**70])
def test_the_numbers_of_a_seed_do_not_depend_on_the_x64_flag(seed: int) -> None:
    found = []
    for enabled in (False, True):
        with jax.enable_x64(enabled):
            found.append(np.asarray(jax.random.key_data(draws.keys("a", seed, jnp.int32(3), ["w"])[0])))
            same = draws.keys("a", jnp.uint32(seed % 2**32), jnp.int32(3), ["w"])[0]
            np.testing.assert_array_equal(found[-1], jax.random.key_data(same))
    np.testing.assert_array_equal(*found)


def test_seeds_may_be_traced_mapped_and_injected() -> None:
    params = make_params()

    def noise(seed: Any) -> Any:
        return noise_of(shrink_and_perturb(0.0, 1.0, seed=seed), params)

    together = jax.vmap(noise)(jnp.arange(3))
    for seed in range(3):
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=seed: x[i], together), noise(seed), rtol=0, atol=3e-7)
    injected = optax.inject_hyperparams(shrink_and_perturb)(shrink=0.0, noise=1.0, seed=1)
    found, _ = injected.update(still(params), injected.init(params), params)
    chex.assert_trees_all_close(found, noise(1), rtol=0, atol=3e-7)
    given = optax.inject_hyperparams(shrink_and_perturb, static_args=("fresh",))(0.0, 1.0, seed=1, fresh=drawn)
    found, _ = given.update(still(params), given.init(params), params)
    want = drawn(documented_key(1, 0, "", "shrink_and_perturb fresh"))
    chex.assert_trees_all_close(found, want, rtol=0, atol=3e-7)


@pytest.mark.peers
def test_a_run_that_is_resumed_goes_on_with_the_same_numbers() -> None:
    def run(params: Any, state: Any, steps: int) -> Any:
        optimizer = optax.chain(optax.adam(0.1), shrink_and_perturb(0.1, 0.1, seed=0))
        state = optimizer.init(params) if state is None else state
        step = jax.jit(lambda p, s: optimizer.update(p, s, p))
        for _ in range(steps):
            updates, state = step(params, state)
            params = optax.apply_updates(params, updates)
        return params, state

    params, state = run(make_params(), None, 2)
    saved = jax.tree.map(np.asarray, (params, state))
    chex.assert_trees_all_equal(run(*saved, 2), run(params, state, 2), run(make_params(), None, 4))


# Derivatives, wrappers, and fresh weights of models.


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("at", [(0.3, 0.7), (0.0, 0.0)], ids=["on", "off"])
def test_derivatives_with_respect_to_both_rates(at: tuple[float, float]) -> None:
    params, updates = make_params(dtype=jnp.float64), make_params(1, jnp.float64)

    def total(shrink: Any, noise: Any) -> Any:
        optimizer = shrink_and_perturb(shrink, noise, seed=0)
        new, _ = optimizer.update(updates, optimizer.init(params), params)
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(new))

    found = jax.jit(jax.grad(total, (0, 1)))(*map(jnp.asarray, at))
    landed = sum(np.sum(leaf) for leaf in jax.tree.leaves((params, updates)))
    noise = sum(np.sum(leaf) for leaf in jax.tree.leaves(noise_of(shrink_and_perturb(0.0, 1.0, seed=0), params)))
    np.testing.assert_allclose(found, (-landed, noise), rtol=1e-12)


def test_every_k_steps_by_optax_draws_anew_each_time_and_does_nothing_between() -> None:
    every = optax.conditionally_transform(
        shrink_and_perturb(0.5, 1.0, seed=0), lambda step: step % 3 == 2, forward_extra_args=True
    )
    params = make_params()
    state, seen = every.init(params), []
    step = jax.jit(every.update)
    for count in range(6):
        new, state = step(still(params), state, params)
        if count % 3 != 2:
            chex.assert_trees_all_equal(new, still(params))
        else:
            seen.append(new["kernel"] + 0.5 * params["kernel"])
    for n, found in enumerate(seen):
        want = noise_of(shrink_and_perturb(0.0, 1.0, seed=0), params, count=n)["kernel"]
        np.testing.assert_allclose(found, want, rtol=0, atol=1e-6)
    compiled = step.lower(still(params), state, params).compile().as_text()
    assert "conditional(" in compiled


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return linen.Dense(3)(linen.LayerNorm()(x))


def test_fresh_weights_of_linen_nnx_and_equinox() -> None:
    x = jnp.ones((2, 4))
    of_linen = lambda key: Linen().init(key, x)["params"]  # noqa: E731
    of_nnx = lambda key: nnx.state(nnx.Linear(4, 3, rngs=nnx.Rngs(key)), nnx.Param)  # noqa: E731
    of_equinox = lambda key: eqx.filter(eqx.nn.Linear(4, 3, key=key), eqx.is_inexact_array)  # noqa: E731
    for fresh in (of_linen, of_nnx, of_equinox):
        params = fresh(jax.random.key(5))
        reset = shrink_and_perturb(1.0, 1.0, seed=0, fresh=fresh)
        updates, _ = jax.jit(reset.update)(still(params), reset.init(params), params)
        want = fresh(documented_key(0, 0, "", "shrink_and_perturb fresh"))
        chex.assert_trees_all_close(
            jax.tree.leaves(optax.apply_updates(params, updates)), jax.tree.leaves(want), rtol=0, atol=1e-6
        )


def test_fresh_weights_need_cover_only_what_gets_noise_and_are_not_drawn_without() -> None:
    params = make_params()
    part = lambda key: {"kernel": jnp.ones((8, 16))}  # noqa: E731
    kernel = wdjax.only("kernel")
    for optimizer in (
        shrink_and_perturb(0.5, 1.0, kernel, seed=0, fresh=part),
        shrink_and_perturb(0.5, wdjax.by_path({"kernel": 1.0}, default=0.0), seed=0, fresh=part),
        optax.masked(shrink_and_perturb(0.5, 1.0, seed=0, fresh=drawn), kernel.mask),
    ):
        optimizer.update(still(params), optimizer.init(params), params)

    def never(key: jax.Array) -> Any:
        raise AssertionError

    optimizer = shrink_and_perturb(0.5, 0.0, seed=0, fresh=never)
    optimizer.update(still(params), optimizer.init(params), params)


def test_the_first_fresh_weights_are_not_those_of_a_key_split_from_the_same_seed() -> None:
    params = drawn(jax.random.split(jax.random.key(0))[0])
    fresh = noise_of(shrink_and_perturb(0.0, 1.0, seed=0, fresh=drawn), params)
    assert not np.array_equal(params["kernel"], fresh["kernel"])


@pytest.mark.peers
def test_adams_moments_stay() -> None:
    params = make_params()
    plain, noisy = optax.adam(0.1), optax.chain(optax.adam(0.1), shrink_and_perturb(0.5, 1.0, seed=0))
    _, want = plain.update(params, plain.init(params), params)
    _, found = noisy.update(params, noisy.init(params), params)
    chex.assert_trees_all_equal(found[0], want)


# What it says.


def test_what_is_refused() -> None:
    params = make_params()
    build = functools.partial(shrink_and_perturb, 0.1, 0.1)
    for seed in (0.5, True, "0", None, jnp.zeros(2, jnp.int32)):
        with pytest.raises(
            TypeError, match=r"seed must be an integer, got .* Write shrink_and_perturb\(\.\.\., seed=0\)"
        ):
            build(seed=seed)
    with pytest.raises(TypeError, match=r"got a key, key<fry>\[\]"):
        build(seed=jax.random.key(0))
    with pytest.raises(TypeError, match=r"got float32\[\]"):
        build(seed=jnp.array(1.0))
    with pytest.raises(TypeError, match="missing a required argument: 'seed'"):
        build()
    for shrink in (1.5, np.float32(1.5), np.array(1.5), jnp.array(1.5)):
        with pytest.raises(ValueError, match=r"at most 1, got .*Where shrinkage is the factor that is kept"):
            shrink_and_perturb(shrink, 0.1, seed=0)
    with pytest.raises(ValueError, match=r"noise must be finite and not negative, got -0\.1"):
        shrink_and_perturb(0.1, -0.1, seed=0)
    with pytest.raises(TypeError, match="a mask was given as noise"):
        shrink_and_perturb(0.1, wdjax.only("kernel"), seed=0)
    with pytest.raises(TypeError, match="fresh must be a function from a key to a tree like params"):
        build(seed=0, fresh=params)
    with pytest.raises(ValueError, match="shrink_and_perturb needs the parameters"):
        build(seed=0).update(params, build(seed=0).init(params))
    with pytest.raises(ValueError, match="kernle"):
        shrink_and_perturb(0.1, wdjax.by_path({"kernle": 0.1}, default=0.0), seed=0).init(params)
    wrong = {
        "nothing": {"bias": jnp.ones(8), "other": jnp.ones((8, 16))},
        r"float32\[16, 8\]": {**params, "kernel": jnp.ones((16, 8))},
        r"complex64\[8, 16\]": {**params, "kernel": jnp.ones((8, 16), jnp.complex64)},
        r"int32\[8, 16\]": {**params, "kernel": jnp.ones((8, 16), jnp.int32)},
    }
    for said, fresh in wrong.items():
        optimizer = build(seed=0, fresh=lambda key, fresh=fresh: fresh)
        with pytest.raises(ValueError, match=rf"at 'kernel' it has {said}, and params have float32\[8, 16\]"):
            optimizer.update(params, optimizer.init(params), params)


def test_in_bfloat16_noise_keeps_a_shrink_that_alone_would_round_to_nothing() -> None:
    params = jnp.ones(SIZE, jnp.bfloat16)
    optimizer = shrink_and_perturb(1e-3, 0.02, seed=0)
    updates, _ = optimizer.update(jnp.zeros_like(params), optimizer.init(params), params)  # It does not warn.
    moved = np.asarray(optax.apply_updates(params, updates), np.float64) - 1
    assert abs(moved.mean() + 1e-3) < 5 * moved.std() / np.sqrt(SIZE) < 3e-4


def test_a_shrink_of_one_does_not_warn() -> None:
    shrink_and_perturb(1.0, 1.0, seed=0, fresh=drawn).init(make_params())
