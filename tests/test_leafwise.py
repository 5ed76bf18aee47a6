"""Leaf by leaf is the same optimizer with the same state, and what is not elementwise is refused."""

import functools
import re
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from optax import contrib

import wdjax

pytestmark = pytest.mark.peers


def schedule(count: jax.Array) -> jax.Array:
    return 0.1 / (1.0 + count)


def make_params(dtype: Any = jnp.float32, *, layers: int = 9) -> dict[str, Any]:
    rng = np.random.default_rng(0)

    def array(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), dtype)

    tree = {f"layer_{i}": {"kernel": array(4, 3), "bias": array(3)} for i in range(layers)}
    return {**tree, "stack": {"kernel": array(5, 3, 3)}, "empty": {}, "hole": None, "scalar": array()}


def make_grads(params: Any, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)


def trained(optimizer: Any, params: Any, steps: int = 3, *, jit: bool = True) -> tuple[Any, Any]:
    state = optimizer.init(params)
    update = jax.jit(optimizer.update) if jit else optimizer.update
    for step in range(steps):
        updates, state = update(make_grads(params, step), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


TABLE = wdjax.by_path({"bias": 0.0, "layer_3": 0.02, "layer_4": schedule, "layer_5": jnp.asarray(0.3)}, default=0.1)
STACKED = 0.1 * wdjax.by_depth("stack", 0.5, axis=0, first=("layer_*", "scalar"))

OF_OPTAX: dict[str, Callable[[], Any]] = {
    "adam": lambda: optax.adam(schedule),
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1),
    "nadam in bfloat16": lambda: optax.nadam(1e-2, mu_dtype=jnp.bfloat16),
    "sgd": lambda: optax.sgd(0.1, 0.9, nesterov=True),
    "lion": lambda: optax.lion(1e-2),
    "rmsprop": lambda: optax.rmsprop(1e-2, momentum=0.9, centered=True),
    "lamb": lambda: optax.lamb(1e-2),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=2),
    "amsgrad": lambda: optax.amsgrad(1e-2),
    "adabelief": lambda: optax.adabelief(1e-2),
    "rprop": lambda: optax.rprop(1e-2),
    "yogi": lambda: optax.yogi(1e-2),
    "clip": lambda: optax.chain(optax.clip(0.5), optax.adaptive_grad_clip(0.1), optax.adam(1e-2)),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(schedule, weight_decay=0.1),
    "ademamix": lambda: contrib.ademamix(1e-2),
    "schedule_free": lambda: contrib.schedule_free(optax.sgd(0.1), 0.1),
    "identity": optax.identity,
}


def chained(decay: Any) -> Any:
    return optax.chain(optax.scale_by_adam(), decay, optax.scale_by_learning_rate(0.1))


