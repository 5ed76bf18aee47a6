"""The audit: what it says of optimizers whose decay is known, and what it finds in those that are wrong."""

import json
import re
import sys
import time
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from optax import contrib
from slow import slow_but

import wdjax
from wdjax import testing
from wdjax.audits import _progress
from wdjax.audits._probes import Probes
from wdjax.penalties import Lp, SparseGroupLasso

pytestmark = pytest.mark.peers

LR, WD = 0.1, 0.01
WEIGHTS = wdjax.weights_only()
SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, LR, 100, 1000)


def make_params(dtype: Any = jnp.float32) -> Any:
    return {
        "Dense_0": {"kernel": jnp.ones((8, 6), dtype), "bias": jnp.zeros(6, dtype)},
        "norm": {"scale": jnp.ones(6, dtype)},
    }


def names(audit: wdjax.Audit) -> set[str]:
    return {finding.name for finding in audit.findings}


def in_chain(*places: Any) -> Any:
    return optax.chain(*places)


SGD = optax.sgd(LR)
# The optimizer, and rate, place, kind and toward of the kernel.
KNOWN: dict[str, tuple[Any, tuple[float, str, str, str]]] = {
    "adamw": (wdjax.adamw(LR, WD, WEIGHTS), (LR * WD, "update", "L2", "zero")),
    "adamw toward init": (wdjax.adamw(LR, WD, WEIGHTS, toward="init"), (LR * WD, "update", "L2", "init")),
    "adamw toward a tree": (wdjax.adamw(LR, WD, WEIGHTS, toward=make_params()), (LR * WD, "update", "L2", "a tree")),
    "sgdw": (wdjax.sgdw(LR, WD, WEIGHTS, momentum=0.9), (LR * WD, "update", "L2", "zero")),
    "sgd_l2, momentum": (wdjax.sgd_l2(LR, WD, WEIGHTS, momentum=0.9), (LR * WD, "gradient", "L2", "zero")),
    "sgd_l2, momentum, toward init": (
        wdjax.sgd_l2(LR, WD, WEIGHTS, momentum=0.9, toward="init"),
        (LR * WD, "gradient", "L2", "init"),
    ),
    "independent": (in_chain(optax.adam(LR), wdjax.independent_decay(WD, WEIGHTS)), (WD, "update", "L2", "zero")),
    "continuous": (
        in_chain(optax.adam(LR), wdjax.continuous_decay(WD, WEIGHTS, learning_rate=LR)),
        (1 - np.exp(-LR * WD), "update", "L2", "zero"),
    ),
    "cautious": (
        in_chain(optax.adam(LR), wdjax.cautious(wdjax.independent_decay(WD, WEIGHTS))),
        (WD, "update", "cautious L2", "zero"),
    ),
    "around": (
        wdjax.with_decoupled_decay(optax.adafactor(LR), WD, WEIGHTS, learning_rate=LR),
        (LR * WD, "update", "L2", "zero"),
    ),
    "in an MultiSteps": (optax.MultiSteps(wdjax.adamw(LR, WD, WEIGHTS), 3), (LR * WD, "update", "L2", "zero")),
    "in apply_if_finite": (optax.apply_if_finite(wdjax.adamw(LR, WD, WEIGHTS), 3), (LR * WD, "update", "L2", "zero")),
    "in inject_hyperparams": (
        optax.inject_hyperparams(wdjax.adamw)(LR, WD, mask=WEIGHTS),
        (LR * WD, "update", "L2", "zero"),
    ),
    "schedule-free": (
        wdjax.with_decoupled_decay(optax.contrib.schedule_free(optax.sgd(LR), LR), WD, WEIGHTS, learning_rate=LR),
        (LR * WD, "update", "L2", "zero"),
    ),
    "clipped": (
        in_chain(optax.clip_by_global_norm(1.0), wdjax.adamw(LR, WD, WEIGHTS)),
        (LR * WD, "update", "L2", "zero"),
    ),
    "proximal L2, as a decay of k / (1 + k)": (
        in_chain(SGD, wdjax.proximal_step(wdjax.L2(), WD, WEIGHTS, learning_rate=LR)),
        (LR * WD / (1 + LR * WD), "update", "L2", "zero"),
    ),
}
# Of these the rate depends on the weight: place and kind.
OTHERS: dict[str, tuple[Any, tuple[str, str]]] = {
    "adam_l2": (wdjax.adam_l2(LR, WD, WEIGHTS), ("gradient", "L2")),
    "adam_l2 toward init": (wdjax.adam_l2(LR, WD, WEIGHTS, toward="init"), ("gradient", "L2")),
    "adagrad": (in_chain(wdjax.add_l2_to_grads(WD, WEIGHTS), optax.adagrad(LR)), ("gradient", "L2")),
    "rmsprop": (in_chain(wdjax.add_l2_to_grads(WD, WEIGHTS), optax.rmsprop(LR)), ("gradient", "L2")),
    "sign, which tells nothing": (
        in_chain(wdjax.add_l2_to_grads(WD, WEIGHTS), optax.lion(LR, weight_decay=0.0)),
        ("gradient", "unknown"),
    ),
    "elastic net, adapted": (
        in_chain(wdjax.add_penalty_to_grads(wdjax.ElasticNet(0.5), WD, WEIGHTS), optax.adam(LR)),
        ("gradient", "other"),
    ),
    "Huber, adapted": (
        in_chain(wdjax.add_penalty_to_grads(wdjax.Huber(0.5), WD, WEIGHTS), optax.adam(LR)),
        ("gradient", "Huber"),
    ),
    "L1": (in_chain(wdjax.add_penalty_to_grads(wdjax.L1(), WD, WEIGHTS), SGD), ("update", "L1")),
    "Huber": (in_chain(wdjax.add_penalty_to_grads(wdjax.Huber(0.5), WD, WEIGHTS), SGD), ("update", "Huber")),
    "group": (in_chain(wdjax.add_penalty_to_grads(wdjax.GroupLasso(), WD, WEIGHTS), SGD), ("update", "norm")),
    "sparse group": (in_chain(wdjax.add_penalty_to_grads(SparseGroupLasso(), WD, WEIGHTS), SGD), ("update", "norm")),
    "power": (in_chain(wdjax.add_penalty_to_grads(Lp(1.5), WD, WEIGHTS), SGD), ("update", "other")),
    "elastic net": (in_chain(wdjax.add_penalty_to_grads(wdjax.ElasticNet(0.5), WD, WEIGHTS), SGD), ("update", "other")),
    "L1, adapted": (in_chain(wdjax.add_penalty_to_grads(wdjax.L1(), WD, WEIGHTS), optax.adam(LR)), ("gradient", "L1")),
    "proximal L1": (
        in_chain(SGD, wdjax.proximal_step(wdjax.L1(), WD, WEIGHTS, learning_rate=LR)),
        ("weights", "L1"),
    ),
    "proximal group": (
        in_chain(SGD, wdjax.proximal_step(wdjax.GroupLasso(), WD, WEIGHTS, learning_rate=LR)),
        ("weights", "norm"),
    ),
}


@pytest.mark.parametrize(
    "name",
    slow_but(
        KNOWN, "adamw", "adamw toward init", "sgd_l2, momentum", "independent", "in an MultiSteps", "schedule-free"
    ),
)
def test_what_is_known_is_measured(name: str) -> None:
    optimizer, want = KNOWN[name]
    audit = wdjax.audit(optimizer, make_params())
    kernel = audit["Dense_0/kernel"]
    np.testing.assert_allclose(kernel.rate, want[0], rtol=1e-5)
    assert (kernel.place, kernel.kind, kernel.toward) == want[1:]
    assert kernel.kept == 1.0
    assert audit.calls_per_step == (3 if "MultiSteps" in name else 1)
    assert not audit["Dense_0/bias"].decays
    assert not audit["norm/scale"].decays
    assert names(audit) == ({"seen by the moments"} if kernel.place == "gradient" else set())


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_in_proportion_to_the_weight(name: str) -> None:
    optimizer, want = OTHERS[name]
    audit = wdjax.audit(optimizer, make_params())
    kernel = audit["Dense_0/kernel"]
    assert (kernel.place, kernel.kind) == want
    assert kernel.rate > 0
    assert not audit["Dense_0/bias"].decays


class LogCosh:
    """A user's own penalty, sum of log cosh w, whose proximal map is found by Newton's method."""

    is_elementwise = True

    def prox(self, w: jax.Array, step: jax.Array) -> jax.Array:
        v = w
        for _ in range(20):
            v = v - (v - w + step * jnp.tanh(v)) / (1 + step / jnp.cosh(v) ** 2)
        return v


