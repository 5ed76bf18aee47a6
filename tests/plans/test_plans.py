"""The plan: what it says of rules, masks and rates, and how it is printed, compared, kept and asserted."""

import functools
import io
import json
import re
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wdjax
from wdjax import by_depth, by_path, only, plan, weights_only
from wdjax.testing import assert_plan

PARAMS = {
    "embed": {"embedding": jnp.ones((5, 4))},
    "blocks": [
        {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4), "norm": {"scale": jnp.ones(4, jnp.bfloat16)}}
        for _ in range(3)
    ],
    "head": {"kernel": jnp.ones((4, 2)), "bias": None},
    "step": jnp.array(0),
}


def rows(it: wdjax.Plan) -> dict[str, tuple[Any, ...]]:
    return {row.path: (row.decays, row.rate, row.rule, row.reason) for row in it.parameters}


def test_each_row_of_a_plan() -> None:
    it = plan(PARAMS, 0.1 * by_depth("blocks/*", 0.5, first="embed", last="head"), weights_only())
    assert it["blocks/1/kernel"] == wdjax.plans.Planned(
        path="blocks/1/kernel",
        shape=(4, 4),
        dtype="float32",
        decays=True,
        rate=0.1 * 0.25,
        rule="weights_only · by_depth",
        reason="kernel: named 'kernel'; block 1 of 3",
    )
    assert it["blocks/1/kernel"].size == 16
    assert it["blocks/0/norm/scale"].dtype == "bfloat16"
    assert rows(it) == {
        "blocks/0/bias": (False, 0.0, "weights_only", "bias: named 'bias'"),
        "blocks/0/kernel": (True, 0.1 * 0.125, "weights_only · by_depth", "kernel: named 'kernel'; block 0 of 3"),
        "blocks/0/norm/scale": (False, 0.0, "weights_only", "norm: named 'scale'"),
        "blocks/1/bias": (False, 0.0, "weights_only", "bias: named 'bias'"),
        "blocks/1/kernel": (True, 0.1 * 0.25, "weights_only · by_depth", "kernel: named 'kernel'; block 1 of 3"),
        "blocks/1/norm/scale": (False, 0.0, "weights_only", "norm: named 'scale'"),
        "blocks/2/bias": (False, 0.0, "weights_only", "bias: named 'bias'"),
        "blocks/2/kernel": (True, 0.1 * 0.5, "weights_only · by_depth", "kernel: named 'kernel'; block 2 of 3"),
        "blocks/2/norm/scale": (False, 0.0, "weights_only", "norm: named 'scale'"),
        "embed/embedding": (
            True,
            0.1 * 0.0625,
            "weights_only · by_depth",
            "embedding: named 'embedding'; before block 0 of 3",
        ),
        "head/kernel": (True, 0.1, "weights_only · by_depth", "kernel: named 'kernel'; outside the 3 blocks"),
        "step": (False, 0.0, "not decayable", "not a real number"),
    }
    with pytest.raises(KeyError, match="no parameter has the path 'blocks'"):
        it["blocks"]


