"""What a new method needs from the engine. Each need is shown by a rule of about ten lines."""

import dataclasses
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from registry import Row, core_anchored, every_row

import wdjax
import wdjax.testing
from wdjax._engine import trees
from wdjax._engine.arithmetic import LeafRule, jitted_act, plus, stateless
from wdjax._engine.loop import Action, transformation

RATE = 0.1


def make(seed: int = 0, **shapes: tuple[int, ...]) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


# A rule with a state for each parameter: the decay grows with a running mean of the size of its updates.


def with_a_coefficient(rate: Any, mask: Any = None, **options: Any) -> optax.GradientTransformation:
    def apply(update: Any, p: Any, anchor: Any, strength: Any, mean: Any, totals: Any) -> Any:
        mean = 0.5 * mean + 0.5 * jnp.mean(jnp.abs(update)).astype(mean.dtype)
        return plus(update, strength, mean * p), mean

    rule = LeafRule(apply, init=lambda p: jnp.zeros([], jnp.float32))
    return transformation(Action("with_a_coefficient", {"rate": rate}, mask, **options), rule)


def coefficient_oracle(updates: list[np.ndarray], w: np.ndarray) -> list[np.ndarray]:
    mean, found = 0.0, []
    for u in updates:
        mean = 0.5 * mean + 0.5 * np.abs(u).mean()
        found.append(u + RATE * mean * w)
    return found


def test_a_state_for_each_parameter() -> None:
    params, steps = make(a=(4, 3), b=(5,)), [make(seed, a=(4, 3), b=(5,)) for seed in (1, 2, 3)]
    optimizer = with_a_coefficient(RATE)
    state = optimizer.init(params)
    for name in params:
        wanted = coefficient_oracle([np.float64(step[name]) for step in steps], np.float64(params[name]))
        now = state
        for step, want in zip(steps, wanted, strict=True):
            new, now = jax.jit(optimizer.update)(step, now, params)
            np.testing.assert_allclose(new[name], want, rtol=1e-5)
            chex.assert_trees_all_equal_shapes_and_dtypes(now, state)


def test_the_state_is_the_same_for_every_mask_and_rate() -> None:
    params = make(a=(4, 3), b=(5,))
    states = [
        with_a_coefficient(*arguments).init(params)
        for arguments in ((RATE,), (0.0,), (lambda count: RATE, wdjax.only("a")), (RATE, {"a": False, "b": True}))
    ]
    chex.assert_trees_all_equal_shapes_and_dtypes(*states)


def test_a_state_for_other_parameters_is_refused() -> None:
    optimizer = with_a_coefficient(RATE)
    params = make(a=(4, 3))
    state = optimizer.init({"a": jnp.ones((4, 3), jnp.int32)})
    with pytest.raises(ValueError, match=r"with_a_coefficient: the state has nothing for 'a', which is float32"):
        optimizer.update(params, state, params)


# A rule with a norm over a parameter, and over each layer of a stack.


def norm_pull(u: Any, p: Any, a: Any, strength: Any) -> Any:
    return plus(u, strength, p / jnp.linalg.norm(p))


def with_a_norm(rate: Any, stacked_axes: Any = 0) -> optax.GradientTransformation:
    action = Action("with_a_norm", {"rate": rate}, stacked_axes=wdjax.paths.stacks("with_a_norm", stacked_axes))
    return transformation(action, stateless(norm_pull, is_elementwise=False))


def test_a_norm_over_a_parameter_and_over_each_layer_of_a_stack() -> None:
    params, updates = (
        make(layers=(3, 4, 2), twice=(2, 3, 4), head=(4, 2)),
        make(1, layers=(3, 4, 2), twice=(2, 3, 4), head=(4, 2)),
    )
    optimizer = with_a_norm(RATE, {"layers": 1, "twice": 2})
    new, _ = jax.jit(optimizer.update)(updates, optimizer.init(params), params)
    for name, axes in (("layers", (1, 2)), ("twice", (2,)), ("head", (0, 1))):
        u, w = np.float64(updates[name]), np.float64(params[name])
        want = u + RATE * w / np.sqrt((w**2).sum(axes, keepdims=True))
        np.testing.assert_allclose(new[name], want, rtol=1e-5)


