"""The oracles and assertions that users call: right about what is right, and red about what is wrong."""

import dataclasses
import importlib
import math
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib
from registry import KINDS
from slow import slow_but

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


@pytest.mark.filterwarnings("ignore:.*rounding changes the decay")
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


@dataclasses.dataclass(frozen=True)
class Own:
    """A penalty of three functions. Those that are None are left out."""

    value: Callable[..., Any] | None = lambda w: jnp.sum(jnp.logaddexp(w, -w) - math.log(2))
    gradient: Callable[..., Any] | None = jnp.tanh
    prox: Callable[..., Any] | None = lambda w, step: newton(w, step, start=towards_zero(w, step))


def newton(w: Any, step: Any, start: Any, count: int = 8) -> Any:
    """The proximal map of log cosh, if it starts well."""
    v = start
    for _ in range(count):
        pull = jnp.tanh(v)
        v = v - (v - w + step * pull) / (1 + step * (1 - pull**2))
    return v


def towards_zero(w: Any, step: Any) -> Any:
    return jnp.sign(w) * jnp.maximum(jnp.abs(w) - step, jnp.abs(w) / (1 + step))


LOG_COSH = Own()
NON_NEGATIVE = Own(
    lambda w: 0.5 * jnp.sum(jnp.minimum(w, 0) ** 2),
    lambda w: jnp.minimum(w, 0),
    lambda w, step: jnp.where(w < 0, w / (1 + step), w),
)
SMOOTH_L1 = Own(lambda w: jnp.sum(jnp.sqrt(w**2 + 1e-6) - 1e-3), gradient=None, prox=None)
ORTHOGONAL = Own(lambda w: jnp.sum((w.T @ w - jnp.eye(3)) ** 2) / 4, lambda w: w @ (w.T @ w) - w, None)
RIGHT_PENALTIES: dict[str, Any] = {
    **{name: kind.penalty for name, kind in KINDS.items()},
    "GroupLasso of outputs": wdjax.GroupLasso(per=-1),
    "log cosh": LOG_COSH,
    "non-negative": NON_NEGATIVE,
    "smooth L1": SMOOTH_L1,
    "orthogonal": ORTHOGONAL,
}


@pytest.mark.parametrize("name", slow_but(RIGHT_PENALTIES, *KINDS, "log cosh", "smooth L1"))
def test_a_right_penalty_passes(name: str) -> None:
    kind = RIGHT_PENALTIES[name]
    testing.assert_gradient(kind)
    if getattr(kind, "prox", None) is not None:
        testing.assert_prox(kind)


def test_assertions_about_penalties_are_the_same_where_float64_is_on() -> None:
    with jax.enable_x64(True):
        testing.assert_gradient(LOG_COSH)
        testing.assert_prox(LOG_COSH, np.array([[3.0, -4.0]]), steps=2.0)
        assert jax.config.jax_enable_x64
    assert not jax.config.jax_enable_x64


def of_l1(threshold: float) -> Callable[..., Any]:
    return lambda w, step: wdjax.L1().prox(w, threshold * step)


L1 = Own(wdjax.L1().value, wdjax.L1().gradient)
GROUPS = Own(wdjax.GroupLasso().value, wdjax.GroupLasso().gradient)
TWO_WELLS = Own(lambda w: jnp.sum((w**2 - 1) ** 2), None)
WRONG_GRADIENTS: dict[str, tuple[Any, str]] = {
    "a factor": (
        Own(gradient=lambda w: 1.0001 * jnp.tanh(w)),
        r"gradient is -?\S+ at the weight -?\S+ at \(\d, \d\), but",
    ),
    "the sign": (
        Own(gradient=lambda w: -jnp.tanh(w)),
        r"gradient is -0\.\d+ at the weight 0\.\d+ .* of value there is 0\.",
    ),
    "beyond the corner": (
        Own(wdjax.L1().value, lambda w: jnp.where(w == 0, 1.1, jnp.sign(w))),
        r"gradient is 1\.1 at the weight 0 at \(0, 0\), but the slope of value there is from -1 to 1\.",
    ),
    "an infinite value": (
        Own(lambda w: jnp.sum(jnp.log(jnp.cosh(w)))),
        r"value at weights up to 100 is inf in float32 and not \d+\.\d+, as in float64",
    ),
    "NaN at zero": (
        Own(lambda w: jnp.sqrt(jnp.sum(w**2)), None),
        r"JAX's derivative of value at the weight 0 at \(0, 0\) is nan in float64\.",
    ),
    "NaN in float32": (
        Own(gradient=lambda w: jnp.sinh(w) / jnp.cosh(w)),
        r"gradient at the weight 100 at \(3, 2\) is nan in float32 and not 1, as in float64\.",
    ),
}


@pytest.mark.parametrize("name", WRONG_GRADIENTS)
def test_a_wrong_gradient_is_seen(name: str) -> None:
    kind, words = WRONG_GRADIENTS[name]
    with pytest.raises(AssertionError, match=rf"^assert_gradient: .*Own.*: {words}"):
        testing.assert_gradient(kind)


