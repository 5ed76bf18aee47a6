"""Frozen parameters keep every bit, wherever the optimizer was assembled; what is tied is decayed once, or told of."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import chex
import equinox as eqx
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from slow import slow

import wdjax
from wdjax import freeze, only

pytestmark = pytest.mark.peers  # Optax's optimizers.

ODD = np.array([0.0, -0.0, 1.5, -2.25, np.inf, -np.inf, np.nan, 3e38], np.float32)


def params() -> dict[str, Any]:
    return {
        "encoder": {"kernel": jnp.array(ODD), "half": jnp.array(ODD, jnp.bfloat16), "z": jnp.array(ODD[:3] + 1j)},
        "head": {"kernel": jnp.array([1.0, -2.0]), "bias": jnp.array([0.5])},
        "empty": None,
    }


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "adamw": lambda: wdjax.adamw(0.1, 0.5),
    "optax.adamw": lambda: optax.adamw(0.1, weight_decay=0.5),
    "decay after the learning rate": lambda: optax.chain(optax.sgd(0.1), wdjax.independent_decay(0.5)),
    "proximal": lambda: optax.chain(optax.sgd(0.1), wdjax.proximal_step(wdjax.L1(), 0.5, learning_rate=0.1)),
    "wrapped": lambda: wdjax.with_decoupled_decay(optax.adam(0.1), 0.5, learning_rate=0.1),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(1.0), wdjax.adamw(0.1, 0.5)),
    "noise": lambda: optax.chain(wdjax.sgdw(0.1, 0.5), optax.add_noise(0.1, 0.55, jax.random.key(0))),
    "MultiSteps": lambda: optax.MultiSteps(wdjax.adamw(0.1, 0.5), 2),
    "inject_hyperparams": lambda: optax.inject_hyperparams(wdjax.adamw)(0.1, 0.5),
    "partition": lambda: optax.partition(
        {"a": wdjax.adamw(0.1, 0.5), "b": wdjax.sgdw(0.1, 0.5)}, wdjax.by_path({"bias": "b"}, default="a").values
    ),
    "masked rules that speak of it": lambda: wdjax.adamw(0.1, 0.5, wdjax.all_but("encoder", "bias")),
    "a plain identity": optax.identity,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("run", [slow(lambda f: f, id="eager"), pytest.param(jax.jit, id="jit")])
def test_every_bit_stays(name: str, run: Any) -> None:
    tree = params()
    optimizer = freeze(OPTIMIZERS[name](), only("encoder"))
    state = optimizer.init(tree)

    @run
    def step(tree: Any, state: Any, grads: Any) -> Any:
        updates, state = optimizer.update(grads, state, tree)
        return optax.apply_updates(tree, updates), state, updates

    before = bits(tree["encoder"])
    head = bits(tree["head"])
    for k in range(4):
        grads = jax.tree.map(lambda p, k=k: jnp.full_like(p, 1.0 + k), tree)
        tree, state, updates = step(tree, state, grads)
        assert bits(tree["encoder"]) == before
        assert jax.tree.map(lambda u: u.dtype, updates["encoder"]) == jax.tree.map(lambda p: p.dtype, tree["encoder"])
    assert bits(tree["head"]) != head


def test_the_others_are_trained_as_without_the_frozen() -> None:
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), wdjax.adamw(0.1, 0.5, wdjax.all_but("bias")))
    both, alone = params(), {"head": params()["head"], "empty": None}
    frozen = freeze(optimizer, only("encoder"))
    states = frozen.init(both), optimizer.init(alone)
    for _ in range(3):
        # Infinite gradients of what is frozen are in no norm.
        grads = {
            "encoder": jax.tree.map(lambda p: jnp.full_like(p, jnp.inf), both["encoder"]),
            "head": {"kernel": jnp.array([3.0, 4.0]), "bias": jnp.array([1.0])},
            "empty": None,
        }
        updates, first = frozen.update(grads, states[0], both)
        expected, second = optimizer.update({"head": grads["head"], "empty": None}, states[1], alone)
        both, alone = optax.apply_updates(both, updates), optax.apply_updates(alone, expected)
        states = first, second
        np.testing.assert_array_equal(both["head"]["kernel"], alone["head"]["kernel"])
        np.testing.assert_array_equal(both["head"]["bias"], alone["head"]["bias"])
    assert len(jax.tree.leaves(states[0])) == len(jax.tree.leaves(states[1]))  # No state for what is frozen.


def test_a_negative_zero_and_the_smallest_numbers() -> None:
    # Where an addition flushes denormal numbers to zero no update can keep them: the smallest normal ones stay.
    tiny = jnp.array([-0.0, np.finfo(np.float32).tiny, -np.finfo(np.float32).tiny])
    optimizer = freeze(optax.sgd(0.1), {"w": True, "v": False})
    tree = {"w": tiny, "v": tiny}
    updates, _ = optimizer.update({"w": tiny, "v": tiny}, optimizer.init(tree), tree)
    assert bits(optax.apply_updates(tree, updates)["w"]) == bits(tiny)


@pytest.mark.parametrize(
    ("optimizer", "kept"),
    [
        (freeze(optax.MultiSteps(optax.sgd(0.1), 2), only("w")), -0.0),
        (optax.MultiSteps(freeze(optax.sgd(0.1), only("w")), 2), 0.0),
    ],
    ids=["outermost", "inside"],
)
def test_it_stands_outermost_around_multi_steps(optimizer: Any, kept: float) -> None:
    params = {"w": jnp.array([-0.0]), "v": jnp.array([1.0])}
    state = optimizer.init(params)
    for _ in range(2):
        updates, state = optimizer.update({"w": jnp.ones(1), "v": jnp.ones(1)}, state, params)
        params = optax.apply_updates(params, updates)
    assert bits(params["w"]) == bits(jnp.array([kept]))
    np.testing.assert_allclose(params["v"], 0.9, rtol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("dtype", "tiny"), [(jnp.float32, 1e-40), (jnp.bfloat16, 1e-40), (jnp.float64, 1e-310)])
def test_when_a_subnormal_weight_keeps_its_bits(dtype: Any, tiny: float) -> None:
    params = {"w": jnp.asarray(np.full(8, tiny).astype(np.dtype(dtype)))}

    def step(params: Any, mask: Any) -> Any:
        optimizer = freeze(optax.sgd(0.1), mask)
        return optax.apply_updates(params, optimizer.update(params, optimizer.init(params), params)[0])

    assert bits(jax.jit(step, static_argnums=1)(params, only("w"))) == bits(params)
    # Where the addition can't be left out, it flushes.
    rows = jax.jit(lambda params: step(params, {"w": np.arange(8) < 4}))(params)
    for new in (step(params, only("w")), rows):
        np.testing.assert_array_equal(np.asarray(new["w"]).astype(np.float64)[:4], 0)


@pytest.mark.parametrize(
    "mask",
    [
        only("encoder"),
        {"encoder": True, "head": False, "empty": False},
        lambda tree: {"encoder": True, "head": jax.tree.map(lambda p: False, tree["head"]), "empty": False},
    ],
    ids=["rules", "prefix", "function"],
)
def test_every_kind_of_mask(mask: Any) -> None:
    tree = params()
    optimizer = freeze(optax.sgd(0.1), mask)
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, tree), optimizer.init(tree), tree)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(updates["encoder"]))
    np.testing.assert_allclose(updates["head"]["kernel"], -0.1)


def test_integers_keys_and_missing_gradients_stay_too() -> None:
    tree = {
        "enc": {"buffer": jnp.arange(5) * 100, "flag": jnp.array([True]), "key": jax.random.key(0), "w": jnp.ones(2)},
        "head": jnp.ones(2),
    }
    optimizer = freeze(optax.adamw(0.1, weight_decay=0.5), {"enc": True, "head": False})
    float0 = np.zeros(5, jax.dtypes.float0)
    for buffer in (jnp.zeros(5, int), float0, None):
        grads = {"enc": {"buffer": buffer, "flag": None, "key": None, "w": None}, "head": jnp.ones(2)}
        updates, _ = optimizer.update(grads, optimizer.init(tree), tree)
        assert updates["enc"]["flag"] is updates["enc"]["key"] is None
        assert bits(tree["enc"]["w"] + updates["enc"]["w"]) == bits(tree["enc"]["w"])
        if buffer is not None and buffer is not float0:
            assert not np.any(updates["enc"]["buffer"])
        np.testing.assert_allclose(updates["head"], -0.15, rtol=1e-5)
    flags = {"enc": {**dict.fromkeys(tree["enc"]), "flag": jnp.array([True])}, "head": jnp.ones(2)}
    assert not np.any(optimizer.update(flags, optimizer.init(tree), tree)[0]["enc"]["flag"])
    # Their own optimizer may go on moving integers that are not frozen.
    moved, _ = freeze(optax.sgd(1.0), only("w")).update({"w": 1.0, "n": 3}, optax.sgd(1.0).init({}), {"w": 1.0, "n": 3})
    assert float(moved["n"]) == -3


NEIGHBOURS = {
    "layers": [
        {"weight": jnp.ones((4, 4)), "bias": jnp.ones((4, 4))},  # A LayerNorm of two axes, told by its bias.
        {"weight": jnp.ones((4, 4)), "bias": jnp.ones(4)},
    ],
    "stack": {"w": jnp.ones((3, 4, 4)), "b": jnp.ones((3, 4))},
    "embed": {"embedding": jnp.ones((5, 4))},
}


@pytest.mark.parametrize("frozen", [only("bias", "b"), only("layers/0"), only("stack"), wdjax.all_but("embed")])
@pytest.mark.parametrize(
    ("rate", "mask"),
    [
        (0.5, wdjax.weights_only()),
        (0.5 * wdjax.by_depth("stack", 0.5, first="embed", last="layers", axis=0), wdjax.weights_only()),
        (0.5 * wdjax.by_depth("layers/*", 0.5, first="embed", last="stack"), wdjax.weights_only()),
        (0.5 * wdjax.by_path({"stack": wdjax.by_width(2, stacked_axes=1)}, default=wdjax.by_width(2)), None),
        (wdjax.by_path({"stack": 0.1, lambda leaf: leaf.ndim == 1: 0.2}, default=0.3), None),
    ],
)
def test_rules_inside_decide_as_if_it_were_there(frozen: wdjax.Rules, rate: Any, mask: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        planned = wdjax.plan(NEIGHBOURS, rate, mask, frozen=frozen)
    optimizer = freeze(wdjax.decoupled_decay(rate, mask), frozen)
    state = optimizer.init(NEIGHBOURS)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, NEIGHBOURS), state, NEIGHBOURS)
    for path, update in zip(wdjax.paths.canonical_paths(NEIGHBOURS), jax.tree.leaves(updates), strict=True):
        expected = np.array(planned[path].rate)
        shape = (-1,) + (1,) * (update.ndim - 1) if expected.ndim else ()
        np.testing.assert_allclose(np.abs(update), np.broadcast_to(expected.reshape(shape), update.shape), rtol=1e-6)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_second_model_that_differs_in_what_is_frozen_is_decided_anew(order: Any) -> None:
    """With a bias of its shape, frozen or not, (3, 16) may be a stack of vectors: the rule asks."""
    frozen_shapes = [(16,), (3, 16)]
    optimizer = freeze(wdjax.sgdw(0.1, 0.2, wdjax.weights_only()), only("bias"))
    for i in order:
        tree = {"layer": {"kernel": jnp.ones((3, 16)), "bias": jnp.ones(frozen_shapes[i])}}
        if frozen_shapes[i] == (3, 16):
            with pytest.raises(ValueError, match="'layer/kernel'"):
                optimizer.update(tree, optimizer.init(tree), tree)
            continue
        updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, tree), optimizer.init(tree), tree)
        np.testing.assert_allclose(updates["layer"]["kernel"], -0.02, rtol=1e-6)


def test_line_searches_see_all_parameters_and_move_the_others() -> None:
    target = {"encoder": jnp.array([1.0, 2.0]), "head": jnp.array([3.0, -1.0])}

    def value_fn(tree: Any) -> jax.Array:
        return sum(jnp.sum((a * b - 2.0) ** 2) for a, b in zip(tree.values(), target.values(), strict=True))  # pyright: ignore

    for optimizer in (optax.lbfgs(), optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(10))):
        tree = {"encoder": jnp.array([5.0, -0.0]), "head": jnp.array([5.0, 5.0])}
        before, fixed, alone = bits(tree["encoder"]), tree["encoder"], {"head": tree["head"]}

        def of_head(tree: Any, fixed: Any = fixed) -> jax.Array:
            return value_fn({"encoder": fixed, **tree})

        frozen = freeze(optimizer, only("encoder"))
        states = frozen.init(tree), optimizer.init(alone)
        for _ in range(3):
            value, grad = jax.value_and_grad(value_fn)(tree)
            updates, first = frozen.update(grad, states[0], tree, value=value, grad=grad, value_fn=value_fn)
            tree = optax.apply_updates(tree, updates)
            value, grad = jax.value_and_grad(of_head)(alone)
            updates, second = optimizer.update(grad, states[1], alone, value=value, grad=grad, value_fn=of_head)
            alone, states = optax.apply_updates(alone, updates), (first, second)
        assert bits(tree["encoder"]) == before
        np.testing.assert_allclose(tree["head"], alone["head"], rtol=1e-5)
        assert not np.allclose(tree["head"], 5.0)


@pytest.mark.parametrize("axis_type", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_sharded_in_sharded_out(axis_type: Any, dtype: Any) -> None:
    mesh = jax.make_mesh((8,), ("d",), axis_types=(axis_type,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    optimizer = freeze(wdjax.adamw(0.1, 0.5), only("encoder"))
    with jax.set_mesh(mesh):
        tree = {name: jax.device_put(jnp.ones((16, 4)), sharding) for name in ("encoder", "head")}
        grads = jax.tree.map(lambda x: x.astype(dtype), tree)
        step = jax.jit(optimizer.update).lower(grads, optimizer.init(tree), tree).compile()
        for run in (step, optimizer.update):
            updates, _ = run(grads, optimizer.init(tree), tree)
            assert updates["encoder"].sharding.is_equivalent_to(sharding, 2)
            assert updates["encoder"].dtype == dtype
            assert np.signbit(updates["encoder"].astype(jnp.float32)).all()
    assert not any(word in step.as_text() for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))


def test_explicit_updates_that_are_sharded_otherwise_than_params() -> None:
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    split, whole = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axis)) for axis in (("d",), ()))
    optimizer = freeze(optax.sgd(0.1), only("encoder"))
    with jax.set_mesh(mesh):
        tree = {"encoder": jax.device_put(jnp.ones((16, 4)), whole)}
        grads = {"encoder": jax.device_put(jnp.ones((16, 4)), split)}
        updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(tree), tree)
    assert updates["encoder"].sharding.is_equivalent_to(split, 2)
    assert np.signbit(updates["encoder"]).all()


def test_what_is_frozen_costs_no_gradient() -> None:
    """It is not even computed, and the step reads and writes no byte of what is frozen beyond the model's own."""
    x, frozen = jnp.ones((32, 64)), {"encoder": jnp.ones((64, 128)), "head": jnp.ones((128, 2))}

    def compiled(optimizer: Any) -> Any:
        def step(params: Any, state: Any) -> Any:
            grads = jax.grad(lambda p: jnp.sum(jnp.sin(x @ p["encoder"]) @ p["head"]))(params)
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return jax.jit(step, donate_argnums=(0, 1)).lower(frozen, optimizer.init(frozen)).compile()

    labels = {"encoder": "frozen", "head": "trained"}
    by_optax = compiled(optax.partition({"frozen": optax.set_to_zero(), "trained": optax.sgd(0.1)}, labels))
    ours, moved = compiled(freeze(optax.sgd(0.1), only("encoder"))), compiled(optax.sgd(0.1))
    dots = [len(re.findall(r"= f32\S* (?:dot|custom-call)\(", step.as_text())) for step in (ours, by_optax, moved)]
    assert dots[0] == dots[1] < dots[2]
    costs = [step.cost_analysis()["bytes accessed"] for step in (ours, by_optax)]
    assert costs[0] == costs[1]


