"""The update of 70 billion parameters, compiled for eight devices and looked into; nothing is allocated."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from slow import slow_but

import wdjax
from benchmarks import at_scale

ROOT = Path(__file__).parents[1]
PARAMETERS = 70_553_706_496  # Of Llama 3 70B, without those of a tokenizer.

CASES = {  # Bytes that a parameter, its gradient and its state take, and the counters of the state.
    "wdjax.adamw": (4, 4, 4 + 4, 3),
    "optax.adamw": (4, 4, 4 + 4, 2),
    'wdjax.adamw, toward="init"': (4, 4, 4 + 4 + 4, 3),
    "wdjax.adamw, bfloat16, master_weights": (2, 2, 4 + 4 + 4, 3),
    "wdjax.adamw, proximal_step(GroupLasso)": (4, 4, 4 + 4, 4),
}

pytestmark = pytest.mark.peers


def mesh(kind: AxisType = AxisType.Auto) -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(2, 4), ("fsdp", "tensor"), axis_types=(kind, kind))


def test_the_tree_has_as_many_parameters_as_the_model() -> None:
    layer = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672 + 2 * 8192
    assert 2 * 128256 * 8192 + 8192 + 80 * layer == PARAMETERS
    for is_stacked, count in (True, 12), (False, 723):
        leaves = jax.tree.leaves(at_scale.llama(stacked=is_stacked))
        assert (sum(leaf.size for leaf in leaves), len(leaves)) == (PARAMETERS, count)
        plan = wdjax.plan(at_scale.llama(stacked=is_stacked), 0.1, wdjax.weights_only())
        assert sum(np.prod(row.shape) for row in plan.parameters if not row.decays) == 161 * 8192  # The norms.


@pytest.mark.parametrize("name", slow_but(CASES, "wdjax.adamw"))
def test_a_device_takes_what_is_computed_by_hand_and_gathers_nothing(name: str) -> None:
    got = at_scale.examine(at_scale.cases()[name], mesh())
    of_param, of_gradient, of_state, counters = CASES[name]
    each = PARAMETERS // 8  # Every array can be cut into eight.
    assert got["arguments"] == got["arguments, by hand"] == each * (of_param + of_gradient + of_state) + 4 * counters
    assert got["outputs"] == got["outputs, by hand"] == each * (of_param + of_state) + 4 * counters
    assert got["donated"] == got["outputs"]
    largest = 80 * 8192 * 28672 // 8
    assert got["largest array"] == got["largest array, by hand"] == largest * (3 if "GroupLasso" in name else 1)
    assert got["layout kept"]
    # A group for each output of a kernel, whose inputs are on the devices of the other axis: for each the sum of
    # squares at three scales. Of "o" and "down" the outputs are on the first axis, of the others on the second.
    groups = 80 * 2 * 8192 // 2 + (80 * (8192 + 2 * 1024 + 2 * 28672) + 128256) // 4
    said = {op: counted["bytes"] for op, counted in got["collectives"].items()}
    assert said == ({"all-reduce": 3 * 4 * groups} if "GroupLasso" in name else {})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wdjax.adamw, layers listed", "optax.adamw, layers listed"])
def test_layers_one_by_one(name: str) -> None:
    case = at_scale.cases(layers=2)[name]
    got = at_scale.examine(case, mesh())
    assert got["arrays"] == 3 + 2 * 9
    assert got["arguments"] == got["arguments, by hand"] == 16 * got["parameters"] // 8 + 4 * case.counters
    assert not got["collectives"]


def test_what_communicates_and_what_is_gathered_is_seen() -> None:
    case = at_scale.cases()["wdjax.adamw"]
    clipped = optax.chain(optax.clip_by_global_norm(1.0), case.optimizer)
    got = at_scale.examine(case._replace(optimizer=clipped), mesh())
    assert list(got["collectives"]) == ["all-reduce"]
    assert got["largest array"] == got["largest array, by hand"]

    def gather(updates: Any, params: Any = None) -> Any:
        whole = NamedSharding(mesh(), P())
        return jax.tree.map(lambda u: 2.0 * jax.lax.with_sharding_constraint(u, whole), updates)

    got = at_scale.examine(case._replace(optimizer=optax.chain(optax.stateless(gather), case.optimizer)), mesh())
    assert "all-gather" in got["collectives"]
    assert got["largest array"] == 8 * got["largest array, by hand"]


def test_bytes_and_shapes_are_read_from_a_program() -> None:
    program = """
      %a = f32[8,4]{1,0} all-reduce(f32[8,4]{1,0} %x), replica_groups={}
      %b = (bf16[2]{0}, f32[]) all-reduce(bf16[2]{0} %x, f32[] %y), to_apply=%add
      %c = (f32[3]{0:T(256)}) all-gather-start(f32[3]{0} %x), dimensions={0}
      ROOT %d = pred[7]{0} fusion(%all-reduce.1), calls=%f
    """
    assert at_scale.collectives(program) == {
        "all-reduce": {"times": 2, "bytes": 4 * 32 + 2 * 2 + 4},
        "all-gather": {"times": 1, "bytes": 12},
    }
    assert (1, (7,)) in at_scale.arrays(program)
    fused = "%fused_computation.1 (p: f32[9]) -> f32[9] {\n  ROOT %p = f32[9] parameter(0)\n}\n"
    assert at_scale.outside_of_fusions(fused + program) == "\n" + program


@pytest.mark.parametrize("name", slow_but(CASES, "wdjax.adamw"))
def test_explicit_meshes_give_the_layout_of_the_state_by_themselves(name: str) -> None:
    case = at_scale.cases()[name]
    params, same = (at_scale.cut(case.params, mesh(kind)) for kind in (AxisType.Explicit, AxisType.Auto))
    with jax.set_mesh(mesh(AxisType.Explicit)):
        state = jax.eval_shape(case.optimizer.init, params)
    wanted = at_scale.state_of(case.optimizer, same)
    for leaf, want in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert (leaf.shape, leaf.dtype) == (want.shape, want.dtype)
        spec = leaf.sharding.spec if leaf.ndim else P()
        assert tuple(spec) == tuple(want.sharding.spec)


def test_a_compiled_init_that_is_not_told_otherwise_puts_all_of_the_state_on_one_device() -> None:
    # What docs/how_to/several_processes.md warns of.
    case = at_scale.cases()["wdjax.adamw"]
    params = at_scale.cut(case.params, mesh())
    told = jax.tree.map(lambda leaf: leaf.sharding, at_scale.state_of(case.optimizer, params))
    moments = 2 * 4 * PARAMETERS
    for shardings, want in (None, moments), (told, moments // 8):
        compiled = jax.jit(case.optimizer.init, out_shardings=shardings).lower(params).compile()
        memory: Any = compiled.memory_analysis()
        pointers = 8 * len(jax.tree.leaves(told))
        assert memory.output_size_in_bytes == want + 4 * 3 + pointers


@pytest.mark.slow
def test_256_devices() -> None:
    only = "cases = s.cases(); s.cases = lambda: {name: cases[name] for name in ('wdjax.adamw', 'optax.adamw')}"
    code = f"import benchmarks.at_scale as s; {only}; table = s.main([]); print([row['met'] for row in table.rows])"
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "### The step for 256 × cpu, {'fsdp': 32, 'tensor': 8}" in done.stdout
    arguments = PARAMETERS // 256 * 16
    assert f"| wdjax.adamw | {arguments + 12:,} |" in done.stdout
    assert f"| optax.adamw | {arguments + 8:,} |" in done.stdout
    assert done.stdout.endswith("['yes', 'yes']\n")
