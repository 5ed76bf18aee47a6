"""A decay acts exactly once per real step, whatever accumulates, skips, averages, perturbs, clips or scales around it.

Each test walks a weight through a dozen calls in float64 and holds every point of its way against a NumPy recurrence
in which each real step decays once. Where a decay that stands in the usual wrong place goes another way, that way is
held in closed form too: it is what docs/explanations/wrappers_and_faults.md says goes wrong.
"""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.dynamic_scale import DynamicScale
from optax import contrib
from slow import slow_but

import wdjax

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("x64")]

LEARNING_RATE, RATE = 0.1, 0.5
SHARE = LEARNING_RATE * RATE  # What a real step takes of a weight: 5 %.
START = np.array([2.0, -1.0])
CALLS = 12
NAN = np.array([np.nan, 1.0])  # Made here, a JAX array would be of float32.


def no_grads(call: int, params: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, params)


def walk(
    optimizer: Any, grads: Callable[[int, Any], Any], params: Any = START, calls: int = CALLS, **extra: Any
) -> tuple[list[Any], Any]:
    """The parameters after each call, and the last state."""
    update = jax.jit(functools.partial(optimizer.update, **extra))
    params = jax.tree.map(jnp.array, params)
    state, way = optimizer.init(params), []
    for call in range(calls):
        updates, state = update(grads(call, params), state, params)
        params = optax.apply_updates(params, updates)
        way.append(params)
    return way, state


def decayed_at(steps: Sequence[bool], rate: Callable[[int], float] = lambda step: RATE) -> np.ndarray:
    """The weights after each call if exactly the calls that are steps decay, by the rate of their number."""
    way, weights, step = [], START, 0
    for is_step in steps:
        if is_step:
            weights, step = weights * (1 - LEARNING_RATE * rate(step)), step + 1
        way.append(weights)
    return np.stack(way)


def assert_way(got: Sequence[Any], want: Any, rtol: float = 1e-12) -> None:
    np.testing.assert_allclose(np.stack(got), want, rtol=rtol)


RATES: dict[str, Callable[[int], Any]] = {"constant": lambda step: RATE, "schedule": lambda step: RATE / (1 + step)}
every_rate = pytest.mark.parametrize("rate", RATES.values(), ids=RATES)
EVERY_CALL = [True] * CALLS


# What steps at some calls only.


def multi_steps(inner: Any, k: Any, **kwargs: Any) -> optax.GradientTransformation:
    if "accumulator_dtype" in inspect.signature(optax.MultiSteps).parameters:  # Not in Optax 0.2.7.
        kwargs["accumulator_dtype"] = jnp.float64
    return optax.MultiSteps(inner, k, **kwargs).gradient_transformation()


def nan_at(*calls: int) -> Callable[[int, Any], Any]:
    return lambda call, params: NAN if call in calls else jnp.zeros_like(params)


# How an optimizer is wrapped, the gradients of the calls, and which calls are real steps.
SKIPPING: dict[str, tuple[Callable[[Any], Any], Callable[[int, Any], Any], list[bool]]] = {
    "MultiSteps": (lambda inner: multi_steps(inner, 4), no_grads, [False, False, False, True] * 3),
    "MultiSteps of a growing batch": (
        lambda inner: multi_steps(inner, lambda step: step + 1),
        no_grads,
        [call in (0, 2, 5, 9) for call in range(CALLS)],
    ),
    "MultiSteps that skips NaN": (
        lambda inner: multi_steps(inner, 2, should_skip_update_fn=optax.skip_not_finite),
        nan_at(1, 2, 6),
        [call in (3, 5, 8, 10) for call in range(CALLS)],
    ),
    "apply_if_finite": (
        lambda inner: optax.apply_if_finite(inner, 5),
        nan_at(0, 3, 4, 7),
        [call not in (0, 3, 4, 7) for call in range(CALLS)],
    ),
    "apply_if_finite of MultiSteps": (
        lambda inner: optax.apply_if_finite(multi_steps(inner, 2), 5),
        nan_at(1, 2, 6),
        [call in (3, 5, 8, 10) for call in range(CALLS)],
    ),
    "conditionally_mask": (
        lambda inner: optax.transforms.conditionally_mask(inner, lambda step: step % 3 == 0),
        no_grads,
        [call % 3 == 0 for call in range(CALLS)],
    ),
}


@pytest.mark.parametrize("rates", slow_but(RATES, "schedule"))
@pytest.mark.parametrize("name", SKIPPING)
def test_a_call_that_is_no_step_does_not_decay(name: str, rates: str) -> None:
    rate = RATES[rates]
    wrap, grads, steps = SKIPPING[name]
    plain = optax.sgd(LEARNING_RATE)
    around = functools.partial(wdjax.with_decoupled_decay, weight_decay=rate, learning_rate=LEARNING_RATE)
    right = {
        "sgdw inside": wrap(wdjax.sgdw(LEARNING_RATE, rate)),
        "adamw inside": wrap(wdjax.adamw(LEARNING_RATE, rate)),
        "around what is inside": wrap(around(plain)),
    }
    if name != "conditionally_mask":  # It is refused around.
        right["around it all"] = around(wrap(plain))
    for optimizer in right.values():
        assert_way(walk(optimizer, grads)[0], decayed_at(steps, rate))
    # Behind it the decay knows nothing of the skipping: it acts, and counts, at every call.
    behind = optax.chain(wrap(plain), wdjax.independent_decay(lambda step: LEARNING_RATE * rate(step)))
    assert_way(walk(behind, grads)[0], decayed_at(EVERY_CALL, rate))
    assert sum(steps) < CALLS