def test_one_trace_for_many_steps_and_a_state_that_is_kept() -> None:
    tree = {k: v for k, v in params().items() if k != "empty"}
    optimizer = freeze(wdjax.adamw(0.1, 0.5), only("encoder"))
    step = jax.jit(chex.assert_max_traces(lambda g, s, p: optimizer.update(g, s, p), n=1))
    state = optimizer.init(tree)
    for _ in range(3):
        _, state = step(tree, state, tree)
    restored = flax.serialization.from_bytes(optimizer.init(tree), flax.serialization.to_bytes(state))
    first, second = (optimizer.update(tree, s, tree)[0] for s in (state, restored))
    assert bits(first) == bits(second)
    assert jax.tree.structure(restored) == jax.tree.structure(state)


def test_what_freeze_refuses() -> None:
    tree = params()
    for call, error, message in (
        (
            lambda: freeze(0.1, only("head")),
            TypeError,
            r"freeze: optimizer must be a finished Optax optimizer, got 0\.1",
        ),
        (lambda: freeze(optax.sgd(0.1), None), TypeError, r"freeze: the mask is None. Select the frozen parameters"),
        (lambda: freeze(optax.sgd(0.1), wdjax.by_path({"a": 0.1})), TypeError, "freeze: a mask says True or False"),
        (lambda: freeze(optax.sgd(0.1), only("hed")).init(tree), ValueError, "freeze: the pattern 'hed' matches no"),
        (lambda: freeze(optax.sgd(0.1), True).init(tree), TypeError, "freeze: the mask is True, one boolean"),
        (
            lambda: freeze(optax.sgd(0.1), only("head")).update(tree, optax.sgd(0.1).init(tree)),
            ValueError,
            "freeze needs the parameters, but update got params=None",
        ),
        (
            lambda: freeze(optax.sgd(0.1), mask=only("head"), frozen=1),
            TypeError,
            r"freeze\(\) has no argument 'frozen'",
        ),
    ):
        with pytest.raises(error, match=message):
            call()


