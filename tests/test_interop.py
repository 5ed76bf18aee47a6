"""What other libraries put around rules changes nothing about who decays."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import freeze as frozen_dict
from flax.training.train_state import TrainState
from optax import contrib
from slow import slow_but

import wdjax
from wdjax import all_but, by_path, only, weights_only
from wdjax.paths import canonical_paths

pytestmark = pytest.mark.peers  # Optax's optimizers.

SHAPES = {
    "embed": {"embedding": (5, 4)},
    "attention": {"query": {"kernel": (4, 2, 2), "bias": (2, 2)}},
    "norm": {"scale": (4,), "bias": (4,)},
    "cls_token": (1, 1, 4),
    "head": {"kernel": (4, 2), "bias": (2,)},
}
WEIGHTS = {"embed/embedding", "attention/query/kernel", "head/kernel"}
RULES = {
    "weights_only": weights_only(),
    "only": only("kernel", "embedding"),
    "by_path": by_path({"embed": True, "kernel": True}, default=False),
}


def params() -> dict[str, Any]:
    return jax.tree.map(jnp.ones, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def decayed(optimizer: Any, tree: Any, steps: int = 1) -> set[str]:
    """The paths whose update is not zero under zero gradients."""
    state = optimizer.init(tree)
    moved: set[str] = set()
    for _ in range(steps):
        updates, state = optimizer.update(jax.tree.map(jnp.zeros_like, tree), state, tree)
        flags = [bool(np.any(np.asarray(leaf) != 0)) for leaf in jax.tree.leaves(updates)]
        moved |= {path for path, flag in zip(canonical_paths(tree), flags, strict=True) if flag}
    return moved


OPTIMIZERS: dict[str, Callable[[wdjax.Rules], Any]] = {
    "wdjax.adamw": lambda rules: wdjax.adamw(0.1, 0.5, rules),
    "optax.adamw": lambda rules: optax.adamw(0.1, weight_decay=0.5, mask=rules.mask),
    "optax.lion": lambda rules: optax.lion(0.1, weight_decay=0.5, mask=rules.mask),
    "optax.masked": lambda rules: optax.chain(
        optax.sgd(0.1), optax.masked(optax.add_decayed_weights(-0.05), rules.mask)
    ),
    "masked around": lambda rules: optax.masked(wdjax.adamw(0.1, 0.5, rules), all_but("cls_token").mask),
    "inject_hyperparams of ours": lambda rules: optax.inject_hyperparams(wdjax.adamw)(0.1, 0.5, rules),
    "inject_hyperparams of Optax": lambda rules: optax.inject_hyperparams(optax.adamw, static_args="mask")(
        0.1, weight_decay=0.5, mask=rules.mask
    ),
    "outside flatten": lambda rules: optax.chain(
        optax.flatten(optax.scale_by_adam()), wdjax.decoupled_decay(0.5, rules), optax.scale_by_learning_rate(0.1)
    ),
    "around flatten": lambda rules: wdjax.with_decoupled_decay(
        optax.flatten(optax.adam(0.1)), 0.5, rules, learning_rate=0.1
    ),
    "MultiSteps": lambda rules: optax.MultiSteps(wdjax.adamw(0.1, 0.5, rules), 1),
    "apply_if_finite": lambda rules: optax.apply_if_finite(wdjax.adamw(0.1, 0.5, rules), 2),
    "partition": lambda rules: optax.partition(
        {True: wdjax.adamw(0.1, 0.5), False: optax.adam(0.1)}, lambda tree: rules.mask(tree)
    ),
    "labels": lambda rules: optax.partition(
        {"decay": wdjax.adamw(0.1, 0.5), "rest": optax.adam(0.1)}, by_path({rules: "decay"}, default="rest").values
    ),
    "partition of the whole": lambda rules: optax.partition(
        {"norm": wdjax.adamw(0.1, 0.5, rules), "rest": wdjax.adamw(0.1, 0.5, rules)},
        by_path({"norm": "norm"}, default="rest").values,
    ),
}


@pytest.mark.parametrize("rules", slow_but(RULES, "weights_only"))
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_who_decays_in_every_wrapper(name: str, rules: str) -> None:
    assert decayed(OPTIMIZERS[name](RULES[rules]), params()) == WEIGHTS


@pytest.mark.parametrize("rules", slow_but(RULES, "weights_only"))
def test_muon_decays_what_its_mask_says(rules: str) -> None:
    tree = {
        "a": {"kernel": jnp.ones((3, 3)), "norm": {"scale": jnp.ones((3, 3))}},
        "embed": {"embedding": jnp.ones((4, 3))},
    }
    optimizer = contrib.muon(0.1, weight_decay=0.5, weight_decay_mask=RULES[rules].mask)
    assert decayed(optimizer, tree) == {"a/kernel", "embed/embedding"}


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_inside_flatten_there_are_no_names_and_the_remedy_is_told(rules: wdjax.Rules) -> None:
    with pytest.raises(ValueError, match=r"params are a single array.*outside optax\.flatten"):
        optax.flatten(wdjax.adamw(0.1, 0.5, rules)).init(params())


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("convert", [dict, frozen_dict, lambda tree: jax.tree.map(np.asarray, tree)])
def test_in_a_train_state(convert: Any, rules: wdjax.Rules) -> None:
    tree = convert(params())
    state = TrainState.create(apply_fn=lambda: None, params=tree, tx=wdjax.adamw(0.1, 0.5, rules))
    new = jax.jit(lambda state: state.apply_gradients(grads=jax.tree.map(jnp.zeros_like, state.params)))(state)
    moved = [bool(np.any(np.asarray(leaf) != 1)) for leaf in jax.tree.leaves(new.params)]
    assert {path for path, flag in zip(canonical_paths(tree), moved, strict=True) if flag} == WEIGHTS


class Net(nnx.Module):
    """The parameters of `SHAPES`, and other state beside them."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(5, 4, rngs=rngs)
        self.attention = nnx.Dict(query=nnx.LinearGeneral(4, (2, 2), rngs=rngs))
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.cls_token = nnx.Param(jnp.ones((1, 1, 4)))
        self.head = nnx.Linear(4, 2, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)


