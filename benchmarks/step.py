"""The whole step: against Optax, against the memory's bandwidth, and against `torch.optim.AdamW`."""

import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import wdjax

from . import trees
from ._programs import Shared, compiled, facts, state_shapes, step_of
from ._tables import Row, Table, as_control, at_least, rows_for
from ._timing import Run, interleaved

# Bytes per parameter that AdamW must move: it reads the gradient, parameter and two moments, and writes the last three.
FLOOR = 28

# Options for XLA that may change the compiled step, by platform.
FLAGS = {
    "cpu": {"loops with several results": "--xla_backend_extra_options=xla_cpu_use_multi_output_fusion"},
    "gpu": {"no command buffers": "--xla_gpu_enable_command_buffer="},
}


def optimizers(tree: trees.Tree) -> dict[str, Any]:
    """AdamW by name. The others are compared with the first."""
    mask = wdjax.weights_only().mask(tree.shapes)
    return {
        "Optax": optax.adamw(1e-3, weight_decay=0.1, mask=mask),
        "control": optax.adamw(1e-3, weight_decay=0.1, mask=mask),
        "wdjax": wdjax.adamw(1e-3, 0.1, mask),
    }


def comparisons(quick: bool) -> list[Callable[[], Table]]:
    return [
        functools.partial(steps, quick),
        functools.partial(beside_torch, quick),
        functools.partial(order_of_arguments, quick),
        functools.partial(options, quick),
    ]


def chosen(quick: bool) -> list[trees.Tree]:
    if quick:
        return [trees.resnet50(), trees.small_arrays(200)]
    return [trees.resnet50(), trees.gpt2(), trees.small_arrays(1000)]


def steps(quick: bool) -> Table:
    return Table(
        "The step of AdamW with the same mask, compiled, donated",
        f"Bytes per parameter as XLA counts them. The minimum is {FLOOR}. `floor` is the time in which this machine "
        f"copies {FLOOR} bytes per parameter, divided by the time of the step. (For the copy, an array as large as the "
        "parameters is read and written in place, in the same rounds.) It means nothing for small arrays. The target "
        "is Optax's time. On a GPU, it is also a floor of 0.85 on GPT-2.",
        rows_for(chosen(quick), lambda tree: _steps_of(tree, quick)),
    )


def _steps_of(tree: trees.Tree, quick: bool) -> list[Row]:
    shared = Shared(tree)
    programs = {name: (o, compiled(o, tree)) for name, o in optimizers(tree).items()}
    runs = {name: shared.run(o, program, tree) for name, (o, program) in programs.items()}
    numbers = max(tree.parameters, 2**24)
    is_large = tree.parameters >= 2**24
    measured = interleaved(runs | {"copy": copying(numbers)}, 9 if quick else 25)
    control = measured.ratio("control", "Optax")
    rows = []
    for name, (_, program) in programs.items():
        ratio = None if name == "Optax" else measured.ratio(name, "Optax")
        # A copy reads and writes 8 bytes for each of its numbers.
        floor = measured.ratio("copy", name, factor=FLOOR * tree.parameters / (8 * numbers)) if is_large else None
        exact = facts(program)
        row: dict[str, Any] = {"tree": tree.name, "optimizer": name, "ms": 1e3 * measured.median(name), "ratio": ratio}
        row |= {"floor": floor, "bytes a parameter": exact.bytes / tree.parameters, "kernels": exact.kernels.total()}
        if name == "wdjax" and ratio:
            row |= as_control(ratio, control)
        rows.append(row)
        if name == "wdjax" and floor and jax.default_backend() == "gpu" and tree.name == "GPT-2 small":
            rows.append({"tree": tree.name, "optimizer": "wdjax, floor", "floor": floor, **at_least(floor, 0.85)})
    gigabytes = 8e-9 * numbers / measured.median("copy")
    return [*rows, {"tree": tree.name, "optimizer": f"(copies: {gigabytes:.1f} GB/s)"}] if is_large else rows


def beside_torch(quick: bool) -> Table:
    return Table(
        "The step of AdamW beside `torch.optim.AdamW`, on a CPU",
        "With as many threads as there are cores. Without PyTorch, or on a GPU, there are no rows. PyTorch's threads "
        "wait for a while before they sleep, which may slow down the next competitor. So this is a separate table.",
        [] if jax.default_backend() != "cpu" else rows_for(chosen(quick), lambda tree: _beside_torch_of(tree, quick)),
    )


def _beside_torch_of(tree: trees.Tree, quick: bool) -> list[Row]:
    of_torch = torch_runs(tree, quick)
    if not of_torch:
        return []
    shared, optimizer = Shared(tree), optimizers(tree)["wdjax"]
    ours = {name: shared.run(optimizer, compiled(optimizer, tree), tree) for name in ("wdjax", "control")}
    runs = ours | of_torch
    measured = interleaved(runs, 7 if quick else 15)
    return [
        {
            "tree": tree.name,
            "optimizer": name,
            "ms": 1e3 * measured.median(name),
            "ratio": None if name == "wdjax" else measured.ratio(name, "wdjax"),
        }
        for name in runs
    ]


