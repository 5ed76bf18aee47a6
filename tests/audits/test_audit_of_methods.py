"""What the audit says of decays that need a gradient, of moving averages as anchors, and of constraints."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib
from slow import slow_but

import wdjax
from wdjax import L1Ball, L2Ball, L2Sphere, NonNegative, SpectralBall, constrain, normalized_update, penalties
from wdjax.constraints import Constraint
from wdjax.in_update import tangential_update, weight_norm_control
from wdjax.wrappers import with_selective_decay, with_stable_decay

pytestmark = pytest.mark.peers

LR, WD = 0.1, 0.1
RATE = LR * WD
WEIGHTS = wdjax.weights_only()
DECAY = wdjax.decoupled_decay(WD, WEIGHTS)
SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, LR, 100, 1000)


def make_params(dtype: Any = jnp.float32) -> Any:
    return {"embedding": jnp.ones((8, 6), dtype), "bias": jnp.zeros(6, dtype)}


def names(audit: wdjax.Audit) -> set[str]:
    return {finding.name for finding in audit.findings}


def shown(row: Any) -> tuple[Any, ...]:
    return (row.place, row.kind, row.toward, row.needs_gradient)


def has_one(gradient: jax.Array, unit: str) -> jax.Array:
    return (
        gradient != 0 if unit == "element" else jnp.any(gradient != 0, {"row": 1, "array": (0, 1)}[unit], keepdims=True)
    )


def in_update(optimizer: Any, unit: str, penalty: Any = lambda p: p) -> Any:
    """Somebody else's decay of what has a gradient, after the optimizer."""

    def update(grads: Any, state: Any, params: Any) -> Any:
        updates, state = optimizer.update(grads, state, params)

        def decayed(u: Any, g: Any, p: Any) -> Any:
            return u - RATE * has_one(g, unit) * penalty(p) if p.ndim > 1 else u

        return jax.tree.map(decayed, updates, grads, params), state

    return optax.GradientTransformation(optimizer.init, update)


def in_gradient(optimizer: Any) -> Any:
    def update(grads: Any, state: Any, params: Any) -> Any:
        return optimizer.update(jax.tree.map(lambda g, p: g + WD * (g != 0) * p, grads, params), state, params)

    return optax.GradientTransformation(optimizer.init, update)


def cautious(optimizer: Any) -> Any:
    """A decay where the update moves the weight toward zero, so not where the update is 0."""

    def update(grads: Any, state: Any, params: Any) -> Any:
        updates, state = optimizer.update(grads, state, params)
        return jax.tree.map(lambda u, p: u - RATE * (u * p < 0) * p, updates, params), state

    return optax.GradientTransformation(optimizer.init, update)


def sparse(optimizer: Any, **options: Any) -> Any:
    return wdjax.with_sparse_decay(optimizer, WD, WEIGHTS, learning_rate=LR, **options)


ADAM, MOMENTUM = optax.adam(LR), optax.sgd(LR, momentum=0.9)
UPDATE = ("update", "L2", "zero", True)
# The optimizer; what needs the gradient; place, kind, toward and whether it needs a gradient.
GATED: dict[str, tuple[Any, str, tuple[Any, ...]]] = {
    "sparse": (sparse(ADAM), "row", UPDATE),
    "sparse, toward init": (sparse(ADAM, toward="init"), "row", ("update", "L2", "init", True)),
    "sparse, toward a tree": (sparse(ADAM, toward=make_params()), "row", ("update", "L2", "a tree", True)),
    "sparse, toward a moving average": (
        sparse(ADAM, toward=wdjax.EMA(0.9)),
        "row",
        ("update", "L2", "a moving average", True),
    ),
    "sparse, and noise": (optax.chain(sparse(ADAM), optax.add_noise(1e-3, 0.55, 0)), "row", UPDATE),
    "sparse, of accumulated gradients": (optax.MultiSteps(sparse(ADAM), 3), "row", UPDATE),
    "of elements": (in_update(ADAM, "element"), "element", UPDATE),
    "of rows": (in_update(MOMENTUM, "row"), "row", UPDATE),
    "of arrays": (in_update(optax.lion(LR, weight_decay=0.0), "array"), "array", UPDATE),
    "of elements, beside a trust ratio": (in_update(optax.lamb(LR), "element"), "element", UPDATE),
    "L1": (in_update(ADAM, "element", jnp.sign), "element", ("update", "L1", "zero", True)),
    "in the gradient, before SGD": (in_gradient(optax.sgd(LR)), "element", UPDATE),
    "in the gradient, before momentum": (in_gradient(MOMENTUM), "element", ("gradient", "L2", "zero", True)),
    "cautious": (cautious(ADAM), "element", ("update", "cautious L2", "zero", True)),
}


