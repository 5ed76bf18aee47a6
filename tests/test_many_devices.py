"""Many devices on one host, by pmap and by jit over meshes: the results of one device, and no needless collective."""

import functools
import itertools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from registry import ROWS
from slow import slow, slow_but

import wdjax

ELEMENTWISE = [row for row in ROWS if row.is_elementwise]
WEIGHTS = wdjax.only("kernel")
STEPS, BATCH, LR, WD = 100, 16, 0.05, 0.1


class Layout(NamedTuple):
    """A mesh, and how the parameters of the network below lie on it; batches are always split over "data"."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    specs: dict[str, dict[str, P]]

    def mesh(self, kind: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
        return jax.make_mesh(self.shape, self.axes, axis_types=(kind,) * len(self.axes))

    def shardings(self, mesh: Any = None) -> Any:
        of = functools.partial(NamedSharding, mesh or self.mesh())
        return jax.tree.map(of, self.specs, is_leaf=lambda x: isinstance(x, P))


def layout(shape: tuple[int, ...], axes: tuple[str, ...], *specs: P) -> Layout:
    up, up_bias, down, down_bias = specs
    return Layout(shape, axes, {"up": {"kernel": up, "bias": up_bias}, "down": {"kernel": down, "bias": down_bias}})


LAYOUTS = {
    "data parallel": layout((8,), ("data",), P(), P(), P(), P()),
    "FSDP": layout((8,), ("data",), P("data"), P("data"), P("data"), P("data")),
    "tensor parallel": layout((2, 4), ("data", "model"), P(None, "model"), P("model"), P("model", None), P()),
    "FSDP and tensor parallel": layout(
        (2, 4), ("data", "model"), P("data", "model"), P("model"), P("model", "data"), P("data")
    ),
}
every_layout = pytest.mark.parametrize("name", slow_but(LAYOUTS, "FSDP and tensor parallel"))
split_layouts = pytest.mark.parametrize("name", slow_but(list(LAYOUTS)[1:], "FSDP and tensor parallel"))


def make_params(seed: int = 0, dtype: Any = np.float64) -> Any:
    rng = np.random.default_rng(seed)
    shapes = {"up": {"kernel": (8, 16), "bias": (16,)}, "down": {"kernel": (16, 8), "bias": (8,)}}
    drawn = jax.tree.map(lambda shape: rng.normal(size=shape) / 3, shapes, is_leaf=lambda x: isinstance(x, tuple))
    return jax.tree.map(lambda x: x.astype(dtype), drawn)


def make_batches(dtype: Any = np.float64) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    x, y = (rng.normal(size=(STEPS, BATCH, 8)).astype(dtype) for _ in range(2))
    return x, y


def loss(params: Any, x: Any, y: Any) -> Any:
    """Half the squared error of a network with one hidden layer, the mean over the batch."""
    hidden = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"][None])
    out = hidden @ params["down"]["kernel"] + params["down"]["bias"][None]
    return 0.5 * jnp.mean(jnp.sum((out - y) ** 2, axis=1))


def collectives(compiled: Any) -> dict[str, int]:
    """How often each collective stands in a compiled program; those that do not are left out."""
    names = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "collective-broadcast", "reduce-scatter")
    found = {name: len(re.findall(rf" {name}(?:-start)?\(", compiled.as_text())) for name in names}
    return {name: count for name, count in found.items() if count}


def all_reduced(compiled: Any) -> list[list[str]]:
    """For each all-reduce the shapes of what it reduces."""
    rows = re.findall(r"= (.*) all-reduce(?:-start)?\(", compiled.as_text())
    return [re.findall(r"[fcs]\d+\[([\d,]*)\]", row) for row in rows]


def assert_replicas_are_equal(tree: Any) -> None:
    """Whether all devices that have the same part of an array have the same bits; counts what was compared."""
    compared = 0
    for leaf in jax.tree.leaves(tree):
        seen: dict[str, bytes] = {}
        for shard in leaf.addressable_shards:
            bits = np.asarray(shard.data).tobytes()
            compared += str(shard.index) in seen
            assert seen.setdefault(str(shard.index), bits) == bits
    assert compared


# The rules, over sharded parameters.


@split_layouts
@pytest.mark.usefixtures("x64")
def test_elementwise_rules_keep_the_sharding_and_need_no_collective(name: str) -> None:
    params, start = (jax.device_put(make_params(seed), LAYOUTS[name].shardings()) for seed in (0, 1))
    updates = jax.device_put(make_params(2), LAYOUTS[name].shardings())
    rules = [row.build(lambda count: jnp.asarray(0.3), toward="init") for row in ELEMENTWISE]
    states = [rule.init(start) for rule in rules]

    def act(updates: Any, states: Any, params: Any) -> Any:
        return [rule.update(updates, state, params) for rule, state in zip(rules, states, strict=True)]

    compiled = jax.jit(act).lower(updates, states, params).compile()
    assert collectives(compiled) == {}
    for row, before, (new, after) in zip(ELEMENTWISE, states, compiled(updates, states, params), strict=True):
        want = jax.tree.map(lambda u, w, a: row.oracle(u, w, 0.3, a), make_params(2), make_params(), make_params(1))  # noqa: B023
        chex.assert_trees_all_close(jax.device_get(new), want, rtol=1e-12, atol=1e-14)
        for old_tree, new_tree in ((updates, new), (before, after)):
            for old, leaf in zip(jax.tree.leaves(old_tree), jax.tree.leaves(new_tree), strict=True):
                assert leaf.sharding.is_equivalent_to(old.sharding, leaf.ndim) or leaf.ndim == 0, row.name


# All at once; those in bfloat16 with a writer behind.
OPTIMIZERS: dict[str, Any] = {
    "sgd_l2": wdjax.sgd_l2(LR, WD, WEIGHTS, momentum=0.9),
    "sgdw": wdjax.sgdw(LR, WD, WEIGHTS, momentum=0.9),
    "adam_l2": wdjax.adam_l2(LR, WD, WEIGHTS),
    "adamw": wdjax.adamw(LR, WD, WEIGHTS),
    "with_decoupled_decay": wdjax.with_decoupled_decay(optax.adam(LR), WD, WEIGHTS, learning_rate=LR, toward="init"),
    "MultiSteps": wdjax.with_decoupled_decay(optax.MultiSteps(optax.sgd(LR), 3), WD, WEIGHTS, learning_rate=LR),
    "cautious": optax.chain(optax.sgd(LR), wdjax.cautious(wdjax.independent_decay(0.01, WEIGHTS))),
    "proximal_step": optax.chain(optax.sgd(LR), wdjax.proximal_step(wdjax.L1(), 0.05, WEIGHTS, learning_rate=LR)),
    "shrink_and_perturb": optax.chain(optax.sgd(LR), wdjax.on_weights.shrink_and_perturb(0.1, 0.1, WEIGHTS, seed=0)),
    "freeze": wdjax.freeze(wdjax.adamw(LR, WD, WEIGHTS), wdjax.only("up")),
}
WRITERS: dict[str, Any] = {
    "stochastic_rounding": wdjax.stochastic_rounding(0),
    "compensated": wdjax.compensated(),
    "master_weights": wdjax.master_weights(),
}
LOW = {name: optax.chain(wdjax.in_float32(wdjax.adamw(LR, WD, WEIGHTS)), writer) for name, writer in WRITERS.items()}
NORMS: dict[str, Any] = {
    "group lasso": optax.chain(optax.sgd(LR), wdjax.proximal_step(wdjax.GroupLasso(), 0.1, WEIGHTS, learning_rate=LR)),
    "monitor": wdjax.monitor(wdjax.adamw(LR, WD, WEIGHTS), WD, WEIGHTS, learning_rate=LR),
}


@split_layouts
@pytest.mark.peers
def test_whole_optimizers_need_no_collective(name: str) -> None:
    both = ((OPTIMIZERS, np.float32), (LOW, jnp.bfloat16))
    trees = [jax.device_put(make_params(0, dtype), LAYOUTS[name].shardings()) for _, dtype in both]
    states = [
        {key: optimizer.init(tree) for key, optimizer in some.items()}
        for (some, _), tree in zip(both, trees, strict=True)
    ]

    def act(trees: Any, states: Any) -> Any:
        return [
            {key: optimizer.update(tree, state[key], tree) for key, optimizer in some.items()}
            for (some, _), state, tree in zip(both, states, trees, strict=True)
        ]

    compiled = jax.jit(act).lower(trees, states).compile()
    assert collectives(compiled) == {}


KINDS = {"whole arrays": (wdjax.GroupLasso(), None), "columns": (wdjax.GroupLasso(0), WEIGHTS)}


def norm_rules(kind: Any, mask: Any) -> dict[str, Callable[[Any], Any]]:
    """Each way that a norm comes into a step, as a function of parameters, which are its gradients as well."""
    rules = {
        "gradient": wdjax.add_penalty_to_grads(kind, 0.3, mask),
        "prox": wdjax.proximal_step(kind, 0.3, mask, learning_rate=0.5),
    }
    acts = {name: lambda p, rule=rule: rule.update(p, rule.init(p), p)[0] for name, rule in rules.items()}
    return acts | {"loss": jax.grad(lambda p: wdjax.penalty(p, kind, 0.3, mask))}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@split_layouts
@pytest.mark.usefixtures("x64")
def test_norms_of_all_parameters_take_one_all_reduce(name: str, kind: Any) -> None:
    # What lies on two mesh axes XLA reduces over one after the other, in the order of the axes of the array.
    expected = {"FSDP": 1, "tensor parallel": 1, "FSDP and tensor parallel": 3 if kind[1] is None else 2}[name]
    params = jax.device_put(make_params(), LAYOUTS[name].shardings())
    compiled = {place: jax.jit(act).lower(params).compile() for place, act in norm_rules(*kind).items()}
    for act in compiled.values():
        assert collectives(act) == {"all-reduce": expected}
        # Three sums for each of at most 16 columns, and nothing else.
        for shape in itertools.chain(*all_reduced(act)):
            sums, *groups = map(int, shape.split(","))
            assert sums == 3
            assert math.prod(groups) <= (1 if kind[1] is None else 16)
    for module, part in make_params().items():
        for key, w in part.items():
            axis = kind[0].axis
            norm = np.sqrt(np.sum(w**2, axis, keepdims=True))
            acts = kind[1] is None or key == "kernel"
            want = {
                "gradient": w + 0.3 * w / norm if acts else w,
                "prox": 2 * w * np.maximum(1 - 0.15 / np.sqrt(np.sum((2 * w) ** 2, axis, keepdims=True)), 0) - w,
                "loss": 0.3 * w / norm if acts else np.zeros_like(w),
            }
            want["prox"] = want["prox"] if acts else w
            for place, act in compiled.items():
                np.testing.assert_allclose(act(params)[module][key], want[place], rtol=1e-12, atol=1e-14)


def test_norms_of_two_hundred_arrays_take_one_all_reduce() -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    params = {
        f"layer_{i}": jax.ShapeDtypeStruct((8, 2), jnp.float32, sharding=NamedSharding(mesh, P("data")))
        for i in range(200)
    }
    rule = wdjax.proximal_step(wdjax.GroupLasso(), 0.3, learning_rate=0.5)
    compiled = jax.jit(lambda p: rule.update(p, rule.init(p), p)[0]).lower(params).compile()
    assert [len(row) for row in all_reduced(compiled)] == [200]


@pytest.mark.parametrize("name", [slow("FSDP"), "tensor parallel"])
@pytest.mark.usefixtures("x64")
def test_explicit_meshes_carry_the_sharding_through_every_rule(name: str) -> None:
    mesh = LAYOUTS[name].mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        params = jax.device_put(make_params(), LAYOUTS[name].shardings(mesh))
        rules = [row.build(0.3) for row in ROWS] + [wdjax.monitor(optax.sgd(0.1))]
        states = [rule.init(params) for rule in rules]
        act = jax.jit(lambda p, states: [r.update(p, s, p)[0] for r, s in zip(rules, states, strict=True)])
        for row, new in zip(ROWS, act(params, states), strict=False):
            assert jax.tree.map(lambda x: jax.typeof(x).sharding.spec, new) == jax.tree.map(
                lambda x: jax.typeof(x).sharding.spec, params
            )
            want = jax.tree.map(lambda w: row.oracle(w, w, 0.3, 0.0), make_params())  # noqa: B023
            chex.assert_trees_all_close(jax.device_get(new), want, rtol=1e-12, atol=1e-14)


# Training, 100 steps with the gradients of a network.


def recurrence(name: str) -> Any:
    """The parameters after all steps in NumPy, by the formulas of the recipes."""

    def decayed(path: str) -> float:
        return WD if path == "kernel" else 0.0

    params = {(m, k): w.copy() for m, part in make_params().items() for k, w in part.items()}
    first, second = ({key: np.zeros_like(w) for key, w in params.items()} for _ in range(2))
    for t, (x, y) in enumerate(zip(*make_batches(), strict=True), start=1):
        hidden = np.tanh(x @ params["up", "kernel"] + params["up", "bias"])
        error = (hidden @ params["down", "kernel"] + params["down", "bias"] - y) / BATCH
        inner = (error @ params["down", "kernel"].T) * (1 - hidden**2)
        grads = {
            ("up", "kernel"): x.T @ inner,
            ("up", "bias"): inner.sum(0),
            ("down", "kernel"): hidden.T @ error,
            ("down", "bias"): error.sum(0),
        }
        for key, g in grads.items():
            w, rate = params[key], decayed(key[1])
            g = g + rate * w if name in ("sgd_l2", "adam_l2") else g
            if name in ("sgd_l2", "sgdw"):
                first[key] = direction = 0.9 * first[key] + g
            else:
                first[key] = 0.9 * first[key] + 0.1 * g
                second[key] = 0.999 * second[key] + 0.001 * g**2
                direction = first[key] / (1 - 0.9**t) / (np.sqrt(second[key] / (1 - 0.999**t)) + 1e-8)
            params[key] = w - LR * (direction + (rate * w if name in ("sgdw", "adamw") else 0.0))
    return {module: {k: params[module, k] for k in ("kernel", "bias")} for module in ("up", "down")}


RECIPES = ("sgd_l2", "sgdw", "adam_l2", "adamw")


def stepped(optimizers: Any, reduce: Callable[[Any], Any] = lambda grads: grads) -> Callable[..., Any]:
    """One step of several optimizers on the same batch, each with parameters of its own."""

    def step(carry: Any, x: Any, y: Any) -> Any:
        after = {}
        for name, optimizer in optimizers.items():
            params, state = carry[name]
            grads = reduce(jax.grad(loss)(jax.tree.map(lambda p: p.astype(x.dtype), params), x, y))
            updates, state = optimizer.update(grads, state, params)
            after[name] = (optax.apply_updates(params, updates), state)
        return after

    return step


def started(optimizers: Any, params: Any) -> Any:
    return {name: (jax.tree.map(jnp.copy, params), optimizer.init(params)) for name, optimizer in optimizers.items()}


def pmapped(optimizers: Any, dtype: Any, batches: Any) -> Any:
    """The parameters and states of all replicas after all steps with `pmap`."""
    step = jax.pmap(stepped(optimizers, lambda grads: jax.lax.pmean(grads, "data")), "data", donate_argnums=0)
    carry = jax.tree.map(lambda x: np.stack([np.asarray(x)] * 8), started(optimizers, make_params(0, dtype)))
    for x, y in zip(*make_batches(batches), strict=True):
        # Emulated devices that run far ahead of each other starve each other of threads, and never meet.
        carry = jax.block_until_ready(step(carry, x.reshape(8, 2, 8), y.reshape(8, 2, 8)))
    return carry


def assert_pmap_replicas_are_equal(carry: Any) -> None:
    for leaf in jax.tree.leaves(jax.device_get(carry)):
        assert leaf.shape[0] == 8
        assert len({replica.tobytes() for replica in leaf}) == 1


@pytest.mark.peers
@pytest.mark.usefixtures("x64")
def test_a_hundred_steps_of_pmap() -> None:
    optimizers = OPTIMIZERS | NORMS
    carry = pmapped(optimizers, np.float64, np.float64)
    assert_pmap_replicas_are_equal(carry)
    alone, step = started(optimizers, make_params()), jax.jit(stepped(optimizers))
    for x, y in zip(*make_batches(), strict=True):
        alone = step(alone, x, y)
    first = jax.tree.map(lambda x: x[0], jax.device_get(carry))
    for name in optimizers:
        params, _ = first[name]
        chex.assert_trees_all_close(params, jax.device_get(alone[name][0]), rtol=1e-9, atol=1e-10)
        if name in RECIPES:
            chex.assert_trees_all_close(params, recurrence(name), rtol=1e-9, atol=1e-10)
    chex.assert_trees_all_close(
        wdjax.scalars(first["monitor"]), jax.device_get(wdjax.scalars(alone["monitor"])), rtol=1e-5, atol=1e-7
    )
    assert np.any(first["proximal_step"][0]["up"]["kernel"] == 0)
    assert first["freeze"][0]["up"]["kernel"].tobytes() == make_params()["up"]["kernel"].tobytes()


@pytest.mark.slow
@pytest.mark.peers
def test_a_hundred_steps_of_pmap_with_the_writers_of_low_precision() -> None:
    carry = pmapped(LOW, jnp.bfloat16, np.float32)
    assert_pmap_replicas_are_equal(carry)
    alone, step = started(LOW, make_params(0, jnp.bfloat16)), jax.jit(stepped(LOW))
    for x, y in zip(*make_batches(np.float32), strict=True):
        alone = step(alone, x, y)
    for name in LOW:
        got, want = (
            jax.tree.map(lambda x: np.asarray(x).astype(np.float64), jax.device_get(tree))
            for tree in (jax.tree.map(lambda x: x[0], carry[name][0]), alone[name][0])
        )
        # Gradients differ in float32's last digits, and now and then that rounds a weight to its other neighbour.
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=2**-6 * np.max(np.abs(b)))


@every_layout
@pytest.mark.peers
@pytest.mark.usefixtures("x64")
def test_a_hundred_steps_over_a_mesh(name: str) -> None:
    mesh, optimizers = LAYOUTS[name].mesh(), {recipe: OPTIMIZERS[recipe] for recipe in RECIPES}
    carry = started(optimizers, jax.device_put(make_params(), LAYOUTS[name].shardings(mesh)))
    before = jax.tree.map(lambda x: x.sharding, carry)
    data = NamedSharding(mesh, P("data"))
    step = jax.jit(stepped(optimizers), donate_argnums=0)
    for x, y in zip(*make_batches(), strict=True):
        carry = jax.block_until_ready(step(carry, *jax.device_put((x, y), data)))
    for recipe in RECIPES:
        chex.assert_trees_all_close(jax.device_get(carry[recipe][0]), recurrence(recipe), rtol=1e-9, atol=1e-10)
    for leaf, sharding in zip(jax.tree.leaves(carry), jax.tree.leaves(before), strict=True):
        assert leaf.ndim == 0 or leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    if name != "FSDP":
        assert_replicas_are_equal(carry)


# Arrays that were put on other devices than the parameters.


def elsewhere(x: Any) -> Any:
    return jax.device_put(x, jax.devices()[1])


def at_home(x: Any = None) -> Any:
    return jax.device_put(make_params(0, np.float32) if x is None else x, jax.devices()[0])


def both_ways(optimizer: Any, state: Any = None) -> list[Any]:
    """The updates of one step, without and with jit."""
    params = at_home()
    state = optimizer.init(params) if state is None else state
    return [update(params, state, params)[0] for update in (optimizer.update, jax.jit(optimizer.update))]


# What takes a number, by the argument.
TAKES_A_NUMBER: dict[str, Callable[[Any], Any]] = {
    "weight_decay": wdjax.decoupled_decay,
    "a value of a table": lambda x: wdjax.decoupled_decay(wdjax.by_path({"kernel": x}, default=0.0)),
    "the factor of a table": lambda x: wdjax.decoupled_decay(x * wdjax.by_path({"kernel": x}, default=1.0)),
    "a tree": lambda x: wdjax.decoupled_decay(jax.tree.map(lambda p: x, make_params())),
    "strength": lambda x: wdjax.add_penalty_to_grads(wdjax.GroupLasso(), x, WEIGHTS),
    "radius": lambda x: wdjax.constrain(wdjax.L2Ball(), x, WEIGHTS),
    "learning_rate of a step": lambda x: wdjax.proximal_step(wdjax.L1(), 0.1, WEIGHTS, learning_rate=x),
    "with_decoupled_decay": lambda x: wdjax.with_decoupled_decay(optax.sgd(LR), x, WEIGHTS, learning_rate=x),
    "sgd_l2": lambda x: wdjax.sgd_l2(x, x, WEIGHTS),
    "sgdw": lambda x: wdjax.sgdw(x, x, WEIGHTS),
    "adam_l2": lambda x: wdjax.adam_l2(x, x, WEIGHTS),
    "adamw": lambda x: wdjax.adamw(x, x, WEIGHTS),
}


@pytest.mark.parametrize("build", TAKES_A_NUMBER.values(), ids=TAKES_A_NUMBER)
@pytest.mark.peers
def test_a_number_on_other_devices_goes_to_the_parameters(build: Callable[[Any], Any]) -> None:
    everywhere = NamedSharding(LAYOUTS["FSDP"].mesh(), P())
    numbers = elsewhere(0.25), elsewhere(jnp.float32(0.25)), jax.device_put(0.25, everywhere)
    wanted = both_ways(build(0.25))
    for number in numbers:
        for updates, want in zip(both_ways(build(number)), wanted, strict=True):
            chex.assert_trees_all_equal(updates, want)
            assert all(x.devices() == {jax.devices()[0]} for x in jax.tree.leaves(updates))


def test_a_number_on_other_devices_in_the_loss_and_in_values() -> None:
    params = at_home()
    for differentiate in (jax.value_and_grad, lambda f: jax.jit(jax.value_and_grad(f))):
        found, want = (
            differentiate(lambda p: wdjax.l2_penalty(p, rate, WEIGHTS))(params)  # noqa: B023
            for rate in (elsewhere(0.25), 0.25)
        )
        chex.assert_trees_all_close(found, want, rtol=1e-6)
    rates = jax.device_put(0.5, jax.devices()[2]) * wdjax.by_path({"kernel": elsewhere(0.25)}, default=0.0)
    assert rates.values(params)["up"] == {"kernel": 0.125, "bias": 0.0}
    put_nowhere = jnp.float32(0.25)
    assert wdjax.by_path({"kernel": put_nowhere}, default=0.0).values(params)["up"]["kernel"] is put_nowhere


@pytest.mark.parametrize("recipe", [wdjax.sgd_l2, wdjax.sgdw, wdjax.adam_l2, wdjax.adamw])
@pytest.mark.parametrize("rate", [0.1, jnp.float32(0.1)], ids=["weak", "strong"])
@pytest.mark.peers
def test_a_learning_rate_that_was_put_on_a_device_promotes_as_in_optax(recipe: Any, rate: Any) -> None:
    params = at_home(make_params(0, jnp.bfloat16))
    there = at_home(rate)
    (mine, theirs) = (
        optimizer.update(params, optimizer.init(params), params)[0]
        for optimizer in (recipe(there, 0.0), optax.adam(there) if "adam" in recipe.__name__ else optax.sgd(there))
    )
    chex.assert_trees_all_equal_dtypes(mine, theirs)
    chex.assert_trees_all_equal(mine, theirs)


def test_a_constant_of_the_program_may_not_be_an_array_on_any_device() -> None:
    for number in (jnp.float32(0.5), elsewhere(0.5)):
        with pytest.raises(ValueError, match=r"by_depth: factor must be a number > 0, got Array\(0.5"):
            wdjax.by_depth("up", number)


def scaled(x: Any) -> Any:
    return 0.1 * wdjax.by_path({"kernel": x}, default=1.0)


ROW = np.full((1, 8), 0.5, np.float32)
SHARDINGS_OF = "jax.tree.map(lambda p: p.sharding, params)"
# The transformation with an array elsewhere, what the error says of that, and the transformation that it asks for.
ASIDE: dict[str, tuple[Callable[[], Any], str, Callable[[], Any]]] = {
    "schedule": (
        lambda: wdjax.decoupled_decay(lambda step: elsewhere(0.1)),
        "decoupled_decay: the value of the schedule weight_decay is on cpu:1, but the parameter 'down/bias' is on "
        "cpu:0. In the schedule, use NumPy arrays, np.asarray(array), or Python numbers.",
        lambda: wdjax.decoupled_decay(lambda step: 0.1),
    ),
    "array of rates": (
        lambda: wdjax.decoupled_decay(wdjax.by_path({"down/kernel": elsewhere(ROW)}, default=0.0)),
        "decoupled_decay: weight_decay is on cpu:1, but the parameter 'down/kernel' is on cpu:0. Put it on the same "
        "devices with jax.device_put, or write it as a NumPy array, np.asarray(array).",
        lambda: wdjax.decoupled_decay(wdjax.by_path({"down/kernel": np.asarray(elsewhere(ROW))}, default=0.0)),
    ),
    "anchor": (
        lambda: wdjax.decoupled_decay(0.1, WEIGHTS, toward=elsewhere(make_params(1, np.float32))),
        "decoupled_decay: toward is on cpu:1, but the parameter 'down/kernel' is on cpu:0. Put it on the same devices: "
        f"jax.device_put(pretrained, {SHARDINGS_OF}).",
        lambda: wdjax.decoupled_decay(
            0.1,
            WEIGHTS,
            toward=jax.device_put(elsewhere(make_params(1, np.float32)), jax.tree.map(lambda p: p.sharding, at_home())),
        ),
    ),
}


@pytest.mark.parametrize(("build", "said", "remedy"), ASIDE.values(), ids=ASIDE)
def test_an_array_on_other_devices_is_named(build: Callable[[], Any], said: str, remedy: Callable[[], Any]) -> None:
    optimizer, params = build(), at_home()
    state = optimizer.init(params)
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        optimizer.update(params, state, params)
    assert isinstance(caught.value.__cause__, ValueError)
    # Within jit, arrays of any device may be constants of the program.
    in_jit, _ = jax.jit(optimizer.update)(params, state, params)
    for updates in both_ways(remedy()):
        chex.assert_trees_all_close(updates, in_jit, rtol=1e-6)


@pytest.mark.parametrize(
    "optimizer",
    [
        wdjax.decoupled_decay(0.1, toward="init"),
        wdjax.decoupled_decay(0.1, toward=wdjax.EMA(0.9)),
        wdjax.constrain(wdjax.L2Ball(), "init", WEIGHTS),
        wdjax.decoupled_decay(lambda step: 0.1 / (1.0 + step.astype(float))),
    ],
    ids=["init", "EMA", "radius", "count"],
)
def test_a_state_on_other_devices_is_named(optimizer: Any) -> None:
    params = at_home()
    state = elsewhere(optimizer.init(params))
    said = r"the state is on cpu:1, but the parameter 'down/\w+' is on cpu:0. Make a state of these parameters"
    with pytest.raises(ValueError, match=said):
        optimizer.update(params, state, params)
    moved = jax.device_put(state, wdjax.state_shardings(optimizer, params))
    chex.assert_trees_all_equal(both_ways(optimizer, moved), both_ways(optimizer))


def test_updates_on_other_devices_and_a_penalty_toward_others_are_named() -> None:
    params = at_home()
    rule = wdjax.decoupled_decay(0.1)
    with pytest.raises(ValueError, match="the update of 'down/bias' is on cpu:1, but the parameter 'down/bias' is on"):
        rule.update(elsewhere(params), rule.init(params), params)
    with pytest.raises(ValueError, match="l2_penalty: toward is on cpu:1, but the parameter 'down/bias' is on cpu:0"):
        wdjax.l2_penalty(params, 0.1, toward=elsewhere(params))
    # Parameters that were put nowhere go along with either, so the two others are named.
    free = make_params(0, np.float32)
    rule = wdjax.decoupled_decay(0.1, toward=elsewhere(params))
    with pytest.raises(ValueError, match="toward is on cpu:1, but the update of 'down/bias' is on cpu:0"):
        rule.update(params, rule.init(free), free)


def test_other_errors_stay_as_they_are() -> None:
    class Broken(wdjax.L2):
        def gradient(self, w: Any) -> Any:
            raise ValueError("a fault of the user")

    rule = wdjax.add_penalty_to_grads(Broken(), wdjax.by_path({"down/kernel": elsewhere(ROW)}, default=0.0))
    params = at_home()
    with pytest.raises(ValueError, match=r"^a fault of the user$"):
        rule.update(params, rule.init(params), params)
