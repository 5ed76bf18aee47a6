"""The oracles and assertions that users call: right about what is right, and red about what is wrong."""

import importlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import wdjax
from wdjax import testing

pytestmark = pytest.mark.peers

PARAMS = {"Dense_0": {"kernel": jnp.array([[2.0, -0.5], [0.0, 1e-3]]), "bias": jnp.zeros(2)}, "step": jnp.array(3)}
FLOATS = {"Dense_0": PARAMS["Dense_0"]}
KERNEL = wdjax.only("kernel")
TABLE = wdjax.by_path({"kernel": 0.01}, default=0.0)

RIGHT: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
    "adamw": (wdjax.adamw(0.1, 0.1, KERNEL), (0.01, KERNEL), {}),
    "a table": (wdjax.adamw(0.1, 0.1, KERNEL), (TABLE,), {}),
    "two rates": (
        wdjax.sgdw(0.1, wdjax.by_path({"kernel": 0.1, "bias": 0.3})),
        (wdjax.by_path({"kernel": 0.01, "bias": 0.03}),),
        {},
    ),
    "independent": (optax.chain(optax.adam(1.0), wdjax.independent_decay(0.01, KERNEL)), (0.01, KERNEL), {}),
    "around": (wdjax.with_decoupled_decay(optax.adam(0.1), 0.1, KERNEL, learning_rate=0.1), (0.01, KERNEL), {}),
    "toward init": (wdjax.adamw(0.1, 0.1, KERNEL, toward="init"), (0.01, KERNEL), {"toward": FLOATS}),
    "cautious": (
        optax.chain(optax.scale_by_adam(), wdjax.cautious(wdjax.decoupled_decay(0.1)), optax.scale(-0.1)),
        (0.01,),
        {},
    ),
    "no decay": (optax.adam(0.1), (0.0,), {}),
    "schedule": (wdjax.adamw(optax.linear_schedule(0.1, 0.0, 10), 0.1), (0.01,), {}),
    "optax.adamw": (optax.adamw(0.1, weight_decay=0.1, mask=KERNEL.mask), (0.01, KERNEL), {}),
    "optax.lion": (optax.lion(0.1, weight_decay=0.1), (0.01,), {}),
    "muon, matrices only": (contrib.muon(0.1, weight_decay=0.1), (0.01, KERNEL), {}),
    "MultiSteps of one": (optax.MultiSteps(wdjax.adamw(0.1, 0.1), 1), (0.01,), {}),
}


@pytest.mark.parametrize("name", RIGHT)
def test_assert_only_decays_passes_what_is_right(name: str) -> None:
    optimizer, args, kwargs = RIGHT[name]
    testing.assert_only_decays(optimizer, FLOATS, *args, **kwargs)


WRONG: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any], str]] = {
    "biases decay": (
        wdjax.adamw(0.1, 0.1),
        (0.01, KERNEL),
        {},
        r"'Dense_0/bias' must stay bit-identical .*from 1.0 to 0\.99",
    ),
    "nothing decays": (optax.adam(0.1), (0.01, KERNEL), {}, "'Dense_0/kernel' must lose 0.01 .*is -?0.0 and not"),
    "L2 in Adam": (
        wdjax.adam_l2(0.1, 0.1),
        (0.01,),
        {},
        "'Dense_0/bias' must lose 0.01 .*the update of its element 0, 1.0, is -0.09999",
    ),
    "one percent off": (wdjax.adamw(0.1, 0.101), (0.01,), {}, "must lose 0.01"),
    "the wrong sign": (
        optax.chain(optax.adam(0.1), wdjax.decoupled_decay(0.01)),
        (0.01,),
        {},
        r"element 0, 1\.0, is 0\.009.* and not -0\.01.*It grows\. Is the decay on the wrong side",
    ),
    "twice": (wdjax.with_decoupled_decay(wdjax.adamw(0.1, 0.1), 0.1, learning_rate=0.1), (0.01,), {}, "must lose 0.01"),
    "toward zero, not init": (wdjax.adamw(0.1, 0.1), (0.01,), {"toward": FLOATS}, "must lose 0.01"),
    "toward init, not zero": (wdjax.adamw(0.1, 0.1, toward="init"), (0.01,), {}, "must lose 0.01"),
    "a typo in the expectation": (wdjax.adamw(0.1, 0.1), (0.01, wdjax.only("kernal")), {}, "did you mean"),
}


@pytest.mark.parametrize("name", WRONG)
def test_assert_only_decays_fails_what_is_wrong(name: str) -> None:
    optimizer, args, kwargs, words = WRONG[name]
    with pytest.raises((AssertionError, ValueError), match=rf"(?i)assert_only_decays: .*{words}"):
        testing.assert_only_decays(optimizer, FLOATS, *args, **kwargs)


