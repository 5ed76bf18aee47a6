"""The update of a model of 70 billion parameters on 256 devices, compiled and inspected without allocating it.

    python -m benchmarks.run --only at_scale
    python -m benchmarks.at_scale --topology v5p:4x8x8  # with the compiler for TPUs; needs libtpu, but no TPU

The parameters of Llama 3 70B are shapes, sharded over a mesh by FSDP x tensor parallelism. For each optimizer the step
(gradients, state and parameters in, state and parameters out, both donated) is traced, lowered and compiled for the
whole mesh. Then the program for one device shows what it communicates and how much memory it takes. The table compares
this with the expected values, which are computed by hand from shapes and the mesh alone.

The devices are emulated CPU devices or those of a TPU topology, which `jax.experimental.topologies` describes to the
compiler. Neither needs the real devices.
"""

import argparse
import functools
import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import wdjax

from ._tables import Row, Table
from ._timing import timed

PyTree = Any

# Llama 3 70B: https://huggingface.co/meta-llama/Meta-Llama-3-70B/blob/main/config.json
VOCABULARY, WIDTH, HIDDEN, LAYERS = 128_256, 8_192, 28_672, 80
KEYS = 8 * 128  # 8 heads of 128 for keys and values; 64 for queries

# How each array is sharded: matrices along both axes of the mesh, as for Megatron's pairs of layers; vectors over both.
LAYOUT = wdjax.by_path({"scale": "vector", "embedding": "out", "o": "out", "down": "out", "kernel": "in"})
SPECS = {"in": P("fsdp", "tensor"), "out": P("tensor", "fsdp"), "vector": P(("fsdp", "tensor"))}
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "collective-broadcast", "reduce-scatter")


def llama(layers: int = LAYERS, *, stacked: bool, dtype: Any = jnp.float32) -> PyTree:
    """The shapes of the 70.55 billion parameters, with the layers one by one or stacked, as for `scan`."""

    def kernel(*shape: int) -> dict[str, Any]:
        return {"kernel": jax.ShapeDtypeStruct(shape, dtype)}

    def norm() -> dict[str, Any]:
        return {"scale": jax.ShapeDtypeStruct((WIDTH,), dtype)}

    def layer() -> dict[str, Any]:
        q, k, v, o = kernel(WIDTH, WIDTH), kernel(WIDTH, KEYS), kernel(WIDTH, KEYS), kernel(WIDTH, WIDTH)
        gate, up, down = kernel(WIDTH, HIDDEN), kernel(WIDTH, HIDDEN), kernel(HIDDEN, WIDTH)
        return {
            "attention_norm": norm(),
            "attention": {"q": q, "k": k, "v": v, "o": o},
            "mlp_norm": norm(),
            "mlp": {"gate": gate, "up": up, "down": down},
        }

    if stacked:
        stack = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((layers, *leaf.shape), leaf.dtype), layer())
        blocks = {"layers": stack}
    else:
        blocks = {f"layer_{i}": layer() for i in range(layers)}
    embed = {"embedding": jax.ShapeDtypeStruct((VOCABULARY, WIDTH), dtype)}
    return {"embed": embed, **blocks, "final_norm": norm(), "head": kernel(WIDTH, VOCABULARY)}


def mesh_of(devices: Sequence[Any]) -> Mesh:
    """A mesh for FSDP and tensor parallelism, with 8 devices along the tensor axis."""
    return Mesh(np.array(devices).reshape(-1, 8), ("fsdp", "tensor"))


def cut(params: PyTree, mesh: Mesh) -> PyTree:
    """The shapes with their shardings. The axis of stacked layers is not sharded."""

    def place(leaf: jax.ShapeDtypeStruct, way: str) -> jax.ShapeDtypeStruct:
        spec = SPECS[way]
        spec = P(*[None] * (leaf.ndim - len(spec)), *spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, params, LAYOUT.values(params))


