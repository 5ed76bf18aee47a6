"""Checkpoints with orbax and flax.serialization: a restored run goes on as if nothing had been, or as new code says.

Two rules are held here for every state that wdjax has. What was saved at step k and restored by a new process (a fresh
optimizer, a template of other values) continues bit for bit as the run that was never interrupted. And the rate, the
schedule and the mask are in the code and not in the state: where they were changed, the code decides from the saved
count on, and the count goes on from where it was.
"""

import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as orbax
import pytest
import saves_until_killed
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from optax import contrib
from orbax.checkpoint import v1 as ocp
from registry import ROWS, Row, core_anchored, core_row
from slow import slow, slow_but

import wdjax
from wdjax import by_path, only
from wdjax.in_update import DecayState
from wdjax.testing import decayed_weights

# Four ways to disk and back. Each gets a tree, and `like`, which has its structure and not its values.


def by_orbax(tree: Any, like: Any, directory: Path) -> Any:
    with ocp.training.Checkpointer(directory) as checkpointer:
        assert checkpointer.save(3, tree)
    with ocp.training.Checkpointer(directory) as checkpointer:
        return checkpointer.load(3, like)


def by_checkpoint_manager(tree: Any, like: Any, directory: Path) -> Any:
    with orbax.CheckpointManager(directory) as manager:
        assert manager.save(3, args=orbax.args.StandardSave(tree))
    with orbax.CheckpointManager(directory) as manager:
        return manager.restore(3, args=orbax.args.StandardRestore(like))


def by_flax_bytes(tree: Any, like: Any, directory: Path) -> Any:
    directory.mkdir(exist_ok=True)
    (directory / "3").write_bytes(flax.serialization.to_bytes(tree))
    return flax.serialization.from_bytes(like, (directory / "3").read_bytes())


def by_flax_state_dict(tree: Any, like: Any, directory: Path) -> Any:
    # The state dict itself goes to disk by anything that writes dicts of arrays, as NumPy's pickles.
    directory.mkdir(exist_ok=True)
    state_dict: Any = jax.tree.map(np.asarray, flax.serialization.to_state_dict(tree))
    np.save(directory / "3.npy", state_dict, allow_pickle=True)
    return flax.serialization.from_state_dict(like, np.load(directory / "3.npy", allow_pickle=True).item())


STORES: dict[str, Callable[[Any, Any, Path], Any]] = {
    "orbax": by_orbax,
    "CheckpointManager": by_checkpoint_manager,
    "to_bytes": by_flax_bytes,
    "to_state_dict": by_flax_state_dict,
}


def refused(store: Any, tree: Any, like: Any, directory: Path) -> str:
    """What a store says of a template that does not fit, with what it says that this was caused by."""
    with pytest.raises((ValueError, KeyError, AttributeError)) as caught:
        store(tree, like, directory)
    said, error = "", caught.value
    while error is not None:
        said, error = f"{said}{error}\n", error.__cause__ or error.__context__
    return said


BY_ORBAX = (by_orbax, by_checkpoint_manager)
every_store = pytest.mark.parametrize("store", STORES.values(), ids=STORES)


