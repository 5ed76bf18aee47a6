"""Each recipe gives the updates and the state of its documented chain, and two optimizers share nothing."""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wdjax

pytestmark = pytest.mark.peers

PARAMS = {
    "Dense_0": {"kernel": jnp.linspace(-1.0, 2.0, 12).reshape(4, 3), "bias": jnp.array([0.5, -0.25, 0.0])},
    "half": jnp.linspace(-2.0, 1.0, 8).astype(jnp.bfloat16),
}
LEARNING_RATE = optax.cosine_decay_schedule(0.1, 20)
# A schedule in plain Python, which fails on a tracer. Optax takes it outside of jit, and so must a recipe.
PYTHON_SCHEDULE: Callable[[Any], Any] = lambda step: 0.1 if int(step) < 2 else 0.01  # noqa: E731
RATES = wdjax.by_path({"bias": 0.0, "half": optax.linear_schedule(0.2, 0.0, 5)}, default=0.3)


def chains(learning_rate: Any) -> dict[str, tuple[Any, Any]]:
    """Each recipe, and the chain that its docstring describes."""
    decay, mask, slope = RATES, wdjax.all_but("bias"), {"b1": 0.8, "b2": 0.98, "eps": 1e-6, "nesterov": True}
    return {
        "sgd_l2": (
            wdjax.sgd_l2(learning_rate, decay, mask, momentum=0.9, nesterov=True),
            optax.chain(
                wdjax.add_l2_to_grads(decay, mask),
                optax.trace(0.9, nesterov=True),
                optax.scale_by_learning_rate(learning_rate),
            ),
        ),
        "sgdw": (
            wdjax.sgdw(learning_rate, decay, mask, momentum=0.9, toward="init"),
            optax.chain(
                optax.trace(0.9),
                wdjax.decoupled_decay(decay, mask, toward="init"),
                optax.scale_by_learning_rate(learning_rate),
            ),
        ),
        "sgdw without momentum": (
            wdjax.sgdw(learning_rate, 0.1),
            optax.chain(optax.identity(), wdjax.decoupled_decay(0.1), optax.scale_by_learning_rate(learning_rate)),
        ),
        "adam_l2": (
            wdjax.adam_l2(learning_rate, decay, mask, **slope),
            optax.chain(
                wdjax.add_l2_to_grads(decay, mask),
                optax.scale_by_adam(**slope),
                optax.scale_by_learning_rate(learning_rate),
            ),
        ),
        "adamw": (
            wdjax.adamw(learning_rate, decay, mask, mu_dtype=jnp.float32),
            optax.chain(
                optax.scale_by_adam(mu_dtype=jnp.float32),
                wdjax.decoupled_decay(decay, mask),
                optax.scale_by_learning_rate(learning_rate),
            ),
        ),
    }


def trained(optimizer: Any, run: Callable[..., Any]) -> Any:
    """The updates of four steps and the states, the first one included."""
    params, state, seen = PARAMS, optimizer.init(PARAMS), [optimizer.init(PARAMS)]
    update = run(optimizer.update)
    for step in range(4):
        grads = jax.tree.map(lambda p, step=step: jnp.sin(3 * p + step).astype(p.dtype), params)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        seen += [updates, state]
    return seen


@pytest.mark.parametrize("name", chains(0.1))
@pytest.mark.parametrize(
    ("learning_rate", "run"),
    [(0.1, lambda f: f), (LEARNING_RATE, lambda f: f), (PYTHON_SCHEDULE, lambda f: f), (LEARNING_RATE, jax.jit)],
    ids=["number, eager", "schedule, eager", "Python schedule, eager", "schedule, jit"],
)
def test_a_recipe_is_its_chain_bit_for_bit(name: str, learning_rate: Any, run: Callable[..., Any]) -> None:
    recipe, chain = chains(learning_rate)[name]
    ours, theirs = trained(recipe, run), trained(chain, run)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    chex.assert_trees_all_equal(ours, theirs, strict=True)