def test_a_plan_is_a_sequence_of_rows() -> None:
    params = {"Dense_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
    made = plan(params, 0.1, wdjax.only("kernel"))
    assert len(made) == 2
    assert [(row.path, row.rate) for row in made] == [("Dense_0/bias", 0.0), ("Dense_0/kernel", 0.1)]
    assert made["Dense_0/kernel"] in made
    with pytest.raises(KeyError, match="no parameter has the path 'Dense_1'"):
        made["Dense_1"]


def test_the_rule_that_decided() -> None:
    table = by_path({"bias": 0.0, ("embed", "head"): by_path({"embedding": 0.5}, default=2.0)}, default=1.0)
    found = {path: row[1:3] for path, row in rows(plan(PARAMS, table)).items()}
    assert found["blocks/0/bias"] == (0.0, "'bias'")
    assert found["embed/embedding"] == (0.5, "'embed' → 'embedding'")
    assert found["head/kernel"] == (2.0, "'head' → default")
    assert found["blocks/0/kernel"] == (1.0, "default")
    assert rows(plan(PARAMS, 0.1, only("kernel")))["head/kernel"] == (True, 0.1, "'kernel'", "")
    assert rows(plan(PARAMS, 0.1, only("kernel")))["embed/embedding"] == (False, 0.0, "default", "")
    tree = jax.tree.map(lambda p: p.ndim > 1, PARAMS)
    assert rows(plan(PARAMS, 0.1, tree))["head/kernel"] == (True, 0.1, "mask", "")
    product = 0.1 * by_path({"kernel": 2.0}, default=1.0) * by_depth("blocks/*", 0.5, last="head")
    assert rows(plan(PARAMS, product, only("kernel")))["blocks/2/kernel"][1:3] == (
        0.1,
        "'kernel' · by_depth × 'kernel'",
    )


def test_what_is_frozen_does_not_decay() -> None:
    it = plan(PARAMS, 0.1, weights_only(), frozen=only("blocks/0"))
    assert rows(it)["blocks/0/kernel"] == (False, 0.0, "frozen: 'blocks/0'", "")
    assert rows(it)["blocks/1/kernel"][:2] == (True, 0.1)
    assert rows(
        plan(PARAMS, 0.1, weights_only(), frozen={"embed": True, "blocks": False, "head": False, "step": False})
    )["embed/embedding"] == (False, 0.0, "frozen: mask", "")


def test_rates_that_are_known_only_in_training() -> None:
    schedule = optax.linear_schedule(0.1, 0.0, 10)
    it = plan(PARAMS, schedule * by_path({"embed": 0.5, "bias": 0.0}, default=1.0), only("kernel", "embed"))
    assert it["embed/embedding"].rate == "0.5 × schedule"
    assert it["head/kernel"].rate == "schedule"
    assert it["head/kernel"].decays
    seen: list[wdjax.Plan] = []

    def trace(rate: jax.Array) -> jax.Array:
        seen.append(plan(PARAMS, rate * by_path({"embed": 0.5}, default=1.0), only("kernel", "embed")))
        return rate

    jax.jit(trace)(0.1)
    assert (seen[0]["embed/embedding"].rate, seen[0]["head/kernel"].rate) == ("0.5 × traced", "traced")
    np.testing.assert_allclose(plan(PARAMS, jnp.float32(0.5), only("kernel"))["head/kernel"].rate, 0.5)  # pyright: ignore


# What comes of schedules and learning rates.
@pytest.fixture
def promotion() -> Iterator[None]:
    """Optax's cosine schedules do not run under the strict promotion of the other tests."""
    with jax.numpy_dtype_promotion("standard"):
        yield


WARMUP = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 500, 5000, 1e-3)
KERNELS = {"kernel": np.ones((2, 2)), "bias": np.ones(2)}


def removed(rates: Any) -> Any:
    """1 - the product of (1 - rate) over the steps, in float64."""
    left = 1.0
    for rate in np.asarray(rates, np.float64):
        left = left * (1 - rate)
    return 1 - left


@pytest.mark.usefixtures("promotion")
@pytest.mark.parametrize("step", [None, 0, 300, 4800, np.int64(7)])
def test_what_a_decay_comes_to_at_a_step(step: Any) -> None:
    decay = optax.linear_schedule(0.3, 0.1, 2000)
    table = decay * by_path({"kernel": 0.5, "bias": 0.0})
    it = plan(KERNELS, table, learning_rate=WARMUP, step=step)
    counts = np.arange(1000) + (step or 0)
    eta, wd = (np.asarray(jax.vmap(schedule)(counts), np.float64) for schedule in (WARMUP, decay))
    row: Any = it["kernel"]
    np.testing.assert_allclose(row.rate, 0.5 * wd[0], rtol=1e-6)
    np.testing.assert_allclose(row.per_step, 0.5 * wd[0] * eta[0], rtol=1e-5)
    np.testing.assert_allclose(row.per_thousand, removed(0.5 * wd * eta), rtol=1e-5)
    assert row.decays  # At step 0 the learning rate is 0, but not for long.
    assert it["bias"][3:5] + it["bias"][7:] == (False, 0.0, 0.0, 0.0)


@pytest.mark.usefixtures("promotion")
def test_a_step_alone_evaluates_the_schedules() -> None:
    it = plan(KERNELS, 0.5 * by_path({"kernel": WARMUP}, default=0.1), only("kernel"), step=500)
    np.testing.assert_allclose(it["kernel"].rate, 5e-3, rtol=1e-6)  # pyright: ignore
    assert (it["kernel"].per_step, it["kernel"].per_thousand) == (None, None)
    assert it.text() == "0\tbias\n0.005\tkernel\n"
    off = plan(KERNELS, WARMUP, only("kernel"), step=0)
    assert off["kernel"][3:5] == (True, 0.0)