def copying(numbers: int) -> Run:
    """Reads and writes this many float32 numbers in place."""
    add_one = jax.jit(lambda x: x + 1, donate_argnums=0)
    kept = [jnp.zeros(numbers, jnp.float32)]

    def run(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            kept[0] = add_one(kept[0])
        jax.block_until_ready(kept[0])
        return (time.perf_counter() - start) / calls

    return run


def torch_runs(tree: trees.Tree, quick: bool) -> dict[str, Run]:
    """PyTorch's AdamW on the same shapes. Empty without PyTorch."""
    try:
        import torch  # pyright: ignore[reportMissingImports]  # Optional.
    except ImportError:
        return {}
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    params = [torch.nn.Parameter(torch.full(leaf.shape, 0.02)) for leaf in jax.tree.leaves(tree.shapes)]
    for param in params:
        param.grad = torch.full(param.shape, 1e-3)
    flags = jax.tree.leaves(wdjax.weights_only().mask(tree.shapes))
    groups = [
        {"params": [p for p, flag in zip(params, flags, strict=True) if flag is on], "weight_decay": 0.1 * on}
        for on in (True, False)
    ]

    def run(optimizer: Any) -> Run:
        def of_calls(calls: int) -> float:
            start = time.perf_counter()
            for _ in range(calls):
                optimizer.step()
            return (time.perf_counter() - start) / calls

        return of_calls

    # Each has its own moments, so large trees get only one, to save memory.
    ways = ("fused",) if quick or tree.parameters > 10**8 else ("fused", "foreach")
    adamw: Any = torch.optim.AdamW
    return {f"torch, {way}": run(adamw([dict(g) for g in groups], lr=1e-3, **{way: True})) for way in ways}


def order_of_arguments(quick: bool) -> Table:
    """The same step with its arguments in a different order."""
    tree = trees.resnet50()
    optimizer = wdjax.adamw(1e-3, 0.1)
    state = state_shapes(optimizer, tree)
    step = step_of(optimizer)
    last = jax.jit(lambda grads, state, params: step(params, state, grads), donate_argnums=(1, 2))
    params_last = last.lower(tree.shapes, state, tree.shapes).compile()
    programs = {
        "(params, state, grads)": compiled(optimizer, tree),
        "control": compiled(optimizer, tree),
        "(grads, state, params)": lambda params, state, grads: params_last(grads, state, params),
    }
    shared = Shared(tree)
    runs = {name: shared.run(optimizer, program, tree) for name, program in programs.items()}
    measured = interleaved(runs, 7 if quick else 15)
    rows = []
    for name, program in programs.items():
        exact = facts(params_last if name.startswith("(grads") else program)
        row: Row = {"arguments": name, "ms": 1e3 * measured.median(name)}
        row |= {"ratio": None if name == "(params, state, grads)" else measured.ratio(name, "(params, state, grads)")}
        rows.append(row | {"bytes a parameter": exact.bytes / tree.parameters, "copies": exact.kernels["copy"]})
    return Table(
        "The order of a donated step's arguments, ResNet-50",
        "JAX gives the buffers of donated arguments to results of the same shape, in order. The step returns (params, "
        "state). If its arguments come in a different order, new parameters get the buffers of old moments, and XLA "
        "has to copy. All other tables use the order of the first row.",
        rows,
    )


def options(quick: bool) -> Table:
    """XLA's options in turns, each in its own processes."""
    variants = {"none": "", "control": ""} | FLAGS.get(jax.default_backend(), {})
    found: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    for _ in range(1 if quick else 3):
        for name, flag in variants.items():
            environment = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()}
            code = f"from benchmarks import step; step.print_floor({quick})"
            done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"with {flag}: {done.stderr.strip().splitlines()[-1]}")
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    rows = []
    for name, flag in variants.items():
        medians = {key: float(np.median([each[key] for each in found[name]])) for key in found[name][0]}
        rows.append({"option": name, "XLA_FLAGS": f"`{flag}`" if flag else "", **medians})
    return Table(
        "Options of XLA: AdamW of wdjax, ResNet-50",
        "Each option has its own processes, so their times compare less well than those in other tables. Go by "
        "`floor`, which compares the step with copies in the same process, and by the control.",
        rows,
    )


def print_floor(quick: bool) -> None:
    """Prints what a process with its own options measures, as a line of JSON."""
    tree = trees.resnet50()
    optimizer = wdjax.adamw(1e-3, 0.1)
    program = compiled(optimizer, tree)
    runs = {"step": Shared(tree).run(optimizer, program, tree), "copy": copying(tree.parameters)}
    measured = interleaved(runs, 5 if quick else 15)
    exact = facts(program)
    result = {
        "bytes a parameter": exact.bytes / tree.parameters,
        "kernels": exact.kernels.total(),
        "ms": 1e3 * measured.median("step"),
        "floor": measured.ratio("copy", "step", factor=FLOOR / 8).median,
    }
    print(json.dumps(result))