def test_a_rate_for_each_layer_means_a_norm_for_each_layer() -> None:
    params, updates = make(layers=(3, 4, 2)), make(1, layers=(3, 4, 2))
    optimizer = with_a_norm(RATE * wdjax.by_depth("layers", 0.5, last="**", axis=0))
    new, _ = optimizer.update(updates, optimizer.init(params), params)
    u, w = np.float64(updates["layers"]), np.float64(params["layers"])
    rates = RATE * 0.5 ** np.array([3, 2, 1]).reshape(3, 1, 1)
    np.testing.assert_allclose(new["layers"], u + rates * w / np.sqrt((w**2).sum((1, 2), keepdims=True)), rtol=1e-5)


def test_each_layer_of_a_stack_has_its_own_state() -> None:
    params, updates = make(layers=(3, 4)), make(1, layers=(3, 4))
    stacked = with_a_coefficient(RATE, stacked_axes=1)
    state = stacked.init(params)
    assert state.leaf["layers"].shape == (3,)
    new, state = stacked.update(updates, state, params)
    alone = with_a_coefficient(RATE)
    for i in range(3):
        layer, update = params["layers"][i], updates["layers"][i]
        want, own = alone.update(update, alone.init(layer), layer)
        np.testing.assert_allclose(new["layers"][i], want, rtol=1e-6)
        np.testing.assert_allclose(state.leaf["layers"][i], own.leaf, rtol=1e-6)


@pytest.mark.parametrize("place", [with_a_norm, with_a_coefficient])
@pytest.mark.parametrize("count", [2, np.int64(2), 10**30])  # A tuple of so many axes can't be built.
def test_too_many_stacked_axes(place: Any, count: int) -> None:
    with pytest.raises(ValueError, match=rf"stacked_axes={count} for 'bias', whose shape is \(3,\)\. Write"):
        place(RATE, stacked_axes=count).init(make(bias=(3,)))


def test_stacked_axes_that_count_nothing() -> None:
    with pytest.raises(ValueError, match="'layer' matches no parameter"):
        with_a_norm(RATE, {"layer": 1}).init(make(layers=(3, 2)))
    with pytest.raises(TypeError, match=r"stacked_axes counts leading axes, got \{'layers': True\}"):
        with_a_norm(RATE, {"layers": True})


# A rule with a norm over all parameters: one reduction and one sum over the devices.


def with_a_global_norm(rate: Any, mask: Any = None, axis_name: Any = ()) -> optax.GradientTransformation:
    rule = LeafRule(
        lambda u, p, a, strength, state, total: (plus(u, strength, p / jnp.sqrt(total)), None),
        reduce=lambda u, p, a, strength: jnp.sum(p * p),
        is_elementwise=True,
    )
    return transformation(Action("with_a_global_norm", {"rate": rate}, mask), rule, axis_name)


def test_a_norm_over_all_parameters_that_it_acts_on() -> None:
    params, updates = make(a=(4, 3), b=(5,), c=(2,)), make(1, a=(4, 3), b=(5,), c=(2,))
    optimizer = with_a_global_norm(RATE, wdjax.all_but("c"))
    new, _ = jax.jit(optimizer.update)(updates, optimizer.init(params), params)
    norm = np.sqrt(sum((np.float64(params[name]) ** 2).sum() for name in "ab"))
    for name in "ab":
        want = np.float64(updates[name]) + RATE * np.float64(params[name]) / norm
        np.testing.assert_allclose(new[name], want, rtol=1e-5)
    np.testing.assert_array_equal(new["c"], updates["c"])


def test_within_shard_map_one_sum_over_the_devices() -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    params, updates = make(a=(16, 3), b=(8,), whole=(4,)), make(1, a=(16, 3), b=(8,), whole=(4,))
    specs = {"a": PartitionSpec("data"), "b": PartitionSpec("data"), "whole": PartitionSpec()}
    optimizer = with_a_global_norm(RATE, axis_name=("data",))
    state = optimizer.init(params)
    step = jax.jit(
        jax.shard_map(
            lambda u, p: optimizer.update(u, state, p)[0], mesh=mesh, in_specs=(specs, specs), out_specs=specs
        )
    )
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    arguments = jax.device_put(updates, shardings), jax.device_put(params, shardings)
    plain = with_a_global_norm(RATE)
    want, _ = plain.update(updates, state, params)
    chex.assert_trees_all_close(step(*arguments), want, rtol=1e-5)
    assert step.lower(*arguments).as_text().count("stablehlo.all_reduce") == 1


# A rule with a radius instead of a rate, where 0 is a valid value.