def state_of(optimizer: optax.GradientTransformation, params: PyTree) -> PyTree:
    """The shapes of the optimizer's state. Arrays like a parameter have its sharding, and the rest is replicated."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(optimizer.init, params),
        wdjax.state_shardings(optimizer, params),
    )


def step_of(optimizer: optax.GradientTransformation) -> Any:
    """The compiled step without the model. The gradients come last, so each result gets its own old buffer."""

    def step(params: PyTree, state: PyTree, grads: PyTree) -> tuple[PyTree, PyTree]:
        updates, state = optimizer.update(grads, state, params)
        return wdjax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


def on_a_device(params: PyTree, mesh: Mesh) -> list[tuple[int, ...]]:
    """The shape of each array's part on one device, by hand from LAYOUT and the shape of the mesh."""
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    divisors = {"in": (fsdp, tensor), "out": (tensor, fsdp), "vector": (fsdp * tensor,)}
    parts = []
    for leaf, way in zip(jax.tree.leaves(params), jax.tree.leaves(LAYOUT.values(params)), strict=True):
        last = len(divisors[way])
        pairs = list(zip(leaf.shape[-last:], divisors[way], strict=True))
        assert all(size % divisor == 0 for size, divisor in pairs)
        parts.append((*leaf.shape[:-last], *(size // divisor for size, divisor in pairs)))
    return parts


class Case(NamedTuple):
    """An optimizer for the model.

    Attributes:
        optimizer: the optimizer to compile.
        params: shapes without shardings.
        bytes_each: bytes for every parameter, by hand: for the parameter, its gradient and the state.
        counters: how many 32-bit counters the state holds.
        spread: how many times larger than the largest part of a parameter an array may be.
    """

    optimizer: optax.GradientTransformation
    params: PyTree
    bytes_each: tuple[int, int, int]
    counters: int
    spread: int = 1


def cases(layers: int = LAYERS) -> dict[str, Case]:
    """The optimizers to compare."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-4, 2_000, 500_000)
    weights = wdjax.weights_only()
    stacked, listed = (llama(layers, stacked=is_stacked) for is_stacked in (True, False))
    narrow = llama(layers, stacked=True, dtype=jnp.bfloat16)
    adamw = wdjax.adamw(schedule, 0.1, weights)
    peer = optax.adamw(schedule, weight_decay=0.1, mask=weights.mask)
    master = optax.chain(wdjax.in_float32(adamw), wdjax.master_weights())
    # The weights of an output are a group, and its norm goes over inputs on many devices. Only the compiler for CPUs
    # broadcasts the norm's three scales to an array.
    group = wdjax.proximal_step(wdjax.GroupLasso(axis=-2), 0.1, wdjax.only("kernel"), learning_rate=schedule)
    return {
        "wdjax.adamw": Case(adamw, stacked, (4, 4, 8), 3),
        "optax.adamw": Case(peer, stacked, (4, 4, 8), 2),
        'wdjax.adamw, toward="init"': Case(wdjax.adamw(schedule, 0.1, weights, toward="init"), stacked, (4, 4, 12), 3),
        "wdjax.adamw, bfloat16, master_weights": Case(master, narrow, (2, 2, 12), 3),
        "wdjax.adamw, proximal_step(GroupLasso)": Case(optax.chain(adamw, group), stacked, (4, 4, 8), 4, spread=3),
        "wdjax.adamw, layers listed": Case(adamw, listed, (4, 4, 8), 3),
        "optax.adamw, layers listed": Case(peer, listed, (4, 4, 8), 2),
    }


def collectives(program: str) -> dict[str, dict[str, int]]:
    """How often a compiled program communicates, and how many bytes per device, by operation."""
    found: dict[str, dict[str, int]] = {}
    for results, name in re.findall(rf" = (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(", program):
        entry = found.setdefault(name, {"times": 0, "bytes": 0})
        entry["times"] += 1
        entry["bytes"] += sum(size * math.prod(shape) for size, shape in arrays(results))
    return found


def arrays(program: str) -> list[tuple[int, tuple[int, ...]]]:
    """The bytes per number and the shape of every array that a program names."""
    found = re.findall(r"\b(pred|bf16|[fsu]\d+)\[([\d,]*)\]", program)
    return [
        (int(re.sub(r"\D", "", dtype) or 8) // 8, tuple(int(size) for size in sizes.split(",") if size))
        for dtype, sizes in found
    ]


def outside_of_fusions(program: str) -> str:
    """The program without the bodies of its fusions, because their arrays are never in memory."""
    return re.sub(r"^%?(?:fused|wrapped)\S* \(.*?^}$", "", program, flags=re.M | re.S)


def examine(case: Case, mesh: Mesh) -> dict[str, Any]:
    """Compiles one case. Returns the seconds it takes, figures of the program for one device, and the same by hand."""
    params = cut(case.params, mesh)
    _, eval_shape = timed(lambda: jax.eval_shape(lambda p: case.optimizer.init(p), params))
    state = state_of(case.optimizer, params)
    traced, trace = timed(lambda: step_of(case.optimizer).trace(params, state, params))
    lowered, lower = timed(traced.lower)
    compiled, compiling = timed(lowered.compile)
    memory, program = compiled.memory_analysis(), compiled.as_text()
    outputs = zip(jax.tree.leaves(compiled.output_shardings), jax.tree.leaves((params, state)), strict=True)
    parts, counters = on_a_device(params, mesh), 4 * case.counters
    numbers = sum(map(math.prod, parts))
    # On CPUs a program also returns a pointer to each array.
    pointers = 8 * len(jax.tree.leaves((params, state))) if mesh.devices.flat[0].platform == "cpu" else 0
    of_param, of_gradient, of_state = case.bytes_each
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "arrays": len(parts),
        "collectives": collectives(program),
        "layout kept": all(sharding.is_equivalent_to(leaf.sharding, leaf.ndim) for sharding, leaf in outputs),
        "largest array": max(math.prod(shape) for _, shape in arrays(outside_of_fusions(program))),
        "largest array, by hand": case.spread * max(map(math.prod, parts)),
        "arguments": memory.argument_size_in_bytes,
        "arguments, by hand": numbers * (of_param + of_gradient + of_state) + counters,
        "outputs": memory.output_size_in_bytes - pointers,
        "outputs, by hand": numbers * (of_param + of_state) + counters,
        "donated": memory.alias_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "seconds": {"eval_shape": eval_shape, "trace": trace, "lower": lower, "compile": compiling},
    }


def comparisons(quick: bool) -> list[Callable[[], Table]]:
    """For emulated CPU devices, which must be configured before anything uses a device."""
    emulate(256)
    return [functools.partial(steps, quick)]


def emulate(count: int) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)


def steps(quick: bool, devices: Sequence[Any] | None = None) -> Table:
    """All cases on the given devices, or on JAX's devices."""
    mesh = mesh_of(jax.devices() if devices is None else devices)
    is_cpu = mesh.devices.flat[0].platform == "cpu"
    rows: list[Row] = []
    for name, case in cases().items():
        if quick and name.endswith("listed"):
            continue
        found = examine(case, mesh)
        row: Row = {"optimizer": name}
        row |= {what: found[what] for what in ("arguments", "outputs", "donated", "temporary")}
        said = [f"{c['times']} {op}, {c['bytes']:,} bytes" for op, c in found["collectives"].items()]
        row["collectives"] = "; ".join(said) or "none"
        row |= {f"{stage} s": seconds for stage, seconds in found["seconds"].items()}
        met = (
            all(found[what] == found[f"{what}, by hand"] for what in ("arguments", "outputs")) and found["layout kept"]
        )
        met = met and found["largest array"] <= found["largest array, by hand"]
        rows.append(row | ({"target": "by hand", "met": "yes" if met else "no"} if is_cpu else {}))
    return Table(
        f"The step for {mesh.size} × {mesh.devices.flat[0].device_kind}, {dict(mesh.shape)}",
        "Bytes on one device. The target: arguments and outputs as computed by hand from shapes and the mesh, no array "
        "in the program larger than a part of a parameter, and every result with the sharding of the array that it "
        "replaces. On TPUs all numbers are a little larger, because arrays fill whole tiles.",
        rows,
    )


def main(argv: Sequence[str] | None = None) -> Table:
    """Compiles each case for a number of emulated devices or for a TPU topology, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=256, help="emulated CPU devices, a multiple of 8")
    parser.add_argument("--topology", help="a TPU topology instead, such as v5p:4x8x8")
    options = parser.parse_args(argv)
    devices = None
    if options.topology:
        from jax.experimental import topologies

        jax.config.update("jax_platforms", "cpu")
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # There is no TPU whose metadata could be queried.
        devices = topologies.get_topology_desc(platform="tpu", topology_name=options.topology).devices
    else:
        emulate(options.devices)
    table = steps(quick=False, devices=devices)
    print(table.markdown())
    return table


if __name__ == "__main__":
    main()
