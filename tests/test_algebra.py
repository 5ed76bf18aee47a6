"""What the places are to one another, and where they lead: closed forms and peers run in the same test."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from registry import KINDS

import wdjax
from wdjax import testing

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("x64")]

RNG = np.random.default_rng(0)


def tree(*shapes: tuple[int, ...], seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {f"w{i}": jnp.asarray(rng.normal(size=shape)) for i, shape in enumerate(shapes)}


def run(optimizer: Any, params: Any, grads: Callable[[Any, Any], Any], steps: int) -> Any:
    """The parameters after each step, stacked; `grads(params, step)` gives the gradients."""

    def step(carry: Any, i: Any) -> Any:
        weights, state = carry
        updates, state = optimizer.update(grads(weights, i), state, weights)
        weights = optax.apply_updates(weights, updates)
        return (weights, state), weights

    return jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), jnp.arange(steps))[1])(params)


def zero_grads(params: Any, _: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, params)


def noise(params: Any, step: Any) -> Any:
    keys = jax.random.split(jax.random.fold_in(jax.random.key(1), step), len(jax.tree.leaves(params)))
    leaves, treedef = jax.tree.flatten(params)
    drawn = [jax.random.normal(k, p.shape, p.dtype) for k, p in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(treedef, drawn)


# The places among themselves.


@pytest.mark.parametrize("name", KINDS)
def test_gradient_of_the_penalty_is_what_is_added_to_grads(name: str) -> None:
    kind = KINDS[name].penalty
    params, anchor = tree((4, 3), (3, 2)), tree((4, 3), (3, 2), seed=1)
    rates = wdjax.by_path({"w0": 0.3, "w1": jnp.array(0.7)})
    in_loss = jax.grad(lambda p: wdjax.penalty(p, kind, rates, toward=anchor))(params)
    in_gradient = wdjax.add_penalty_to_grads(kind, rates, toward=anchor)
    added, _ = in_gradient.update(zero_grads(params, 0), in_gradient.init(params), params)
    chex.assert_trees_all_close(in_loss, added, rtol=KINDS[name].rtol, atol=1e-15)


def test_l2_and_l1_are_the_penalties_of_their_names() -> None:
    params, anchor = tree((4, 3), (3,)), tree((4, 3), (3,), seed=1)
    mask = wdjax.only("w0")
    w, a = np.asarray(params["w0"]), np.asarray(anchor["w0"])
    np.testing.assert_allclose(
        wdjax.l2_penalty(params, 0.3, mask, toward=anchor), 0.15 * np.sum((w - a) ** 2), rtol=1e-14
    )
    np.testing.assert_allclose(wdjax.penalty(params, wdjax.L1(), 0.3, mask), 0.3 * np.sum(np.abs(w)), rtol=1e-14)
    for penalty, place in (
        (lambda p: wdjax.l2_penalty(p, 0.3, mask), wdjax.add_l2_to_grads(0.3, mask)),
        (lambda p: wdjax.penalty(p, wdjax.L1(), 0.3, mask), wdjax.add_penalty_to_grads(wdjax.L1(), 0.3, mask)),
    ):
        added, _ = place.update(zero_grads(params, 0), place.init(params), params)
        chex.assert_trees_all_close(jax.grad(penalty)(params), added, rtol=1e-14, atol=0)


def three_places(scale: Any, learning_rate: float, weight_decay: float) -> dict[str, Any]:
    """An optimizer with the decay in the loss (its gradient added by hand), in the gradient and in the update."""

    def in_loss() -> Any:
        chain = optax.chain(scale(), optax.scale_by_learning_rate(learning_rate))

        def update(grads: Any, state: Any, params: Any = None) -> Any:
            penalty = jax.grad(wdjax.l2_penalty)(params, weight_decay)
            return chain.update(optax.tree.add(grads, penalty), state, params)

        return optax.GradientTransformation(chain.init, update)

    end = optax.scale_by_learning_rate(learning_rate)
    return {
        "in_loss": in_loss(),
        "in_gradient": optax.chain(wdjax.add_l2_to_grads(weight_decay), scale(), end),
        "in_update": optax.chain(scale(), wdjax.decoupled_decay(weight_decay), end),
    }


def test_for_sgd_the_three_places_agree() -> None:
    paths = [run(o, tree((4, 3)), noise, 50) for o in three_places(optax.identity, 0.1, 0.3).values()]
    chex.assert_trees_all_close(*paths, rtol=1e-13, atol=1e-14)


def test_for_adam_loss_and_gradient_agree_and_the_update_does_not() -> None:
    ends = {name: run(o, tree((4, 3)), noise, 50) for name, o in three_places(optax.scale_by_adam, 0.1, 0.3).items()}
    chex.assert_trees_all_close(ends["in_loss"], ends["in_gradient"], rtol=1e-11, atol=1e-12)
    assert np.max(np.abs(ends["in_update"]["w0"] - ends["in_gradient"]["w0"])) > 0.1


def test_adamw_does_not_see_the_scale_of_the_gradient_and_adam_with_l2_does() -> None:
    def ends(recipe: Any) -> list[Any]:
        optimizer = recipe(0.1, 0.3, eps=0.0)
        return [run(optimizer, tree((4, 3)), lambda p, i: optax.tree.scale(s, noise(p, i)), 30) for s in (1.0, 1000.0)]  # noqa: B023

    chex.assert_trees_all_close(*ends(wdjax.adamw), rtol=1e-12, atol=1e-13)
    one, thousand = ends(wdjax.adam_l2)
    assert np.max(np.abs(one["w0"] - thousand["w0"])) > 0.1


@pytest.mark.parametrize("weight_decay", [1e-6, 0.1, 100.0])
def test_adam_with_l2_alone_moves_by_the_learning_rate_whatever_the_decay(weight_decay: float) -> None:
    params = tree((4, 3))
    after = run(wdjax.adam_l2(0.01, weight_decay, eps=0.0), params, zero_grads, 1)["w0"][0]
    np.testing.assert_allclose(after, params["w0"] - 0.01 * np.sign(params["w0"]), rtol=1e-12)


def test_heavy_ball_with_l2_follows_its_recurrence() -> None:
    params = tree((4, 3))
    path = run(wdjax.sgd_l2(0.1, 0.5, momentum=0.9), params, zero_grads, 40)["w0"]
    for step in (1, 2, 3, 40):
        want = testing.heavy_ball_weights(params["w0"], 0.1, 0.5, 0.9, step)
        np.testing.assert_allclose(path[step - 1], want, rtol=1e-12, atol=1e-14)


# Zero gradient: the product formula.

SCHEDULES: dict[str, Any] = {"constant": 0.1, "cosine": optax.cosine_decay_schedule(0.1, 60)}


def LINEAR(step: Any) -> Any:  # Not Optax's, which computes in float32 whatever the precision.
    return 0.3 * jnp.maximum(1 - jnp.asarray(step, float) / 50, 0)


@pytest.mark.parametrize("learning_rate", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("weight_decay", [0.3, LINEAR], ids=["constant", "linear"])
def test_decay_alone_multiplies_by_the_product(learning_rate: Any, weight_decay: Any) -> None:
    params, anchor = tree((4, 3)), tree((4, 3), seed=1)
    optimizers = [
        wdjax.adamw(learning_rate, weight_decay, toward=anchor),
        wdjax.sgdw(learning_rate, weight_decay, momentum=0.9, toward=anchor),
        wdjax.with_decoupled_decay(
            optax.lion(learning_rate, weight_decay=0.0), weight_decay, learning_rate=learning_rate, toward=anchor
        ),
    ]
    want = testing.decayed_weights(params["w0"], learning_rate, weight_decay, 60, toward=anchor["w0"])
    for optimizer in optimizers:
        end = run(optimizer, params, zero_grads, 60)["w0"][-1]
        np.testing.assert_allclose(end, want, rtol=1e-12, atol=1e-14)


def test_independent_decay_alone_does_not_see_the_learning_rate() -> None:
    params = tree((4, 3))
    for learning_rate in (1e-4, SCHEDULES["cosine"]):
        optimizer = optax.chain(optax.adam(learning_rate), wdjax.independent_decay(0.02))
        end = run(optimizer, params, zero_grads, 60)["w0"][-1]
        np.testing.assert_allclose(end, testing.decayed_weights(params["w0"], 1.0, 0.02, 60), rtol=1e-12)


def test_independent_decay_is_algorithm_2_with_the_relative_schedule() -> None:
    # Loshchilov & Hutter 2019, Algorithm 2: p -= s_t * (alpha * adam(g) + weight_decay * p).
    alpha, weight_decay, scale = 0.1, 0.02, optax.cosine_decay_schedule(1.0, 60)
    ours = optax.chain(
        optax.adam(lambda step: alpha * scale(step)), wdjax.independent_decay(lambda step: weight_decay * scale(step))
    )
    adam = optax.scale_by_adam()

    def update(grads: Any, state: Any, params: Any = None) -> Any:
        inner, count = state
        direction, inner = adam.update(grads, inner)
        s = scale(count)
        updates = jax.tree.map(lambda d, p: -s * (alpha * d + weight_decay * p), direction, params)
        return updates, (inner, count + 1)

    paper = optax.GradientTransformation(lambda p: (adam.init(p), jnp.zeros([], jnp.int32)), update)
    params = tree((4, 3))
    chex.assert_trees_all_close(run(ours, params, noise, 60), run(paper, params, noise, 60), rtol=1e-12, atol=1e-13)


def test_proximal_l2_alone_divides_and_never_overshoots() -> None:
    params = tree((4, 3))
    for strength in (0.3, 30.0, 1e6):
        optimizer = optax.chain(optax.sgd(0.1), wdjax.proximal_step(wdjax.L2(), strength, learning_rate=0.1))
        before, *_, after = np.asarray(run(optimizer, params, zero_grads, 2)["w0"])
        # The sum p + (new - p) rounds at the size of p, so the ratio new / p is exact to that.
        np.testing.assert_allclose(after / before, 1 / (1 + 0.1 * strength), rtol=0, atol=1e-15)
        np.testing.assert_allclose(before / params["w0"], 1 / (1 + 0.1 * strength), rtol=0, atol=1e-15)


# Where they lead.


def regression(n: int = 40, d: int = 8) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(2)
    x = rng.normal(size=(n, d))
    truth = np.where(np.arange(d) < 3, rng.normal(size=d) * 2, 0.0)
    return x, x @ truth + 0.1 * rng.normal(size=n)


def least_squares(x: np.ndarray, y: np.ndarray) -> Callable[[Any, Any], Any]:
    return lambda params, _: {"w": jnp.asarray(x).T @ (jnp.asarray(x) @ params["w"] - jnp.asarray(y)) / len(y)}


@pytest.mark.parametrize("place", ["sgd_l2", "sgd_l2 with momentum", "adam_l2", "loss", "proximal"])
def test_l2_on_least_squares_leads_to_ridge(place: str) -> None:
    x, y = regression()
    lam = 0.5
    grads = least_squares(x, y)
    optimizers = {
        "sgd_l2": wdjax.sgd_l2(0.2, lam),
        "sgd_l2 with momentum": wdjax.sgd_l2(0.05, lam, momentum=0.9),
        "adam_l2": wdjax.adam_l2(optax.exponential_decay(0.05, 100, 0.8), lam),
        "loss": optax.sgd(0.2),
        "proximal": optax.chain(optax.sgd(0.2), wdjax.proximal_step(wdjax.L2(), lam, learning_rate=0.2)),
    }
    if place == "loss":
        plain = grads
        grads = lambda p, i: optax.tree.add(plain(p, i), jax.grad(wdjax.l2_penalty)(p, lam))  # noqa: E731
    end = run(optimizers[place], {"w": jnp.zeros(x.shape[1])}, grads, 3000)["w"][-1]
    np.testing.assert_allclose(end, testing.ridge_solution(x, y, lam), rtol=1e-9, atol=1e-10)


def test_ridge_solution_is_scikit_learns() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = regression()
    peer = linear_model.Ridge(alpha=0.5 * len(y), fit_intercept=False).fit(x, y).coef_
    np.testing.assert_allclose(testing.ridge_solution(x, y, 0.5), peer, rtol=1e-10)


def test_adamw_does_not_lead_to_ridge() -> None:
    x, y = regression()
    optimizer = wdjax.adamw(optax.exponential_decay(0.05, 100, 0.8), 0.5)
    end = run(optimizer, {"w": jnp.zeros(x.shape[1])}, least_squares(x, y), 3000)["w"][-1]
    assert np.max(np.abs(end - testing.ridge_solution(x, y, 0.5))) > 0.1


@pytest.mark.parametrize("kind", ["L1", "ElasticNet"])
def test_the_proximal_step_leads_to_scikit_learns_lasso_with_exact_zeros(kind: str) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = regression()
    ratio = {"L1": 1.0, "ElasticNet": 0.7}[kind]
    peer = linear_model.ElasticNet(alpha=0.3, l1_ratio=ratio, fit_intercept=False, tol=1e-14, max_iter=100_000).fit(
        x, y
    )
    optimizer = optax.chain(
        optax.sgd(0.2),
        wdjax.proximal_step(wdjax.ElasticNet(ratio) if ratio < 1 else wdjax.L1(), 0.3, learning_rate=0.2),
    )
    end = np.asarray(run(optimizer, {"w": jnp.ones(x.shape[1])}, least_squares(x, y), 3000)["w"][-1])
    np.testing.assert_allclose(end, peer.coef_, rtol=1e-8, atol=1e-10)
    assert np.array_equal(end == 0, peer.coef_ == 0)
    assert np.any(end == 0)
    assert np.any(end != 0)


def test_subgradient_l1_chatters_where_the_proximal_step_is_zero() -> None:
    x, y = regression()
    optimizer = optax.chain(wdjax.add_penalty_to_grads(wdjax.L1(), 0.3), optax.sgd(0.2))
    end = np.asarray(run(optimizer, {"w": jnp.ones(x.shape[1])}, least_squares(x, y), 3000)["w"][-1])
    assert not np.any(end == 0)


def test_cautious_decay_leads_to_the_minimum_that_plain_decay_misses() -> None:
    x, y = regression()
    best = np.linalg.lstsq(x, y)[0]
    rate = optax.exponential_decay(0.2, 100, 0.9)

    def end(decay: Any) -> np.ndarray:
        optimizer = optax.chain(decay, optax.scale_by_learning_rate(rate))
        return np.asarray(run(optimizer, {"w": jnp.zeros(x.shape[1])}, least_squares(x, y), 4000)["w"][-1])

    plain, cautious = end(wdjax.decoupled_decay(0.5)), end(wdjax.cautious(wdjax.decoupled_decay(0.5)))
    assert np.max(np.abs(plain - best)) > 0.1
    assert np.max(np.abs(cautious - best)) < 1e-3


@pytest.mark.parametrize("place", ["decoupled_decay", "with_decoupled_decay"])
def test_sign_updates_with_decay_lead_to_the_minimum_within_the_box(place: str) -> None:
    # The weights end in |w| <= 1 / weight_decay, the box of Lion and, in its limit, of AdamW (arXiv 2404.04454).
    optimize = pytest.importorskip("scipy.optimize")
    x, y = regression()
    decay, rate = 2.0, optax.exponential_decay(0.05, 100, 0.8)
    inside = optimize.lsq_linear(x, y, bounds=(-1 / decay, 1 / decay), tol=1e-14).x
    optimizers = {
        "decoupled_decay": optax.chain(
            optax.scale_by_sign(), wdjax.decoupled_decay(decay), optax.scale_by_learning_rate(rate)
        ),
        "with_decoupled_decay": wdjax.with_decoupled_decay(optax.sign_sgd(rate), decay, learning_rate=rate),
    }
    end = np.asarray(run(optimizers[place], {"w": jnp.zeros(x.shape[1])}, least_squares(x, y), 4000)["w"][-1])
    np.testing.assert_allclose(end, inside, atol=1e-3)
    assert np.any(np.abs(inside) > 0.999 / decay)
    assert np.any(np.abs(inside) < 0.9 / decay)
    assert np.max(np.abs(np.linalg.lstsq(x, y)[0] - inside)) > 0.5


# Peers in Optax.


def test_adamw_is_optax_adamw() -> None:
    params = {"Dense_0": {"kernel": jnp.asarray(RNG.normal(size=(4, 3))), "bias": jnp.asarray(RNG.normal(size=3))}}
    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.1, 10, 60)
    rules = wdjax.only("kernel")
    for rate in (0.1, schedule):
        ours, theirs = wdjax.adamw(rate, 0.3, rules), optax.adamw(rate, weight_decay=0.3, mask=rules.mask)
        chex.assert_trees_all_close(
            run(ours, params, noise, 60), run(theirs, params, noise, 60), rtol=1e-13, atol=1e-14
        )
    nesterov = wdjax.adamw(0.1, 0.3, nesterov=True, b1=0.8, b2=0.9, eps=1e-3, eps_root=1e-4)
    theirs = optax.nadamw(0.1, weight_decay=0.3, b1=0.8, b2=0.9, eps=1e-3, eps_root=1e-4)
    chex.assert_trees_all_close(
        run(nesterov, params, noise, 60), run(theirs, params, noise, 60), rtol=1e-13, atol=1e-14
    )


def test_the_pieces_are_optax_add_decayed_weights_where_it_stands() -> None:
    params = tree((4, 3), (3,))
    theirs = optax.add_decayed_weights(0.3)
    want, _ = theirs.update(noise(params, 0), theirs.init(params), params)
    for piece in (wdjax.add_l2_to_grads(0.3), wdjax.decoupled_decay(0.3)):
        got, _ = piece.update(noise(params, 0), piece.init(params), params)
        chex.assert_trees_all_close(got, want, rtol=1e-15, atol=1e-15)


# Equilibria under unit noise. Fixed seeds; the bounds are a few standard errors of these runs.


def test_adamw_equilibrium_rms() -> None:
    eta, lam = 1e-2, 0.5
    params = {"w": jnp.zeros(20_000)}

    def mean_square(optimizer: Any, steps: int, tail: int) -> float:
        def step(carry: Any, i: Any) -> Any:
            weights, state = carry
            updates, state = optimizer.update(noise(weights, i), state, weights)
            weights = optax.apply_updates(weights, updates)
            return (weights, state), jnp.mean(weights["w"] ** 2)

        squares = jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), jnp.arange(steps))[1])(params)
        return float(jnp.mean(squares[-tail:]))

    with jax.enable_x64(False):
        params = {"w": jnp.zeros(20_000, jnp.float32)}
        adamw = mean_square(wdjax.adamw(eta, lam), 2000, 500)
        sgd = mean_square(wdjax.sgd_l2(eta, lam), 1500, 500)
    np.testing.assert_allclose(np.sqrt(adamw), np.sqrt(eta / (2 * lam)), rtol=0.03)
    # The norm squared over the dimension: eta * sigma^2 / (2 lam - eta lam^2).
    np.testing.assert_allclose(sgd, eta / (2 * lam - eta * lam**2), rtol=0.03)