def test_behind_multi_steps_optax_decays_at_every_call_too() -> None:
    behind = optax.chain(multi_steps(optax.sgd(LEARNING_RATE), 4), optax.add_decayed_weights(-SHARE))
    assert_way(walk(behind, no_grads)[0], decayed_at(EVERY_CALL))


@pytest.mark.parametrize(("mean", "factor"), [(True, 1), (False, 4)], ids=["mean", "sum"])
def test_l2_before_multi_steps_is_summed_where_gradients_are(mean: bool, factor: int) -> None:
    accumulated = multi_steps(optax.sgd(LEARNING_RATE), 4, use_grad_mean=mean)
    way, _ = walk(optax.chain(wdjax.add_l2_to_grads(RATE), accumulated), no_grads)
    assert_way(way, decayed_at([False, False, False, True] * 3, lambda step: factor * RATE))


def test_one_nan_stays_in_multi_steps_for_good_unless_it_is_skipped() -> None:
    # The accumulator is emptied by a factor of 0, and 0 * NaN is NaN: the step at call 1 is lost, and all that follow.
    within = multi_steps(optax.apply_if_finite(wdjax.sgdw(LEARNING_RATE, RATE), 100), 2)
    way, _ = walk(within, nan_at(0))
    assert_way(way, decayed_at([False] * CALLS))
    # And without anything to skip it, it reaches the weights at once, not at the end of the accumulation.
    way, _ = walk(multi_steps(wdjax.sgdw(LEARNING_RATE, RATE), 4), nan_at(1))
    assert [bool(np.isnan(weights[0])) for weights in way] == [False] + [True] * (CALLS - 1)


def test_after_apply_if_finite_gives_up_only_a_decay_inside_goes_on() -> None:
    # The third NaN in a row is let through; zero_nans inside makes a real step of it.
    def finite(inner: Any) -> Any:
        return optax.apply_if_finite(optax.chain(optax.zero_nans(), inner), max_consecutive_errors=2)

    only_nan = lambda call, params: jnp.full(2, jnp.nan) if call < 4 else jnp.zeros(2)  # noqa: E731
    way, _ = walk(finite(wdjax.sgdw(LEARNING_RATE, RATE)), only_nan)
    assert_way(way, decayed_at([call >= 2 for call in range(CALLS)]))
    # Around it, the state does not tell that the step was let through.
    around = wdjax.with_decoupled_decay(finite(optax.sgd(LEARNING_RATE)), RATE, learning_rate=LEARNING_RATE)
    assert_way(walk(around, only_nan)[0], decayed_at([call >= 4 for call in range(CALLS)]))


def test_zero_nans_makes_a_real_step_of_nan_and_it_decays() -> None:
    grads = nan_at(*range(CALLS))
    toward = -LEARNING_RATE * np.array([0.0, 1.0])  # What is left of the gradient.
    want, weights = [], START
    for _ in range(CALLS):
        weights = weights * (1 - SHARE) + toward
        want.append(weights)
    inside = optax.chain(optax.zero_nans(), wdjax.sgdw(LEARNING_RATE, RATE))
    around = wdjax.with_decoupled_decay(
        optax.chain(optax.zero_nans(), optax.sgd(LEARNING_RATE)), RATE, learning_rate=LEARNING_RATE
    )
    # An apply_if_finite behind it sees no NaN any more.
    unseen = optax.chain(optax.zero_nans(), optax.apply_if_finite(wdjax.sgdw(LEARNING_RATE, RATE), 5))
    for optimizer in (inside, around, unseen):
        assert_way(walk(optimizer, grads)[0], want)
    # Infinity is no NaN, and goes through.
    way, _ = walk(inside, lambda call, params: jnp.array([jnp.inf, 0.0]), calls=1)
    assert way[0][0] == -np.inf
    # To skip the step instead, apply_if_finite goes around it all.
    way, _ = walk(optax.apply_if_finite(inside, CALLS), grads)
    assert_way(way, decayed_at([False] * CALLS))


# apply_every: a link in the chain, not a wrapper.


def steady(call: int, params: Any) -> Any:
    return jnp.array([1.0, 3.0]) * (1 + call % 4)


def sgdw_way(steps: Sequence[bool], grads: Sequence[Any], rate: float = RATE) -> list[np.ndarray]:
    """SGD with decoupled decay, with the gradients of the real steps."""
    way, weights, given = [], START, iter(grads)
    for is_step in steps:
        if is_step:
            weights = weights - LEARNING_RATE * (np.asarray(next(given)) + rate * weights)
        way.append(weights)
    return way


def test_apply_every_sums_the_decays_of_weights_that_did_not_move() -> None:
    k, steps = 4, [False, False, False, True] * 3
    mean = np.mean([steady(call, None) for call in range(k)], axis=0)
    # Gradients and decays are summed alike: one step of k times the learning rate, whose decay is k times as large.
    before = optax.chain(wdjax.sgdw(LEARNING_RATE, RATE), optax.apply_every(k))
    assert_way(walk(before, no_grads)[0], decayed_at(steps, lambda step: k * RATE))
    # With the learning rate divided by k it is one step of the mean gradient with one decay, as MultiSteps has it.
    divided = optax.chain(wdjax.sgdw(LEARNING_RATE / k, RATE), optax.apply_every(k))
    want = sgdw_way(steps, [mean] * 3)
    assert_way(walk(divided, steady)[0], want)
    assert_way(walk(multi_steps(wdjax.sgdw(LEARNING_RATE, RATE), k), steady)[0], want)
    for refused in (optax.chain(optax.sgd(LEARNING_RATE), optax.apply_every(k)), optax.apply_every(k)):
        around = wdjax.with_decoupled_decay(refused, RATE, learning_rate=LEARNING_RATE)
        with pytest.raises(ValueError, match=r"holds optax\.apply_every.*with_decoupled_decay\(optax\.MultiSteps"):
            around.init(START)
    # Behind it, and with it in front, the decay acts at each call.
    behind = optax.chain(optax.sgd(LEARNING_RATE), optax.apply_every(k), wdjax.independent_decay(SHARE))
    in_front = optax.chain(optax.apply_every(k), wdjax.sgdw(LEARNING_RATE, RATE))
    for optimizer in (behind, in_front):
        assert_way(walk(optimizer, no_grads)[0], decayed_at(EVERY_CALL))