OURS: dict[str, Callable[[], Any]] = {
    "number": lambda: chained(wdjax.decoupled_decay(0.1, wdjax.only("kernel"))),
    "schedule": lambda: chained(wdjax.decoupled_decay(schedule, wdjax.only("kernel"))),
    "table": lambda: chained(wdjax.decoupled_decay(TABLE)),
    "by depth": lambda: chained(wdjax.decoupled_decay(STACKED)),
    "function": lambda: chained(wdjax.decoupled_decay(0.1, lambda tree: jax.tree.map(lambda p: p.ndim > 1, tree))),
    "toward init": lambda: chained(wdjax.decoupled_decay(TABLE, toward="init")),
    "toward a tree": lambda: chained(wdjax.decoupled_decay(TABLE, toward=make_params())),
    "off": lambda: chained(wdjax.decoupled_decay(0.0)),
    "two": lambda: optax.chain(wdjax.add_l2_to_grads(0.1), chained(wdjax.decoupled_decay(TABLE))),
    "cautious": lambda: chained(wdjax.cautious(wdjax.decoupled_decay(TABLE))),
    "proximal": lambda: optax.chain(optax.sgd(0.1), wdjax.proximal_step(wdjax.GroupLasso(), 0.1, learning_rate=0.1)),
    "wrapper": lambda: wdjax.with_decoupled_decay(optax.adam(0.1), TABLE, learning_rate=0.1),
    "recipe": lambda: wdjax.adam_l2(schedule, TABLE),
    "in float32": lambda: wdjax.in_float32(wdjax.adamw(schedule, TABLE)),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("build", [pytest.param(b, id=name) for name, b in {**OF_OPTAX, **OURS}.items()])
def test_the_same_state_and_updates_to_rounding_as_the_optimizer_itself(build: Callable[[], Any]) -> None:
    for dtype, rtol in ((jnp.float64, 1e-12), (jnp.bfloat16, 2**-7)):
        params = make_params(dtype)
        whole, by_leaf = build(), wdjax.leafwise(build())
        chex.assert_trees_all_equal_structs(whole.init(params), by_leaf.init(params))
        wanted = trained(whole, params)
        for jit in (True, False) if dtype == jnp.float64 else (True,):
            found = trained(by_leaf, params, jit=jit)
            chex.assert_trees_all_equal_shapes_and_dtypes(found, wanted)
            chex.assert_trees_all_close(found, wanted, rtol=rtol, atol=rtol)


def test_outside_of_jit_the_same_plan_serves_only_the_same_trees() -> None:
    optimizer = wdjax.adamw(0.1, wdjax.by_path({"layer_1/**": 0.5}, default=0.1), eps=1.0)
    reference = chained(wdjax.decoupled_decay(wdjax.by_path({"layer_1/**": 0.5}, default=0.1)))
    for layers, dtype in ((9, jnp.float32), (9, jnp.bfloat16), (5, jnp.float32), (9, jnp.float32)):
        params = make_params(dtype, layers=layers)
        grads = jax.tree.map(jnp.zeros_like, params)
        wanted, _ = reference.update(grads, reference.init(params), params)
        for _ in range(2):
            updates, _ = optimizer.update(grads, optimizer.init(params), params)
            chex.assert_trees_all_close(updates, wanted, rtol=1e-2 if dtype == jnp.bfloat16 else 1e-6)
    # The same shapes in other places are another tree.
    renamed = {"other_" + name: layer for name, layer in make_params().items()}
    with pytest.raises(ValueError, match="'layer_1/\\*\\*' matches no parameter"):
        optimizer.update(renamed, optimizer.init(renamed), renamed)


def test_nothing_of_somebodys_jit_is_kept() -> None:
    params = {"a": jnp.ones(3), "b": jnp.ones(3)}
    optimizer = wdjax.sgdw(1.0, wdjax.by_path({"a": 0.5, "b": 0.25}))
    state = optimizer.init(params)
    update = lambda: optimizer.update(params, state, params)[0]  # noqa: E731
    for found in (jax.jit(update)(), update(), jax.jit(update)()):
        chex.assert_trees_all_close(found, {"a": jnp.full(3, -1.5), "b": jnp.full(3, -1.25)})


def test_outside_of_jit_a_mask_function_is_asked_every_time() -> None:
    flags = {"kernel": True}
    optimizer = wdjax.sgdw(1.0, 0.5, lambda tree: jax.tree.map(lambda _: flags["kernel"], tree))
    params = {"kernel": jnp.ones(2)}
    for flag in (True, False, True):
        flags["kernel"] = flag
        updates, _ = optimizer.update({"kernel": jnp.zeros(2)}, optimizer.init(params), params)
        assert updates["kernel"].tolist() == ([-0.5, -0.5] if flag else [0.0, 0.0])


MIXED: dict[str, tuple[Callable[[], Any], str]] = {
    "global norm": (lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)), "mixes parameters"),
    "noise": (lambda: optax.add_noise(0.1, 0.5, key=0), "mixes parameters, or treats them by their place"),
    "apply_if_finite": (lambda: optax.apply_if_finite(optax.adam(0.1), 3), "mixes parameters"),
    "MultiSteps": (lambda: optax.MultiSteps(optax.adam(0.1), 2), "mixes parameters"),
    "dadapt": (lambda: contrib.dadapt_adamw(1.0), "mixes parameters"),
    "masked": (lambda: optax.masked(optax.sgd(0.1), {"kernel": True}), r"optax.masked\(leafwise\(.*adamw\("),
    "masked by path": (lambda: optax.adamw(0.1, mask=wdjax.only("kernel").mask), r"by path.*adamw\(lr, 0.1, mask\)"),
    "partition": (lambda: optax.partition({"a": optax.sgd(0.1)}, "a"), "a mask or labels of Optax's"),
    "muon": (lambda: contrib.muon(0.1), "a mask or labels of Optax's"),
    "line search": (lambda: optax.lbfgs(0.1), "can't be run on a parameter alone.*value"),
    "freeze": (lambda: wdjax.freeze(optax.adam(0.1), wdjax.only("kernel")), r"by path.*freeze\(leafwise\("),
    "monitor": (lambda: wdjax.monitor(optax.adam(0.1), 0.1, learning_rate=0.1), r"by path.*monitor\(leafwise\("),
    "LoRA": (lambda: wdjax.decoupled_lora_decay(0.1), "chooses parameters by path"),
}


