"""States that go on under other frozen parameters: against recurrences, leaf by leaf, and from checkpoints."""

import inspect
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax import contrib
from orbax.checkpoint import v1 as ocp
from slow import slow, slow_but

import wdjax
from wdjax import freeze, only, thaw

pytestmark = pytest.mark.peers  # Optax's optimizers.

ENCODER, HEAD, BIASES = only("encoder"), only("head"), only("bias")


def make_params() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = {"encoder": {"kernel": (8, 8), "bias": (8,)}, "head": {"kernel": (8, 4), "bias": (4,)}}
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s)), shapes, is_leaf=lambda x: isinstance(x, tuple))


def grads_at(params: Any, step: Any) -> Any:
    return jax.tree.map(lambda p: jnp.sin(3 * p + step), params)


def trained(optimizer: Any, params: Any, state: Any, steps: Any) -> Any:
    optimizer = optax.with_extra_args_support(getattr(optimizer, "gradient_transformation", lambda: optimizer)())
    for i in steps:
        updates, state = optimizer.update(grads_at(params, i), state, params, value=jnp.asarray(1.0))
        params = optax.apply_updates(params, updates)
    return params, state


def of(state: Any) -> dict[str, Any]:
    """The leaves of a state by path."""

    def values(leaf: Any) -> Any:
        return np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)

    found = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(keys, simple=True, separator="/"): values(leaf) for keys, leaf in found}


OPTIMIZERS: dict[str, Callable[[], Any]] = {
    **{f.__name__: partial(f, 0.1) for f in (optax.adam, optax.adafactor, optax.novograd, optax.sm3, optax.rprop)},
    **{f.__name__: partial(f, 0.1) for f in (contrib.muon, contrib.prodigy, contrib.schedule_free_adamw, contrib.dowg)},
    "momentum": lambda: optax.sgd(0.1, 0.9),
    "lbfgs": lambda: optax.lbfgs(0.1, linesearch=None),
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(0.1), 2),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.add_noise(0.1, 0.1, 0), optax.adam(0.1)),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(0.1), 2),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(optax.linear_schedule(0.1, 0.2, 3)),
    "partition": lambda: optax.partition(
        {"a": wdjax.adamw(0.1, 0.5), "b": optax.sgd(0.1, 0.9)}, wdjax.by_path({"bias": "b"}, default="a").values
    ),
    "a mask inside": lambda: optax.adamw(0.1, mask=lambda tree: jax.tree.map(lambda p: p.ndim > 1, tree)),
    "anchors": lambda: wdjax.adamw(0.1, 0.5, toward="init"),
    "only anchors": lambda: wdjax.sgdw(0.1, 0.5, toward="init"),
    "around": lambda: wdjax.with_decoupled_decay(optax.adam(0.1), 0.5, learning_rate=0.1, toward="init"),
    "monitor": lambda: wdjax.monitor(wdjax.adamw(0.1, 0.5), 0.5, wdjax.by_path({"kernel": True, "bias": False})),
    "monitor by leaf": lambda: wdjax.monitor(wdjax.adamw(0.1, 0.5), 0.5, groups=lambda leaf: leaf.path),
    "master_weights": lambda: optax.chain(wdjax.in_float32(wdjax.adamw(0.1, 0.5)), wdjax.master_weights()),
}


