"""Weight norm control: its formula over many steps, its closed form, its limits, and the radius "init"."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_contract import assert_same_bits

import wdjax
from wdjax import independent_decay, rates
from wdjax.in_update import weight_norm_control

STEPS = 60
GROUPS = [({}, (0, 1, 2)), ({"per": -1}, (0, 1)), ({"per": (0, -1)}, (1,)), ({"axis": 0}, (0,))]


def make(seed: int, dtype: Any = np.float64) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {"conv": jnp.asarray(rng.normal(size=(3, 2, 4)), dtype), "bias": jnp.asarray(rng.normal(size=4), dtype)}


def new_updates(optimizer: Any, updates: Any, params: Any) -> Any:
    return jax.jit(optimizer.update)(updates, optimizer.init(params), params)[0]


def trained(optimizer: Any, params: Any, grads: Any, steps: int = STEPS) -> Any:
    def step(carry: Any, count: Any) -> Any:
        params, state = carry
        updates, state = optimizer.update(grads(params, count), state, params)
        return (optax.apply_updates(params, updates), state), None

    counts = jnp.arange(steps)
    return jax.jit(lambda carry: jax.lax.scan(step, carry, counts)[0][0])((params, optimizer.init(params)))


def norm(x: np.ndarray, axes: Any) -> np.ndarray:
    return np.sqrt((x**2).sum(axes, keepdims=True))


def grads_of(w: Any, count: Any) -> Any:
    return jax.tree.map(lambda p: jnp.sin(3 * p) + jnp.cos(jnp.asarray(count, p.dtype)), w)


def adam_in_numpy(w: np.ndarray, lr: float, after: Any) -> np.ndarray:
    """Adam for many steps; `after` takes the weights before a step and the step count, and returns a further term."""
    m, v = np.zeros_like(w), np.zeros_like(w)
    for count in range(STEPS):
        g = np.sin(3 * w) + np.cos(count)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        d = (m / (1 - 0.9 ** (count + 1))) / (np.sqrt(v / (1 - 0.999 ** (count + 1))) + 1e-8)
        w = w - lr * d + after(w, count)
    return w


def ratio_of(count: Any) -> Any:
    return 1.0 + 0.02 * jnp.asarray(count, jnp.float64)


@pytest.mark.peers
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("groups", "axes"), GROUPS)
@pytest.mark.parametrize("radius", ["init", 3.0])
def test_the_formula_behind_adam_for_sixty_steps(groups: Any, axes: Any, radius: Any) -> None:
    params, k = make(0), lambda count: 0.1 / (1.0 + jnp.asarray(count, jnp.float64))
    control = weight_norm_control(k, radius, wdjax.only("conv"), ratio=ratio_of, **groups)
    got = trained(optax.chain(optax.adam(0.05), control), params, grads_of)
    start = np.asarray(params["conv"])
    target = norm(start, axes) if radius == "init" else radius

    def controlled(w: np.ndarray, count: int) -> np.ndarray:
        return -0.1 / (1 + count) * (1 - (1 + 0.02 * count) * target / norm(w, axes)) * w

    np.testing.assert_allclose(got["conv"], adam_in_numpy(start, 0.05, controlled), rtol=0, atol=1e-13)
    bias = adam_in_numpy(np.asarray(params["bias"]), 0.05, lambda w, count: 0.0)
    np.testing.assert_allclose(got["bias"], bias, rtol=0, atol=1e-13)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("groups", "axes"), GROUPS)
@pytest.mark.parametrize("k", [0.1, 1.0, 1.5])
def test_with_zero_gradient_the_distance_to_the_radius_shrinks_and_the_direction_stays(
    groups: Any, axes: Any, k: float
) -> None:
    params, radius = make(0), 3.0
    control = weight_norm_control(k, radius, wdjax.only("conv"), **groups)
    start = np.asarray(params["conv"])
    for steps in (1, 20):
        got = np.asarray(trained(control, params, lambda p, _: jax.tree.map(jnp.zeros_like, p), steps)["conv"])
        want = radius + (norm(start, axes) - radius) * (1 - k) ** steps
        np.testing.assert_allclose(got, start / norm(start, axes) * want, rtol=1e-13)


@pytest.mark.usefixtures("x64")
def test_the_term_is_a_gradient_and_l2_toward_the_nearest_point_of_the_sphere() -> None:
    w, u, k, radius = make(0)["conv"], make(1)["conv"], 0.3, 3.0
    new = new_updates(weight_norm_control(k, radius, per=-1), u, w)
    penalty = lambda w: jnp.sum((jnp.linalg.norm(w.reshape(-1, 4), axis=0) - radius) ** 2) / 2  # noqa: E731
    np.testing.assert_allclose(new, u - k * jax.grad(penalty)(w), rtol=1e-13)
    nearest = wdjax.L2Sphere(per=-1).project(w, radius)
    np.testing.assert_allclose(new, new_updates(independent_decay(k, toward=nearest), u, w), rtol=1e-13)


def with_zeros(dtype: Any) -> Any:
    params = jax.tree.map(lambda p: p.at[0].set(-0.0), make(0, dtype))
    return params, jax.tree.map(lambda p: p.at[1].set(-0.0), make(1, dtype))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("run", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize(
    "target",
    [{"radius": 0.0}, {"ratio": 0.0}, {"radius": lambda count: jnp.zeros([])}, {"ratio": jnp.zeros([])}],
    ids=["radius", "ratio", "scheduled radius", "array"],
)
def test_a_radius_of_zero_is_independent_decay_bit_for_bit(dtype: Any, run: Any, target: Any) -> None:
    params, updates = with_zeros(dtype)
    for rate in (0.1, lambda count: jnp.asarray(0.1, jnp.float32), {"conv": np.full((3, 1, 1), 0.1), "bias": 0.0}):
        if isinstance(rate, dict) and not any(isinstance(value, float) for value in target.values()):
            continue  # A target that may move must not differ within a group.
        ours, theirs = weight_norm_control(rate, **target), independent_decay(rate)
        got, _ = run(ours.update)(updates, ours.init(params), params)
        want, _ = run(theirs.update)(updates, theirs.init(params), params)
        assert_same_bits(got, want)


@pytest.mark.usefixtures("x64")
def test_a_rate_of_one_moves_the_weights_onto_the_sphere_and_adds_the_update() -> None:
    w, u = make(0)["conv"], 1e-4 * make(1)["conv"]
    onto = weight_norm_control(1.0, 2.0)
    np.testing.assert_allclose(w + new_updates(onto, u, w), wdjax.L2Sphere().project(w, 2.0) + u, rtol=1e-13)
    # The constraint differs from it by what it removes of the update, its radial part.
    constrained = w + new_updates(wdjax.constrain(wdjax.L2Sphere(), "init"), u, w)
    difference = np.asarray(w + new_updates(weight_norm_control(1.0), u, w) - constrained)
    radial = np.asarray(np.sum(u * w) / np.sum(w * w) * w)
    np.testing.assert_allclose(difference, radial, atol=1e-7)


def test_weights_of_zero_keep_their_update_and_no_derivative_is_nan() -> None:
    zeros, ones = jnp.zeros(3), jnp.ones(3)
    for radius in (2.0, 0.0, jnp.asarray(2.0)):
        assert_same_bits(new_updates(weight_norm_control(0.1, radius), -zeros, zeros), -zeros)
        assert_same_bits(new_updates(weight_norm_control(0.1, radius), ones, zeros), ones)

    def total(u: Any, p: Any, k: Any, radius: Any) -> Any:
        control = weight_norm_control(k, radius)
        return jnp.sum(jnp.sin(control.update(u, control.init(p), p)[0]))

    for k in (jnp.asarray(0.0), jnp.asarray(0.1)):
        for u, p in ((zeros, ones), (ones, zeros), (zeros, zeros)):
            slopes = jax.grad(total, (0, 1, 2, 3))(u, p, k, jnp.asarray(2.0))
            assert all(np.all(np.isfinite(slope)) for slope in slopes)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_norms_whose_squares_underflow_or_overflow(scale: float) -> None:
    w = make(0)["conv"]
    got = new_updates(weight_norm_control(0.1, 3.0 * scale), jnp.zeros_like(w), scale * w)
    want = new_updates(weight_norm_control(0.1, 3.0), jnp.zeros_like(w), w)
    np.testing.assert_allclose(got, scale * want, rtol=1e-13)


def test_weights_near_the_largest_number_have_a_direction() -> None:
    w = jnp.array([1e38, 1e38])
    np.testing.assert_allclose(new_updates(weight_norm_control(0.1, "init"), jnp.zeros(2), w), 0, atol=1e32)
    onto = wdjax.on_weights.constrain(wdjax.constraints.L2Sphere(), "init")
    np.testing.assert_allclose(new_updates(onto, jnp.zeros(2), w), 0, atol=1e32)


@pytest.mark.usefixtures("x64")
def test_the_derivative_with_respect_to_the_rate_and_the_radius() -> None:
    w, u = make(0)["conv"], make(1)["conv"]

    def new(k: Any, radius: Any) -> Any:
        return weight_norm_control(k, radius).update(u, weight_norm_control(k, radius).init(w), w)[0]

    of_rate, of_radius = jax.jacobian(new, (0, 1))(0.0, 3.0)
    size = np.linalg.norm(w)
    np.testing.assert_allclose(of_rate, -(1 - 3.0 / size) * w, rtol=1e-13)
    np.testing.assert_allclose(jax.jacobian(new, 1)(0.2, 3.0), 0.2 * w / size, rtol=1e-13)
    assert not np.any(of_radius)
    many = jax.vmap(new, (0, None))(jnp.array([0.0, 0.1]), 3.0)
    np.testing.assert_allclose(many, jnp.stack([new(0.0, 3.0), new(0.1, 3.0)]), rtol=1e-13)


def test_in_bfloat16_nothing_is_rounded_between_the_two_terms() -> None:
    params, updates = make(0, jnp.bfloat16), jax.tree.map(lambda u: u / 1000, make(1, jnp.bfloat16))
    got = new_updates(weight_norm_control(0.5), updates, params)
    for name, update in updates.items():  # On the sphere the terms cancel.
        np.testing.assert_allclose(*(np.asarray(x, np.float64) for x in (got[name], update)), rtol=2**-8, atol=2e-7)


# The radius "init".


@pytest.mark.usefixtures("x64")
def test_the_norm_at_init_is_kept_for_each_group_and_each_layer() -> None:
    layers, moves = ([make(10 * seed + i)["conv"] for i in range(3)] for seed in (1, 2))
    for groups in ({}, {"per": -1}):
        stack = weight_norm_control(0.1, stacked_axes=1, **groups)
        state = stack.init(jnp.stack(layers))
        now = [1.5 * p + 0.1 for p in layers]
        got, after = jax.jit(stack.update)(jnp.stack(moves), state, jnp.stack(now))
        chex.assert_trees_all_equal(after.leaf, state.leaf)
        one = weight_norm_control(0.1, **groups)
        want = [one.update(u, one.init(p), q)[0] for u, p, q in zip(moves, layers, now, strict=True)]
        np.testing.assert_allclose(got, jnp.stack(want), rtol=1e-13)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("radius", ["init", 3.0])
def test_within_shard_map_and_under_explicit_meshes(radius: Any) -> None:
    params, now, updates = (jnp.asarray(np.random.default_rng(seed).normal(size=(16, 3))) for seed in (0, 1, 2))
    whole = weight_norm_control(0.1, radius, ratio=0.7)
    want, _ = whole.update(updates, whole.init(params), now)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    part = weight_norm_control(0.1, radius, ratio=0.7, axis_name="data")
    act = jax.shard_map(
        lambda u, p, q: part.update(u, part.init(p), q)[0], mesh=mesh, in_specs=P("data"), out_specs=P("data")
    )
    np.testing.assert_allclose(jax.jit(act)(updates, params, now), want, rtol=1e-13)
    explicit = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    placed = [jax.device_put(x, NamedSharding(explicit, P("data"))) for x in (updates, params, now)]
    got, _ = jax.jit(whole.update)(placed[0], jax.jit(whole.init)(placed[1]), placed[2])
    np.testing.assert_allclose(got, want, rtol=1e-13)
    assert got.sharding.is_equivalent_to(placed[0].sharding, 2)


def test_a_state_fits_every_rate_ratio_and_mask() -> None:
    params, updates = make(0, np.float32), make(1, np.float32)
    settings = [
        weight_norm_control(0.1),
        weight_norm_control(lambda count: 0.1, ratio=lambda count: 0.5),
        weight_norm_control(0.0, mask=wdjax.only("bias")),
    ]
    states = [control.init(params) for control in settings]
    chex.assert_trees_all_equal(*states)
    moved = jax.tree.map(lambda p: 2 * p, params)
    want, _ = settings[0].update(updates, states[0], moved)
    got, after = settings[0].update(updates, states[2], moved)
    chex.assert_trees_all_equal(got, want)
    assert int(after.count) == 1


def test_weights_of_zero_are_warned_of_where_init_is_their_radius() -> None:
    params = {"up": jnp.ones((2, 2)), "down": jnp.zeros((2, 2)), "empty": jnp.zeros((0, 2))}
    with pytest.warns(UserWarning, match=r"^weight_norm_control: radius='init' is 0 at 'down', because.*decay toward"):
        weight_norm_control(0.1).init(params)
    for quiet in (weight_norm_control(0.1, mask=wdjax.only("up")), weight_norm_control(0.1, 2.0)):
        quiet.init(params)


# In company.


@pytest.mark.peers
@pytest.mark.usefixtures("x64")
def test_the_learning_rate_comes_in_by_relative() -> None:
    lr = optax.cosine_decay_schedule(0.1, STEPS)
    control = weight_norm_control(rates.relative(0.02, lr, peak=0.1), ratio=0.5)
    zero = lambda p, _: jax.tree.map(jnp.zeros_like, p)  # noqa: E731
    got, start = trained(control, make(0), zero)["conv"], make(0)["conv"]
    left = np.prod([1 - 0.02 * float(lr(count)) / 0.1 for count in range(STEPS)])
    np.testing.assert_allclose(got, start * (0.5 + 0.5 * left), rtol=1e-6)


@pytest.mark.peers
def test_the_monitor_reads_it_and_cautious_selects_from_it() -> None:
    params = {"kernel": jnp.full((4, 4), 0.5)}
    optimizer = wdjax.monitor(optax.chain(optax.adam(0.1), weight_norm_control(0.1, 1.0)))
    state = optimizer.init(params)
    _, state = jax.jit(optimizer.update)({"kernel": jnp.ones((4, 4))}, state, params)
    found = wdjax.scalars(state)
    assert any(np.isclose(value, 0.05) for key, value in found.items() if "decay" in key), found
    cautious = wdjax.cautious(weight_norm_control(0.1, 1.0))
    updates = {"kernel": jnp.asarray([[1.0, -1.0]] * 8).reshape(4, 4)}
    got = new_updates(cautious, updates, params)["kernel"]
    term = -0.1 * (0.5 - 0.25)
    np.testing.assert_allclose(got, np.where(updates["kernel"] < 0, -1 + term, 1), rtol=1e-6)


def test_warnings_of_rates() -> None:
    params = make(0, np.float32)
    with pytest.warns(UserWarning, match=r"^weight_norm_control: the decay rounds to nothing: weight_decay is 1e-09"):
        weight_norm_control(1e-9, 2.0).init(params)
    weight_norm_control(1.0, 2.0).init(params)  # Onto the sphere.


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (
            lambda: weight_norm_control(0.1, -1.0),
            ValueError,
            r"^weight_norm_control: radius must be finite and",
        ),
        (
            lambda: weight_norm_control(0.1, "start"),
            TypeError,
            r"radius must be .* or 'init' .*got 'start'.*0\.01",
        ),
        (lambda: weight_norm_control(0.1, None), TypeError, r"radius must be a number, .*got None"),
        (lambda: weight_norm_control(0.1, ratio=-1.0), ValueError, r"ratio must be finite and not negative, got -1"),
        (lambda: weight_norm_control(-0.1), ValueError, r"weight_decay must be finite and not negative, got -0\.1"),
        (lambda: weight_norm_control(0.1, wdjax.only("w")), TypeError, r"a mask was given as radius.*mask=\.\.\."),
        (lambda: weight_norm_control(0.1, axis=0, per=0), ValueError, r"^weight_norm_control: axis=0 names the axes"),
        (lambda: weight_norm_control(0.1, per="x"), TypeError, r"^weight_norm_control: per must be an integer"),
        (lambda: weight_norm_control(0.1, lr=0.1), TypeError, r"weight_norm_control\(\) has no argument 'lr'"),
    ],
)
def test_errors_when_built(build: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        build()


@pytest.mark.filterwarnings("ignore:weight_norm_control. radius='init' is 0")
def test_errors_in_the_update() -> None:
    params = {"w": jnp.ones((2, 3))}
    uneven = {"w": np.array([[1.0], [2.0]])}
    for control in (weight_norm_control(uneven, 1.0), weight_norm_control(0.1, uneven)):
        with pytest.raises(
            ValueError, match=r"weight_decay, ratio, radius or mask of shape \(2, 1\) differs within a group"
        ):
            control.update(params, control.init(params), params)
    of_parts = weight_norm_control(0.1, 1.0, {"w": np.array([[True], [False]])})
    with pytest.raises(ValueError, match=r"a weight_decay, ratio, radius or mask of shape \(2, 1\) differs within"):
        of_parts.update(params, of_parts.init(params), params)
    new_updates(weight_norm_control(0.1, uneven, per=0), params, params)
    with pytest.raises(ValueError, match=r"^weight_norm_control: per=2 is out of range for a 2-dimensional array"):
        new_updates(weight_norm_control(0.1, per=2), params, params)
    with pytest.raises(ValueError, match=r"the state has radii of shape \(1, 1\), but weight_norm_control\(per"):
        weight_norm_control(0.1, per=-1).update(params, weight_norm_control(0.1).init(params), params)
    with pytest.raises(ValueError, match=r"the state has nothing for 'w'"):
        weight_norm_control(0.1).update(params, weight_norm_control(0.1, 1.0).init(params), params)
    with pytest.raises(ValueError, match=r"^weight_norm_control needs the parameters"):
        weight_norm_control(0.1, 1.0).update(params, weight_norm_control(0.1, 1.0).init(params))
    by_layer = wdjax.by_depth("w", 0.5, axis=0)
    with pytest.raises(ValueError, match=r"first axis does: weight_norm_control\(\.\.\., stacked_axes=1\)"):
        weight_norm_control(0.1 * by_layer).init(params)
    new_updates(weight_norm_control(0.1, 2.0 * by_layer), params, params)


def test_under_inject_hyperparams_and_axes_are_static() -> None:
    params, updates = make(0, np.float32), make(1, np.float32)
    for radius in (3.0, lambda count: 3.0, "init"):
        plain = weight_norm_control(0.1, radius, ratio=0.5)
        injected = optax.inject_hyperparams(weight_norm_control)(0.1, radius, ratio=0.5)
        want, _ = plain.update(updates, plain.init(params), params)
        got, _ = jax.jit(injected.update)(updates, injected.init(params), params)
        chex.assert_trees_all_close(got, want, rtol=1e-6, atol=1e-7)
    for name in ("axis", "per", "stacked_axes"):
        with pytest.raises(TypeError, match=rf"inject_hyperparams, name it in static_args=\('{name}',\)"):
            jax.jit(optax.inject_hyperparams(weight_norm_control)(0.1, **{name: 0}).init)(params)
        optax.inject_hyperparams(weight_norm_control, static_args=(name,))(0.1, **{name: 0}).init(params)