def bits(tree: Any) -> list[tuple[Any, ...]]:
    return [(x.dtype, x.shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


def assert_same_bits(got: Any, want: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, x), y in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert bits(x) == bits(y), jax.tree_util.keystr(path)


def is_decay(node: Any) -> bool:
    return isinstance(node, DecayState)


def map_decays(change: Callable[[DecayState], DecayState], state: Any) -> Any:
    return jax.tree.map(lambda node: change(node) if is_decay(node) else node, state, is_leaf=is_decay)


def decays(state: Any) -> list[DecayState]:
    return [node for node in jax.tree.leaves(state, is_leaf=is_decay) if is_decay(node)]


# Exact resume.

SAVED, END = 3, 6
RATES = optax.linear_schedule(0.1, 0.8, 7)  # Another rate each step, coarse enough to be seen in bfloat16.
STEPS = optax.cosine_decay_schedule(0.2, 10)


def make_params(dtype: Any = jnp.float32) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    return {
        "Dense_0": {"kernel": draw(16, 8), "bias": draw(8)},
        "Dense_1": {"kernel": draw(8, 8), "lora_a": draw(8, 8), "lora_b": draw(8, 8)},
    }


class Case(NamedTuple):
    """An optimizer, built anew for each run, and where its updates are not Optax's own: what it gets as gradients."""

    build: Callable[[], Any]
    gradient: float = 1.0


def row_case(row: Row) -> Case:
    return Case(lambda: row.build(RATES, toward="init"), -1.0)


def frozen(optimizer: Any) -> Any:
    return wdjax.freeze(optimizer, only("Dense_1/kernel"))


def around(optimizer: Any, learning_rate: Any = STEPS) -> Any:
    return wdjax.with_decoupled_decay(optimizer, RATES, only("kernel"), learning_rate=learning_rate, toward="init")


def written_by(writer: Any) -> Any:
    return optax.chain(wdjax.in_float32(wdjax.adamw(STEPS, RATES, toward="init")), writer)


TABLE = RATES * by_path({"bias": 0.0}, default=0.5)
OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "sgd_l2": lambda: wdjax.sgd_l2(STEPS, RATES, only("kernel"), momentum=0.9, toward="init"),
    "sgdw": lambda: wdjax.sgdw(0.1, RATES, momentum=0.9, nesterov=True, toward="init"),
    "adam_l2": lambda: wdjax.adam_l2(STEPS, RATES, only("kernel")),
    "adamw": lambda: wdjax.adamw(STEPS, TABLE, toward="init"),
    "adamw with moments in bfloat16": lambda: wdjax.adamw(STEPS, TABLE, mu_dtype=jnp.bfloat16, toward="init"),
    "toward an average": lambda: wdjax.adamw(STEPS, TABLE, toward=wdjax.EMA(0.75)),
    "anchors by path": lambda: wdjax.adamw(STEPS, TABLE, toward=by_path({"kernel": wdjax.EMA(0.75)}, default="init")),
    "constrain": lambda: optax.chain(
        optax.scale_by_adam(),
        wdjax.normalized_update(only("kernel")),
        wdjax.decoupled_decay(RATES),
        optax.scale_by_learning_rate(STEPS),
        wdjax.constrain(wdjax.L2Sphere(), "init", only("kernel")),
    ),
    "norm control": lambda: optax.chain(
        optax.scale_by_adam(),
        wdjax.in_update.tangential_update(only("kernel"), per=-1),
        optax.scale_by_learning_rate(STEPS),
        wdjax.in_update.weight_norm_control(RATES, "init", only("kernel"), ratio=STEPS, per=-1),
    ),
    "bounds": lambda: optax.chain(
        optax.adam(STEPS),
        wdjax.on_weights.cpr(wdjax.L2(), wdjax.on_weights.WarmStart(2), only("kernel")),
        wdjax.on_weights.cpr(wdjax.L2(), wdjax.on_weights.InflectionPoint(1, smoothing=0.5), only("bias")),
    ),
    "two decays": lambda: optax.chain(
        optax.scale_by_adam(),
        wdjax.decoupled_decay(RATES, only("kernel")),
        optax.scale_by_learning_rate(STEPS),
        wdjax.proximal_step(wdjax.L1(), RATES, only("bias"), learning_rate=0.1),
    ),
    "decoupled_lora_decay": lambda: optax.chain(
        optax.scale_by_adam(), wdjax.decoupled_lora_decay(RATES), optax.scale_by_learning_rate(STEPS)
    ),
    "around adam": lambda: around(optax.adam(STEPS)),
    "around apply_if_finite": lambda: around(optax.apply_if_finite(optax.adam(STEPS), 3)),
    "around MultiSteps": lambda: around(optax.MultiSteps(optax.adam(STEPS), 2)),
    "around schedule_free": lambda: around(contrib.schedule_free(optax.sgd(0.1), 0.1), 0.1),
    "around MultiSteps of schedule_free": lambda: around(
        optax.MultiSteps(contrib.schedule_free(optax.sgd(0.1), 0.1), 2), 0.1
    ),
    "MultiSteps of adamw": lambda: optax.MultiSteps(
        wdjax.adamw(STEPS, RATES, toward="init"), 2
    ).gradient_transformation(),
    "freeze": lambda: frozen(wdjax.adamw(STEPS, RATES, toward="init")),
    "freeze around": lambda: frozen(around(optax.adam(STEPS))),
    "freeze of MultiSteps": lambda: frozen(optax.MultiSteps(around(optax.adam(STEPS)), 2)),
    "masked": lambda: optax.masked(wdjax.adamw(STEPS, RATES, toward="init"), only("kernel").mask),
    "partition": lambda: optax.partition(
        {"a": wdjax.adamw(STEPS, RATES, toward="init"), "b": wdjax.sgdw(0.1, RATES)},
        by_path({"kernel": "a"}, default="b").values,
    ),
    "monitor": lambda: wdjax.monitor(
        wdjax.adamw(STEPS, RATES, only("kernel")), RATES, only("kernel"), learning_rate=STEPS
    ),
    "shrink_and_perturb": lambda: optax.chain(
        optax.sgd(STEPS), wdjax.on_weights.shrink_and_perturb(0.1, RATES, seed=0)
    ),
    "stochastic_rounding": lambda: written_by(wdjax.stochastic_rounding(seed=0)),
    "compensated": lambda: written_by(wdjax.compensated()),
    "master_weights": lambda: written_by(wdjax.master_weights()),
    "inject_hyperparams": lambda: optax.inject_hyperparams(wdjax.adamw, static_args=("b1", "b2", "eps", "eps_root"))(
        STEPS, TABLE, toward="init"
    ),
}
# All of one group train side by side, each on parameters of its own, and one checkpoint has them all.
GROUPS = {
    "core rows": {row.name: row_case(row) for row in ROWS if row.core},
    "other rows": {row.name: row_case(row) for row in ROWS if not row.core},
    "optimizers": {name: Case(build) for name, build in OPTIMIZERS.items()},
}
PLACES = {"float32": (jnp.float32, False), "bfloat16": (jnp.bfloat16, False), "eight devices": (jnp.float32, True)}
every_group = pytest.mark.parametrize(
    "group", ["core rows", slow("other rows"), pytest.param("optimizers", marks=pytest.mark.peers)]
)


def begin(group: str, params: Any) -> Any:
    return {name: {"params": params, "opt_state": case.build().init(params)} for name, case in GROUPS[group].items()}


def stepper(group: str, like: Any) -> Callable[[Any, int, int], Any]:
    """A new process: optimizers of its own, compiled on their own, for runs that are placed like these."""
    optimizers = {name: case.build() for name, case in GROUPS[group].items()}

    def step(runs: Any, i: jax.Array) -> Any:
        after = {}
        for name, optimizer in optimizers.items():
            params, gradient = runs[name]["params"], GROUPS[group][name].gradient
            grads = jax.tree.map(lambda p: gradient * jnp.sin(3 * p + i.astype(p.dtype)), params)  # noqa: B023
            updates, state = optimizer.update(grads, runs[name]["opt_state"], params)
            after[name] = {"params": optax.apply_updates(params, updates), "opt_state": state}
        return after

    # Compiled once: a jitted function is compiled again for arrays that were put on a device, as restored ones are.
    # Without optimizations, as the program is as long as the list of optimizers, and runs for a moment.
    lowered = jax.jit(step, out_shardings=shardings(like)).lower(like, jnp.asarray(0))
    compiled = lowered.compile({"xla_backend_optimization_level": "0"})

    def steps(runs: Any, start: int, stop: int) -> Any:
        for i in range(start, stop):
            runs = compiled(runs, jnp.asarray(i))
        return runs

    return steps


def shardings(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, tree)


def over_all_devices(tree: Any) -> Any:
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))

    def put(x: Any) -> Any:
        splits = np.ndim(x) and np.shape(x)[0] % mesh.size == 0  # Not the radius of a whole array.
        spec = jax.sharding.PartitionSpec(*["data"][:splits])
        return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))

    return jax.tree.map(put, tree)


