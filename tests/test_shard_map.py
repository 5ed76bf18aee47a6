"""Within `shard_map` and `pmap`: a penalty acts once, however many devices there are, and norms are of whole arrays."""

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
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from slow import slow, slow_but

import wdjax
from wdjax.penalties import SparseGroupLasso

pytestmark = pytest.mark.usefixtures("x64")

RATE, BATCH = 0.3, 16
every_check = pytest.mark.parametrize("check_vma", [True, False], ids=["checked", "unchecked"])
every_count = pytest.mark.parametrize("count", [1, slow(2), slow(4), 8])


def mesh_of(*shape: int) -> jax.sharding.Mesh:
    devices = jax.devices()[: int(np.prod(shape))]
    axes = ("data", "model")[: len(shape)]
    return jax.make_mesh(shape, axes, devices=devices, axis_types=(AxisType.Auto,) * len(shape))


def sharded(function: Any, mesh: Any, in_specs: Any, out_specs: Any, check_vma: bool = True) -> Any:
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma))


def all_reduces(function: Any, *args: Any) -> list[list[str]]:
    """For each all-reduce in the compiled program the shapes of what it reduces; there is no other collective."""
    text = function.lower(*args).compile().as_text()
    assert not re.search(r" (all-gather|all-to-all|collective-\w+|reduce-scatter)(-start)?\(", text)
    return [re.findall(r"f64\[([\d,]*)\]", row) for row in re.findall(r"= (.*) all-reduce(?:-start)?\(", text)]


# A penalty is neither multiplied nor divided by the number of devices. The table is in docs/how_to/many_devices.md.


def make_problem() -> tuple[Any, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(8, 4)), "b": rng.normal(size=(4,))}
    return params, rng.normal(size=(BATCH, 8)), rng.normal(size=(BATCH, 4))


def expected_gradient(is_mean: bool, is_penalized: bool = True) -> Any:
    """Of half the squared error of a linear model with L2, L1 and a norm of each array, in NumPy."""
    params, x, y = make_problem()
    error = (x @ params["w"] + params["b"] - y) / (BATCH if is_mean else 1)
    grads = {"w": x.T @ error, "b": error.sum(0)}
    pulls = {key: p + np.sign(p) + p / np.linalg.norm(p) for key, p in params.items()}
    return jax.tree.map(lambda g, pull: g + is_penalized * RATE * pull, grads, pulls)


def penalty(params: Any, mask: Any = None, split: str | None = None) -> Any:
    return (
        wdjax.l2_penalty(params, RATE, mask, axis_name=split)
        + wdjax.penalty(params, wdjax.L1(), RATE, mask, axis_name=split)
        + wdjax.penalty(params, wdjax.GroupLasso(axis_name=split), RATE, mask)
    )


LOSSES: dict[str, Callable[[Any, int, Any, int], Any]] = {
    "own mean": lambda error, size, penalty, count: error / size + penalty,
    "own sum": lambda error, size, penalty, count: error + penalty / count,
    "mean": lambda error, size, penalty, count: jax.lax.pmean(error / size, "data") + penalty,
    "sum": lambda error, size, penalty, count: jax.lax.psum(error, "data") + penalty,
}
SUMMED = {"own sum": lambda grads: jax.lax.psum(grads, "data")}
# How the gradients of each are made whole: of a parameter that all devices have, where nothing does it by itself ...
WHOLE: dict[str, Callable[[Any], Any]] = dict.fromkeys(LOSSES, lambda g: jax.lax.pmean(g, "data")) | SUMMED
# ... of one that is split, where they come summed ...
SPLIT: dict[str, Callable[[Any], Any]] = dict.fromkeys(LOSSES, lambda g: g / jax.lax.axis_size("data"))
SPLIT |= {"own sum": lambda g: g}
# ... and in the present shard_map, where they come summed, and right where the loss is one for all devices.
CHECKED: dict[str, Callable[[Any], Any]] = dict.fromkeys(LOSSES, lambda g: g) | {"own mean": SPLIT["own mean"]}


def gradients(
    params: Any, x: Any, y: Any, total: Callable[[Any], Any], whole: Any, split: Any, is_split: bool = False
) -> Any:
    """The gradient of each loss, made whole; with `is_split` a device has some rows of the matrix."""
    count = jax.lax.axis_size("data")

    def loss(params: Any, kind: Any) -> Any:
        w = jax.lax.all_gather(params["w"], "data", tiled=True) if is_split else params["w"]
        error = 0.5 * jnp.sum((x @ w + params["b"][None] - y) ** 2)
        return kind(error, len(x), total(params), count)

    found = {name: jax.grad(loss)(params, kind) for name, kind in LOSSES.items()}
    return {
        name: {"w": (split if is_split else whole)[name](g["w"]), "b": whole[name](g["b"])} for name, g in found.items()
    }


