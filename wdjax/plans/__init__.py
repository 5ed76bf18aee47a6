"""Plans show before training which parameters decay, at which rate, by which rule and why.

A `Plan` can be printed, compared with another, saved, and asserted in a unit test (`wdjax.testing.assert_plan`).
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from .._engine import checks, trees
from .._engine.decision import Decision, PerLayer, stack_of
from .._engine.masks import flags
from .._engine.rates import PerParameter, rate_or_rules, values_of
from .._engine.rules import decisions
from .._engine.text import shown
from .._engine.types import Mask, Params, Rate
from .._engine.unstable import is_traced
from ..paths import Leaf, Rules
from ..paths.parameters import parameter_at
from ..paths.roles import BIAS, role
from ._plan import Plan as Plan
from ._plan import PlanDiff as PlanDiff
from .table import MANY, PlannedRate, show_rate
from .table import Planned as Planned
from .table import Totals as Totals

_NO_NUMBER = "not decayable"


@checks.known_arguments
def plan(
    params: Params,
    weight_decay: Rate = 1.0,
    mask: Mask = None,
    *,
    frozen: Mask = None,
    learning_rate: Rate | None = None,
    step: int | None = None,
) -> Plan:
    """Shows which parameters decay, at which rate, by which rule and why.

    Call it before training with the arguments of `decoupled_decay`, on parameters or on the output of `jax.eval_shape`,
    which costs no memory. With the default rate of 1, rates are multipliers.

    Args:
        params: a tree of arrays or `jax.ShapeDtypeStruct`s.
        weight_decay, mask: as for `decoupled_decay`.
        frozen: the mask for `freeze`, if you use it. Frozen parameters do not decay.
        learning_rate: the optimizer's learning rate: a number, a schedule or a table. Each row then says what the decay
            alone removes of a weight: `per_step`, learning_rate * weight_decay at `step`, and `per_thousand`,
            1 - the product of (1 - learning_rate * weight_decay) over the thousand steps from `step` on. For
            `independent_decay`, write learning_rate=1.0.
        step: the step to evaluate schedules at, counted from 0. By default schedules are shown by their names, or with
            a learning rate, evaluated at step 0.

    Returns:
        A `Plan`.

    Raises:
        TypeError, ValueError: as `decoupled_decay` at `init`; and for a step that is not an integer >= 0.

    Warns:
        UserWarning: if nothing decays, or if everything decays and there are biases.

    Example:

        >>> import jax.numpy as jnp, optax, wdjax
        >>> params = {"Dense_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
        >>> print(wdjax.plan(params, 0.1, wdjax.weights_only()))
        path            arrays   shape    dtype  parameters  rate  rule          why
        -----------------------------------------------------------------------------------------------
        Dense_0/bias         1    (3,)  float32           3     0  weights_only  bias: named 'bias'
        Dense_0/kernel       1  (2, 3)  float32           6   0.1  weights_only  kernel: named 'kernel'
        <BLANKLINE>
        decayed 6 of 9 parameters in 1 of 2 arrays
        >>> learning_rate = optax.linear_schedule(1e-2, 0.0, 1000)
        >>> kernel = wdjax.plan(params, 0.1, wdjax.only("kernel"), learning_rate=learning_rate)["Dense_0/kernel"]
        >>> round(kernel.per_step, 6), round(kernel.per_thousand, 4)  # about 1 - exp(-0.5): half the rate on average
        (0.001, 0.3939)
    """
    where = "plan"
    leaves = trees.parameters(where, params, may_hold=["functions", "names"])
    chosen = asked(where, mask, params, leaves, "all")
    kept = asked(where, frozen, params, leaves, "") if frozen is not None else [Decision(False, "")] * len(leaves)
    left = trees.hidden_where([k.value is not True and c.value for c, k in zip(chosen, kept, strict=True)], leaves)
    rates = _decided("weight_decay", weight_decay, left)
    factors = [None] * len(leaves) if learning_rate is None else _decided("learning_rate", learning_rate, left)
    values = _never_known
    if step is not None or learning_rate is not None:
        first = _checked_step(step or 0)
        values = _values_at(range(first, first + (1 if learning_rate is None else MANY)))
    rows = [
        row_of(trees.describe(path, leaf), trees.is_decayable(leaf), choice, rate, keep, factor, values=values)
        for (path, leaf), choice, rate, keep, factor in zip(leaves, chosen, rates, kept, factors, strict=True)
        if trees.is_array(leaf) or isinstance(leaf, (bool, int, float, complex))
    ]
    _warn(rows)
    return Plan(tuple(rows))


def _decided(name: str, rate: Any, leaves: Sequence[tuple[str, Any]]) -> list[Any]:
    """What a rate says of each leaf."""
    rate = rate_or_rules("plan", name, rate)
    if isinstance(rate, Rules):
        bare = Decision(0.0, rate.kind if isinstance(rate, PerParameter) else "")
        return [decision or bare for decision in decisions(rate, "plan", leaves)]
    return [Decision(rate, "")] * len(leaves)


def _checked_step(step: Any) -> int:
    last = 2**31 - 1 - MANY  # Optax counts steps in int32.
    is_known = isinstance(step, (int, np.integer, np.ndarray, jax.Array)) and not is_traced(step)
    is_whole = is_known and not isinstance(step, bool) and np.ndim(step) == 0 and np.asarray(step).dtype.kind in "iu"
    if is_whole and 0 <= step <= last:
        return operator.index(step)
    raise (ValueError if is_whole else TypeError)(
        f"plan: step must be an integer from 0 to {last}, the number of updates so far, got {shown(step)}. "
        "Write plan(params, weight_decay, step=0)."
    )


def _never_known(schedule: Any) -> None:
    return None


_OTHER_COUNTS = (0, *(2**k for k in range(25)))  # They show how large a schedule gets.


def _values_at(counts: Sequence[int]) -> Callable[[Any], np.ndarray | None]:
    """A function that evaluates each schedule once at these counts. It returns None for a schedule that fails."""
    known: dict[int, np.ndarray | None] = {}

    def values(schedule: Any) -> np.ndarray | None:
        if id(schedule) not in known:
            found = values_of(schedule, counts)
            if found is not None and found.shape == (len(counts),) and found.dtype.kind in "iuf":
                if np.any(found < 0):  # A schedule that ends at 0 may end slightly below it, by rounding.
                    others = values_of(schedule, _OTHER_COUNTS)
                    most = np.max(found) if others is None else max(np.max(found), np.max(others))
                    found = np.where((found < 0) & (found >= -1e-6 * most), 0, found)
                for wrong in np.flatnonzero(~(np.isfinite(found) & (found >= 0)))[:1]:
                    raise ValueError(
                        f"plan: a rate must be finite and not negative, but a schedule gives {found[wrong]} at step "
                        f"{counts[wrong]}. Correct the schedule."
                    )
            known[id(schedule)] = None if found is None or found.shape != (len(counts),) else found.astype(np.float64)
        return known[id(schedule)]

    return values


def asked(where: str, mask: Any, params: Any, leaves: Sequence[tuple[str, Any]], rule: str) -> list[Decision]:
    """What a mask decides on each leaf. `rule` is what None is called."""
    answers = flags(where, mask, params, leaves, of_all=True)
    if isinstance(mask, Rules):
        found = decisions(mask, where, leaves)
        return [(d or Decision(False, ""))._replace(value=flag) for d, flag in zip(found, answers, strict=True)]
    return [Decision(flag, rule if mask is None else "mask") for flag in answers]


def row_of(
    leaf: Leaf,
    is_decayable: bool,
    chosen: Decision,
    rate: Decision,
    kept: Decision,
    learning_rate: Decision | None = None,
    *,
    values: Callable[[Any], np.ndarray | None] = _never_known,
) -> Planned:
    """The row of a parameter, from what the mask, the rate and the mask of the frozen ones say.

    With a learning rate, it also has the fractions of a weight that steps remove. `values` evaluates schedules.
    """
    said, factors = [chosen], [0.0]
    if not is_decayable:
        said = [Decision(False, _NO_NUMBER, "not a real number")]
    elif kept.value is True:
        said = [kept._replace(rule=f"frozen: {kept.rule}")]
    elif chosen.value is not False:
        if rate.rule:
            said = [rate] if chosen.rule == "all" else [chosen, rate]
        factors = [*rate.factors, rate.value, chosen.value, np.logical_not(kept.value)]
    dtype = np.dtype(leaf.dtype).name if isinstance(leaf.dtype, (np.dtype, type)) else str(leaf.dtype)
    rule, reason = " · ".join(one.rule for one in said), "; ".join(one.reason for one in said if one.reason)
    # A schedule may be 0 at this step and not at others.
    ever = _shown(factors, leaf, _never_known)
    decays = any(ever) if isinstance(ever, tuple) else ever != 0
    of_steps: list[PlannedRate] = []
    if learning_rate is not None:
        of_step = [*factors, *learning_rate.factors, learning_rate.value]
        of_steps = [_shown(of_step, leaf, values), _shown(of_step, leaf, values, of_many=True)]
    return Planned(leaf.path, leaf.shape, dtype, decays, _shown(factors, leaf, values), rule, reason, *of_steps)


def _shown(
    factors: Sequence[Any], leaf: Leaf, values: Callable[[Any], np.ndarray | None], *, of_many: bool = False
) -> PlannedRate:
    """The product of the factors of a rate: a number, one for each layer, or a text if it is no number yet.

    With `of_many`, what is removed in all of the steps together if the product is removed in each.
    """
    stack_of("plan", leaf.path, factors)
    numbers, at_steps = np.float64(1), np.ones(1)
    names = []
    for factor in factors:
        known = values(factor) if callable(factor) else None
        if known is not None:
            at_steps = at_steps * known
        elif callable(factor):
            name = getattr(factor, "__name__", "")
            names.append(name if name.isidentifier() else "schedule")
        elif is_traced(factor):
            names.append("traced")
        else:
            numbers = numbers * np.asarray(factor.along(len(leaf.shape)) if isinstance(factor, PerLayer) else factor)
    is_array = np.ndim(numbers) > 0
    is_spread = is_array and any(np.ndim(factor) for factor in factors if not isinstance(factor, PerLayer))
    if is_spread:
        trees.check_broadcasts("plan", f"the rate of {leaf.path!r}", numbers, leaf.shape)
        numbers = np.array([numbers.min(), numbers.max()])
    numbers = np.ravel(numbers)
    rates = _removed(numbers * np.broadcast_to(at_steps, (MANY,))[:, None]) if of_many else numbers * at_steps[0]
    rate: PlannedRate = tuple(map(float, rates)) if is_array else float(rates[0])
    if is_spread:
        least, most = map(float, rates)
        rate = least if least == most else f"{show_rate(least)} to {show_rate(most)}"
    if not names or rate == 0:
        return rate
    if of_many:
        return "unknown"
    number = show_rate(rate) if isinstance(rate, float) else f"({show_rate(rate)})"
    return " × ".join(names if rate == 1 else [number, *names])


def _removed(fractions: np.ndarray) -> np.ndarray:
    """The fraction of a weight that is gone after steps that each remove a fraction; steps lie along the first axis."""
    if (fractions < 1).all():
        return 0.0 - np.expm1(np.log1p(-fractions).sum(0))  # Precise for small fractions, and never -0.0.
    return 1 - np.prod(1 - fractions, 0)


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