class SoftNonNegative:
    """L2 of the negative weights alone."""

    is_elementwise = True

    def prox(self, w: jax.Array, step: jax.Array) -> jax.Array:
        return jnp.where(w < 0, w / (1 + step), w)


# The kind that the audit reports for each penalty. For L2, a proximal step and a decay in the update are the same.
PROXIMAL: dict[str, tuple[Any, str]] = {
    "L2": (wdjax.L2(), "L2"),
    "L1": (wdjax.L1(), "L1"),
    "ElasticNet": (wdjax.ElasticNet(0.5), "other"),
    "GroupLasso": (wdjax.GroupLasso(), "norm"),
    "GroupLasso of rows": (wdjax.GroupLasso(per=-1), "norm"),
    "Huber(0.5)": (wdjax.Huber(0.5), "Huber"),
    "Huber(1.0)": (wdjax.Huber(1.0), "Huber"),
    "Huber, all weights beyond delta": (wdjax.Huber(0.05), "L1"),
    "SparseGroupLasso": (SparseGroupLasso(per=-1), "norm"),
    "Lp(1.5)": (Lp(1.5), "other"),
    "Lp(0.5)": (Lp(0.5), "other"),
    "LogCosh": (LogCosh(), "other"),
    "SoftNonNegative": (SoftNonNegative(), "other"),
}
BEFORE = {
    "sgd": SGD,
    "momentum": optax.sgd(LR, momentum=0.9),
    "adam": optax.adam(LR),
    "adam, slow": optax.adam(1e-3),
    "lamb": optax.lamb(LR),
}


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("name", slow_but(PROXIMAL, "ElasticNet", "Lp(0.5)", "Huber(0.5)", "LogCosh"))
def test_every_proximal_step_is_a_rule_for_the_weights(name: str, before: str) -> None:
    kind, want = PROXIMAL[name]
    audit = wdjax.audit(
        optax.chain(BEFORE[before], wdjax.proximal_step(kind, 0.1, WEIGHTS, learning_rate=LR)), make_params()
    )
    row = audit["Dense_0/kernel"]
    # If steps are small and no weight is within one step of delta, Huber in the update does the same.
    places = (
        {"update"}
        if name == "L2"
        else {"weights", "update"}
        if "Huber" in name and before in ("adam, slow", "lamb")
        else {"weights"}
    )
    assert row.place in places
    assert row.kind == want
    assert not audit.findings


def test_a_proximal_step_toward_init_is_a_rule_for_the_weights() -> None:
    for kind, want in ((wdjax.Huber(0.5), "Huber"), (LogCosh(), "other")):
        step = wdjax.proximal_step(kind, 0.1, WEIGHTS, learning_rate=LR, toward="init")
        audit = wdjax.audit(optax.chain(optax.adam(LR), step), make_params())
        row = audit["Dense_0/kernel"]
        assert (row.place, row.kind, row.toward) == ("weights", want, "init")
        assert not audit.findings


# Their decays depend on the gradient or on what the moments remember, although some end in a rule for the weights.
SCALED: dict[str, tuple[Any, str]] = {
    "lamb": (optax.lamb(LR, weight_decay=WD, mask=WEIGHTS.mask), "rescaled"),
    "lars": (optax.lars(LR, weight_decay=WD, weight_decay_mask=WEIGHTS.mask), "seen by the moments"),
    "normalized": (
        optax.chain(
            optax.scale_by_adam(),
            wdjax.add_penalty_to_grads(wdjax.Huber(0.5), WD, WEIGHTS),
            wdjax.normalized_update(WEIGHTS),
            optax.scale(-LR),
        ),
        "rescaled",
    ),
    "Huber before momentum, and a proximal step": (
        optax.chain(
            wdjax.add_penalty_to_grads(wdjax.Huber(0.5), WD, WEIGHTS),
            optax.sgd(LR, momentum=0.9),
            wdjax.proximal_step(wdjax.Huber(0.5), 0.1, WEIGHTS, learning_rate=LR),
        ),
        "seen by the moments",
    ),
    "Huber before Adam": (
        optax.chain(wdjax.add_penalty_to_grads(wdjax.Huber(0.5), 1.0, WEIGHTS), optax.adam(LR)),
        "seen by the moments",
    ),
}


@pytest.mark.parametrize("name", SCALED)
def test_what_scales_the_decay_is_still_found(name: str) -> None:
    optimizer, found = SCALED[name]
    audit = wdjax.audit(optimizer, make_params())
    assert audit["Dense_0/kernel"].place == "gradient"
    assert found in names(audit)


def test_what_scales_with_the_learning_rate() -> None:
    def independent(lr: Any) -> Any:
        return optax.chain(optax.adam(lr), wdjax.independent_decay(WD))

    params = make_params()
    for build, scales in ((lambda lr: wdjax.adamw(lr, WD), True), (independent, False)):
        for learning_rate in (None, LR, SCHEDULE):
            audit = wdjax.audit(build, params, learning_rate=learning_rate)
            assert audit["Dense_0/kernel"].scales_with_learning_rate == scales
            assert ("not times the learning rate" in names(audit)) != scales
        audit = wdjax.audit(build(SCHEDULE), params, learning_rate=SCHEDULE)
        assert audit["Dense_0/kernel"].scales_with_learning_rate == scales
        assert wdjax.audit(build(LR), params)["Dense_0/kernel"].scales_with_learning_rate is None


def test_rates_follow_the_schedule_at_every_count() -> None:
    steps = (0, 50, 100, 550)
    audit = wdjax.audit(wdjax.adamw(SCHEDULE, WD, WEIGHTS), make_params(), learning_rate=SCHEDULE, steps=steps)
    row = audit["Dense_0/kernel"]
    assert [step for step, _ in row.rates] == list(steps)
    np.testing.assert_allclose(
        [rate for _, rate in row.rates], [float(SCHEDULE(step)) * WD for step in steps], rtol=1e-5
    )
    # The first call has a learning rate of 0, and so the first step is the second call.
    assert audit.first_step == 1
    np.testing.assert_allclose(row.rate, float(SCHEDULE(1)) * WD, rtol=1e-5)
    assert "0 (0) … 0.001 (100)" in str(audit)


def test_behind_moments_the_table_shows_only_the_first_rate() -> None:
    # A training has other rates at later counts: there, the moments have seen many steps.
    for optimizer in (wdjax.adam_l2(LR, WD), wdjax.sgd_l2(SCHEDULE, WD, momentum=0.9)):
        audit = wdjax.audit(optimizer, {"kernel": jnp.ones((4, 4))})
        row = audit["kernel"]
        assert row.place == "gradient"
        assert row.rates[-1][1] != pytest.approx(row.rate, rel=0.1)
        assert f"  {row.rate:.3g}  gradient  " in audit.table()


def test_the_decay_s_own_schedule() -> None:
    decay = optax.linear_schedule(0.1, 0.0, 100)
    optimizer = wdjax.with_decoupled_decay(optax.MultiSteps(optax.adam(LR), 4), decay, learning_rate=LR)
    audit = wdjax.audit(optimizer, make_params(), steps=(0, 50, 100))
    assert audit.calls_per_step == 4
    np.testing.assert_allclose(
        [rate for _, rate in audit["norm/scale"].rates], [0.01, 0.005, 0.0], rtol=1e-5, atol=1e-9
    )