@pytest.mark.parametrize(
    "name",
    slow_but(OPTIMIZERS, "adam", "MultiSteps", "inject_hyperparams", "partition", "anchors", "monitor"),
)
def test_what_both_have_goes_on_and_the_rest_is_new(name: str) -> None:
    params, optimizer = make_params(), OPTIMIZERS[name]()
    if name == "master_weights":
        params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    before = freeze(optimizer, ENCODER)
    params, state = trained(before, params, before.init(params), range(3))
    for after, newly in (
        (optimizer, "encoder"),
        (freeze(optimizer, HEAD), "encoder"),
        (freeze(optimizer, BIASES), None),
    ):
        fresh, found = after.init(params), thaw(state, after, params)
        assert jax.tree.structure(found) == jax.tree.structure(fresh)
        assert jax.tree.map(lambda x: x.dtype, found) == jax.tree.map(lambda x: x.dtype, fresh)
        old, new = of(state), of(found)
        for path, value in of(fresh).items():
            if "measured" in path:
                continue
            np.testing.assert_array_equal(new[path], old.get(path, value), err_msg=path)
            assert (path in old) != ("encoder" in path), path
        trained(after, params, found, range(2))
        if newly:  # Back again, nothing is lost that was not frozen in between.
            kept = {path for path in old if "head" not in path or after is optimizer}
            back = of(thaw(found, before, params))
            assert {
                path for path in kept if "measured" not in path and back[path].tobytes() != old[path].tobytes()
            } == set()
    assert of(thaw(state, before, params)).keys() == old.keys()


def test_adam_goes_on_as_its_recurrence_with_one_count(x64: None) -> None:
    """Each parameter with moments of its own that begin where it thaws, all with one count; anchors are values then."""
    eta, rate, b1, b2 = 0.1, 0.3, 0.9, 0.999
    optimizer = wdjax.adamw(eta, rate, toward="init")
    start = params = make_params()
    first = freeze(optimizer, ENCODER)
    params, state = trained(first, params, first.init(params), range(4))
    middle = params
    params, _ = trained(optimizer, params, thaw(state, optimizer, params), range(4, 9))

    for part, begin, anchor in (("head", 0, start), ("encoder", 4, middle)):
        w, a = np.asarray(anchor[part]["kernel"]), np.asarray(anchor[part]["kernel"])
        m = v = np.zeros_like(w)
        for t in range(begin, 9):
            g = np.sin(3 * w + t)
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            d = m / (1 - b1 ** (t + 1)) / (np.sqrt(v / (1 - b2 ** (t + 1))) + 1e-8)
            w = w - eta * (d + rate * (w - a))
        np.testing.assert_allclose(params[part]["kernel"], w, rtol=1e-12)


@pytest.mark.parametrize("t", [7, 100_000])
def test_the_first_steps_of_a_thawed_parameter_are_as_much_larger_as_it_says(t: int, x64: None) -> None:
    params = {"encoder": jnp.array(0.0), "head": jnp.array(0.0)}
    state = freeze(optax.adam(0.1, eps=0.0), ENCODER).init(params)
    state = optax.tree.set(state, count=jnp.asarray(t, jnp.int32))
    optimizer = optax.adam(0.1, eps=0.0)
    state, factors = thaw(state, optimizer, params), []
    for _ in range(1000):
        updates, state = jax.jit(optimizer.update)(jax.tree.map(jnp.ones_like, params), state, params)
        factors.append(-updates["encoder"] / 0.1)
    k = np.arange(1, 1001)
    said = (1 - 0.9**k) / (1 - 0.9 ** (t + k)) * np.sqrt((1 - 0.999 ** (t + k)) / (1 - 0.999**k))
    np.testing.assert_allclose(factors, said, rtol=1e-9)
    if t > 1000:
        assert [round(float(x), 1) for x in (said[0], said.max(), said[-1])] == [3.2, 6.6, 1.3]
        assert said.argmax() == 11
        assert "3.2 in the first step, at most 6.6 (in the twelfth), and 1.3 after" in str(inspect.getdoc(thaw))


