"""Selective projection decay: AdamSPD in NumPy, when it acts, and how far it leads back."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from optax import contrib
from slow import slow_but

import wdjax
from wdjax.wrappers import with_selective_decay

pytestmark = pytest.mark.peers  # Optax's bias correction.

STEPS, LR = 100, 0.05
SHAPES = {"w": (4, 3), "b": (3,)}


def make_params(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {key: rng.normal(size=shape) for key, shape in SHAPES.items()}


def make_grads() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {key: rng.normal(size=(STEPS, *shape)) + 0.3 for key, shape in SHAPES.items()}


def adam_spd(strength: float, anchors: dict[str, Any], decayed: tuple[str, ...] = ("w", "b")) -> tuple[Any, int]:
    """AdamSPD in NumPy: the parameters after each step, and in how many cases it changed the step."""
    params, grads, acted = make_params(), make_grads(), 0
    path: dict[str, list[np.ndarray]] = {key: [] for key in SHAPES}
    for key, shape in SHAPES.items():
        first, second, w = np.zeros(shape), np.zeros(shape), params[key]
        for t in range(STEPS):
            g = grads[key][t]
            first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
            new = w - LR * first / (1 - 0.9 ** (t + 1)) / (np.sqrt(second / (1 - 0.999 ** (t + 1))) + 1e-8)
            before, after = (np.sqrt(np.sum((x - anchors[key]) ** 2)) for x in (w, new))
            if key in decayed and np.sum(g * (w - anchors[key])) > 0 and after > before:
                new, acted = new - strength * (1 - before / after) * (new - anchors[key]), acted + 1
            w = new
            path[key].append(w)
    return {key: np.stack(steps) for key, steps in path.items()}, acted


def walked(optimizer: Any, grads: Any, params: Any) -> Any:
    """The parameters after each step."""

    def step(carry: Any, grad: Any) -> Any:
        params, state = carry
        updates, state = optimizer.update(grad, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    params, grads = jax.tree.map(jnp.asarray, (params, grads))
    return jax.jit(lambda carry: jax.lax.scan(step, carry, grads)[1])((params, optimizer.init(params)))


ZERO = {"w": 0.0, "b": 0.0}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("strength", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("toward", ["init", None])
def test_adam_spd_in_numpy(strength: float, toward: Any) -> None:
    want, acted = adam_spd(strength, make_params() if toward else ZERO)
    assert 20 < acted < 100
    got = walked(with_selective_decay(optax.adam(LR), strength, toward=toward), make_grads(), make_params())
    chex.assert_trees_all_close(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.usefixtures("x64")
def test_strengths_masks_and_anchors_by_path() -> None:
    strengths = wdjax.by_path({"w": lambda count: 0.5, "b": 0.0})
    want, _ = adam_spd(0.5, make_params(), ("w",))
    for optimizer in (
        with_selective_decay(optax.adam(LR), strengths),
        with_selective_decay(optax.adam(LR), 0.5, wdjax.only("w")),
        with_selective_decay(optax.adam(LR), 0.5, wdjax.only("w"), toward=make_params()),
        with_selective_decay(optax.adam(LR), strengths, toward=wdjax.by_path({"w": "init"}, default=0.0)),
    ):
        got = walked(optimizer, make_grads(), make_params())
        chex.assert_trees_all_close(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_a_strength_of_one_keeps_the_distance_and_elsewhere_every_bit_is_kept(dtype: Any) -> None:
    ours, plain = with_selective_decay(optax.adam(LR), 1.0), optax.adam(LR)
    params = jax.tree.map(lambda p: jnp.asarray(p, dtype), make_params())
    anchors, state, counts = params, ours.init(params), [0, 0]
    for t in range(STEPS):
        grads = {key: jnp.asarray(g[t], dtype) for key, g in make_grads().items()}
        bare, _ = jax.jit(plain.update)(grads, state.inner_state, params)
        updates, state = jax.jit(ours.update)(grads, state, params)
        new = optax.apply_updates(params, updates)
        for key in SHAPES:
            before, after, alone = (
                np.asarray(x[key], np.float64) - np.asarray(anchors[key], np.float64)
                for x in (params, new, optax.apply_updates(params, bare))
            )
            has_grown = np.linalg.norm(alone) > np.linalg.norm(before) * (1 + 1e-6)
            product = np.sum(np.asarray(grads[key], np.float64) * before)
            if product > 0 and has_grown:
                counts[0] += 1
                limit = 2e-6 if dtype == jnp.float32 else 2e-2
                np.testing.assert_allclose(np.linalg.norm(after), np.linalg.norm(before), rtol=limit)
            elif product <= 0:
                counts[1] += 1
                np.testing.assert_array_equal(updates[key], bare[key])
        params = new
    assert min(counts) > 20


def opposed(scale: float) -> tuple[Any, Any, Any]:
    """A gradient that points from the anchor to the weights, and a step that leads on from 2 to 3 times `scale`."""
    step = optax.GradientTransformation(
        lambda params: (), lambda updates, state, params=None: (jax.tree.map(lambda p: p / 2, params), state)
    )
    params = {"w": jnp.full((4,), 2 * scale, jnp.float32)}
    return step, {"w": jnp.full((4,), scale, jnp.float32)}, params


@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1e-10, 1.0, 1e10, 1e30, 1e36])
def test_norms_and_products_neither_overflow_nor_underflow(scale: float) -> None:
    step, grads, params = opposed(scale)
    optimizer = with_selective_decay(step, 0.5, toward=None)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    # 3 - 0.5 * (1 - 2 / 3) * 3 - 2
    np.testing.assert_allclose(np.asarray(updates["w"], np.float64) / scale, 0.5, rtol=1e-5)


def test_weights_on_their_anchor_and_steps_onto_it_are_finite() -> None:
    for start, step in ((0.0, 0.0), (0.0, 1.0), (1.0, -1.0)):
        params, grads = {"w": jnp.full(3, start)}, {"w": jnp.full(3, 2.0)}
        moves = optax.stateless(lambda u, p, step=step: {"w": jnp.full(3, step)})
        optimizer = with_selective_decay(moves, 1.0, toward=None)
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        np.testing.assert_array_equal(updates["w"], step)


def test_a_step_that_is_not_finite_stays_as_it_is() -> None:
    params, grads = {"w": jnp.ones(3)}, {"w": jnp.ones(3)}
    for bad in (np.inf, np.nan):
        moved = jnp.array([1.0, bad, 2.0])
        moves = optax.stateless(lambda u, p, moved=moved: {"w": moved})
        optimizer = with_selective_decay(moves, 1.0, toward=None)
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        np.testing.assert_array_equal(updates["w"], moved)


@pytest.mark.usefixtures("x64")
def test_each_layer_of_a_stack_is_an_array_of_its_own() -> None:
    params, grads = make_params()["w"], make_grads()["w"]
    want = np.stack(
        [walked(with_selective_decay(optax.adam(LR), 1.0), grads[:, i], params[i]) for i in range(4)], axis=1
    )
    one, _ = adam_spd(1.0, make_params())
    assert np.max(np.abs(one["w"] - want)) > 0.01
    got = walked(with_selective_decay(optax.adam(LR), 1.0, stacked_axes=1), grads, params)
    np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("check_vma", [True, False], ids=["checked", "unchecked"])
def test_within_shard_map_norms_and_products_are_those_of_whole_arrays(check_vma: bool) -> None:
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4], axis_types=(AxisType.Auto,))
    optimizer = with_selective_decay(optax.adam(LR), 1.0, toward=None, axis_name="data")
    split, grads = {"w": P("data")}, {"w": make_grads()["w"]}

    def run(grads: Any, params: Any) -> Any:
        return walked(optimizer, grads, params)

    of_steps = {"w": P(None, "data")}
    several = jax.jit(
        jax.shard_map(run, mesh=mesh, in_specs=(of_steps, split), out_specs=of_steps, check_vma=check_vma)
    )
    want, _ = adam_spd(1.0, ZERO)
    got = several(jax.tree.map(jnp.asarray, grads), {"w": jnp.asarray(make_params()["w"])})
    chex.assert_trees_all_close(got["w"], want["w"], rtol=1e-11, atol=1e-12)


def test_sharded_arrays_take_one_all_reduce_together() -> None:
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4], axis_types=(AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, P("data"))
    params = {key: jax.device_put(jnp.ones((4, 3)), split) for key in "abc"}
    optimizer = with_selective_decay(optax.adam(LR), 1.0)
    state = optimizer.init(params)
    text = jax.jit(optimizer.update).lower(params, state, params).compile().as_text()
    assert text is not None
    assert text.count(" all-reduce(") == 1
    assert "all-gather" not in text


@pytest.mark.usefixtures("x64")
def test_multi_steps_around_it_gives_it_the_gradient_of_the_whole_step() -> None:
    halves = {key: np.repeat(g, 2, axis=0) for key, g in make_grads().items()}
    noise = {
        key: np.where(np.arange(2 * STEPS).reshape(-1, *[1] * (g.ndim - 1)) % 2, 5.0, -5.0) for key, g in halves.items()
    }
    grads = {key: halves[key] + noise[key] for key in halves}
    optimizer = optax.MultiSteps(with_selective_decay(optax.adam(LR), 1.0), 2).gradient_transformation()
    got = walked(optimizer, grads, make_params())
    want, _ = adam_spd(1.0, make_params())
    chex.assert_trees_all_close({key: path[1::2] for key, path in got.items()}, want, rtol=1e-5, atol=1e-6)


SKIPS = {
    "MultiSteps": optax.MultiSteps(optax.adam(LR), 2),
    "apply_if_finite": optax.apply_if_finite(optax.adam(LR), 2),
    "schedule_free": contrib.schedule_free_sgd(LR),
}
UNDOES = {
    "lookahead": contrib.sam(optax.sgd(LR), optax.sgd(0.01)),
    "mechanize": contrib.mechanize(optax.sgd(LR)),
    "cocob": contrib.cocob(),
    "backtracking": optax.chain(optax.sgd(LR), optax.scale_by_backtracking_linesearch(5)),
    "apply_every": optax.chain(optax.sgd(LR), optax.apply_every(2)),
}


@pytest.mark.parametrize("name", slow_but([*SKIPS, *UNDOES], "MultiSteps", "lookahead"))
def test_an_optimizer_whose_steps_are_not_its_own_is_refused(name: str) -> None:
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), make_params())
    if name in SKIPS:
        words = r"^with_selective_decay: .*holds the state \w+State, whose steps are not.* optax\.MultiSteps\("
    else:
        words = (
            r"^with_selective_decay: the optimizer holds .*, .*\. Wrap the optimizer inside, or another one: with_sel"
        )
    with pytest.raises(ValueError, match=words):
        with_selective_decay((SKIPS | UNDOES)[name], 1.0).init(params)


def test_an_optimizer_that_estimates_its_steps_is_fine() -> None:
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), make_params())
    optimizer = with_selective_decay(contrib.prodigy(1.0), 1.0)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    assert all(np.all(np.isfinite(u)) for u in jax.tree.leaves(updates))


def test_a_strength_or_a_mask_that_differs_within_an_array_is_refused() -> None:
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), make_params())
    grads = jax.tree.map(jnp.ones_like, params)
    uneven = with_selective_decay(optax.adam(LR), wdjax.by_path({"b": np.array([0.1, 0.2, 0.3])}, default=1.0))
    with pytest.raises(
        ValueError, match=r"a strength or mask of shape \(3,\) differs within an array.*select whole arrays"
    ):
        uneven.update(grads, uneven.init(params), params)
    part = with_selective_decay(optax.adam(LR), 1.0, {"w": True, "b": np.array([True, False, True])})
    with pytest.raises(ValueError, match=r"a strength or mask of shape \(3,\) differs within an array"):
        part.update(grads, part.init(params), params)


def test_what_is_no_optimizer_or_strength_is_refused() -> None:
    with pytest.raises(
        TypeError, match=r"^with_selective_decay: optimizer must be .*with_selective_decay\(optax\.adam"
    ):
        with_selective_decay(1.0, 1.0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"^with_selective_decay: strength must be finite and not negative, got -1"):
        with_selective_decay(optax.adam(LR), -1.0)
    with pytest.raises(TypeError, match=r"Did you mean strength=\.\.\.\?"):
        with_selective_decay(optax.adam(LR), weight_decay=0.1)  # pyright: ignore[reportCallIssue]


def test_on_an_explicit_mesh_it_is_the_same() -> None:
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4], axis_types=(AxisType.Explicit,))
    params, grads = {"w": jnp.asarray(make_params()["w"])}, {"w": jnp.asarray(make_grads()["w"][:5])}
    optimizer = with_selective_decay(optax.adam(LR), 1.0)
    want = walked(optimizer, grads, params)
    with jax.set_mesh(mesh):
        split = {"w": jax.device_put(params["w"], jax.sharding.NamedSharding(mesh, P("data")))}
        of_steps = {"w": jax.device_put(grads["w"], jax.sharding.NamedSharding(mesh, P(None, "data")))}
        got = walked(optimizer, of_steps, split)
        assert jax.typeof(got["w"]).sharding.spec == P(None, "data", None)
    chex.assert_trees_all_close(jax.device_get(got), jax.device_get(want), rtol=1e-5)