@pytest.mark.filterwarnings("ignore:.*the decay rounds to nothing")
def test_assert_only_decays_sees_a_decay_that_rounds_to_nothing() -> None:
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), FLOATS)
    testing.assert_only_decays(wdjax.sgdw(0.1, 0.1), half, 0.01)
    with pytest.raises(AssertionError, match=r"no bit of it changed.*rounds to nothing in bfloat16"):
        testing.assert_only_decays(wdjax.sgdw(3e-4, 0.1), half, 3e-5)
    # Of a stack some layers may decay and others not.
    stack = {"layers": jnp.ones((3, 4, 5), jnp.bfloat16)}
    rates = 0.01 * wdjax.by_depth("layers", 0.1, axis=0)
    with pytest.raises(
        AssertionError, match=r"no bit of the part that must lose 1e-05 changed\. .* nothing in bfloat16"
    ):
        testing.assert_only_decays(wdjax.sgdw(1.0, rates), stack, rates)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("factor", [0.5, 0.9, 1.1, 2.0])
def test_assert_only_decays_sees_a_wrong_rate_in_every_precision(dtype: Any, factor: float) -> None:
    params = jax.tree.map(lambda p: p.astype(dtype), FLOATS)
    for fraction in (1e-2, 1e-3 if dtype == jnp.float16 else 1e-2):
        testing.assert_only_decays(wdjax.sgdw(0.1, 10 * fraction), params, fraction)
        with pytest.raises(AssertionError, match="must lose"):
            testing.assert_only_decays(wdjax.sgdw(0.1, 10 * fraction * factor), params, fraction)


def test_assert_only_decays_takes_an_expected_zero_for_what_it_is() -> None:
    for zero in (0.0, jnp.array(0.0), wdjax.by_path({"**": 0.0})):
        with pytest.raises(AssertionError, match="must stay bit-identical"):
            testing.assert_only_decays(wdjax.sgdw(1.0, 1e-6), FLOATS, zero)


def test_assert_only_decays_of_an_optimizer_that_keeps_the_weights_in_its_state() -> None:
    testing.assert_only_decays(contrib.schedule_free_adamw(0.1, weight_decay=0.1), FLOATS, 0.01)


def test_assert_only_decays_sees_nan() -> None:
    broken = optax.GradientTransformation(
        lambda p: optax.EmptyState(), lambda u, s, p=None: (jax.tree.map(lambda x: x * jnp.nan, u), s)
    )
    for expected in (0.0, 0.01):
        with pytest.raises(AssertionError, match=r"to nan|is nan and not"):
            testing.assert_only_decays(broken, FLOATS, expected)


def test_assert_only_decays_leaves_integers_and_holes_alone() -> None:
    params = {**PARAMS, "none": None, "empty": jnp.zeros((0, 3))}
    optimizer = optax.chain(wdjax.add_l2_to_grads(0.1, KERNEL), optax.scale(-0.1))
    params.pop("step")
    testing.assert_only_decays(optimizer, params, 0.01, KERNEL)


@pytest.mark.usefixtures("x64")
def test_assert_only_decays_in_float64_sees_the_fifteenth_digit() -> None:
    params = jax.tree.map(lambda p: p.astype(jnp.float64), FLOATS)
    testing.assert_only_decays(wdjax.sgdw(0.1, 0.1), params, 0.1 * 0.1)
    with pytest.raises(AssertionError, match="must lose"):
        testing.assert_only_decays(wdjax.sgdw(0.1, 0.1), params, 0.1 * 0.1 * (1 + 1e-11))


def test_decayed_weights_takes_numbers_sequences_and_schedules() -> None:
    rates = [0.1, 0.2, 0.3]
    want = 2.0 * 0.9 * 0.8 * 0.7
    for rate in (rates, np.array(rates), lambda step: rates[step]):
        np.testing.assert_allclose(testing.decayed_weights(2.0, rate, 1.0, 3), want, rtol=1e-15)
        np.testing.assert_allclose(testing.decayed_weights(2.0, 1.0, rate, 3), want, rtol=1e-15)
    np.testing.assert_allclose(testing.decayed_weights([3.0, 1.0], 0.5, 1.0, 2, toward=1.0), [1.5, 1.0])
    np.testing.assert_array_equal(testing.decayed_weights([3.0], 0.5, 1.0, 0), [3.0])
    with pytest.raises(ValueError, match="learning_rate has 3 values for 4 steps"):
        testing.decayed_weights(2.0, rates, 1.0, 4)


def test_without_chex_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "chex", None)
    monkeypatch.delitem(sys.modules, "wdjax.testing")
    with pytest.raises(ImportError, match=r"pip install 'wdjax\[testing\]', or pip install chex"):
        importlib.import_module("wdjax.testing")
