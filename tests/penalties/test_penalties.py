"""Each penalty's value, gradient and prox against its definition, in float64."""

import dataclasses
import gc
import re
import weakref
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from registry import KINDS, Kind
from slow import slow_but

import wdjax
from wdjax import testing

pytestmark = pytest.mark.usefixtures("x64")

every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
RNG = np.random.default_rng(0)


@every_kind
def test_value_is_the_definition_and_gradient_its_derivative(kind: Kind) -> None:
    w = RNG.normal(size=(4, 3))
    found = kind.penalty.gradient(jnp.asarray(w))
    np.testing.assert_allclose(kind.penalty.value(jnp.asarray(w)), kind.value(w), rtol=kind.rtol)
    np.testing.assert_allclose(found, kind.gradient(w), rtol=kind.rtol)
    chex.assert_trees_all_close(jax.grad(kind.penalty.value)(jnp.asarray(w)), found, rtol=kind.rtol)
    testing.assert_gradient(kind.penalty)


@pytest.mark.parametrize("kind", [kind for kind in KINDS.values() if kind.prox], ids=lambda kind: repr(kind.penalty))
@pytest.mark.parametrize("step", [0.01, 0.4, 5.0])
def test_prox_minimizes_what_it_says(kind: Kind, step: float) -> None:
    assert kind.prox is not None
    w = RNG.normal(size=(4, 3) if kind.is_of_matrices else 5)
    found = np.asarray(kind.penalty.prox(jnp.asarray(w), jnp.asarray(step)))
    # Singular values are exact to the rounding of the largest one, which may be all there is of a small element.
    atol = kind.rtol * np.linalg.norm(w) if kind.is_of_matrices else 1e-16
    np.testing.assert_allclose(found, kind.prox(w, step), rtol=kind.rtol, atol=atol)
    testing.assert_prox(kind.penalty, w, steps=step)


@every_kind
def test_zero_is_a_fixed_point_without_nan(kind: Kind) -> None:
    zeros = jnp.zeros((3, 2))
    found = [kind.penalty.gradient(zeros), jax.grad(kind.penalty.value)(zeros)]
    if kind.prox:
        found.append(kind.penalty.prox(zeros, jnp.asarray(0.5)))
    for result in found:
        np.testing.assert_array_equal(result, zeros)
    np.testing.assert_allclose(kind.penalty.value(zeros), kind.value(np.zeros((3, 2))), rtol=1e-14)


@pytest.mark.parametrize("axis", [None, 0, 1, -1, (0, 1)])
def test_group_lasso_zeroes_whole_groups(axis: Any) -> None:
    w = np.array([[3.0, 0.1, 4.0], [0.1, 0.2, 3.0]])
    kind = wdjax.GroupLasso(axis)
    norms = np.sqrt(np.sum(w**2, axis=axis, keepdims=True))
    np.testing.assert_allclose(kind.value(jnp.asarray(w)), norms.sum(), rtol=1e-14)
    np.testing.assert_allclose(kind.gradient(jnp.asarray(w)), w / norms, rtol=1e-14)
    found = np.asarray(kind.prox(jnp.asarray(w), jnp.asarray(0.5)))
    np.testing.assert_allclose(found, w * np.maximum(1 - 0.5 / norms, 0), rtol=1e-14)
    if axis == 0:
        np.testing.assert_array_equal(found == 0, [[False, True, False]] * 2)


# The axes that index the groups, the shape of one layer, and the axes of the norm.
PER = {
    "a dense kernel of Flax": (-1, (4, 3), (0,)),
    "a convolution of Flax": (-1, (3, 2, 4, 5), (0, 1, 2)),
    "a dense kernel of Equinox": (0, (3, 4), (1,)),
    "a convolution of Equinox": (0, (5, 4, 3, 2), (1, 2, 3)),
    "heads": ((-2, -1), (4, 2, 3), (0,)),
    "NumPy's integer": (np.int64(1), (4, 3), (0,)),
    "a bias": (-1, (3,), ()),
}