def test_a_python_schedule_trains_as_in_optax() -> None:
    by_wdjax = trained(wdjax.sgdw(PYTHON_SCHEDULE, 0.0), lambda f: f)[1::2]
    by_optax = trained(optax.sgd(PYTHON_SCHEDULE), lambda f: f)[1::2]
    chex.assert_trees_all_equal(by_wdjax, by_optax, strict=True)


decays_now = True
rate_now = 0.1


def mask_of_a_global(params: Any) -> Any:
    return jax.tree.map(lambda _: decays_now, params)


def schedule_of_a_global(step: Any) -> Any:
    return rate_now


@pytest.mark.parametrize("adamw", [wdjax.adamw, functools.partial(wdjax.sgdw, momentum=0.9), optax.adamw])
def test_an_optimizer_built_anew_asks_its_functions_anew(adamw: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a static argument of one jitted step: an optimizer that was equal to the old one would act as the old one."""
    params = jnp.full(3, 2.0)

    @functools.partial(jax.jit, static_argnums=0)
    def step(optimizer: Any, params: Any) -> Any:
        return optimizer.update(jnp.zeros_like(params), optimizer.init(params), params)[0]

    def build() -> Any:
        if adamw is optax.adamw:
            return optax.adamw(schedule_of_a_global, weight_decay=0.5, mask=mask_of_a_global)
        return adamw(schedule_of_a_global, 0.5, mask_of_a_global)

    np.testing.assert_allclose(step(build(), params), -0.1)
    monkeypatch.setattr(f"{__name__}.rate_now", 0.01)
    np.testing.assert_allclose(step(build(), params), -0.01)
    monkeypatch.setattr(f"{__name__}.decays_now", False)
    np.testing.assert_array_equal(step(build(), params), 0.0)
    np.testing.assert_array_equal(build().update(jnp.zeros(3), build().init(params), params)[0], 0.0)


def test_a_mask_that_is_changed_acts_at_the_next_eager_step() -> None:
    mask, params = {"a": True, "b": False}, {"a": jnp.ones(1), "b": jnp.ones(1)}
    optimizer = wdjax.sgdw(1.0, 0.5, mask)
    state, grads = optimizer.init(params), {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    chex.assert_trees_all_equal(optimizer.update(grads, state, params)[0], {"a": jnp.array([-0.5]), "b": jnp.zeros(1)})
    mask["b"] = True
    chex.assert_trees_all_equal(
        optimizer.update(grads, state, params)[0], {"a": jnp.array([-0.5]), "b": jnp.array([-0.5])}
    )


class EqualToAll:
    """A schedule whose equality leaves its rate out."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EqualToAll)

    def __hash__(self) -> int:
        return 0

    def __call__(self, step: Any) -> Any:
        return jnp.full_like(step, self.rate, jnp.float32)


@pytest.mark.parametrize("run", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_schedules_that_are_equal_are_not_taken_for_one(run: Any) -> None:
    params = jnp.full(3, 2.0)
    for rate in (0.1, 0.01):
        for learning_rate, decay, want in ((EqualToAll(rate), 0.5, rate), (0.1, EqualToAll(rate), 0.2 * rate)):
            optimizer = wdjax.sgdw(learning_rate, decay)
            updates, _ = run(optimizer.update)(jnp.zeros(3), optimizer.init(params), params)
            np.testing.assert_allclose(updates, -want, rtol=1e-6)
    # In one table, too.
    params, table = {"a": params, "b": params + 0}, {"a": EqualToAll(0.1), "b": EqualToAll(0.01)}
    decay = wdjax.decoupled_decay(wdjax.by_path(table, default=0.0))
    updates, _ = run(decay.update)(jax.tree.map(jnp.zeros_like, params), decay.init(params), params)
    np.testing.assert_allclose([updates["a"][0], updates["b"][0]], [0.2, 0.02], rtol=1e-6)