@functools.cache
def uninterrupted(group: str, place: str) -> tuple[Any, Any, Any, Callable[[Any, int, int], Any]]:
    """A template of other values, the runs at the save and at their end, and the steps of a process that goes on."""
    dtype, is_sharded = PLACES[place]
    params = make_params(dtype)
    first, like = begin(group, params), begin(group, jax.tree.map(lambda p: jnp.full_like(p, 0.5), params))
    if is_sharded:
        first, like = over_all_devices(first), over_all_devices(like)
    steps = stepper(group, like)
    saved = steps(first, 0, SAVED)
    # Another process has other optimizers, of the same code; to compile them once more in each place takes too long.
    resume = stepper(group, like) if place == "float32" else steps
    return like, saved, steps(saved, SAVED, END), resume


@every_group
@pytest.mark.parametrize("place", slow_but(PLACES, "float32"))
def test_a_restored_run_continues_bit_for_bit(group: str, place: str, tmp_path: Path) -> None:
    like, saved, want, resume = uninterrupted(group, place)
    for name, store in STORES.items():
        restored = store(saved, like, tmp_path / name)
        assert_same_bits(restored, saved)
        if store in BY_ORBAX:
            assert shardings(restored) == shardings(like)
        else:  # Flax gives back NumPy arrays, to be put where they belong.
            restored = jax.tree.map(lambda x, template: jax.device_put(x, template.sharding), restored, like)
        assert_same_bits(resume(restored, SAVED, END), want)


