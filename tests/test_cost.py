"""What decay costs, where it is exact: bytes, kernels, memory, state, equations, compilations. Times: benchmarks/."""

import functools
import importlib
import json
import pkgutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import benchmarks
import wdjax
from benchmarks import groups, run, tracing, trees
from benchmarks._programs import Facts, build_program, compiled, facts, kernels, state_shapes, step_of
from benchmarks._tables import Table, as_control, at_least, at_most, rows_for
from benchmarks._timing import Ratio, interleaved

pytestmark = pytest.mark.peers

# So small that XLA, which counts in float32, counts every byte.
TREE = trees.small_arrays(40)
# What wdjax counts its updates with: one kernel a tree, and the bytes that it reads and writes. Of these XLA counts 16
# or 12, depending on its version; what matters is that they are not a multiple of the parameters or the arrays.
COUNT_BYTES, COUNT_KERNELS = 16, 1
ONE_RATE: dict[str, Callable[[], Any]] = {
    "one rate": lambda: wdjax.adamw(1e-3, 0.1),
    "weights only": lambda: wdjax.adamw(1e-3, 0.1, wdjax.weights_only()),
    "a mask as a tree": lambda: wdjax.adamw(1e-3, 0.1, wdjax.weights_only().mask(TREE.shapes)),
}
TEN_RATES: dict[str, Callable[[], Any]] = {
    "ten rates": lambda: groups.WAYS["ten rates"](TREE),
    "ten rates and a mask": lambda: wdjax.adamw(1e-3, groups.by_layer(TREE, groups.RATES), wdjax.weights_only()),
}
ADAMW = ONE_RATE | TEN_RATES


def adam() -> Any:
    return optax.adam(1e-3)


def sgd() -> Any:
    return optax.sgd(1e-3, 0.9)


def sgdw() -> Any:
    return wdjax.sgdw(1e-3, 0.1, momentum=0.9)


def sgd_l2() -> Any:
    return wdjax.sgd_l2(1e-3, 0.1, momentum=0.9)


def sgd_l2_by_optax() -> Any:
    return optax.chain(optax.add_decayed_weights(0.1), optax.sgd(1e-3, 0.9))


@functools.cache
def facts_of(build: Callable[[], Any]) -> Facts:
    return facts(compiled(build(), TREE))


def assert_no_more_than_a_count(without: int, decayed: int) -> None:
    assert without < decayed <= without + COUNT_BYTES


def assert_decay_is_free(without: Facts, decayed: Facts) -> None:
    assert_no_more_than_a_count(without.bytes, decayed.bytes)
    assert decayed.kernels.total() == without.kernels.total() + COUNT_KERNELS
    assert set(decayed.kernels) == {"fusion"}  # No copy, above all.
    assert decayed.temporary == without.temporary <= 4 * TREE.arrays


@pytest.mark.parametrize("build", ONE_RATE.values(), ids=ONE_RATE)
def test_adamw_moves_no_byte_more_than_adam(build: Callable[[], Any]) -> None:
    assert_decay_is_free(facts_of(adam), facts_of(build))