def test_other_ways_to_freeze() -> None:
    """Holes of Optax's `partition` and of Equinox' filters stand for parameters too."""
    params = make_params()

    def partition(frozen: Any) -> Any:
        labels = wdjax.by_path({frozen: "fixed"}, default="trained").values if frozen else lambda tree: "trained"
        return optax.partition({"trained": wdjax.adamw(0.1, 0.5), "fixed": optax.set_to_zero()}, labels)

    _, state = trained(partition("encoder"), params, partition("encoder").init(params), range(2))
    found = thaw(state, partition("bias"), params)
    adam = found.inner_states["trained"].inner_state[0]
    np.testing.assert_array_equal(adam.mu["head"]["kernel"], optax.tree.get(state, "mu")["head"]["kernel"])
    assert not np.any(adam.mu["encoder"]["kernel"])
    assert adam.count == 2

    optimizer = wdjax.adamw(0.1, 0.5, toward="init")
    for part in (params | {"encoder": None}, params | {"encoder": {"kernel": None, "bias": None}}):
        _, state = trained(optimizer, part, optimizer.init(part), range(2))
        adam, decay, _ = thaw(state, optimizer, params)
        assert adam.count == decay.count == 2
        assert not np.any(adam.mu["encoder"]["kernel"])
        np.testing.assert_array_equal(decay.anchor["encoder"]["kernel"], params["encoder"]["kernel"])
        np.testing.assert_array_equal(adam.mu["head"]["kernel"], state[0].mu["head"]["kernel"])
        again = thaw((adam, decay, optax.EmptyState()), optimizer, part)
        assert jax.tree.structure(again) == jax.tree.structure(state)
        assert of(again).keys() == of(state).keys()


@pytest.mark.parametrize("axis_type", [AxisType.Auto, slow(AxisType.Explicit)], ids=str)
def test_jit_shapes_and_shardings(axis_type: Any) -> None:
    mesh = jax.make_mesh((4,), ("d",), axis_types=(axis_type,))
    sharding = NamedSharding(mesh, P("d"))
    params = jax.device_put(make_params(), sharding)
    optimizer = wdjax.adamw(0.1, 0.5, toward="init")
    state = freeze(optimizer, ENCODER).init(params)
    found = thaw(state, optimizer, params)
    for leaf in jax.tree.leaves(found):
        assert not leaf.ndim or leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    assert found[0].mu["head"]["kernel"] is state[0].mu["head"]["kernel"]
    shapes = jax.eval_shape(lambda state, params: thaw(state, optimizer, params), state, params)
    assert jax.tree.structure(shapes) == jax.tree.structure(found)
    placed = wdjax.state_shardings(optimizer, params)
    again = jax.jit(lambda state, params: thaw(state, optimizer, params), out_shardings=placed)(state, params)
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(one, other)
        assert not one.ndim or one.sharding.is_equivalent_to(sharding, one.ndim)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        kernel_init = nn.with_partitioning(nn.initializers.ones_init(), (None, "model"))
        return nn.Dense(2, name="head")(nn.Dense(4, name="encoder", kernel_init=kernel_init)(x))


def test_boxes_of_linen_and_modules_of_equinox() -> None:
    boxed = LinenNet().init(jax.random.key(0), jnp.ones((1, 3)))["params"]
    mlp = eqx.filter(eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0)), eqx.is_inexact_array)
    for params, frozen in ((boxed, only("encoder")), (mlp, only("layers/0"))):
        optimizer = wdjax.adamw(0.1, 0.5, toward="init")
        before = freeze(optimizer, frozen)
        _, state = before.update(params, before.init(params), params)
        found = thaw(state, optimizer, params)
        assert jax.tree.structure(found) == jax.tree.structure(optimizer.init(params))
        assert len(jax.tree.leaves(found)) > len(jax.tree.leaves(state))
        optimizer.update(params, found, params)
        assert jax.tree.structure(thaw(found, before, params)) == jax.tree.structure(state)


