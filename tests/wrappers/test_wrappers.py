"""Decay around finished optimizers: against the same decay put into the chain by hand."""

import inspect
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


# For each, its state and the words of the remedy.
REFUSED: dict[str, tuple[Any, str, str]] = {
    "lookahead": (optax.lookahead(optax.sgd(0.1), 5, 0.5), "LookaheadState", "Put the decay inside"),
    "conditionally_mask": (
        optax.transforms.conditionally_mask(optax.sgd(0.1), lambda step: step % 3 == 0),
        "ConditionallyMaskState",
        "Put the decay inside",
    ),
    "conditionally_transform": (
        optax.transforms.conditionally_transform(optax.sgd(0.1), lambda step: step % 3 == 0),
        "ConditionallyTransformState",
        "Put the decay inside",
    ),
    "mechanize": (contrib.mechanize(optax.sgd(0.1)), "MechanicState", "Put the decay inside"),
    "sam": (contrib.sam(optax.sgd(0.1), optax.sgd(0.1), sync_period=2), "SAMState", "Put the decay inside"),
    "cocob": (contrib.cocob(), "COCOBState", r"cocob\(weight_decay=0.1\)"),
    "madgrad": (contrib.madgrad(0.1), "MadgradState", r"madgrad\(weight_decay=0.1\)"),
    "dadapt_adamw": (contrib.dadapt_adamw(), "DAdaptAdamWState", r"dadapt_adamw\(weight_decay=0.1\)"),
    "prodigy": (contrib.prodigy(), "ProdigyState", r"prodigy\(weight_decay=0.1\)"),
    "momo": (contrib.momo(), "MomoState", r"momo\(weight_decay=0.1\)"),
    "momo_adam": (contrib.momo_adam(), "MomoAdamState", r"momo_adam\(weight_decay=0.1\)"),
    "dog": (contrib.dog(), "DoGState", r"dog\(weight_decay=0.1\)"),
    "dowg": (contrib.dowg(), "DoWGState", r"dowg\(weight_decay=0.1\)"),
    "layer-wise dog": (
        optax.chain(optax.scale_by_distance_over_gradients(), optax.scale_by_learning_rate(1.0)),
        "ScaleByDistanceOverGradientsState",
        r"decoupled_decay\(0.1\), optax.scale_by_distance_over_gradients",
    ),
    "rprop": (optax.rprop(0.1), "ScaleByRpropState", "independent_decay"),
    "lbfgs": (optax.lbfgs(), "ScaleByZoomLinesearchState", "l2_penalty"),
    "a line search": (
        optax.chain(optax.sgd(0.1), optax.scale_by_backtracking_linesearch(5)),
        "ScaleByBacktrackingLinesearchState",
        "l2_penalty",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("around", [lambda tx: tx, lambda tx: optax.masked(optax.MultiSteps(tx, 2), True)])  # pyright: ignore
def test_optimizers_that_no_decay_fits_around_are_refused(name: str, around: Any) -> None:
    optimizer, state, remedy = REFUSED[name]
    params = make_params()
    if name == "lookahead":
        params = optax.LookaheadParams.init_synced(params)
        around = lambda tx: tx  # noqa: E731 - masks do not know its pairs.
    wrapped = wdjax.with_decoupled_decay(around(optimizer), RATE, learning_rate=0.1)
    with pytest.raises(ValueError, match=rf"the optimizer holds a {state}, .*{remedy}"):
        wrapped.init(params)


# Learning rates that the optimizer keeps in its state.


def set_rate(state: Any, value: Any) -> Any:
    return optax.tree.set(state, lambda path, _: "hyperparams_states" not in str(path), learning_rate=value)


def injected(factory: Any) -> Any:
    return optax.inject_hyperparams(lambda learning_rate: factory(learning_rate))


def decaying(learning_rate: Any) -> Any:
    return wdjax.with_decoupled_decay(optax.adam(learning_rate), RATE, learning_rate=learning_rate)


# What goes around the optimizer whose learning rate is injected.
NESTS: dict[str, Any] = {
    "bare": lambda inject, factory: inject(factory),
    "chain": lambda inject, factory: optax.chain(optax.clip_by_global_norm(1.0), inject(factory)),
    "MultiSteps": lambda inject, factory: optax.MultiSteps(inject(factory), 2),
    "within": lambda inject, factory: inject(
        lambda learning_rate: optax.MultiSteps(factory(learning_rate), 2).gradient_transformation()
    ),
    "apply_if_finite": lambda inject, factory: optax.apply_if_finite(inject(factory), 3),
    "schedule_free": lambda inject, factory: contrib.schedule_free(inject(factory), 0.1, b1=0.9),
    "monitor": lambda inject, factory: wdjax.monitor(inject(factory)),
    "freeze": lambda inject, factory: wdjax.freeze(inject(factory), wdjax.only("bias")),
}


@pytest.mark.parametrize("nest", slow_but(NESTS, "bare", "MultiSteps", "schedule_free"))
@pytest.mark.parametrize("rate", [0.1, SCHEDULE], ids=["number", "schedule"])
def test_the_learning_rate_in_the_state_is_the_factor(nest: str, rate: Any) -> None:
    # A decay inside gets the learning rate as its argument.
    params = make_params()
    inside = NESTS[nest](lambda factory: optax.inject_hyperparams(factory)(rate), decaying)
    around = wdjax.with_decoupled_decay(
        NESTS[nest](lambda factory: injected(factory)(rate), optax.adam), RATE, learning_rate=rate
    )
    if nest == "freeze":
        around = wdjax.freeze(around, wdjax.only("bias"))

    ends = []
    for optimizer in (inside, around):

        @jax.jit
        def step(weights: Any, state: Any, i: Any, optimizer: Any = optimizer) -> Any:
            if not callable(rate):
                state = set_rate(state, 0.1 / (1.0 + i))
            updates, state = optimizer.update(grads_at(weights, i), state, weights)
            return optax.apply_updates(weights, updates), state

        weights, state = params, optimizer.init(params)
        for i in range(12):
            weights, state = step(weights, state, i)
        ends.append(weights)
    chex.assert_trees_all_close(*ends, rtol=1e-12)
    assert optax.tree.norm(jax.tree.map(jnp.subtract, ends[0], params)) > 0.1


def test_the_learning_rate_of_a_restored_or_traced_state_counts() -> None:
    params = make_params()
    optimizer = wdjax.with_decoupled_decay(injected(optax.sgd)(0.1), RATE, learning_rate=0.1)
    zeros = jax.tree.map(jnp.zeros_like, params)

    @jax.jit
    def norm_after(value: Any) -> Any:
        updates, _ = optimizer.update(zeros, set_rate(optimizer.init(params), value), params)
        return jax.tree.map(lambda p, u: p + u, params, updates)["Dense_0"]["kernel"]

    for value in (0.5, 0.0):
        kernel = params["Dense_0"]["kernel"]
        np.testing.assert_allclose(norm_after(value), kernel * (1 - value * RATE), rtol=1e-14)
    np.testing.assert_allclose(jax.grad(lambda v: norm_after(v).sum())(0.3), -RATE * kernel.sum(), rtol=1e-12)
    # The state of a restored run, and arithmetic as wide as that of a number.
    restored = jax.tree.map(np.asarray, set_rate(optimizer.init(params), jnp.float32(0.25)))
    updates, _ = optimizer.update(zeros, restored, params)
    np.testing.assert_allclose(updates["Dense_0"]["kernel"], -0.25 * RATE * kernel, rtol=1e-14)


def test_the_scale_of_reduce_on_plateau_is_a_factor() -> None:
    params = make_params()
    plateau = contrib.reduce_on_plateau(patience=2, factor=0.5, cooldown=1)
    inside = optax.chain(in_chain(optax.scale_by_adam(), 0.1), plateau)
    ends = []
    for optimizer in (
        inside,
        wdjax.with_decoupled_decay(optax.chain(optax.adam(0.1), plateau), RATE, learning_rate=0.1),
        wdjax.with_decoupled_decay(optax.chain(injected(optax.adam)(0.1), plateau), RATE, learning_rate=0.1),
    ):
        weights, state = params, optimizer.init(params)
        for i in range(12):
            updates, state = optimizer.update(grads_at(weights, i), state, weights, value=jnp.asarray(1.0))
            weights = optax.apply_updates(weights, updates)
        assert optax.tree.get(state, "scale") < 0.3
        ends.append(weights)
    chex.assert_trees_all_close(ends[0], ends[1], rtol=1e-12)
    chex.assert_trees_all_close(ends[0], ends[2], rtol=1e-12)


def labelled(one: Any, other: Any) -> Any:
    return optax.partition({"a": one, "b": other}, wdjax.by_path({"kernel": "a"}, default="b").values)


@pytest.mark.parametrize(
    ("optimizer", "fault"),
    [
        (optax.inject_hyperparams(lambda lr: optax.sgd(lr))(0.1), r"keeps \['lr'\] in its state"),
        (optax.inject_hyperparams(optax.scale)(-0.1), r"keeps \['step_size'\]"),
        (optax.inject_hyperparams(lambda eta: optax.sgd(eta))(0.1), r"keeps \['eta'\]"),
        (optax.inject_hyperparams(lambda scale: optax.sgd(0.1 * scale))(1.0), r"keeps \['scale'\]"),
        (optax.inject_hyperparams(lambda alpha: optax.sgd(alpha))(SCHEDULE), r"keeps \['alpha'\]"),
        (
            optax.inject_hyperparams(lambda lr_body, head_lr: labelled(optax.sgd(lr_body), optax.sgd(head_lr)))(1.0, 2),
            r"keeps \['lr_body', 'head_lr'\]",
        ),
        (
            optax.inject_hyperparams(contrib.muon)(0.1, adam_learning_rate=0.2),
            r"keeps \['learning_rate', 'adam_learning_rate'\]",
        ),
        (
            optax.chain(injected(optax.sgd)(0.1), optax.inject_hyperparams(optax.scale)(0.5)),
            r"keeps \['learning_rate', 'step_size'\]",
        ),
        (
            optax.chain(injected(optax.sgd)(0.1), injected(optax.sgd)(1.0)),
            r"keeps \['learning_rate', 'learning_rate'\]",
        ),
        (optax.inject_hyperparams(optax.polyak_sgd)(), r"keeps \['max_learning_rate'\]"),
        (
            optax.chain(injected(optax.sgd)(0.1), optax.scale_by_schedule(SCHEDULE)),
            "keeps a learning_rate in its state and multiplies",
        ),
        (labelled(injected(optax.sgd)(0.1), optax.sgd(0.1)), "keeps a learning rate for a part of the parameters"),
        (optax.masked(injected(optax.sgd)(0.1), True), "keeps a learning rate for a part of the parameters"),
        (
            optax.masked(optax.chain(optax.sgd(0.1), contrib.reduce_on_plateau()), True),
            "holds a ReduceLROnPlateauState for a part of the parameters",
        ),
    ],
)
def test_states_without_one_learning_rate_are_refused(optimizer: Any, fault: str) -> None:
    wrapped = wdjax.with_decoupled_decay(optimizer, RATE, learning_rate=0.1)
    with pytest.raises(ValueError, match=rf"with_decoupled_decay: the optimizer {fault}.*Put the decay inside: "):
        wrapped.init(make_params())


def test_hyperparameters_that_are_no_learning_rates_do_not_matter() -> None:
    params = make_params()
    zeros = jax.tree.map(jnp.zeros_like, params)
    for optimizer in (
        optax.inject_hyperparams(optax.noisy_sgd)(0.1, eta=0.0, key=0),
        optax.inject_hyperparams(contrib.ademamix)(0.1, alpha=5.0),
        optax.inject_hyperparams(contrib.schedule_free_adamw)(0.1, weight_lr_power=2.0),
        optax.chain(optax.inject_hyperparams(optax.scale_by_adam)(b1=0.9), optax.scale(-0.1)),
        optax.inject_hyperparams(optax.sgd, static_args="learning_rate")(0.1),
        optax.lbfgs(0.1, linesearch=None),
    ):
        wrapped = wdjax.with_decoupled_decay(optimizer, RATE, learning_rate=0.1)
        updates, _ = wrapped.update(zeros, wrapped.init(params), params)
        np.testing.assert_allclose(
            updates["Dense_0"]["kernel"], -0.1 * RATE * params["Dense_0"]["kernel"], rtol=1e-6, err_msg=str(optimizer)
        )


def test_two_learning_rates_that_differ() -> None:
    params = make_params()
    kept = injected(optax.adam)(0.1)
    for given, said in (
        (0.01, "0.01"),
        (SCHEDULE, None),
        (lambda step: 0.2 / (1 + step), "0.2 in the first step"),
        (wdjax.by_path({"kernel": 0.1}, default=0.1), "by_path"),
        (jnp.asarray(0.3), "0.3"),
    ):
        wrapped = wdjax.with_decoupled_decay(kept, RATE, learning_rate=given)
        if said is None:
            wrapped.init(params)
            continue
        with pytest.raises(ValueError, match=rf"learning_rate is {said}.* but the optimizer keeps 0\.1 in its state"):
            wrapped.init(params)
    # Values that are not known yet can't be compared; what the state rounded is not another value.
    different = wdjax.with_decoupled_decay(kept, RATE, learning_rate=0.2)
    jax.eval_shape(different.init, params)
    jax.jit(lambda lr: wdjax.with_decoupled_decay(kept, RATE, learning_rate=lr).init(params))(0.2)
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    wdjax.with_decoupled_decay(kept, 5.0, learning_rate=0.1).init(half)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`optimistic_adam` is deprecated")
def test_every_optimizer_of_optax_is_right_or_refused() -> None:
    """Each one with a learning rate, alone and injected: the decay of a step without gradients, or an error."""
    params = {"w": jnp.ones((4, 4)), "b": jnp.ones(4)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    needed = {
        "noisy_sgd": {"key": 0},
        "galore": {"rank": 2},
        "schedule_free": {"base_optimizer": optax.sgd(0.1)},
        "dog": {"init_step": ("distance", 1e-6)},
    }
    refused = set()
    for module in (optax, contrib):
        for name, factory in vars(module).items():
            arguments = getattr(inspect.signature(factory), "parameters", {}) if inspect.isfunction(factory) else {}
            # The gradients of dpsgd have an axis of examples.
            if "learning_rate" not in arguments or name.startswith(("_", "scale_by", "dpsgd")):
                continue
            other = {key: 0.0 for key in ("weight_decay",) if key in arguments} | needed.get(name, {})
            bare = factory(learning_rate=0.1, **other)
            cases = [(bare, 0.1)]
            if name not in ("galore", "schedule_free"):  # An integer, and the rate of its average only.
                static = [key for key, given in arguments.items() if inspect.isfunction(given.default)]
                cases.append((optax.inject_hyperparams(factory, static)(learning_rate=0.1, **other), 0.025))
            for optimizer, rate in cases:
                wrapped = wdjax.with_decoupled_decay(optimizer, RATE, learning_rate=0.1)
                try:
                    state = wrapped.init(params)
                except ValueError:
                    refused.add(name)
                    continue
                state = set_rate(state, jnp.asarray(rate)) if rate != 0.1 else state
                extra = {"obj_fn": lambda p: 0.0 * p["w"].sum()} if name == "sophia" else {}
                alone, _ = optimizer.update(zeros, state.inner_state, params, **extra)
                updates, _ = wrapped.update(zeros, state, params, **extra)
                change = jax.tree.map(lambda u, a, r=rate: (a - u) / (r * RATE), updates, alone)
                is_free = name.startswith("schedule_free")
                if not is_free:  # There a part of the decay goes into the average.
                    chex.assert_trees_all_close(change, params, rtol=1e-5, custom_message=name)
    assert refused == {
        "lbfgs",
        "rprop",
        "cocob",
        "madgrad",
        "dadapt_adamw",
        "prodigy",
        "momo",
        "momo_adam",
        "dog",
        "dowg",
    }


@pytest.mark.parametrize("optimizer", [0.1, optax.adam, None, "adam"])
def test_what_is_no_optimizer(optimizer: Any) -> None:
    with pytest.raises(TypeError, match=r"with_decoupled_decay: optimizer must be a finished.*optax\.adam\(1e-3\)"):
        wdjax.with_decoupled_decay(optimizer, 0.1, learning_rate=0.1)
