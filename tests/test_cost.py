"""What decay costs, where it is exact: bytes, kernels, memory, state, equations and compilations. Times: benchmarks/."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from benchmarks import groups, run, tracing, trees
from benchmarks._programs import Facts, compiled, facts, kernels, state_shapes, step_of
from benchmarks._tables import Table, as_control, at_least, at_most
from benchmarks._timing import Ratio, interleaved

import wdjax

pytestmark = pytest.mark.peers

# Small enough that XLA's float32 counts every byte.
TREE = trees.small_arrays(40)
# The count of updates: kept once a tree, read and written by a kernel of its own.
COUNT = 16
ADAMW: dict[str, Callable[[], Any]] = {
    "one rate": lambda: wdjax.adamw(1e-3, 0.1),
    "weights only": lambda: wdjax.adamw(1e-3, 0.1, wdjax.weights_only()),
    "a mask as a tree": lambda: wdjax.adamw(1e-3, 0.1, wdjax.weights_only().mask(TREE.shapes)),
    "ten rates": lambda: groups.WAYS["ten rates"](TREE),
    "ten rates and a mask": lambda: wdjax.adamw(1e-3, groups.by_layer(TREE, groups.RATES), wdjax.weights_only()),
}


@functools.cache
def facts_of(build: Callable[[], Any]) -> Facts:
    return facts(compiled(build(), TREE))


def adam() -> Any:
    return optax.adam(1e-3)


def sgd() -> Any:
    return optax.sgd(1e-3, 0.9)


@pytest.mark.parametrize("build", ADAMW.values(), ids=ADAMW)
def test_adamw_moves_no_byte_more_than_adam(build: Callable[[], Any]) -> None:
    without, decayed = facts_of(adam), facts_of(build)
    assert decayed.bytes == without.bytes + COUNT
    assert decayed.kernels == without.kernels + facts_of(count_alone).kernels
    assert decayed.temporary == without.temporary


def count_alone() -> Any:
    """What counts updates and decays nothing, without parameters to apply updates to."""
    return optax.chain(wdjax.decoupled_decay(0.0), optax.set_to_zero())


@pytest.mark.parametrize("build", ADAMW.values(), ids=ADAMW)
def test_state_is_that_of_adam_and_a_count(build: Callable[[], Any]) -> None:
    leaves, treedef = jax.tree.flatten(state_shapes(build(), TREE))
    assert len(leaves) == len(jax.tree.leaves(state_shapes(adam(), TREE))) + 1
    assert treedef == jax.tree.structure(state_shapes(wdjax.adamw(1e-3, 0.1), TREE))