def assert_gradients(found: Any, is_penalized: bool = True) -> None:
    for name, grads in found.items():
        want = expected_gradient(name.endswith("mean"), is_penalized)
        chex.assert_trees_all_close(jax.device_get(grads), want, rtol=1e-12, atol=1e-13)


@every_count
def test_a_penalty_in_the_loss_acts_once_under_pmap(count: int) -> None:
    params, x, y = make_problem()
    x, y = (array.reshape(count, BATCH // count, -1) for array in (x, y))
    act = functools.partial(gradients, total=penalty, whole=WHOLE, split=SPLIT)
    found = jax.pmap(act, "data", in_axes=(None, 0, 0), devices=jax.devices()[:count])(params, x, y)
    for replica in range(count):
        assert_gradients(jax.tree.map(lambda g: g[replica], jax.device_get(found)))  # noqa: B023


@every_count
@every_check
def test_a_penalty_in_the_loss_acts_once_under_shard_map(check_vma: bool, count: int) -> None:
    whole = CHECKED if check_vma else WHOLE
    act = functools.partial(gradients, total=penalty, whole=whole, split=None)
    found = sharded(act, mesh_of(count), (P(), P("data"), P("data")), P(), check_vma)(*make_problem())
    assert_gradients(found)


@every_count
@every_check
def test_a_penalty_of_split_parameters_acts_once(check_vma: bool, count: int) -> None:
    def total(params: Any) -> Any:
        if check_vma:  # It is known that the bias is whole.
            return penalty(params, split="data")
        return penalty(params, wdjax.only("w"), split="data") + penalty(params, wdjax.only("b"))

    specs = {"w": P("data"), "b": P()}
    act = functools.partial(
        gradients,
        total=total,
        whole=CHECKED if check_vma else WHOLE,
        split=CHECKED if check_vma else SPLIT,
        is_split=True,
    )
    found = sharded(act, mesh_of(count), (specs, P("data"), P("data")), dict.fromkeys(LOSSES, specs), check_vma)
    assert_gradients(found(*make_problem()))


PLACES: dict[str, tuple[Any, Callable[[np.ndarray, np.ndarray], np.ndarray]]] = {
    "add_l2_to_grads": (wdjax.add_l2_to_grads(RATE), lambda g, p: g + RATE * p),
    "add_penalty_to_grads": (wdjax.add_penalty_to_grads(wdjax.L1(), RATE), lambda g, p: g + RATE * np.sign(p)),
    "decoupled_decay": (wdjax.decoupled_decay(RATE), lambda g, p: g + RATE * p),
    "independent_decay": (wdjax.independent_decay(RATE), lambda g, p: g - RATE * p),
    "proximal_step": (
        wdjax.proximal_step(wdjax.L2(), RATE, learning_rate=1.0),
        lambda g, p: (p + g) / (1 + RATE) - p,
    ),
    "with_decoupled_decay": (
        wdjax.with_decoupled_decay(optax.sgd(1.0), RATE, learning_rate=1.0),
        lambda g, p: -g - RATE * p,
    ),
}


@every_count
@pytest.mark.parametrize("way", ["pmap", "checked", "unchecked"])
def test_a_decay_after_the_gradients_are_reduced_acts_once(way: str, count: int) -> None:
    params, x, y = make_problem()

    def act(params: Any, x: Any, y: Any) -> Any:
        whole = CHECKED if way == "checked" else WHOLE
        grads = gradients(params, x, y, lambda params: 0.0, whole, SPLIT)
        rules = {name: rule for name, (rule, _) in PLACES.items()}
        updates = {name: rule.update(grads["mean"], rule.init(params), params)[0] for name, rule in rules.items()}
        return grads, updates

    if way == "pmap":
        x, y = (array.reshape(count, BATCH // count, -1) for array in (x, y))
        found = jax.pmap(act, "data", in_axes=(None, 0, 0), devices=jax.devices()[:count])(params, x, y)
        grads, updates = jax.tree.map(lambda leaf: leaf[-1], jax.device_get(found))
    else:
        grads, updates = sharded(act, mesh_of(count), (P(), P("data"), P("data")), P(), way == "checked")(params, x, y)
    assert_gradients(grads, is_penalized=False)
    for name, (_, oracle) in PLACES.items():
        want = jax.tree.map(oracle, expected_gradient(True, False), params)
        chex.assert_trees_all_close(jax.device_get(updates[name]), want, rtol=1e-12, atol=1e-13)


# Norms of whole arrays.


def norms(w: np.ndarray, axis: Any) -> np.ndarray:
    largest = np.max(np.abs(w)) or 1.0
    return largest * np.sqrt(np.sum((w / largest) ** 2, axis, keepdims=True))


SPLITS: dict[str, tuple[Any, P, Any]] = {
    "whole array by rows": (None, P("data"), "data"),
    "whole array by columns": (None, P(None, "data"), "data"),
    "whole array over two axes": (None, P("data", "model"), ("data", "model")),
    "whole array, one dimension over two axes": ((0, 1), P(("data", "model")), ("data", "model")),
    "columns": (0, P("data"), "data"),
    "rows": (-1, P(None, "data"), "data"),
    "columns, and they are split as well": (0, P("data", "model"), "data"),
}


@every_check
@pytest.mark.parametrize("split", slow_but(SPLITS, "whole array over two axes", "columns, and they are split as well"))
def test_group_lasso_over_the_devices_of_an_axis(split: str, check_vma: bool) -> None:
    axis, spec, axis_name = SPLITS[split]
    kind = wdjax.GroupLasso(axis, axis_name=axis_name)
    if axis == -1:  # The same groups, by the other name.
        kind = wdjax.GroupLasso(per=0, axis_name=axis_name)
    rng = np.random.default_rng(0)

    def act(w: Any) -> Any:
        # The gradient of what all devices have together, by the rules of the table.
        of_value = jax.grad(kind.value)(w)
        groups = kind.value(w)
        if "model" in jax.tree.leaves(tuple(spec)) and axis_name == "data":
            groups = jax.lax.psum(groups, "model")
        return (
            of_value if check_vma else of_value / split_by,
            kind.gradient(w),
            kind.prox(w, jnp.asarray(0.5 * size)),
            groups,
        )

    split_by = 2 if axis_name == "data" else 8
    for size in (1e-300, 1e-150, 1.0, 1e150, 1e300, 0.0):
        w = rng.normal(size=(8, 8)) * size
        norm = norms(w, axis)
        found = sharded(act, mesh_of(2, 4), spec, (spec, spec, spec, P()), check_vma)(w)
        gradient = w / np.where(norm == 0, 1, norm)
        with np.errstate(invalid="ignore"):
            prox = np.where(norm <= 0.5 * size, 0, w * (1 - 0.5 * size / norm))
        chex.assert_trees_all_close(jax.device_get(found[:2]), (gradient, gradient), rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(found[2], prox, rtol=1e-12, atol=1e-13 * size)
        np.testing.assert_allclose(found[3], norm.sum(), rtol=1e-12)


@every_check
def test_sparse_group_lasso_over_the_devices_of_an_axis(check_vma: bool) -> None:
    kind = SparseGroupLasso(axis=0, axis_name="data", l1_ratio=0.3)
    w = np.random.default_rng(0).normal(size=(8, 4))

    def act(w: Any) -> Any:
        # Without check_vma, each of the eight devices adds its own share of the sum over all of them.
        return kind.value(w), jax.grad(kind.value)(w) / (1 if check_vma else 8), kind.gradient(w), kind.prox(w, 1.0)

    spec = P("data")
    found = sharded(act, mesh_of(8), spec, (P(), spec, spec, spec), check_vma)(w)
    norm = norms(w, 0)
    thin = np.sign(w) * np.maximum(np.abs(w) - 0.3, 0)
    shrunk = thin * np.maximum(1 - 0.7 / norms(thin, 0), 0)
    gradient = 0.3 * np.sign(w) + 0.7 * w / norm
    want = (0.3 * np.sum(np.abs(w)) + 0.7 * np.sum(norm), gradient, gradient, shrunk)
    chex.assert_trees_all_close(jax.device_get(found), want, rtol=1e-13, atol=1e-15)


def test_norms_of_all_arrays_take_one_all_reduce() -> None:
    params = {f"layer_{i}": jnp.ones((8, i + 1)) for i in range(6)}
    for kind, groups in ((wdjax.GroupLasso(axis_name="data"), False), (wdjax.GroupLasso(0, axis_name="data"), True)):
        for rule in (
            wdjax.add_penalty_to_grads(kind, RATE),
            wdjax.proximal_step(kind, RATE, learning_rate=1.0),
        ):
            act = sharded(lambda p, rule=rule: rule.update(p, rule.init(p), p)[0], mesh_of(8), P("data"), P("data"))
            (row,) = all_reduces(act, params)
            # Three sums of each group.
            sizes = sorted(int(np.prod([int(n) for n in shape.split(",")])) for shape in row)
            assert sizes == [3 * (i + 1 if groups else 1) for i in range(6)]


def test_what_all_devices_have_counts_once_where_that_is_known() -> None:
    params = {"split": np.arange(1.0, 9.0), "whole": np.array([3.0, 4.0])}
    specs = {"split": P("data"), "whole": P()}
    rule = wdjax.add_penalty_to_grads(wdjax.GroupLasso(axis_name="data"), 1.0)

    def act(params: Any) -> Any:
        updates, state = rule.update(jax.tree.map(jnp.zeros_like, params), rule.init(params), params)
        return updates, state, wdjax.l2_penalty(params, 2.0, axis_name="data")

    updates, _, half = sharded(act, mesh_of(8), (specs,), (specs, P(), P()))(params)
    want = jax.tree.map(lambda p: p / np.linalg.norm(p), params)
    chex.assert_trees_all_close(jax.device_get(updates), want, rtol=1e-14)
    np.testing.assert_allclose(half, sum(np.sum(p**2) for p in params.values()), rtol=1e-14)


@pytest.mark.skipif(jax.__version_info__ < (0, 9), reason="JAX 0.8 cannot batch a psum within shard_map.")
def test_stacked_layers_each_with_its_own_rate_and_norm() -> None:
    w = np.random.default_rng(0).normal(size=(3, 8, 4))
    rates = 0.1 * wdjax.by_depth("blocks", 0.5, axis=0)
    rule = wdjax.add_penalty_to_grads(wdjax.GroupLasso(axis_name="data"), rates)

    def act(p: Any) -> Any:
        return rule.update(jax.tree.map(jnp.zeros_like, p), rule.init(p), p)[0]

    found = sharded(act, mesh_of(8), P(None, "data"), P(None, "data"))({"blocks": w})["blocks"]
    want = np.array([0.0125, 0.025, 0.05]).reshape(3, 1, 1) * w / np.sqrt(np.sum(w**2, (1, 2), keepdims=True))
    np.testing.assert_allclose(found, want, rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_norms_that_neither_overflow_nor_vanish(dtype: Any) -> None:
    with jax.enable_x64(False):
        info, kind = np.finfo(dtype), wdjax.GroupLasso()
        # At the upper end XLA divides by multiplying with a reciprocal, which must not be denormal.
        for size in (float(info.tiny) * 4, 2.0**-5, 1.0, 2.0**5, float(info.max) / 2**10):
            w = np.full(64, size, dtype)
            norm = np.linalg.norm(w.astype(np.float64))
            assert kind.value(jnp.asarray(w)).dtype == dtype
            np.testing.assert_allclose(kind.value(jnp.asarray(w)), norm, rtol=4 * info.eps)
            for gradient in (kind.gradient(jnp.asarray(w)), jax.grad(kind.value)(jnp.asarray(w))):
                np.testing.assert_allclose(gradient, w / norm, rtol=4 * info.eps)


def test_second_derivatives_of_a_norm() -> None:
    w = np.array([3.0, 4.0, 12.0])
    for hessian in (jax.hessian, lambda f: jax.jacrev(jax.jacrev(f)), lambda f: jax.jacfwd(jax.jacfwd(f))):
        want = np.eye(3) / 13 - np.outer(w, w) / 13**3
        of_norm = jax.jit(hessian(wdjax.GroupLasso().value))
        np.testing.assert_allclose(of_norm(jnp.asarray(w)), want, rtol=1e-13, atol=1e-15)
        assert np.all(of_norm(jnp.zeros(3)) == 0)


# Other rules that need what other devices have.


def lora_problem() -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(0)
    a, b, w = rng.normal(size=(16, 3)), rng.normal(size=(3, 8)), rng.normal(size=(16, 8))
    matrix = w + 2.0 * a @ b
    want = {"lora_a": RATE * 2 * matrix @ b.T, "lora_b": RATE * 2 * a.T @ matrix}
    return {"dense": {"lora_a": a, "lora_b": b}}, {"dense": {"kernel": w}}, {"dense": want}


LORA = {
    "columns of W": (P(), P(None, "model"), P(None, "model")),
    "rows of W": (P("model"), P(), P("model")),
    "both": (P("data"), P(None, "model"), P("data", "model")),
    "whole": (P(), P(), P()),
}


@pytest.mark.parametrize("specs", LORA.values(), ids=LORA)
def test_the_decay_of_a_low_rank_product_that_is_split(specs: Any) -> None:
    params, base, want = lora_problem()
    of_a, of_b, of_w = specs
    factors = {"dense": {"lora_a": of_a, "lora_b": of_b}}
    rule = wdjax.decoupled_lora_decay(RATE, scale=2.0)

    def act(params: Any, base: Any) -> Any:
        return rule.update(jax.tree.map(jnp.zeros_like, params), rule.init(params), params, base=base)[0]

    function = sharded(act, mesh_of(2, 4), (factors, {"dense": {"kernel": of_w}}), factors)
    chex.assert_trees_all_close(jax.device_get(function(params, base)), want, rtol=1e-12, atol=1e-13)
    # What is summed has the size of a factor, never that of W.
    for row in all_reduces(function, params, base):
        assert all(np.prod([int(n) for n in shape.split(",")]) <= 16 * 3 for shape in row)


@every_check
def test_the_monitor_measures_whole_arrays(check_vma: bool) -> None:
    rng = np.random.default_rng(0)
    params = {"a": {"kernel": rng.normal(size=(8, 4))}, "b": {"kernel": rng.normal(size=(4, 16))}}
    specs = {"a": {"kernel": P("data")}, "b": {"kernel": P(None, "data")}}
    if check_vma:  # It is known that this is whole.
        params["a"]["bias"], specs["a"]["bias"] = rng.normal(size=3), P()
    mask = wdjax.only("kernel")

    def build(axis_name: Any) -> Any:
        return wdjax.monitor(wdjax.adamw(0.1, RATE, mask), RATE, mask, learning_rate=0.1, axis_name=axis_name)

    def act(optimizer: Any, params: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(jax.tree.map(jnp.cos, params), optimizer.init(params), params)
        return updates, wdjax.scalars(state)

    function = sharded(functools.partial(act, build("data")), mesh_of(8), (specs,), (specs, P()), check_vma)
    found, alone = (jax.device_get(f(params)) for f in (function, functools.partial(act, build(None))))
    chex.assert_trees_all_close(found, jax.tree.map(np.asarray, alone), rtol=1e-5, atol=1e-6)
    text = function.lower(params).compile().as_text()
    assert len(re.findall(r" all-reduce(?:-start)?\(", text)) == 1


# What is refused.


def test_an_axis_that_is_not_there() -> None:
    params = {"w": jnp.ones(8)}
    kind = wdjax.GroupLasso(axis_name="data")
    rule = wdjax.add_penalty_to_grads(kind, RATE)
    with pytest.raises(
        ValueError, match=r"GroupLasso: there is no mesh axis 'data' here\..*under jit.*leave axis_name"
    ):
        jax.jit(rule.update)(params, rule.init(params), params)
    with pytest.raises(ValueError, match=r"l2_penalty: there is no mesh axis 'data' here"):
        wdjax.l2_penalty(params, RATE, axis_name="data")
    monitor = wdjax.monitor(optax.sgd(0.1), axis_name="data")
    with pytest.raises(ValueError, match=r"monitor: there is no mesh axis 'data' here"):
        monitor.update(params, monitor.init(params), params)


@pytest.mark.parametrize("name", [0, ("data", 1), ["data"], ("data", None)])
def test_an_axis_that_is_no_name(name: Any) -> None:
    for where, call in (
        ("GroupLasso", lambda: wdjax.GroupLasso(axis_name=name)),
        ("monitor", lambda: wdjax.monitor(optax.sgd(0.1), axis_name=name)),
        ("l2_penalty", lambda: wdjax.l2_penalty({"w": jnp.ones(2)}, RATE, axis_name=name)),
    ):
        with pytest.raises(
            TypeError, match=rf"{where}: axis_name must be the name of a mesh axis.*got .*axis_name='data'"
        ):
            call()


def test_an_axis_that_is_said_twice() -> None:
    with pytest.raises(ValueError, match=r"penalty: GroupLasso\(.*takes its norms.*Leave axis_name out of penalty\."):
        wdjax.penalty({"w": jnp.ones(2)}, wdjax.GroupLasso(axis_name=("data", "model")), RATE, axis_name="data")