WRONG: dict[str, tuple[Any, dict[str, Any], set[str], set[str]]] = {
    "wrong sign": (in_chain(optax.adam(LR), wdjax.decoupled_decay(WD, WEIGHTS)), {}, {"grows"}, {"Dense_0/kernel"}),
    "wrong sign, Optax": (
        in_chain(optax.adam(LR), optax.add_decayed_weights(WD, WEIGHTS.mask)),
        {},
        {"grows"},
        {"Dense_0/kernel"},
    ),
    "masked": (
        optax.masked(optax.adam(LR), WEIGHTS.mask),
        {},
        {"raw gradients", "no decay"},
        {"Dense_0/bias", "norm/scale"},
    ),
    "frozen in front of a decay": (
        in_chain(
            optax.masked(optax.set_to_zero(), wdjax.only("kernel").mask),
            optax.adamw(LR, weight_decay=WD, mask=WEIGHTS.mask),
        ),
        {},
        {"decays frozen"},
        {"Dense_0/kernel"},
    ),
    "to be frozen, and trained": (
        optax.adam(LR),
        {"frozen": wdjax.only("scale")},
        {"decays frozen", "no decay"},
        {"norm/scale"},
    ),
    "biases": (optax.adamw(LR), {}, {"decays non-weights"}, {"Dense_0/bias", "norm/scale"}),
    "twice": (
        wdjax.with_decoupled_decay(optax.adamw(LR, weight_decay=WD, mask=WEIGHTS.mask), WD, WEIGHTS, learning_rate=LR),
        {"expected": LR * WD, "mask": WEIGHTS},
        {"twice"},
        {"Dense_0/kernel"},
    ),
    "another rate": (
        wdjax.adamw(LR, 3 * WD, WEIGHTS),
        {"expected": LR * WD, "mask": WEIGHTS},
        {"not as expected"},
        {"Dense_0/kernel"},
    ),
    "other parameters": (
        wdjax.adamw(LR, WD, wdjax.only("scale")),
        {"expected": LR * WD, "mask": WEIGHTS},
        {"not as expected", "decays non-weights"},
        {"Dense_0/kernel", "norm/scale"},
    ),
    "behind MultiSteps": (
        in_chain(optax.MultiSteps(optax.adam(LR), 4).gradient_transformation(), wdjax.independent_decay(WD, WEIGHTS)),
        {},
        {"decays between steps"},
        {"Dense_0/kernel"},
    ),
    "overshoots": (wdjax.sgdw(10.0, 0.15, WEIGHTS), {}, {"overshoots"}, {"Dense_0/kernel"}),
    "diverges": (wdjax.sgdw(10.0, 0.25, WEIGHTS), {}, {"diverges"}, {"Dense_0/kernel"}),
    "float32, too small": (wdjax.sgdw(1e-7, 0.1, WEIGHTS), {}, {"rounds to nothing"}, {"Dense_0/kernel"}),
    "not finite": (
        optax.sgd(jnp.inf),
        {},
        {"not finite", "no decay"},
        {"Dense_0/kernel", "Dense_0/bias", "norm/scale"},
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_found(name: str) -> None:
    optimizer, options, found, paths = WRONG[name]
    audit = wdjax.audit(optimizer, make_params(), **options)
    assert names(audit) == found
    assert {path for finding in audit.findings for path in finding.paths} == paths
    harms = [finding.harm for finding in audit.findings]
    assert harms == sorted(harms, key=["wrong", "suspect", "note"].index)
    assert all(finding.remedy for finding in audit.findings)


BF16 = make_params(jnp.bfloat16)
SLOW = {"learning_rate": 3e-4, "weight_decay": 0.1, "mask": WEIGHTS}
LOW: dict[str, tuple[Any, bool]] = {
    "nothing": (wdjax.adamw(**SLOW), False),
    "in_float32 alone": (wdjax.in_float32(wdjax.adamw(**SLOW)), False),
    "Optax": (optax.adamw(3e-4, weight_decay=0.1, mask=WEIGHTS.mask), False),
    "stochastic rounding": (optax.chain(wdjax.in_float32(wdjax.adamw(**SLOW)), wdjax.stochastic_rounding(0)), True),
    "compensated": (optax.chain(wdjax.in_float32(wdjax.adamw(**SLOW)), wdjax.compensated()), True),
    "master weights": (optax.chain(wdjax.in_float32(wdjax.adamw(**SLOW)), wdjax.master_weights()), True),
    "behind the compensation": (
        optax.chain(
            wdjax.in_float32(optax.adam(3e-4)), wdjax.compensated(), optax.add_decayed_weights(-3e-5, WEIGHTS.mask)
        ),
        False,
    ),
}


@pytest.mark.filterwarnings("ignore:.*the decay rounds to nothing")
@pytest.mark.parametrize("name", slow_but(LOW, "nothing", "compensated"))
def test_whether_a_decay_survives_bfloat16(name: str) -> None:
    optimizer, survives = LOW[name]
    audit = wdjax.audit(optimizer, BF16)
    row = audit["Dense_0/kernel"]
    np.testing.assert_allclose(row.rate, 3e-5, rtol=1e-4)
    assert ("rounds to nothing" in names(audit)) != survives
    if survives:
        assert 0.8 < row.kept < 1.2
    else:
        assert row.kept == 0


def test_a_compensated_float32_keeps_the_smallest_decay() -> None:
    audit = wdjax.audit(optax.chain(wdjax.sgdw(1e-7, 0.1, WEIGHTS), wdjax.compensated()), make_params())
    assert not audit.findings


def test_a_state_that_changes_its_dtype() -> None:
    widen = optax.stateless(lambda g, p: jax.tree.map(lambda x: x.astype(jnp.float32), g))
    audit = wdjax.audit(optax.chain(widen, optax.adamw(LR, weight_decay=0.1, mask=WEIGHTS.mask)), BF16)
    finding = audit.finding("state drifts")
    assert finding is not None
    assert finding.harm == "wrong"
    assert "mu['Dense_0']['bias'] is bfloat16[6] before the first update and float32[6] after" in finding.message
    assert np.isnan(audit["Dense_0/kernel"].kept)
    assert "?" in str(audit)


def test_a_state_that_changes_its_structure() -> None:
    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return updates, (*state, jnp.zeros(2))

    growing = optax.GradientTransformation(lambda params: (), update)
    assert "state drifts" in names(wdjax.audit(optax.chain(growing, SGD), make_params()))


def test_extra_arguments_and_weights_with_gradients_that_are_nan_at_zero() -> None:
    audit = wdjax.audit(optax.contrib.momo(LR, weight_decay=0.1), make_params(), extra_args={"value": 1e6})
    np.testing.assert_allclose(audit["norm/scale"].rate, 0.01 / 1.01, rtol=1e-4)
    normalized = optax.chain(optax.contrib.normalize(), wdjax.sgdw(LR, WD, WEIGHTS))
    audit = wdjax.audit(normalized, make_params())
    assert names(audit) == {"not finite"}
    np.testing.assert_allclose(audit["Dense_0/kernel"].rate, LR * WD, rtol=1e-4)


# Trees of models.


def test_large_arrays_are_probed_by_small_copies_that_rules_take_for_the_large() -> None:
    shapes = {
        "embed": {"embedding": (50_000, 768)},
        "layers": {"mlp": {"kernel": (24, 768, 3072), "bias": (24, 3072)}, "norm": {"scale": (24, 768)}},
        "head": {"kernel": (768, 50_000)},
    }
    params = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )
    mask = wdjax.weights_only(stacked_axes={"layers": 1})
    rates = WD * wdjax.by_path({"head": 0.5, "embed": 1.0}, default=wdjax.by_depth("layers", 0.9, axis=0))
    audit = wdjax.audit(wdjax.adamw(LR, rates, mask), params, LR * rates, mask)
    assert not audit.findings
    np.testing.assert_allclose(audit["head/kernel"].rate, LR * WD / 2, rtol=1e-5)
    stack = audit["layers/mlp/kernel"]
    assert stack.shape == (24, 768, 3072)
    np.testing.assert_allclose((stack.least, stack.most), (LR * WD * 0.9**24, LR * WD * 0.9), rtol=1e-5)
    # A multiplier that goes by the true width, at a width of its own.
    widths = WD * wdjax.by_path({"layers": 1.0}, default=wdjax.by_width(128))
    audit = wdjax.audit(wdjax.adamw(LR, widths, mask), params)
    plan = wdjax.plan(params, widths, mask)
    for row in plan.parameters:
        if row.decays:
            np.testing.assert_allclose(audit[row.path].rate, LR * row.rate, rtol=1e-5)  # pyright: ignore[reportOperatorIssue]


def test_trees_that_fit_no_small_copies_are_probed_at_full_size() -> None:
    params = {"kernel": jnp.ones((300, 300))}
    audit = wdjax.audit(wdjax.adamw(LR, WD, toward=params), params)
    assert audit["kernel"].toward == "a tree"
    np.testing.assert_allclose(audit["kernel"].rate, LR * WD, rtol=1e-5)

    def wide(tree: Any) -> Any:
        return jax.tree.map(lambda p: p.shape[0] > 200, tree)

    optimizer = optax.adamw(LR, weight_decay=WD, mask=wide)
    assert not wdjax.audit(optimizer, params)["kernel"].decays
    assert wdjax.audit(optimizer, params, full_size=True)["kernel"].decays


def test_a_large_model_is_never_probed_at_full_size_unasked() -> None:
    params = {"kernel": jax.ShapeDtypeStruct((2**20, 2**20), jnp.float32)}
    with pytest.raises(ValueError, match=r"the pattern 'kernle' matches no parameter"):
        wdjax.audit(wdjax.adamw(LR, WD, wdjax.only("kernle")), params)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        if params["kernel"].shape != (2**20, 2**20):
            raise ValueError("not my shape")
        return updates, state

    picky = optax.GradientTransformation(lambda params: (), update)
    with pytest.raises(ValueError, match="not my shape") as raised:
        wdjax.audit(optax.chain(picky, SGD), params)
    assert any("full_size=True" in note for note in raised.value.__notes__)


def test_what_the_optimizer_lacks_is_said_before_anything_is_run() -> None:
    params = {"kernel": jax.ShapeDtypeStruct((50_000, 5_000), jnp.float32)}
    with pytest.raises(TypeError, match="value"):
        wdjax.audit(optax.chain(wdjax.adamw(LR, WD), optax.contrib.reduce_on_plateau()), params)


RIGHT: dict[str, tuple[Any, dict[str, Any]]] = {
    "a long warm-up": (wdjax.adamw(optax.warmup_cosine_decay_schedule(0, 3e-4, 2000, 100_000), 0.1, WEIGHTS), {}),
    "the expected rate of a warm-up": (
        wdjax.adamw(SCHEDULE, WD, WEIGHTS),
        {"expected": lambda count: SCHEDULE(count) * WD, "mask": WEIGHTS, "learning_rate": SCHEDULE},
    ),
    "noise before": (optax.chain(optax.add_noise(0.1, 0.55, 0), wdjax.adamw(LR, WD, WEIGHTS)), {}),
    "noise behind": (optax.chain(wdjax.adamw(LR, WD, WEIGHTS), optax.add_noise(1e-3, 0.55, 0)), {}),
    "updates in bfloat16": (
        optax.chain(
            wdjax.adamw(LR, WD, WEIGHTS),
            optax.stateless(lambda u, p: jax.tree.map(lambda x: x.astype(jnp.bfloat16), u)),
        ),
        {"expected": LR * WD, "mask": WEIGHTS},
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_is_let_alone(name: str) -> None:
    optimizer, options = RIGHT[name]
    audit = wdjax.audit(optimizer, make_params(), **options)
    assert not audit.findings
    kernel = audit["Dense_0/kernel"]
    assert (kernel.place, kernel.kind, kernel.toward) == ("update", "L2", "zero")


def test_right_chains_whose_first_moves_are_no_decay() -> None:
    params = make_params()
    empty = {**params, "empty": jnp.zeros((0, 3))}
    weights = wdjax.all_but("bias", "scale")
    assert not wdjax.audit(wdjax.adamw(LR, WD, weights), empty, LR * WD, weights).findings
    snapped = optax.chain(
        optax.adam(LR), optax.stateless(lambda u, p: jax.tree.map(lambda u, p: jnp.round((p + u) * 64) / 64 - p, u, p))
    )
    assert "grows" not in names(wdjax.audit(snapped, params))
    lookahead = optax.lookahead(optax.adam(LR), 5, 0.5)
    audit = wdjax.audit(lookahead, optax.LookaheadParams.init_synced(params))
    assert names(audit) == {"no decay"}
    weak = optax.stateless(lambda u, p: u)
    averaging = optax.GradientTransformation(
        lambda params: jnp.asarray(0.0), lambda u, s, p=None: (u, 0.9 * s + 0.1 * optax.tree.norm(u))
    )
    assert "state drifts" not in names(wdjax.audit(optax.chain(weak, averaging, wdjax.adamw(LR, WD, WEIGHTS)), params))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*the decay rounds to nothing")
def test_a_writer_that_would_need_more_steps_is_not_said_to_lose_the_decay() -> None:
    for writer in (wdjax.compensated(), wdjax.master_weights(), wdjax.stochastic_rounding(0)):
        audit = wdjax.audit(optax.chain(wdjax.in_float32(wdjax.adamw(2e-5, 0.01, WEIGHTS)), writer), BF16)
        assert np.isnan(audit["Dense_0/kernel"].kept)
        assert not audit.findings
    assert "rounds to nothing" in names(wdjax.audit(wdjax.in_float32(wdjax.adamw(2e-5, 0.01, WEIGHTS)), BF16))


def test_what_goes_wrong_only_in_low_precision() -> None:
    # Adam's eps of 1e-8 is 0 in float16, and 0 / 0 without a gradient.
    audit = wdjax.audit(wdjax.adamw(LR, WD, WEIGHTS), make_params(jnp.float16))
    finding = audit.finding("not finite")
    assert finding is not None
    assert set(finding.paths) == {"Dense_0/kernel", "Dense_0/bias", "norm/scale"}
    bare = optax.chain(optax.adamw(LR, weight_decay=WD, mask=WEIGHTS.mask), wdjax.compensated())
    finding = wdjax.audit(bare, BF16).finding("lost beside gradients")
    assert finding is not None
    assert finding.harm == "wrong"
    assert finding.remedy.startswith("Write optax.chain(in_float32(optimizer), compensated(...))")


def test_a_decay_that_starts_later() -> None:
    late = optax.chain(optax.adam(LR), wdjax.independent_decay(lambda count: jnp.where(count < 100, 0.0, WD), WEIGHTS))
    audit = wdjax.audit(late, make_params())
    row = audit["Dense_0/kernel"]
    np.testing.assert_allclose(row.rates, [(0, 0.0), (10, 0.0), (100, WD), (1000, WD)], rtol=1e-5)
    np.testing.assert_allclose(row.rate, WD, rtol=1e-5)
    assert (row.place, row.kind, row.toward) == ("update", "L2", "zero")
    assert names(audit) == {"starts late"}


def test_what_is_to_be_frozen_and_moves_without_decay() -> None:
    frozen = wdjax.only("bias")
    drifting = optax.stateless(lambda u, p: jax.tree.map(lambda x: x + 0.01, u))
    audit = wdjax.audit(optax.chain(wdjax.freeze(optax.adam(LR), frozen), drifting), make_params(), frozen=frozen)
    finding = audit.finding("decays frozen")
    assert finding is not None
    assert finding.paths == ("Dense_0/bias",)


@pytest.mark.slow
def test_frameworks_and_leaves_that_are_no_numbers() -> None:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Dense(3)(nn.LayerNorm()(nn.Dense(4)(x)))

    x = jnp.ones((2, 5))
    linen = Model().init(jax.random.key(0), x)["params"]
    module = nnx.state(nnx.Linear(5, 4, rngs=nnx.Rngs(0)), nnx.Param)
    equinox = eqx.filter(eqx.nn.MLP(5, 3, 4, 2, key=jax.random.key(0)), eqx.is_inexact_array)
    mixed = {
        "kernel": jnp.ones((3, 2)),
        "steps": jnp.zeros(3, jnp.int32),
        "empty": jnp.zeros((0, 4)),
        "none": None,
        "number": 2.0,
        "complex": jnp.ones((2, 3), jnp.complex64),
    }
    for params in (linen, module, equinox):
        audit = wdjax.audit(wdjax.adamw(LR, WD, WEIGHTS), params)
        planned = {row.path: row.decays for row in wdjax.plan(params, WD, WEIGHTS).parameters}
        assert {row.path: row.decays for row in audit.parameters} == planned
        assert not audit.findings
    audit = wdjax.audit(wdjax.sgdw(LR, WD), mixed)
    rates = {row.path: round(row.rate, 9) for row in audit.parameters}
    assert rates == {"kernel": LR * WD, "empty": 0.0, "number": LR * WD, "complex": LR * WD}
    assert audit["complex"].kind == "L2"


def test_lookahead_and_partition() -> None:
    params = optax.LookaheadParams.init_synced(make_params())
    audit = wdjax.audit(optax.lookahead(wdjax.adamw(LR, WD, wdjax.only("kernel")), 5, 0.5), params)
    assert {row.path for row in audit.parameters if row.decays} == {"fast/Dense_0/kernel"}
    labels = wdjax.by_path({"kernel": "weights"}, default="rest").values
    partition = optax.partition({"weights": wdjax.adamw(LR, WD), "rest": optax.sgd(LR)}, labels)
    audit = wdjax.audit(partition, make_params(), LR * WD, wdjax.only("kernel"))
    assert not audit.findings


# Wrong decays, without `expected`.

BLOCKS = {f"block_{i}": {"kernel": jnp.ones((6, 5)), "bias": jnp.zeros(5)} for i in range(3)} | {
    "embed": {"embedding": jnp.ones((7, 5))},
    "stack": {"kernel": jnp.ones((3, 5, 4)), "bias": jnp.ones((3, 4))},
}
STACKED = wdjax.weights_only(stacked_axes={"stack": 1})


def decayed(rate: Any, mask: Any = STACKED) -> Any:
    return optax.chain(optax.adam(LR), wdjax.independent_decay(rate, mask))


def toggling(starts: bool) -> Any:
    def update(updates: Any, is_on: Any, params: Any = None) -> Any:
        factor = jnp.where(is_on, WD, 0.0)
        kernel = updates["block_0"]["kernel"] - factor * params["block_0"]["kernel"]
        return {**updates, "block_0": {**updates["block_0"], "kernel": kernel}}, ~is_on

    return optax.chain(SGD, optax.GradientTransformation(lambda params: jnp.asarray(starts), update))


def from_step(first: int, last: int = 10**6, every: int = 1) -> Any:
    return lambda count: jnp.where((count >= first) & (count <= last) & (count % every == 0), WD, 0.0)


def inverted(params: Any) -> Any:
    return jax.tree.map(lambda decays: not decays, STACKED.mask(params))


KERNELS = {"block_0/kernel", "block_1/kernel", "block_2/kernel", "stack/kernel"}
WEIGHTS_OF_BLOCKS = {*KERNELS, "embed/embedding"}
BIASES = {"block_0/bias", "block_1/bias", "block_2/bias", "stack/bias"}
# The optimizer, and the paths of each finding.
BROKEN: dict[str, tuple[Any, dict[str, set[str]]]] = {
    "right": (decayed(WD), {}),
    "an inverted mask": (
        optax.adamw(LR, weight_decay=WD, mask=inverted),
        {"decays non-weights": BIASES, "weights left out": KERNELS},
    ),
    "one kernel of several": (
        decayed(WD, wdjax.only("block_1/kernel")),
        {"weights left out": KERNELS - {"block_1/kernel"}},
    ),
    "all kernels except one": (
        decayed(wdjax.by_path({"block_1": 0.0}, default=WD)),
        {"weights left out": {"block_1/kernel"}},
    ),
    "embeddings left out": (decayed(WD, wdjax.weights_only(embeddings=False, stacked_axes={"stack": 1})), {}),
    "a frozen block": (wdjax.freeze(decayed(WD), wdjax.only("block_0")), {}),
    "vectors alone": (
        decayed(WD, lambda params: jax.tree.map(lambda p: p.ndim == 1, params)),
        {"decays non-weights": BIASES - {"stack/bias"}, "weights left out": KERNELS},
    ),
    "stacked biases": (
        decayed(WD, lambda params: jax.tree.map(lambda p: p.ndim > 1, params)),
        {"decays non-weights": {"stack/bias"}},
    ),
    "one block twice": (
        decayed(WD * wdjax.by_path({"block_2": 2.0}, default=1.0)),
        {"uneven": {"block_0/kernel", "block_1/kernel", "block_2/kernel"}},
    ),
    "by depth": (
        decayed(WD * wdjax.by_path({"block_*": wdjax.by_depth("block_*", 0.5)}, default=1.0)),
        {"uneven": {"block_0/kernel", "block_1/kernel", "block_2/kernel"}},
    ),
    "a wrong sign for one": (
        optax.chain(decayed(WD), optax.add_decayed_weights(2 * WD, wdjax.only("stack/kernel").mask)),
        {"grows": {"stack/kernel"}},
    ),
    "one layer of a stack": (
        decayed(wdjax.by_path({"stack": np.array([WD, WD, 0]).reshape(3, 1, 1)}, default=WD)),
        {"uneven": {"stack/kernel"}},
    ),
    "nothing after the first step": (decayed(from_step(0, 0)), {"stops": WEIGHTS_OF_BLOCKS}),
    "nothing after some steps": (decayed(from_step(0, 500)), {"stops": WEIGHTS_OF_BLOCKS}),
    "a schedule of its own to 0": (decayed(optax.linear_schedule(WD, 0.0, 100)), {"stops": WEIGHTS_OF_BLOCKS}),
    "a schedule to 0 of both": (wdjax.adamw(optax.cosine_decay_schedule(LR, 1000), WD, STACKED), {}),
    "a warm-up of the decay": (decayed(optax.linear_schedule(0.0, WD, 100)), {}),
    "a late start": (decayed(from_step(50)), {"starts late": WEIGHTS_OF_BLOCKS}),
    "every other step": (decayed(from_step(0, every=2)), {"not in every step": WEIGHTS_OF_BLOCKS}),
    "every other step, from the second": (
        decayed(lambda count: jnp.where(count % 2 == 1, WD, 0.0)),
        {"not in every step": WEIGHTS_OF_BLOCKS},
    ),
    "every fourth step": (
        optax.chain(
            optax.adam(LR),
            optax.conditionally_transform(optax.add_decayed_weights(-WD, STACKED.mask), lambda step: step % 4 == 0),
        ),
        {"not in every step": WEIGHTS_OF_BLOCKS},
    ),
    "every other step, without a count": (
        toggling(True),
        {"not in every step": {"block_0/kernel"}, "weights left out": KERNELS - {"block_0/kernel"}},
    ),
    "the same, from the second": (
        toggling(False),
        {"not in every step": {"block_0/kernel"}, "weights left out": KERNELS - {"block_0/kernel"}},
    ),
    "all at once": (decayed(1.0), {"overshoots": WEIGHTS_OF_BLOCKS}),
    "far too much later": (decayed(optax.linear_schedule(WD, 3.0, 1000)), {"diverges": WEIGHTS_OF_BLOCKS}),
    "two decays": (
        optax.chain(wdjax.add_l2_to_grads(0.1, STACKED), decayed(WD)),
        {"two decays": WEIGHTS_OF_BLOCKS, "seen by the moments": WEIGHTS_OF_BLOCKS},
    ),
}


def test_a_decay_that_stops_is_shown_to_its_end() -> None:
    params = {"kernel": jnp.ones((4, 2))}
    audit = wdjax.audit(wdjax.adamw(1e-3, optax.linear_schedule(0.1, 0.0, 500)), params)
    assert "0.0001 (0) … 0 (1000)" in audit.table()
    finding = audit.finding("stops")
    assert finding is not None
    assert finding.measured[0].endswith(", …, 7.98e-05 (step 101), 0 (step 1000)")


def test_a_constant_schedule_is_expected_at_all_steps() -> None:
    params = {"kernel": jnp.ones((4, 2))}
    falling = wdjax.adamw(1e-3, optax.piecewise_constant_schedule(0.1, {30: 0.1}))
    assert wdjax.audit(falling, params, expected=1e-4).finding("not as expected") is None
    finding = wdjax.audit(falling, params, expected=optax.constant_schedule(1e-4)).finding("not as expected")
    assert finding is not None
    assert finding.measured == ("it is 1e-05 per step at step 100, not 0.0001",)


def test_a_schedule_to_0_is_as_expected_although_float32_leaves_a_little() -> None:
    params, schedule = {"kernel": jnp.ones((4, 2))}, optax.linear_schedule(1e-3, 0.0, 500)
    optimizer = wdjax.adamw(schedule, 0.1)
    assert wdjax.audit(optimizer, params, lambda step: 0.1 * schedule(step), learning_rate=schedule).findings == ()
    other = wdjax.audit(optimizer, params, lambda step: 0.1 * schedule(step) + 1e-9)
    assert other.finding("not as expected") is not None


def test_one_call_is_a_call() -> None:
    finding = wdjax.audit(optax.sgd(0.1), {"kernel": jnp.ones((4, 2))}).finding("no decay")
    assert finding is not None
    assert finding.message == "nothing decays in the first call or at the tested counts"


@pytest.mark.parametrize("name", BROKEN)
def test_every_wrong_decay_is_named(name: str) -> None:
    optimizer, found = BROKEN[name]
    audit = wdjax.audit(optimizer, BLOCKS)
    assert {finding.name: set(finding.paths) for finding in audit.findings} == found
    uneven = audit.finding("uneven")
    assert uneven is None or uneven.harm == ("suspect" if name == "one block twice" else "note")


@pytest.mark.parametrize("in_gradient", ["adam", "momentum", "sign"])
@pytest.mark.parametrize("toward", [None, "init"])
def test_of_two_decays_both_are_shown(in_gradient: str, toward: Any) -> None:
    chains = {
        "adam": wdjax.adamw(LR, WD, WEIGHTS, toward=toward),
        "momentum": wdjax.sgdw(LR, WD, WEIGHTS, momentum=0.9, toward=toward),
        "sign": optax.chain(optax.scale_by_lion(), wdjax.decoupled_decay(WD, WEIGHTS, toward=toward), optax.scale(-LR)),
    }
    optimizer = optax.chain(wdjax.add_l2_to_grads(0.1, WEIGHTS, toward=toward), chains[in_gradient])
    audit = wdjax.audit(optimizer, make_params())
    row = audit["Dense_0/kernel"]
    assert (row.place, row.toward) == ("gradient and update", toward or "zero")
    np.testing.assert_allclose(row.in_update, LR * WD, rtol=1e-3)
    finding = audit.finding("two decays")
    assert finding is not None
    of_l2 = "unknown" if in_gradient == "sign" else "L2 of 0.1"
    assert finding.measured == (f"0.001 per step in the update, and {of_l2} in the gradient",)
    lines = [line for line in str(audit).splitlines() if line.startswith("Dense_0/kernel")]
    assert len(lines) == 2
    assert "gradient" in lines[0]
    assert "0.001  update" in lines[1]


@pytest.mark.parametrize("bound", [0.1, 1.0, 100.0, 1e9])
@pytest.mark.parametrize("l2", [2e-4, 0.1])
def test_of_two_decays_both_are_shown_around_a_clip_by_global_norm(bound: float, l2: float) -> None:
    # The norm is also that of arrays without a decay, and of single numbers.
    params = {**BLOCKS, "temperature": jnp.ones(())}
    some = wdjax.only("block_1/kernel")
    penalty, clip = wdjax.add_l2_to_grads(l2, some), optax.clip_by_global_norm(bound)
    audit = wdjax.audit(optax.chain(penalty, clip, wdjax.adamw(0.01, WD, WEIGHTS)), params)
    decays = {row.path: (row.place, row.kind) for row in audit.parameters if row.decays}
    assert decays.pop("block_1/kernel") == ("gradient and update", "L2")
    assert set(decays.values()) == {("update", "L2")}
    np.testing.assert_allclose(audit["block_1/kernel"].in_update, 0.01 * WD, rtol=1e-3)
    finding = audit.finding("two decays")
    assert finding is not None
    in_update, _, in_gradient = finding.measured[0].partition(" per step in the update, and L2 of ")
    assert float(in_update) == 0.01 * WD
    np.testing.assert_allclose(float(in_gradient.removesuffix(" in the gradient")), l2, rtol=1e-2)


def test_a_clip_in_front_hides_the_factor_of_l2_and_a_strong_l2_hides_its_kind() -> None:
    clip = optax.clip_by_global_norm(1.0)
    for l2, (place, kind) in {2e-4: ("gradient and update", "L2"), 0.1: ("gradient", "other")}.items():
        optimizer = optax.chain(wdjax.add_l2_to_grads(l2, WEIGHTS), wdjax.adamw(0.01, WD, WEIGHTS))
        clipped = wdjax.audit(optax.chain(clip, optimizer), BLOCKS)
        assert (clipped["block_1/kernel"].place, clipped["block_1/kernel"].kind) == (place, kind)
        finding = clipped.finding("two decays")
        assert (finding is None) == (l2 == 0.1)
        if finding is not None:
            assert set(finding.measured) == {"0.0001 per step in the update, and L2 in the gradient"}
        # As the documentation says, the chain without the clip shows them.
        finding = wdjax.audit(optimizer, BLOCKS).finding("two decays")
        assert finding is not None
        assert set(finding.measured) == {f"0.0001 per step in the update, and L2 of {l2:.3g} in the gradient"}


def test_a_finding_is_true_of_each_path_that_it_lists() -> None:
    audit = wdjax.audit(wdjax.adamw(LR, WD, wdjax.only("scale")), make_params(), LR * WD, WEIGHTS)
    finding = audit.finding("not as expected")
    assert finding is not None
    said = dict(zip(finding.paths, finding.measured, strict=True))
    assert said == {
        "Dense_0/kernel": "it is 0 per step, not 0.001",
        "norm/scale": "it is 0.001 per step, not 0",
    }
    assert (
        "expected: it is 0 per step, not 0.001 ('Dense_0/kernel'); it is 0.001 per step, not 0 ('norm/scale')"
        in str(finding)
    )
    blocks = {f"block_{i}": make_params() for i in range(12)}
    text = str(wdjax.audit(optax.adamw(LR, weight_decay=WD), blocks).finding("decays non-weights"))
    assert "weight: 0.001 per step ('block_{0..11}/Dense_0/bias', 'block_{0..11}/norm/scale'). Write" in text


def test_a_mask_alone_says_what_should_decay() -> None:
    optimizer = wdjax.adamw(LR, WD, wdjax.only("scale"))
    finding = wdjax.audit(optimizer, make_params(), mask=WEIGHTS).finding("not as expected")
    assert finding is not None
    assert dict(zip(finding.paths, finding.measured, strict=True)) == {
        "Dense_0/kernel": "it is 0 per step, not more than 0",
        "norm/scale": "it is 0.001 per step, not 0",
    }
    assert not wdjax.audit(optimizer, make_params(), mask=wdjax.only("scale")).findings


def test_a_bias_that_should_decay_is_no_finding() -> None:
    params, optimizer = {"position": jnp.ones((8, 6)), "bias": jnp.ones(6)}, optax.adamw(LR, weight_decay=WD)
    assert set(said(optimizer, params)) == set(params)
    # One number for all does not say that biases are meant.
    assert set(said(optimizer, params, expected=LR * WD)) == set(params)
    assert said(optimizer, params, mask=wdjax.only("position")) == ("bias",)
    assert said(optimizer, params, expected=LR * WD, mask=wdjax.only("bias")) == ("position",)
    assert said(optimizer, params, expected=wdjax.by_path({"bias": LR * WD}, default=0.0)) == ("position",)
    testing.assert_audit(optimizer, params, mask=lambda params: jax.tree.map(lambda _: True, params))
    testing.assert_audit(optimizer, params, {"position": LR * WD, "bias": LR * WD})


def said(optimizer: Any, params: Any, **options: Any) -> tuple[str, ...]:
    """The paths of the finding that parameters decay that are not weights."""
    finding = wdjax.audit(optimizer, params, **options).finding("decays non-weights")
    return finding.paths if finding else ()


def test_an_expected_schedule_holds_at_every_count() -> None:
    def expected(count: Any) -> Any:
        return LR * WD * jnp.exp(-count / 100)

    right = optax.chain(optax.adam(LR), wdjax.independent_decay(expected, WEIGHTS))
    assert "not as expected" not in names(wdjax.audit(right, make_params(), expected, WEIGHTS))
    finding = wdjax.audit(wdjax.adamw(LR, WD, WEIGHTS), make_params(), expected, WEIGHTS).finding("not as expected")
    assert finding is not None
    assert finding.measured == ("it is 0.001 per step at step 10, not 0.000904837",)


@pytest.mark.parametrize(("learning_rate", "dtype"), [(1e-7, jnp.float32), (1e-4, jnp.bfloat16)])
@pytest.mark.filterwarnings("ignore:.*the decay rounds to nothing")
def test_the_remedy_for_a_lost_decay_fits_the_dtype(learning_rate: float, dtype: Any) -> None:
    finding = wdjax.audit(wdjax.sgdw(learning_rate, 0.1, WEIGHTS), make_params(dtype)).finding("rounds to nothing")
    assert finding is not None
    is_narrow = dtype == jnp.bfloat16
    assert ("in float32" in finding.remedy) == is_narrow
    assert ("larger rate" in finding.remedy) != is_narrow
    assert f"{learning_rate * 0.1:g} per step in {np.dtype(dtype).name}, which keeps no change below" in str(finding)


# The rate, and whether rounding to bfloat16 makes it another one, and of what the finding speaks.
@pytest.mark.parametrize(
    ("rate", "says"),
    [
        (2e-3, ""),
        (3e-3, "0.003 per step in bfloat16 acts as 0 a step wherever half the spacing"),
        (4e-3, "0.004 per step in bfloat16 acts as 0.0054 a step"),
        (5e-3, ""),
        (8e-3, ""),
    ],
)
@pytest.mark.filterwarnings("ignore:.*rounding changes the decay")
def test_a_decay_that_rounding_makes_faster_or_slower(rate: float, says: str) -> None:
    for optimizer in (wdjax.adamw(LR, rate / LR, WEIGHTS), optax.adamw(LR, weight_decay=rate / LR, mask=WEIGHTS.mask)):
        audit = wdjax.audit(optimizer, BF16)
        finding = audit.finding("changed by rounding")
        assert says in (str(finding) if finding else "")
        assert bool(finding) == bool(says)
        assert ("rounds to nothing" in names(audit)) == (rate == 2e-3)
    remedied = optax.chain(wdjax.in_float32(wdjax.adamw(LR, rate / LR, WEIGHTS)), wdjax.compensated())
    assert not wdjax.audit(remedied, BF16).findings


INTEGERS = {"kernel": jnp.ones((8, 6)), "q": jnp.array([-127, -3, 3, 127], jnp.int8)}
MOVING = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(LR))


@pytest.mark.parametrize("is_described", [False, True])
@pytest.mark.parametrize("optimizer", [MOVING, optax.MultiSteps(MOVING, 2)], ids=["plain", "accumulated"])
def test_integers_that_an_optimizer_moves(optimizer: Any, is_described: bool) -> None:
    params = jax.eval_shape(lambda: INTEGERS) if is_described else INTEGERS
    finding = wdjax.audit(optimizer, params, frozen=wdjax.only("q")).finding("moves integers")
    assert finding is not None
    assert (finding.harm, finding.paths) == ("wrong", ("q",))
    assert all(word in finding.remedy for word in ("freeze(", "optax.masked", "optax.partition"))
    with pytest.raises(AssertionError, match="moves integers"):
        testing.assert_audit(optimizer, params, frozen=wdjax.only("q"))
    integers = wdjax.all_but("kernel")
    frozen = wdjax.freeze(optimizer, integers)
    parted = optax.partition({True: optax.set_to_zero(), False: MOVING}, {"kernel": False, "q": True})
    masked = optax.masked(MOVING, {"kernel": True, "q": False})
    for remedied in (frozen, parted, masked, wdjax.adamw(LR, WD)):
        assert "moves integers" not in names(wdjax.audit(remedied, params, frozen=integers))


def test_booleans_that_an_optimizer_moves() -> None:
    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return {**updates, "on": ~params["on"]}, state

    switches = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    params = {"w": jnp.ones((3, 3)), "on": jnp.array([True, False])}
    finding = wdjax.audit(optax.chain(optax.sgd(LR), switches), params).finding("moves integers")
    assert finding is not None
    assert finding.paths == ("on",)


def test_a_state_that_drifts_because_of_integers_names_their_remedy() -> None:
    finding = wdjax.audit(optax.adam(LR), INTEGERS).finding("state drifts")
    assert finding is not None
    assert "freeze(" in finding.remedy
    assert "in_float32" not in finding.remedy


def skipping(optimizer: Any, calls: int) -> Any:
    multi = optax.MultiSteps(optimizer, calls, should_skip_update_fn=optax.skip_not_finite)
    return multi.gradient_transformation()


DECAY = wdjax.independent_decay(WD, WEIGHTS)
# Whether a skipped step decays.
SKIPS: dict[str, tuple[Any, bool]] = {
    "behind apply_if_finite": (optax.chain(optax.apply_if_finite(optax.adam(LR), 3), DECAY), True),
    "behind apply_if_finite, without moments": (optax.chain(optax.apply_if_finite(SGD, 3), DECAY), True),
    "behind MultiSteps": (optax.chain(skipping(SGD, 1), DECAY), True),
    "behind MultiSteps of three": (optax.chain(skipping(SGD, 3), DECAY), True),
    "in one of two groups": (
        optax.partition(
            {"a": optax.chain(optax.apply_if_finite(SGD, 3), DECAY), "b": SGD},
            {"Dense_0": {"kernel": "a", "bias": "b"}, "norm": {"scale": "b"}},
        ),
        True,
    ),
    "inside apply_if_finite": (optax.apply_if_finite(optax.chain(SGD, DECAY), 3), False),
    "inside MultiSteps": (skipping(optax.chain(SGD, DECAY), 3), False),
    "around apply_if_finite": (
        wdjax.with_decoupled_decay(optax.apply_if_finite(optax.adam(LR), 3), WD, WEIGHTS, learning_rate=LR),
        False,
    ),
    "around MultiSteps": (wdjax.with_decoupled_decay(skipping(SGD, 3), WD, WEIGHTS, learning_rate=LR), False),
    "adamw, which becomes NaN": (wdjax.adamw(LR, WD, WEIGHTS), False),
    "a clip by global norm": (optax.chain(optax.clip_by_global_norm(1.0), SGD, DECAY), False),
    "NaN is 0, and the step a real one": (optax.chain(optax.zero_nans(), SGD, DECAY), False),
}


@pytest.mark.parametrize("name", SKIPS)
@pytest.mark.parametrize("has_debug", [False, True])
def test_a_decay_in_skipped_steps(name: str, has_debug: bool) -> None:
    optimizer, moves = SKIPS[name]
    with jax.debug_nans(has_debug):
        finding = wdjax.audit(optimizer, make_params()).finding("moves in skipped steps")
    assert bool(finding) == moves
    if finding:
        assert (finding.harm, finding.paths) == ("wrong", ("Dense_0/kernel",))
        assert "inside the wrapper that skips" in finding.remedy


def has_a_weight(params: Any) -> Any:
    return jax.tree.map(lambda p: bool(jnp.any(p != 0)), params)


def has_a_weight_in_numpy(params: Any) -> Any:
    return {name: bool(np.any(np.asarray(leaf))) for name, leaf in params.items()}


def has_a_weight_by_if(params: Any) -> Any:
    return {name: True for name, leaf in params.items() if jnp.max(leaf) > 0}


@pytest.mark.parametrize("mask", [has_a_weight, has_a_weight_in_numpy, has_a_weight_by_if])
@pytest.mark.parametrize("adamw", [optax.adamw, wdjax.adamw])
def test_a_mask_that_looks_at_values_is_named(adamw: Any, mask: Any) -> None:
    params = {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}
    whose = "audit: the optimizer does not run under jax.jit" if adamw is optax.adamw else "decoupled_decay: the mask"
    with pytest.raises(TypeError, match=rf"^{whose}.*{mask.__name__}.* looks at the values .*mask=mask\(params\)\."):
        wdjax.audit(adamw(LR, weight_decay=WD, mask=mask), params)
    audit = wdjax.audit(adamw(LR, weight_decay=WD, mask={"bias": False} | mask(params)), params)
    assert [row.path for row in audit.parameters if row.decays] == ["kernel"]


# Optimizers with a step size that is not the learning rate: the name of the number, and arguments.
STEP_SIZES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "dadapt_adamw": (contrib.dadapt_adamw(1.0, weight_decay=0.0), "state[0].estim_lr", {}),
    "prodigy": (contrib.prodigy(1.0, weight_decay=0.0), "state[0].estim_lr", {}),
    "dog": (contrib.dog(1.0), "state[0][1].max_dist", {}),
    "dowg": (contrib.dowg(1.0), "state[0][1].estim_sq_dist", {}),
    "momo": (contrib.momo(LR), "value", {"value": 1.0}),
    "polyak_sgd": (optax.polyak_sgd(LR), "value", {"value": 1.0}),
    "reduce_on_plateau": (optax.chain(SGD, contrib.reduce_on_plateau()), "state[0][1].scale", {"value": 1.0}),
    "inject_hyperparams": (
        optax.inject_hyperparams(optax.adam)(learning_rate=LR),
        "state[0].hyperparams['learning_rate']",
        {},
    ),
}


@pytest.mark.parametrize("name", slow_but(STEP_SIZES, "dadapt_adamw", "polyak_sgd", "inject_hyperparams"))
def test_a_step_size_that_lives_elsewhere(name: str) -> None:
    optimizer, number, extra = STEP_SIZES[name]
    for decay in (
        wdjax.independent_decay(WD, WEIGHTS),
        wdjax.independent_decay(WD, WEIGHTS, toward="init"),
        wdjax.continuous_decay(WD, WEIGHTS, learning_rate=LR),
        wdjax.proximal_step(wdjax.L2(), WD, WEIGHTS, learning_rate=LR),
    )[: None if name == "dadapt_adamw" else 1]:
        finding = wdjax.audit(optax.chain(optimizer, decay), make_params(), extra_args=extra).finding(
            "not times the step size"
        )
        assert finding is not None
        assert finding.harm == "suspect"
        assert finding.paths == ("Dense_0/kernel",)
        assert finding.measured[0].startswith(f"{number}, 0.0")


def test_step_sizes_that_scale_the_decay_and_numbers_that_are_no_step_sizes() -> None:
    injected = optax.inject_hyperparams(
        lambda learning_rate, max_norm, b1: optax.chain(
            optax.clip_by_global_norm(max_norm), wdjax.adamw(learning_rate, WD, WEIGHTS, b1=b1)
        )
    )
    assert not wdjax.audit(injected(LR, 1.0, 0.9), make_params()).findings
    plateau = optax.chain(wdjax.adamw(LR, WD, WEIGHTS), contrib.reduce_on_plateau())
    assert not wdjax.audit(plateau, make_params(), extra_args={"value": 1.0}).findings


def test_further_layers_are_probed_small_and_their_faults_are_found() -> None:
    layer = {"kernel": jax.ShapeDtypeStruct((512, 512), jnp.float32)}
    params = {f"block_{i}": dict(layer) for i in range(4)}
    audit = wdjax.audit(wdjax.sgdw(LR, WD * wdjax.by_path({"block_3": 2.0}, default=1.0)), params)
    np.testing.assert_allclose([row.rate for row in audit.parameters], [LR * WD] * 3 + [2 * LR * WD], rtol=1e-5)
    finding = audit.finding("uneven")
    assert finding is not None
    assert str(finding).count("per step") == 2
    shapes = [x.shape for x in Probes(SGD, params, {}, longest=128, exact=False).weights.values()]
    assert shapes == [(128, 128), (8, 8), (8, 8), (8, 8)]


def test_a_long_audit_gives_a_sign_of_life(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(_progress, "_PATIENCE", 0.01)
    for is_terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda is_terminal=is_terminal: is_terminal)
        with _progress.progress("audit: measuring"):
            time.sleep(0.1)
        assert ("audit: measuring: 0 s" in capsys.readouterr().err) == is_terminal


# The report, assertions and bad input.


def test_the_report_is_made_of_values() -> None:
    audit = wdjax.audit(optax.adamw(LR, weight_decay=0.1), make_params())
    assert [row.path for row in audit.parameters] == ["Dense_0/bias", "Dense_0/kernel", "norm/scale"]
    assert [row.role for row in audit.parameters] == ["bias", "kernel", "norm"]
    json.dumps([row._asdict() for row in audit.parameters])
    text = str(audit)
    assert "suspect [decays non-weights]" in text
    assert "Dense_0/kernel" in text
    with pytest.raises(KeyError, match=r"no parameter has the path 'Dense_1/kernel'"):
        audit["Dense_1/kernel"]
    blocks = {f"Block_{i}": make_params() for i in range(12)}
    text = str(wdjax.audit(wdjax.sgdw(LR, WD, WEIGHTS), blocks))
    assert "Block_{0..11}/Dense_0/kernel" in text
    assert "nothing unexpected" in text


def test_assert_audit() -> None:
    params = make_params()
    testing.assert_audit(wdjax.adamw(LR, WD, WEIGHTS), params, LR * WD, WEIGHTS)
    rates = LR * wdjax.by_path({"kernel": WD}, default=0.0)
    audit = testing.assert_audit(wdjax.adamw(LR, WD, WEIGHTS), params, rates, learning_rate=LR)
    assert audit["Dense_0/kernel"].place == "update"
    l2 = wdjax.adam_l2(LR, WD, WEIGHTS)
    testing.assert_audit(l2, params, allow=["seen by the moments"])
    testing.assert_audit(l2, params, allow="seen by the moments")
    with pytest.raises(AssertionError, match=r"suspect \[seen by the moments\].*\n.*allow=\[\.\.\.\]"):
        testing.assert_audit(l2, params)
    with pytest.raises(
        AssertionError, match=r"not what is expected: it is 0\.002 per step, not 0\.003 \('Dense_0/kernel'\)"
    ):
        testing.assert_audit(wdjax.adamw(LR, 2 * WD, WEIGHTS), params, 3 * LR * WD, WEIGHTS)
    with pytest.raises(
        ValueError,
        match=r"no finding is named 'momentum'. The names are: 'adapts', 'catches up', 'changed by rounding', ",
    ):
        testing.assert_audit(l2, params, allow=["momentum"])
    with pytest.raises(TypeError, match=r"audit\(\) has no argument 'lr' .* Did you mean learning_rate"):
        testing.assert_audit(l2, params, lr=0.1)


def test_bad_input() -> None:
    params = make_params()
    with pytest.raises(TypeError, match=r"audit: optimizer must be a finished Optax optimizer, got 0\.1"):
        wdjax.audit(0.1, params)
    with pytest.raises(TypeError, match=r"audit: optimizer must be a finished Optax optimizer, got None"):
        wdjax.audit(lambda lr: None, params)
    with pytest.raises(ValueError, match=r"audit: the pattern 'kernle' matches no parameter"):
        wdjax.audit(SGD, params, 0.1, wdjax.only("kernle"))
    with pytest.raises(ValueError, match=r"audit: learning_rate must be finite and not negative"):
        wdjax.audit(SGD, params, learning_rate=-1.0)
    for steps in (10, "10", (0.5,), (-1,), None):
        with pytest.raises(TypeError, match=r"audit: steps must be counts, integers >= 0, got .*Write steps=\(0, 10"):
            wdjax.audit(SGD, params, steps=steps)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"audit: extra_args must map names to values, got \['value'\]"):
        wdjax.audit(SGD, params, extra_args=["value"])  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"audit: full_size must be True or False, got 'no'"):
        wdjax.audit(SGD, params, full_size="no")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"no finding is named 'moments'. The names are: 'state drifts'"):
        wdjax.audit(SGD, params).finding("moments")
    with pytest.raises(ValueError, match=r"decoupled_decay: the pattern 'kernle' matches no parameter"):
        wdjax.audit(wdjax.adamw(LR, WD, wdjax.only("kernle")), params)