@pytest.mark.usefixtures("promotion")
def test_tables_and_layers_of_learning_rates() -> None:
    params = {"layers": {"kernel": np.ones((3, 2, 2))}, "head": {"kernel": np.ones((2, 2))}}
    rates, etas = by_depth("layers", 0.5, last="**", axis=0), by_path({"head": 1e-3}, default=1e-2)
    it = plan(params, 0.1 * rates, learning_rate=etas)
    layers: Any = it["layers/kernel"]
    np.testing.assert_allclose(layers.per_step, [1.25e-4, 2.5e-4, 5e-4], rtol=1e-12)
    np.testing.assert_allclose(layers.per_thousand, 1 - (1 - np.array(layers.per_step)) ** 1000, rtol=1e-10)
    np.testing.assert_allclose(it["head/kernel"][7:], [1e-4, 1 - (1 - 1e-4) ** 1000], rtol=1e-10)  # pyright: ignore
    assert plan(params, 0.1, learning_rate=1e-2 * rates)["layers/kernel"].per_step == layers.per_step
    rows = plan(KERNELS, {"kernel": np.array([[0.1], [0.2]]), "bias": None}, learning_rate=1e-2)
    assert rows["kernel"][4] == "0.1 to 0.2"
    assert rows["kernel"][7:] == ("0.001 to 0.002", f"{1 - 0.999**1000:.6g} to {1 - 0.998**1000:.6g}")
    tiny: Any = plan(KERNELS, 1e-9, only("kernel"), learning_rate=1e-9)["kernel"]
    np.testing.assert_allclose(tiny.per_thousand, 1e-15, rtol=1e-12)
    wild: Any = plan(KERNELS, 1.5, only("kernel"), learning_rate=optax.piecewise_constant_schedule(1.0, {1: 0.0}))
    np.testing.assert_allclose(wild["kernel"].per_thousand, 1.5)  # It overshoots once.


@pytest.mark.usefixtures("promotion")
def test_the_plan_per_thousand_steps_is_what_happens() -> None:
    schedule = optax.cosine_decay_schedule(1e-2, 1500)
    optimizer = wdjax.sgdw(schedule, 0.3)
    params = {"kernel": jnp.ones(())}

    def step(carry: Any, _: Any) -> Any:
        params, state = carry
        updates, state = optimizer.update({"kernel": jnp.zeros(())}, state, params)
        return (optax.apply_updates(params, updates), state), None

    start = params, optimizer.init(params)
    (middle, state), _ = jax.lax.scan(step, start, length=250)
    (end, _), _ = jax.lax.scan(step, (middle, state), length=1000)
    row: Any = plan(params, 0.3, learning_rate=schedule, step=250)["kernel"]
    np.testing.assert_allclose(1 - end["kernel"] / middle["kernel"], row.per_thousand, rtol=1e-4)


def test_each_schedule_is_evaluated_once_in_one_program() -> None:
    calls = []

    def schedule(count: Any) -> Any:
        calls.append(count)
        return 1e-3 * jnp.exp(-count / 1000)

    params = {f"w{i}": np.ones(2) for i in range(20)}
    plan(params, by_path({"w3": schedule, "w4": 0.0}, default=0.1) * schedule, learning_rate=schedule)
    assert len(calls) == 1


@pytest.mark.usefixtures("promotion")
def test_rates_that_are_still_unknown_at_a_step() -> None:
    seen: list[Any] = []

    def trace(rate: jax.Array) -> jax.Array:
        seen.append(plan(KERNELS, 0.5 * by_path({"kernel": WARMUP, "bias": 0.0}), learning_rate=rate, step=500))
        seen.append(plan(KERNELS, lambda count: rate * count, only("kernel"), learning_rate=1e-2))
        return rate

    jax.jit(trace)(0.1)
    row = seen[0]["kernel"]
    np.testing.assert_allclose(row.rate, 5e-3, rtol=1e-6)
    assert row[7:] == ("0.005 × traced", "unknown")
    assert seen[0]["bias"][7:] == (0.0, 0.0)
    assert seen[1]["kernel"][4] == "schedule"
    assert seen[1]["kernel"][7:] == ("0.01 × schedule", "unknown")
    assert "unknown" in str(seen[0])


