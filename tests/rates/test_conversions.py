"""Conversions between a rate and what a person knows, against closed forms, scikit-learn and the authors' code."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wdjax
from wdjax import rates, testing


def test_after_one_timescale_adamws_average_keeps_one_eth_of_a_direction() -> None:
    eta, steps = 1e-3, 1000
    rate = rates.from_timescale(steps, eta)
    assert rates.timescale(rate, eta) == pytest.approx(steps, rel=1e-15)
    # A weight after that many steps without a gradient.
    np.testing.assert_allclose(testing.decayed_weights(1.0, eta, rate, steps), math.exp(-1), rtol=1e-3)


def test_adamws_weights_are_the_moving_average_of_its_directions() -> None:
    eta, steps = 0.1, 20
    rate = rates.from_timescale(steps, eta)
    directions = np.random.default_rng(0).normal(size=(60, 3))

    def step(carry: Any, d: jax.Array) -> Any:
        w, state = carry
        update, state = optimizer.update(d, state, w)
        return (w + update, state), None

    optimizer = optax.chain(wdjax.decoupled_decay(rate), optax.scale_by_learning_rate(eta))
    with jax.enable_x64(True):
        w = jnp.zeros(3)
        w = jax.lax.scan(step, (w, optimizer.init(w)), jnp.asarray(directions))[0][0]
    average = np.zeros(3)
    for d in directions:
        average = (1 - 1 / steps) * average + (-d / rate) / steps
    np.testing.assert_allclose(w, average, rtol=1e-12)


def test_a_fraction_of_a_run_in_tokens_is_a_number_of_steps() -> None:
    tokens, batch, fraction, eta = 2e9, 500_000, 0.25, 3e-4
    rate = rates.from_tokens(tokens, eta, batch=batch, fraction=fraction)
    assert rate == pytest.approx(rates.from_timescale(fraction * tokens / batch, eta), rel=1e-14)
    # The paper's tau, from the rate back.
    assert batch / (eta * rate * tokens) == pytest.approx(fraction, rel=1e-14)
    # With everything else fixed, the rate grows with the batch and falls with the run.
    assert rates.from_tokens(tokens, eta, batch=2 * batch, fraction=fraction) == pytest.approx(2 * rate)
    assert rates.from_tokens(2 * tokens, eta, batch=batch, fraction=fraction) == pytest.approx(rate / 2)


def test_nanochats_scaling_keeps_the_fraction_of_the_run() -> None:
    # It scales the learning rate with the square root of the batch, and the decay with that times D_ref / D.
    eta, rate, batch, tokens = 0.02, 0.28, 2**19, 1e9
    fraction = batch / (eta * rate * tokens)
    bigger = math.sqrt(2)
    found = rates.from_tokens(3 * tokens, eta * bigger, batch=2 * batch, fraction=fraction)
    assert found == pytest.approx(rate * math.sqrt(2) / 3, rel=1e-14)


def test_the_normalized_rate_is_that_of_the_authors_code() -> None:
    examples, batch, epochs = 50_000, 125, 100
    batches = math.ceil(examples / batch)
    assert rates.from_normalized(0.05, batch=batch, examples=examples, epochs=epochs) == pytest.approx(
        0.05 / math.pow(batches * epochs, 0.5), rel=1e-14
    )


def test_completeps_rule_for_the_width_is_by_width_and_keeps_the_timescale() -> None:
    base, width, eta, rate = 256, 1024, 1e-3, 0.1
    multiplier = width / base
    params = {"hidden": {"kernel": jnp.ones((width, 4)), "bias": jnp.ones(4)}}
    found = (rate * wdjax.by_width(base)).values(params)
    # CompleteP: the learning rate of a hidden matrix is eta / m, and its weight decay is rate * m.
    assert found["hidden"]["kernel"] == rate / (1 / multiplier)
    assert found["hidden"]["bias"] == rate
    assert rates.timescale(found["hidden"]["kernel"], eta / multiplier) == pytest.approx(rates.timescale(rate, eta))


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("nesterov", [False, True])
def test_from_l2_is_the_asymptotic_rate_of_l2_under_momentum(momentum: float, nesterov: bool) -> None:
    eta, l2, steps = 0.1, 1e-5, 3000
    optimizer = wdjax.sgd_l2(eta, l2, momentum=momentum, nesterov=nesterov)

    def step(carry: Any, _: Any) -> Any:
        w, state = carry
        update, state = optimizer.update(jnp.zeros_like(w), state, w)
        return (w + update, state), w

    with jax.enable_x64(True):
        w = jnp.ones([])
        path = np.asarray(jax.lax.scan(step, (w, optimizer.init(w)), length=steps)[1])
    rate = rates.from_l2(l2, momentum)
    assert rate == pytest.approx(l2 / (1 - momentum), rel=1e-14)
    # To first order: the next term is eta * rate / (1 - momentum), at most 1 % here.
    removed = 1 - path[-1] / path[-2]
    np.testing.assert_allclose(removed, eta * rate, rtol=1.2 * eta * rate / (1 - momentum) + 1e-6)
    np.testing.assert_allclose(1 - path[1] / path[0], eta * l2 * (1 + momentum * nesterov), rtol=1e-9)


def test_dampening_scales_the_repeated_pull() -> None:
    eta, l2, momentum, dampening = 0.1, 1e-3, 0.9, 0.4
    before, w, buffer = 1.0, 1.0, l2  # PyTorch's first buffer is not dampened.
    for _ in range(2000):
        before = w
        w -= eta * buffer
        buffer = momentum * buffer + (1 - dampening) * l2 * w
    np.testing.assert_allclose(1 - w / before, eta * rates.from_l2(l2, momentum, dampening), rtol=0.01)
    assert rates.from_l2(l2, momentum, 1.0) == 0
    assert rates.from_l2(l2, jnp.array(momentum), dampening) == pytest.approx(l2 * 0.6 / 0.1, rel=1e-5)


@pytest.mark.parametrize(("momentum", "dampening", "words"), [(1.0, 0.0, "momentum"), (0.9, 1.5, "dampening")])
def test_a_momentum_of_one_or_a_larger_dampening_is_refused(momentum: float, dampening: float, words: str) -> None:
    with pytest.raises(ValueError, match=rf"^from_l2: {words} must be from 0 to .*from_l2\(5e-4, momentum=0\.9\)"):
        rates.from_l2(0.1, momentum, dampening)


# The prior of a Bayesian linear regression: w ~ N(0, scale^2), y ~ N(X w, noise^2).


def regression() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    x = rng.normal(size=(30, 4))
    return x, x @ rng.normal(size=4) + 0.7 * rng.normal(size=30)


def posterior_mean(x: np.ndarray, y: np.ndarray, scale: float, noise: float) -> np.ndarray:
    precision = x.T @ x / noise**2 + np.eye(x.shape[1]) / scale**2
    return np.linalg.solve(precision, x.T @ y / noise**2)


@pytest.mark.parametrize(("scale", "noise"), [(0.3, 0.7), (2.0, 0.1), (0.05, 1.0)])
def test_the_penalized_minimum_is_the_mode_of_the_posterior(scale: float, noise: float) -> None:
    x, y = regression()
    rate = rates.from_prior(scale, len(y), noise)
    np.testing.assert_allclose(testing.ridge_solution(x, y, rate), posterior_mean(x, y, scale, noise), rtol=1e-12)
    assert rates.prior_scale(rate, len(y), noise) == pytest.approx(scale, rel=1e-14)


def test_training_with_l2_in_the_gradient_goes_to_the_mode_of_the_posterior() -> None:
    x, y = regression()
    with jax.enable_x64(True):
        optimizer = wdjax.sgd_l2(0.3, rates.from_prior(0.3, len(y), 0.7))
        loss = jax.grad(lambda w: jnp.mean((jnp.asarray(x) @ w - jnp.asarray(y)) ** 2) / 2)

        def step(carry: Any, _: Any) -> Any:
            w, state = carry
            update, state = optimizer.update(loss(w), state, w)
            return (w + update, state), None

        w = jnp.zeros(4)
        w = jax.lax.scan(step, (w, optimizer.init(w)), length=1000)[0][0]
    np.testing.assert_allclose(w, posterior_mean(x, y, 0.3, 0.7), rtol=1e-9)


def test_scikit_learns_bayesian_ridge_has_the_same_weights_and_scale() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = regression()
    peer = linear_model.BayesianRidge(fit_intercept=False, tol=1e-12, max_iter=10_000).fit(x, y)
    scale, noise = peer.lambda_**-0.5, peer.alpha_**-0.5
    rate = rates.from_prior(scale, len(y), noise)
    # The coefficients belong to the precisions of the last iteration but one.
    np.testing.assert_allclose(testing.ridge_solution(x, y, rate), peer.coef_, rtol=1e-6)
    np.testing.assert_allclose(linear_model.Ridge(alpha=rate * len(y), fit_intercept=False).fit(x, y).coef_, peer.coef_)


def test_scikit_learns_logistic_regression_has_the_square_of_the_scale_as_its_c() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = regression()
    labels = y > 0
    scale = 0.4
    peer = linear_model.LogisticRegression(C=scale**2, fit_intercept=False, tol=1e-10, max_iter=1000).fit(x, labels)

    def loss(w: jax.Array) -> jax.Array:
        errors = optax.sigmoid_binary_cross_entropy(jnp.asarray(x) @ w, jnp.asarray(labels, w.dtype))
        return jnp.mean(errors) + wdjax.l2_penalty(w, rates.from_prior(scale, len(y)))

    with jax.enable_x64(True):
        slope = jax.grad(loss)(jnp.asarray(peer.coef_[0]))
        elsewhere = jax.grad(loss)(jnp.asarray(1.01 * peer.coef_[0]))
    assert np.abs(slope).max() < 1e-7 < 1e-4 < np.abs(elsewhere).max()


# What they take.

CONVERSIONS: dict[str, Callable[[Any, Any], Any]] = {
    "from_timescale": rates.from_timescale,
    "timescale": rates.timescale,
    "from_tokens": lambda a, b: rates.from_tokens(a, b, batch=0.5, fraction=0.25),
    "from_normalized": lambda a, b: rates.from_normalized(a, batch=b, examples=100, epochs=3),
    "from_prior": lambda a, b: rates.from_prior(a, 100, b),
    "prior_scale": lambda a, b: rates.prior_scale(a, 100, b),
    "equilibrium_rms": rates.equilibrium_rms,
    "equilibrium_angle": rates.equilibrium_angle,
}


@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)
def test_numbers_give_a_float_and_traced_arrays_the_same(convert: Callable[[Any, Any], Any]) -> None:
    known = convert(np.float32(0.5), 2)
    assert isinstance(known, float)
    for dtype in ("float32", "bfloat16"):
        traced = jax.jit(convert)(jnp.asarray(0.5, dtype), jnp.asarray(2, "int32"))
        assert traced.dtype == jnp.float32
        np.testing.assert_allclose(traced, known, rtol=1e-6)


@pytest.mark.parametrize("wrong", [0, -1.0, np.nan, np.inf, jnp.zeros(())])
@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)
def test_what_is_not_positive_is_refused_with_its_value(convert: Callable[[Any, Any], Any], wrong: Any) -> None:
    for arguments in ((wrong, 0.5), (0.5, wrong)):
        with pytest.raises(ValueError, match=r"must be a number > 0, and finite, got .*\. Write \w+\("):
            convert(*arguments)


def test_a_schedule_is_refused_with_the_remedy() -> None:
    with pytest.raises(TypeError, match=r"learning_rate must be a number > 0.*Of a learning-rate schedule, give"):
        rates.from_timescale(1000, optax.linear_schedule(0.1, 0.0, 10))
    with pytest.raises(ValueError, match=r"equilibrium_angle: b1 must be less than 1, got 1.0"):
        rates.equilibrium_angle(0.1, 0.1, 1.0)


NO_NUMBERS = {
    "a boolean": True,
    "an array of a boolean": np.array(True),
    "a JAX array of a boolean": jnp.array(True),
    "a text": np.array("0.5"),
    "a key": jax.random.key(0),
    "complex": jnp.complex64(1),
}


@pytest.mark.parametrize("wrong", NO_NUMBERS.values(), ids=NO_NUMBERS)
def test_what_is_no_number_is_refused(wrong: Any) -> None:
    for convert in CONVERSIONS.values():
        with pytest.raises(TypeError, match=r"must be a number > 0, got .*\. Write \w+\("):
            convert(wrong, 0.5)


def test_an_integer_too_large_for_a_float_and_a_known_array_for_b1() -> None:
    with pytest.raises(ValueError, match="from_timescale: steps must be a number > 0, and finite, got 1000"):
        rates.from_timescale(10**400, 0.1)
    with pytest.raises(ValueError, match="equilibrium_angle: b1 must be less than 1, got 2"):
        rates.equilibrium_angle(0.1, 0.1, jnp.float32(2))


@pytest.mark.usefixtures("x64")
def test_arrays_of_several_dtypes_meet() -> None:
    narrow, wide = jnp.float32(0.5), jnp.asarray(0.25, jnp.float64)
    for convert in CONVERSIONS.values():
        for arguments in ((narrow, wide), (wide, narrow)):
            np.testing.assert_allclose(convert(*arguments), convert(*map(float, arguments)), rtol=1e-6)
    for follow in (rates.relative, rates.corrected):
        assert jnp.result_type(follow(wide, narrow, peak=0.5)) == jnp.float32
        assert jnp.result_type(follow(narrow, wide, peak=jnp.float32(0.5))) == jnp.float64
        assert jnp.result_type(follow(narrow, narrow, peak=wide)) == jnp.float32