@pytest.mark.parametrize("name", slow_but(GATED, "sparse", "sparse, toward init", "of arrays", "cautious"))
def test_a_decay_that_needs_a_gradient(name: str) -> None:
    optimizer, unit, want = GATED[name]
    audit = wdjax.audit(optimizer, make_params())
    row = audit["embedding"]
    assert shown(row) == want
    if row.kind != "L1":
        np.testing.assert_allclose([row.rate, row.beside_gradient], RATE, rtol=1e-5)
    assert row.kept == 1.0
    finding = audit.finding("needs a gradient")
    assert finding is not None
    assert finding.harm == "note"
    measured = dict(zip(finding.paths, finding.measured, strict=True))["embedding"]
    assert measured.endswith(f"per step for each {unit} with a gradient, 0 for others")
    assert "beside a gradient" in audit.table()
    assert not {"no decay", "catches up", "constrained"} & names(audit)


def test_a_decay_that_catches_up() -> None:
    audit = wdjax.audit(
        lambda lr: wdjax.with_lazy_decay(optax.adam(lr), WD, WEIGHTS, learning_rate=lr), make_params(), learning_rate=LR
    )
    row = audit["embedding"]
    assert shown(row) == UPDATE
    np.testing.assert_allclose(row.rate, RATE, rtol=1e-5)
    assert row.scales_with_learning_rate
    assert names(audit) == {"catches up"}
    (finding,) = audit.findings
    # Two steps of 1 %: 1 - 0.99**2.
    assert finding.measured == ("0.01 per step for each row with a gradient, 0.0199 after a step without one",)


def test_a_decay_that_is_divided_by_the_size_of_the_gradients() -> None:
    for toward, to in ((None, "zero"), ("init", "init")):
        audit = wdjax.audit(
            lambda lr, toward=toward: with_stable_decay(optax.adam(lr), WD, WEIGHTS, learning_rate=lr, toward=toward),
            make_params(),
            learning_rate=LR,
        )
        row = audit["embedding"]
        assert shown(row) == ("update", "L2", to, True)
        assert row.scales_with_learning_rate
        assert names(audit) == {"divided by gradients"}
        assert row.rates == ()  # Moments are new at each count, so later rates would not be those of a real run.
        # The root mean square of the audit's gradients, of magnitudes from 2 to 4, of the bias too.
        assert 2.5 < RATE / row.rate < 3.5
        (finding,) = audit.findings
        half = f"{row.rate:.6g} per step, and {row.rate / 2:.6g} beside a gradient of twice the size"
        assert (finding.harm, finding.measured) == ("note", (half,))
        assert not audit["bias"].decays


def test_behind_a_clip_a_decay_that_is_divided_by_gradients_does_not_seem_to_catch_up() -> None:
    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(LR))
    audit = wdjax.audit(with_stable_decay(clipped, WD, WEIGHTS, learning_rate=LR), make_params())
    assert shown(audit["embedding"]) == UPDATE
    # The clip makes gradients of one size, so the audit can't see that the decay is divided by it.
    assert names(audit) == {"needs a gradient"}
    assert audit["embedding"].rates == ()


