"""Tracing, lowering and compiling; the un-jitted update; and what has to be compiled anew."""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

import wdjax

from . import trees
from ._programs import build_program, step_of
from ._tables import Row, Table, at_least, equal, rows_for
from ._timing import Times, interleaved, staged


def optimizers(tree: trees.Tree) -> dict[str, Callable[[], Any]]:
    """AdamW by name; the first is what the others are compared with, and the same mask means the same tree of booleans.

    By path, the mask is a rule that is asked about each parameter while tracing.
    """
    mask = wdjax.weights_only().mask(tree.shapes)
    return {
        "Optax": lambda: optax.adamw(1e-3, weight_decay=0.1, mask=mask),
        "control": lambda: optax.adamw(1e-3, weight_decay=0.1, mask=mask),
        "wdjax": lambda: wdjax.adamw(1e-3, 0.1, mask),
        "wdjax, by path": lambda: wdjax.adamw(1e-3, 0.1, wdjax.weights_only()),
    }


def comparisons(quick: bool) -> list[Callable[[], Table]]:
    return [
        functools.partial(programs, quick),
        functools.partial(again, quick),
        functools.partial(eager, quick),
        compilations,
    ]


def programs(quick: bool) -> Table:
    """Everything that happens before the first step, as in a new process."""
    chosen = [trees.small_arrays(200 if quick else 1000)] + (
        [] if quick else [trees.small_arrays(1000, (16,)), trees.resnet50(), trees.small_arrays(10_000)]
    )
    return Table(
        "Before the first step: AdamW of wdjax and of Optax, with the same mask",
        "Seconds of jit(...).trace, of trace and lower together, and of compile, and the size of the program in "
        "StableHLO; with a new optimizer each time and JAX's caches cleared before. `n × less` is Optax's number over "
        "that of the row. `update` is `optimizer.update` alone, `step` also applies the updates. 10,000 arrays are not "
        "compiled: XLA takes minutes for them.",
        rows_for(chosen, _programs_of),
    )


def _programs_of(tree: trees.Tree) -> list[Row]:
    ways = optimizers(tree)
    compiles = tree.arrays < 10_000  # XLA takes minutes for these, whoever wrote them.
    rows: list[Row] = []
    for what in ("update", "step") if tree.arrays < 1000 else ("update",):
        build = functools.partial(build_program, update_only=what == "update", compiles=compiles)
        small = trees.small_arrays(20)
        build(optimizers(small)["Optax"](), small)  # The first one of a process is slower.
        runs = {name: lambda way=way, build=build: build(way(), tree) for name, way in ways.items()}
        stages = staged(runs, rounds=3)
        for name in ways:
            row: dict[str, Any] = {"tree": tree.name, "of": what, "optimizer": name}
            for stage, unit in (("trace", "s"), ("trace + lower", "s"), ("StableHLO", "bytes"), ("compile", "s")):
                if stage in stages:
                    row[f"{stage} {unit}"] = stages[stage].median(name)
                    row[f"{stage}, n × less"] = None if name == "Optax" else stages[stage].ratio("Optax", name)
            rows.append(row | (_targets(stages, name) if what == "update" and name == "wdjax" else {}))
    return rows


def _targets(stages: Mapping[str, Times], name: str) -> Row:
    bounds = {"trace": 5.0, "trace + lower": 3.0, "StableHLO": 3.0, "compile": 1.0}
    bounds = {stage: bound for stage, bound in bounds.items() if stage in stages}
    met = [at_least(stages[stage].ratio("Optax", name), bound)["met"] for stage, bound in bounds.items()]
    return {"target": "≥ " + ", ".join(f"{bound:g}" for bound in bounds.values()), "met": ", ".join(met)}


def again(quick: bool) -> Table:
    """Another optimizer in the same process: what the caches are worth."""
    tree = trees.small_arrays(200 if quick else 1000)
    ways = optimizers(tree)

    def twice(build: Callable[[], Any]) -> Mapping[str, float]:
        first = build_program(build(), tree, update_only=True)
        second = build_program(build(), tree, update_only=True, keep_caches=True)
        return {"first": first["trace"], "second": second["trace"]}

    stages = staged({name: lambda way=way: twice(way) for name, way in ways.items()}, 3)
    rows = []
    for name in ways:
        row: Row = {"tree": tree.name, "optimizer": name}
        row |= {f"{stage} s": stages[stage].median(name) for stage in stages}
        rows.append(row | {"second, n × less": None if name == "Optax" else stages["second"].ratio("Optax", name)})
    return Table(
        "Tracing `update` once more with a new optimizer of the same arguments, JAX's caches kept",
        "`first` is traced after they were cleared.",
        rows,
    )


def eager(quick: bool) -> Table:
    """`optimizer.update` as a plain function."""
    chosen = [trees.small_arrays(200)] if quick else [trees.small_arrays(1000), trees.resnet50()]
    chosen += [] if quick else [trees.small_arrays(10_000)]
    return Table(
        "`optimizer.update` without jit: milliseconds",
        "After the first calls. `wdjax, in jit` is the whole update as one compiled program, which no other way to "
        "call it can beat: what the arrays cost by themselves.",
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
            for _ in range(calls):  # What the last one gave is thrown away, as in a loop.
                jax.block_until_ready(update(grads, state, params))
            return (time.perf_counter() - start) / calls

        return of_calls

    # Several calls in a turn, as in a loop: after a rest the first is slower, of what is quick most of all.
    runs = {name: run(name) for name in updates}
    measured = interleaved(runs, 5 if quick or tree.arrays == 10_000 else 9)
    rows = []
    for name in updates:
        ratio = None if name == "Optax" else measured.ratio("Optax", name)
        row: Row = {"tree": tree.name, "optimizer": name, "ms": 1e3 * measured.median(name), "n × less": ratio}
        rows.append(row | (at_least(ratio, 12.0) if ratio and name == "wdjax" else {}))
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

    @functools.partial(jax.jit, static_argnums=0)
    def with_static(optimizer: Any, *args: Any) -> Any:
        return step_of(optimizer)(*args)

    def static(rate: float) -> Any:
        return with_static(wdjax.adamw(1e-3, rate), tree.full(0.02), state, tree.full(1e-3))

    in_use: list[Any] = []  # JAX forgets what it compiled for a function that is gone.

    def own_jit(rate: float) -> Any:
        in_use.append(wdjax.adamw(1e-3, rate).update)
        return jax.jit(in_use[-1])(tree.full(1e-3), state, tree.full(0.02))

    cases: dict[str, tuple[Callable[..., Any], tuple[float, ...], tuple[float, ...]]] = {
        "another rate, an argument of the step": (of_arguments(adamw_of), (0.1,), (0.2,)),
        "another schedule, its ends are arguments": (of_arguments(scheduled), (0.1, 0.0), (0.2, 0.1)),
        "another mask, rates by path 0.1 or 0 are arguments": (of_arguments(masked), (0.1, 0.0), (0.0, 0.1)),
        "the same optimizer once more, a static argument of one jit": (static, (0.1,), (0.1,)),
        "the same optimizer once more, in a jit of its own": (own_jit, (0.1,), (0.1,)),
    }
    rows: list[Row] = []
    for name, (run, first, second) in cases.items():
        run(*first)
        count = compilations_of(lambda run=run, second=second: run(*second))
        # What is written into the program as a constant, in a jit of its own, is another program.
        rows.append({"between the two steps": name, "programs compiled": count, **equal(count, 0)})
    return Table("Programs that XLA compiles anew for the second step", "Exact.", rows)


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
