"""Groups cost nothing: ten rates by path cost as much as one."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

import wdjax

from . import trees
from ._programs import Shared, build_program, compiled, facts, state_shapes, step_of
from ._tables import Row, Table, at_most, rows_for
from ._timing import interleaved, staged, timed

RATES = [0.01 * (1 + digit) for digit in range(10)]


def by_layer(tree: trees.Tree, values: list[Any]) -> wdjax.Rules:
    """Ten values, by the last digit of a layer's number. Parameters outside the layers have the value of digit 0."""
    table = {tree.layer.format(digit): value for digit, value in enumerate(values) if digit}
    return wdjax.by_path(table, default=values[0])


def partitioned(tree: trees.Tree) -> Any:
    """Optax's parameter groups: an optimizer for each rate."""
    labels = by_layer(tree, [f"rate_{digit}" for digit in range(10)]).values(tree.shapes)
    return optax.partition({f"rate_{i}": optax.adamw(1e-3, weight_decay=r) for i, r in enumerate(RATES)}, labels)


def masked_in_turn(tree: trees.Tree) -> Any:
    """The same with one Adam and a masked decay for each rate, to avoid the cost of `partition`."""
    numbers = by_layer(tree, [str(digit) for digit in range(10)]).values(tree.shapes)
    masks = [jax.tree.map(lambda number, digit=digit: number == str(digit), numbers) for digit in range(10)]
    decays = [optax.add_decayed_weights(rate, mask) for rate, mask in zip(RATES, masks, strict=True)]
    return optax.chain(optax.scale_by_adam(), *decays, optax.scale_by_learning_rate(1e-3))


# By name. The first two are the same, and the others are compared with the first.
WAYS: dict[str, Callable[[trees.Tree], Any]] = {
    "one rate": lambda tree: wdjax.adamw(1e-3, 0.1),
    "control": lambda tree: wdjax.adamw(1e-3, 0.1),
    "ten rates": lambda tree: wdjax.adamw(1e-3, by_layer(tree, RATES)),
    "Optax, one rate": lambda tree: optax.adamw(1e-3, weight_decay=0.1),
    "Optax, ten masks": masked_in_turn,
    "Optax, partition": partitioned,
}


def comparisons(quick: bool) -> list[Callable[[], Table]]:
    return [
        functools.partial(programs, quick),
        functools.partial(times, quick),
        functools.partial(tracing, quick),
        functools.partial(rate_for_each_array, quick),
    ]


def programs(quick: bool) -> Table:
    """The exact figures."""
    chosen = [trees.small_arrays(100)] + ([] if quick else [trees.resnet50()])
    return Table(
        "Ten rates by path: the compiled program and the state",
        "The target: as many arrays in the state as for one rate, and the same bytes within 3%. Several rates are "
        "data: a scalar is read for each array.",
        rows_for(chosen, _programs_of),
    )


def _programs_of(tree: trees.Tree) -> list[Row]:
    rows: list[Row] = []
    least: tuple[int, int] = (0, 0)
    for name, build in WAYS.items():
        optimizer = build(tree)
        state, program = state_shapes(optimizer, tree), facts(compiled(optimizer, tree))
        arrays = len(jax.tree.leaves(state))
        row = {
            "tree": tree.name,
            "optimizer": name,
            "state arrays": arrays,
            "state nodes": jax.tree.structure(state).num_nodes,
            "bytes": program.bytes,
            "kernels": program.kernels.total(),
        }
        if name == "one rate":
            least = (arrays, program.bytes)
        elif name == "ten rates":
            met = arrays == least[0] and program.bytes <= 1.03 * least[1]
            row |= {"target": "≤ 1.03", "met": "yes" if met else "no"}
        rows.append(row)
    return rows


def times(quick: bool) -> Table:
    chosen = [trees.resnet50(), trees.small_arrays(200 if quick else 1000)] + ([] if quick else [trees.gpt2()])
    return Table(
        "Ten rates by path: time of the compiled step, as a multiple of one rate",
        "The first row of each tree is one rate in milliseconds. The control is the same step once more. The target: "
        "at most 3% more than the control.",
        rows_for(chosen, lambda tree: _times_of(tree, quick)),
    )