def within(radius: Any, mask: Any = None) -> optax.GradientTransformation:
    def project(u: Any, p: Any, a: Any, strength: Any) -> Any:
        new = p + u
        norm = jnp.linalg.norm(new)
        return new * jnp.minimum(1, strength.value / jnp.where(norm == 0, 1, norm)) - p

    action = Action("within", {"radius": radius}, mask, off_at=None)
    return transformation(action, stateless(project, is_elementwise=False))


@pytest.mark.parametrize(
    "as_number", [float, jnp.asarray, lambda x: lambda count: x], ids=["number", "array", "schedule"]
)
@pytest.mark.parametrize("radius", [0.0, 0.5, 100.0])
def test_a_radius_of_zero_is_a_value(radius: float, as_number: Any) -> None:
    params, updates = make(a=(4, 3), b=(5,)), make(1, a=(4, 3), b=(5,))
    optimizer = within(as_number(radius), wdjax.only("a"))
    new, _ = optimizer.update(updates, optimizer.init(params), params)
    landed = np.float64(params["a"]) + np.float64(new["a"])
    norm = np.linalg.norm(np.float64(params["a"]) + np.float64(updates["a"]))
    np.testing.assert_allclose(np.linalg.norm(landed), min(radius, norm), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(new["b"], updates["b"])


def test_without_a_rate_it_acts_on_all_parameters_of_the_mask() -> None:
    rule = stateless(lambda u, p, a, strength: -p)
    params = make(a=(4, 3), b=(5,))
    optimizer = transformation(Action("to_zero", mask=wdjax.only("a")), rule)
    new, _ = optimizer.update(params, optimizer.init(params), params)
    np.testing.assert_array_equal(new["a"], -params["a"])
    np.testing.assert_array_equal(new["b"], params["b"])


# What is compiled.


@every_row
def test_an_optimizer_that_is_built_anew_is_not_compiled_anew(row: Row) -> None:
    # optax.inject_hyperparams builds its optimizer in each step.
    params, updates = make(a=(7, 3), b=(5,)), make(1, a=(7, 3), b=(5,))
    sizes = []
    for _ in range(2):
        optimizer = row.build(jnp.asarray(RATE))
        optimizer.update(updates, optimizer.init(params), params)
        sizes.append(jitted_act._cache_size())
    assert sizes[0] == sizes[1]


def test_a_penalty_that_cannot_be_hashed() -> None:
    @dataclasses.dataclass
    class Mine:
        power: float

        def value(self, w: Any) -> Any:
            return jnp.sum(w**self.power)

    params = make(a=(4,))
    place = wdjax.add_penalty_to_grads(Mine(2.0), 0.5)
    new, _ = place.update({"a": jnp.zeros(4)}, place.init(params), params)
    np.testing.assert_allclose(new["a"], params["a"], rtol=1e-6)


# An anchor of zero for a part of the parameters.


NETWORK = {
    "encoder": {"layers": [np.full(2, 1.0), np.full(2, 2.0)]},
    "head": {"kernel": np.full(3, 4.0), "bias": np.ones(1)},
}
ANCHORED = {"encoder": jax.tree.map(lambda p: p + 8.0, NETWORK["encoder"])}
ZEROS = jax.tree.map(np.zeros_like, NETWORK)
PARTLY = {
    "a subtree": ({**ANCHORED, "head": 0.0}, {**ANCHORED, "head": ZEROS["head"]}),
    "an integer and a leaf": (
        {**ANCHORED, "head": {"kernel": 0, "bias": np.full(1, 3.0)}},
        {**ANCHORED, "head": {"kernel": ZEROS["head"]["kernel"], "bias": np.full(1, 3.0)}},
    ),
    "a part of a list": (
        {"encoder": {"layers": [0.0, np.full(2, 3.0)]}, "head": 0.0},
        {"encoder": {"layers": [np.zeros(2), np.full(2, 3.0)]}, "head": ZEROS["head"]},
    ),
    "the root": (0.0, ZEROS),
}


@core_anchored
@pytest.mark.parametrize("part", PARTLY)
def test_zero_is_the_anchor_of_all_below_it(row: Row, part: str) -> None:
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), NETWORK)
    updates = jax.tree.map(lambda p: 0.5 * p + 0.1, params)
    short, long = ({"toward": toward} for toward in PARTLY[part])
    got, want = (
        row.build(0.1, **each).update(updates, row.build(0.1, **each).init(params), params) for each in (short, long)
    )
    chex.assert_trees_all_close(got, want, rtol=1e-6, atol=1e-7)
    if part == "the root":
        chex.assert_trees_all_equal(got, row.build(0.1).update(updates, row.build(0.1).init(params), params))


