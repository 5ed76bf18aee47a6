"""What each of several processes checks; `test_processes.py` starts them, with `--worker INDEX COUNT ADDRESS`.

No process has all of an array here, and JAX refuses to fetch one that it has not: whatever looks at values raises. The
values are compared shard by shard with what a process makes of whole arrays by itself.
"""

import faulthandler
import sys
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import wdjax
import wdjax.testing

MASK = wdjax.weights_only()
SPECS = {"embed": {"embedding": P("d")}, "Dense_0": {"kernel": P("d"), "bias": P("d")}, "norm": {"scale": P()}}


def whole(dtype: Any = np.float32) -> dict[str, Any]:
    """Parameters as NumPy arrays, the same on all processes."""
    rng = np.random.default_rng(0)
    shapes = {"embed": {"embedding": (16, 4)}, "Dense_0": {"kernel": (8, 4), "bias": (4,)}, "norm": {"scale": (4,)}}
    return jax.tree.map(
        lambda shape: rng.normal(size=shape).astype(dtype), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


def cut(tree: Any, mesh: Mesh) -> Any:
    """The same arrays, each process with its part of them only."""

    def place(x: Any, spec: P) -> jax.Array:
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: x[index])

    return jax.tree.map(place, tree, SPECS)


def assert_is_part_of(tree: Any, wholes: Any, tolerance: float = 0.0) -> None:
    """Asserts that each shard of this process is that part of the whole array; bit by bit without a tolerance."""
    for array, other in zip(jax.tree.leaves(tree), jax.tree.leaves(wholes), strict=True):
        assert array.dtype == other.dtype
        for shard in array.addressable_shards:
            got, want = np.asarray(shard.data), np.asarray(other)[shard.index]
            if tolerance:
                np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)
            else:
                assert got.tobytes() == want.tobytes()


def assert_is_cut(state: Any) -> None:
    """Asserts that what has the shape of the kernel is cut as the kernel is."""
    like_kernel = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (8, 4)]
    assert like_kernel
    assert all(leaf.sharding.spec == P("d") for leaf in like_kernel)


def stepped(optimizer: Any) -> Callable[[Any, Any], Any]:
    def step(params: Any, state: Any) -> Any:
        updates, state = optimizer.update(jax.tree.map(jnp.sin, params), state, params)
        return wdjax.apply_updates(params, updates), state

    return jax.jit(step)