# Loops by hand.

BATCH = np.array([[1.0, 2.0], [0.5, -1.0], [3.0, 0.0], [-2.0, 1.0]])


def half_mean_square(weights: Any, rows: Any) -> Any:
    return 0.5 * jnp.mean((rows @ weights - 1.0) ** 2)


def full_batch_way(steps: int) -> list[np.ndarray]:
    """Gradient descent on the whole batch with one decay a step."""
    way, weights = [], START
    for _ in range(steps):
        gradient = BATCH.T @ (BATCH @ weights - 1.0) / len(BATCH)
        weights = weights - LEARNING_RATE * (gradient + RATE * weights)
        way.append(weights)
    return way


def accumulate(loss: Callable[..., Any], optimizer: Any, steps: int, *, mean: bool) -> list[Any]:
    """One step for the gradients of four micro-batches, collected by hand."""
    weights = jnp.array(START)
    state, way = optimizer.init(weights), []
    for _ in range(steps):
        grads = [jax.grad(loss)(weights, row[None]) for row in BATCH]
        total = sum(grads) / (len(grads) if mean else 1)
        updates, state = optimizer.update(total, state, weights)
        weights = optax.apply_updates(weights, updates)
        way.append(weights)
    return way


def test_accumulation_by_hand_decays_once_a_step() -> None:
    def with_l2(weights: Any, rows: Any) -> Any:
        return half_mean_square(weights, rows) + wdjax.l2_penalty(weights, RATE)

    l2 = optax.chain(wdjax.add_l2_to_grads(RATE), optax.sgd(LEARNING_RATE))
    assert_way(accumulate(half_mean_square, wdjax.sgdw(LEARNING_RATE, RATE), 3, mean=True), full_batch_way(3))
    assert_way(accumulate(half_mean_square, l2, 3, mean=True), full_batch_way(3))
    assert_way(accumulate(with_l2, optax.sgd(LEARNING_RATE), 3, mean=True), full_batch_way(3))

    # A sum of losses that are divided by the whole batch is the same gradient; a penalty in each of them counts four
    # times.
    def share(weights: Any, rows: Any) -> Any:
        return half_mean_square(weights, rows) / len(BATCH)

    def share_with_l2(weights: Any, rows: Any) -> Any:
        return share(weights, rows) + wdjax.l2_penalty(weights, RATE)

    assert_way(accumulate(share, wdjax.sgdw(LEARNING_RATE, RATE), 3, mean=False), full_batch_way(3))
    four_times = wdjax.sgdw(LEARNING_RATE, 4 * RATE)
    assert_way(
        accumulate(share_with_l2, optax.sgd(LEARNING_RATE), 3, mean=False),
        np.stack(accumulate(share, four_times, 3, mean=False)),
    )


# What steps at every call, and does something to the weights besides.


@pytest.mark.parametrize("place", ["inside", "around what is inside"])
def test_lookahead_decays_the_fast_weights_once_and_the_slow_ones_by_their_share(place: str) -> None:
    k, alpha = 4, 0.5
    plain = optax.sgd(LEARNING_RATE)
    fast = {
        "inside": wdjax.sgdw(LEARNING_RATE, RATE),
        "around what is inside": wdjax.with_decoupled_decay(plain, RATE, learning_rate=LEARNING_RATE),
    }[place]

    def grads(call: int, params: Any) -> Any:
        return jnp.sin(params.fast + call)

    way, _ = walk(optax.lookahead(fast, k, alpha), grads, optax.LookaheadParams.init_synced(START))
    quick = slow = START
    for call in range(CALLS):
        quick = quick - LEARNING_RATE * (np.sin(quick + call) + RATE * quick)
        if call % k == k - 1:
            quick = slow = slow + alpha * (quick - slow)
        np.testing.assert_allclose(way[call].fast, quick, rtol=1e-12)
        np.testing.assert_allclose(way[call].slow, slow, rtol=1e-12)


def test_behind_lookahead_both_copies_decay_and_part() -> None:
    k, alpha = 4, 0.5
    behind = optax.chain(optax.lookahead(optax.sgd(LEARNING_RATE), k, alpha), wdjax.independent_decay(SHARE))
    start = optax.LookaheadParams(fast=START, slow=START.copy())
    way, _ = walk(behind, lambda call, params: jnp.sin(params.fast + call), start)
    fast = slow = START
    for call in range(CALLS):
        before, slow_before = fast, slow
        fast = fast - LEARNING_RATE * np.sin(fast + call)
        if call % k == k - 1:
            fast = slow = slow + alpha * (fast - slow)
        fast, slow = fast - SHARE * before, slow - SHARE * slow_before
        np.testing.assert_allclose(way[call].fast, fast, rtol=1e-12)
        np.testing.assert_allclose(way[call].slow, slow, rtol=1e-12)
        if call % k == k - 1:  # They should be one here.
            assert np.all(np.abs(fast - slow) > 1e-3)
    # Without gradients the slow weights decay at every call, not by their share of it.
    way, _ = walk(behind, lambda call, params: jnp.zeros(2), start)
    assert_way([params.slow for params in way], decayed_at(EVERY_CALL))
    with pytest.warns(UserWarning, match="'fast' and 'slow' are one array"):
        behind.init(optax.LookaheadParams.init_synced(jnp.array(START)))


