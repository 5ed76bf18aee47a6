"""The host's time for a jitted step, which grows with the number of arrays that go in and out."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax

import wdjax

from . import groups, trees
from ._programs import Shared, compiled, state_shapes
from ._tables import Row, Table, at_most, rows_for
from ._timing import interleaved

FROZEN = wdjax.only("bias", "scale")


def frozen_by_optax(tree: trees.Tree) -> Any:
    labels = wdjax.by_path({"bias": "frozen", "scale": "frozen"}, default="trained").values(tree.shapes)
    return optax.partition({"trained": optax.adamw(1e-3, weight_decay=0.1), "frozen": optax.set_to_zero()}, labels)


def masked_by_optax(tree: trees.Tree) -> Any:
    return optax.adamw(1e-3, weight_decay=0.1, mask=wdjax.weights_only().mask(tree.shapes))


# By name. The first two are the same, and the others are compared with the first.
WAYS: dict[str, Callable[[trees.Tree], Any]] = {
    "Adam by Optax": lambda tree: optax.adam(1e-3),
    "control": lambda tree: optax.adam(1e-3),
    "a mask": lambda tree: wdjax.adamw(1e-3, 0.1, wdjax.weights_only()),
    "a mask, Optax": masked_by_optax,
    "ten rates": groups.WAYS["ten rates"],
    "ten rates, Optax's partition": groups.partitioned,
    "biases and norms frozen": lambda tree: wdjax.freeze(wdjax.adamw(1e-3, 0.1), FROZEN),
    "biases and norms frozen, Optax's partition": frozen_by_optax,
}


def comparisons(quick: bool) -> list[Callable[[], Table]]:
    return [functools.partial(calls, quick)]


def calls(quick: bool) -> Table:
    chosen = [trees.small_arrays(200 if quick else 1000)] + ([] if quick else [trees.resnet50()])
    return Table(
        "The host's time for a call, on trees whose arrays have one entry each",
        "`pass through`: a jitted function of (params, state, grads), donated, that returns params and state and "
        "computes nothing. It shows what the arrays cost by themselves. `step`: the whole step. Times are in "
        "microseconds, and ratios are to the first row. The target: as many arrays in the state as in Adam's, and one "
        "count.",
        rows_for([tiny(tree) for tree in chosen], lambda tree: _calls_of(tree, quick)),
    )


def tiny(tree: trees.Tree) -> trees.Tree:
    """The tree with one entry in each array."""
    return tree._replace(shapes=jax.tree.map(lambda x: jax.ShapeDtypeStruct((1,) * x.ndim, x.dtype), tree.shapes))


def _calls_of(tree: trees.Tree, quick: bool) -> list[Row]:
    optimizers = {name: build(tree) for name, build in WAYS.items()}
    shared, rounds = Shared(tree), 15 if quick else 31
    passing = {name: shared.run(o, passed_through(o, tree), tree) for name, o in optimizers.items()}
    passed = interleaved(passing, rounds, block=0.02)
    jitted = {name: compiled(o, tree) for name, o in optimizers.items()}
    stepped = interleaved({name: shared.run(o, jitted[name], tree) for name, o in optimizers.items()}, rounds, 0.02)
    base = next(iter(WAYS))
    least = len(jax.tree.leaves(state_shapes(optimizers[base], tree)))
    rows = []
    for name, optimizer in optimizers.items():
        state = state_shapes(optimizer, tree)
        arrays = len(jax.tree.leaves(state))
        row: dict[str, Any] = {"tree": f"{tree.arrays:,} arrays", "optimizer": name, "state arrays": arrays}
        row["state nodes"] = jax.tree.structure(state).num_nodes
        for column, times in (("pass through", passed), ("step", stepped)):
            row |= {f"{column} µs": 1e6 * times.median(name)}
            row |= {f"{column} ratio": None if name == base else times.ratio(name, base)}
        if name in ("a mask", "ten rates"):
            row |= at_most(arrays, least + 1)
        rows.append(row)
    return rows


def passed_through(optimizer: Any, tree: trees.Tree) -> Any:
    """A compiled function of a step's arguments that returns params and state unchanged."""
    jitted = jax.jit(lambda params, state, grads: (params, state), donate_argnums=(0, 1), keep_unused=True)
    return jitted.lower(tree.shapes, state_shapes(optimizer, tree), tree.shapes).compile()