@every_group
@pytest.mark.parametrize("place", ["float32", slow("bfloat16")])
def test_the_position_of_the_schedule_and_the_anchor_matter_to_that(group: str, place: str) -> None:
    # What the test above would not see if these were restored wrong, or not at all.
    _, saved, want, resume = uninterrupted(group, place)
    late = begin(group, make_params(PLACES[place][0]))
    for name, run in saved.items():
        assert decays(run["opt_state"])
        for decay in decays(run["opt_state"]):
            assert decay.count == (SAVED // 2 if "MultiSteps" in name else SAVED)
        if "MultiSteps" in name:  # Saved between two steps.
            assert optax.tree.get(run["opt_state"], "mini_step") == 1
            assert optax.tree.norm(optax.tree.get(run["opt_state"], "acc_grads")) > 0
        late[name] = GROUPS[group][name].build().init(run["params"])
    reset = resume(map_decays(lambda decay: decay._replace(count=jnp.zeros_like(decay.count)), saved), SAVED, END)
    anchors = iter(decays(late))
    again = resume(map_decays(lambda decay: decay._replace(anchor=next(anchors).anchor), saved), SAVED, END)
    for name in saved.keys() - {row.name for row in ROWS if not row.has_rate}:  # Those count for nothing.
        assert bits(reset[name]["params"]) != bits(want[name]["params"]), name
        if any(decay.anchor is not None for decay in decays(saved[name])):
            assert bits(again[name]["params"]) != bits(want[name]["params"]), name

    for writer in {"stochastic_rounding", "compensated", "master_weights"} & set(saved) if place == "bfloat16" else ():
        chain, kept = saved[writer]["opt_state"]
        blank = {**saved[writer], "opt_state": (chain, jax.tree.map(jnp.zeros_like, kept))}
        lost = resume({**saved, writer: blank}, SAVED, END)
        assert bits(lost[writer]["params"]) != bits(want[writer]["params"]), writer


@pytest.mark.peers
@pytest.mark.parametrize("store", [by_orbax, slow(by_checkpoint_manager)])
def test_saved_on_eight_devices_and_restored_on_one_and_back(store: Any, tmp_path: Path) -> None:
    one, other = begin("optimizers", make_params()), begin("optimizers", jax.tree.map(jnp.ones_like, make_params()))
    for name, saved, like in (("gather", over_all_devices(one), other), ("spread", one, over_all_devices(other))):
        restored = store(saved, like, tmp_path / name)
        assert bits(restored) == bits(saved)
        assert shardings(restored) == shardings(like)


@pytest.mark.peers
def test_without_jit_what_flax_gives_back_is_first_made_arrays_of_jax(tmp_path: Path) -> None:
    # Of NumPy's count a schedule in plain arithmetic makes a float64, which is another rate in the last bits.
    optimizer = wdjax.adamw(lambda count: 0.1 * 0.9**count, lambda count: 0.3 * 0.9**count, toward="init")

    def run(params: Any, state: Any, steps: int) -> Any:
        for _ in range(steps):
            grads = jax.tree.map(lambda p: jnp.sin(3 * p), params)
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    saved = run(make_params(), optimizer.init(make_params()), 3)
    restored = by_flax_bytes(saved, saved, tmp_path)
    assert bits(run(*jax.tree.map(jnp.asarray, restored), 3)) == bits(run(*saved, 3))
    learning_rate, count = optax.scale_by_learning_rate(lambda count: 0.3 * 0.9**count), jnp.zeros([], jnp.int32)
    of_numpy = [
        learning_rate.update(make_params(), optax.ScaleByScheduleState(np.asarray(count + n)))[0] for n in range(9)
    ]
    of_jax = [learning_rate.update(make_params(), optax.ScaleByScheduleState(count + n))[0] for n in range(9)]
    assert bits(of_numpy) != bits(of_jax)


@pytest.mark.parametrize("store", BY_ORBAX)
def test_orbax_restores_in_the_dtypes_of_the_template(store: Any, tmp_path: Path) -> None:
    optimizer = wdjax.decoupled_decay(0.1, toward="init")
    wide, narrow = (optimizer.init(make_params(dtype)) for dtype in (jnp.float32, jnp.bfloat16))
    assert_same_bits(store(wide, narrow, tmp_path / "run"), narrow)


# Training loops of Flax and Equinox.


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(2)(nn.relu(nn.Dense(8)(x)))


INPUTS = np.linspace(-1.0, 1.0, 12, dtype=np.float32).reshape(4, 3)


@pytest.mark.peers
@every_store
def test_a_train_state(store: Any, tmp_path: Path) -> None:
    def create(seed: int) -> TrainState:
        params = Net().init(jax.random.key(seed), INPUTS)["params"]
        return TrainState.create(apply_fn=Net().apply, params=params, tx=wdjax.adamw(STEPS, TABLE, toward="init"))

    @jax.jit
    def train(state: TrainState) -> TrainState:
        grads = jax.grad(lambda params: jnp.sum(state.apply_fn({"params": params}, INPUTS) ** 2))(state.params)
        return state.apply_gradients(grads=grads)

    saved = train(train(train(create(0))))
    restored = store(saved, create(1), tmp_path / "run")
    assert restored.step == 3
    assert bits(train(train(restored))) == bits(train(train(saved)))


@pytest.mark.peers
@every_store
def test_an_nnx_optimizer(store: Any, tmp_path: Path) -> None:
    def create(seed: int) -> tuple[Any, Any]:
        model = nnx.Sequential(nnx.Linear(3, 8, rngs=nnx.Rngs(seed)), nnx.Linear(8, 2, rngs=nnx.Rngs(seed + 1)))
        return model, nnx.Optimizer(model, wdjax.adamw(STEPS, TABLE, toward="init"), wrt=nnx.Param)

    @nnx.jit
    def train(model: Any, optimizer: Any) -> None:
        optimizer.update(model, nnx.grad(lambda model: jnp.sum(model(INPUTS) ** 2))(model))

    def state(both: Any) -> dict[str, Any]:
        found = {"model": nnx.state(both[0]), "optimizer": nnx.state(both[1])}
        # Flax's serialization knows dictionaries, and nothing of NNX.
        return found if store in BY_ORBAX else jax.tree.map(nnx.to_pure_dict, found, is_leaf=is_state)

    def is_state(node: Any) -> bool:
        return isinstance(node, nnx.State)

    first, second = create(0), create(5)
    for _ in range(3):
        train(*first)
    restored = store(state(first), state(second), tmp_path / "run")
    for module, values in zip(second, restored.values(), strict=True):
        nnx.update(module, values)
    assert bits(state(second)) == bits(state(first))
    assert second[1].step[...] == 3
    for both in (first, second):
        for _ in range(3):
            train(*both)
    assert bits(state(second)) == bits(state(first))


@pytest.mark.peers
@pytest.mark.parametrize("by", ["orbax", "CheckpointManager", "Equinox"])
def test_an_equinox_module(by: str, tmp_path: Path) -> None:
    optimizer = wdjax.adamw(STEPS, RATES, wdjax.all_but("bias"), toward="init")

    def create(seed: int) -> Any:
        arrays = eqx.filter(eqx.nn.MLP(3, 2, 8, 1, key=jax.random.key(seed)), eqx.is_array)
        return arrays, optimizer.init(arrays)

    @jax.jit
    def train(params: Any, state: Any) -> Any:
        updates, state = optimizer.update(jax.tree.map(jnp.sin, params), state, params)
        return optax.apply_updates(params, updates), state

    saved = train(*train(*create(0)))
    if by == "Equinox":
        eqx.tree_serialise_leaves(tmp_path / "run.eqx", saved)
        restored = eqx.tree_deserialise_leaves(tmp_path / "run.eqx", create(1))
    else:
        restored = STORES[by](saved, create(1), tmp_path / "run")
    assert_same_bits(restored, saved)
    assert_same_bits(train(*restored), train(*saved))


# What was changed between save and restore.


@pytest.fixture
def x64_in_all_threads() -> Iterator[None]:
    # `jax.enable_x64` is for one thread, and orbax restores in others: they would make float32 of float64.
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


FLOAT = {"rtol": 1e-12, "atol": 1e-14}


def rising(count: Any) -> Any:
    return 0.05 * jnp.asarray(count + 1, jnp.float64)


def falling(count: Any) -> Any:
    return 0.4 / jnp.asarray(count + 2, jnp.float64)


def make_float64() -> dict[str, Any]:
    rng = np.random.default_rng(1)
    return {"Dense_0": {"kernel": jnp.asarray(rng.normal(size=(4, 3))), "bias": jnp.asarray(rng.normal(size=3))}}


class Code(NamedTuple):
    """What the code says of a decay, and in NumPy the rate of each parameter at each count."""

    rate: Any
    mask: Any
    kernel: Callable[[int], float] | None  # None where the mask leaves it out.
    bias: Callable[[int], float] | None


def of_all(rate: Any, value: Callable[[int], float], mask: Any = None) -> Code:
    return Code(rate, mask, value, value)


CODES = {
    "number": of_all(0.3, lambda n: 0.3),
    "another number": of_all(0.1, lambda n: 0.1),
    "off": of_all(0.0, lambda n: 0.0),
    "schedule": of_all(rising, lambda n: 0.05 * (n + 1)),
    "another schedule": of_all(falling, lambda n: 0.4 / (n + 2)),
    "table": Code(by_path({"bias": falling}, default=0.2), None, lambda n: 0.2, lambda n: 0.4 / (n + 2)),
    "mask": Code(rising, only("kernel"), lambda n: 0.05 * (n + 1), None),
    "another mask": Code(rising, only("bias"), None, lambda n: 0.05 * (n + 1)),
    "function for a mask": Code(0.3, lambda params: {"Dense_0": {"kernel": False, "bias": True}}, None, lambda n: 0.3),
}


def walk(optimizer: Any, params: Any, state: Any, updates: Any, steps: int) -> tuple[Any, Any]:
    for _ in range(steps):
        new, state = optimizer.update(updates, state, params)
        params = optax.apply_updates(params, new)
    return params, state


def walk_numpy(row: Row, code: Code, params: Any, updates: Any, counts: range) -> Any:
    weights, moves = (jax.tree.map(lambda x: np.asarray(x, np.float64), tree["Dense_0"]) for tree in (params, updates))
    for count in counts:
        for name in weights:
            u, w, rate = moves[name], weights[name], getattr(code, name)
            weights[name] = w + (row.masked(u, w) if rate is None else row.oracle(u, w, rate(count), 0.0))
    return {"Dense_0": weights}


@core_row
@pytest.mark.usefixtures("x64_in_all_threads")
@pytest.mark.parametrize("before", ["mask", slow("number")])
def test_after_a_restore_the_new_code_decides_from_the_saved_count_on(row: Row, before: str, tmp_path: Path) -> None:
    params = make_float64()
    updates = jax.tree.map(lambda p: 0.3 * jnp.cos(5 * p), params)
    old = row.build(CODES[before].rate, CODES[before].mask)
    saved = walk(old, params, old.init(params), updates, 3)
    with ocp.training.Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(3, saved)
        for name, code in CODES.items():
            new = row.build(code.rate, code.mask)
            weights, state = checkpointer.load(3, (params, new.init(params)))
            got, _ = walk(new, weights, state, updates, 2)
            want = walk_numpy(row, code, saved[0], updates, range(3, 5))
            for key in ("kernel", "bias"):
                np.testing.assert_allclose(got["Dense_0"][key], want["Dense_0"][key], err_msg=name, **FLOAT)


@pytest.mark.usefixtures("x64_in_all_threads")
def test_another_kind_of_decay_takes_over_the_count(tmp_path: Path) -> None:
    params = make_float64()
    updates = jax.tree.map(jnp.cos, params)
    rows = [row for row in ROWS if "with_" not in row.name and not row.is_stateful]
    old = wdjax.decoupled_decay(0.1)
    saved = walk(old, params, old.init(params), updates, 2)
    with ocp.training.Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(3, saved)
        for row in rows:
            new = row.build(rising)
            got, _ = walk(new, *checkpointer.load(3, (params, new.init(params))), updates, 2)
            want = walk_numpy(row, CODES["schedule"], saved[0], updates, range(2, 4))
            for key in ("kernel", "bias"):
                np.testing.assert_allclose(got["Dense_0"][key], want["Dense_0"][key], err_msg=row.name, **FLOAT)


def no_grads(params: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, params)


@pytest.mark.peers
@pytest.mark.usefixtures("x64_in_all_threads")
@every_store
def test_a_changed_learning_rate_multiplies_the_decay_from_there_on(store: Any, tmp_path: Path) -> None:
    params = make_float64()
    for name, build in {
        "adamw": lambda lr: wdjax.adamw(lr, rising),
        "around": lambda lr: wdjax.with_decoupled_decay(optax.adam(lr), rising, learning_rate=lr),
    }.items():
        for old_rate, new_rate in ((0.1, 0.2), (lambda n: 0.1 / (n + 1), lambda n: 0.3 / (n + 1))):
            old, new = build(old_rate), build(new_rate)
            saved = walk(old, params, old.init(params), no_grads(params), 3)
            restored = store(saved, (params, new.init(params)), tmp_path / f"{name} {old_rate}"[:9].strip())
            restored = jax.tree.map(jnp.asarray, restored)
            got, _ = walk(new, *restored, no_grads(params), 2)
            later = (lambda n: new_rate(n + 3)) if callable(new_rate) else new_rate  # noqa: B023
            want = decayed_weights(saved[0]["Dense_0"]["kernel"], later, lambda n: 0.05 * (n + 4), 2)
            np.testing.assert_allclose(got["Dense_0"]["kernel"], want, **FLOAT)


# Anchors.


@pytest.mark.usefixtures("x64_in_all_threads")
@every_store
def test_a_restored_run_keeps_the_anchor_of_the_first(store: Any, tmp_path: Path) -> None:
    first = make_float64()
    start = jax.tree.map(lambda p: p + 1, first)
    before, after = (
        wdjax.with_decoupled_decay(optax.identity(), 0.5, learning_rate=0.2, toward="init") for _ in range(2)
    )
    weights, state = walk(before, start, before.init(first), no_grads(first), 3)
    # The template is made as a restarted program makes it: of whatever weights it has at hand.
    restored = store((weights, state), (weights, after.init(weights)), tmp_path / "run")
    got, _ = walk(after, *restored, no_grads(first), 40)
    for name, anchor in first["Dense_0"].items():
        want = decayed_weights(start["Dense_0"][name], 0.2, 0.5, 43, toward=anchor)
        np.testing.assert_allclose(got["Dense_0"][name], want, **FLOAT)


NO_ANCHOR = r"toward='init', but the state holds no anchor: an optimizer without one made it"


@pytest.mark.usefixtures("x64_in_all_threads")
@core_anchored
def test_an_anchor_that_was_not_saved_is_missed_and_can_be_given(row: Row, tmp_path: Path) -> None:
    pretrained = make_float64()
    params = jax.tree.map(lambda p: p + 1, pretrained)
    updates = jax.tree.map(lambda p: 0.3 * jnp.cos(5 * p), params)
    old, new = row.build(rising), row.build(rising, toward="init")
    weights, state = walk(old, params, old.init(params), updates, 3)
    restored, old_state = by_orbax((weights, state), (params, old.init(params)), tmp_path / "run")
    with pytest.raises(ValueError, match=NO_ANCHOR):
        new.update(updates, old_state, restored)

    fresh = decays(new.init(pretrained))
    anchors = iter(fresh)
    new_state = map_decays(lambda decay: decay._replace(anchor=next(anchors).anchor), old_state)
    got, _ = walk(new, restored, new_state, updates, 2)
    for name, anchor in pretrained["Dense_0"].items():
        w, u, a = (
            np.asarray(tree, np.float64) for tree in (weights["Dense_0"][name], updates["Dense_0"][name], anchor)
        )
        for count in (3, 4):
            w = (
                w + row.oracle(u, w - a, 0.05 * (count + 1), 0.0)
                if "prox" not in row.name
                else w + row.oracle(u, w, 0.05 * (count + 1), a)
            )
        np.testing.assert_allclose(got["Dense_0"][name], w, **FLOAT)


@every_store
def test_an_anchor_that_is_new_or_gone_is_no_silent_change(store: Any, tmp_path: Path) -> None:
    params = make_params()
    without, with_anchor = wdjax.decoupled_decay(0.1), wdjax.decoupled_decay(0.1, toward="init")
    refused(store, without.init(params), with_anchor.init(params), tmp_path / "new")
    _, saved = without.update(params, with_anchor.init(params), params)
    if store in BY_ORBAX:
        assert "anchor" in refused(store, saved, without.init(params), tmp_path / "gone")
        restored = store(saved, with_anchor.init(params), tmp_path / "kept")._replace(anchor=None)
        assert_same_bits(restored, saved._replace(anchor=None))
    else:  # It is kept, and means nothing.
        restored = store(saved, without.init(params), tmp_path / "gone")
        assert bits(restored) == bits(saved)
    assert bits(without.update(params, restored, params)[0]) == bits(without.update(params, saved, params)[0])


# Checkpoints of optimizers without a decay of ours.


def adam_in_numpy(
    w: np.ndarray, steps: int, rate: Callable[[int], float], learning_rate: Any, anchor: Any = 0.0
) -> Any:
    m, v = np.zeros_like(w), np.zeros_like(w)
    for n in range(steps):
        g = np.sin(3 * w + n)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        direction = m / (1 - 0.9 ** (n + 1)) / (np.sqrt(v / (1 - 0.999 ** (n + 1))) + 1e-8)
        w = w - learning_rate(n) * (direction + rate(n) * (w - anchor))
    return w


def momentum_in_numpy(w: np.ndarray, steps: int, rate: Callable[[int], float], learning_rate: Any) -> Any:
    m = np.zeros_like(w)
    for n in range(steps):
        m = 0.9 * m + np.sin(3 * w + n)
        w = w - learning_rate(n) * (m + rate(n) * w)
    return w


def train(optimizer: Any, params: Any, state: Any, start: int, stop: int) -> tuple[Any, Any]:
    for n in range(start, stop):
        grads = jax.tree.map(lambda p: jnp.sin(3 * p + n), params)  # noqa: B023
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


class Taken(NamedTuple):
    """An old optimizer, one with a decay of ours that is to go on from its checkpoint, and how its state is made.

    Attributes:
        old, new: the optimizers.
        place: (restored state of the old, fresh state of the new) -> state of the new.
        walk: the whole run in NumPy.
        before: the old optimizer's own decay.
        learning_rate: of both.
    """

    old: Any
    new: Any
    place: Callable[[Any, Any], Any]
    walk: Any = adam_in_numpy
    before: Callable[[int], float] = lambda n: 0.0
    learning_rate: Callable[[int], float] = lambda n: 0.1


def cooling(n: Any) -> Any:
    return 0.2 / (n + 2)


def after_the_moments(old: Any, fresh: Any) -> Any:
    adam, *rest = old
    return (adam, fresh[1]._replace(count=adam.count), *rest)


def instead_of_the_old_decay(old: Any, fresh: Any) -> Any:
    adam, _, learning_rate = old
    return adam, fresh[1]._replace(count=adam.count), learning_rate


def with_the_count_of_the_old_decay(old: Any, fresh: Any) -> Any:
    adam, decay, learning_rate = old
    return adam, fresh[1]._replace(count=decay.count), learning_rate


TAKEN = {
    "adam": Taken(optax.adam(0.1), wdjax.adamw(0.1, rising), after_the_moments),
    "adam with a scheduled learning rate": Taken(
        optax.adam(cooling), wdjax.adamw(cooling, rising), after_the_moments, learning_rate=cooling
    ),
    "the chain that adam is": Taken(
        optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(0.1)),
        wdjax.adamw(0.1, rising),
        after_the_moments,
    ),
    "around adam": Taken(
        optax.adam(cooling),
        wdjax.with_decoupled_decay(optax.adam(cooling), rising, learning_rate=cooling),
        lambda old, fresh: fresh._replace(inner_state=old, decay=fresh.decay._replace(count=old[0].count)),
        learning_rate=cooling,
    ),
    "optax.adamw": Taken(
        optax.adamw(0.1, weight_decay=0.3), wdjax.adamw(0.1, rising), instead_of_the_old_decay, before=lambda n: 0.3
    ),
    "optax.adamw with a mask": Taken(
        optax.adamw(0.1, weight_decay=0.3, mask=only("kernel").mask),
        wdjax.adamw(0.1, rising, only("kernel")),
        instead_of_the_old_decay,
        before=lambda n: 0.3,
    ),
    "optax.adamw with a schedule": Taken(
        optax.adamw(0.1, weight_decay=falling),
        wdjax.adamw(0.1, rising),
        with_the_count_of_the_old_decay,
        before=lambda n: 0.4 / (n + 2),
    ),
    "optax.adamw with a schedule and a mask": Taken(
        optax.adamw(0.1, weight_decay=falling, mask=only("kernel").mask),
        wdjax.adamw(0.1, rising, only("kernel")),
        lambda old, fresh: (old[0], fresh[1]._replace(count=old[1].inner_state.count), old[2]),
        before=lambda n: 0.4 / (n + 2),
    ),
    "sgd, which counts nothing": Taken(
        optax.sgd(0.1, momentum=0.9),
        wdjax.sgdw(0.1, rising, momentum=0.9),
        lambda old, fresh: (old[0], fresh[1]._replace(count=jnp.asarray(3, jnp.int32)), old[1]),
        walk=momentum_in_numpy,
    ),
}