@pytest.mark.parametrize("name", MIXED)
def test_what_mixes_parameters_or_asks_for_paths_is_refused(name: str) -> None:
    build, words = MIXED[name]
    with pytest.raises(ValueError, match=f"(?s)^leafwise: .*{words}"):
        wdjax.leafwise(build())


def test_what_depends_on_the_place_in_the_tree_is_refused_without_a_look_at_values() -> None:
    def by_place(updates: Any, state: Any, params: Any = None) -> Any:
        leaves, treedef = jax.tree.flatten(updates)
        return jax.tree.unflatten(treedef, [x * (i + 1) for i, x in enumerate(leaves)]), state

    def mean_kept(updates: Any, state: Any, params: Any = None) -> Any:
        return updates, sum(jnp.sum(x) for x in jax.tree.leaves(updates))

    empty = lambda params: optax.EmptyState()  # noqa: E731
    for init, update in ((empty, by_place), (lambda params: jnp.zeros([]), mean_kept)):
        with pytest.raises(ValueError, match="mixes parameters, or treats them by their place"):
            wdjax.leafwise(optax.GradientTransformation(init, update))
    doubled = optax.GradientTransformation(empty, lambda u, s, p=None: (jax.tree.map(lambda x: 2 * x, u), s))
    assert wdjax.leafwise(doubled).update({"a": jnp.ones(1)}, optax.EmptyState())[0]["a"].tolist() == [2.0]
    with pytest.raises(TypeError, match=r"leafwise: optimizer must be .* got 0.1. Write leafwise\(optax.adam"):
        wdjax.leafwise(0.1)