def test_lookahead_that_resets_its_state_restarts_schedules_and_moves_the_anchor() -> None:
    k = 4
    way, _ = walk(
        optax.lookahead(wdjax.sgdw(LEARNING_RATE, RATES["schedule"]), k, 1.0, reset_state=True),
        lambda call, params: jnp.zeros(2),
        optax.LookaheadParams.init_synced(START),
    )
    want = START * np.cumprod([1 - SHARE / (1 + call % k) for call in range(CALLS)])[:, None]
    assert_way([params.fast for params in way], want)
    for toward in ("init", START):
        way, _ = walk(
            optax.lookahead(wdjax.sgdw(LEARNING_RATE, RATE, toward=toward), k, 1.0, reset_state=True),
            lambda call, params: jnp.ones(2),
            optax.LookaheadParams.init_synced(START),
        )
        anchor = weights = START
        for call in range(CALLS):
            before, weights = weights, weights - LEARNING_RATE * (1 + RATE * (weights - anchor))
            np.testing.assert_allclose(way[call].fast, weights, rtol=1e-12)
            if isinstance(toward, str) and call % k == k - 1:
                anchor = before


RADIUS = 0.3
ADVERSARY = optax.chain(contrib.normalize(), optax.sgd(RADIUS))
TARGET = np.array([-1.0, 4.0])


def pull(call: int, params: Any) -> Any:
    return params - TARGET


def sam_way(calls: int, period: int = 2, *, rate: float = RATE, l2: float = 0.0) -> list[np.ndarray]:
    """SAM on half the squared distance to the target; `rate` decays the outer weights, `l2` is in the loss."""
    way, weights = [], START
    at = weights
    for call in range(calls):
        gradient = at - TARGET + l2 * at
        if call % period < period - 1:
            at = at + RADIUS * gradient / np.linalg.norm(gradient)
        else:
            weights = weights - LEARNING_RATE * (gradient + rate * weights)
            at = weights
        way.append(at)
    return way


@pytest.mark.parametrize("period", [2, 3])
@pytest.mark.parametrize("place", ["inside", "around what is inside"])
def test_sam_decays_in_the_outer_optimizer_once_a_period(place: str, period: int) -> None:
    outer = {
        "inside": wdjax.sgdw(LEARNING_RATE, RATE),
        "around what is inside": wdjax.with_decoupled_decay(
            optax.sgd(LEARNING_RATE), RATE, learning_rate=LEARNING_RATE
        ),
    }[place]
    way, state = walk(contrib.sam(outer, ADVERSARY, sync_period=period), pull)
    assert_way(way, sam_way(CALLS, period))
    assert optax.tree.get(state, "DecayState").count == CALLS // period
    # In opaque mode each call is a real step.
    opaque = contrib.sam(outer, ADVERSARY, sync_period=period, opaque_mode=True)
    way, state = walk(opaque, pull, calls=4, grad_fn=lambda params, _: pull(0, params))
    assert_way(way, sam_way(4 * period, period)[period - 1 :: period])
    assert optax.tree.get(state, "DecayState").count == 4


