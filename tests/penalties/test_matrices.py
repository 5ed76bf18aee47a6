"""Penalties of matrices: the closed forms that they lead to, their derivatives, and power iterations."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from slow import slow, slow_but

import wdjax
from wdjax import testing
from wdjax.penalties import NuclearNorm, Orthogonality, SpectralNorm

pytestmark = pytest.mark.usefixtures("x64")
EACH = (NuclearNorm(), SpectralNorm(), Orthogonality())
ITERATED = SpectralNorm(iterations=30)
RNG = np.random.default_rng(0)
TARGET = RNG.normal(size=(7, 5))
LR, STRENGTH = 0.3, 1.5


def matrix(*singular_values: float, rows: int = 6, seed: int = 0) -> np.ndarray:
    """A matrix with these singular values."""
    rng = np.random.default_rng(seed)
    u = np.linalg.qr(rng.normal(size=(rows, len(singular_values))))[0]
    return u * singular_values @ np.linalg.qr(rng.normal(size=(len(singular_values),) * 2))[0].T


def soft(w: np.ndarray, k: float) -> np.ndarray:
    u, s, vh = np.linalg.svd(w, full_matrices=False)
    return u * np.maximum(s - k, 0) @ vh


def path(optimizer: Any, start: np.ndarray, steps: int, grads: Callable[[Any], Any]) -> np.ndarray:
    """The weights after each step."""

    def step(carry: Any, _: Any) -> Any:
        w, state = carry
        updates, state = optimizer.update(grads(w), state, w)
        w = optax.apply_updates(w, updates)
        return (w, state), w

    w = jnp.asarray(start)
    return np.asarray(jax.jit(lambda c: jax.lax.scan(step, c, length=steps))((w, optimizer.init(w)))[1])


# What they lead to.


def test_the_proximal_step_of_the_nuclear_norm_denoises_and_ends_at_the_exact_rank() -> None:
    optimizer = optax.chain(optax.sgd(LR), wdjax.proximal_step(NuclearNorm(), STRENGTH, learning_rate=LR))
    start = RNG.normal(size=TARGET.shape)
    found, w = path(optimizer, start, 100, lambda w: w - TARGET), start
    for step in range(100):
        w = soft(w - LR * (w - TARGET), LR * STRENGTH)
        np.testing.assert_allclose(found[step], w, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(found[-1], soft(TARGET, STRENGTH), rtol=1e-12, atol=1e-13)
    kept = np.count_nonzero(np.linalg.svd(TARGET, compute_uv=False) > STRENGTH)
    assert 0 < kept < 5
    assert np.linalg.matrix_rank(found[-1], tol=1e-10) == kept
    np.testing.assert_array_equal(NuclearNorm().prox(jnp.asarray(TARGET), jnp.asarray(100.0)), 0)


def test_the_subgradient_of_the_nuclear_norm_keeps_the_full_rank() -> None:
    optimizer = optax.chain(wdjax.add_penalty_to_grads(NuclearNorm(), STRENGTH), optax.sgd(LR))
    found = path(optimizer, TARGET, 300, lambda w: w - TARGET)[-1]
    assert np.linalg.matrix_rank(found, tol=1e-3) == 5


def test_the_proximal_step_of_the_spectral_norm_caps_what_sticks_out() -> None:
    optimizer = optax.chain(optax.sgd(LR), wdjax.proximal_step(SpectralNorm(), STRENGTH, learning_rate=LR))
    found = path(optimizer, RNG.normal(size=TARGET.shape), 200, lambda w: w - TARGET)[-1]
    u, s, vh = np.linalg.svd(TARGET, full_matrices=False)
    level = np.linalg.svd(found, compute_uv=False)[0]
    np.testing.assert_allclose(np.sum(np.maximum(s - level, 0)), STRENGTH * level, rtol=1e-12)
    np.testing.assert_allclose(found, u * np.minimum(s, level) @ vh, rtol=1e-11, atol=1e-12)


def test_the_gradient_of_the_spectral_norm_decays_the_largest_singular_value_alone() -> None:
    w = matrix(20.0, 0.5, 0.2)
    optimizer = optax.chain(wdjax.add_penalty_to_grads(SpectralNorm(), 0.2), optax.sgd(LR))
    found = path(optimizer, w, 58, jnp.zeros_like)
    u, s, vh = np.linalg.svd(w, full_matrices=False)
    for step, weights in enumerate(found, 1):
        np.testing.assert_allclose(weights, u * [20 * 0.94**step, *s[1:]] @ vh, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("is_wide", [False, True])
def test_gradient_descent_on_orthogonality_ends_at_the_polar_factor(is_wide: bool) -> None:
    w = matrix(1.7, 1.2, 0.6, 0.05)
    optimizer = optax.chain(wdjax.add_penalty_to_grads(Orthogonality(), 0.5), optax.sgd(0.4))
    found = path(optimizer, w.T if is_wide else w, 120, jnp.zeros_like)
    u, s, vh = np.linalg.svd(w, full_matrices=False)
    for weights in found:
        s = s - 0.2 * (s**2 - 1) * s
        want = u * s @ vh
        np.testing.assert_allclose(weights, want.T if is_wide else want, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(found[-1], (u @ vh).T if is_wide else u @ vh, rtol=1e-12, atol=1e-13)


def test_orthogonality_diverges_where_its_docstring_says_so() -> None:
    ends = [
        path(optax.chain(wdjax.add_penalty_to_grads(Orthogonality(), rate), optax.sgd(1.0)), w, 60, jnp.zeros_like)[-1]
        for w in [np.diag([3.0, 1.0])]
        for rate in (0.99 * 2 / 8, 1.01 * 2 / 8)
    ]
    np.testing.assert_allclose(ends[0].T @ ends[0], np.eye(2), atol=1e-9)
    assert not np.all(np.abs(ends[1]) < 100)


def test_a_matrix_with_one_row_or_column_has_one_singular_value() -> None:
    w = jnp.asarray(RNG.normal(size=(1, 4)))
    for one in (w, w.T):
        np.testing.assert_allclose(NuclearNorm().value(one), wdjax.GroupLasso().value(one), rtol=1e-14)
        np.testing.assert_allclose(NuclearNorm().gradient(one), wdjax.GroupLasso().gradient(one), rtol=1e-14)
        np.testing.assert_allclose(NuclearNorm().prox(one, 0.3), wdjax.GroupLasso().prox(one, 0.3), rtol=1e-13)
        np.testing.assert_allclose(SpectralNorm().value(one), wdjax.L2().value(one), rtol=1e-14)
        np.testing.assert_allclose(SpectralNorm().prox(one, 0.3), wdjax.L2().prox(one, 0.3), rtol=1e-13)


# Which matrix an array is.


@pytest.mark.parametrize(
    ("per", "order"), [(-1, (0, 1, 2)), pytest.param(0, (1, 2, 0), marks=pytest.mark.slow), ((0, -1), (1, 0, 2))]
)
@pytest.mark.parametrize("kind", [*EACH, ITERATED], ids=repr)
def test_per_names_the_axes_of_the_outputs(kind: Any, per: Any, order: tuple[int, ...]) -> None:
    w = jnp.asarray(RNG.normal(size=(3, 4, 5)))
    moved = jnp.transpose(w, order)
    outputs = np.atleast_1d(per).size
    as_matrix = jnp.reshape(moved, (math.prod(moved.shape[: 3 - outputs]), -1))
    own = type(kind)(**{"per": per, **({"iterations": 30} if kind is ITERATED else {})})
    np.testing.assert_allclose(own.value(w), kind.value(as_matrix), rtol=1e-12)
    back = lambda m: jnp.transpose(jnp.reshape(m, moved.shape), np.argsort(order))  # noqa: E731
    np.testing.assert_allclose(own.gradient(w), back(kind.gradient(as_matrix)), rtol=1e-9, atol=1e-12)
    if hasattr(kind, "prox"):
        np.testing.assert_allclose(own.prox(w, 0.3), back(kind.prox(as_matrix, jnp.asarray(0.3))), atol=1e-13)


@pytest.mark.parametrize("kind", [*EACH, ITERATED], ids=repr)
def test_each_layer_of_a_stack_is_a_matrix_of_its_own(kind: Any) -> None:
    layers = [RNG.normal(size=(4, 3)) for _ in range(3)]
    params = {"layers": jnp.stack(layers)}
    stacked = {"layers": 1}
    want = sum(float(kind.value(jnp.asarray(layer))) for layer in layers)
    np.testing.assert_allclose(wdjax.penalty(params, kind, 0.5, stacked_axes=stacked), 0.5 * want, rtol=1e-12)
    place = wdjax.add_penalty_to_grads(kind, 0.5, stacked_axes=stacked)
    added, _ = place.update(jax.tree.map(jnp.zeros_like, params), place.init(params), params)
    each = np.stack([kind.gradient(jnp.asarray(layer)) for layer in layers])
    np.testing.assert_allclose(added["layers"], 0.5 * each, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kind", [*EACH, ITERATED], ids=repr)
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 0, 3)])
def test_arrays_without_elements(kind: Any, shape: tuple[int, ...]) -> None:
    w = jnp.zeros(shape)
    assert np.isfinite(kind.value(w))
    assert kind.gradient(w).shape == shape
    if hasattr(kind, "prox"):
        assert kind.prox(w, 0.5).shape == shape


# Derivatives.

AT = {
    "distinct": matrix(3.0, 2.0, 0.5),
    "equal and not the largest": matrix(3.0, 2.0, 2.0),
    "zero": matrix(3.0, 2.0, 0.0),
    "two of zero": matrix(3.0, 0.0, 0.0),
}


@pytest.mark.peers  # Real times complex.
@pytest.mark.parametrize("at", AT)
@pytest.mark.parametrize("is_complex", [False, slow(True)])
@pytest.mark.parametrize("kind", EACH, ids=repr)
def test_the_gradient_and_its_own_derivative(kind: Any, at: str, is_complex: bool) -> None:
    w = AT[at] * (np.exp(0.7j) if is_complex else 1)
    rank = np.linalg.matrix_rank(w)
    to = RNG.normal(size=(6, 3)) + (1j * RNG.normal(size=(6, 3)) if is_complex else 0)
    if kind == NuclearNorm():  # It has a corner where a singular value is zero, and none along these matrices.
        vh = np.linalg.svd(w, full_matrices=False)[2]
        to = to @ (vh[:rank].conj().T @ vh[:rank])
    moved = [jnp.asarray(w + sign * 1e-6 * to) for sign in (1, -1)]
    got, slope = jax.jvp(kind.value, (jnp.asarray(w),), (jnp.asarray(to),))
    np.testing.assert_allclose(got, kind.value(jnp.asarray(w)))
    np.testing.assert_allclose(slope, (kind.value(moved[0]) - kind.value(moved[1])) / 2e-6, rtol=1e-7)
    np.testing.assert_allclose(np.vdot(kind.gradient(jnp.asarray(w)), to).real, slope, rtol=1e-12)
    _, second = jax.jvp(kind.gradient, (jnp.asarray(w),), (jnp.asarray(to),))
    want = (kind.gradient(moved[0]) - kind.gradient(moved[1])) / 2e-6
    np.testing.assert_allclose(second, want, rtol=1e-6, atol=1e-7)
    _, again = jax.jvp(lambda w: jnp.conj(jax.grad(kind.value)(w)), (jnp.asarray(w),), (jnp.asarray(to),))
    np.testing.assert_allclose(again, second, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("at", slow_but(AT, "zero"))
@pytest.mark.parametrize("kind", [NuclearNorm(), SpectralNorm()], ids=repr)
def test_the_derivative_of_the_prox(kind: Any, at: str) -> None:
    w, to = jnp.asarray(AT[at]), jnp.asarray(RNG.normal(size=(6, 3)))
    for step in (0.2, 0.6):
        at_size = lambda size, step=step: kind.prox(w + size * to, jnp.asarray(step + 0.7 * size))  # noqa: E731
        _, got = jax.jvp(at_size, (0.0,), (1.0,))
        np.testing.assert_allclose(got, (at_size(1e-6) - at_size(-1e-6)) / 2e-6, rtol=1e-6, atol=1e-7)


CORNERS = {"zero": np.zeros((4, 3)), "the identity": np.eye(4, 3), "2, 2, 0": matrix(2.0, 2.0, 0.0, rows=4)}


@pytest.mark.parametrize("at", slow_but(CORNERS, "2, 2, 0"))
@pytest.mark.parametrize("kind", [*EACH, ITERATED], ids=repr)
def test_no_derivative_is_nan(kind: Any, at: str) -> None:
    w = jnp.asarray(CORNERS[at])
    assert np.all(np.isfinite(jax.grad(kind.value)(w)))
    assert np.all(np.isfinite(jax.hessian(kind.value)(w)))
    if hasattr(kind, "prox"):
        for step in (0.0, 0.3, 2.0):
            for slope in jax.jacobian(kind.prox, (0, 1))(w, jnp.asarray(step)):
                assert np.all(np.isfinite(slope))


def test_the_gradient_of_the_nuclear_norm_is_zero_on_singular_values_that_are_only_rounding() -> None:
    for dtype in (jnp.float32, jnp.float64):
        left, right = (jnp.asarray(RNG.normal(size=shape), dtype) for shape in ((50, 2), (2, 40)))
        s = np.linalg.svd(NuclearNorm().gradient(left @ right), compute_uv=False)
        np.testing.assert_allclose(s, [1.0] * 2 + [0.0] * 38, atol=1e-5 if dtype == jnp.float32 else 1e-13)


def test_the_largest_singular_values_share_the_gradient_if_they_are_equal() -> None:
    np.testing.assert_array_equal(SpectralNorm().gradient(2 * jnp.eye(4)), 0.5 * np.eye(4))
    testing.assert_gradient(SpectralNorm(), 2 * np.eye(4))


@pytest.mark.parametrize("size", [1e-300, 1e-20, 1e20, 1e150])
def test_at_any_size(size: float) -> None:
    w = jnp.asarray(size * matrix(3.0, 2.0))
    unit = jnp.asarray(matrix(3.0, 2.0))
    np.testing.assert_allclose(NuclearNorm().value(w), 5 * size, rtol=1e-13)
    np.testing.assert_allclose(NuclearNorm().gradient(w), NuclearNorm().gradient(unit), rtol=1e-12)
    for kind in (SpectralNorm(), SpectralNorm(iterations=60)):
        np.testing.assert_allclose(kind.gradient(w) / size, SpectralNorm().gradient(unit), rtol=1e-11)


@pytest.mark.peers
@pytest.mark.parametrize("kind", [*EACH, SpectralNorm(iterations=60)], ids=repr)
def test_complex_matrices(kind: Any) -> None:
    u, _ = np.linalg.qr(RNG.normal(size=(5, 3)) + 1j * RNG.normal(size=(5, 3)))
    v, _ = np.linalg.qr(RNG.normal(size=(3, 3)) + 1j * RNG.normal(size=(3, 3)))
    s = np.array([3.0, 2.0, 0.5])
    of = lambda s: (u * s) @ v.conj().T  # noqa: E731
    w = jnp.asarray(of(s))
    value, slope = {
        NuclearNorm: (5.5, np.ones(3)),
        SpectralNorm: (4.5, np.array([3.0, 0, 0])),
        Orthogonality: (np.sum((s**2 - 1) ** 2) / 4, s * (s**2 - 1)),
    }[type(kind)]
    np.testing.assert_allclose(kind.value(w), value, rtol=1e-13)
    np.testing.assert_allclose(kind.gradient(w), of(slope), rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(np.conj(jax.grad(kind.value)(w)), of(slope), rtol=1e-11, atol=1e-13)
    if isinstance(kind, NuclearNorm):
        np.testing.assert_allclose(kind.prox(w, jnp.asarray(1.0)), of(np.array([2.0, 1.0, 0])), atol=1e-13)
    if isinstance(kind, SpectralNorm):  # Cut to 2.25: 0.75 = 2.25 / 3.
        np.testing.assert_allclose(kind.prox(w, jnp.asarray(1 / 3)), of(np.array([2.25, 2.0, 0.5])), atol=1e-13)


def test_products_have_full_precision() -> None:
    w = jnp.ones((4, 3), jnp.float32)
    for kind in (*EACH, ITERATED):
        for function in (kind.gradient, kind.value):
            products = [line for line in str(jax.make_jaxpr(function)(w)).splitlines() if "precision=" in line]
            assert all("HIGHEST" in line for line in products)


# Power iterations.


def test_an_iteration_multiplies_the_error_by_the_square_of_the_ratio_of_singular_values() -> None:
    w = jnp.asarray(matrix(2.0, 1.8, 0.5))
    exact = SpectralNorm()
    errors = []
    for count in (20, 21, 22):
        kind = SpectralNorm(iterations=count)
        assert kind.value(w) <= exact.value(w)
        of_gradient = float(jnp.max(jnp.abs(kind.gradient(w) - exact.gradient(w))))
        errors.append((of_gradient, float(exact.value(w) - kind.value(w))))
    ratios = np.array(errors[1:]) / np.array(errors[:-1])
    np.testing.assert_allclose(ratios, [[0.9**2, 0.9**4]] * 2, rtol=2e-2)


GAPS = {
    "tall": matrix(3.0, 1.0),
    "wide": matrix(3.0, 1.0).T,
    "orthogonal to ones": np.array([[1.0, -1.0]] * 3),
    "a diagonal": np.diag([1.0, 2.0]),
}


@pytest.mark.parametrize("name", GAPS)
def test_enough_iterations_are_exact(name: str) -> None:
    w = GAPS[name]
    kind = SpectralNorm(iterations=40)
    np.testing.assert_allclose(kind.value(jnp.asarray(w)), SpectralNorm().value(jnp.asarray(w)), rtol=1e-14)
    found = kind.gradient(jnp.asarray(w))
    np.testing.assert_allclose(found, SpectralNorm().gradient(jnp.asarray(w)), atol=1e-14)
    np.testing.assert_allclose(jax.grad(kind.value)(jnp.asarray(w)), found, rtol=1e-14)
    testing.assert_gradient(kind, w)


def test_iterations_from_one_start_are_the_usual_persistent_vector_where_they_have_converged() -> None:
    # The usual code makes one iteration in each step, from the vector of the last step.
    w, v, noise = matrix(3.0, 1.0), np.random.default_rng(1).normal(size=2), 0.01 * RNG.normal(size=(60, 6, 2))
    optimizer = optax.chain(wdjax.add_penalty_to_grads(SpectralNorm(iterations=30), 0.01), optax.sgd(0.1))
    params, state, update = jnp.asarray(w), optimizer.init(jnp.asarray(w)), jax.jit(optimizer.update)
    for step in range(60):
        u = w @ v / np.linalg.norm(w @ v)
        v = w.T @ u / np.linalg.norm(w.T @ u)
        w = w - 0.1 * (noise[step] + 0.01 * (u @ w @ v) * np.outer(u, v))
        updates, state = update(jnp.asarray(noise[step]), state, params)
        params = optax.apply_updates(params, updates)
    assert 0 < np.max(np.abs(params - w)) < 2e-3


def test_iterations_within_shard_map_on_a_matrix_that_is_whole() -> None:
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    w = jnp.asarray(RNG.normal(size=(2, 4, 3)))
    for kind in (*EACH, ITERATED):
        of_each = jax.shard_map(jax.vmap(kind.gradient), mesh=mesh, in_specs=P("data"), out_specs=P("data"))
        np.testing.assert_allclose(jax.jit(of_each)(w), jax.vmap(kind.gradient)(w), rtol=1e-10, atol=1e-13)


# Errors.


@pytest.mark.parametrize("kind", [*EACH, ITERATED], ids=repr)
def test_a_vector_is_refused_in_every_place(kind: Any) -> None:
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    said = rf"^{type(kind).__name__}\(per=-1.*\): an array of shape \(2,\) is not a matrix. Use a mask to select"
    with pytest.raises(ValueError, match=said):
        wdjax.penalty(params, kind, 0.1)
    places = [wdjax.add_penalty_to_grads(kind, 0.1)]
    if hasattr(kind, "prox"):
        places.append(wdjax.proximal_step(kind, 0.1, learning_rate=0.1))
    for place in places:
        with pytest.raises(ValueError, match=said):
            place.update(params, place.init(params), params)
    assert np.isfinite(wdjax.penalty(params, kind, 0.1, wdjax.weights_only()))
    with pytest.raises(ValueError, match=r"per=2 is out of range for a 2-dimensional array"):
        type(kind)(per=2).value(jnp.ones((2, 2)))


def test_what_is_given_wrongly_is_named() -> None:
    for given in (0.5, "out", None, [0]):
        with pytest.raises(TypeError, match=r"^NuclearNorm: per must be an integer or .* Write NuclearNorm\(per=-1\)"):
            NuclearNorm(per=given)  # pyright: ignore[reportArgumentType]
    for given in (0.5, "many", True, jnp.ones(2)):
        with pytest.raises(TypeError, match=r"^SpectralNorm: iterations must be an integer or None, got .* Write Spec"):
            SpectralNorm(iterations=given)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"static_args=\('iterations',\)"):
        SpectralNorm(iterations=jnp.ones(2))  # pyright: ignore[reportArgumentType]
    for count in (0, -1, 2**31):
        with pytest.raises(ValueError, match=rf"^SpectralNorm: iterations .* 1, and below 2\*\*31, got {count}. Write"):
            SpectralNorm(iterations=count)
    with pytest.raises(TypeError, match=r"^proximal_step: kind must be a penalty.*|^proximal_step: Orthogonality has"):
        wdjax.proximal_step(Orthogonality(), 0.1, learning_rate=0.1)  # pyright: ignore[reportArgumentType]
    rows = {"kernel": np.array([[0.1], [0.2]])}
    for kind in EACH:
        with pytest.raises(ValueError, match=r"a strength of shape \(2, 1\) differs within a group of .*Give one"):
            wdjax.penalty({"kernel": jnp.ones((2, 2))}, kind, rows)


def test_they_are_written_as_they_were_made() -> None:
    for written in ("NuclearNorm(per=(1, 2))", "SpectralNorm(per=-1, iterations=5)", "Orthogonality(per=0)"):
        kind = eval(written, {cls.__name__: cls for cls in map(type, EACH)})
        assert repr(kind) == written
        assert kind == eval(repr(kind), {cls.__name__: cls for cls in map(type, EACH)})
    assert SpectralNorm(iterations=np.int64(5)) == SpectralNorm(iterations=5)