@pytest.mark.peers
@pytest.mark.usefixtures("x64_in_all_threads")
@pytest.mark.parametrize("name", TAKEN)
@every_store
def test_an_old_checkpoint_without_our_decay_goes_on_with_it(name: str, store: Any, tmp_path: Path) -> None:
    old, new, place, in_numpy, before, learning_rate = TAKEN[name]
    masked = "mask" in name
    params = make_float64()
    saved = train(old, params, old.init(params), 0, 3)
    # Not as it is: the states have other structures.
    refused(store, saved, (params, new.init(params)), tmp_path / "refused")

    weights, old_state = jax.tree.map(jnp.asarray, store(saved, (params, old.init(params)), tmp_path / "run"))
    state = place(old_state, new.init(weights))
    assert jax.tree.structure(state) == jax.tree.structure(new.init(weights))
    got, _ = train(new, weights, state, 3, 6)
    uncounted = map_decays(lambda decay: decay._replace(count=jnp.zeros_like(decay.count)), state)
    wrong, _ = train(new, weights, uncounted, 3, 6)
    for key, start in params["Dense_0"].items():
        off = masked and key == "bias"
        rate = lambda n, off=off: 0.0 if off else before(n) if n < 3 else 0.05 * (n + 1)  # noqa: E731
        want = in_numpy(np.asarray(start), 6, rate, learning_rate)
        np.testing.assert_allclose(got["Dense_0"][key], want, rtol=1e-10, atol=1e-12)
        assert (np.max(np.abs(wrong["Dense_0"][key] - want)) > 1e-3) is not off