def test_the_rates_per_step_are_shown_everywhere_and_kept() -> None:
    from rich.console import Console

    params = {"blocks": [KERNELS, KERNELS]}
    bare = plan(params, 0.1, only("kernel"))
    it = plan(params, 0.1, only("kernel"), learning_rate=1e-2)
    lines = [re.split(r"  +", line) for line in str(it).splitlines()]
    assert lines[0][5:8] == ["rate", "per step", "per 1000 steps"]
    assert lines[3][0].startswith("blocks/{0,1}/kernel")
    assert lines[3][5:8] == ["0.1", "0.001", "0.6323"]
    assert "<th>per step</th><th>per 1000 steps</th>" in it._repr_html_()
    assert "<td>0.001</td><td>0.6323</td>" in it._repr_html_()
    console = Console(file=io.StringIO(), width=200)
    console.print(it)
    assert "per 1000 steps" in console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    data = json.loads(json.dumps(it.to_dict()))
    assert wdjax.Plan.from_dict(data) == it
    # Without a learning rate all is as before, and golden files know no learning rate.
    assert it.text() == bare.text()
    assert "per step" not in f"{bare}{bare._repr_html_()}"
    assert not {"per_step", "per_thousand"} & set(bare.to_dict()["parameters"][0])
    stacked = plan({"kernel": np.ones((2, 2))}, 0.1 * by_depth("kernel", 0.5, axis=0), learning_rate=1e-2)
    assert wdjax.Plan.from_dict(json.loads(json.dumps(stacked.to_dict()))) == stacked

    faster = plan({**params, "head": KERNELS}, 0.1, only("kernel"), learning_rate=2e-2)
    assert str(it.diff(faster)).splitlines() == [
        "head/bias: 0, per step 0, per 1000 steps 0, new",
        "head/kernel: 0.1, per step 0.002, per 1000 steps 0.8649, new",
        "blocks/{0,1}/kernel: per step 0.001 → 0.002, per 1000 steps 0.6323 → 0.8649, by 'kernel'",
    ]
    assert not bare.diff(it)  # What only one of them knows is no difference.
    # In a schedule two plans may agree at a step and not in the steps that follow.
    constant, falling = (
        plan(params, 0.1, only("kernel"), learning_rate=optax.linear_schedule(1e-2, end, 1000)) for end in (1e-2, 0.0)
    )
    assert str(constant.diff(falling)) == "blocks/{0,1}/kernel: per 1000 steps 0.6323 → 0.3939, by 'kernel'"


@pytest.mark.parametrize("length", [3, 5, 7, 10, 100])
def test_a_schedule_that_misses_zero_by_a_rounding(length: int) -> None:
    falling = optax.linear_schedule(0.1, 0.0, length)
    per_step = plan(KERNELS, 0.1, only("kernel"), learning_rate=falling, step=length)["kernel"].per_step
    assert per_step is not None
    assert 0 <= per_step < 1e-9
    with pytest.raises(ValueError, match="must be finite and not negative, but a schedule gives -9e-08 at step 0"):
        plan(KERNELS, 0.1, only("kernel"), learning_rate=lambda count: -9e-8 + 0.0 * count)


def test_a_schedule_that_knows_no_more_steps_than_the_plan_shows() -> None:
    table = [0.1] * 1000
    found = plan(KERNELS, 0.1, only("kernel"), learning_rate=lambda count: table[int(count)])
    assert found["kernel"].per_step == pytest.approx(0.01)


def test_errors_of_steps_and_learning_rates() -> None:
    for step, kind in ((-1, ValueError), (1.5, TypeError), (True, TypeError), (2**31, ValueError), ("1", TypeError)):
        with pytest.raises(kind, match=rf"plan: step must be an integer from 0 to \d+, .*got {step!r}\. Write plan\("):
            plan(KERNELS, 0.1, only("kernel"), step=step)
    assert plan(KERNELS, optax.linear_schedule(0.1, 0.0, 10), only("kernel"), step=jnp.asarray(5)) == plan(
        KERNELS, optax.linear_schedule(0.1, 0.0, 10), only("kernel"), step=5
    )
    with pytest.raises(ValueError, match=r"must be finite and not negative, but a schedule gives -0\.5 at step 1\."):
        plan(KERNELS, 0.1, only("kernel"), learning_rate=lambda count: 0.5 - count)
    with pytest.raises(ValueError, match=r"plan: learning_rate must be finite and not negative, got -0\.1"):
        plan(KERNELS, 0.1, only("kernel"), learning_rate=-0.1)
    with pytest.raises(ValueError, match=r"plan: the pattern 'kernle' matches no parameter"):
        plan(KERNELS, 0.1, only("kernel"), learning_rate=by_path({"kernle": 0.1}, default=0.2))