@pytest.mark.peers
@pytest.mark.parametrize("first", [3, 6])
def test_rows_that_do_not_decay_do_not_hide_those_that_do(first: int) -> None:
    params = {"w": jnp.ones((8, 4))}
    rows = {"w": np.arange(8).reshape(8, 1) >= first}
    found = wdjax.audit(lambda lr: wdjax.adamw(lr, 0.1, rows), params, learning_rate=0.1)["w"]
    np.testing.assert_allclose([found.rate, found.most, found.least], [0.01, 0.01, 0.0], rtol=1e-5)
    assert (found.place, found.kind, found.scales_with_learning_rate) == ("update", "L2", True)
    assert not str(found.least).startswith("-")
    in_gradient = wdjax.audit(lambda lr: wdjax.adam_l2(lr, 0.1, rows), params, learning_rate=0.1)["w"]
    assert in_gradient.place == "gradient"
    assert in_gradient.rate > 0


def finding_of(measured: list[str]) -> str:
    paths = tuple(f"layer_{k}/kernel" for k in range(len(measured)))
    return str(wdjax.audits.Finding("wrong", "not as expected", "unexpected", "Look.", paths, tuple(measured)))


def test_a_finding_shows_up_to_four_numbers_one_by_one_and_of_more_their_range() -> None:
    texts = [f"it is {rate} per step, not 0" for rate in (0.000466219, -3e-05, 0.1, 0.2, 0.1)]
    assert finding_of(texts).count("per step") == 4
    texts = [f"it is {rate} per step, not 0" for rate in (0.000466219, -3e-05, 0.1, 0.2, 0.123456)]
    assert finding_of(texts) == (
        "wrong [not as expected]: unexpected: it is -3e-05 to 0.2 per step, not 0, at 5 parameters "
        "('layer_{0..4}/kernel'). Look."
    )