@pytest.mark.parametrize("name", slow_but(PER, "a convolution of Flax", "a convolution of Equinox", "heads"))
def test_per_names_the_axes_that_index_the_groups(name: str) -> None:
    per, shape, axis = PER[name]
    kind = wdjax.GroupLasso(per=per)
    w = RNG.normal(size=(2, *shape))  # Two layers in a stack.
    of_norm = tuple(a + 1 for a in axis)
    norms = np.sqrt(np.sum(w**2, axis=of_norm, keepdims=True))
    indexed = w[0].size // max(norms[0].size, 1)
    assert kind.groups(shape) == (norms[0].size, indexed) == wdjax.GroupLasso(axis).groups(shape)
    np.testing.assert_allclose(kind.value(jnp.asarray(w[0])), norms[0].sum(), rtol=1e-14)
    np.testing.assert_allclose(kind.gradient(jnp.asarray(w[0])), w[0] / norms[0], rtol=1e-14)
    found = kind.prox(jnp.asarray(w[0]), jnp.asarray(0.5))
    np.testing.assert_allclose(found, w[0] * np.maximum(1 - 0.5 / norms[0], 0), rtol=1e-13)
    # In a stack it counts within a layer, and a strength may differ from group to group but not within one.
    params, strengths = {"layers": jnp.asarray(w)}, np.arange(1.0, 1 + norms[0].size).reshape(norms[0].shape)
    for strength in (0.1, {"layers": 0.1 * strengths}):
        rate = strength if isinstance(strength, float) else strength["layers"]
        loss = wdjax.penalty(params, kind, strength, stacked_axes=1)
        np.testing.assert_allclose(loss, np.sum(rate * norms), rtol=1e-13)
        place = wdjax.add_penalty_to_grads(kind, strength, stacked_axes=1)
        grads, _ = place.update({"layers": jnp.zeros(w.shape)}, place.init(params), params)
        np.testing.assert_allclose(grads["layers"], rate * w / norms, rtol=1e-13)
    if axis:
        wrong = {"layers": np.ones(w.shape[1:])}
        with pytest.raises(ValueError, match=rf"differs within a group of GroupLasso\(per={re.escape(str(per))}\)"):
            wdjax.penalty(params, kind, wrong, stacked_axes=1)


def test_one_strength_for_each_output_of_kernels_of_any_rank() -> None:
    params = {"dense": jnp.ones((4, 2)), "conv": jnp.ones((3, 3, 2, 2))}
    table = wdjax.by_path({"*": np.array([1.0, 2.0])})
    found = wdjax.penalty(params, wdjax.GroupLasso(per=-1), table)
    np.testing.assert_allclose(found, 3 * np.sqrt(4) + 3 * np.sqrt(18), rtol=1e-14)


def test_group_lasso_is_written_as_it_was_made() -> None:
    for written in ("GroupLasso()", "GroupLasso(axis=(0, 1))", "GroupLasso(per=-1, axis_name='data')"):
        kind = eval(written, {"GroupLasso": wdjax.GroupLasso})
        assert repr(kind) == written
        assert hash(kind) == hash(eval(repr(kind), {"GroupLasso": wdjax.GroupLasso}))


def test_elastic_net_ends_at_l2_and_l1() -> None:
    w, step = jnp.asarray(RNG.normal(size=7)), jnp.asarray(0.3)
    for ratio, end in ((0.0, wdjax.L2()), (1.0, wdjax.L1())):
        mixed = wdjax.ElasticNet(ratio)
        chex.assert_trees_all_close(
            (mixed.value(w), mixed.gradient(w), mixed.prox(w, step)),
            (end.value(w), end.gradient(w), end.prox(w, step)),
            rtol=1e-14,
        )