def test_behind_sam_the_perturbed_weights_decay() -> None:
    plain = optax.sgd(LEARNING_RATE)
    behind = optax.chain(contrib.sam(plain, ADVERSARY), wdjax.independent_decay(SHARE))
    way, _ = walk(behind, pull)
    weights, want = START, []
    for _ in range(CALLS // 2):
        gradient = weights - TARGET
        perturbed = weights + RADIUS * gradient / np.linalg.norm(gradient) - SHARE * weights
        weights = weights - LEARNING_RATE * (perturbed - TARGET) - SHARE * perturbed
        want += [perturbed, weights]
    assert_way(way, want)
    assert np.max(np.abs(np.stack(way)[1::2] - np.stack(sam_way(CALLS))[1::2])) > 0.02
    # In opaque mode the perturbed weights are never seen outside, and behind is where it would be inside.
    opaque = optax.chain(contrib.sam(plain, ADVERSARY, opaque_mode=True), wdjax.independent_decay(SHARE))
    way, _ = walk(opaque, pull, calls=6, grad_fn=lambda params, _: pull(0, params))
    assert_way(way, sam_way(CALLS)[1::2])


def test_l2_in_front_of_sam_is_l2_in_the_loss_that_it_perturbs() -> None:
    in_front = optax.chain(wdjax.add_l2_to_grads(RATE), contrib.sam(optax.sgd(LEARNING_RATE), ADVERSARY))
    way, _ = walk(in_front, pull)
    assert_way(way, sam_way(CALLS, rate=0.0, l2=RATE))
    assert np.max(np.abs(np.stack(way) - np.stack(sam_way(CALLS)))) > 0.02
    # In the adversary a decay only turns the perturbation, and takes nothing of the weights.
    adversary = optax.chain(contrib.normalize(), wdjax.sgdw(RADIUS, RATE))
    way, _ = walk(contrib.sam(optax.sgd(LEARNING_RATE), adversary), lambda call, params: jnp.array([3.0, 4.0]))
    steps = np.arange(1, CALLS // 2 + 1)[:, None]
    assert_way(way[1::2], START - LEARNING_RATE * steps * np.array([3.0, 4.0]))
    np.testing.assert_allclose(way[0], START + RADIUS * (np.array([0.6, 0.8]) + RATE * START))


def test_schedule_free_decays_its_iterate_once_a_step_at_the_weights_it_is_evaluated_at() -> None:
    b1 = 0.9
    inside = contrib.schedule_free(wdjax.sgdw(LEARNING_RATE, RATE), LEARNING_RATE, b1)
    around = wdjax.with_decoupled_decay(
        contrib.schedule_free(optax.sgd(LEARNING_RATE), LEARNING_RATE, b1), RATE, learning_rate=LEARNING_RATE
    )
    x = y = z = START
    want = []
    for call in range(CALLS):
        z = z - LEARNING_RATE * ((y - TARGET) + RATE * y)
        x = x + (z - x) / (call + 1)
        y = b1 * x + (1 - b1) * z
        want.append(y)
    for optimizer in (inside, around):
        way, state = walk(optimizer, pull)
        assert_way(way, want)
        free = state if isinstance(state, contrib.ScheduleFreeState) else state.inner_state
        np.testing.assert_allclose(free.z, z, rtol=1e-12)
        np.testing.assert_allclose(contrib.schedule_free_eval_params(free, way[-1]), x, rtol=1e-12)


def test_behind_schedule_free_the_iterate_never_decays_and_pulls_the_weights_back() -> None:
    b1, calls = 0.9, 400
    behind = optax.chain(
        contrib.schedule_free(optax.sgd(LEARNING_RATE), LEARNING_RATE, b1), wdjax.independent_decay(SHARE)
    )
    way, state = walk(behind, no_grads, calls=calls)
    y, z = START, START
    want = []
    for call in range(calls):
        x = (y - (1 - b1) * z) / b1
        y = b1 * (x + (z - x) / (call + 1)) + (1 - b1) * z - SHARE * y
        want.append(y)
    assert_way(way, want, rtol=1e-10)
    free = optax.tree.get(state, "ScheduleFreeState")
    np.testing.assert_array_equal(free.z, START)
    # What is evaluated goes through zero, toward minus a ninth of where it began.
    ratio = np.asarray(contrib.schedule_free_eval_params(free, way[-1])) / START
    assert np.all(ratio < -0.05)


class Mechanic:
    """Mechanic in NumPy: it learns a scale s and sets the weights to start - s * the sum of all directions."""

    def __init__(self, weight_decay: float = 1e-2, s_init: float = 1e-6, eps: float = 1e-8, betas: int = 6):
        self.weight_decay, self.s_init, self.eps = weight_decay, s_init, eps
        self.beta = 1 - 0.1 ** np.arange(1, betas + 1)
        self.r, self.v, self.m = np.zeros(betas), np.zeros(betas), np.zeros(betas)
        self.s = np.full(betas, s_init)

    def step(self, weights: np.ndarray, gradient: np.ndarray, direction: np.ndarray) -> np.ndarray:
        total, norm = self.s.sum(), np.linalg.norm
        tilted = gradient + self.weight_decay * total * norm(gradient) / (norm(weights) + self.eps) * weights
        past = (START - weights) / (total + self.eps)
        h = tilted @ past
        clipped = np.clip(h, -self.m, self.m)
        self.m = np.maximum(self.beta * self.m, abs(h) + self.eps)
        self.v = self.beta**2 * self.v + h**2
        self.r = self.beta * self.r + clipped * self.s
        wealth = self.s_init / len(self.beta) * self.m + np.maximum(0, self.r)
        self.s = wealth / (np.sqrt(self.v) + self.eps)
        return START - self.s.sum() * (past + direction)


def one_sided(call: int, params: Any) -> Any:
    return (params - 5.0) * jnp.array([1.0, 0.0])


@pytest.mark.parametrize("place", ["inside", "around what is inside"])
def test_mechanize_scales_the_decay_as_it_scales_the_step(place: str) -> None:
    calls = 60
    base = {
        "inside": wdjax.sgdw(LEARNING_RATE, RATE),
        "around what is inside": wdjax.with_decoupled_decay(
            optax.sgd(LEARNING_RATE), RATE, learning_rate=LEARNING_RATE
        ),
    }[place]
    way, state = walk(contrib.mechanize(base), one_sided, calls=calls)
    mechanic, weights, want = Mechanic(), START, []
    for _ in range(calls):
        gradient = (weights - 5.0) * np.array([1.0, 0.0])
        weights = mechanic.step(weights, gradient, LEARNING_RATE * (gradient + RATE * weights))
        want.append(weights)
    assert_way(way, want, rtol=1e-7)
    assert way[-1][0] > 4.5  # It learned,
    # and what has no gradient decayed: through zero, since a scale that grows makes the decays of the past larger.
    assert min(abs(weights[1]) for weights in way) < 0.1 < way[-1][1]
    # While there is no gradient at all the scale stays where it began, and so do the weights.
    way, state = walk(contrib.mechanize(base), no_grads)
    np.testing.assert_allclose(np.sum(state.s), 1e-6, rtol=1e-3)
    assert_way(way, np.tile(START, (CALLS, 1)), rtol=2 * CALLS * 1e-6 * SHARE)


def test_the_weight_decay_of_mechanize_itself_is_none() -> None:
    scales = []
    for weight_decay in (0.0, 1.0):
        optimizer = contrib.mechanize(optax.sgd(LEARNING_RATE), weight_decay=weight_decay)
        way, state = walk(optimizer, one_sided, calls=60)
        scales.append(float(np.sum(state.s)))
        assert {float(weights[1]) for weights in way} == {START[1]}  # Without a gradient it never moves.
    assert not math.isclose(*scales, rel_tol=1e-4)  # It is a term of what the scale is learned from.


def test_behind_mechanize_a_decay_is_taken_for_the_optimizers_own_way_and_nothing_is_learned() -> None:
    behind = optax.chain(contrib.mechanize(optax.sgd(LEARNING_RATE)), wdjax.independent_decay(SHARE))
    way, (state, _) = walk(behind, one_sided, calls=60)
    mechanic, weights, want = Mechanic(), START, []
    for _ in range(60):
        gradient = (weights - 5.0) * np.array([1.0, 0.0])
        weights = mechanic.step(weights, gradient, LEARNING_RATE * gradient) - SHARE * weights
        want.append(weights)
    assert_way(way, want, rtol=1e-7)
    assert np.sum(state.s) < 1e-5
    assert way[-1][0] < 2  # Inside, it is above 4.5 by then.


# Clipping.

GRADIENT = np.array([3.0, 4.0])
BOUND = 1.0


def large(call: int, params: Any) -> Any:
    return jnp.array(GRADIENT)


def shortened(vector: np.ndarray, bound: float = BOUND) -> np.ndarray:
    return vector * min(1.0, bound / np.linalg.norm(vector))


def descent(direction: Callable[[np.ndarray], np.ndarray], weights: np.ndarray = START) -> list[np.ndarray]:
    way = []
    for _ in range(CALLS):
        weights = weights - LEARNING_RATE * direction(weights)
        way.append(weights)
    return way


CLIP = optax.clip_by_global_norm(BOUND)
STEP = optax.scale_by_learning_rate(LEARNING_RATE)
SGD = optax.sgd(LEARNING_RATE)
# Each order, and the direction that it steps in.
CLIPPED: dict[str, tuple[Any, Callable[[np.ndarray], np.ndarray]]] = {
    "clip, decoupled": (
        optax.chain(CLIP, wdjax.decoupled_decay(RATE), STEP),
        lambda w: shortened(GRADIENT) + RATE * w,
    ),
    "decoupled around it all": (
        wdjax.with_decoupled_decay(optax.chain(CLIP, SGD), RATE, learning_rate=LEARNING_RATE),
        lambda w: shortened(GRADIENT) + RATE * w,
    ),
    "decoupled, clip": (
        optax.chain(wdjax.decoupled_decay(RATE), CLIP, STEP),
        lambda w: shortened(GRADIENT + RATE * w),
    ),
    "clip, L2": (optax.chain(CLIP, wdjax.add_l2_to_grads(RATE), SGD), lambda w: shortened(GRADIENT) + RATE * w),
    "L2, clip": (optax.chain(wdjax.add_l2_to_grads(RATE), CLIP, SGD), lambda w: shortened(GRADIENT + RATE * w)),
    "the last thing": (
        optax.chain(SGD, wdjax.independent_decay(SHARE), optax.clip_by_global_norm(LEARNING_RATE * BOUND)),
        lambda w: shortened(GRADIENT + RATE * w),
    ),
}


@pytest.mark.parametrize("name", CLIPPED)
def test_what_is_clipped_is_what_came_before(name: str) -> None:
    optimizer, direction = CLIPPED[name]
    assert_way(walk(optimizer, large)[0], descent(direction))


def test_a_clip_behind_a_decay_bounds_it_for_all_weights_together() -> None:
    # Without gradients a weight of norm 200 should lose 5 %, that is 10, and loses a tenth.
    start = np.array([160.0, 120.0])
    behind = optax.chain(wdjax.decoupled_decay(RATE), CLIP, STEP)
    way, _ = walk(behind, no_grads, start, calls=1)
    np.testing.assert_allclose(way[0], start * (1 - LEARNING_RATE * BOUND / 200), rtol=1e-12)
    way, _ = walk(optax.chain(CLIP, wdjax.decoupled_decay(RATE), STEP), no_grads, start, calls=1)
    np.testing.assert_allclose(way[0], start * (1 - SHARE), rtol=1e-12)
    # And one weight that is no number is in the norm of all weights.
    broken = {"a": np.array([np.nan]), "b": np.array([2.0])}
    grads = lambda call, params: {"a": jnp.zeros(1), "b": jnp.zeros(1)}  # noqa: E731
    assert np.isnan(walk(behind, grads, broken, calls=1)[0][0]["b"][0])
    way, _ = walk(optax.chain(CLIP, wdjax.decoupled_decay(RATE), STEP), grads, broken, calls=1)
    assert way[0]["b"][0] == 2.0 * (1 - SHARE)


MATRIX = np.array([[3.0, 0.2], [4.0, 0.1]])  # A unit of adaptive clipping is a column.
STEEP = np.array([[0.6, -2.0], [0.8, 5.0]])
RATIO = 0.15


def adapted(direction: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """No column longer than RATIO times that of the weights."""
    bound = RATIO * np.maximum(np.linalg.norm(weights, axis=0), 1e-3)
    return direction * np.minimum(1.0, bound / np.linalg.norm(direction, axis=0))


ADAPT = optax.adaptive_grad_clip(RATIO)
ADAPTED: dict[str, tuple[Any, Callable[[np.ndarray], np.ndarray]]] = {
    "clip, decoupled": (
        optax.chain(ADAPT, wdjax.decoupled_decay(RATE), STEP),
        lambda w: adapted(STEEP, w) + RATE * w,
    ),
    "decoupled around it all": (
        wdjax.with_decoupled_decay(optax.chain(ADAPT, SGD), RATE, learning_rate=LEARNING_RATE),
        lambda w: adapted(STEEP, w) + RATE * w,
    ),
    "decoupled, clip": (
        optax.chain(wdjax.decoupled_decay(RATE), ADAPT, STEP),
        lambda w: adapted(STEEP + RATE * w, w),
    ),
    "clip, L2": (optax.chain(ADAPT, wdjax.add_l2_to_grads(RATE), SGD), lambda w: adapted(STEEP, w) + RATE * w),
    "L2, clip": (optax.chain(wdjax.add_l2_to_grads(RATE), ADAPT, SGD), lambda w: adapted(STEEP + RATE * w, w)),
}


def test_a_penalty_in_the_loss_is_clipped_with_it() -> None:
    def grads(gradient: np.ndarray) -> Callable[[int, Any], Any]:
        return lambda call, params: jax.grad(lambda w: jnp.sum(gradient * w) + wdjax.l2_penalty(w, RATE))(params)

    assert_way(walk(optax.chain(CLIP, SGD), grads(GRADIENT))[0], descent(CLIPPED["L2, clip"][1]))
    assert_way(walk(optax.chain(ADAPT, SGD), grads(STEEP), MATRIX)[0], descent(ADAPTED["L2, clip"][1], MATRIX))


@pytest.mark.parametrize("name", ADAPTED)
def test_adaptive_clipping_bounds_what_came_before_by_the_weights(name: str) -> None:
    optimizer, direction = ADAPTED[name]
    way, _ = walk(optimizer, lambda call, params: jnp.array(STEEP), MATRIX)
    assert_way(way, descent(direction, MATRIX))


@pytest.mark.parametrize("rate", [RATIO / 2, 4 * RATIO])
def test_adaptive_clipping_behind_a_decay_is_a_bound_on_its_rate(rate: float) -> None:
    # Both are in proportion to the weights: with no gradient the smaller of the two wins.
    way, _ = walk(optax.chain(wdjax.decoupled_decay(rate), ADAPT, STEP), no_grads, MATRIX)
    share = LEARNING_RATE * min(rate, RATIO)
    assert_way(way, [MATRIX * (1 - share) ** (call + 1) for call in range(CALLS)])


# Loss scaling.

SCALE = 1024.0


def scaled_loss(weights: Any, *, l2: float = 0.0) -> Any:
    return SCALE * (jnp.vdot(jnp.array(GRADIENT), weights) + wdjax.l2_penalty(weights, l2))


UNSCALE = optax.scale(1 / SCALE)
WHOLE, LOST = (lambda w: GRADIENT + RATE * w), (lambda w: GRADIENT + RATE / SCALE * w)
# The optimizer, the penalty in the loss, and the direction that it steps in.
SCALED: dict[str, tuple[Any, float, Callable[[np.ndarray], np.ndarray]]] = {
    "L2 in the loss": (optax.chain(UNSCALE, SGD), RATE, WHOLE),
    "unscale, L2": (optax.chain(UNSCALE, wdjax.add_l2_to_grads(RATE), SGD), 0.0, WHOLE),
    "L2, unscale": (optax.chain(wdjax.add_l2_to_grads(RATE), UNSCALE, SGD), 0.0, LOST),
    "unscale, decoupled": (optax.chain(UNSCALE, wdjax.decoupled_decay(RATE), STEP), 0.0, WHOLE),
    "unscale, independent": (optax.chain(UNSCALE, SGD, wdjax.independent_decay(SHARE)), 0.0, WHOLE),
    "decoupled around it all": (
        wdjax.with_decoupled_decay(optax.chain(UNSCALE, SGD), RATE, learning_rate=LEARNING_RATE),
        0.0,
        WHOLE,
    ),
    "unscale, clip, decoupled": (
        optax.chain(UNSCALE, CLIP, wdjax.decoupled_decay(RATE), STEP),
        0.0,
        lambda w: shortened(GRADIENT) + RATE * w,
    ),
    "clip, unscale, decoupled": (
        optax.chain(CLIP, UNSCALE, wdjax.decoupled_decay(RATE), STEP),
        0.0,
        lambda w: shortened(GRADIENT) / SCALE + RATE * w,
    ),
}


@pytest.mark.parametrize("name", SCALED)
def test_a_scaled_loss(name: str) -> None:
    optimizer, l2, direction = SCALED[name]
    way, _ = walk(optimizer, lambda call, params: jax.grad(scaled_loss)(params, l2=l2))
    assert_way(way, descent(direction))


def test_adam_hides_a_scale_that_was_never_taken_out_and_l2_in_the_gradient_does_not() -> None:
    def way(optimizer: Any, scale: float) -> np.ndarray:
        return np.stack(walk(optimizer, lambda call, params: scale * pull(call, params))[0])

    adamw, adam_l2 = wdjax.adamw(LEARNING_RATE, RATE), wdjax.adam_l2(LEARNING_RATE, RATE)
    np.testing.assert_allclose(way(adamw, SCALE), way(adamw, 1.0), rtol=1e-6)
    np.testing.assert_allclose(way(adam_l2, SCALE), way(wdjax.adam_l2(LEARNING_RATE, RATE / SCALE), 1.0), rtol=1e-6)
    assert np.max(np.abs(way(adam_l2, SCALE) - way(adam_l2, 1.0))) > 1e-3


def select(flag: Any, new: Any, old: Any) -> Any:
    return jax.tree.map(functools.partial(jnp.where, flag), new, old)


DECAYING = wdjax.only("kernel")


def half_precision_loss(params: Any) -> Any:
    # At a scale above 2**13 its gradient overflows float16.
    return jnp.sum(4 * params["bias"].astype(jnp.float16)) + 0 * jnp.sum(params["kernel"]).astype(jnp.float16)


def dynamically_scaled(optimizer: Any, keep: Callable[[Any, Any, Any], Any]) -> tuple[list[Any], Any, list[bool]]:
    """Kernels and flags of a dozen calls in Flax's loss scaling; `keep(finite, new, old)` of (params, state)."""
    params = {"kernel": jnp.array(START, jnp.float32), "bias": jnp.ones(2, jnp.float32)}
    state, scale = optimizer.init(params), DynamicScale(growth_interval=3)
    way, flags = [], []

    @jax.jit
    def step(scale: Any, params: Any, state: Any) -> Any:
        scale, finite, _, grads = scale.value_and_grad(half_precision_loss)(params)
        updates, new_state = optimizer.update(grads, state, params)
        new = optax.apply_updates(params, updates), new_state
        return scale, *keep(finite, new, (params, state)), finite

    for _ in range(CALLS):
        scale, params, state, finite = step(scale, params, state)
        way.append(params["kernel"])
        flags.append(bool(finite))
    return way, state, flags


@every_rate
def test_a_step_that_flax_loss_scaling_rejects_does_not_decay(rate: Callable[[int], Any]) -> None:
    with jax.enable_x64(False):  # DynamicScale's gradients are of float32.
        optimizer = wdjax.adamw(LEARNING_RATE, rate, DECAYING)
        way, state, flags = dynamically_scaled(optimizer, select)
        # It falls from 2**16 to 2**13, and after three good steps it tries the double again.
        assert flags == [call not in (0, 1, 2, 7, 12) for call in range(CALLS)]
        assert_way(way, decayed_at(flags, rate), rtol=1e-6)
        assert optax.tree.get(state, "DecayState").count == sum(flags)
        # apply_if_finite around it all does the same without a loop of one's own, if it is patient enough.
        around = wdjax.with_decoupled_decay(optax.adam(LEARNING_RATE), rate, DECAYING, learning_rate=LEARNING_RATE)
        for patient in (optax.apply_if_finite(optimizer, 3), optax.apply_if_finite(around, 3)):
            way, _, _ = dynamically_scaled(patient, lambda finite, new, old: new)
            assert_way(way, decayed_at(flags, rate), rtol=1e-6)


def test_what_goes_wrong_with_a_step_that_loss_scaling_rejects() -> None:
    rate = RATES["schedule"]
    with jax.enable_x64(False):
        optimizer = wdjax.adamw(LEARNING_RATE, rate, DECAYING)
        _, _, flags = dynamically_scaled(optimizer, select)
        # The parameters are kept and the state is not: the schedule counts the rejected steps,
        half = lambda finite, new, old: (select(finite, new[0], old[0]), new[1])  # noqa: E731
        way, _, _ = dynamically_scaled(wdjax.sgdw(LEARNING_RATE, rate, DECAYING), half)
        at_call = [call for call in range(CALLS) if flags[call]]
        assert_way(way, decayed_at(flags, lambda step: rate(at_call[step])), rtol=1e-6)
        # and what Adam remembers of an infinite gradient makes every later step NaN.
        way, _, _ = dynamically_scaled(optimizer, half)
        assert np.all(np.isnan(way[at_call[0] :]))
        # Gradients set to zero are a step like any other.
        zeroed = optax.chain(optax.stateless(lambda g, _: jax.tree.map(jnp.nan_to_num, g)), optimizer)
        way, _, _ = dynamically_scaled(zeroed, lambda finite, new, old: new)
        assert_way(way, decayed_at(EVERY_CALL, rate), rtol=1e-6)
        # Less patient than the scale needs, apply_if_finite lets the infinity in.
        impatient = optax.apply_if_finite(optimizer, 2)
        _, state, _ = dynamically_scaled(impatient, lambda finite, new, old: new)
        assert not np.all(np.isfinite(optax.tree.get(state, "mu")["bias"]))


@every_rate
def test_a_loss_scale_by_hand(rate: Callable[[int], Any]) -> None:
    # As with jmp: scale the loss, unscale the gradients, look whether all are finite, select, adjust the scale.
    optimizer, weights, scale = wdjax.sgdw(LEARNING_RATE, rate), jnp.array(START), jnp.array(2.0**15)
    state, way, flags = optimizer.init(weights), [], []

    @jax.jit
    def step(weights: Any, state: Any, scale: Any) -> Any:
        grads = jax.grad(lambda w: scale * jnp.vdot(jnp.array(GRADIENT), w))(weights)
        grads = jnp.where(jnp.abs(grads) > 2.0**14, jnp.inf, grads) / scale
        finite = jnp.all(jnp.isfinite(grads))
        updates, new_state = optimizer.update(grads, state, weights)
        new = optax.apply_updates(weights, updates)
        return *select(finite, (new, new_state), (weights, state)), jnp.where(finite, scale * 2, scale / 2), finite

    for _ in range(CALLS):
        weights, state, scale, finite = step(weights, state, scale)
        way.append(weights)
        flags.append(bool(finite))
    want, expected, done = [], START, 0
    for finite in flags:
        if finite:
            expected = expected - LEARNING_RATE * (GRADIENT + rate(done) * expected)
            done += 1
        want.append(expected)
    assert_way(way, want)
    assert 3 <= done <= CALLS - 3
    assert optax.tree.get(state, "DecayState").count == done