# The slope is wrong, or it is not the lowest point, or it is not a number.
SLOPE = (
    r"moves the weight w = -?\S+ at \(\d, \d\) to v = -?\S+\. There w - v is -?\S+, "
    r"and step times the slope of value is -?"
)
WRONG_MAPS: dict[str, tuple[Any, str]] = {
    "three steps from w": (
        dataclasses.replace(LOG_COSH, prox=lambda w, step: newton(w, step, w, 3)),
        f"10, prox {SLOPE}",
    ),
    "many steps from w": (
        dataclasses.replace(LOG_COSH, prox=lambda w, step: newton(w, step, w, 50)),
        f"10, prox {SLOPE}",
    ),
    "one step too few": (
        dataclasses.replace(LOG_COSH, prox=lambda w, step: newton(w, step, towards_zero(w, step), 2)),
        f"10, prox {SLOPE}",
    ),
    "a threshold": (dataclasses.replace(L1, prox=of_l1(1.001)), rf"0\.01, prox {SLOPE}0\.01\."),
    "never zero": (
        dataclasses.replace(L1, prox=lambda w, step: w - step * jnp.sign(w)),
        rf"0\.01, prox {SLOPE}0\.01\.",
    ),
    "not yet zero": (
        dataclasses.replace(GROUPS, prox=lambda w, step: w * jnp.maximum(1 - step / (1e-9 + jnp.max(jnp.abs(w))), 0)),
        rf"0\.01, prox {SLOPE}",
    ),
    "another well": (
        # Where it is flat between two wells, it stays. Both slopes are right there.
        dataclasses.replace(TWO_WELLS, prox=lambda w, step: jnp.zeros_like(w)),
        r"10, prox moves the weight w = 0 at \(\d, \d\) to v = 0\. At v, .* is 120, but it is \S+ at another",
    ),
    "of a stretched step": (
        dataclasses.replace(NON_NEGATIVE, prox=lambda w, step: jnp.where(w < 0, w / (1 + 2 * step), w)),
        SLOPE,
    ),
    "NaN": (
        dataclasses.replace(L1, prox=lambda w, step: w - step * w / jnp.abs(w)),
        r"at the weight 0 at \(0, 0\) is nan in",
    ),
    "in float32": (
        dataclasses.replace(LOG_COSH, prox=lambda w, step: newton(w, step, towards_zero(w, step)) + 0 * jnp.exp(w)),
        r"0\.01, prox at the weight 100 at \(3, 2\) is nan in float32 and not 99\.99, as in float64\.",
    ),
}


@pytest.mark.parametrize("name", WRONG_MAPS)
def test_a_wrong_prox_is_seen(name: str) -> None:
    kind, words = WRONG_MAPS[name]
    weights, steps = (np.zeros((4, 3)), 10.0) if name == "another well" else (None, (0.01, 0.7, 10.0))
    with pytest.raises(AssertionError, match=rf"^assert_prox: .*Own.*: with step .*{words}"):
        testing.assert_prox(kind, weights, steps)


def test_a_prox_that_is_right_for_small_steps_only_is_seen_at_large_ones() -> None:
    kind = dataclasses.replace(LOG_COSH, prox=lambda w, step: newton(w, step, w, 3))
    normal = np.random.default_rng(1).normal(size=(4, 3))
    testing.assert_prox(kind, normal, steps=(0.01, 0.3))
    with pytest.raises(AssertionError, match="with step 5, prox moves"):
        testing.assert_prox(kind, normal, steps=(0.01, 0.3, 5))


def test_assertions_about_penalties_say_what_they_need() -> None:
    for needs, kind in (("value(w)", Own(value=None)), ("prox(w, step)", Own(prox=None))):
        with pytest.raises(TypeError, match=rf"^assert_prox: Own has no method {re.escape(needs)}. Add it.$"):
            testing.assert_prox(kind)
    with pytest.raises(TypeError, match=r"^assert_gradient: .*got the class L1, .*Write assert_gradient\(L1\(\), "):
        testing.assert_gradient(wdjax.L1)  # pyright: ignore[reportArgumentType]
    for w in (np.ones(2, complex), np.ones(1001), np.ones((0, 3)), "kernel", {"kernel": jnp.ones(2)}):
        with pytest.raises(ValueError, match=r"^assert_gradient: w must be an array of real numbers, .*got.*Write"):
            testing.assert_gradient(wdjax.L1(), w)
    for steps in (0.0, -1.0, (), (0.1, math.inf), [[0.1]], "0.1"):
        with pytest.raises(ValueError, match=r"^assert_prox: steps must be positive finite numbers, got .*Write"):
            testing.assert_prox(wdjax.L1(), steps=steps)  # pyright: ignore[reportArgumentType]
    for check in (testing.assert_gradient, testing.assert_prox):
        with pytest.raises(ValueError, match=r"value must return a scalar, but it returned the shape \(4, 3\)"):
            check(Own(value=lambda w: w**2))
    with pytest.raises(
        ValueError, match=r"prox must return an array of shape \(4, 3\), but it returned the shape \(\)"
    ):
        testing.assert_prox(Own(prox=lambda w, step: jnp.sum(w)))


def test_a_method_that_jit_cannot_trace_is_an_error_here() -> None:
    def prox(w: Any, step: Any) -> Any:
        return w if step < 1 else newton(w, step, towards_zero(w, step))

    with pytest.raises(jax.errors.TracerBoolConversionError):
        testing.assert_prox(Own(prox=prox))


def test_without_chex_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "chex", None)
    monkeypatch.delitem(sys.modules, "wdjax.testing")
    with pytest.raises(ImportError, match=r"pip install 'wdjax\[testing\]', or pip install chex"):
        importlib.import_module("wdjax.testing")