def counted(calls: list[int]) -> Any:
    def update(updates: Any, state: Any, params: Any = None) -> Any:
        calls.append(len(jax.tree.leaves(updates)))
        return jax.tree.map(lambda x: -0.1 * x, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


@pytest.mark.parametrize("jit", [True, False])
def test_a_chain_is_traced_once_for_each_shape(jit: bool) -> None:
    calls: list[int] = []
    optimizer = wdjax.leafwise(counted(calls))
    calls.clear()
    params = make_params(layers=50)
    trained(optimizer, params, jit=jit)
    assert calls == [1] * 4  # Kernels, biases, the stack, the scalar.


def calls_of(primitive: str, jaxpr: Any) -> int:
    """How often a program runs an operation, within all the functions that it calls."""
    inner = [value.jaxpr for eqn in jaxpr.eqns for value in eqn.params.values() if hasattr(value, "jaxpr")]
    return sum(eqn.primitive.name == primitive for eqn in jaxpr.eqns) + sum(calls_of(primitive, j) for j in inner)


def test_what_depends_on_the_step_alone_is_computed_once_for_each_shape() -> None:
    params = make_params(layers=50)
    for optimizer in (wdjax.adamw(schedule, schedule), wdjax.leafwise(optax.adam(schedule))):
        state = optimizer.init(params)
        program = jax.make_jaxpr(optimizer.update)(params, state, params).jaxpr
        assert calls_of("pow", program) == 2 * 4  # Of Adam's two bias corrections, for the four shapes.
        assert calls_of("sqrt", program) == 102

    state = wdjax.adamw(0.1, 0.1).init(params)
    built_within = jax.make_jaxpr(lambda rate, params: wdjax.adamw(rate, rate).update(params, state, params)[0])
    assert calls_of("pow", built_within(0.1, params).jaxpr) == 2 * 4


def test_a_chain_that_prints_does_so_for_each_parameter(capfd: Any) -> None:
    def update(updates: Any, state: Any, params: Any = None) -> Any:
        jax.debug.print("seen")
        return jax.tree.map(lambda x: 2.0 * x, updates), state + 1

    optimizer = wdjax.leafwise(optax.GradientTransformation(lambda params: jnp.zeros([]), update))
    capfd.readouterr()
    updates, state = jax.jit(optimizer.update)({"a": jnp.ones(2), "b": jnp.ones(2)}, jnp.zeros([]))
    jax.effects_barrier()
    assert (updates["b"].tolist(), float(state)) == ([2.0, 2.0], 1.0)
    assert capfd.readouterr().out.count("seen") >= 2


def test_many_rates_are_one_trace_and_no_constants_of_a_loop() -> None:
    params = {f"layer_{i}": {"kernel": jnp.ones((4, 3))} for i in range(64)}
    rates = wdjax.by_path({f"layer_{i}": 0.002 + i / 1000 for i in range(64)})  # None is a constant of Adam's.

    def loops_of(optimizer: Any) -> list[str]:
        text = jax.jit(optimizer.update).lower(params, optimizer.init(params), params).compile().as_text()
        return re.findall(r"^%?(?:fused|wrapped)\S* \(.*?^}", text, re.M | re.S)

    one, optimizer = wdjax.adamw(0.1, 0.0125), wdjax.adamw(0.1, rates)
    assert len(loops_of(optimizer)) == len(loops_of(one))
    assert any("0.0125" in loop for loop in loops_of(one))
    assert not any(re.search(r"constant\(0\.0(?!01\))[0-6]\d*\)", loop) for loop in loops_of(optimizer))
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    for i in range(64):
        chex.assert_trees_all_close(updates[f"layer_{i}"]["kernel"], jnp.full((4, 3), -0.1 * (0.002 + i / 1000)))


def _sharded(f: Any, params: Any) -> Any:
    mesh = Mesh(np.array(jax.devices()), ("x",))
    params = jax.device_put(params, NamedSharding(mesh, P("x")))
    compiled = jax.jit(f).lower(params).compile()
    assert not re.search("all-|permute|reduce-scatter", compiled.as_text())
    return compiled(params)


def test_eight_devices_give_the_bits_of_one() -> None:
    params = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(64, 32)), jnp.float32)}
    split = jax.device_put(params, NamedSharding(Mesh(np.array(jax.devices()), ("x",)), P("x")))
    optimizer = wdjax.adamw(0.1, 0.1)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        updates, state = optimizer.update(params, state, params)
        return optax.apply_updates(params, updates), state

    one, many = (params, optimizer.init(params)), (split, optimizer.init(split))
    for _ in range(5):
        one, many = step(*one), step(*many)
    chex.assert_trees_all_equal(one, many)


def _in_shard_map(f: Any, params: Any) -> Any:
    mesh = Mesh(np.array(jax.devices()), ("x",))
    return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P("x"), out_specs=P("x")))(params)


