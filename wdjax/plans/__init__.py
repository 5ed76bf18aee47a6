"""Plans show before training which parameters decay, at which rate, by which rule and why.

A `Plan` can be printed, compared with another, saved, and asserted in a unit test (`wdjax.testing.assert_plan`).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .._engine import checks, trees
from .._engine.masks import flags
from .._engine.rates import rate_or_rules
from .._engine.rules import Decision, PerLayer, decisions, stack_of
from .._engine.types import Mask, Params, Rate
from .._engine.unstable import is_traced
from ..paths import Leaf, Rules
from ..paths.roles import BIAS, role
from ..paths.standard import parameter_at
from ._plan import Plan as Plan
from ._plan import PlanDiff as PlanDiff
from .table import Planned as Planned
from .table import PlannedRate, show_rate
from .table import Totals as Totals

_NO_NUMBER = "not decayable"


@checks.known_arguments
def plan(params: Params, weight_decay: Rate = 1.0, mask: Mask = None, *, frozen: Mask = None) -> Plan:
    """Shows which parameters decay, at which rate, by which rule and why.

    Call it before training with the arguments of `decoupled_decay`, on parameters or on the output of `jax.eval_shape`,
    which costs no memory. With the default rate of 1, rates are multipliers.

    Args:
        params: a tree of arrays or `jax.ShapeDtypeStruct`s.
        weight_decay, mask: as for `decoupled_decay`.
        frozen: the mask for `freeze`, if you use it. Frozen parameters do not decay.

    Returns:
        A `Plan`. It warns if nothing decays, or if everything decays and there are biases.

    Raises:
        TypeError, ValueError: as `decoupled_decay` at `init`.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> params = {"Dense_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
        >>> print(wdjax.plan(params, 0.1, wdjax.weights_only()))
        path            arrays   shape    dtype  parameters  rate  rule          why
        -----------------------------------------------------------------------------------------------
        Dense_0/bias         1    (3,)  float32           3     0  weights_only  bias: named 'bias'
        Dense_0/kernel       1  (2, 3)  float32           6   0.1  weights_only  kernel: named 'kernel'
        <BLANKLINE>
        decayed 6 of 9 parameters in 1 of 2 arrays
    """
    leaves = trees.parameters("plan", params, may_hold=["functions"])
    weight_decay = rate_or_rules("plan", "weight_decay", weight_decay)
    rates = [Decision(weight_decay, "")] * len(leaves)
    chosen = asked("plan", mask, params, leaves, "all")
    kept = asked("plan", frozen, params, leaves, "") if frozen is not None else [Decision(False, "")] * len(leaves)
    if isinstance(weight_decay, Rules):
        rates = [decision or Decision(0.0, "") for decision in decisions(weight_decay, "plan", leaves)]
    rows = [
        row_of(trees.describe(path, leaf), trees.is_decayable(leaf), *decisions)
        for (path, leaf), *decisions in zip(leaves, chosen, rates, kept, strict=True)
        if hasattr(leaf, "dtype") or isinstance(leaf, (bool, int, float, complex))
    ]
    _warn(rows)
    return Plan(tuple(rows))


def asked(where: str, mask: Any, params: Any, leaves: Sequence[tuple[str, Any]], rule: str) -> list[Decision]:
    """What a mask decides on each leaf. `rule` is what None is called."""
    answers = flags(where, mask, params, leaves, of_all=True)
    if isinstance(mask, Rules):
        found = decisions(mask, where, leaves)
        return [(d or Decision(False, ""))._replace(value=flag) for d, flag in zip(found, answers, strict=True)]
    return [Decision(flag, rule if mask is None else "mask") for flag in answers]


def row_of(leaf: Leaf, is_decayable: bool, chosen: Decision, rate: Decision, kept: Decision) -> Planned:
    """The row of a parameter, from what the mask, the rate and the mask of the frozen ones say."""
    said, value = [chosen], 0.0
    if not is_decayable:
        said = [Decision(False, _NO_NUMBER, "not a real number")]
    elif kept.value is True:
        said = [kept._replace(rule=f"frozen: {kept.rule}")]
    elif chosen.value is not False:
        if rate.rule:
            said = [rate] if chosen.rule == "all" else [chosen, rate]
        factors = (*rate.factors, rate.value)
        stack_of("plan", leaf.path, factors)
        value = _shown((*factors, chosen.value, np.logical_not(kept.value)), leaf)
    dtype = np.dtype(leaf.dtype).name if isinstance(leaf.dtype, (np.dtype, type)) else str(leaf.dtype)
    decays = any(value) if isinstance(value, tuple) else value != 0
    rule, reason = " · ".join(one.rule for one in said), "; ".join(one.reason for one in said if one.reason)
    return Planned(leaf.path, leaf.shape, dtype, decays, value, rule, reason)


def _shown(factors: Sequence[Any], leaf: Leaf) -> PlannedRate:
    """The product of the factors of a rate: a number, one for each layer, or a text if it is no number yet."""
    numbers: Any = 1.0
    names = []
    for factor in factors:
        if callable(factor):
            name = getattr(factor, "__name__", "")
            names.append(name if name.isidentifier() else "schedule")
        elif is_traced(factor):
            names.append("traced")
        else:
            numbers = numbers * np.asarray(factor.along(len(leaf.shape)) if isinstance(factor, PerLayer) else factor)
    rate: PlannedRate = tuple(map(float, numbers.ravel())) if np.ndim(numbers) else float(numbers)
    if isinstance(rate, tuple) and any(np.ndim(factor) for factor in factors if not isinstance(factor, PerLayer)):
        trees.check_broadcasts("plan", f"the rate of {leaf.path!r}", numbers, leaf.shape)
        least, most = min(rate), max(rate)
        rate = least if least == most else f"{show_rate(least)} to {show_rate(most)}"
    if not names or rate == 0:
        return rate
    number = show_rate(rate) if isinstance(rate, float) else f"({show_rate(rate)})"
    return " × ".join(names if rate == 1 else [number, *names])


def _warn(rows: Sequence[Planned]) -> None:
    decayable = [row for row in rows if row.rule != _NO_NUMBER]
    if decayable and not any(row.decays for row in decayable):
        checks.warn(
            f"plan: nothing decays: no rule, mask or rate lets any of {len(decayable)} arrays decay, or they are "
            "frozen. Print the plan to see the rule for each."
        )
    shapes = {row.path: row.shape for row in rows}
    roles = [(row.path, role(parameter_at(row.path, shapes))) for row in decayable]
    biases = [repr(path) for path, found in roles if found is not None and found.name == BIAS]
    if biases and all(row.decays for row in decayable):
        checks.warn(f"plan: everything decays, including biases: {', '.join(biases[:3])}. Write mask=weights_only().")