@pytest.mark.peers
def test_an_old_train_state_goes_on_with_another_optimizer(tmp_path: Path) -> None:
    params, old, new = make_params(), optax.adam(0.1), wdjax.adamw(0.1, RATES)
    state = TrainState.create(apply_fn=Net().apply, params=params, tx=old)
    state = state.apply_gradients(grads=params).apply_gradients(grads=params)
    state = by_orbax(state, TrainState.create(apply_fn=Net().apply, params=params, tx=old), tmp_path / "run")
    taken = state.replace(tx=new, opt_state=after_the_moments(state.opt_state, new.init(state.params)))
    got = taken.apply_gradients(grads=params)
    plain = state.apply_gradients(grads=params)
    want = jax.tree.map(lambda p, w: np.asarray(p) - 0.1 * 0.3 * np.asarray(w), plain.params, state.params)
    for x, y in zip(jax.tree.leaves(got.params), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    assert got.step == 3


@pytest.mark.peers
@pytest.mark.usefixtures("x64_in_all_threads")
def test_an_old_checkpoint_goes_on_toward_the_pretrained_weights(tmp_path: Path) -> None:
    pretrained = make_float64()
    old, new = optax.adam(0.1), wdjax.adamw(0.1, rising, toward="init")
    saved = train(old, pretrained, old.init(pretrained), 0, 3)
    weights, (adam, learning_rate) = by_orbax(saved, (pretrained, old.init(pretrained)), tmp_path / "run")
    fresh = new.init(pretrained)
    got, _ = train(new, weights, (adam, fresh[1]._replace(count=adam.count), learning_rate), 3, 6)
    for key, start in pretrained["Dense_0"].items():
        w = np.asarray(start)
        want = adam_in_numpy(w, 6, lambda n: 0.0 if n < 3 else 0.05 * (n + 1), lambda n: 0.1, anchor=w)
        np.testing.assert_allclose(got["Dense_0"][key], want, rtol=1e-10, atol=1e-12)


@pytest.mark.peers
@pytest.mark.usefixtures("x64_in_all_threads")
def test_multi_steps_goes_on_in_the_middle_of_an_accumulation_with_a_decay_around_it() -> None:
    params = make_float64()
    old = optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation()
    new = wdjax.with_decoupled_decay(old, rising, learning_rate=0.1)
    weights, old_state = train(old, params, old.init(params), 0, 5)
    assert (old_state.gradient_step, old_state.mini_step) == (2, 1)
    fresh = new.init(weights)
    state = fresh._replace(inner_state=old_state, decay=fresh.decay._replace(count=old_state.gradient_step))
    got, _ = train(new, weights, state, 5, 6)
    plain, _ = train(old, weights, old_state, 5, 6)
    want = jax.tree.map(lambda w, p: p - 0.1 * 0.15 * w, weights, plain)
    np.testing.assert_allclose(got["Dense_0"]["kernel"], want["Dense_0"]["kernel"], **FLOAT)


# What today's tools make of the same changes; docs/how_to/checkpoints.md tells of these.

REFUSED: dict[str, tuple[Any, Any]] = {
    "Optax's decay, from a number to a schedule": (
        optax.adamw(0.1, weight_decay=0.1),
        optax.adamw(0.1, weight_decay=lambda n: 0.1),
    ),
    "Optax's decay, from a schedule to a number": (
        optax.adamw(0.1, weight_decay=lambda n: 0.1),
        optax.adamw(0.1, weight_decay=0.1),
    ),
    "Optax's decay, with a mask now": (optax.adamw(0.1), optax.adamw(0.1, mask=only("kernel").mask)),
    "a learning rate, from a number to a schedule": (wdjax.adamw(0.1, 0.1), wdjax.adamw(STEPS, 0.1)),
    "a learning rate, from a schedule to a number": (wdjax.adamw(STEPS, 0.1), wdjax.adamw(0.1, 0.1)),
}


@pytest.mark.peers
@pytest.mark.parametrize("name", REFUSED)
@every_store
def test_what_the_tools_refuse(name: str, store: Any, tmp_path: Path) -> None:
    old, new = (optimizer.init(make_params()) for optimizer in REFUSED[name])
    said = refused(store, old, new, tmp_path / "run")
    assert "tree structures do not match" in said or "field names of the state dict" in said
    assert ("incompatible handler" in said) is (store is by_orbax)


@pytest.mark.peers
@pytest.mark.usefixtures("x64_in_all_threads")
def test_a_learning_rate_that_became_a_schedule_is_given_its_count(tmp_path: Path) -> None:
    params = make_float64()
    old, new = wdjax.adamw(0.1, rising), wdjax.adamw(cooling, rising)
    saved = train(old, params, old.init(params), 0, 3)
    weights, (adam, decay, _) = by_orbax(saved, (params, old.init(params)), tmp_path / "run")
    _, _, learning_rate = tuple(new.init(weights))
    got, _ = train(new, weights, (adam, decay, learning_rate._replace(count=adam.count)), 3, 6)
    for key, start in params["Dense_0"].items():
        want = adam_in_numpy(np.asarray(start), 6, lambda n: 0.05 * (n + 1), lambda n: 0.1 if n < 3 else cooling(n))
        np.testing.assert_allclose(got["Dense_0"][key], want, rtol=1e-10, atol=1e-12)


@pytest.mark.peers
@every_store
@pytest.mark.parametrize("recipe", [wdjax.adamw, optax.adamw], ids=["wdjax", "optax"])
def test_inject_hyperparams_goes_on_with_the_old_rate(recipe: Any, store: Any, tmp_path: Path) -> None:
    params = make_params()
    old, new = (optax.inject_hyperparams(recipe)(learning_rate=0.1, weight_decay=rate) for rate in (0.2, 0.5))
    state = store(old.init(params), new.init(params), tmp_path / "run")

    def decayed(state: Any) -> Any:
        updates, _ = new.update(no_grads(params), state, params)
        return optax.apply_updates(params, updates)["Dense_0"]["kernel"] / params["Dense_0"]["kernel"]

    np.testing.assert_allclose(decayed(new.init(params)), 1 - 0.1 * 0.5, rtol=1e-6)
    np.testing.assert_allclose(decayed(state), 1 - 0.1 * 0.2, rtol=1e-6)
    hyperparams = {**state.hyperparams, "weight_decay": jnp.asarray(0.5)}
    np.testing.assert_allclose(decayed(state._replace(hyperparams=hyperparams)), 1 - 0.1 * 0.5, rtol=1e-6)


@pytest.mark.peers
@pytest.mark.parametrize("store", BY_ORBAX)
def test_orbax_restores_into_more_that_is_frozen_and_leaves_holes_for_what_is_not(store: Any, tmp_path: Path) -> None:
    params = make_params()
    loose = wdjax.adamw(0.1, RATES, toward="init")
    fixed = wdjax.freeze(loose, only("Dense_0"))
    _, saved = loose.update(params, loose.init(params), params)
    restored = store(saved, fixed.init(params), tmp_path / "more")
    updates, _ = fixed.update(params, restored, params)
    assert bits(updates["Dense_1"]) == bits(loose.update(params, saved, params)[0]["Dense_1"])

    restored = store(fixed.init(params), loose.init(params), tmp_path / "less")
    assert restored[0].mu["Dense_0"] == {"kernel": None, "bias": None}
    with pytest.raises(TypeError, match="NoneType"):
        loose.update(params, restored, params)
    adam, decay, _ = thawed = wdjax.thaw(restored, loose, params)
    assert bits(decay.anchor) == bits(params)
    assert not np.any(adam.mu["Dense_0"]["kernel"])
    loose.update(params, thawed, params)


@pytest.mark.peers
def test_weights_alone_are_undone_by_a_copy_of_the_old_ones() -> None:
    optimizer = optax.chain(wdjax.in_float32(wdjax.sgdw(0.1, 0.1)), wdjax.master_weights())
    old, restored = jnp.full(4, 2.0, jnp.bfloat16), jnp.full(4, 3.0, jnp.bfloat16)  # The weights of two runs.
    for state, start in ((optimizer.init(old), 2.0), (optimizer.init(restored), 3.0)):
        updates, _ = optimizer.update(jnp.zeros_like(restored), state, restored)
        np.testing.assert_allclose(np.float32(optax.apply_updates(restored, updates)), start, atol=0.05)


def test_a_state_that_was_restored_in_a_context_of_float64_is_float32(tmp_path: Path) -> None:
    with jax.enable_x64(True):
        params = {"w": jnp.asarray(np.pi)}
        optimizer = wdjax.decoupled_decay(0.1, toward="init")
        state = optimizer.init(params)
        assert by_flax_bytes(state, state, tmp_path / "flax").anchor["w"].dtype == jnp.float64
        assert by_orbax(state, state, tmp_path / "orbax").anchor["w"].dtype == jnp.float32


# A process that is killed while it saves.

UNFINISHED = ".orbax-checkpoint-tmp"


def finished(directory: Path) -> set[int]:
    return {int(path.name) for path in directory.iterdir() if path.name.isdigit()}


def is_saving(directory: Path) -> bool:
    return any(UNFINISHED in path.name for path in directory.iterdir())


def wait_for(what: Callable[[], bool], child: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while not what():
        assert child.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.001)  # A save takes longer; without a rest here, longer still.


# When it is killed: in the first save of all; in a save after some; and so many seconds after one, wherever that is.
MOMENTS = ["first save", "save", *np.random.default_rng(0).uniform(0, 0.1, 2), "save"]


@pytest.mark.slow
@pytest.mark.peers
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no such signal")
def test_a_process_that_is_killed_loses_nothing_that_was_saved_before(tmp_path: Path) -> None:
    directory, log = tmp_path / "run", tmp_path / "log"
    directory.mkdir()
    script = [sys.executable, saves_until_killed.__file__, str(directory)]
    trajectory = [saves_until_killed.start()]
    killed_while_saving = 0
    for moment in MOMENTS:
        before = finished(directory)
        with log.open("wb") as output:
            child = subprocess.Popen(script, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=output, stderr=output)
        try:
            if moment != "first save":
                wait_for(lambda: len(finished(directory) - before) >= 2, child, log)  # noqa: B023
            if isinstance(moment, str):
                wait_for(lambda: is_saving(directory), child, log)
            else:
                time.sleep(moment)
            before |= finished(directory)
        finally:
            child.kill()
            child.wait()
        assert child.returncode == -signal.SIGKILL, log.read_text()
        killed_while_saving += is_saving(directory)  # What was left by an earlier kill, this process had replaced.

        with saves_until_killed.checkpointer(str(directory)) as saved:
            steps = [checkpoint.step for checkpoint in saved.checkpoints]
            assert set(steps) == finished(directory) >= before
            while len(trajectory) <= max(steps, default=0) + 3:
                trajectory.append(saves_until_killed.train(trajectory[-1]))
            for step in steps:
                assert_same_bits(saved.load(step, saves_until_killed.start()), trajectory[step])
            if steps:
                assert saved.latest is not None
                assert saved.latest.step == max(steps)
                state = saved.load(None, saves_until_killed.start())
                for _ in range(3):
                    state = saves_until_killed.train(state)
                assert_same_bits(state, trajectory[max(steps) + 3])
    assert killed_while_saving
    assert len(finished(directory)) >= 8