def test_in_training_loops() -> None:
    optimizer = freeze(wdjax.adamw(0.1, 0.5), only("encoder"))
    tree = {k: v for k, v in params().items() if k != "empty"}
    state = TrainState.create(apply_fn=lambda: None, params=tree, tx=optimizer)
    state = state.apply_gradients(grads=jax.tree.map(jnp.ones_like, tree))
    assert bits(state.params["encoder"]) == bits(tree["encoder"])

    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.encoder, self.head = nnx.Linear(3, 3, rngs=rngs), nnx.Linear(3, 1, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.head(self.encoder(x))

    model = Net(nnx.Rngs(0))
    trainer = nnx.Optimizer(model, optimizer, wrt=nnx.Param)
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    for _ in range(2):
        grads = nnx.grad(lambda m: (m(jnp.ones((2, 3))) ** 2).sum())(model)
        trainer.update(model, grads)
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert bits(after["encoder"]) == bits(before["encoder"])
    assert bits(after["head"]["kernel"]) != bits(before["head"]["kernel"])

    module = eqx.nn.MLP(2, 1, 4, 2, key=jax.random.key(0))
    arrays = eqx.filter(module, eqx.is_inexact_array)
    first = freeze(wdjax.adamw(0.1, 0.5), only("layers/0"))
    updates, _ = first.update(jax.tree.map(jnp.ones_like, arrays), first.init(arrays), arrays)
    new = eqx.apply_updates(module, updates)
    assert bits(new.layers[0]) == bits(eqx.filter(module, eqx.is_array).layers[0])
    assert bits(new.layers[1].weight) != bits(module.layers[1].weight)


# Tied parameters.


def test_a_shared_nnx_variable_decays_once() -> None:
    class Tied(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.embed, self.head = nnx.Embed(5, 3, rngs=rngs), nnx.Linear(3, 5, use_bias=False, rngs=rngs)
            self.embed.embedding = self.head.kernel

    model = Tied(nnx.Rngs(0))
    before = np.asarray(model.head.kernel[...])
    trainer = nnx.Optimizer(model, wdjax.adamw(0.1, 0.5, wdjax.weights_only(model)), wrt=nnx.Param)
    trainer.update(model, jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param)))
    np.testing.assert_allclose(model.head.kernel[...], before * (1 - 0.1 * 0.5), rtol=1e-6)
    assert model.embed.embedding is model.head.kernel


