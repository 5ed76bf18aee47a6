"""Decay costs nothing: the compiled step with and without decay."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

import wdjax

from . import trees
from ._programs import Shared, compiled, facts, state_shapes
from ._tables import Row, Table, as_control, at_most, rows_for
from ._timing import interleaved

# By name: the optimizer without decay and with it.
PAIRS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "Adam, AdamW": (lambda: optax.adam(1e-3), lambda: wdjax.adamw(1e-3, 0.1)),
    "Adam, AdamW on weights": (lambda: optax.adam(1e-3), lambda: wdjax.adamw(1e-3, 0.1, wdjax.weights_only())),
    "Adam, L2 in Adam": (lambda: optax.adam(1e-3), lambda: wdjax.adam_l2(1e-3, 0.1)),
    "SGD, SGDW": (lambda: optax.sgd(1e-3, 0.9), lambda: wdjax.sgdw(1e-3, 0.1, momentum=0.9)),
    "SGD, SGD with L2": (lambda: optax.sgd(1e-3, 0.9), lambda: wdjax.sgd_l2(1e-3, 0.1, momentum=0.9)),
    "SGD, SGD with L2 by Optax": (
        lambda: optax.sgd(1e-3, 0.9),
        lambda: optax.chain(optax.add_decayed_weights(0.1), optax.sgd(1e-3, 0.9)),
    ),
}


def comparisons(quick: bool) -> list[Callable[[], Table]]:
    return [functools.partial(programs, quick), functools.partial(times, quick)]


def programs(quick: bool) -> Table:
    """The exact figures."""
    rows = rows_for([trees.small_arrays(100)] + ([] if quick else [trees.resnet50()]), _programs_of)
    return Table(
        "The compiled step without decay and with it (both numbers: without → with)",
        "Bytes per parameter as XLA counts them, kernels, arrays in the state, bytes of temporary memory. The target "
        "is for the bytes: no more with decay, except 16 bytes per tree for wdjax's count of steps. (XLA counts in "
        "float32, which rounds large trees to about 64 bytes.)",
        rows,
    )


def _programs_of(tree: trees.Tree) -> list[Row]:
    rows = []
    for name, pair in PAIRS.items():
        optimizers = [build() for build in pair]
        without, with_decay = (facts(compiled(optimizer, tree)) for optimizer in optimizers)
        leaves = [len(jax.tree.leaves(state_shapes(optimizer, tree))) for optimizer in optimizers]
        rows.append(
            {
                "tree": tree.name,
                "optimizers": name,
                "bytes a parameter": " → ".join(
                    f"{each.bytes / tree.parameters:.3f}" for each in (without, with_decay)
                ),
                "bytes more": with_decay.bytes - without.bytes,
                "kernels": f"{without.kernels.total():,} → {with_decay.kernels.total():,}",
                "state arrays": f"{leaves[0]:,} → {leaves[1]:,}",
                "temporary": f"{without.temporary:,} → {with_decay.temporary:,}",
                **at_most(with_decay.bytes - without.bytes, max(16.0, float(np.spacing(np.float32(with_decay.bytes))))),
            }
        )
    return rows


def times(quick: bool) -> Table:
    chosen = [trees.resnet50(), trees.small_arrays(200 if quick else 1000)] + ([] if quick else [trees.gpt2()])
    return Table(
        "Time of the compiled step with decay, as a multiple of the step without",
        "The first row of each tree is the step without decay in milliseconds. The control is the same step once more.",
        rows_for(chosen, lambda tree: _times_of(tree, quick)),
    )


def _times_of(tree: trees.Tree, quick: bool) -> list[Row]:
    rows: list[Row] = []
    names = [
        name for name in PAIRS if not name.endswith(("weights", "Adam", "Optax") if quick else ("weights", "Adam"))
    ]
    for base in ("Adam",) if quick and tree.arrays == 200 else ("Adam", "SGD"):
        pairs = {name: PAIRS[name] for name in names if name.startswith(base)}
        without = next(iter(pairs.values()))[0]
        optimizers = {base: without(), "control": without()} | {name: pair[1]() for name, pair in pairs.items()}
        measured = interleaved(Shared(tree).runs(optimizers, tree), rounds=9 if quick else 25, block=0.1)
        control = measured.ratio("control", base)
        rows.append({"tree": tree.name, "optimizer": base, "ms": 1e3 * measured.median(base), "ratio": None})
        rows.append(
            {"tree": tree.name, "optimizer": "control", "ms": 1e3 * measured.median("control"), "ratio": control}
        )
        for name in pairs:
            ratio = measured.ratio(name, base)
            decayed = name.partition(", ")[2]
            row = {"tree": tree.name, "optimizer": decayed, "ms": 1e3 * measured.median(name), "ratio": ratio}
            rows.append(row | as_control(ratio, control))
    return rows
