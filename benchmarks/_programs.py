"""Optimizers as compiled programs: what XLA makes of a step, and runs of the step on shared arrays."""

import re
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ._timing import Run, timed
from .trees import Tree

# Instructions that only name, group or reinterpret existing data.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier"}


def step_of(optimizer: optax.GradientTransformation) -> Any:
    """The step as a function of (params, state, grads) that returns params and state. Params and state are donated.

    Donated arguments come first, in the order of the results, because JAX pairs donated buffers with results of the
    same shape in order. With (grads, state, params), the new parameters would get the buffers of the first moment, and
    XLA would have to copy them all.
    """

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def state_shapes(optimizer: optax.GradientTransformation, tree: Tree) -> Any:
    return jax.eval_shape(optimizer.init, tree.shapes)


def compiled(optimizer: optax.GradientTransformation, tree: Tree) -> Any:
    """The compiled step with params and state donated."""
    state = state_shapes(optimizer, tree)
    return jax.jit(step_of(optimizer), donate_argnums=(0, 1)).lower(tree.shapes, state, tree.shapes).compile()


def build_program(optimizer: Any, tree: Tree) -> dict[str, float]:
    """Seconds to trace, lower and compile the step, their sum, and the bytes of the StableHLO.

    JAX's caches are cleared first, as in a new process.
    """
    state = state_shapes(optimizer, tree)
    jax.clear_caches()
    jitted = jax.jit(step_of(optimizer), donate_argnums=(0, 1))
    traced, trace = timed(lambda: jitted.trace(tree.shapes, state, tree.shapes))
    lowered, lower = timed(traced.lower)
    size = len(lowered.as_text())
    compile_ = timed(lowered.compile)[1]
    return {
        "trace": trace,
        "lower": lower,
        "compile": compile_,
        "first step": trace + lower + compile_,
        "StableHLO": size,
    }


class Facts(NamedTuple):
    """Exact figures of a compiled program.

    Attributes:
        bytes: the bytes that it reads and writes, by XLA's own cost analysis.
        kernels: the instructions that it runs, by name: fusions, copies, library calls.
        temporary: the bytes of memory that it needs in addition to its arguments and results.
    """

    bytes: int
    kernels: Counter[str]
    temporary: int


def facts(program: Any) -> Facts:
    return Facts(
        int(program.cost_analysis()["bytes accessed"]),
        kernels(program.as_text()),
        program.memory_analysis().temp_size_in_bytes,
    )


def kernels(text: str) -> Counter[str]:
    """The instructions that an optimized HLO module runs, with those of called computations but not of fusions."""
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    entry = ""
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if opening := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            lines = computations.setdefault(opening[2], [])
            entry = opening[2] if opening[1] else entry
        elif line.startswith("  ") and " = " in line:
            lines.append(line)
    counts: Counter[str] = Counter()

    def count(computation: str) -> None:
        for line in computations[computation]:
            operation = re.search(r" = .*? ([a-z][\w\-]*)\(", line)
            assert operation is not None, line
            if operation[1] in ("call", "while", "conditional"):
                # A GPU's command buffer is also a call. It holds all kernels that one launch submits.
                called = re.findall(r"(?:to_apply|body|\w+_computation)=%?([\w.\-]+)", line)
                for branches in re.findall(r"branch_computations=\{(.*?)\}", line):
                    called += re.findall(r"[\w.\-]+", branches)
                for name in called:
                    count(name)
            elif operation[1] not in FREE and not operation[1].endswith("-done"):
                counts[operation[1]] += 1

    count(entry)
    return counts


class Shared:
    """The parameters, gradients and moments of a tree, which all competitors use in turn.

    The address of an array in memory affects times, and many copies of a large model do not fit.
    """

    def __init__(self, tree: Tree):
        self.params, self.grads = tree.full(0.02), tree.full(1e-3)
        self.moments: dict[str, jax.Array] = {}

    def run(self, optimizer: optax.GradientTransformation, program: Any, tree: Tree) -> Run:
        """A run of the compiled step on these arrays."""
        shapes, treedef = jax.tree_util.tree_flatten_with_path(state_shapes(optimizer, tree))
        names = [_moment(path) for path, _ in shapes]
        own = [
            None if name else jnp.zeros(leaf.shape, leaf.dtype) for name, (_, leaf) in zip(names, shapes, strict=True)
        ]
        for name, (_, leaf) in zip(names, shapes, strict=True):
            if name and name not in self.moments:
                self.moments[name] = jnp.full(leaf.shape, 1e-3, leaf.dtype)

        def run(calls: int) -> float:
            leaves = [self.moments[name] if name else x for name, x in zip(names, own, strict=True)]
            params, state, grads = self.params, jax.tree.unflatten(treedef, leaves), self.grads
            jax.block_until_ready((params, state))
            start = time.perf_counter()
            for _ in range(calls):
                params, state = program(params, state, grads)
            jax.block_until_ready((params, state))
            seconds = (time.perf_counter() - start) / calls
            self.params, leaves = params, jax.tree.leaves(state)
            for i, name in enumerate(names):
                if name:
                    self.moments[name] = leaves[i]
                else:
                    own[i] = leaves[i]
            return seconds

        return run

    def runs(self, optimizers: Mapping[str, optax.GradientTransformation], tree: Tree) -> dict[str, Run]:
        return {name: self.run(o, compiled(o, tree), tree) for name, o in optimizers.items()}


def _moment(path: Any) -> str:
    """The name of a moment in a state, whatever wrappers it is under. Empty for counts and the like."""
    found = re.search(r"\.(mu|nu|trace)\b.*", jax.tree_util.keystr(path))
    return found[0] if found else ""