@pytest.mark.peers
@every_kind
def test_complex_weights_are_shrunk_along_their_phase(kind: Kind) -> None:
    w, penalty = jnp.asarray([[3 + 4j, 0.3 - 0.4j, -1j]]), kind.penalty
    for result in (penalty.gradient(w), penalty.prox(w, jnp.asarray(0.05)) if kind.prox else w):
        ratio = np.asarray(result / w)
        np.testing.assert_allclose(ratio.imag, 0, atol=1e-15 * np.max(np.abs(ratio)))
        assert np.all(ratio.real > 0)
    # jax.grad gives the conjugate of the direction of steepest ascent.
    np.testing.assert_allclose(np.conj(jax.grad(penalty.value)(w)), penalty.gradient(w), rtol=1e-13)


def test_a_penalty_of_your_own_works_in_every_place() -> None:
    class Quartic:
        def value(self, w: Any) -> Any:
            return jnp.sum(w**4) / 4

        def gradient(self, w: Any) -> Any:
            return w**3

        def prox(self, w: Any, step: Any) -> Any:
            return w - step * w**3

    params = {"w": jnp.asarray([1.0, -2.0])}
    zero = {"w": jnp.zeros(2)}
    np.testing.assert_allclose(wdjax.penalty(params, Quartic(), 0.5), 0.5 * 17 / 4)
    place = wdjax.add_penalty_to_grads(Quartic(), 0.5)
    np.testing.assert_allclose(place.update(zero, place.init(params), params)[0]["w"], [0.5, -4.0])
    place = wdjax.proximal_step(Quartic(), 0.5, learning_rate=0.1)
    np.testing.assert_allclose(place.update(zero, place.init(params), params)[0]["w"], [-0.05, 0.4])


@pytest.mark.parametrize("size", [1e-300, 1e-20, 1.0, 1e20, 1e300])
def test_group_lasso_at_any_size(size: float) -> None:
    w = np.array([[3.0, 0.0], [4.0, 0.0]]) * size
    kind = wdjax.GroupLasso(0)
    np.testing.assert_allclose(kind.value(jnp.asarray(w)), 5 * size, rtol=1e-14)
    np.testing.assert_allclose(kind.gradient(jnp.asarray(w)), [[0.6, 0.0], [0.8, 0.0]], rtol=1e-14)
    np.testing.assert_allclose(jax.grad(kind.value)(jnp.asarray(w)), [[0.6, 0.0], [0.8, 0.0]], rtol=1e-14)
    np.testing.assert_allclose(kind.prox(jnp.asarray(w), jnp.asarray(2.5 * size)), w / 2, rtol=1e-14)


def test_group_lasso_does_not_hide_a_nan() -> None:
    w = jnp.array([[jnp.nan, 3.0], [2.0, 4.0]])
    kind = wdjax.GroupLasso(0)
    for result in (kind.gradient(w), kind.prox(w, jnp.asarray(0.5))):
        np.testing.assert_array_equal(np.isnan(result), [[True, False], [True, False]])


def test_parameters_of_a_penalty_may_be_numpys() -> None:
    w, half = jnp.ones(2, jnp.float32), np.float64(0.5)
    for kind in (wdjax.ElasticNet(half), wdjax.Huber(half), wdjax.penalties.SparseGroupLasso(l1_ratio=half)):
        found = (kind.value(w), kind.gradient(w), kind.prox(w, jnp.float32(0.1)))
        assert {x.dtype for x in found} == {w.dtype}
    assert wdjax.GroupLasso(np.int64(0)) == wdjax.GroupLasso(0)
    with pytest.raises(TypeError, match=r"GroupLasso: axis must be an integer, .*got 'in'"):
        wdjax.GroupLasso("in")
    for per in ("", [0], 1.0):
        with pytest.raises(TypeError, match=r"GroupLasso: per must be an integer, .*got .*GroupLasso\(per=-1\)"):
            wdjax.GroupLasso(per=per)
    with pytest.raises(ValueError, match=r"axis=0 names the axes of a norm and per=\(-1,\) the others.*give one"):
        wdjax.GroupLasso(0, per=(-1,))


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan"), "0.5", True])
def test_elastic_net_refuses_a_ratio_that_is_none(ratio: Any) -> None:
    with pytest.raises(ValueError, match=r"ElasticNet: l1_ratio must be a number from 0 to 1, got .*l1_ratio=0\.5"):
        wdjax.ElasticNet(ratio)