def test_a_selective_decay_is_not_seen() -> None:
    for optimizer in (ADAM, MOMENTUM):
        audit = wdjax.audit(with_selective_decay(optimizer, 1.0, WEIGHTS), make_params())
        assert not audit["embedding"].decays
        assert names(audit) == {"no decay"}
    # A decay inside is seen as it is.
    row = wdjax.audit(with_selective_decay(wdjax.adamw(LR, WD, WEIGHTS), 1.0), make_params())["embedding"]
    np.testing.assert_allclose(row.rate, RATE, rtol=1e-5)


def test_its_rates_follow_a_schedule() -> None:
    optimizer = wdjax.with_sparse_decay(optax.adam(SCHEDULE), WD, WEIGHTS, learning_rate=SCHEDULE)
    steps = (0, 50, 100, 550)
    row = wdjax.audit(optimizer, make_params(), learning_rate=SCHEDULE, steps=steps)["embedding"]
    np.testing.assert_allclose([rate for _, rate in row.rates], [WD * float(SCHEDULE(s)) for s in steps], rtol=1e-5)
    assert row.scales_with_learning_rate


def test_expected_is_the_rate_beside_a_gradient() -> None:
    assert "not as expected" not in names(wdjax.audit(sparse(ADAM), make_params(), RATE, WEIGHTS))
    finding = wdjax.audit(sparse(ADAM), make_params(), 0.0).finding("not as expected")
    assert finding is not None
    assert finding.measured == ("it is 0.01 per step, not 0",)
    assert "twice" in names(wdjax.audit(sparse(ADAM), make_params(), RATE / 2, WEIGHTS))


def test_what_low_precision_keeps_of_it_is_not_measured() -> None:
    audit = wdjax.audit(sparse(ADAM), make_params(jnp.bfloat16))
    np.testing.assert_allclose(audit["embedding"].rate, RATE, rtol=1e-2)
    assert np.isnan(audit["embedding"].kept)


def along_the_sphere(updates: Any, params: Any) -> Any:
    """A step that keeps the norm of the weights, as Hyperball does: to first order it moves no weight to zero."""

    def moved(u: Any, p: Any) -> Any:
        size = jnp.linalg.norm(p)
        landed = p + LR * size * u / jnp.maximum(jnp.linalg.norm(u), 1e-30)
        return landed * size / jnp.linalg.norm(landed) - p

    return jax.tree.map(moved, updates, params)


# Their steps depend on the weights, and they do not decay.
WITHOUT: dict[str, Any] = {
    "lamb": optax.lamb(LR),
    "lars": optax.lars(LR),
    "schedule_free": contrib.schedule_free_sgd(LR),
    "adafactor": optax.adafactor(LR),
    "normalized": optax.chain(optax.scale_by_adam(), normalized_update(), optax.scale(-LR)),
    "dog": contrib.dog(1.0),
    "mechanize": contrib.mechanize(optax.sgd(LR)),
    "muon": contrib.muon(LR),
    "noise": optax.chain(optax.sgd(LR), optax.add_noise(0.1, 0.55, 0)),
    "multiplied": optax.chain(optax.sgd(LR), optax.stateless(lambda u, p: jax.tree.map(lambda u, p: u * p, u, p))),
    "exponential": optax.chain(
        optax.sgd(LR), optax.stateless(lambda u, p: jax.tree.map(lambda u, p: p * jnp.expm1(u), u, p))
    ),
    "along the sphere": optax.chain(optax.scale(-1.0), optax.stateless(along_the_sphere)),
}


@pytest.mark.parametrize("name", slow_but(WITHOUT, "lamb", "schedule_free", "exponential", "along the sphere"))
def test_a_step_that_depends_on_the_weights_is_no_decay(name: str) -> None:
    audit = wdjax.audit(WITHOUT[name], make_params())
    assert not audit["embedding"].decays
    assert audit["embedding"].rate == 0.0


def controlled(k: float, *radius: Any) -> Any:
    return optax.chain(optax.adam(0.01), weight_norm_control(k, *radius, WEIGHTS))


