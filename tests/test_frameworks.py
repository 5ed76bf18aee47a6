"""Real parameter trees of Flax Linen, Flax NNX, Equinox, Haiku and plain Python: who decays in each, and by how much.

What is expected of each tree is written out, leaf by leaf. The models are applied to train, so that the trees are the
ones that the libraries' own code makes, in the forms that `init` and `update` really see.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import equinox as eqx
import flax.struct
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import freeze
from flax.training.train_state import TrainState
from pure import as_pure
from slow import slow, slow_but

import wdjax
from wdjax import testing

pytestmark = pytest.mark.peers  # The libraries' own layers, and Optax's bias correction.

LEARNING_RATE, WEIGHT_DECAY, STEPS = 0.05, 0.5, 3
INPUTS = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)


class Case(NamedTuple):
    """A tree of parameters under test.

    Attributes:
        params: what `init` gets.
        loss: of such a tree.
        rules: who decays, as a user would write it.
        decays: the canonical path of every leaf, in the order of the tree, and whether it decays.
    """

    params: Any
    loss: Callable[[Any], jax.Array]
    rules: wdjax.Rules
    decays: dict[str, bool]


def mean_square(outputs: jax.Array) -> jax.Array:
    return jnp.mean((outputs - 1.0) ** 2)


# Flax Linen: dictionaries, boxes of partitioning, layers stacked by scan; "value" is a submodule of attention.


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: Any = None) -> tuple[jax.Array, None]:
        return nn.tanh(nn.Dense(4)(nn.LayerNorm()(x))), None


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel_init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        bias_init = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("embed",))
        x = nn.Dense(4, kernel_init=kernel_init, bias_init=bias_init)(x)
        stack = nn.scan(
            LinenBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
            metadata_params={nn.PARTITION_NAME: None},
        )
        x, _ = stack(name="blocks")(x, None)
        return nn.MultiHeadDotProductAttention(num_heads=2)(x)


# Under scan a bias and a scale have two axes, as heads give them to the biases of attention: "all that have two axes"
# would decay them.
LINEN_DECAYS = {
    "Dense_0/bias": False,
    "Dense_0/kernel": True,
    "MultiHeadDotProductAttention_0/key/bias": False,
    "MultiHeadDotProductAttention_0/key/kernel": True,
    "MultiHeadDotProductAttention_0/out/bias": False,
    "MultiHeadDotProductAttention_0/out/kernel": True,
    "MultiHeadDotProductAttention_0/query/bias": False,
    "MultiHeadDotProductAttention_0/query/kernel": True,
    "MultiHeadDotProductAttention_0/value/bias": False,
    "MultiHeadDotProductAttention_0/value/kernel": True,
    "blocks/Dense_0/bias": False,
    "blocks/Dense_0/kernel": True,
    "blocks/LayerNorm_0/bias": False,
    "blocks/LayerNorm_0/scale": False,
}


@functools.cache
def linen_boxed() -> Any:
    return jax.jit(LinenNet().init)(jax.random.key(0), INPUTS)["params"]


def linen(convert: Callable[[Any], Any] = lambda params: params) -> Case:
    model = LinenNet()
    return Case(
        convert(linen_boxed()),
        lambda params: mean_square(model.apply({"params": params}, INPUTS)),  # pyright: ignore[reportArgumentType]
        wdjax.all_but("bias", "LayerNorm_*"),
        LINEN_DECAYS,
    )


# Flax NNX: a State of Variables, of bare arrays, or the module itself as a tree; blocks in a list have integer keys.


class NNXBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.linear = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.tanh(self.linear(self.norm(x)))


class NNXNet(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.blocks = nnx.List([NNXBlock(rngs) for _ in range(2)])
        self.head = nnx.Linear(4, 2, rngs=rngs)
        self.value = nnx.Param(jnp.full(2, 0.5))  # Really called so, unlike a Variable's own "value".

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        return self.head(x) * self.value[None, None]


NNX_DECAYS = {
    "blocks/0/linear/bias": False,
    "blocks/0/linear/kernel": True,
    "blocks/0/norm/bias": False,
    "blocks/0/norm/scale": False,
    "blocks/1/linear/bias": False,
    "blocks/1/linear/kernel": True,
    "blocks/1/norm/bias": False,
    "blocks/1/norm/scale": False,
    "head/bias": False,
    "head/kernel": True,
    "value": True,
}
NNX_RULES = wdjax.only("kernel", "value")


def nnx_state(convert: Callable[[Any], Any] = lambda state: state) -> Case:
    graph, state, rest = nnx.split(NNXNet(), nnx.Param, ...)
    return Case(convert(state), lambda state: mean_square(nnx.merge(graph, state, rest)(INPUTS)), NNX_RULES, NNX_DECAYS)


def nnx_module() -> Case:
    return Case(NNXNet(), lambda model: mean_square(model(INPUTS)), NNX_RULES, NNX_DECAYS)


# Equinox: the model is the tree; a filter leaves None where there is no array.


class EquinoxNet(eqx.Module):
    embed: eqx.nn.Linear
    norm: eqx.nn.LayerNorm
    mlp: eqx.nn.MLP
    value: jax.Array

    def __init__(self) -> None:
        keys = jax.random.split(jax.random.key(0), 2)
        self.embed = eqx.nn.Linear(4, 4, use_bias=False, key=keys[0])
        self.norm = eqx.nn.LayerNorm(4)
        self.mlp = eqx.nn.MLP(4, 2, width_size=3, depth=1, key=keys[1])
        self.value = jnp.full(2, 0.5)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.mlp(self.norm(self.embed(x))) * self.value


EQUINOX_DECAYS = {
    "embed/weight": True,
    "norm/weight": False,
    "norm/bias": False,
    "mlp/layers/0/weight": True,
    "mlp/layers/0/bias": False,
    "mlp/layers/1/weight": True,
    "mlp/layers/1/bias": False,
    "value": True,
}


def equinox_loss(model: EquinoxNet) -> jax.Array:
    return mean_square(jax.vmap(jax.vmap(model))(INPUTS))


def equinox() -> Case:
    params, static = eqx.partition(EquinoxNet(), eqx.is_array)
    rules = wdjax.all_but("bias", "norm")
    return Case(params, lambda params: equinox_loss(eqx.combine(params, static)), rules, EQUINOX_DECAYS)


# Haiku: the names of modules contain "/" already.


def haiku() -> Case:
    def forward(x: jax.Array) -> jax.Array:
        x = hk.LayerNorm(axis=-1, create_scale=True, create_offset=True)(x)
        return hk.nets.MLP([3, 2])(x)

    model = hk.transform(forward)
    params = jax.jit(model.init)(jax.random.key(0), INPUTS)
    decays = {
        "layer_norm/offset": False,
        "layer_norm/scale": False,
        "mlp/~/linear_0/b": False,
        "mlp/~/linear_0/w": True,
        "mlp/~/linear_1/b": False,
        "mlp/~/linear_1/w": True,
    }
    loss = lambda params: mean_square(model.apply(params, None, INPUTS))  # noqa: E731
    return Case(params, loss, wdjax.only("mlp/~/linear_*/w"), decays)


# Plain Python: dataclasses, named tuples, lists, tuples.


class Attention(NamedTuple):
    query: jax.Array
    value: jax.Array


@functools.partial(jax.tree_util.register_dataclass, data_fields=["kernel", "value"], meta_fields=["name"])
@dataclasses.dataclass
class Layer:
    kernel: jax.Array
    value: jax.Array
    name: str = "layer"


@flax.struct.dataclass
class FlaxLayer:
    kernel: jax.Array
    value: jax.Array
    name: str = flax.struct.field(pytree_node=False, default="layer")


@chex.dataclass
class ChexLayer:
    kernel: jax.Array
    value: jax.Array


def plain() -> Case:
    rng = np.random.default_rng(1)

    def weights(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    params = {
        "attention": Attention(weights(4, 4), weights(4)),
        "chex": ChexLayer(kernel=weights(4, 4), value=weights(4)),  # pyright: ignore[reportCallIssue]
        "flax": FlaxLayer(weights(4, 4), weights(4)),
        "layers": [Layer(weights(4, 4), weights(4)), (weights(4, 4), None, [weights(4)])],
        "ordered": collections.OrderedDict(value=weights(4), bias=weights(4)),
        "value": weights(4),
    }
    decays = {
        "attention/query": False,
        "attention/value": True,
        "chex/kernel": False,
        "chex/value": True,
        "flax/kernel": False,
        "flax/value": True,
        "layers/0/kernel": False,
        "layers/0/value": True,
        "layers/1/0": False,
        "layers/1/2/0": True,
        "ordered/value": True,
        "ordered/bias": False,
        "value": True,
    }

    def loss(params: Any) -> jax.Array:
        return sum((jnp.mean(jnp.sin(leaf + 0.1) ** 2) for leaf in jax.tree.leaves(params)), jnp.float32(0.0))

    return Case(params, loss, wdjax.only("value", "layers/1/2"), decays)


CASES: dict[str, Callable[[], Case]] = {
    "Linen, boxed": linen,
    "Linen, boxed FrozenDict": functools.partial(linen, freeze),
    "Linen, unboxed": functools.partial(linen, nn.meta.unbox),
    "NNX, State of Variables": nnx_state,
    "NNX, State of arrays": functools.partial(nnx_state, as_pure),
    "NNX, plain dictionary": functools.partial(nnx_state, nnx.to_pure_dict),
    "NNX, Module": nnx_module,
    "Equinox": equinox,
    "Haiku": haiku,
    "plain Python": plain,
}
ONE_OF_EACH = ["Linen, boxed", "NNX, State of Variables", "Equinox", "Haiku", "plain Python"]

built = functools.cache(lambda name: CASES[name]())
every_tree = pytest.mark.parametrize("name", CASES)
every_library = pytest.mark.parametrize("name", ONE_OF_EACH)
few_libraries = pytest.mark.parametrize("name", slow_but(ONE_OF_EACH, "Linen, boxed", "Equinox"))


def zeros_like(tree: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, tree)


def flags(case: Case) -> Any:
    """The written-out expectation as a tree of the same form as the parameters, boxes and all."""
    return jax.tree.unflatten(jax.tree.structure(case.params), list(case.decays.values()))


def intended(case: Case) -> Callable[[Any], Any]:
    return lambda _: flags(case)


def float64(tree: Any) -> list[np.ndarray]:
    return [np.asarray(leaf).astype(np.float64) for leaf in jax.tree.leaves(tree)]


def decayed(before: Any, case: Case, fraction: float, anchors: Any = None) -> list[np.ndarray]:
    """In closed form: what is left of each leaf, in the order of the tree, if just those that should decay do."""
    starts = [np.zeros_like(leaf) for leaf in float64(before)] if anchors is None else float64(anchors)
    rows = zip(float64(before), starts, case.decays.values(), strict=True)
    return [leaf - fraction * decays * (leaf - start) for leaf, start, decays in rows]


@functools.cache
def gradient(name: str) -> Callable[[Any], Any]:
    return jax.jit(jax.grad(built(name).loss))


def sees(seen: list[str]) -> wdjax.Rules:
    """Rules that note which paths they are asked about."""

    def predicate(leaf: wdjax.Leaf) -> bool:
        seen.append(leaf.path)
        return True

    return wdjax.only(predicate)


# Paths.


@every_tree
def test_the_canonical_path_of_every_leaf(name: str) -> None:
    case = built(name)
    assert wdjax.paths.canonical_paths(case.params) == list(case.decays)
    assert wdjax.paths.canonical_paths(gradient(name)(case.params)) == list(case.decays)
    assert jax.tree.leaves(case.rules.mask(case.params)) == list(case.decays.values())


@every_tree
def test_rules_see_the_same_paths_at_init_and_at_update(name: str) -> None:
    case, seen = built(name), []
    decay = wdjax.decoupled_decay(WEIGHT_DECAY, sees(seen))
    state = decay.init(case.params)
    assert seen == list(case.decays)
    seen.clear()
    jax.eval_shape(decay.update, zeros_like(case.params), state, case.params)
    assert seen == list(case.decays)


FORMS = [
    ("NNX, State of Variables", "NNX, State of arrays"),
    ("NNX, State of Variables", "NNX, plain dictionary"),
    ("NNX, Module", "NNX, State of arrays"),
    ("Linen, boxed", "Linen, unboxed"),
    ("Linen, boxed FrozenDict", "Linen, unboxed"),
]


@pytest.mark.parametrize(("at_init", "at_update"), FORMS)
def test_init_on_one_form_and_update_on_another(at_init: str, at_update: str) -> None:
    first, second = built(at_init), built(at_update)
    moved = jax.tree.map(lambda p: p + 1.0, second.params)
    for mask in (first.rules, intended(first), intended(second)):
        for toward, anchors in ((None, None), ("init", second.params), (first.params, second.params)):
            decay = wdjax.independent_decay(WEIGHT_DECAY, mask, toward=toward)
            updates, _ = decay.update(zeros_like(moved), decay.init(first.params), moved)
            chex.assert_trees_all_equal_structs(updates, moved)
            wanted = decayed(moved, second, WEIGHT_DECAY, anchors)
            chex.assert_trees_all_close(float64(optax.apply_updates(moved, updates)), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("params", "updates"),
    [("Linen, boxed", "Linen, unboxed"), ("NNX, State of Variables", "NNX, State of arrays")],
)
def test_bare_updates_for_boxed_parameters(params: str, updates: str) -> None:
    case, zeros = built(params), zeros_like(built(updates).params)
    decay = wdjax.decoupled_decay(WEIGHT_DECAY, case.rules, toward="init")
    moved = jax.tree.map(lambda p: p + 1.0, case.params)
    new, _ = decay.update(zeros, decay.init(case.params), moved)
    chex.assert_trees_all_equal_structs(new, zeros)
    for update, decays in zip(float64(new), case.decays.values(), strict=True):
        np.testing.assert_allclose(update, WEIGHT_DECAY * decays, rtol=1e-6)


# A module with a `__call__` is a function too; a tree of booleans of its kind is still a mask, and not called.
@pytest.mark.parametrize("name", ["NNX, State of Variables", "NNX, Module", "Linen, boxed FrozenDict", "Equinox"])
def test_a_mask_tree_of_the_librarys_own_kind(name: str) -> None:
    case = built(name)
    decay = wdjax.independent_decay(WEIGHT_DECAY, flags(case))
    updates, _ = decay.update(zeros_like(case.params), decay.init(case.params), case.params)
    wanted = decayed(case.params, case, WEIGHT_DECAY)
    chex.assert_trees_all_close(float64(optax.apply_updates(case.params, updates)), wanted, rtol=1e-6)


# Decay: in closed form with zero gradients, and beside Adam in training.


@every_tree
@pytest.mark.parametrize("toward", [slow(None), "init"])
def test_with_zero_gradients_just_the_intended_leaves_decay(name: str, toward: Any) -> None:
    case = built(name)
    anchor = None if toward is None else case.params
    expected = LEARNING_RATE * WEIGHT_DECAY
    optimizer = wdjax.adamw(LEARNING_RATE, WEIGHT_DECAY, case.rules, toward=toward)
    testing.assert_only_decays(optimizer, case.params, expected, intended(case), toward=anchor)


@every_library
def test_a_decay_of_everything_is_told_from_the_intended_one(name: str) -> None:
    case = built(name)
    first = next(path for path, decays in case.decays.items() if not decays)
    with pytest.raises(AssertionError, match=f"'{first}' must stay bit-identical"):
        testing.assert_only_decays(
            wdjax.adamw(LEARNING_RATE, WEIGHT_DECAY), case.params, LEARNING_RATE * WEIGHT_DECAY, intended(case)
        )


@pytest.mark.parametrize("name", slow_but(CASES, "Linen, boxed", "NNX, State of Variables", "Equinox", "Haiku"))
@pytest.mark.parametrize("toward", [slow(None), "init"])
def test_training_follows_adam_with_the_intended_decay(name: str, toward: Any) -> None:
    case = built(name)
    optimizer = wdjax.adamw(LEARNING_RATE, WEIGHT_DECAY, case.rules, toward=toward)

    @jax.jit
    def step(grads: Any, state: Any, params: Any) -> Any:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, state = case.params, optimizer.init(case.params)
    weights = float64(params)
    anchors = float64(params) if toward == "init" else [np.zeros_like(w) for w in weights]
    first, second = ([np.zeros_like(w) for w in weights] for _ in range(2))
    for t in range(1, STEPS + 1):
        grads = gradient(name)(params)
        params, state = step(grads, state, params)
        chex.assert_trees_all_equal_structs(params, case.params)
        for i, (g, anchor, decays) in enumerate(zip(float64(grads), anchors, case.decays.values(), strict=True)):
            first[i] += 0.1 * (g - first[i])
            second[i] += 0.001 * (g**2 - second[i])
            direction = first[i] / (1 - 0.9**t) / (np.sqrt(second[i] / (1 - 0.999**t)) + 1e-8)
            weights[i] -= LEARNING_RATE * (direction + WEIGHT_DECAY * decays * (weights[i] - anchor))
        # Optax corrects the bias in float32: of 1 - 0.999 it keeps four digits.
        chex.assert_trees_all_close(float64(params), weights, rtol=1e-5, atol=1e-5)


@every_library
def test_the_penalty_in_the_loss(name: str) -> None:
    case = built(name)
    rows = zip(float64(case.params), case.decays.values(), strict=True)
    by_hand = sum(0.5 * WEIGHT_DECAY * np.sum(leaf**2) for leaf, decays in rows if decays)
    np.testing.assert_allclose(wdjax.l2_penalty(case.params, WEIGHT_DECAY, case.rules), by_hand, rtol=1e-6)


def test_train_state() -> None:
    case = built("Linen, boxed")
    optimizer = wdjax.adamw(LEARNING_RATE, WEIGHT_DECAY, case.rules)
    state = TrainState.create(apply_fn=case.loss, params=case.params, tx=optimizer)
    step = jax.jit(lambda state, grads: state.apply_gradients(grads=grads))
    for _ in range(STEPS):
        state = step(state, zeros_like(case.params))
    want = case.params
    for _ in range(STEPS):
        want = decayed(want, case, LEARNING_RATE * WEIGHT_DECAY)
    chex.assert_trees_all_close(float64(state.params), want, rtol=1e-6)
    trained = TrainState.create(apply_fn=case.loss, params=case.params, tx=optimizer)
    for _ in range(STEPS):
        trained = step(trained, gradient("Linen, boxed")(trained.params))
    assert case.loss(trained.params) < case.loss(case.params)


# Equinox's own way: filtered gradients of the whole model.


# The whole model has leaves that are functions, its activations.
@pytest.mark.parametrize("given", ["filtered", "model"])
def test_equinox_filters(given: str) -> None:
    model, case = EquinoxNet(), built("Equinox")
    optimizer = wdjax.adamw(LEARNING_RATE, WEIGHT_DECAY, case.rules, toward="init")
    state = optimizer.init(eqx.filter(model, eqx.is_array))

    @eqx.filter_jit
    def step(model: EquinoxNet, state: Any, scale: float) -> Any:
        grads = eqx.filter_grad(equinox_loss)(model)
        grads = jax.tree.map(lambda g: scale * g, grads)
        params = eqx.filter(model, eqx.is_array) if given == "filtered" else model
        updates, state = optimizer.update(grads, state, params)
        return eqx.apply_updates(model, updates), state

    moved = eqx.apply_updates(model, jax.tree.map(jnp.ones_like, eqx.filter(model, eqx.is_array)))
    still, _ = step(moved, state, 0.0)
    want = decayed(eqx.filter(moved, eqx.is_array), case, LEARNING_RATE * WEIGHT_DECAY, case.params)
    chex.assert_trees_all_close(float64(eqx.filter(still, eqx.is_array)), want, rtol=1e-6)
    assert still.mlp.activation is model.mlp.activation
    assert still.embed.bias is None
    trained = model
    for _ in range(STEPS):
        trained, state = step(trained, state, 1.0)
    assert equinox_loss(trained) < equinox_loss(model)


# NNX's own way: nnx.Optimizer, which gives Variables to `init` and bare arrays to `update`.


def nnx_step(model: nnx.Module, optimizer: nnx.Optimizer, grads: Any) -> None:
    optimizer.update(model, grads)


def moved_model() -> NNXNet:
    """A model all of whose parameters are one above those of `NNXNet()`."""
    model = NNXNet()
    nnx.update(model, jax.tree.map(lambda p: p + 1.0, nnx.state(model, nnx.Param)))
    return model


NNX_MASKS = {
    "rules": NNX_RULES,
    "rules.mask": NNX_RULES.mask,
    "a tree of Variables": NNX_RULES.mask(nnx.state(NNXNet(), nnx.Param)),
    "a tree of arrays": NNX_RULES.mask(as_pure(nnx.state(NNXNet(), nnx.Param))),
}


@pytest.mark.parametrize("toward", [slow(None), "init"])
@pytest.mark.parametrize("mask", NNX_MASKS.values(), ids=NNX_MASKS)
def test_nnx_optimizer_decays_just_the_intended_leaves(mask: Any, toward: Any) -> None:
    case, model = built("NNX, State of Variables"), NNXNet()
    start = nnx.state(model, nnx.Param)
    optimizer = nnx.Optimizer(model, wdjax.adamw(LEARNING_RATE, WEIGHT_DECAY, mask, toward=toward), wrt=nnx.Param)
    anchors = float64(start)
    nnx.update(model, nnx.state(moved_model(), nnx.Param))
    before = float64(nnx.state(model, nnx.Param))
    step = nnx.jit(nnx_step)
    for _ in range(STEPS):
        step(model, optimizer, zeros_like(nnx.state(model, nnx.Param)))
    after = float64(nnx.state(model, nnx.Param))
    rows = zip(before, after, anchors, case.decays.items(), strict=True)
    for old, new, anchor, (path, decays) in rows:
        toward_it = anchor if toward == "init" else 0.0
        want = testing.decayed_weights(old, LEARNING_RATE, WEIGHT_DECAY * decays, STEPS, toward=toward_it)
        np.testing.assert_allclose(new, want, rtol=1e-6, err_msg=path)
        assert decays or np.array_equal(new, old)


def test_nnx_optimizer_shows_rules_the_same_paths_at_init_and_at_update() -> None:
    seen: list[str] = []
    model = NNXNet()
    optimizer = nnx.Optimizer(model, wdjax.adamw(LEARNING_RATE, WEIGHT_DECAY, sees(seen)), wrt=nnx.Param)
    assert list(dict.fromkeys(seen)) == list(NNX_DECAYS)  # The recipe looks at the rates once more.
    seen.clear()
    nnx.jit(nnx_step)(model, optimizer, zeros_like(nnx.state(model, nnx.Param)))
    assert seen == list(NNX_DECAYS)


def test_nnx_optimizer_of_a_part_of_the_model() -> None:
    model, part = moved_model(), nnx.All(nnx.Param, nnx.PathContains("head"))
    before = dict(nnx.to_flat_state(as_pure(nnx.state(model, nnx.Param))))
    optimizer = nnx.Optimizer(model, wdjax.adamw(LEARNING_RATE, WEIGHT_DECAY, wdjax.only("kernel")), wrt=part)
    optimizer.update(model, zeros_like(nnx.state(model, nnx.Param)))
    after = dict(nnx.to_flat_state(as_pure(nnx.state(model, nnx.Param))))
    for path, old in before.items():
        factor = 1 - LEARNING_RATE * WEIGHT_DECAY if path == ("head", "kernel") else 1.0
        np.testing.assert_allclose(after[path], factor * np.asarray(old, np.float64), rtol=1e-6)
    # A rule for what this optimizer does not hold is a mistake, and is told so.
    with pytest.raises(ValueError, match="'scale' matches no parameter"):
        nnx.Optimizer(model, wdjax.adamw(LEARNING_RATE, WEIGHT_DECAY, wdjax.all_but("scale")), wrt=part)


@pytest.mark.slow
def test_nnx_optimizer_trains() -> None:
    model, case = NNXNet(), built("NNX, State of Variables")
    transformation = wdjax.adamw(LEARNING_RATE, WEIGHT_DECAY, NNX_RULES, toward="init")
    optimizer = nnx.Optimizer(model, transformation, wrt=nnx.Param)

    @nnx.jit
    def step(model: NNXNet, optimizer: nnx.Optimizer) -> jax.Array:
        loss, grads = nnx.value_and_grad(lambda model: mean_square(model(INPUTS)))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(STEPS)]
    assert losses[-1] < losses[0]
    params, state, update = case.params, transformation.init(case.params), jax.jit(transformation.update)
    for _ in range(STEPS):
        updates, state = update(gradient("NNX, State of Variables")(params), state, params)
        params = optax.apply_updates(params, updates)
    chex.assert_trees_all_close(float64(nnx.state(model, nnx.Param)), float64(params), rtol=1e-5, atol=1e-6)


def test_nnx_variables_of_several_kinds_and_names() -> None:
    class Odd(nnx.Module):
        def __init__(self) -> None:
            self.value = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
            self.nested = nnx.Param({"value": jnp.ones(2), "bias": jnp.ones(2)})
            self.raw = nnx.Param(jnp.ones(2))
            self.statistics = nnx.BatchStat(jnp.ones(2))

    model = Odd()
    state = nnx.state(model)
    paths = ["nested/bias", "nested/value", "raw", "statistics", "value/bias", "value/kernel"]
    assert wdjax.paths.canonical_paths(state) == wdjax.paths.canonical_paths(as_pure(state)) == paths
    assert wdjax.paths.canonical_paths(model) == paths
    mask = wdjax.only("value").mask(as_pure(state))
    assert jax.tree.leaves(mask) == [False, True, False, False, True, True]


# What the libraries hand out that is no tree of parameters, and what to pass instead.


class Trained(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.BatchNorm(use_running_average=True)(nn.Dense(2)(x))


class Dropping(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.linear = nnx.Linear(4, 2, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


class Normed(nnx.Module):
    def __init__(self) -> None:
        self.linear = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(2, rngs=nnx.Rngs(0))


def variables() -> Any:
    return Trained().init(jax.random.key(0), INPUTS)


def train_state() -> Any:
    return TrainState.create(apply_fn=Trained().apply, params=variables()["params"], tx=optax.adam(0.1))


ENTRIES: dict[str, Callable[[Any], Any]] = {
    "adamw": lambda params: wdjax.adamw(0.1, 0.1).init(params),
    "decoupled_decay": lambda params: wdjax.decoupled_decay(0.1).init(params),
    "freeze": lambda params: wdjax.freeze(optax.adam(0.1), wdjax.by_path({}, default=False)).init(params),
    "monitor": lambda params: wdjax.monitor(optax.adam(0.1)).init(params),
    "plan": lambda params: wdjax.plan(params, 0.1),
    "audit": lambda params: wdjax.audit(wdjax.adamw(0.1, 0.1), params),
    "l2_penalty": lambda params: wdjax.l2_penalty(params, 0.1),
}
OF_NNX, OF_A_MODEL = (
    "Pass nnx.state(model, nnx.Param).",
    "Pass the arrays of a model: model.init(key, inputs)['params'] in",
)
HANDED_OUT: dict[str, tuple[Callable[[], Any], str, str]] = {
    "TrainState of Linen": (train_state, "got a flax.TrainState of ", "arrays. Pass state.params."),
    "Module of Linen": (Trained, "got Trained", OF_A_MODEL),
    "class of a Module": (lambda: Trained, "got <class 'test_frameworks.Trained'>. ", OF_A_MODEL),
    "nnx.Optimizer": (lambda: nnx.Optimizer(NNXNet(), optax.adam(0.1), wrt=nnx.Param), "got a flax.Optimizer", OF_NNX),
    "nnx.Module with statistics": (Normed, "", OF_NNX),
    "nnx.State with statistics": (
        lambda: nnx.state(Normed()),
        "got a flax.BatchStat of 1 array at 'norm/mean'. ",
        OF_NNX,
    ),
    "nnx.State with keys": (lambda: nnx.state(Dropping()), "at 'dropout/rngs/count'. ", OF_NNX),
    "nnx.State of statistics": (lambda: nnx.state(Normed(), nnx.BatchStat), "got a flax.BatchStat", OF_NNX),
    "nnx.split": (lambda: nnx.split(Normed()), "at '1/norm/mean'. ", OF_NNX),
    "whole Equinox model": (EquinoxNet, " at 'mlp/activation'. ", OF_A_MODEL),
    "transformed Haiku": (lambda: hk.transform(lambda x: hk.Linear(2)(x)), "init_fn", OF_A_MODEL),
}
ACCEPTED_WHOLE = ("plan", "l2_penalty")  # Equinox differentiates whole models, and rules may be asked about them.


@pytest.mark.filterwarnings("ignore:plan")
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", HANDED_OUT)
def test_what_libraries_hand_out_beside_parameters(name: str, entry: str) -> None:
    make, got, remedy = HANDED_OUT[name]
    if name == "whole Equinox model" and entry in ACCEPTED_WHOLE:
        assert ENTRIES[entry](make()) is not None
        return
    with pytest.raises(TypeError, match=rf"^{entry}: params must be a tree of parameters, got ") as caught:
        ENTRIES[entry](make())
    message = str(caught.value)
    assert got in message
    assert remedy in message
    assert len(message) < 400


PLAIN: dict[str, Callable[[], Any]] = {
    "all collections of Linen": variables,
    "state of a model": lambda: train_state().params,
    "parameters of NNX": lambda: nnx.state(Normed(), nnx.Param),
    "parameters of LoRA": lambda: nnx.state(nnx.LoRA(2, 1, 2, rngs=nnx.Rngs(0)), nnx.LoRAParam),
    "filtered model of Equinox": lambda: eqx.filter(EquinoxNet(), eqx.is_inexact_array),
}


@pytest.mark.filterwarnings("ignore:plan")
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", PLAIN)
def test_what_plainly_are_parameters_is_taken(name: str, entry: str) -> None:
    assert ENTRIES[entry](PLAIN[name]()) is not None


# Haiku: prefix trees by module name, one of which is the beginning of another.


def test_a_prefix_tree_of_haiku_modules() -> None:
    params = {"mlp": {"w": jnp.ones(2)}, "mlp/~/linear_0": {"w": jnp.ones(2)}, "mlp/~/linear_1": {"w": jnp.ones(2)}}
    mask = {"mlp": True, "mlp/~/linear_0": False, "mlp/~/linear_1": True}
    decay = wdjax.decoupled_decay(WEIGHT_DECAY, mask)
    updates, _ = decay.update(zeros_like(params), decay.init(params), params)
    assert [float(u["w"][0]) for u in updates.values()] == [WEIGHT_DECAY, 0.0, WEIGHT_DECAY]


# Optax's own arguments.


def one_update(optimizer: optax.GradientTransformation, name: str) -> list[np.ndarray]:
    params = jax.tree.map(lambda p: p + 0.5, built(name).params)
    updates, _ = optimizer.update(gradient(name)(params), optimizer.init(built(name).params), params)
    chex.assert_trees_all_equal_structs(updates, params)
    return float64(updates)


@few_libraries
def test_masks_labels_and_holes_of_optax(name: str) -> None:
    case = built(name)
    labels = wdjax.by_path([(lambda leaf: case.decays[leaf.path], "decayed")], default="bare")
    table = wdjax.by_path([(lambda leaf: case.decays[leaf.path], WEIGHT_DECAY)], default=0.0)
    decay, rate = wdjax.decoupled_decay(WEIGHT_DECAY), optax.scale_by_learning_rate(LEARNING_RATE)
    sgd = optax.sgd(LEARNING_RATE)
    optimizers = {
        "add_decayed_weights": optax.chain(optax.add_decayed_weights(WEIGHT_DECAY, mask=case.rules.mask), rate),
        "masked": optax.chain(optax.masked(decay, case.rules.mask), rate),
        # Rules for the whole model also serve where a part of it is hidden.
        "rules inside masked": optax.chain(
            optax.masked(wdjax.decoupled_decay(WEIGHT_DECAY, case.rules), case.rules.mask), rate
        ),
        "partition": optax.partition({"decayed": wdjax.sgdw(LEARNING_RATE, WEIGHT_DECAY), "bare": sgd}, labels.values),
        "rules inside partition": optax.partition(
            {"decayed": wdjax.sgdw(LEARNING_RATE, WEIGHT_DECAY, case.rules), "bare": sgd}, labels.values
        ),
        "around": wdjax.with_decoupled_decay(sgd, table, learning_rate=LEARNING_RATE),
    }
    want = one_update(wdjax.sgdw(LEARNING_RATE, WEIGHT_DECAY, intended(case)), name)
    for kind, optimizer in optimizers.items():
        chex.assert_trees_all_close(one_update(optimizer, name), want, rtol=1e-5, atol=1e-6, custom_message=kind)
    chex.assert_trees_all_close(
        one_update(optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY, mask=case.rules.mask), name),
        one_update(wdjax.adamw(LEARNING_RATE, WEIGHT_DECAY, intended(case)), name),
        rtol=1e-5,
        atol=1e-6,
    )
    assert max(np.abs(a - b).max() for a, b in zip(one_update(sgd, name), want, strict=True)) > 1e-3


@few_libraries
def test_muon_with_the_mask_of_rules(name: str) -> None:
    case = built(name)

    def muon(rate: Any) -> optax.GradientTransformation:
        return optax.contrib.muon(LEARNING_RATE, ns_steps=1, weight_decay=rate, weight_decay_mask=case.rules.mask)

    params = jax.tree.map(lambda p: p + 0.5, case.params)
    grads = gradient(name)(params)
    update = jax.jit(lambda rate: muon(rate).update(grads, muon(rate).init(params), params)[0])
    bare, masked = (float64(update(rate)) for rate in (0.0, WEIGHT_DECAY))
    for old, new, leaf, (path, decays) in zip(bare, masked, float64(params), case.decays.items(), strict=True):
        # Muon takes matrices; what it leaves to Adam it does not decay.
        fraction = LEARNING_RATE * WEIGHT_DECAY * (decays and leaf.ndim == 2)
        np.testing.assert_allclose(new, old - fraction * leaf, rtol=1e-5, atol=1e-6, err_msg=path)


@every_library
def test_params_like_parts_of_the_state(name: str) -> None:
    case = built(name)
    decays = {
        "decoupled_decay": wdjax.decoupled_decay(WEIGHT_DECAY, case.rules, toward="init"),
        "with_decoupled_decay": wdjax.with_decoupled_decay(
            optax.sgd(LEARNING_RATE, momentum=0.9), WEIGHT_DECAY, case.rules, learning_rate=LEARNING_RATE, toward="init"
        ),
    }
    for decay in decays.values():
        state = decay.init(case.params)
        marked = optax.tree.map_params(
            decay, lambda leaf: jnp.full_like(leaf, 7.0), state, transform_non_params=lambda leaf: leaf - 1
        )
        chex.assert_trees_all_equal_structs(marked, state)
        found = optax.tree.get(marked, "DecayState")
        assert found.count == -1
        assert len(jax.tree.leaves(found.anchor)) == len(case.decays)
        assert all(np.all(leaf == 7.0) for leaf in float64(found.anchor))