@pytest.mark.skipif(not hasattr(nnx, "as_pure"), reason="as_pure is newer than this Flax")
def test_an_nnx_optimizer() -> None:
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.encoder, self.head = nnx.Linear(3, 3, rngs=rngs), nnx.Linear(3, 1, rngs=rngs)

    model, whole = Net(nnx.Rngs(0)), wdjax.adamw(0.1, 0.5, toward="init")

    def step(optimizer: Any) -> None:
        optimizer.update(model, nnx.grad(lambda m: jnp.sum(m.head(m.encoder(jnp.ones((2, 3)))) ** 2))(model))

    first = nnx.Optimizer(model, freeze(whole, ENCODER), wrt=nnx.Param)
    step(first)
    mu = np.asarray(first.opt_state[0].mu["head"]["kernel"][...])
    second = nnx.Optimizer(model, whole, wrt=nnx.Param)
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    nnx.update(second.opt_state, nnx.state(thaw(nnx.as_pure(first.opt_state), whole, params)))
    np.testing.assert_array_equal(second.opt_state[0].mu["head"]["kernel"][...], mu)
    step(second)
    assert second.opt_state[0].count[...] == second.opt_state[1].count[...] == 2
    # Variables in the state, in the parameters or in both do not matter.
    for state in (first.opt_state, nnx.as_pure(first.opt_state)):
        for tree in (nnx.state(model, nnx.Param), params):
            assert thaw(state, whole, tree)[0].count[...] == 1


def test_checkpoints() -> None:
    """Restored with a template; with one of the state that comes; with none, as dictionaries and lists."""
    params, directory = make_params(), Path(tempfile.mkdtemp())
    optimizer = wdjax.adamw(optax.linear_schedule(0.1, 0.2, 5), 0.5, toward="init")
    before = freeze(optimizer, ENCODER)
    params, state = trained(before, params, before.init(params), range(3))
    with ocp.training.Checkpointer(directory) as checkpointer:
        checkpointer.save(3, state)
    expected = of(thaw(state, optimizer, params))
    with ocp.training.Checkpointer(directory) as checkpointer, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for template in ((before.init(params),), (optimizer.init(params),), ()):
            found = thaw(checkpointer.load(3, *template), optimizer, params)
            assert jax.tree.structure(found) == jax.tree.structure(optimizer.init(params))
            assert {k: v.tobytes() for k, v in of(found).items()} == {k: v.tobytes() for k, v in expected.items()}
            trained(optimizer, params, found, range(2))
    # Flax writes nothing for what is frozen.
    restored = flax.serialization.msgpack_restore(flax.serialization.to_bytes(state))
    message = r"(?s)Only optimizer.init\(params\) has .*is a dict where .* a tuple.*without a template, restore it with"
    with pytest.raises(ValueError, match=message):
        thaw(restored, optimizer, params)
    with pytest.raises(ValueError, match="Only"):
        thaw({}, optimizer, params)


def test_states_of_other_optimizers_and_models_are_refused() -> None:
    params = make_params()
    frozen = freeze(optax.adam(0.1), ENCODER).init(params)
    wider = params | {"head": {"kernel": jnp.ones((8, 5)), "bias": jnp.ones(4)}}
    half = params | {"head": jax.tree.map(lambda p: p.astype(jnp.bfloat16), params["head"])}
    anchored = freeze(wdjax.adamw(0.1, 0.5, toward="init"), ENCODER)
    blocks = {"blocks": [jnp.ones(2)] * 12}
    for state, optimizer, tree, said in (
        (frozen, optax.sgd(0.1, 0.9), params, r"Only the state has '0/count', '0/mu/head/bias'.*has '0/trace/"),
        (
            frozen,
            optax.adam(0.1),
            wider,
            r"'0/mu/head/kernel' is float32 of shape \(8, 4\).* and float32 of shape \(8, 5\)",
        ),
        (frozen, optax.adam(0.1), half, r"'0/mu/head/bias' is float32 of shape \(4,\).* and bfloat16 of shape \(4,\)"),
        (frozen, optax.adam(0.1), params | {"tail": jnp.ones(3)}, r"Only optimizer.init\(params\) has '0/mu/tail'"),
        (frozen, optax.adam(0.1), {"encoder": params["encoder"]}, "Only the state has '0/mu/head/bias'"),
        (frozen, wdjax.adamw(0.1, 0.5), params, r"has '1/count'"),
        (anchored.init(params), wdjax.adamw(0.1, 0.5), params, "Only the state has '1/anchor/head/bias'"),
        (optax.adam(0.1).init(blocks), optax.adam(0.1), {"blocks": [jnp.ones(2)]}, r"'0/mu/blocks/\{1..11\}'"),
        (optax.adam(0.1).init(params)[0], optax.adam(0.1), params, r"ScaleByAdamState where the optimizer has a tuple"),
    ):
        with pytest.raises(
            ValueError, match=rf"(?s)thaw: this is not a state of this optimizer.*{said}.*only\('encoder'"
        ):
            thaw(state, optimizer, tree)
    with pytest.raises(ValueError, match=r"has '1/anchor/.* The old optimizer had no toward.*the same toward= from"):
        thaw(freeze(wdjax.adamw(0.1, 0.5), ENCODER).init(params), wdjax.adamw(0.1, 0.5, toward="init"), params)
    scheduled = wdjax.adamw(optax.constant_schedule(0.1), 0.5)
    with pytest.raises(ValueError, match=r"Has a number become a schedule, or was a transformation added\?$"):
        thaw(freeze(wdjax.adamw(0.1, 0.5), ENCODER).init(params), scheduled, params)
    with pytest.raises(TypeError, match=r"(?s)thaw: optimizer must be a finished.*thaw\(state, optimizer, params\)"):
        thaw(optax.adam(0.1), frozen, params)