def check_steps(mesh: Mesh) -> None:
    """Everything around one AdamW: the bits that a single process computes, and what is measured to rounding."""
    schedule = optax.linear_schedule(0.1, 0.0, 10)
    rates = wdjax.by_path({"embedding": 0.01}, default=0.1)
    decay = wdjax.in_float32(wdjax.adamw(schedule, rates, MASK, toward="init"))
    rounding = optax.chain(decay, wdjax.stochastic_rounding(0))
    monitored = wdjax.monitor(rounding, rates, MASK, learning_rate=schedule, toward="init")
    my_state, our_state = _compare_steps(wdjax.freeze(monitored, wdjax.only("embed")), mesh)
    assert not any(leaf.shape == (16, 4) for leaf in jax.tree.leaves(our_state))  # Of what is frozen.
    my_scalars, our_scalars = (jax.device_get(wdjax.scalars(state)) for state in (my_state, our_state))
    assert list(my_scalars) == list(our_scalars)
    for name, value in my_scalars.items():
        np.testing.assert_allclose(our_scalars[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    # XLA may contract a product and a sum in the loop over a whole array and not in that over a part. The float32 copy
    # shows that by a rounding, as it does behind Optax's own decay.
    for writer, tolerance in (wdjax.compensated(), 0.0), (wdjax.master_weights(), 2**-23):
        _compare_steps(optax.chain(wdjax.in_float32(wdjax.sgdw(schedule, 0.1, MASK)), writer), mesh, tolerance)
    _compare_steps(optax.chain(decay, wdjax.on_weights.shrink_and_perturb(0.1, 0.1, seed=0)), mesh)


def _compare_steps(optimizer: Any, mesh: Mesh, tolerance: float = 0.0) -> tuple[Any, Any]:
    """Two steps by this process alone and by all of them; the two states. The tolerance is that of the states."""
    mine = jax.tree.map(jnp.asarray, whole(jnp.bfloat16))
    ours = cut(whole(jnp.bfloat16), mesh)
    assert not ours["Dense_0"]["kernel"].is_fully_addressable
    my_state, our_state, step = optimizer.init(mine), optimizer.init(ours), stepped(optimizer)
    for _ in range(2):
        assert_is_cut(our_state)
        mine, my_state = step(mine, my_state)
        ours, our_state = step(ours, our_state)
    assert_is_cut(our_state)
    assert_is_part_of(ours, mine)
    assert np.asarray(ours["norm"]["scale"]).tobytes() != whole(jnp.bfloat16)["norm"]["scale"].tobytes()
    # What a monitor measured is sums over all processes, equal to rounding only.
    assert_is_part_of(*(getattr(state, "inner_state", state) for state in (our_state, my_state)), tolerance)
    return my_state, our_state


def check_without_jit(params: Any) -> None:
    optimizer = wdjax.decoupled_decay(0.1, MASK)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert_is_part_of(updates, optimizer.update(whole(), optimizer.init(whole()), whole())[0])


def check_norms(params: Any) -> None:
    """Rules that need a norm take it over all processes, and so does the penalty in the loss."""
    optimizer = optax.chain(optax.sgd(0.1), wdjax.proximal_step(wdjax.GroupLasso(), 0.5, MASK, learning_rate=0.1))
    got, _ = stepped(optimizer)(params, optimizer.init(params))
    alone = jax.tree.map(jnp.asarray, whole())
    assert_is_part_of(got, stepped(optimizer)(alone, optimizer.init(alone))[0], tolerance=1e-6)
    decayed = whole()["embed"]["embedding"], whole()["Dense_0"]["kernel"]
    squares = sum(np.sum(w.astype(np.float64) ** 2) for w in decayed)
    np.testing.assert_allclose(float(wdjax.l2_penalty(params, 0.1, MASK)), 0.05 * squares, rtol=1e-5)


def check_what_is_asked_once(params: Any) -> None:
    assert str(wdjax.plan(params, 0.1, MASK)) == str(wdjax.plan(whole(), 0.1, MASK))
    assert wdjax.paths.canonical_paths(params) == wdjax.paths.canonical_paths(whole())
    optimizer = wdjax.adamw(0.1, 0.1, MASK)
    report = wdjax.testing.assert_audit(optimizer, params, 0.1 * 0.1, MASK)
    assert [row.path for row in report.parameters if row.decays] == ["Dense_0/kernel", "embed/embedding"]
    wdjax.testing.assert_only_decays(optimizer, params, 0.1 * 0.1, MASK)
    for expected, words in (0.02, "'Dense_0/kernel' must lose 0.02"), (0.0, "'Dense_0/kernel' must stay bit-identical"):
        message = message_of(AssertionError, wdjax.testing.assert_only_decays, optimizer, params, expected, MASK)
        assert words in message


def check_warnings(params: Any) -> None:
    kernel = params["Dense_0"]["kernel"]
    for optimizer, tree, words in (
        (wdjax.adamw(1e-6, 1e-6, MASK), params, "rounds to nothing"),
        (wdjax.adamw(1.0, 1.5, MASK), params, "past zero"),
        (wdjax.adamw(0.1, 0.1), {"a": kernel, "b": kernel}, "'a' and 'b' are one array"),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.init(tree)
        assert [str(each.message) for each in caught if words in str(each.message)]


def check_arguments(params: Any, mesh: Mesh) -> None:
    """Arrays of all processes as rates and anchors."""
    rate = jax.make_array_from_callback((), NamedSharding(mesh, P()), lambda _: np.float32(0.1))
    wdjax.decoupled_decay(rate, MASK).init(params)
    kernel = params["Dense_0"]["kernel"]
    assert "must be a scalar, got an array of shape (8, 4)" in message_of(ValueError, wdjax.decoupled_decay, kernel)

    def pulled(params: Any, toward: Any) -> Any:
        optimizer = wdjax.decoupled_decay(0.1, MASK, toward=toward)
        return optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)[0]

    # JAX compiles no program around an array that is not all here: the anchor is an argument, or toward="init".
    assert "Closing over" in message_of(RuntimeError, jax.jit(lambda p: pulled(p, params)), params)
    assert_is_part_of(jax.jit(pulled)(params, params), jax.tree.map(np.zeros_like, whole()))


def message_of(kind: type[Exception], function: Callable[..., Any], *args: Any) -> str:
    try:
        function(*args)
    except kind as error:
        return str(error)
    raise AssertionError(f"{function} raised no {kind.__name__}")


def main(index: str, count: str, address: str) -> None:
    faulthandler.dump_traceback_later(240, exit=True)
    jax.distributed.initialize(address, int(count), int(index))
    mesh = Mesh(jax.devices(), ("d",))
    assert (jax.process_count(), jax.local_device_count(), mesh.size) == (2, 2, 4)
    params = cut(whole(), mesh)
    check_steps(mesh)
    check_without_jit(params)
    check_norms(params)
    check_what_is_asked_once(params)
    check_warnings(params)
    check_arguments(params, mesh)


if __name__ == "__main__":
    main(*sys.argv[2:])