def test_shared_equinox_layers_decay_once() -> None:
    embed, head = eqx.nn.Embedding(5, 3, key=jax.random.key(0)), eqx.nn.Linear(3, 5, key=jax.random.key(1))
    shared = eqx.nn.Shared((embed, head), where=lambda pair: pair[1].weight, get=lambda pair: pair[0].weight)
    arrays = eqx.filter(shared, eqx.is_inexact_array)
    optimizer = wdjax.adamw(0.1, 0.5, wdjax.weights_only(shared))
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, arrays), optimizer.init(arrays), arrays)
    _, new_head = eqx.apply_updates(shared, updates)()
    np.testing.assert_allclose(new_head.weight, embed.weight * (1 - 0.1 * 0.5), rtol=1e-6)


def test_one_array_in_two_places_is_told_of() -> None:
    array = jnp.ones((2, 2))
    tree = {"embed": {"kernel": array}, "head": {"kernel": array, "bias": jnp.ones(2)}, "other": {"bias": array}}
    with pytest.warns(UserWarning, match="decoupled_decay: 'embed/kernel' and 'head/kernel' are one array") as told:
        wdjax.adamw(0.1, 0.5, only("kernel")).init(tree)
    assert len(told) == 1
    assert "To keep them tied, put the array into params once" in str(told[0].message)
    with pytest.warns(UserWarning, match="with_decoupled_decay: 'a' and 'b' are one array"):
        wdjax.with_decoupled_decay(optax.sgd(0.1), 0.5, learning_rate=0.1).init({"a": array, "b": array})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wdjax.adamw(0.1, 0.5, only("head/kernel")).init(tree)  # The other place does not decay.
        wdjax.adamw(0.1, 0.5).init({"a": array, "b": array.copy()})
        shape = jax.ShapeDtypeStruct((2,), jnp.float32)
        jax.eval_shape(wdjax.adamw(0.1, 0.5).init, {"a": shape, "b": shape})
        wdjax.decoupled_decay(0.1).init({"a": shape, "b": shape})
