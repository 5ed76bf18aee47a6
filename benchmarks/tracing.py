"""The time to the first step (tracing, lowering, compiling), the un-jitted update, and recompilations."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import wdjax

from . import groups, trees
from ._programs import build_program, step_of
from ._tables import Row, Table, at_most, equal, rows_for
from ._timing import interleaved, staged


def optimizers(tree: trees.Tree) -> dict[str, Callable[[], Any]]:
    """AdamW by name. The others are compared with the first. The mask is the same tree of booleans for the first three.

    For "by path" and "ten rates", the mask is a rule set, which decides on each parameter while tracing.
    """
    mask = wdjax.weights_only().mask(tree.shapes)
    return {
        "Optax": lambda: optax.adamw(1e-3, weight_decay=0.1, mask=mask),
        "control": lambda: optax.adamw(1e-3, weight_decay=0.1, mask=mask),
        "wdjax": lambda: wdjax.adamw(1e-3, 0.1, mask),
        "wdjax, by path": lambda: wdjax.adamw(1e-3, 0.1, wdjax.weights_only()),
        "wdjax, ten rates": lambda: wdjax.adamw(1e-3, groups.by_layer(tree, groups.RATES), wdjax.weights_only()),
    }


def comparisons(quick: bool) -> list[Callable[[], Table]]:
    return [
        functools.partial(first_step, quick),
        functools.partial(eager, quick),
        compilations,
    ]


def first_step(quick: bool) -> Table:
    """Everything that happens before the first step, as in a new process."""
    chosen = [trees.small_arrays(200)] if quick else [trees.gpt2(), trees.small_arrays(1000), trees.resnet50()]
    return Table(
        "The time to the first step of AdamW: wdjax and Optax, with the same mask",
        "Seconds of jit(...).trace, of .lower and of .compile for the whole step, with a new optimizer each time and "
        "JAX's caches cleared before. `first step` is their sum, and the ratio compares the sum with Optax's. Ten "
        "rates by path are compared with Optax's one rate. StableHLO is the size of the program in bytes.",
        rows_for(chosen, lambda tree: _first_step_of(tree, rounds=3 if quick else 7)),
    )


def _first_step_of(tree: trees.Tree, rounds: int) -> list[Row]:
    ways, small = optimizers(tree), trees.small_arrays(20)
    build_program(optimizers(small)["Optax"](), small)  # The first program of a process is slower.
    stages = staged({name: lambda way=way: build_program(way(), tree) for name, way in ways.items()}, rounds)
    rows: list[Row] = []
    for name in ways:
        row: dict[str, Any] = {"tree": tree.name, "optimizer": name, "StableHLO": stages["StableHLO"].median(name)}
        row |= {f"{stage} s": stages[stage].median(name) for stage in ("trace", "lower", "compile", "first step")}
        ratio = None if name == "Optax" else stages["first step"].ratio(name, "Optax")
        rows.append(row | {"ratio": ratio} | (at_most(ratio, 1.05) if ratio and name.startswith("wdjax") else {}))
    return rows


def eager(quick: bool) -> Table:
    """`optimizer.update` as a plain function."""
    chosen = [trees.small_arrays(200)] if quick else [trees.small_arrays(1000), trees.resnet50()]
    chosen += [] if quick else [trees.small_arrays(10_000)]
    return Table(
        "`optimizer.update` without jit: milliseconds",
        "After the first calls. `wdjax, in jit` is the whole update as one compiled program. This is the lower bound: "
        "what the arrays cost by themselves.",
        rows_for(chosen, lambda tree: _eager_of(tree, quick)),
    )


def _eager_of(tree: trees.Tree, quick: bool) -> list[Row]:
    ways = optimizers(tree)
    updates = {name: build().update for name, build in ways.items()}
    if tree.arrays < 10_000:
        updates["wdjax, in jit"] = jax.jit(updates["wdjax"])
    params, grads = tree.full(0.02), tree.full(1e-3)

    def run(name: str) -> Callable[[int], float]:
        state = ways[name.removesuffix(", in jit")]().init(params)

        def of_calls(calls: int) -> float:
            update, start = updates[name], time.perf_counter()
            for _ in range(calls):  # The previous result is freed in each call, as in a training loop.
                jax.block_until_ready(update(grads, state, params))
            return (time.perf_counter() - start) / calls

        return of_calls

    # Several calls in a turn, as in a loop. The first call after a pause is slower, which affects fast ones most.
    runs = {name: run(name) for name in updates}
    measured = interleaved(runs, 5 if quick or tree.arrays == 10_000 else 9)
    rows = []
    for name in updates:
        ratio = None if name == "Optax" else measured.ratio("Optax", name)
        row: Row = {"tree": tree.name, "optimizer": name, "ms": 1e3 * measured.median(name), "n × less": ratio}
        rows.append(row)
    return rows


def compilations() -> Table:
    """How many programs XLA compiles for the second of two steps that differ in a value."""
    tree = trees.small_arrays(20)
    state = wdjax.adamw(1e-3, 0.1).init(tree.full(0.02))

    def adamw_of(*rates: Any) -> Any:
        return wdjax.adamw(1e-3, *rates)

    def scheduled(start: Any, end: Any) -> Any:
        return wdjax.adamw(1e-3, optax.linear_schedule(start, end, 100))

    def masked(on_kernels: Any, elsewhere: Any) -> Any:
        return wdjax.adamw(1e-3, wdjax.by_path({"kernel": on_kernels}, default=elsewhere))

    def of_arguments(build: Any) -> Any:
        jitted = jax.jit(lambda params, state, grads, *rates: step_of(build(*rates))(params, state, grads))
        return lambda *rates: jitted(tree.full(0.02), state, tree.full(1e-3), *map(jnp.float32, rates))

    cases: dict[str, tuple[Callable[..., Any], tuple[float, ...], tuple[float, ...]]] = {
        "another rate, an argument of the step": (of_arguments(adamw_of), (0.1,), (0.2,)),
        "another schedule, its ends are arguments": (of_arguments(scheduled), (0.1, 0.0), (0.2, 0.1)),
        "another mask, rates by path 0.1 or 0 are arguments": (of_arguments(masked), (0.1, 0.0), (0.0, 0.1)),
    }
    rows: list[Row] = []
    for name, (run, first, second) in cases.items():
        run(*first)
        count = compilations_of(lambda run=run, second=second: run(*second))
        rows.append({"between the two steps": name, "programs compiled": count, **equal(count, 0)})
    return Table("Programs that XLA compiles again for the second step", "Exact.", rows)


def compilations_of(function: Callable[[], Any]) -> int:
    """How many programs XLA compiles while a function runs."""
    count = 0

    def listen(event: str, duration_secs: float, **kwargs: Any) -> None:
        nonlocal count
        count += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.block_until_ready(function())
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return count