@pytest.mark.parametrize("delta", [0.0, -1.0, float("inf"), float("nan"), "1", 10**400])
def test_huber_refuses_a_delta_that_is_none(delta: Any) -> None:
    with pytest.raises(ValueError, match=r"Huber: delta must be positive and finite, got .*Huber\(delta=1\.0\)"):
        wdjax.Huber(delta)


def test_group_lasso_names_the_axis_that_an_array_lacks() -> None:
    with pytest.raises(ValueError, match=r"GroupLasso: axis=1 is out of range for a 1-dimensional array.*mask"):
        wdjax.GroupLasso(1).value(jnp.ones(3))
    for shape, per in (((3,), -2), ((3, 2), (0, 2))):
        with pytest.raises(
            ValueError, match=rf"per={re.escape(str(per))} is out of range for a {len(shape)}-dim.*mask"
        ):
            wdjax.GroupLasso(per=per).groups(shape)
    for kind in (wdjax.GroupLasso((0, -2)), wdjax.GroupLasso(per=(0, -2))):
        with pytest.raises(ValueError, match=r"\(0, -2\) names an axis twice for a 2-dimensional array"):
            kind.gradient(jnp.ones((2, 2)))


@pytest.mark.parametrize(
    "call",
    [
        lambda kind: wdjax.penalty({"w": jnp.ones(2)}, kind, 0.1),
        lambda kind: wdjax.add_penalty_to_grads(kind, 0.1),
        lambda kind: wdjax.proximal_step(kind, 0.1, learning_rate=0.1),
    ],
    ids=["penalty", "add_penalty_to_grads", "proximal_step"],
)
@pytest.mark.parametrize(("kind", "remedy"), [("l1", "L1()"), (wdjax.L2, "L2()"), (0.1, "L2()")])
def test_a_kind_that_is_no_penalty(call: Any, kind: Any, remedy: str) -> None:
    with pytest.raises(TypeError) as error:
        call(kind)
    assert "kind must be a penalty" in str(error.value)
    assert (kind.__name__ if isinstance(kind, type) else repr(kind)) in str(error.value)
    assert f"({remedy}, ...)" in str(error.value)


# A penalty of one's own needs what its place uses.


class ValueOnly:
    """sum w^4 / 4."""

    def value(self, w: Any) -> Any:
        return jnp.sum(jnp.real(w * jnp.conj(w)) ** 2) / 4


class GradientOnly:
    def gradient(self, w: Any) -> Any:
        return w**3


class ProxOnly:
    def prox(self, w: Any, step: Any) -> Any:
        return w / (1 + 2 * step)


PARAMS = {"w": jnp.array([[1.0, -2.0], [0.5, 3.0]])}
ZEROS = {"w": jnp.zeros((2, 2))}


def test_a_value_is_enough_for_the_loss_and_for_the_gradient() -> None:
    w = np.asarray(PARAMS["w"], np.float64)
    np.testing.assert_allclose(wdjax.penalty(PARAMS, ValueOnly(), 0.5), 0.125 * (w**4).sum(), rtol=1e-6)
    for kind in (ValueOnly(), GradientOnly()):
        place = wdjax.add_penalty_to_grads(kind, 0.5)
        for update in (place.update, jax.jit(place.update)):
            np.testing.assert_allclose(update(ZEROS, place.init(PARAMS), PARAMS)[0]["w"], 0.5 * w**3, rtol=1e-6)


