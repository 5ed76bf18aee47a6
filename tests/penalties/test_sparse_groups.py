"""The sparse group lasso: its two ends, which weights are zero at a solution, and other libraries beside it."""

from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from registry import soft

import wdjax
from wdjax import testing
from wdjax.penalties import SparseGroupLasso

pytestmark = pytest.mark.usefixtures("x64")

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    """What skglm and pyproximal return. `penalties.json` has the versions and the calls."""
    with np.load(Path(__file__).parent.parent / "data" / "penalties.npz") as file:
        return dict(file)


def test_it_ends_at_group_lasso_and_l1() -> None:
    w, step = jnp.asarray(RNG.normal(size=(5, 4))), jnp.asarray(0.8)
    for options in ({}, {"axis": 0}, {"per": 0}):
        for ratio, end in ((0, wdjax.GroupLasso(**options)), (1, wdjax.L1())):
            mixed = SparseGroupLasso(**options, l1_ratio=ratio)
            np.testing.assert_allclose(mixed.value(w), end.value(w), rtol=1e-15)
            np.testing.assert_array_equal(mixed.gradient(w), end.gradient(w))
            np.testing.assert_array_equal(mixed.prox(w, step), end.prox(w, step))


@pytest.mark.parametrize("per", [None, 0, -1])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_the_proximal_map_is_the_minimum_for_groups_of_all_kinds(per: Any, ratio: float) -> None:
    testing.assert_gradient(SparseGroupLasso(per=per, l1_ratio=ratio))
    testing.assert_prox(SparseGroupLasso(per=per, l1_ratio=ratio))


def test_the_proximal_map_is_the_recorded_one_of_pyproximal(recorded: Any) -> None:
    kind = SparseGroupLasso(per=-1, l1_ratio=0.3)
    for step, want in zip(recorded["steps"], recorded["L21_plus_L1"], strict=True):
        found = kind.prox(jnp.asarray(recorded["matrix"]), jnp.asarray(0.7 * step))
        np.testing.assert_allclose(found, want, rtol=1e-13)
        np.testing.assert_array_equal(found == 0, want == 0)


def solution(x: np.ndarray, y: np.ndarray, kind: Any, strength: Any, start: np.ndarray) -> np.ndarray:
    """Where proximal gradient descent on half the mean square ends."""
    rate = len(y) / np.linalg.norm(x, 2) ** 2
    optimizer = optax.chain(optax.sgd(rate), wdjax.proximal_step(kind, strength, learning_rate=rate))

    def step(carry: Any, _: Any) -> Any:
        w, state = carry
        slope = jnp.reshape(x.T @ (x @ jnp.ravel(w["w"]) - y) / len(y), start.shape)
        updates, state = optimizer.update({"w": slope}, state, w)
        return (optax.apply_updates(w, updates), state), None

    first = {"w": jnp.asarray(start)}
    return np.asarray(jax.jit(lambda w: jax.lax.scan(step, (w, optimizer.init(w)), length=6000)[0][0])(first)["w"])


def test_the_proximal_step_leads_to_the_recorded_solution_of_skglm(recorded: Any) -> None:
    kind, want = SparseGroupLasso(per=0, l1_ratio=0.4), recorded["solution"]
    found = solution(recorded["inputs"], recorded["targets"], kind, 0.5, np.ones((6, 4)))
    np.testing.assert_allclose(found, want, atol=1e-13)
    np.testing.assert_array_equal(found == 0, want == 0)
    assert np.sum(np.all(found == 0, axis=1)) == 4
    assert np.any(found[:2] == 0)


