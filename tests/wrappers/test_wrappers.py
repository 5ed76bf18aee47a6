"""Decay around finished optimizers: against the same decay put into the chain by hand."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib
from slow import slow, slow_but

import wdjax
from wdjax import testing

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("x64")]

RATE = 0.2
SCHEDULE = optax.cosine_decay_schedule(0.1, 50)


def make_params() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {"Dense_0": {"kernel": jnp.asarray(rng.normal(size=(8, 6))), "bias": jnp.asarray(rng.normal(size=6))}}


def grads_at(params: Any, step: Any) -> Any:
    return jax.tree.map(lambda p: jnp.sin(3 * p + step), params)


def run(optimizer: Any, params: Any, steps: int = 40, grads: Any = grads_at) -> tuple[Any, Any]:
    def step(carry: Any, i: Any) -> Any:
        weights, state = carry
        updates, state = optimizer.update(grads(weights, i), state, weights)
        return (optax.apply_updates(weights, updates), state), None

    return jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), jnp.arange(steps))[0])(params)


def in_chain(scale: Any, learning_rate: Any, mask: Any = None) -> Any:
    return optax.chain(scale, wdjax.decoupled_decay(RATE, mask), optax.scale_by_learning_rate(learning_rate))


OPTIMIZERS: dict[str, tuple[Any, Any]] = {
    "adam": (lambda lr: optax.adam(lr), lambda lr, mask: in_chain(optax.scale_by_adam(), lr, mask)),
    "sgd": (lambda lr: optax.sgd(lr, momentum=0.9), lambda lr, mask: wdjax.sgdw(lr, RATE, mask, momentum=0.9)),
    "lion": (
        lambda lr: optax.lion(lr, weight_decay=0.0),
        lambda lr, mask: in_chain(optax.scale_by_lion(0.9, 0.99), lr, mask),
    ),
    "a chain": (
        lambda lr: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(lr)),
        lambda lr, mask: optax.chain(optax.clip_by_global_norm(1.0), in_chain(optax.scale_by_adam(), lr, mask)),
    ),
    "MultiSteps": (
        lambda lr: optax.MultiSteps(optax.adam(lr), 3),
        lambda lr, mask: optax.MultiSteps(wdjax.adamw(lr, RATE, mask), 3),
    ),
    "MultiSteps as a transformation in a chain": (
        lambda lr: optax.chain(optax.clip(0.5), optax.MultiSteps(optax.adam(lr), 3).gradient_transformation()),
        lambda lr, mask: optax.chain(
            optax.clip(0.5), optax.MultiSteps(wdjax.adamw(lr, RATE, mask), 3).gradient_transformation()
        ),
    ),
    "schedule_free": (
        lambda lr: contrib.schedule_free(optax.sgd(lr), 0.1),
        lambda lr, mask: contrib.schedule_free(wdjax.sgdw(lr, RATE, mask), 0.1),
    ),
    "MultiSteps of schedule_free": (
        lambda lr: optax.MultiSteps(contrib.schedule_free(optax.sgd(lr), 0.1), 3),
        lambda lr, mask: optax.MultiSteps(contrib.schedule_free(wdjax.sgdw(lr, RATE, mask), 0.1), 3),
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("learning_rate", [slow(0.1), SCHEDULE], ids=["constant", "schedule"])
@pytest.mark.parametrize("mask", [slow(None), wdjax.only("kernel")], ids=["all", "kernel"])
def test_outside_is_what_inside_would_be(name: str, learning_rate: Any, mask: Any) -> None:
    bare, inside = OPTIMIZERS[name]
    outside = wdjax.with_decoupled_decay(bare(learning_rate), RATE, mask, learning_rate=learning_rate)
    got, _ = run(outside, make_params())
    want, _ = run(inside(learning_rate, mask), make_params())
    # Schedule-free's share of the step is read off a sum of weights, kept in the dtype of the parameters.
    chex.assert_trees_all_close(got, want, rtol=1e-11, atol=1e-12)
    plain, _ = run(bare(learning_rate), make_params())
    assert np.max(np.abs(plain["Dense_0"]["kernel"] - want["Dense_0"]["kernel"])) > 0.01


def test_schedule_free_is_optax_schedule_free_adamw() -> None:
    learning_rate = 0.1
    base = optax.chain(
        optax.scale_by_rms(0.999, 1e-8, eps_in_sqrt=False, bias_correction=True),
        optax.scale_by_learning_rate(learning_rate),
    )
    ours = wdjax.with_decoupled_decay(contrib.schedule_free(base, learning_rate), RATE, learning_rate=learning_rate)
    theirs = contrib.schedule_free_adamw(learning_rate, weight_decay=RATE)
    (weights, state), (want, want_state) = run(ours, make_params()), run(theirs, make_params())
    chex.assert_trees_all_close(weights, want, rtol=1e-10, atol=1e-11)
    chex.assert_trees_all_close(
        contrib.schedule_free_eval_params(state.inner_state, weights),
        contrib.schedule_free_eval_params(want_state, want),
        rtol=1e-10,
        atol=1e-11,
    )


FINISHED: dict[str, Any] = {
    "adam": optax.adam,
    "sgd": lambda lr: optax.sgd(lr, 0.9, nesterov=True),
    "lion": lambda lr: optax.lion(lr, weight_decay=0.0),
    "adafactor": lambda lr: optax.adafactor(lr, min_dim_size_to_factor=4),
    "muon": contrib.muon,
    "adabelief": optax.adabelief,
    "partition": lambda lr: optax.partition(
        {"a": optax.adam(lr), "b": optax.sgd(lr)}, wdjax.by_path({"kernel": "a", "bias": "b"}).values
    ),
    "inject_hyperparams": lambda lr: optax.inject_hyperparams(optax.adam)(lr),
    "apply_if_finite": lambda lr: optax.apply_if_finite(optax.adam(lr), 3),
}
finished = pytest.mark.parametrize("name", slow_but(FINISHED, "adam", "adafactor", "partition", "apply_if_finite"))


@finished
@pytest.mark.parametrize("toward", [slow(None), "init"])
def test_zero_gradients_give_the_product_formula(name: str, toward: Any) -> None:
    params, start = make_params(), jax.tree.map(lambda p: p + 1, make_params())
    for learning_rate in (0.1, SCHEDULE):
        optimizer = wdjax.with_decoupled_decay(
            FINISHED[name](learning_rate), RATE, wdjax.only("kernel"), learning_rate=learning_rate, toward=toward
        )
        state = optimizer.init(start)
        weights = params
        for _ in range(10):
            updates, state = jax.jit(optimizer.update)(jax.tree.map(jnp.zeros_like, params), state, weights)
            weights = optax.apply_updates(weights, updates)
        anchor = start["Dense_0"]["kernel"] if toward else 0.0
        want = testing.decayed_weights(params["Dense_0"]["kernel"], learning_rate, RATE, 10, toward=anchor)
        # Adafactor's float32 steps of zero add nothing; the schedule's own arithmetic is float64 here.
        np.testing.assert_allclose(weights["Dense_0"]["kernel"], want, rtol=1e-12, atol=1e-12)
        np.testing.assert_array_equal(weights["Dense_0"]["bias"], params["Dense_0"]["bias"])


@finished
def test_gradients_are_not_changed_by_the_decay_around(name: str) -> None:
    # The optimizer's own state is what it would be for the same weights without a decay.
    params = make_params()
    bare = FINISHED[name](0.1)
    ours = wdjax.with_decoupled_decay(bare, RATE, learning_rate=0.1)
    updates, state = ours.update(grads_at(params, 0), ours.init(params), params)
    plain, plain_state = bare.update(grads_at(params, 0), bare.init(params), params)
    chex.assert_trees_all_equal(state.inner_state, plain_state)
    want = jax.tree.map(lambda u, p: np.asarray(u, np.float64) - 0.1 * RATE * np.asarray(p), plain, params)
    single = 1e-6 if name == "adafactor" else 1e-14  # Its updates are float32.
    chex.assert_trees_all_close(jax.tree.map(np.float64, updates), want, rtol=single, atol=single)


def test_a_step_that_is_skipped_does_not_decay_nor_count() -> None:
    params = make_params()
    optimizer = wdjax.with_decoupled_decay(optax.apply_if_finite(optax.adam(0.1), 5), RATE, learning_rate=0.1)
    state = optimizer.init(params)
    broken = jax.tree.map(lambda p: p * jnp.nan, params)
    updates, state = jax.jit(optimizer.update)(broken, state, params)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, params))
    assert state.decay.count == 0
    updates, state = jax.jit(optimizer.update)(jax.tree.map(jnp.zeros_like, params), state, params)
    chex.assert_trees_all_close(updates, jax.tree.map(lambda p: -0.1 * RATE * p, params), rtol=1e-14)
    assert state.decay.count == 1


def test_a_mini_step_that_multi_steps_skips_does_not_decay() -> None:
    params = make_params()
    accumulate = optax.MultiSteps(optax.adam(0.1), 1, should_skip_update_fn=optax.skip_not_finite)
    optimizer = wdjax.with_decoupled_decay(accumulate, RATE, learning_rate=0.1)
    state = optimizer.init(params)
    for grads, count in ((params, 1), (jax.tree.map(lambda p: p * jnp.nan, params), 1), (params, 2)):
        updates, state = jax.jit(optimizer.update)(grads, state, params)
        assert state.decay.count == count
    assert optax.tree.norm(updates) > 0


def test_extra_arguments_reach_the_optimizer() -> None:
    seen = {}

    def update(updates: Any, state: Any, params: Any = None, *, value: Any, **extra: Any) -> Any:
        seen.update(value=value, **extra)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)
    params = make_params()
    optimizer = wdjax.with_decoupled_decay(inner, RATE, learning_rate=0.1)
    optimizer.update(params, optimizer.init(params), params, value=3, other=4)
    assert seen == {"value": 3, "other": 4}


PARTS: dict[str, Any] = {
    "MultiSteps": optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
    "ApplyIfFinite": optax.apply_if_finite(optax.adam(0.1), 2),
    "ScheduleFree": contrib.schedule_free(optax.sgd(0.1), 0.1),
}


@pytest.mark.parametrize("name", PARTS)
def test_what_steps_in_part_is_refused(name: str) -> None:
    labels = wdjax.by_path({"kernel": "a"}, default="b").values
    for part in (
        optax.partition({"a": PARTS[name], "b": optax.sgd(0.1)}, labels),
        optax.chain(optax.masked(PARTS[name], wdjax.only("kernel").mask)),
    ):
        optimizer = wdjax.with_decoupled_decay(part, RATE, learning_rate=0.1)
        with pytest.raises(
            ValueError, match=rf"holds a {name}State for a part of the parameters.*Put the decay inside"
        ):
            optimizer.init(make_params())


UNDOING: dict[str, Any] = {
    "Lookahead": optax.lookahead(optax.sgd(0.1), 5, 0.5),
    "ConditionallyMask": optax.transforms.conditionally_mask(optax.sgd(0.1), lambda step: step % 3 == 0),
    "ConditionallyTransform": optax.transforms.conditionally_transform(optax.sgd(0.1), lambda step: step % 3 == 0),
    "COCOB": contrib.cocob(),
    "Mechanic": contrib.mechanize(optax.sgd(0.1)),
    "SAM": contrib.sam(optax.sgd(0.1), optax.sgd(0.1), sync_period=2),
}


@pytest.mark.parametrize("name", UNDOING)
def test_what_would_undo_or_repeat_the_decay_is_refused(name: str) -> None:
    params = make_params()
    if name == "Lookahead":
        params = optax.LookaheadParams.init_synced(params)
    optimizer = wdjax.with_decoupled_decay(UNDOING[name], RATE, learning_rate=0.1)
    with pytest.raises(ValueError, match=rf"the optimizer holds a {name}State.*Put the decay inside"):
        optimizer.init(params)


@pytest.mark.parametrize("optimizer", [0.1, optax.adam, None, "adam"])
def test_what_is_no_optimizer(optimizer: Any) -> None:
    with pytest.raises(TypeError, match=r"with_decoupled_decay: optimizer must be a finished.*optax\.adam\(1e-3\)"):
        wdjax.with_decoupled_decay(optimizer, 0.1, learning_rate=0.1)
