"""The audit of every optimizer of Optax that has a weight decay, against what its source says.

`python tests/audits/test_audit_of_optax.py` writes the table of docs/explanations/audit.md anew.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from decays_of_optax import ROWS, Row, probe
from optax import contrib

import wdjax
from wdjax.audits._probes import Probes

pytestmark = pytest.mark.peers

PAGE = Path(__file__).parents[2] / "docs" / "explanations" / "audit.md"
LEARNING_RATE = 0.01
SHAPES = {"Dense_0/kernel": (8, 6), "Dense_0/bias": (6,)}


def audited(row: Row) -> wdjax.Audit:
    return wdjax.audit(row.build, probe(), learning_rate=LEARNING_RATE, extra_args=row.extra)


def expected(row: Row, path: str) -> float:
    """The rate of the first real step: some do nothing in the first call."""
    rate = row.rate(LEARNING_RATE, SHAPES[path])
    if rate == 0 and row.second_step is not None:
        rate = row.second_step(LEARNING_RATE, SHAPES[path])
    if np.isnan(rate) and row.walk is not None:
        zeros = jax.tree.map(np.zeros_like, probe())
        weights = Probes(
            optax.with_extra_args_support(optax.identity()), zeros, {}, longest=None, exact=True
        ).weights.values()
        tree = {"Dense_0": dict(zip(("bias", "kernel"), weights, strict=True))}
        (after,) = row.walk(LEARNING_RATE, tree, 1)
        before, now = (each["Dense_0"][path.partition("/")[2]] for each in (tree, after))
        # What an optimizer adds to all weights alike is no decay.
        (mirrored,) = row.walk(LEARNING_RATE, jax.tree.map(np.negative, tree), 1)
        other = mirrored["Dense_0"][path.partition("/")[2]]
        rate = float(np.median(1 - (now - other) / 2 / before))
    return rate


# One of each place, kind and finding; CI has them all.
FAST = (
    "adamw",
    "sgd, add_decayed_weights",
    "add_decayed_weights, adam",
    "lamb",
    "schedule_free_sgd",
    "MultiSteps of adamw",
    "sgd, keep_params_nonnegative",
    "yogi",
    "dog, first step given",
)


def fast_first(rows: list[Row]) -> list[Any]:
    return [pytest.param(row, id=row.name, marks=() if row.name in FAST else pytest.mark.slow) for row in rows]


@pytest.mark.parametrize("row", fast_first(ROWS))
def test_the_audit_says_what_the_source_says(row: Row) -> None:
    audit = audited(row)
    check_rates(row, audit)
    check_places_kinds_and_what_scales(row, audit)
    check_findings(row, audit)
    assert line(row, audit) in PAGE.read_text().splitlines(), "run python tests/audits/test_audit_of_optax.py"


def check_rates(row: Row, audit: wdjax.Audit) -> None:
    for path in SHAPES:
        want = expected(row, path)
        if np.isnan(want):
            assert audit[path].kind == "none"  # Noise that no weight has a part in.
        else:
            np.testing.assert_allclose(audit[path].rate, want, rtol=1e-4, atol=1e-15)
        if row.place == "update" and row.additive and audit[path].kind == "L2":
            np.testing.assert_allclose(audit[path].beside_gradient, audit[path].rate, rtol=2e-3)


def check_places_kinds_and_what_scales(row: Row, audit: wdjax.Audit) -> None:
    kinds = {"linear": {"L2"}, "none": {"none"}}
    decaying = [each for each in audit.parameters if each.decays]
    assert bool(decaying) == (row.place != "none")
    for each in decaying:
        assert each.place == row.place
        behind_moments = {"L2"} if row.place == "gradient" else set()  # All of them have L2 there.
        assert each.kind in kinds.get(row.in_weight, {"norm", "other", *behind_moments})
        has_own_rate = "learning rate of Adam's own" in row.name and each.path == "Dense_0/bias"
        assert each.scales_with_learning_rate == (row.scales_with_lr and not has_own_rate)
        assert each.toward in ("zero", "") if each.kind == "other" else each.toward == "zero"
    if row.mask == "" or "kernels" not in row.name:
        assert audit["Dense_0/bias"].decays == row.decays_bias_by_default


def check_findings(row: Row, audit: wdjax.Audit) -> None:
    names = {finding.name for finding in audit.findings}
    assert ("grows" in names) == any(expected(row, path) < 0 for path in SHAPES)
    assert ("decays non-weights" in names) == audit["Dense_0/bias"].decays
    is_constraint = row.in_weight == "projection"
    assert ("no decay" in names) == (row.place == "none" and not is_constraint)
    assert ("constrained" in names) == is_constraint
    assert not {"needs a gradient", "catches up"} & names
    assert bool({"seen by the moments", "rescaled"} & names) == (row.place == "gradient")
    assert ("not finite" in names) == (row.nan_from_step == 1)
    assert ("weights left out" in names) == (audit["Dense_0/bias"].decays and not audit["Dense_0/kernel"].decays)
    assert ("diverges" in names) == ("halved each step" in row.name)  # 2**count overflows, and the rate is infinite.
    never = {
        "stops",
        "twice",
        "not as expected",
        "decays frozen",
        "raw gradients",
        "decays between steps",
        "two decays",
    }
    assert not (never | {"not times the step size", "starts late", "not in every step", "uneven"}) & names


# Of a finished optimizer a decay follows a schedule if it is in proportion to it, and does not if it is constant.
SCHEDULED = [
    row
    for row in ROWS
    if row.takes_schedule
    and row.place == "update"
    and row.additive
    and not row.estimated
    and not ("halved" in row.name or "Adam's own" in row.name or row.name == "fromage")
]


@pytest.mark.parametrize("row", fast_first(SCHEDULED))
def test_schedules_of_the_learning_rate(row: Row) -> None:
    schedule = optax.linear_schedule(LEARNING_RATE, LEARNING_RATE / 10, 1000)
    audit = wdjax.audit(row.build(schedule), probe(), learning_rate=schedule, extra_args=row.extra, steps=(0, 500, 900))
    for each in audit.parameters:
        if each.rates and each.decays:
            assert each.scales_with_learning_rate == row.scales_with_lr


def test_every_optimizer_with_a_weight_decay_is_in_the_table() -> None:
    built = " ".join(row.name for row in ROWS)
    for module in (optax, contrib):
        for name in dir(module):
            arguments = getattr(getattr(module, name), "__annotations__", {})
            if any(argument.startswith("weight_decay") and "mask" not in argument for argument in arguments):
                assert name in built, name


def line(row: Row, audit: wdjax.Audit) -> str:
    kernel, bias = (audit[path] for path in SHAPES)
    each = kernel if kernel.decays else bias
    cells = [row.name, " / ".join(f"{one.rate:.3g}" if one.decays else "0" for one in (kernel, bias))]
    if each.decays:
        is_same = np.isclose(each.beside_gradient, each.rate, rtol=1e-2, atol=0)
        is_nothing = abs(each.beside_gradient) < 1e-6 * abs(each.rate)
        beside = "the same" if is_same else "0" if is_nothing else f"{each.beside_gradient:.3g}"
        cells += [each.place, each.kind, "yes" if each.scales_with_learning_rate else "no", beside]
    else:
        cells += ["none", "", "", ""] if each.kind == "none" else [each.place, each.kind, "", ""]
    found = [finding.name for finding in audit.findings if finding.name not in ("decays non-weights", "no decay")]
    if audit.calls_per_step > 1:
        found = [f"a step every {audit.calls_per_step} calls", *found]
    return f"| {' | '.join((*cells, ', '.join(found)))} |"


def table() -> str:
    header = "| optimizer | rate: kernel / bias | where | kind | × learning rate | beside a gradient | found |"
    return "\n".join((header, "|" + "---|" * 7, *(line(row, audited(row)) for row in ROWS)))


if __name__ == "__main__":
    before, rest = PAGE.read_text().split("<!-- table -->\n")
    PAGE.write_text(before + "<!-- table -->\n" + table() + "\n\n" + rest.partition("\n\n")[2])