@pytest.mark.parametrize("name", ["adam", "adafactor", "rprop", "momentum", "only anchors", "sm3"])
@pytest.mark.parametrize("run", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_the_state_of_freeze_in_another_optimizer_says_what_it_is(name: str, run: Any) -> None:
    params, optimizer = make_params(), OPTIMIZERS[name]()
    state = freeze(optimizer, ENCODER).init(params)
    with pytest.raises(
        TypeError, match=r"of wdjax.freeze. It has nothing for a parameter of shape \(8,\).*wdjax.thaw\(st"
    ):
        run(optimizer.update)(params, state, params)


@pytest.mark.parametrize("name", ["adam", "partition", "MultiSteps", "anchors", "around", "muon", "prodigy"])
def test_freeze_names_a_state_with_other_frozen_parameters(name: str) -> None:
    params, optimizer = make_params(), OPTIMIZERS[name]()
    after = freeze(optimizer, ENCODER)
    for state, said in (
        (optimizer.init(params), r"It still has something for '[^']*encoder/\w+'.* frozen now\. Carry"),
        (freeze(optimizer, HEAD).init(params), r"has nothing for '[^']*head/\w+.*It still has .*encoder/\w+'.*Carry"),
    ):
        with pytest.raises(
            ValueError, match=rf"(?s)^freeze: the state was made for other.*{said}.*wdjax.thaw\(state, opt"
        ):
            trained(after, params, state, [0])
    # Other errors stay what they are.
    broken = optax.chain(optimizer if name != "MultiSteps" else optax.adam(0.1), optax.stateless(lambda u, p: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        trained(freeze(broken, ENCODER), params, freeze(broken, ENCODER).init(params), [0])


def test_a_hole_of_freeze_refuses_all_arithmetic() -> None:
    hole = freeze(optax.adam(0.1), ENCODER).init(make_params())[0].mu["encoder"]["bias"]
    for use in (
        lambda: hole + 1.0,
        lambda: 2.0 * hole,
        lambda: jnp.ones(8) - hole,
        lambda: hole @ jnp.ones(8),
        lambda: -hole,
        lambda: abs(hole),
        lambda: hole > 0,
        lambda: 1 / hole,
        lambda: hole**2,
        lambda: np.asarray(hole),
        lambda: np.ones(8) * hole,
        lambda: jnp.asarray(hole),
    ):
        with pytest.raises(TypeError, match=r"of wdjax.freeze.*thaw"):
            use()
    assert jax.tree.leaves(hole) == []
    assert isinstance(hole, optax.MaskedNode)