ABOUT_NORMS: dict[str, tuple[Any, tuple[Any, ...], set[str]]] = {
    "toward the norm at init": (controlled(0.01, "init"), ("update", "other", "init", False), set()),
    "toward a small norm": (controlled(0.01, 2.0), ("update", "other", "zero", False), set()),
    "toward a large norm": (controlled(0.01, 100.0), ("update", "other", "zero", False), {"grows"}),
    "toward zero": (controlled(0.01, 0.0), ("update", "L2", "zero", False), set()),
    "onto the sphere": (controlled(1.0, "init"), ("weights", "constraint", "", False), {"constrained"}),
    "tangential, then decay": (
        optax.chain(optax.scale_by_adam(), tangential_update(WEIGHTS), DECAY, optax.scale(-LR)),
        ("update", "L2", "zero", False),
        set(),
    ),
    "decay, then tangential": (
        optax.chain(optax.scale_by_adam(), DECAY, tangential_update(WEIGHTS), optax.scale(-LR)),
        ("none", "none", "", False),
        {"no decay"},
    ),
}


@pytest.mark.parametrize("name", slow_but(ABOUT_NORMS, "toward the norm at init", "decay, then tangential"))
def test_a_decay_of_norms_and_decays_beside_a_tangential_update(name: str) -> None:
    optimizer, want, found = ABOUT_NORMS[name]
    audit = wdjax.audit(optimizer, make_params())
    row = audit["embedding"]
    assert shown(row) == want
    assert names(audit) == found
    if row.kind == "L2":
        np.testing.assert_allclose(row.rate, RATE, rtol=1e-5)


AVERAGES: dict[str, tuple[Any, str]] = {
    "adamw, 0": (wdjax.adamw(LR, WD, WEIGHTS, toward=wdjax.EMA(0.0)), "update"),
    "adamw, 0.9": (wdjax.adamw(LR, WD, WEIGHTS, toward=wdjax.EMA(0.9)), "update"),
    "adamw, 0.999": (wdjax.adamw(LR, WD, WEIGHTS, toward=wdjax.EMA(0.999)), "update"),
    "accumulated": (optax.MultiSteps(wdjax.adamw(LR, WD, WEIGHTS, toward=wdjax.EMA(0.9)), 3), "update"),
    "momentum": (wdjax.sgd_l2(LR, WD, WEIGHTS, momentum=0.9, toward=wdjax.EMA(0.9)), "gradient"),
    "adam_l2": (wdjax.adam_l2(LR, WD, WEIGHTS, toward=wdjax.EMA(0.9)), "gradient"),
}


@pytest.mark.parametrize("name", slow_but(AVERAGES, "adamw, 0.9", "adamw, 0.999", "momentum", "adam_l2"))
def test_a_pull_toward_a_moving_average(name: str) -> None:
    optimizer, place = AVERAGES[name]
    audit = wdjax.audit(optimizer, make_params())
    assert shown(audit["embedding"]) == (place, "L2", "a moving average", False)
    if name != "adam_l2":
        np.testing.assert_allclose(audit["embedding"].rate, RATE, rtol=1e-5)
    assert names(audit) == ({"seen by the moments"} if place == "gradient" else set())


def test_somebody_else_s_moving_average() -> None:
    def update(updates: Any, average: Any, params: Any) -> Any:
        pulled = jax.tree.map(lambda u, p, a: u - RATE * (p - a), updates, params, average)
        return pulled, jax.tree.map(lambda a, p: 0.8 * a + 0.2 * p, average, params)

    elastic = optax.GradientTransformation(lambda params: jax.tree.map(jnp.copy, params), update)
    row = wdjax.audit(optax.chain(ADAM, elastic), make_params())["embedding"]
    assert shown(row) == ("update", "L2", "a moving average", False)


@dataclasses.dataclass(frozen=True)
class _Box:
    is_elementwise = True

    def project(self, w: jax.Array, radius: Any) -> jax.Array:
        return jnp.clip(w, -radius, radius)


SGD, ADAMW = optax.sgd(0.01), wdjax.adamw(0.01, WD, WEIGHTS)