@pytest.mark.parametrize(("name", "decayed"), [("ten rates", TREE.arrays), ("ten rates and a mask", TREE.arrays // 4)])
def test_ten_rates_are_scalars_that_are_written_once_and_read_for_each_array(name: str, decayed: int) -> None:
    of_ten, of_one, rates = facts_of(TEN_RATES[name]), facts_of(ONE_RATE["one rate"]), len(groups.RATES)
    assert of_one.bytes + 4 * decayed <= of_ten.bytes <= of_one.bytes + 4 * decayed + 8 * rates
    assert of_ten.kernels == of_one.kernels
    assert of_ten.temporary <= of_one.temporary + -(-8 * rates // 64) * 64


def test_sgdw_moves_no_byte_more_than_sgd() -> None:
    assert_decay_is_free(facts_of(sgd), facts_of(sgdw))


def test_l2_before_momentum_reads_the_parameters_once_more() -> None:
    """On a CPU, where a loop of XLA has one result: momentum needs the parameter, and so does the step. As in Optax."""
    without, decayed = facts_of(sgd), facts_of(sgd_l2)
    assert_no_more_than_a_count(without.bytes + 4 * TREE.parameters, decayed.bytes)
    assert_no_more_than_a_count(facts_of(sgd_l2_by_optax).bytes, decayed.bytes)
    assert decayed.kernels.total() == without.kernels.total() + COUNT_KERNELS
    assert decayed.temporary == without.temporary == 0


def test_l2_without_momentum_moves_no_byte_more() -> None:
    without, decayed = (facts(compiled(o, TREE)) for o in (optax.sgd(1e-3), wdjax.sgd_l2(1e-3, 0.1)))
    assert_decay_is_free(without, decayed)


def test_a_schedule_and_a_traced_rate_cost_a_scalar_an_array() -> None:
    decayed = facts_of(ADAMW["one rate"])
    scheduled = facts(compiled(wdjax.adamw(1e-3, optax.linear_schedule(0.1, 0.0, 10)), TREE))
    assert decayed.bytes < scheduled.bytes <= decayed.bytes + 4 * TREE.arrays + 64
    assert scheduled.kernels["fusion"] == decayed.kernels["fusion"]
    assert scheduled.temporary <= 4 * TREE.arrays


@pytest.mark.parametrize("build", ADAMW.values(), ids=ADAMW)
def test_the_state_is_that_of_adam_and_a_count(build: Callable[[], Any]) -> None:
    leaves, treedef = jax.tree.flatten(state_shapes(build(), TREE))
    assert len(leaves) == len(jax.tree.leaves(state_shapes(adam(), TREE))) + 1
    assert treedef == jax.tree.structure(state_shapes(wdjax.adamw(1e-3, 0.1), TREE))


@pytest.mark.parametrize(
    "build",
    [
        lambda: wdjax.decoupled_decay(0.1),
        lambda: wdjax.decoupled_decay(wdjax.by_path({"bias": 0.1}, default=0.2)),
        lambda: wdjax.add_l2_to_grads(optax.linear_schedule(0.1, 0.0, 10)),
    ],
    ids=["decoupled_decay", "by_path", "a schedule"],
)
def test_an_array_more_is_at_most_an_equation_more(build: Callable[[], Any]) -> None:
    counts = []
    for tree in (trees.small_arrays(160), trees.small_arrays(320)):
        optimizer = build()
        state = state_shapes(optimizer, tree)
        counts.append(equations(jax.make_jaxpr(optimizer.update)(tree.shapes, state, tree.shapes).jaxpr))
    assert counts[1] - counts[0] <= 160


def equations(jaxpr: Any) -> int:
    """Those of a program, with those of each function in it once, however often it is called."""
    found: dict[int, Any] = {}

    def collect(jaxpr: Any) -> None:
        if id(jaxpr) not in found:
            found[id(jaxpr)] = jaxpr
            for value in (value for eqn in jaxpr.eqns for value in eqn.params.values()):
                if hasattr(value, "jaxpr"):
                    collect(value.jaxpr)

    collect(jaxpr)
    return sum(len(each.eqns) for each in found.values())


@pytest.mark.slow
def test_the_program_is_no_larger_than_optax_s() -> None:
    tree = trees.small_arrays(200)
    ways = tracing.optimizers(tree)
    sizes = {name: build_program(build(), tree)["StableHLO"] for name, build in ways.items()}
    assert sizes["Optax"] == sizes["control"]
    assert sizes["wdjax"] == sizes["wdjax, by path"] <= 1.05 * sizes["Optax"], sizes


@pytest.mark.parametrize(
    "build",
    [
        lambda a, b: wdjax.adamw(1e-3, a + b),
        lambda a, b: wdjax.adamw(1e-3, optax.linear_schedule(a, b, 100)),
        lambda a, b: wdjax.adamw(1e-3, wdjax.by_path({"kernel": a}, default=b)),
    ],
    ids=["a rate", "a schedule", "rates by path"],
)
def test_another_value_of_an_argument_compiles_nothing(build: Callable[..., Any]) -> None:
    traced = 0

    @jax.jit
    def step(params: Any, state: Any, grads: Any, a: jax.Array, b: jax.Array) -> Any:
        nonlocal traced
        traced += 1
        return step_of(build(a, b))(params, state, grads)

    tree = trees.small_arrays(4)
    params, grads = tree.full(0.02), tree.full(1e-3)
    state = wdjax.adamw(1e-3, 0.1).init(params)

    def at(a: float, b: float) -> Callable[[], Any]:
        rates = jnp.float32(a), jnp.float32(b)
        return lambda: step(params, state, grads, *rates)

    assert tracing.compilations_of(at(0.1, 0.0)) >= 1
    assert tracing.compilations_of(at(0.0, 0.2)) == 0
    assert traced == 1


# How the benchmarks count, choose and print.

HLO = """HloModule jit_step, is_scheduled=true

%fused (param_0: f32[2]) -> f32[2] {
  %param_0 = f32[2]{0} parameter(0)
  ROOT %add.0 = f32[2]{0} add(%param_0, %param_0)
}

%body (arg: (f32[2], s32[])) -> (f32[2], s32[]) {
  %arg = (f32[2]{0}, /*index=1*/s32[]) parameter(0)
  %x = f32[2]{0} get-tuple-element(%arg), index=0
  %y = f32[2]{0} fusion(%x), kind=kLoop, calls=%fused
  ROOT %t = (f32[2]{0}, s32[]) tuple(%y, %y)
}

%command_buffer (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  %c = f32[2]{0} copy(%p)
  ROOT %gemm = f32[2]{0} custom-call(%c), custom_call_target="x"
}

ENTRY %main.1 (a: f32[2], b: s32[]) -> (f32[2], s32[]) {
  %a = f32[2]{0} parameter(0)
  %b = s32[] parameter(1)
  %call = f32[2]{0} call(%a), to_apply=%command_buffer
  %many = (f32[2]{0}, /*index=1*/s32[]) fusion(%call), kind=kLoop, calls=%fused
  %while = (f32[2]{0}, s32[]) while(%many), condition=%body, body=%body
  %if = f32[2]{0} conditional(%b, %a, %a), branch_computations={%command_buffer, %fused}
  ROOT %out = (f32[2]{0}, s32[]) tuple(%if, %b)
}
"""


def test_kernels_are_counted_within_calls_and_not_within_fusions() -> None:
    assert kernels(HLO) == {"fusion": 2, "copy": 2, "custom-call": 2, "add": 1}


def test_trees_are_those_of_the_models() -> None:
    assert (trees.resnet50().arrays, trees.resnet50().parameters) == (161, 25_557_032)
    assert (trees.gpt2().arrays, trees.gpt2().parameters) == (148, 124_439_808)
    for tree in (trees.resnet50(), trees.gpt2(), trees.small_arrays(1000)):
        labels = groups.by_layer(tree, list(range(10))).values(tree.shapes)
        assert set(jax.tree.leaves(labels)) == set(range(10))
        assert {leaf.dtype for leaf in jax.tree.leaves(tree.shapes)} == {jnp.dtype("float32")}


def ratio(lower: float, median: float, upper: float) -> Ratio:
    return Ratio(median, lower, upper, lower, upper, 9)


def test_what_is_met() -> None:
    assert [at_most(value, 1.03)["met"] for value in (1.0, 1.03, 1.04)] == ["yes", "yes", "no"]
    verdicts = [at_most(ratio(*values), 1.03)["met"] for values in ((0.9, 1.0, 1.1), (1.0, 1.1, 1.2), (1.1, 1.2, 1.3))]
    assert verdicts == ["yes", "noise", "no"]
    verdicts = [at_least(ratio(*values), 5)["met"] for values in ((4, 6, 7), (3, 4, 6), (1, 2, 3))]
    assert verdicts == ["yes", "noise", "no"]
    control = ratio(0.98, 1.01, 1.05)
    values = (0.7, 0.8, 0.9), (1.0, 1.04, 1.2), (1.04, 1.1, 1.2), (1.06, 1.1, 1.2)
    assert [as_control(ratio(*value), control)["met"] for value in values] == ["yes", "yes", "noise", "no"]


def test_ratios_are_of_one_round() -> None:
    seconds = iter(range(1, 1000))  # The machine becomes slower and slower.
    times = interleaved({name: lambda calls: float(next(seconds)) for name in "ab"}, rounds=50)
    assert abs(times.ratio("a", "b").median - 1) < 0.1
    assert times.ratio("a", "b").rounds == 50


def test_tables_are_markdown_and_json_and_a_failure_is_a_row() -> None:
    def fails_for_two(item: int) -> list[dict[str, Any]]:
        if item == 2:
            raise MemoryError("too large")
        return [{"tree": str(item), "x": ratio(0.9, 1, 1.2)} | at_most(item, 1)]

    table = Table("Title", "About.", rows_for([1, 2, 3], fails_for_two))
    lines = table.markdown().splitlines()
    assert lines[0] == "### Title"
    assert lines[4] == "| tree | x | target | met | failed |"
    assert lines[6] == "| 1 | 1.00 (0.90–1.20) | ≤ 1 | yes |  |"
    assert "MemoryError: too large" in lines[7]
    assert "| 3 |" in lines[8]
    assert json.loads(json.dumps(table.data()))["rows"][0]["x"]["upper"] == 1.2


def test_every_module_of_comparisons_is_run() -> None:
    modules = [module.name for module in pkgutil.iter_modules(benchmarks.__path__) if not module.name.startswith("_")]
    with_comparisons = [n for n in modules if hasattr(importlib.import_module(f"benchmarks.{n}"), "comparisons")]
    assert sorted(with_comparisons) == sorted(run.NAMES)


def test_the_tables_of_a_run_replace_those_on_the_page() -> None:
    page = run.PAGE.read_text()
    assert page.count(run.BEGIN) == page.count(run.END) == 1
    new = run.with_figures(page, "A table.\n")
    assert new == f"{page.partition(run.BEGIN)[0]}{run.BEGIN}\n\nA table.\n\n{run.END}{page.partition(run.END)[2]}"
    assert run.with_figures(new, "A table.\n") == new
    for lost in (page.replace(run.BEGIN, ""), page.replace(run.END, "")):
        with pytest.raises(ValueError, match="must contain the marks"):
            run.with_figures(lost, "A table.\n")