def test_a_zero_anchor_is_no_array() -> None:
    action = Action("decay", {"rate": 0.1}, toward={**ANCHORED, "head": 0.0})
    leaves = trees.flatten_with_paths(NETWORK)
    anchors = {
        path: term and term.anchor for (path, _), term in zip(leaves, action.terms(NETWORK, leaves, None), strict=True)
    }
    assert [path for path, anchor in anchors.items() if anchor is None] == ["head/bias", "head/kernel"]


def test_a_zero_anchor_in_the_loss_the_monitor_and_assertions() -> None:
    params, toward = jax.tree.map(jnp.asarray, NETWORK), {**ANCHORED, "head": 0.0}
    # Half the squares of 8 (four times), of 4 (three times) and of 1.
    assert float(wdjax.l2_penalty(params, 1.0, toward=toward)) == 0.5 * (4 * 64 + 3 * 16 + 1)
    assert float(wdjax.penalty(params, wdjax.L1(), 1.0, toward=toward)) == 4 * 8 + 3 * 4 + 1
    optimizer = wdjax.monitor(wdjax.sgdw(0.5, 0.1, toward=toward), 0.1, learning_rate=0.5, toward=toward)
    _, state = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    measured = wdjax.scalars(state)
    np.testing.assert_allclose(measured["all/decay_norm"], 0.05 * np.sqrt(4 * 64 + 3 * 16 + 1), rtol=1e-6)
    np.testing.assert_allclose(measured["all/decay_landed"], 1.0, rtol=1e-5)
    wdjax.testing.assert_only_decays(wdjax.sgdw(0.5, 0.1, toward=toward), params, 0.05, toward=toward)
    with pytest.raises(AssertionError, match="'head/bias'"):
        wdjax.testing.assert_only_decays(
            wdjax.sgdw(0.5, 0.1, wdjax.only("encoder"), toward=toward), params, 0.05, toward=toward
        )


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_one_decay_at_two_places_has_two_counts(compiled: bool) -> None:
    decay = wdjax.decoupled_decay(lambda count: jnp.where(count < 2, 0.01, 0.1))
    seldom = optax.conditionally_transform(decay, lambda step: step % 2 == 0, forward_extra_args=False)
    optimizer = optax.chain(decay, seldom)
    params = {"w": jnp.ones((1, 1))}
    update = jax.jit(optimizer.update) if compiled else optimizer.update
    state, rates = optimizer.init(params), []
    for _ in range(5):
        updates, state = update({"w": jnp.zeros((1, 1))}, state, params)
        rates.append(updates["w"].item())
    always, every_other = np.array([0.01, 0.01, 0.1, 0.1, 0.1]), np.array([0.01, 0.0, 0.01, 0.0, 0.1])
    np.testing.assert_allclose(rates, always + every_other, rtol=1e-6)


def test_gradients_of_which_only_some_are_traced() -> None:
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    for recipe in (wdjax.decoupled_decay, partial(wdjax.sgdw, 1.0), partial(wdjax.sgd_l2, 1.0)):
        optimizer = recipe(wdjax.by_path({"a": 0.1, "b": 0.2}, default=0.0))
        state = optimizer.init(params)

        @jax.jit
        def update(grad: Any, optimizer: Any = optimizer, state: Any = state) -> Any:
            return optimizer.update({"a": jnp.zeros(2), "b": grad}, state, params)[0]

        want, _ = optimizer.update({"a": jnp.zeros(2), "b": jnp.ones(2)}, state, params)
        chex.assert_trees_all_close(update(jnp.ones(2)), want, rtol=1e-6)


@jax.tree_util.register_pytree_with_keys_class
class Described:
    """A node whose static data cannot be compared as a whole."""

    def __init__(self, w: Any, about: Any) -> None:
        self.w, self.about = w, about

    def tree_flatten_with_keys(self) -> Any:
        return [(jax.tree_util.GetAttrKey("w"), self.w)], self.about

    @classmethod
    def tree_unflatten(cls, about: Any, children: Any) -> Any:
        return cls(*children, about)


def test_a_mask_in_a_node_with_other_static_data() -> None:
    params = Described(jnp.ones(2), np.ones(3))
    decay = wdjax.decoupled_decay(0.5, Described(True, np.zeros(3)))
    updates, _ = decay.update(jax.tree.map(jnp.zeros_like, params), decay.init(params), params)
    np.testing.assert_array_equal(updates.w, 0.5)