def constrained(kind: Constraint, radius: Any = None, before: Any = SGD) -> Any:
    return optax.chain(before, constrain(kind, radius, wdjax.only("embedding")))


# The optimizer, and the rate and kind: of the decay beside the constraint, if there is one.
CONSTRAINTS: dict[str, tuple[Any, tuple[float, str]]] = {
    "a ball": (constrained(L2Ball(per=-1), 1.0), (0.0, "constraint")),
    "a sphere": (constrained(L2Sphere(), 1.0), (0.0, "constraint")),
    "a small sphere": (constrained(L2Sphere(), 0.01), (0.0, "constraint")),
    "a large sphere": (constrained(L2Sphere(), 100.0), (0.0, "constraint")),
    "a ball around zero, from init": (constrained(L2Ball(), "init"), (0.0, "constraint")),
    "a sphere, from init": (constrained(L2Sphere(), "init"), (0.0, "constraint")),
    "Hyperball": (
        optax.chain(
            optax.scale_by_adam(),
            normalized_update(wdjax.only("embedding")),
            optax.scale(-0.01),
            constrain(L2Sphere(), "init", wdjax.only("embedding")),
        ),
        (0.0, "constraint"),
    ),
    "an L1 ball": (constrained(L1Ball(), 1.0), (0.0, "constraint")),
    "a spectral ball": (constrained(SpectralBall(), 0.5), (0.0, "constraint")),
    "nonnegative": (constrained(NonNegative()), (0.0, "constraint")),
    "a box": (constrained(_Box(), 0.5), (0.0, "constraint")),
    "a sphere, adamw": (constrained(L2Sphere(), 1.0, ADAMW), (0.0, "constraint")),
    "a ball, adamw": (constrained(L2Ball(), 1.0, ADAMW), (0.001, "L2")),
    "a ball from init, adamw": (constrained(L2Ball(), "init", ADAMW), (0.001, "L2")),
    "a spectral ball, adamw": (constrained(SpectralBall(), 0.5, ADAMW), (0.001, "L2")),
    "a box, adamw": (constrained(_Box(), 0.5, ADAMW), (0.001, "L2")),
    "a ball, warm-up": (
        constrained(L2Ball(), 1.0, wdjax.adamw(optax.linear_schedule(0.0, 0.01, 10), WD, WEIGHTS)),
        (0.0001, "L2"),
    ),
    "a ball, toward init": (
        constrained(L2Ball(), 1.0, wdjax.adamw(0.01, WD, WEIGHTS, toward="init")),
        (0.001, "L2"),
    ),
}


@pytest.mark.parametrize(
    "name",
    slow_but(CONSTRAINTS, "a sphere", "Hyperball", "a spectral ball", "a ball, adamw", "a ball from init, adamw"),
)
def test_a_constraint_is_no_decay(name: str) -> None:
    optimizer, (rate, kind) = CONSTRAINTS[name]
    audit = wdjax.audit(optimizer, make_params())
    row = audit["embedding"]
    np.testing.assert_allclose(row.rate, rate, rtol=1e-5)
    assert row.decays == (rate > 0)
    assert (row.place, row.kind) == ("update" if rate else "weights", kind)
    assert names(audit) == {"constrained"}
    finding = audit.finding("constrained")
    assert finding is not None
    assert (finding.harm, finding.paths) == ("note", ("embedding",))
    assert not audit["bias"].decays
    if not rate:
        assert names(wdjax.audit(optimizer, make_params(), 0.0)) == {"constrained"}


@pytest.mark.parametrize("kind", [L2Ball(), L2Sphere()])
def test_beside_moments_and_a_constraint_the_kind_is_unknown(kind: Constraint) -> None:
    audit = wdjax.audit(constrained(kind, 1.0, wdjax.adam_l2(0.001, WD, WEIGHTS)), make_params())
    assert (audit["embedding"].place, audit["embedding"].kind) == ("weights", "unknown")
    assert audit["embedding"].toward == ""
    assert names(audit) == {"constrained"}