def _times_of(tree: trees.Tree, quick: bool) -> list[Row]:
    names = [name for name in WAYS if not (quick and name in ("Optax, one rate", "Optax, ten masks"))]
    optimizers = {name: WAYS[name](tree) for name in names}
    measured = interleaved(Shared(tree).runs(optimizers, tree), rounds=9 if quick else 25, block=0.1)
    # Small arrays that are built first get better places in memory. The control does not have this advantage.
    bound = round(1.03 * max(1.0, measured.ratio("control", "one rate").median), 2)
    rows = []
    for name in names:
        ratio = None if name == "one rate" else measured.ratio(name, "one rate")
        row: Row = {"tree": tree.name, "optimizer": name, "ms": 1e3 * measured.median(name), "ratio": ratio}
        rows.append(row | (at_most(ratio, bound) if ratio and name == "ten rates" else {}))
    return rows


def tracing(quick: bool) -> Table:
    chosen = [trees.small_arrays(200)] if quick else [trees.resnet50(), trees.small_arrays(1000)]
    return Table(
        "Ten rates by path: seconds to trace and to compile, as a multiple of one rate",
        "For the whole step, with a new optimizer each time and JAX's caches cleared before. The target is for both.",
        rows_for(chosen, _tracing_of),
    )


def _tracing_of(tree: trees.Tree) -> list[Row]:
    build_program(WAYS["one rate"](tree), trees.small_arrays(20))  # The first program of a process is slower.
    runs = {name: lambda build=build: build_program(build(tree), tree) for name, build in WAYS.items()}
    stages = staged(runs, rounds=3)
    rows = []
    for name in WAYS:
        row: Row = {"tree": tree.name, "optimizer": name}
        row |= {f"{stage} s": stages[stage].median(name) for stage in ("trace", "compile")}
        if name != "one rate":
            ratios = {f"{stage} ratio": stages[stage].ratio(name, "one rate") for stage in ("trace", "compile")}
            row |= ratios | (at_most(max(ratios.values()), 1.03) if name == "ten rates" else {})
        rows.append(row)
    return rows


def rate_for_each_array(quick: bool) -> Table:
    """As many rates as arrays: as constants, and as arguments of the compiled step."""
    tree = trees.small_arrays(100 if quick else 1000)
    paths = wdjax.paths.canonical_paths(tree.shapes)
    values = np.linspace(0.01, 0.1, len(paths)).tolist()

    def constant(rate: Any) -> Any:
        return lambda rates, rate=rate: wdjax.adamw(1e-3, rate)

    def of_arguments(rates: Any) -> Any:
        return wdjax.adamw(1e-3, wdjax.by_path(dict(zip(paths, rates, strict=True))))

    scalar = jax.ShapeDtypeStruct((), np.float32)
    ways: dict[str, tuple[Any, Any]] = {
        "one rate": (constant(0.1), ()),
        "control": (constant(0.1), ()),
        "a constant each": (constant(wdjax.by_path(dict(zip(paths, values, strict=True)))), ()),
        "an argument each": (of_arguments, [scalar] * len(paths)),
        "a vector as an argument": (of_arguments, jax.ShapeDtypeStruct((len(paths),), np.float32)),
    }
    build_program(wdjax.adamw(1e-3, 0.1), trees.small_arrays(20))  # The first program of a process is slower.
    rows: list[Row] = []
    seconds: dict[str, float] = {}
    for name, (build, rates) in ways.items():
        state = state_shapes(constant(0.1)(()), tree)

        def step(params: Any, state: Any, grads: Any, rates: Any, build: Any = build) -> Any:
            return step_of(build(list(rates)))(params, state, grads)

        jax.clear_caches()
        jitted = jax.jit(step, donate_argnums=(0, 1))
        traced, trace = timed(functools.partial(jitted.trace, tree.shapes, state, tree.shapes, rates))
        _, seconds[name] = timed(traced.lower().compile)
        row = {"tree": tree.name, "rates": name, "trace s": trace, "compile s": seconds[name]}
        if name != "one rate":
            ratio = seconds[name] / seconds["one rate"]
            row["compile ratio"] = ratio
            row |= at_most(ratio, 1.25) if name == "a constant each" else {}
        rows.append(row)
    return Table(
        "A separate rate for each array: seconds to compile",
        "One run each. XLA makes one kernel of identical loops. A different constant, or a different element of a "
        "vector, would make a different loop, so on CPUs several rates are hidden from XLA.",
        rows,
    )