def _pmapped(f: Any, params: Any) -> Any:
    split = jax.tree.map(lambda p: p.reshape(8, p.shape[0] // 8, *p.shape[1:]), params)
    return jax.tree.map(lambda u, p: u.reshape(p.shape), jax.pmap(f)(split), params)


@pytest.mark.parametrize("run", [_sharded, _in_shard_map, _pmapped, lambda f, params: jax.jit(f)(params)])
def test_many_rates_on_many_devices(run: Any) -> None:
    params = {f"layer_{i}": jnp.full((16, 3), 1.0 + i) for i in range(9)}
    optimizer = wdjax.adamw(0.1, wdjax.by_path({f"layer_{i}": i / 10 for i in range(9)}))

    def decay(params: Any) -> Any:
        return optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)[0]

    for i, update in enumerate(jax.tree.leaves(run(decay, params))):
        np.testing.assert_allclose(np.asarray(update), np.full((16, 3), -0.1 * i / 10 * (1 + i)), rtol=1e-6)


def test_optimizers_of_the_same_arguments_are_equal_and_compiled_once() -> None:
    def built() -> list[Any]:
        mask = wdjax.by_path({"bias": False, re.compile(".*/scale"): False}, default=True)
        return [
            wdjax.adamw(schedule, 0.1, mask),
            wdjax.sgd_l2(0.1, 5e-4, {"kernel": True, "bias": False}, momentum=0.9),
            wdjax.decoupled_decay(TABLE, wdjax.weights_only()),
            wdjax.freeze(wdjax.adam_l2(0.1, 0.1), wdjax.only("encoder")),
            wdjax.proximal_step(wdjax.GroupLasso(axis=0), 0.1, learning_rate=schedule),
        ]

    *first, tables, _, _ = built()
    again = built()
    assert [a == b for a, b in zip(built(), again, strict=True)] == [
        True,
        True,
        False,
        True,
        True,
    ]  # TABLE has an array.
    assert tables != again[2]
    assert first[0] == again[0] != wdjax.adamw(schedule, 0.2, wdjax.only("kernel"))
    # What is equal to Python is not always the same rate or rule.
    assert wdjax.by_path({"a": 1.0}, default=0.0) is not None
    assert wdjax.decoupled_decay(wdjax.by_path({"a": 1.0})) != wdjax.decoupled_decay(0.1, wdjax.by_path({"a": True}))
    assert wdjax.adamw(0.1, jnp.asarray(0.1)) != wdjax.adamw(0.1, jnp.asarray(0.1))

    traces = []

    @jax.jit
    def step(state: TrainState, grads: Any) -> TrainState:
        traces.append(1)
        return state.apply_gradients(grads=grads)

    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    for rate in (0.1, 0.1, 0.2):
        optimizer = wdjax.adamw(0.01, rate, wdjax.only("kernel"))
        state = TrainState.create(apply_fn=None, params=params, tx=optimizer).replace(step=jnp.zeros([], jnp.int32))
        step(state, params)
    assert len(traces) == 2


def test_outside_of_jit_another_rate_or_mask_compiles_nothing() -> None:
    traces = []

    def learning_rate(count: jax.Array) -> jax.Array:
        traces.append(1)
        return 0.1 * count + 0.1

    params = make_params()
    for rate, mask in ((0.1, None), (0.2, None), (wdjax.by_path({"bias": 0.1}, default=0.3), wdjax.all_but("scalar"))):
        optimizer = wdjax.adamw(learning_rate, rate, mask)
        state = optimizer.init(params)
        before = len(traces)
        updates, _ = optimizer.update(make_grads(params, 0), state, params)
        assert updates["layer_0"]["kernel"].dtype == jnp.float32
        # A parameter that does not decay has a function of its own.
        assert len(traces) - before <= (2 if mask is not None else 5 if rate == 0.1 else 0)


def test_an_optimizer_that_is_built_anew_in_each_step_compiles_nothing_in_it(caplog: Any) -> None:
    injected = optax.inject_hyperparams(wdjax.adamw)(learning_rate=schedule, weight_decay=0.1)
    params = {"kernel": jnp.ones((2, 2))}
    reference = trained(optax.inject_hyperparams(optax.adamw)(learning_rate=schedule, weight_decay=0.1), params)
    for jit in (True, False):
        chex.assert_trees_all_close(trained(injected, params, jit=jit)[0], reference[0], rtol=1e-6)
    state = injected.init(params)
    with jax.log_compiles():
        injected.update(params, state, params)
    assert not [record for record in caplog.records if "Compiling" in record.getMessage()]


def test_where_leaves_do_not_correspond_the_optimizer_runs_as_it_is() -> None:
    params = {"a": jnp.ones(3), "b": jnp.ones(3)}
    grads = {"a": jnp.full(3, 0.5), "b": None}
    for optimizer in (optax.sgd(0.1), optax.sign_sgd(0.1)):
        by_leaf = wdjax.leafwise(optimizer)
        wanted = optimizer.update(grads, optimizer.init(params), params)
        chex.assert_trees_all_equal(by_leaf.update(grads, by_leaf.init(params), params), wanted)
    by_leaf = wdjax.adamw(0.1, 0.1)
    with pytest.raises(ValueError, match="needs the parameters, and update got params=None"):
        by_leaf.update(params, by_leaf.init(params))
    with pytest.raises(ValueError, match="decoupled_decay: the update of 'a' has shape"):
        by_leaf.update({"a": jnp.ones(2), "b": jnp.ones(3)}, by_leaf.init(params), params)
    assert by_leaf.update({}, by_leaf.init({}), {})[0] == {}


def test_extra_arguments_reach_an_optimizer_that_takes_them() -> None:
    def update(updates: Any, state: Any, params: Any = None, *, factor: float = 1.0, **extra_args: Any) -> Any:
        return jax.tree.map(lambda u: u * factor, updates), state

    scaled = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tree = {"a": jnp.ones(2)}
    assert wdjax.leafwise(scaled).update(tree, optax.EmptyState(), tree, factor=3.0)[0]["a"].tolist() == [3.0, 3.0]
    optimizer = wdjax.leafwise(optax.sgd(0.1))
    optimizer.update(tree, optimizer.init(tree), tree, value=jnp.zeros([]))


def test_within_others_and_around_others() -> None:
    params = make_params()
    plain = chained(wdjax.decoupled_decay(0.1, wdjax.only("kernel")))
    by_leaf = wdjax.leafwise(plain)
    for around in (
        lambda inner: optax.chain(optax.clip_by_global_norm(1.0), inner),
        lambda inner: optax.apply_if_finite(inner, 3),
        lambda inner: optax.MultiSteps(inner, 2),
        lambda inner: wdjax.freeze(inner, wdjax.only("layer_2")),
        lambda inner: wdjax.monitor(inner, 0.1, wdjax.only("kernel"), learning_rate=0.1),
        lambda inner: optax.partition({"a": inner, "b": optax.sgd(0.1)}, {**dict.fromkeys(params, "a"), "scalar": "b"}),
        lambda inner: wdjax.leafwise(optax.chain(optax.clip(1.0), inner)),
    ):
        found, wanted = (trained(around(inner), params) for inner in (by_leaf, plain))
        chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_rates_and_learning_rates_may_be_traced_mapped_and_differentiated() -> None:
    params = make_params()

    def norm(optimizer: Callable[..., Any], rate: jax.Array, learning_rate: jax.Array) -> jax.Array:
        new, _ = trained(optimizer(learning_rate, rate), params, steps=2, jit=False)
        return optax.tree.norm(new)

    def plain(learning_rate: Any, rate: Any) -> Any:
        return optax.chain(
            optax.scale_by_adam(), wdjax.decoupled_decay(rate), optax.scale_by_learning_rate(learning_rate)
        )

    rates, learning_rates = jnp.array([0.0, 0.1, 0.3]), jnp.array([0.1, 0.2, 0.05])
    for transformed in (
        jax.vmap,
        lambda f: jax.jit(jax.vmap(f)),
        lambda f: jax.vmap(jax.value_and_grad(f, argnums=(0, 1))),
        lambda f: jax.jit(jax.vmap(jax.jacfwd(f, argnums=(0, 1)))),
    ):
        found = transformed(functools.partial(norm, wdjax.adamw))(rates, learning_rates)
        wanted = transformed(functools.partial(norm, plain))(rates, learning_rates)
        chex.assert_trees_all_close(found, wanted, rtol=1e-5)


def test_states_are_mapped_and_shaped_as_ever() -> None:
    params = make_params()
    optimizer = wdjax.adamw(0.1, 0.1, toward="init")
    state = optimizer.init(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(optimizer.init, params), state)
    marked = optax.tree_map_params(optimizer, lambda _: "param", state, transform_non_params=lambda _: "other")
    assert sorted(set(jax.tree.leaves(marked))) == ["other", "param"]
    assert jax.tree.leaves(marked).count("param") == 3 * len(jax.tree.leaves(params))