def test_stacked_layers_have_a_rate_each() -> None:
    params = {"layers": {"kernel": jnp.ones((3, 2, 2)), "bias": jnp.ones((3, 2))}}
    it = plan(params, 0.1 * by_depth("layers", 0.5, last="**", axis=0), weights_only())
    np.testing.assert_allclose(it["layers/kernel"].rate, [0.0125, 0.025, 0.05], rtol=1e-15)  # pyright: ignore
    assert it["layers/kernel"].decays
    assert "0.0125 … 0.05" in str(it)
    assert wdjax.Plan.from_dict(json.loads(json.dumps(it.to_dict()))) == it


@pytest.mark.parametrize(
    ("rate", "mask"),
    [
        (0.1, None),
        (0.1, only("kernel")),
        (0.2 * by_path({"bias": 0.0, "blocks/1": 0.5}, default=1.0), weights_only()),
        (0.1 * by_depth("blocks/*", 0.5, last="head"), by_path({"embed": False}, default=weights_only())),
    ],
)
def test_the_plan_is_what_happens(rate: Any, mask: Any) -> None:
    params = {k: v for k, v in PARAMS.items() if k != "step"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        it = plan(params, rate, mask)
    decay = wdjax.decoupled_decay(rate, mask)
    updates, _ = decay.update(jax.tree.map(jnp.zeros_like, params), decay.init(params), params)
    happened = dict(zip(wdjax.paths.canonical_paths(params), jax.tree.leaves(updates), strict=True))
    for row in it.parameters:
        np.testing.assert_allclose(happened[row.path].astype(jnp.float32), row.rate, rtol=4e-3)  # pyright: ignore
        assert row.decays == bool((happened[row.path] != 0).all())


def test_totals() -> None:
    it = plan(PARAMS, 0.1, weights_only())
    assert it.totals == (20 + 3 * 16 + 8, 20 + 3 * 24 + 8 + 1, 5, 12)
    assert str(it.totals) == "decayed 76 of 101 parameters in 5 of 12 arrays"
    by_rule = plan(PARAMS, 0.1, only("kernel")).totals_by_rule
    assert by_rule == {"'kernel'": (56, 56, 4, 4), "default": (0, 44, 0, 7), "not decayable": (0, 1, 0, 1)}
    sizes = {"a": (124, 10**6), "b": (3, 10**5)}
    params = {k: {"kernel": jax.ShapeDtypeStruct(v, jnp.float32)} for k, v in sizes.items()}
    assert str(plan(params, 1.0, only("a")).totals) == "decayed 124.0 M of 124.3 M parameters in 1 of 2 arrays"


def test_the_table_in_plain_text() -> None:
    it = plan(PARAMS, 0.1 * by_depth("blocks/*", 0.5, first="embed", last="head"), weights_only())
    assert str(it) == repr(it)
    lines = [re.sub(r"  +", "  ", line).strip() for line in str(it).splitlines()]
    assert lines[0] == "path  arrays  shape  dtype  parameters  rate  rule  why"
    assert lines[2:] == [
        "blocks/{0..2}/bias  3  (4,)  float32  12  0  weights_only  bias: named 'bias'",
        "blocks/{0..2}/kernel  3  (4, 4)  float32  48  0.0125 … 0.05  weights_only · by_depth  "
        "kernel: named 'kernel'; block {0..2} of 3",
        "blocks/{0..2}/norm/scale  3  (4,)  bfloat16  12  0  weights_only  norm: named 'scale'",
        "embed/embedding  1  (5, 4)  float32  20  0.00625  weights_only · by_depth  "
        "embedding: named 'embedding'; before block 0 of 3",
        "head/kernel  1  (4, 2)  float32  8  0.1  weights_only · by_depth  "
        "kernel: named 'kernel'; outside the 3 blocks",
        "step  1  ()  int32  1  0  not decayable  not a real number",
        "",
        "decayed 76 of 101 parameters in 5 of 12 arrays",
        "weights_only: decayed 0 of 24 parameters in 0 of 6 arrays",
        "weights_only · by_depth: decayed 76 of 76 parameters in 5 of 5 arrays",
        "not decayable: decayed 0 of 1 parameters in 0 of 1 arrays",
    ]


def test_forty_eight_blocks_are_as_many_lines_as_one() -> None:
    def params(count: int) -> Any:
        return {f"h_{i}": {"attn_1": {"kernel": np.ones((2, 2)), "bias": np.ones(2)}} for i in range(count)}

    one, many = (str(plan(params(n), 0.1, weights_only())).splitlines() for n in (1, 48))
    assert len(one) == len(many)
    assert any(line.startswith("h_{0..47}/attn_1/kernel ") for line in many)
    other = {**params(12), "h_3": {"attn_1": {"kernel": np.ones((2, 3)), "bias": np.ones(2)}}}
    assert "h_3/attn_1/kernel" in str(plan(other, 0.1, weights_only()))
    assert "h_{0,1,2,4,5,6,7,8,9,10,11}/attn_1/kernel" in str(plan(other, 0.1, weights_only()))


def first_cells(params: Any) -> list[str]:
    return [line.split("  ")[0] for line in str(plan(params, 0.1, weights_only())).splitlines()[2:-2]]


def test_a_line_names_only_what_there_is() -> None:
    array = np.ones((2, 2))
    assert first_cells({"s0": {"b0": {"kernel": array}}, "s1": {"b1": {"kernel": array}}}) == [
        "s0/b0/kernel",
        "s1/b1/kernel",
    ]
    stages = {f"stage_{s}": {f"block_{b}": {"kernel": array} for b in range(n)} for s, n in enumerate((3, 5, 5))}
    assert first_cells(stages) == [
        "stage_0/block_{0..2}/kernel",
        "stage_1/block_{0..4}/kernel",
        "stage_2/block_{0..4}/kernel",
    ]
    assert first_cells({f"stage_{s}": stages["stage_1"] for s in range(3)}) == ["stage_{0..2}/block_{0..4}/kernel"]
    assert first_cells({"b_1": {"kernel": array}, "b_01": {"kernel": array}}) == ["b_{01,1}/kernel"]
    assert first_cells({f"b_{i:02}": {"kernel": array} for i in range(3)}) == ["b_{00,01,02}/kernel"]
    assert first_cells({"a#": {"kernel": array}, "a1": {"kernel": array}}) == ["a#/kernel", "a1/kernel"]


def test_counts_are_rounded_as_people_do() -> None:
    def total(size: int) -> str:
        return str(plan({"kernel": jax.ShapeDtypeStruct((size,), jnp.float32)}, 1.0).totals)

    for size, shown in (
        (9_999, "9999"),
        (10_000, "10.0 k"),
        (999_949, "999.9 k"),
        (999_950, "1.0 M"),
        (124_439_808, "124.4 M"),
        (2 * 10**12, "2.0 T"),
    ):
        assert total(size) == f"decayed {shown} of {shown} parameters in 1 of 1 arrays"


def test_what_is_no_array_is_no_parameter() -> None:
    it = plan({"kernel": np.ones((2, 2)), "activation": jnp.tanh, "name": "x", "scale": 1.0}, 0.1, weights_only())
    assert [row.path for row in it.parameters] == ["kernel", "scale"]


def test_a_terminal_gets_rich_and_a_file_plain_text(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from rich.console import Console

    it = plan({"norm [0]": {"scale": np.ones(2)}, "kernel": np.ones((2, 2))}, 0.1, weights_only())
    it.show()
    assert capsys.readouterr().out == f"{it}\n"
    for width in (200, 80, 40):
        console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
        console.print(it)
        shown = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
        assert max(map(len, shown.splitlines())) <= width
        assert "norm [0]/scale" in shown or width == 40
        assert ("float64" in shown) == (width == 200)
        assert "decayed 4 of 6 parameters in 1 of 2" in shown
    monkeypatch.setitem(__import__("sys").modules, "rich.console", None)
    it.show()
    assert capsys.readouterr().out == f"{it}\n"


def test_a_notebook_gets_html() -> None:
    page = plan({"<b>": {"kernel": np.ones((2, 2))}, "bias": np.ones(2)}, 0.1, weights_only())._repr_html_()
    assert page.startswith("<p>decayed 4 of 6 parameters in 1 of 2 arrays</p><table><tr><th>path</th>")
    assert "<td>&lt;b&gt;/kernel</td>" in page
    assert page.count("<tr") == 3


def test_the_difference_of_two_plans() -> None:
    before = plan(PARAMS, 0.1, weights_only())
    changed = {**PARAMS, "head": {"kernel": jnp.ones((4, 3)), "gate": {"kernel": jnp.ones((2, 2))}}}
    del changed["embed"]
    after = plan(changed, 0.1, by_path({"blocks/*/norm": True}, default=weights_only()))
    diff = before.diff(after)
    assert diff
    assert [row.path for row in diff.added] == ["head/gate/kernel"]
    assert [row.path for row in diff.removed] == ["embed/embedding"]
    assert [new.path for _, new in diff.changed] == [f"blocks/{i}/norm/scale" for i in range(3)]
    assert str(diff).splitlines() == [
        "head/gate/kernel: 0.1, new",
        "embed/embedding: 0.1, gone",
        "blocks/{0..2}/norm/scale: 0 → 0.1, by 'blocks/*/norm'",
    ]
    params = {f"w{i}": np.ones((2, 2)) for i in range(4)}
    uneven = [by_path({"w0": 0.1, "w1": w1, "w2": 0.1, "w3": 0.5}) for w1 in (0.2, 0.7)]
    assert str(plan(params, uneven[0]).diff(plan(params, uneven[1]))) == "w1: 0.2 → 0.7, by 'w1'"
    blocks = {f"s{i}": {f"w{j}": np.ones((2, 2)) for j in range(2)} for i in range(2)}
    deep, flat = plan(blocks, 0.1 * by_depth("s*/w*", 0.5, last="**")), plan(blocks, 0.1, only("s*"))
    assert str(deep.diff(flat)) == "s{0,1}/w{0,1}: 0.00625 … 0.05 → 0.1, by 's*'"
    mixed = plan(blocks, by_path({("s0/w0", "s1/w1"): 0.1, ("s0/w1", "s1/w0"): 0.2}))
    assert str(mixed.diff(flat)).splitlines() == [
        "s0/w1: 0.2 → 0.1, by 's*'",
        "s1/w0: 0.2 → 0.1, by 's*'",
    ]
    # What print and files don't tell apart is no difference.
    assert not plan(params, 0.1).diff(plan(params, jnp.float32(0.1)))
    assert not before.diff(before)
    assert str(before.diff(before)) == "no difference"


def test_a_plan_as_a_dictionary() -> None:
    it = plan(PARAMS, optax.constant_schedule(0.1) * by_path({"embed": 0.5}, default=1.0), weights_only())
    data = it.to_dict()
    assert wdjax.Plan.from_dict(json.loads(json.dumps(data))) == it
    row = data["parameters"][1]
    written = "\n".join(f"{key} = {json.dumps(value)}" for key, value in row.items())  # JSON's values are TOML's.
    assert tomllib.loads(written) == row
    assert None not in {value for row in data["parameters"] for value in row.values() if not isinstance(value, list)}
    with pytest.raises(ValueError, match=r"Plan\.from_dict: data must be a dictionary .* KeyError\('parameters'\)"):
        wdjax.Plan.from_dict({"rows": []})
    with pytest.raises(ValueError, match=r"Plan\.from_dict: .*unexpected keyword argument 'size'"):
        wdjax.Plan.from_dict({"parameters": [{**row, "size": 3}]})
    for _ in range(2000):
        row = {"path": row}
    with pytest.raises(ValueError, match=r"^Plan\.from_dict: data is nested more than 400 levels deep\. Write it as"):
        wdjax.Plan.from_dict({"parameters": [row]})


def test_nothing_or_everything_is_warned_of() -> None:
    with pytest.warns(
        UserWarning, match="plan: nothing decays: no rule, mask or rate lets any of 11 arrays decay"
    ) as got:
        plan(PARAMS, 0.0)
    assert len(got) == 1
    assert got[0].filename == __file__
    with pytest.warns(
        UserWarning, match=r"plan: everything decays, including biases: 'blocks/0/bias'.*weights_only\(\)"
    ) as got:
        plan(PARAMS, 0.1)
    assert len(got) == 1
    plan({"kernel": np.ones((2, 2))}, 0.1)  # Everything, and rightly so.
    plan({"step": np.array(1)}, 0.1)  # Nothing that could.
    plan({}, 0.1)


def test_mistakes_are_told_as_anywhere() -> None:
    for call, message in (
        (lambda: plan(PARAMS, 0.1, only("kernal")), "plan: the pattern 'kernal' matches no parameter"),
        (lambda: plan(PARAMS, -0.1), "plan: weight_decay must be finite and not negative, got -0.1"),
        (lambda: plan(PARAMS, 0.1, weights_only(), frozen=only("blok")), "plan: the pattern 'blok' matches no"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match=r"plan\(\) has no argument 'frozzen'.*Did you mean frozen"):
        plan(PARAMS, 0.1, frozzen=None)
    with pytest.raises(TypeError, match="plan: a mask says True or False"):
        plan(PARAMS, 0.1, by_depth("blocks/*", 0.5))
    with pytest.raises(TypeError, match="plan: a table of rates holds numbers"):
        plan(PARAMS, weights_only())


class Model(nn.Module):
    width: int = 8192
    layers: int = 80

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(self.layers):
            x = nn.LayerNorm()(x)
            x = x + nn.Dense(self.width)(nn.relu(nn.Dense(4 * self.width)(x)))
        return x


@functools.cache
def seventy_billion() -> Any:
    shapes = jax.eval_shape(Model(layers=4).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 8192), jnp.float32))
    return {f"group_{i}": shapes["params"] for i in range(33)}


@pytest.mark.peers
def test_a_model_that_no_memory_holds() -> None:
    it = plan(seventy_billion(), 0.1, weights_only())
    assert str(it.totals).startswith("decayed 70.9 B of 70.9 B parameters in 264 of 792 arrays")
    by_type = weights_only(Model(width=16, layers=1), jax.ShapeDtypeStruct((1, 16), jnp.float32))
    shapes = jax.eval_shape(Model(width=16, layers=1).init, jax.random.key(0), jnp.ones((1, 16)))["params"]
    assert plan(shapes, 0.1, by_type)["Dense_0/kernel"].reason == "kernel: 'kernel' of 'Dense'"


def test_golden_plans(tmp_path: Path) -> None:
    it = plan(PARAMS, 0.1 * by_depth("blocks/*", 0.5, last=("embed", "head")), weights_only())
    file = tmp_path / "plan.txt"
    with pytest.raises(
        FileNotFoundError, match=r"the file .*plan\.txt does not exist\. Check print\(plan\), and write it: pathlib"
    ):
        assert_plan(it, file)
    file.write_text(it.text(), encoding="utf-8")
    assert file.read_text().splitlines()[:2] == ["0\tblocks/0/bias", "0.0125\tblocks/0/kernel"]
    assert_plan(it, file)
    assert_plan(it, str(file))
    rates = {row.path: row.rate for row in it.parameters}
    assert_plan(it, rates)
    assert_plan(it, {row.path: row.decays for row in it.parameters})
    assert_plan(plan(PARAMS, optax.constant_schedule(0.1), weights_only()), {**rates, **{
        row.path: "schedule" for row in it.parameters if row.decays
    }})  # fmt: skip

    other = plan({**PARAMS, "scale": jnp.ones((2, 2))}, 0.1, by_path({"scale": True}, default=weights_only()))
    with pytest.raises(AssertionError, match="the plan differs from the golden one") as told:
        assert_plan(other, file)
    assert str(told.value).splitlines()[1:] == [
        "  'blocks/0/kernel' has the rate 0.1, not 0.0125, by weights_only",
        "  'blocks/0/norm/scale' has the rate 0.1, not 0, by 'scale'",
        "  'blocks/1/kernel' has the rate 0.1, not 0.025, by weights_only",
        "  'blocks/1/norm/scale' has the rate 0.1, not 0, by 'scale'",
        "  'blocks/2/kernel' has the rate 0.1, not 0.05, by weights_only",
        "  'blocks/2/norm/scale' has the rate 0.1, not 0, by 'scale'",
        "  'scale' is new, with the rate 0.1",
        f"If this is intended, write it: pathlib.Path({str(file)!r}).write_text(plan.text(), encoding='utf-8').",
    ]
    with pytest.raises(AssertionError, match=r"'head/kernel' decays, by weights_only · by_depth\n  'tail' is missing"):
        assert_plan(it, {**{row.path: row.decays for row in it.parameters}, "head/kernel": False, "tail": True})
    many = {f"w{i}": True for i in range(30)}
    with pytest.raises(AssertionError, match="and 22 more"):
        assert_plan(it, many)
