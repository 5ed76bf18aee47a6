"""Constraints: each against NumPy in float64, around optimizers, and what it leads to."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from in_numpy import adam, momentum
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from registry import CONSTRAINTS, Limit, onto_sphere
from slow import slow
from test_contract import assert_same_bits, float64

import wdjax
from wdjax import L1Ball, L2Ball, L2Sphere, NonNegative, SpectralBall, constrain

RADIUS = 0.7
SHAPES = {"kernel": (6, 4), "conv": (3, 2, 5)}


def make(seed: int, dtype: Any = np.float64, **shapes: tuple[int, ...]) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in (shapes or SHAPES).items()}


def by_group(project: Callable[..., np.ndarray], kind: Any, w: np.ndarray, radius: Any) -> np.ndarray:
    """The projection of each group by itself."""
    axes = kind.axes(w.ndim)
    first = [axis for axis in range(w.ndim) if axis not in axes]
    moved = np.transpose(w, [*first, *axes])
    groups = moved.reshape(int(np.prod(moved.shape[: len(first)])), -1)
    radii = np.broadcast_to(np.reshape(radius, -1), len(groups))
    done = np.stack([project(group, r) for group, r in zip(groups, radii, strict=True)])
    return np.transpose(done.reshape(moved.shape), np.argsort([*first, *axes]))


def cap(w: np.ndarray, radius: float, per: tuple[int, ...]) -> np.ndarray:
    """Singular values up to the radius."""
    per = tuple(axis % w.ndim for axis in per)
    rest = [axis for axis in range(w.ndim) if axis not in per]
    moved = np.transpose(w, [*rest, *per])
    u, s, vh = np.linalg.svd(moved.reshape(int(np.prod(moved.shape[: len(rest)])), -1), full_matrices=False)
    return np.transpose(((u * np.minimum(s, radius)) @ vh).reshape(moved.shape), np.argsort([*rest, *per]))


class Case(NamedTuple):
    """A constraint, and its projection in NumPy."""

    kind: Any
    project: Callable[[np.ndarray, Any], np.ndarray]
    radius: float | None = RADIUS


def grouped(kind: Any, project: Callable[..., np.ndarray]) -> Case:
    return Case(kind, functools.partial(by_group, project, kind))


def cases_of(limit: Limit) -> list[Case]:
    """The constraint as the registry has it, and with other groups, if it has groups."""
    kind = type(limit.constraint)
    if not hasattr(kind, "groups"):
        return [Case(limit.constraint, limit.project, RADIUS if limit.has_radius else None)]
    return [grouped(k, limit.project) for k in (limit.constraint, kind(per=-1), kind(per=0), kind(axis=0))]


CASES = [
    *(case for limit in CONSTRAINTS.values() for case in cases_of(limit)),
    grouped(L2Sphere(per=(0, 1)), onto_sphere),
    Case(SpectralBall(), lambda w, r: cap(w, r, (-1,))),
    Case(SpectralBall(per=0), lambda w, r: cap(w, r, (0,))),
    Case(SpectralBall(per=(0, -1)), lambda w, r: cap(w, r, (0, -1))),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: repr(case.kind))
ONE_OF_EACH = [
    case for i, case in enumerate(CASES) if type(case.kind) not in {type(before.kind) for before in CASES[:i]}
]
each_kind = pytest.mark.parametrize("case", ONE_OF_EACH, ids=lambda case: repr(case.kind))
# The other groups are those of the closed form.
one_of_each_first = pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case in ONE_OF_EACH else pytest.mark.slow) for case in CASES],
    ids=lambda case: repr(case.kind),
)
each_radius = pytest.mark.parametrize(
    "case", [case for case in ONE_OF_EACH if case.radius is not None], ids=lambda case: repr(case.kind)
)


def fits(case: Case, w: Any) -> bool:
    return getattr(case.kind, "per", None) != (0, -1) or np.ndim(w) > 2


def stepped(optimizer: Any, updates: Any, params: Any) -> Any:
    new, _ = jax.jit(optimizer.update)(updates, optimizer.init(params), params)
    return optax.apply_updates(params, new)


# The projections.


@pytest.mark.filterwarnings("ignore:constrain. each weight is a group of its own")
@every_case
@pytest.mark.usefixtures("x64")
def test_closed_form(case: Case) -> None:
    for scale in (1.0, 1e-3, 1e3):  # The middle one is inside.
        params, updates = (jax.tree.map(lambda x: scale * x, make(seed)) for seed in (0, 1))  # noqa: B023
        params = {name: w for name, w in params.items() if fits(case, w)}
        updates = {name: updates[name] for name in params}
        landed = stepped(constrain(case.kind, case.radius), updates, params)
        for name, w in params.items():
            want = case.project(np.asarray(w) + np.asarray(updates[name]), case.radius)
            np.testing.assert_allclose(landed[name], want, rtol=1e-11, atol=1e-14 * max(scale, 1))


@pytest.mark.peers
@pytest.mark.parametrize(
    ("kind", "peer"),
    [
        (L2Ball(), optax.projections.projection_l2_ball),
        (L2Sphere(), optax.projections.projection_l2_sphere),
        (L1Ball(), optax.projections.projection_l1_ball),
        (NonNegative(), lambda w, radius: optax.projections.projection_non_negative(w)),
    ],
    ids=lambda value: repr(value) if dataclasses.is_dataclass(value) else "",
)
def test_the_projections_of_optax(kind: Any, peer: Any) -> None:
    for radius in (RADIUS, 100.0):
        for w in make(0, np.float32).values():
            np.testing.assert_allclose(kind.project(w, radius), peer(w, radius), rtol=2e-6, atol=2e-7)


@each_radius
@pytest.mark.usefixtures("x64")
def test_complex_weights(case: Case) -> None:
    # The projections depend on moduli or singular values alone, so they commute with unitary maps.
    rng = np.random.default_rng(0)
    w = rng.normal(size=(5, 4))
    phase = np.exp(1j * rng.uniform(size=(1, 4)))
    got = stepped(constrain(case.kind, RADIUS), jnp.zeros((5, 4), complex), jnp.asarray(w * phase))
    np.testing.assert_allclose(got, case.project(w, RADIUS) * phase, rtol=1e-12, atol=1e-14)


@each_radius
def test_a_radius_of_zero_and_weights_of_zero(case: Case) -> None:
    w = make(0, np.float32)["kernel"]
    np.testing.assert_allclose(case.kind.project(w, 0.0), np.zeros((6, 4)), atol=2e-6)
    np.testing.assert_array_equal(case.kind.project(jnp.zeros((6, 4)), RADIUS), np.zeros((6, 4)))


# How exactly the weights obey. The step rounds twice: the update, and the sum.


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "case", [*ONE_OF_EACH, grouped(L2Sphere(per=-1), onto_sphere)], ids=lambda case: repr(case.kind)
)
def test_the_weights_obey_after_the_step(case: Case, dtype: Any) -> None:
    params = make(0, dtype, kernel=(64, 48))
    optimizer = optax.chain(optax.sgd(0.3), constrain(case.kind, case.radius))
    state, step = optimizer.init(params), jax.jit(optimizer.update)
    half = float(jnp.finfo(dtype).eps) / 2
    for seed in range(20):
        grads = make(seed + 1, dtype, kernel=(64, 48))
        updates, state = step(grads, state, params)
        before, params = params, optax.apply_updates(params, updates)
        w = float64(params["kernel"])
        if case.radius is None:
            assert w.min() == 0  # Zeros are exact.
            continue
        moved = np.abs(float64(updates["kernel"])) + np.abs(w)
        far = np.linalg.norm(float64(before["kernel"]) + 0.3 * np.abs(float64(grads["kernel"])))
        if not hasattr(case.kind, "norm"):
            continue  # Its closed form says all.
        slack = half * np.linalg.norm(moved) if not isinstance(case.kind, L1Ball) else half * moved.sum()
        slack += 2e-6 * far  # The projection itself, in float32.
        size = float64(case.kind.norm(jnp.asarray(w, jnp.float32)))
        assert size.max() <= RADIUS + slack
        if isinstance(case.kind, L2Sphere):
            assert size.min() >= RADIUS - slack
        assert not np.array_equal(float64(before["kernel"]), w)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@each_kind
def test_weights_that_obey_keep_every_bit_of_the_update(case: Case, dtype: Any) -> None:
    params, updates = ({"w": jnp.abs(make(seed, dtype)["kernel"])} for seed in (0, 1))
    updates["w"] = updates["w"].at[0].set(-0.0)
    radius = None if case.radius is None else 100.0
    if isinstance(case.kind, L2Sphere):
        return
    new, _ = jax.jit(constrain(case.kind, radius).update)(updates, constrain(case.kind, radius).init(params), params)
    assert_same_bits(new, updates)


def test_groups_within_the_ball_keep_every_bit() -> None:
    params, updates = make(0, np.float32), make(1, np.float32)
    scale = np.array([1e-3, 10, 1e-3, 10], np.float32)
    params, updates = {"kernel": params["kernel"] * scale[None]}, {"kernel": updates["kernel"] * scale[None]}
    optimizer = constrain(L2Ball(per=-1), 1.0)
    new, _ = optimizer.update(updates, optimizer.init(params), params)
    assert_same_bits(new["kernel"][:, ::2], updates["kernel"][:, ::2])
    assert np.all(np.asarray(new["kernel"][:, 1::2]) != np.asarray(updates["kernel"][:, 1::2]))


# Around optimizers.


DIRECTIONS: dict[str, tuple[Any, Any]] = {
    "SGD with momentum": (lambda: optax.trace(0.9), momentum),
    "Adam": (optax.scale_by_adam, adam),
}


def targets(count: int) -> np.ndarray:
    return np.random.default_rng(7).normal(size=(count, 6, 4)) + 0.3


@pytest.mark.filterwarnings("ignore:constrain. each weight is a group of its own")
@pytest.mark.peers
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", DIRECTIONS)
@pytest.mark.parametrize("case", [case for case in CASES if fits(case, np.ones((2, 2)))], ids=lambda c: repr(c.kind))
def test_sixty_steps_around_an_optimizer(case: Case, name: str) -> None:
    scale_by, direction = DIRECTIONS[name]
    optimizer = optax.chain(scale_by(), optax.scale_by_learning_rate(0.1), constrain(case.kind, case.radius))
    start, noise = np.asarray(make(0)["kernel"]), targets(60)

    @jax.jit
    def step(w: Any, state: Any, target: Any) -> Any:
        updates, state = optimizer.update(w - target, state, w)
        return optax.apply_updates(w, updates), state

    w, want, memory = jnp.asarray(start), start, None
    state = optimizer.init(w)
    for count, target in enumerate(noise, 1):
        w, state = step(w, state, target)
        d, memory = direction(want - target, memory, count)
        want = case.project(want - 0.1 * d, case.radius)
        np.testing.assert_allclose(w, want, rtol=1e-9, atol=1e-11)


# Radii.


@pytest.mark.usefixtures("x64")
def test_radii_of_every_form() -> None:
    params, updates = make(0), make(1)
    schedule = lambda count: 1.0 + 0.5 * jnp.asarray(count, jnp.float64)  # noqa: E731
    columns = np.array([0.5, 1.0, 0.0, 2.0])
    for radius, of_kernel, of_conv in (
        (jnp.asarray(0.5), 0.5, 0.5),
        (schedule, 1.0, 1.0),
        (wdjax.by_path({"kernel": 0.5}, default=0.1), 0.5, 0.1),
        ({"kernel": columns, "conv": schedule}, columns, 1.0),
        (2.0 * wdjax.by_path({"kernel": columns[None] / 2}, default=0.25), columns, 0.5),
    ):
        landed = stepped(constrain(L2Sphere(per=-1), radius), updates, params)
        for name, size in (("kernel", of_kernel), ("conv", of_conv)):
            norms = np.linalg.norm(np.asarray(landed[name]).reshape(-1, landed[name].shape[-1]), axis=0)
            np.testing.assert_allclose(norms, np.broadcast_to(size, norms.shape), rtol=1e-13, atol=1e-15)
    optimizer = constrain(L2Ball(), schedule)
    state = optimizer.init(params)
    for count in range(3):
        new, state = optimizer.update(jax.tree.map(lambda p: 100 * p, params), state, params)
        landed = optax.apply_updates(params, new)
        np.testing.assert_allclose(np.linalg.norm(landed["kernel"]), 1 + 0.5 * count, rtol=1e-13)


@pytest.mark.parametrize("kind", [L2Ball(per=-1), L2Sphere(), L2Sphere(per=-1), L1Ball(), SpectralBall()], ids=repr)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_the_radius_at_init_is_the_norm_of_each_group_and_stays(kind: Any, dtype: Any) -> None:
    params = make(0, dtype, kernel=(6, 4))
    optimizer = constrain(kind, "init")
    state = optimizer.init(params)
    radius = state.leaf["kernel"]
    assert radius.dtype == jnp.float32
    np.testing.assert_array_equal(radius, kind.norm(jnp.asarray(params["kernel"], jnp.float32)))
    for _ in range(3):
        new, state = jax.jit(optimizer.update)(jax.tree.map(lambda p: 5 * p, params), state, params)
        params = optax.apply_updates(params, new)
        size = kind.norm(jnp.asarray(params["kernel"], jnp.float32))
        np.testing.assert_allclose(size, radius, rtol=16 * float(jnp.finfo(dtype).eps))
        np.testing.assert_array_equal(state.leaf["kernel"], radius)
    # Also for weights that come from elsewhere.
    other = jax.tree.map(lambda p: 3 * p, params)
    landed = optax.apply_updates(other, optimizer.update(jax.tree.map(jnp.zeros_like, other), state, other)[0])
    size = kind.norm(jnp.asarray(landed["kernel"], jnp.float32))
    np.testing.assert_allclose(size, radius, rtol=16 * float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("kind", [L2Ball(), L2Sphere(per=-1), L1Ball(), SpectralBall()], ids=repr)
@pytest.mark.parametrize("radius", [RADIUS, "init"])
@pytest.mark.usefixtures("x64")
def test_layers_of_a_stack(kind: Any, radius: Any) -> None:
    layers, moves = ([make(10 * seed + i, w=(5, 4))["w"] for i in range(3)] for seed in (1, 2))
    stacked = {"layers": jnp.stack(layers), "head": layers[0]}
    updates = {"layers": jnp.stack(moves), "head": moves[0]}
    got = stepped(constrain(kind, radius, stacked_axes={"layers": 1}), updates, stacked)
    want = [stepped(constrain(kind, radius), move, layer) for layer, move in zip(layers, moves, strict=True)]
    np.testing.assert_allclose(got["layers"], jnp.stack(want), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(got["head"], want[0], rtol=1e-12, atol=1e-14)


def test_a_state_for_every_mask_and_for_parameters_that_the_mask_leaves_out() -> None:
    params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2), "scale": jnp.ones(()), "steps": jnp.arange(2)}
    updates = jax.tree.map(jnp.ones_like, params)
    masks = (wdjax.only("kernel"), lambda tree: {name: name == "kernel" for name in tree})
    for kind in (SpectralBall(), L2Sphere(per=-1)):
        states = [constrain(kind, "init", mask).init(params) for mask in masks]
        assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
        new, _ = constrain(kind, "init", masks[0]).update(updates, states[1], params)
        assert all(new[name] is updates[name] for name in ("bias", "scale", "steps"))


def test_weights_of_zero_are_warned_of_where_init_is_their_radius() -> None:
    params = {"up": jnp.ones((3, 2)), "down": jnp.zeros((2, 3))}
    with pytest.warns(UserWarning, match=r"radius='init' is 0 at 'down'.*will stay zero.*mask"):
        constrain(L2Sphere(), "init").init(params)
    with pytest.warns(UserWarning, match="at 'up'"):  # One unit alone.
        constrain(L2Sphere(per=-1), "init", wdjax.only("up")).init({**params, "up": jnp.array([[1.0, 0.0]])})
    constrain(L2Sphere(), "init", wdjax.only("up")).init(params)
    jax.jit(constrain(L2Sphere(), "init").init)(params)


# Inside programs: derivatives, vmap, shards.


@one_of_each_first
@pytest.mark.usefixtures("x64")
def test_derivatives(case: Case) -> None:
    w, u, direction = (make(seed)["conv"] for seed in (0, 1, 2))

    def moved(weights: Any, radius: Any) -> Any:
        optimizer = constrain(case.kind, None if case.radius is None else radius)
        return jnp.sum(jnp.sin(optimizer.update(u, optimizer.init(weights), weights)[0]))

    for radius in (RADIUS, 100.0):
        step = 1e-6
        slope = (moved(w + step * direction, radius) - moved(w - step * direction, radius)) / (2 * step)
        got = jnp.vdot(jax.grad(moved)(w, radius), direction)
        np.testing.assert_allclose(got, slope, rtol=1e-6, atol=1e-8)
        slope = (moved(w, radius + step) - moved(w, radius - step)) / (2 * step)
        np.testing.assert_allclose(jax.grad(moved, 1)(w, radius), slope, rtol=1e-6, atol=1e-8)


@pytest.mark.peers  # Real times complex.
@pytest.mark.usefixtures("x64")
def test_derivatives_of_singular_values_that_are_equal_zero_or_complex() -> None:
    rng = np.random.default_rng(0)
    w = np.linalg.qr(rng.normal(size=(5, 3)))[0] * np.array([2.0, 2.0, 0.0]) @ np.linalg.qr(rng.normal(size=(3, 3)))[0]
    rest = [rng.normal(size=(5, 3)) for _ in range(3)]
    project = lambda w: SpectralBall().project(w, 1.0)  # noqa: E731
    for at, to in ((w, rest[0]), (w + 1j * rest[1], rest[0] + 1j * rest[2]), (np.eye(5, 3) / 2, rest[0])):
        _, got = jax.jvp(project, (jnp.asarray(at),), (jnp.asarray(to),))
        slope = (project(jnp.asarray(at + 1e-6 * to)) - project(jnp.asarray(at - 1e-6 * to))) / 2e-6
        np.testing.assert_allclose(got, slope, rtol=1e-5, atol=1e-5)


@each_kind
def test_no_derivative_is_nan_where_weights_are_zero(case: Case) -> None:
    zeros = jnp.zeros((4, 3))

    def moved(weights: Any, update: Any, radius: Any) -> Any:
        optimizer = constrain(case.kind, None if case.radius is None else radius)
        return jnp.sum(jnp.sin(optimizer.update(update, optimizer.init(weights), weights)[0]))

    for weights in (zeros, zeros.at[0, 0].set(1.0)):
        for slope in jax.grad(moved, (0, 1, 2))(weights, zeros, RADIUS):
            assert np.all(np.isfinite(slope))


@each_radius
@pytest.mark.usefixtures("x64")
def test_vmap_over_radii_and_over_models(case: Case) -> None:
    models, moves = make(0, w=(3, 5, 4))["w"], make(1, w=(3, 5, 4))["w"]
    radii = jnp.array([0.0, 0.5, 100.0])

    def landed(w: Any, u: Any, radius: Any) -> Any:
        return w + constrain(case.kind, radius).update(u, constrain(case.kind, radius).init(w), w)[0]

    got = jax.jit(jax.vmap(landed))(models, moves, radii)
    for i, radius in enumerate((0.0, 0.5, 100.0)):
        want = landed(models[i], moves[i], radius)
        np.testing.assert_allclose(got[i], want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("axis_type", [slow(AxisType.Auto), AxisType.Explicit])
@each_kind
def test_sharded_weights(case: Case, axis_type: AxisType) -> None:
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    sharding = NamedSharding(mesh, P("data", "model"))
    params, updates = make(0, np.float32, w=(8, 6)), make(1, np.float32, w=(8, 6))
    for radius in (case.radius, "init") if hasattr(case.kind, "norm") else (case.radius,):
        optimizer = constrain(case.kind, radius)
        stack = constrain(case.kind, radius, stacked_axes=1)
        want, _ = optimizer.update(updates, optimizer.init(params), params)
        with jax.set_mesh(mesh):
            placed = [jax.device_put(tree, sharding) for tree in (updates, params)]
            state = jax.jit(optimizer.init)(placed[1])
            got, _ = jax.jit(optimizer.update)(placed[0], state, placed[1])
            np.testing.assert_allclose(got["w"], want["w"], rtol=1e-5, atol=1e-6)
            deep = [jax.device_put({"w": jnp.stack([tree["w"]] * 4)}, sharding) for tree in (updates, params)]
            of_layers, _ = jax.jit(stack.update)(deep[0], stack.init(deep[1]), deep[1])
        assert got["w"].sharding.is_equivalent_to(sharding, 2)
        np.testing.assert_allclose(np.asarray(of_layers["w"])[1], want["w"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("radius", [RADIUS, "init"])
@pytest.mark.parametrize("kind", [L2Ball, L2Sphere])
@pytest.mark.parametrize("check_vma", [True, slow(False)])
@pytest.mark.usefixtures("x64")
def test_norms_of_whole_arrays_within_shard_map(kind: Any, radius: Any, check_vma: bool) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    params, updates = make(0, w=(16, 3)), make(1, w=(16, 3))
    for groups in ({}, {"per": -1}):
        part, whole = constrain(kind(axis_name="data", **groups), radius), constrain(kind(**groups), radius)
        step = jax.jit(
            jax.shard_map(
                lambda u, p, part=part: part.update(u, part.init(p), p)[0],
                mesh=mesh,
                in_specs=P("data"),
                out_specs=P("data"),
                check_vma=check_vma,
            )
        )
        want, _ = whole.update(updates, whole.init(params), params)
        np.testing.assert_allclose(step(updates, params)["w"], want["w"], rtol=1e-12, atol=1e-14)
    with pytest.raises(ValueError, match=r"no mesh axis 'data' here.*leave axis_name out"):
        constrain(kind(axis_name="data"), "init").init(params)


# A constraint of one's own.


@dataclasses.dataclass
class Box:
    is_elementwise = True

    def project(self, w: Any, radius: Any) -> Any:
        return jnp.clip(w, -radius, radius)

    def norm(self, w: Any) -> Any:
        return jnp.max(jnp.abs(w), keepdims=True)


class Centered:
    has_radius = False

    def project(self, w: Any, radius: None) -> Any:
        return w - jnp.mean(w)


def test_a_constraint_of_ones_own() -> None:
    params, updates = make(0, np.float32), make(1, np.float32)
    assert isinstance(Box(), wdjax.constraints.Constraint)
    radii = {"kernel": np.linspace(0, 1, 24, dtype=np.float32).reshape(6, 4), "conv": 0.5}
    landed = stepped(constrain(Box(), radii), updates, params)
    for name in params:
        want = np.clip(params[name] + updates[name], -np.asarray(radii[name]), radii[name])
        np.testing.assert_allclose(landed[name], want, rtol=1e-6, atol=1e-6)
    landed = stepped(constrain(Box(), "init"), jax.tree.map(lambda p: 2 * p, params), params)
    np.testing.assert_allclose(np.abs(landed["conv"]).max(), np.abs(params["conv"]).max(), rtol=1e-6)
    landed = stepped(constrain(Centered()), updates, params)
    np.testing.assert_allclose(np.mean(landed["kernel"]), 0, atol=1e-6)


# Errors.


def test_errors_when_it_is_built() -> None:
    for build, error, words in (
        (lambda: constrain(L2Ball, 1.0), TypeError, r"^constrain: kind must be a constraint .*constrain\(L2Ball\("),
        (lambda: constrain(wdjax.L2(), 1.0), TypeError, r"^constrain: kind .*got L2\(\).*L2Ball\(\), radius=1.0"),
        (lambda: constrain(L2Ball()), TypeError, r"^constrain: L2Ball\(\) needs a radius, got None.*'init'"),
        (lambda: constrain(NonNegative(), 1.0), TypeError, r"NonNegative\(\) has no radius, but radius=1.0 was given"),
        (lambda: constrain(NonNegative(), "init"), TypeError, r"NonNegative\(\) has no radius, but radius='init'"),
        (lambda: constrain(L2Ball(), -1.0), ValueError, r"^constrain: radius must be .*not negative, got -1.0"),
        (lambda: constrain(L2Ball(), "start"), TypeError, r"^constrain: radius must be a number.*got 'start'"),
        (lambda: constrain(Proximal(), "init"), TypeError, r"radius='init' needs the method norm, which .*norm\(w\)"),
        (lambda: L2Ball(0, per=-1), ValueError, r"^L2Ball: axis=0 names the axes of a norm and per=-1 the others"),
        (lambda: L1Ball(per="columns"), TypeError, r"^L1Ball: per must be an integer.*got 'columns'.*L1Ball\(per=-1\)"),
        (lambda: SpectralBall(per=0.5), TypeError, r"^SpectralBall: per must be an integer or a tuple of integers"),
        (lambda: L2Sphere(axis_name=0), TypeError, r"^L2Sphere: axis_name must be the name of a mesh axis"),
        (lambda: wdjax.constrain(L2Ball(), max_norm=1.0), TypeError, r"constrain\(\) has no argument 'max_norm'"),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            build()


class Proximal:
    def project(self, w: Any, radius: Any) -> Any:
        return w[:1]


def test_errors_when_it_runs() -> None:
    params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2), "scale": jnp.ones(())}
    rows = wdjax.by_path({"kernel": np.array([[1.0], [2.0], [3.0]])}, default=1.0)
    half = {"kernel": np.array([[True], [False], [True]]), "bias": False, "scale": False}
    for optimizer, words in (
        (constrain(SpectralBall(), 1.0), r"SpectralBall\(per=-1\): an array of shape \(2,\) is not a matrix.*mask"),
        (constrain(L2Ball(per=-1), 1.0), r"L2Ball: per=-1 is out of range for a 0-dimensional array.*mask"),
        (constrain(L2Ball(per=-1), rows, wdjax.only("kernel")), r"radius of shape \(3, 1\) differs within a group"),
        (constrain(SpectralBall(), rows, wdjax.only("kernel")), r"radius of shape \(3, 1\) differs within a group"),
        (constrain(Proximal(), 1.0), r"Proximal: project must return an array of shape \(2,\).* shape \(1,\)"),
        (constrain(L2Ball(), 1.0, half), r"^constrain: the mask at 'kernel' selects parts.*mask=only\('kernel'\)"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            optimizer.update(params, optimizer.init(params), params)
    state = constrain(NonNegative()).init(jnp.ones(2, complex))
    with pytest.raises(TypeError, match="NonNegative: complex weights have no sign"):
        constrain(NonNegative()).update(jnp.ones(2), state, jnp.ones(2, complex))
    state = constrain(L2Ball(), 1.0).init(params)
    with pytest.raises(ValueError, match=r"^constrain: the state has nothing for 'bias'"):
        constrain(L2Ball(), "init").update(params, state, params)


@pytest.mark.peers
def test_it_goes_into_inject_hyperparams() -> None:
    params, updates = make(0, np.float32), make(1, np.float32)
    for radius in (RADIUS, lambda count: RADIUS, "init"):
        injected = optax.inject_hyperparams(constrain)(kind=L2Ball(per=-1), radius=radius)
        plain = constrain(L2Ball(per=-1), radius)
        got, _ = injected.update(updates, injected.init(params), params)
        want, _ = plain.update(updates, plain.init(params), params)
        np.testing.assert_allclose(got["conv"], want["conv"], rtol=1e-6, atol=1e-7)


# Inspection.


@pytest.mark.peers
def test_the_audit_sees_the_decay_beside_a_ball_that_holds() -> None:
    params = make(0, np.float32, kernel=(8, 4), bias=(4,))
    mask = wdjax.weights_only()
    optimizer = optax.chain(wdjax.adamw(0.01, 0.1, mask), constrain(L2Ball(), 100.0, mask))
    found = wdjax.audit(optimizer, params)["kernel"]
    assert (found.kind, found.toward) == ("L2", "zero")
    np.testing.assert_allclose(found.rate, 0.001, rtol=1e-3)


@pytest.mark.peers
def test_the_monitor_sees_that_a_sphere_takes_the_decay_away() -> None:
    params = make(0, np.float32, kernel=(8, 4), bias=(4,))
    mask = wdjax.only("kernel")
    rates = []
    for radius in (None, "init"):
        sphere = optax.identity() if radius is None else constrain(L2Sphere(), radius, mask)
        optimizer = wdjax.monitor(optax.chain(wdjax.adamw(0.01, 0.1, mask), sphere))
        _, state = jax.jit(optimizer.update)(jax.tree.map(jnp.cos, params), optimizer.init(params), params)
        rates.append(float(wdjax.scalars(state)["kernel/effective_rate"]))
    np.testing.assert_allclose(rates[0], 0.001, rtol=1e-3)
    assert rates[1] < 0.05 * rates[0]


@pytest.mark.parametrize("kind", [L2Ball(per=0), L2Sphere(), L1Ball(), L1Ball(per=0), L1Ball(per=1), SpectralBall()])
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 0, 3)])
@pytest.mark.parametrize("radius", [RADIUS, 0.0, "init"])
@pytest.mark.filterwarnings("ignore:constrain. radius='init' is 0")
def test_arrays_without_elements(kind: Any, shape: tuple[int, ...], radius: Any) -> None:
    params = jnp.zeros(shape)
    optimizer = constrain(kind, radius)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert updates.shape == shape


def test_a_state_of_other_groups_is_refused() -> None:
    params = {"kernel": jnp.ones((4, 3))}
    for old, new in ((L2Ball(), L2Ball(per=0)), (L2Ball(per=0), L2Ball()), (L2Sphere(per=1), L2Sphere(per=0))):
        state = constrain(old, "init").init(params)
        with pytest.raises(ValueError, match=r"^constrain: the state has radii of shape .*other groups or parameters"):
            constrain(new, "init").update(params, state, params)


def test_init_is_no_radius_in_a_table() -> None:
    with pytest.raises(
        TypeError, match=r"^constrain: radius must be .* or 'init' for the whole mask, got by_path.*and another"
    ):
        constrain(L2Ball(), wdjax.by_path({"up": "init"}, default=1.0))
    with pytest.raises(TypeError, match=r"^SpectralBall: per must be an integer or .*got None\. Write Spec.*per=-1"):
        SpectralBall(per=None)  # pyright: ignore[reportArgumentType]


def test_spheres_of_single_weights_are_warned_of() -> None:
    params = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3), "layers": jnp.ones((2, 5))}
    optimizer = wdjax.constrain(wdjax.L2Sphere(per=-1), 1.0, stacked_axes={"layers": 1})
    with pytest.warns(UserWarning, match=r"^constrain: each weight is a group of its own at 'bias', 'layers', so"):
        optimizer.init(params)
    for kind in (wdjax.L2Ball(per=-1), wdjax.L2Sphere()):  # A bound for each bias is what Keras' bias_constraint means.
        wdjax.constrain(kind, 1.0).init(params)
    wdjax.constrain(wdjax.L2Sphere(per=-1), 1.0, wdjax.only("kernel")).init(params)