@pytest.mark.parametrize("name", [*RULES, "model"])
def test_in_nnx(name: str) -> None:
    model = Net(nnx.Rngs(0))
    rules = weights_only(model) if name == "model" else RULES[name]
    every = nnx.state(model, nnx.Param)
    some, rest = nnx.state(model, nnx.All(nnx.Param, nnx.PathContains("head"))), nnx.state(model)
    assert decayed(wdjax.adamw(0.1, 0.5, rules), every) == WEIGHTS
    assert decayed(wdjax.adamw(0.1, 0.5, rules), nnx.to_pure_dict(every)) == WEIGHTS
    if name != "only" and name != "by_path":  # A rule that matches nothing here is an error.
        assert decayed(wdjax.adamw(0.1, 0.5, rules), some) == {"head/kernel"}
    _, split, _ = nnx.split(model, nnx.Param, ...)
    assert decayed(wdjax.adamw(0.1, 0.5, rules), split) == WEIGHTS
    flags = dict(zip(canonical_paths(rest), jax.tree.leaves(rules.mask(rest)), strict=True))
    assert {path for path, flag in flags.items() if flag} == WEIGHTS
    assert {"norm/mean", "norm/var", "drop/rngs/key", "drop/rngs/count"} < set(flags)

    values = {path: np.asarray(leaf) for path, leaf in zip(canonical_paths(every), jax.tree.leaves(every), strict=True)}
    trainer = nnx.Optimizer(model, wdjax.adamw(0.1, 0.5, rules), wrt=nnx.Param)
    trainer.update(model, jax.tree.map(jnp.zeros_like, every))
    after = nnx.state(model, nnx.Param)
    news = dict(zip(canonical_paths(after), jax.tree.leaves(after), strict=True))
    for path, old in values.items():
        np.testing.assert_allclose(news[path], old * (0.95 if path in WEIGHTS else 1.0), rtol=1e-6)


def test_in_equinox() -> None:
    model = eqx.nn.Sequential(
        [eqx.nn.Linear(4, 4, key=jax.random.key(0)), eqx.nn.LayerNorm(4), eqx.nn.Lambda(jax.nn.relu)]
    )
    arrays, static = eqx.partition(model, eqx.is_inexact_array)
    for rules in (weights_only(), weights_only(model), only("layers/0/weight")):
        assert decayed(wdjax.adamw(0.1, 0.5, rules), arrays) == {"layers/0/weight"}
        flags = rules.mask(arrays)
        decaying, rest = eqx.partition(arrays, flags)
        assert canonical_paths(decaying) == ["layers/0/weight"]
        assert jax.tree.structure(eqx.combine(decaying, rest, static)) == jax.tree.structure(model)
    # A part alone: the rest are holes, and decide nothing.
    weights = eqx.filter(arrays, eqx.tree_at(lambda m: m.layers[1].weight, weights_only().mask(arrays), replace=True))
    assert decayed(wdjax.adamw(0.1, 0.5, weights_only()), weights) == {"layers/0/weight"}


def test_in_linen_with_the_model() -> None:
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, train: bool) -> jax.Array:
            x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
            gamma = self.param("gamma", nn.initializers.ones, (4,))
            return nn.Dropout(0.1, deterministic=not train)(x) * gamma[None]

    model, inputs = Block(), jnp.ones((2, 3))
    variables = model.init(jax.random.key(0), inputs, train=False)
    rules = weights_only(model, inputs, call_kwargs={"train": False})
    assert decayed(wdjax.adamw(0.1, 0.5, rules), variables["params"]) == {"Dense_0/kernel"}
    flags = rules.mask(variables)  # The whole of the variables, statistics too.
    assert {p for p, f in zip(canonical_paths(variables), jax.tree.leaves(flags), strict=True) if f} == {
        "params/Dense_0/kernel"
    }
    assert flags == weights_only().mask(variables)


def test_under_jit_vmap_and_eval_shape_the_same_ones_decay() -> None:
    rules = weights_only()
    expected = rules.mask(params())
    assert rules.mask(jax.eval_shape(params)) == expected
    seen = []
    jax.jit(lambda tree: seen.append(rules.mask(tree)))(params())
    assert seen == [expected]
    optimizer = wdjax.decoupled_decay(0.5, rules)
    three = jax.tree.map(lambda p: jnp.stack([p] * 3), params())
    updates, _ = jax.vmap(
        lambda tree: optimizer.update(jax.tree.map(jnp.zeros_like, tree), optimizer.init(tree), tree)
    )(three)
    moved = [bool(np.any(np.asarray(leaf))) for leaf in jax.tree.leaves(updates)]
    assert {path for path, flag in zip(canonical_paths(three), moved, strict=True) if flag} == WEIGHTS


def test_a_box_where_an_array_was_is_looked_into() -> None:
    decay = wdjax.decoupled_decay(0.1)
    plain = {"kernel": jnp.ones(2)}
    for params in (plain, {"kernel": nn.Partitioned(jnp.ones(2), names=(None,))}, plain):
        updates, _ = decay.update(jax.tree.map(jnp.zeros_like, params), decay.init(params), params)
        np.testing.assert_allclose(jax.tree.leaves(updates), [np.full(2, 0.1)], rtol=1e-6)