def test_beside_a_constraint_of_signs_the_rate_is_right_and_the_kind_is_unknown() -> None:
    row = wdjax.audit(constrained(NonNegative(), None, ADAMW), make_params())["embedding"]
    np.testing.assert_allclose(row.rate, 0.001, rtol=1e-5)
    assert (row.place, row.kind, row.toward) == ("weights", "unknown", "")


def test_a_constraint_before_the_optimizer_is_told_to_come_last() -> None:
    first = constrain(L2Ball(per=-1), 1.0, wdjax.only("embedding"))
    finding = wdjax.audit(optax.chain(first, SGD), make_params()).finding("grows")
    assert finding is not None
    assert "a constraint or proximal_step comes before the optimizer: put it last" in finding.remedy


OF_MATRICES = (penalties.NuclearNorm(), penalties.SpectralNorm(), penalties.Orthogonality())


@pytest.mark.parametrize("kind", OF_MATRICES, ids=repr)
def test_a_penalty_of_matrices_is_of_another_kind_and_grows_nothing(kind: Any) -> None:
    mask = wdjax.only("embedding")
    pull = wdjax.add_penalty_to_grads(kind, 0.1, mask)
    chains = {"update": optax.chain(pull, SGD), "gradient": optax.chain(pull, optax.adam(0.01))}
    if hasattr(kind, "prox"):
        chains["weights"] = optax.chain(SGD, wdjax.proximal_step(kind, 0.1, mask, learning_rate=0.01))
    for place, optimizer in chains.items():
        audit = wdjax.audit(optimizer, make_params())
        assert shown(audit["embedding"]) == (place, "other", audit["embedding"].toward, False)
        assert audit["embedding"].rate > 0
        assert not audit["bias"].decays
        assert names(audit) == ({"seen by the moments"} if place == "gradient" else set())


def test_a_constraint_that_nothing_reaches_is_not_seen() -> None:
    audit = wdjax.audit(constrained(L2Ball(), 100.0), make_params())
    assert names(audit) == {"no decay"}


def held(bound: Any, kind: Any = None, **options: Any) -> Any:
    return wdjax.on_weights.cpr(kind or wdjax.L2(), bound, wdjax.only("embedding"), **options)


def grows_by_weight(updates: Any, strength: Any, params: Any) -> Any:
    """Somebody else's decay, whose strength grows in each weight by its size."""
    strength = jax.tree.map(lambda k, p: k + RATE * jnp.abs(p), strength, params)
    return jax.tree.map(lambda u, k, p: u - k * p, updates, strength, params), strength


ELEMENTWISE = optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), grows_by_weight)
ADAPTING: dict[str, Any] = {
    "adam": optax.chain(optax.adam(LR), held(0.5)),
    "sgd": optax.chain(optax.sgd(LR), held(0.5)),
    "momentum, a fast multiplier": optax.chain(MOMENTUM, held(0.5, update_rate=6.0)),
    "L1": optax.chain(optax.adam(LR), held(0.0, wdjax.L1())),
    "a bound taken at init": optax.chain(optax.adam(LR), held(wdjax.on_weights.AtInit(0.8))),
    "accumulated": optax.MultiSteps(optax.chain(optax.adam(LR), held(0.5)), 3),
    "beside a decay": optax.chain(wdjax.adamw(LR, WD, WEIGHTS), held(0.5)),
    "of each weight": optax.chain(MOMENTUM, ELEMENTWISE),
}


@pytest.mark.parametrize("name", slow_but(ADAPTING, "adam", "momentum, a fast multiplier", "of each weight"))
def test_a_strength_that_adapts_to_the_weights_is_no_memory_of_moments(name: str) -> None:
    audit = wdjax.audit(ADAPTING[name], make_params())
    row = audit["embedding"]
    assert shown(row) == ("update", "other", "zero", False)
    assert row.rates == ()
    assert names(audit) - {"decays non-weights"} == {"adapts"}
    finding = audit.finding("adapts")
    assert finding is not None
    assert finding.harm == "note"