def test_what_was_not_measured_is_not_in_a_range() -> None:
    texts = [f"it is {k} per step at step {10 + k // 3}, not -0.5 to {k % 2}" for k in range(6)]
    texts += ["0.25 to 0.5 per step in bfloat16", "it is 7 per step at step 10, not -0.5 to 1"]
    said = finding_of(texts).partition(": unexpected: ")[2].split("; ")
    assert [part.partition(" (")[0] for part in said] == [
        "it is 0 to 2 per step at step 10, not -0.5 to 0, at 2 parameters",
        "it is 1 to 7 per step at step 10, not -0.5 to 1, at 2 parameters",
        "it is 3 to 5 per step at step 11, not -0.5 to 1, at 2 parameters",
        "it is 4 per step at step 11, not -0.5 to 0",
        "0.25 to 0.5 per step in bfloat16",
    ]


def test_ranges_that_are_measured_are_one_range() -> None:
    texts = [f"L2, {low} to {low + 0.5} per step, and 0.001 beside a gradient" for low in (0.1, 0.2, 0.05, 0.3, 0.4)]
    assert ": L2, 0.05 to 0.9 per step, and 0.001 beside a gradient, at 5 parameters (" in finding_of(texts)


def test_the_findings_of_a_model_with_a_rate_for_each_layer_are_short() -> None:
    params = {f"layer_{k}": {"kernel": jnp.ones((8, 8))} for k in range(12)}
    audit = wdjax.audit(optax.chain(optax.add_decayed_weights(WD), optax.adam(LR)), params)
    finding = audit.finding("seen by the moments")
    assert finding is not None
    assert len(set(finding.measured)) == 12
    assert re.search(r"L2, \S+ to \S+ per step, at 12 parameters \('layer_", str(finding))