def test_the_gradient_that_is_derived_is_a_direction_of_ascent_for_complex_weights() -> None:
    w = np.array([1.0 + 2.0j, -0.5j])
    place = wdjax.add_penalty_to_grads(ValueOnly(), 1.0)
    params = {"w": jnp.asarray(w, jnp.complex64)}
    new, _ = place.update({"w": jnp.zeros(2, jnp.complex64)}, place.init(params), params)
    np.testing.assert_allclose(new["w"], np.abs(w) ** 2 * w, rtol=1e-5)


def test_a_prox_is_enough_on_the_weights() -> None:
    place = wdjax.proximal_step(ProxOnly(), 0.5, learning_rate=1.0)
    new, _ = place.update(ZEROS, place.init(PARAMS), PARAMS)
    np.testing.assert_allclose(new["w"], -0.5 * PARAMS["w"], rtol=1e-6)


def test_what_a_place_needs_and_a_penalty_lacks_is_named() -> None:
    with pytest.raises(
        TypeError, match=r"^penalty: ProxOnly has no method value\(w\). Add it, or use proximal_step\(...\), which"
    ):
        wdjax.penalty(PARAMS, ProxOnly(), 0.5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(
        TypeError, match=r"^add_penalty_to_grads: ProxOnly has no method value\(w\) or gradient\(w\). Add it"
    ):
        wdjax.add_penalty_to_grads(ProxOnly(), 0.5)  # pyright: ignore[reportArgumentType]
    want = (
        r"^proximal_step: ValueOnly has no method prox\(w, step\). Add it, or use add_penalty_to_grads\(...\), which "
        r"needs value or gradient.$"
    )
    with pytest.raises(TypeError, match=want):
        wdjax.proximal_step(ValueOnly(), 0.5, learning_rate=1.0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"^proximal_step: ValueOnly has no method prox"):
        wdjax.proximal_step(ValueOnly, 0.5, learning_rate=1.0)  # pyright: ignore[reportArgumentType]


def test_a_class_instead_of_an_object_is_named() -> None:
    with pytest.raises(
        TypeError, match=r"got the class ProxOnly, not an object. Write proximal_step\(ProxOnly\(\), ...\).$"
    ):
        wdjax.proximal_step(ProxOnly, 0.5, learning_rate=1.0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(
        TypeError, match=r"got the class Huber.*Write penalty\(Huber\(\), ...\), with Huber from wdjax.$"
    ):
        wdjax.penalty(PARAMS, wdjax.Huber, 0.5)  # pyright: ignore[reportArgumentType]


def test_a_penalty_of_ones_own_is_for_each_layer_of_a_stack() -> None:
    class Norm:
        def value(self, w: Any) -> Any:
            return jnp.sqrt(jnp.sum(w**2))

    w = np.random.default_rng(0).normal(size=(3, 2, 2))
    params = {"layers": jnp.asarray(w, jnp.float32)}
    norms = np.sqrt((w**2).sum((1, 2)))
    found = wdjax.penalty(params, Norm(), 1.0, stacked_axes={"layers": 1})
    np.testing.assert_allclose(found, norms.sum(), rtol=1e-6)
    place = wdjax.add_penalty_to_grads(Norm(), 1.0, stacked_axes={"layers": 1})
    new, _ = place.update({"layers": jnp.zeros((3, 2, 2))}, place.init(params), params)
    np.testing.assert_allclose(new["layers"], w / norms.reshape(3, 1, 1), rtol=1e-5)
    with pytest.raises(
        ValueError, match=r"differs within a group of .*Norm. Set is_elementwise = True in Norm if its value is a sum"
    ):
        wdjax.penalty(params, Norm(), {"layers": np.full((3, 1, 1), 0.1)})


@dataclasses.dataclass
class Weighted:
    """A penalty that holds an array, and that may be changed."""

    importance: Any
    is_elementwise = True

    def value(self, w: Any) -> Any:
        return 0.5 * jnp.sum(self.importance * w**2)


def test_an_array_that_a_penalty_holds_does_not_go_with_an_array_as_the_strength() -> None:
    params = {"w": jnp.ones((3, 2))}
    held = Weighted(np.arange(6.0, dtype=np.float32).reshape(3, 2))
    np.testing.assert_allclose(wdjax.penalty(params, held, 0.1), 0.05 * 15, rtol=1e-6)
    for rate in ({"w": np.array([[0.1], [0.2], [0.3]])}, 0.1 * wdjax.by_depth("w", 0.5, axis=0)):
        with pytest.raises(ValueError, match=r"(?s)penalty: .*holds an array, 'importance'.*into the strength"):
            wdjax.penalty(params, held, rate)


def test_a_penalty_that_is_changed_acts_as_it_is_now() -> None:
    held = Weighted(np.ones((2, 2), np.float32))
    place = wdjax.add_penalty_to_grads(held, 0.1)
    for factor in (1.0, 2.0):
        held.importance = np.full((2, 2), factor, np.float32)
        new, _ = place.update(ZEROS, place.init(PARAMS), PARAMS)
        np.testing.assert_allclose(new["w"], 0.1 * factor * PARAMS["w"], rtol=1e-6)


def test_nothing_keeps_a_penalty_alive() -> None:
    held = Weighted(np.ones((2, 2), np.float32))
    alive = weakref.ref(held)
    place = wdjax.add_penalty_to_grads(held, 0.1)
    place.update(ZEROS, place.init(PARAMS), PARAMS)
    del held, place
    gc.collect()
    assert alive() is None


def test_results_of_another_shape_are_refused() -> None:
    class Wrong:
        def value(self, w: Any) -> Any:
            return w**2

        def gradient(self, w: Any) -> Any:
            return w / jnp.linalg.norm(w, axis=-1)[None]

        def prox(self, w: Any, step: Any) -> Any:
            return jnp.sum(w)

    params = {"w": jnp.ones((3, 1))}
    zeros = {"w": jnp.zeros((3, 1))}
    gradients, weights = (
        wdjax.add_penalty_to_grads(Wrong(), 0.1),
        wdjax.proximal_step(Wrong(), 0.1, learning_rate=0.1),
    )
    with pytest.raises(ValueError, match=r"Wrong.*: value must return an array of shape \(\), .* \(3, 1\)"):
        wdjax.penalty(params, Wrong(), 0.1)
    with pytest.raises(ValueError, match=r"Wrong.*: gradient must return an array of shape \(3, 1\), .* \(3, 3\)"):
        gradients.update(zeros, gradients.init(params), params)
    with pytest.raises(ValueError, match=r"Wrong.*: prox must return an array of shape \(3, 1\), .* \(\)"):
        weights.update(zeros, weights.init(params), params)


@pytest.mark.parametrize("kind", [wdjax.L1(), wdjax.Huber()], ids=repr)
@pytest.mark.peers
def test_penalties_go_into_inject_hyperparams(kind: Any) -> None:
    for build, injected in (
        (wdjax.add_penalty_to_grads, optax.inject_hyperparams(wdjax.add_penalty_to_grads)(kind=kind, strength=0.1)),
        (
            lambda kind, strength: wdjax.proximal_step(kind, strength, learning_rate=0.5),
            optax.inject_hyperparams(wdjax.proximal_step)(kind=kind, strength=0.1, learning_rate=0.5),
        ),
    ):
        plain = build(kind, 0.1)
        new, _ = injected.update(ZEROS, injected.init(PARAMS), PARAMS)
        np.testing.assert_allclose(new["w"], plain.update(ZEROS, plain.init(PARAMS), PARAMS)[0]["w"], rtol=1e-6)