def test_the_rates_of_a_strength_that_adapts_are_those_of_its_first_two_steps() -> None:
    audit = wdjax.audit(optax.chain(optax.adam(LR), held(0.5)), make_params())
    finding = audit.finding("adapts")
    assert finding is not None
    first, then = finding.measured[0].split(" per step, then ")
    # By the rule of `cpr`, from the mean penalty in the first step.
    mean = audit["embedding"].rate + 0.5 / 48
    np.testing.assert_allclose(float(first), audit["embedding"].rate, rtol=1e-5)
    np.testing.assert_allclose(float(then), float(first) + mean * (1 - float(first)) ** 2 - 0.5 / 48, rtol=1e-4)


def test_moments_that_see_a_decay_are_told_from_a_strength_beside_it() -> None:
    audit = wdjax.audit(optax.chain(wdjax.adam_l2(LR, WD, WEIGHTS), held(0.5)), make_params())
    row = audit["embedding"]
    assert (row.place, row.kind) == ("gradient and update", "L2")
    assert 0.1 < row.in_update < 1
    assert names(audit) == {"seen by the moments", "two decays"}


def test_a_strength_that_is_zero_in_the_first_steps_is_not_seen() -> None:
    for bound in (1e3, wdjax.on_weights.WarmStart(500), wdjax.on_weights.InflectionPoint()):
        assert names(wdjax.audit(optax.chain(optax.adam(LR), held(bound)), make_params())) == {"no decay"}


@pytest.mark.parametrize("share", [0.003, 0.01, 0.019])
def test_a_decay_that_is_a_little_weaker_beside_a_gradient_is_no_constraint(share: float) -> None:
    def update(grads: Any, state: Any, params: Any) -> Any:
        weaker = jax.tree.map(lambda g: 1 - share * jnp.any(g != 0), grads)
        return jax.tree.map(lambda g, p, k: -LR * g - RATE * k * p, grads, params, weaker), state

    audit = wdjax.audit(optax.GradientTransformation(lambda params: (), update), {"kernel": jnp.ones((8, 6))})
    assert audit["kernel"].kind == "L2"
    assert names(audit) == {"rescaled"}


def test_a_multiplier_of_updates_scales_the_rates() -> None:
    scale = wdjax.scale_by_path(wdjax.by_path({"embedding": 0.5}, default=1.0))
    audit = wdjax.audit(optax.chain(wdjax.adamw(LR, WD), scale), make_params())
    np.testing.assert_allclose([audit["embedding"].rate, audit["bias"].rate], [RATE / 2, RATE], rtol=1e-5)


def test_shrink_and_perturb_is_a_decay_and_the_noise_is_left_out() -> None:
    def build(lr: float, shrink: Any = RATE, noise: Any = 0.1) -> Any:
        return optax.chain(optax.adam(lr), wdjax.on_weights.shrink_and_perturb(shrink, noise, WEIGHTS, seed=0))

    audit = wdjax.audit(build, make_params(), learning_rate=LR)
    assert shown(audit["embedding"]) == ("update", "L2", "zero", False)
    np.testing.assert_allclose(audit["embedding"].rate, RATE, rtol=1e-4)
    assert audit["embedding"].scales_with_learning_rate is False
    assert audit["bias"].kind == "none"
    assert names(audit) == {"not times the learning rate"}
    once = wdjax.audit(
        lambda lr: build(
            lr, lambda count: jnp.where(count == 50, 0.5, 0.0), lambda count: jnp.where(count == 50, 0.1, 0.0)
        ),
        make_params(),
        learning_rate=LR,
        steps=(0, 50),
    )
    np.testing.assert_allclose([rate for _, rate in once["embedding"].rates], [0.0, 0.5], rtol=1e-4)
    assert names(once) == {"not times the learning rate", "not in every step"}
    noise = wdjax.audit(lambda lr: build(lr, 0.0), make_params(), learning_rate=LR)
    assert names(noise) == {"no decay"}