@pytest.mark.parametrize("strengths", [0.5, np.array([[0.2], [0.4], [0.1], [0.5], [0.3], [0.6]])], ids=["one", "each"])
def test_at_a_solution_the_gradients_tell_which_weights_are_zero(strengths: Any, recorded: Any) -> None:
    x, y, r = recorded["inputs"], recorded["targets"], 0.4
    w = solution(x, y, SparseGroupLasso(per=0, l1_ratio=r), {"w": strengths}, np.ones((6, 4)))
    slope, lam = (x.T @ (x @ w.ravel() - y) / len(y)).reshape(6, 4), np.broadcast_to(strengths, (6, 4))
    is_zero = np.all(w == 0, axis=1)
    rest, bound = np.linalg.norm(soft(slope, lam * r), axis=1), lam[:, 0] * (1 - r)
    assert np.all(rest[is_zero] < bound[is_zero])
    np.testing.assert_allclose(rest[~is_zero], bound[~is_zero], rtol=1e-12)
    assert 0 < np.count_nonzero(is_zero) < 6
    norm = np.linalg.norm(w, axis=1, keepdims=True)
    pull = lam * (r * np.sign(w) + (1 - r) * w / np.where(norm == 0, 1, norm))
    np.testing.assert_allclose((slope + pull)[w != 0], 0, atol=1e-12)
    inside = (w == 0) & ~is_zero[:, None]
    assert np.all(np.abs(slope[inside]) <= (lam * r)[inside])
    assert np.any(inside)


def test_a_strength_may_differ_from_group_to_group_but_not_within_one() -> None:
    w = {"w": jnp.asarray(RNG.normal(size=(3, 4)))}
    kind, rates = SparseGroupLasso(per=0), np.array([[0.1], [0.2], [0.3]])
    found = wdjax.penalty(w, kind, {"w": rates})
    each = [rate * float(kind.value(w["w"][i : i + 1])) for i, rate in enumerate(rates.ravel())]
    np.testing.assert_allclose(found, sum(each), rtol=1e-14)
    with pytest.raises(ValueError, match=r"differs within a group of SparseGroupLasso\(per=0, l1_ratio=0\.5\)"):
        wdjax.penalty(w, kind, {"w": np.ones((3, 4))})


def test_no_nan_at_zero_and_no_overflow() -> None:
    kind = SparseGroupLasso(per=0)
    w = jnp.asarray([[0.0, 0.0], [3e200, 4e200], [3e-200, 0.0]])
    norms = 0.5 * np.array([[0, 0], [1.6, 1.8], [2, 0]])
    for found in (kind.gradient(w), jax.grad(kind.value)(w)):
        np.testing.assert_allclose(found, norms, rtol=1e-14)
    np.testing.assert_allclose(kind.prox(w, jnp.asarray(1.0))[1], w[1], rtol=1e-14)
    chex.assert_tree_all_finite(jax.grad(lambda w, k: jnp.sum(kind.prox(w, k)), (0, 1))(w, 1.0))


def test_it_is_written_as_it_was_made_and_names_itself_in_errors() -> None:
    for written in (
        "SparseGroupLasso(l1_ratio=0.5)",
        "SparseGroupLasso(axis=(0, 1), l1_ratio=0.25)",
        "SparseGroupLasso(per=-1, axis_name='data', l1_ratio=0.0)",
    ):
        kind = eval(written, {"SparseGroupLasso": SparseGroupLasso})
        assert repr(kind) == written
        assert hash(kind) == hash(eval(repr(kind), {"SparseGroupLasso": SparseGroupLasso}))
    for ratio in (-0.1, 1.1, float("nan"), "0.5", True, None):
        with pytest.raises(ValueError, match=r"SparseGroupLasso: l1_ratio must .* 0 to 1, got .*L1 and GroupLasso: wr"):
            SparseGroupLasso(l1_ratio=ratio)
    with pytest.raises(TypeError, match=r"SparseGroupLasso: per must be an integer.*Write SparseGroupLasso\(per=-1\)"):
        SparseGroupLasso(per="out")
    with pytest.raises(ValueError, match=r"SparseGroupLasso: axis=1 is out of range for a 1-dimensional array.*mask"):
        SparseGroupLasso(1).value(jnp.ones(3))
