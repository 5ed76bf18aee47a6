"""Measures what an optimizer really does to weights, whoever built it.

`audit` runs an optimizer's own `init` and `update` on small probe weights and gradients (`_probes`). From the results
it derives where, how fast, toward what and in which way each parameter decays (`_measures`), also behind moments
(`_moments`), beside step sizes in the state (`_step_sizes`) and beside constraints (`_constraints`). It looks for
unexpected results (`findings`) and reports them (`_report`): a table to read, and values to assert on.
"""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .._engine import checks, trees
from .._engine.hazards import smallest_fraction
from .._engine.loop import Action, DecayState
from .._engine.masks import flags
from .._engine.rules import check_booleans
from .._engine.steps import nodes
from .._engine.text import shown
from .._engine.types import Mask, Optimizer, Params, Rate
from ..low_precision import WRITERS, CompensatedState
from ..low_precision.rounding import is_low
from ..low_precision.writers import NARROW_UPDATES
from ..paths import Rules
from ..paths.parameters import parameter_at
from ..paths.roles import role
from ._facts import Facts
from ._measures import measure
from ._moments import look_behind_the_moments
from ._probes import Probes
from ._progress import progress
from ._report import Audit as Audit
from ._rows import Audited as Audited
from ._rows import Finding as Finding
from ._skips import moved_in_skipped_steps
from ._states import drift_of
from ._step_sizes import find_step_sizes
from ._tracing import values_are_unknown
from .findings import findings_of

PyTree = Any
_LONGEST_RUN = 8192  # Most steps for a test whether a decay survives rounding.
_SMALL_MODEL = 2**24  # Models with at most this many parameters may be probed at full size even without full_size.


@checks.known_arguments
def audit(
    optimizer: Optimizer | Callable[[Any], Optimizer],
    params: Params,
    expected: Rate | None = None,
    mask: Mask = None,
    *,
    learning_rate: optax.ScalarOrSchedule | None = None,
    frozen: Mask = None,
    steps: Sequence[int] = (0, 10, 100, 1000),
    extra_args: Mapping[str, Any] | None = None,
    full_size: bool = False,
) -> Audit:
    """Measures which decay an optimizer applies, wdjax or not: its rate, place, kind and anchor for each parameter.

    The optimizer's own `init` and `update` run on probe weights and gradients, with and without each, from new states
    and after steps. Arrays of more than 65,536 elements are probed by copies with axes of at most 128 (8 for further
    layers), so a large model costs little. Rules of wdjax decide on the copies as on the model itself.

    A rate is a fraction of a weight per real step: learning_rate * weight_decay for `decoupled_decay`. It is the part
    of the first real step, with zero gradient, that changes sign with the weight's distance to the anchor, divided by
    that distance. Where a decay acts only beside a gradient, it is the rate there.

    Args:
        optimizer: a finished `optax.GradientTransformation` or an `optax.MultiSteps`. Or a function that makes one from
            a learning rate, `lambda lr: optax.adamw(lr)`, to see whether the decay scales with the learning rate.
        params: a tree of arrays or `jax.ShapeDtypeStruct`s. Structure, shapes and dtypes matter, values do not.
        expected: the rate that you expect in the first real step: a number, a schedule (for all `steps`) or a
            `by_path` table.
        mask: which parameters should decay, at the rate `expected` if it is given.
        learning_rate: the number or schedule of the optimizer. With a schedule, the audit tests whether the decay
            follows it. If `optimizer` is a function, it is called with this value (1e-3 if left out).
        frozen: a mask, as for `freeze`. It is a finding if these parameters move or decay. Integers must never move.
        steps: the counts at which rates are measured.
        extra_args: keyword arguments for `update`, the same for all probes: {"value": 1.0}.
        full_size: whether to probe with arrays of full size, for other libraries' rules that depend on it. This costs
            about twenty training steps.

    Returns: an `Audit`.
    Raises: TypeError, ValueError for what is not an optimizer, for masks and rates that `decoupled_decay` refuses, for
            optimizers that look at values, and so do not run under `jax.jit`, and for other arguments that are not as
            above. Errors of the optimizer itself are passed on.

    Example:

        >>> import jax.numpy as jnp, optax, wdjax
        >>> params = {"Dense_0": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
        >>> print(wdjax.audit(lambda lr: optax.adamw(lr, weight_decay=0.1), params))
        path            arrays   shape    dtype    rate  where   kind  toward  x learning rate  kept
        --------------------------------------------------------------------------------------------
        Dense_0/bias         1    (3,)  float32  0.0001  update  L2    zero    yes              100%
        Dense_0/kernel       1  (4, 3)  float32  0.0001  update  L2    zero    yes              100%
        <BLANKLINE>
        suspect [decays non-weights]: the decay acts on a bias, a norm or another parameter that
            is not a layer's weight: 0.0001 per step ('Dense_0/bias'). Write
            mask=weights_only(), or mask=weights_only().mask for Optax.
    """
    where, write, extra_args = "audit", "audit(optax.adamw(1e-3), params)", extra_args or {}
    _check_options(steps, extra_args, full_size)
    is_function = not isinstance(optimizer, (optax.GradientTransformation, optax.MultiSteps)) and callable(optimizer)
    build: Any = optimizer if is_function else lambda _: optimizer
    if is_function and learning_rate is None:
        learning_rate = 1e-3
    with progress("audit: measuring what the optimizer does"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")  # The audit reports vanishing rates and the like itself.
        rate: Any = learning_rate
        if learning_rate is not None:
            rate = checks.rate(where, "learning_rate", learning_rate)
        finished = checks.finished(where, build(rate), write)
        leaves = trees.parameters(where, params)
        # What does not fit raises its error before anything is computed.
        action = Action(where, {"expected": 0.0 if expected is None else expected}, mask)
        action.init(params)
        if isinstance(frozen, Rules):
            check_booleans(frozen, where)
        frozen_flags = [False] * len(leaves) if frozen is None else flags(where, frozen, params, leaves)
        frozen_paths = {path for (path, _), flag in zip(leaves, frozen_flags, strict=True) if flag is True}
        mask_flags = flags(where, mask, params, leaves)
        grads = params.fast if isinstance(params, optax.LookaheadParams) else params
        with values_are_unknown():
            state = jax.eval_shape(finished.init, params)
            after = jax.eval_shape(lambda *args: finished.update(*args, **extra_args)[1], grads, state, params)
        drift, writers = drift_of(state, after), {type(node) for node in nodes(state, WRITERS)}

        def probed(optimizer: Any, longest: int | None, exact: bool) -> tuple[Probes, dict[int, Facts]]:
            with jax.enable_x64(True) if exact else contextlib.nullcontext():
                probes = Probes(optimizer, params, extra_args, longest=longest, exact=exact)
                probes.find_rhythm()
                return probes, measure(probes, steps)

        # Some optimizers do not run in float64. Optimizers that hold trees with full shapes do not run on small copies.
        size = sum(math.prod(np.shape(leaf)) for _, leaf in leaves if trees.is_decayable(leaf))
        sizes = (None,) if full_size else (128, None) if size <= _SMALL_MODEL else (128,)
        kinds = [(longest, exact) for longest in sizes for exact in (True, False)]
        try:
            probes, facts = _first_that_runs(lambda kind: probed(finished, *kind), kinds)
        except (TypeError, ValueError) as error:
            if sizes == (128,):
                error.add_note("audit probes small copies of large arrays. Does audit(..., full_size=True) run?")
            raise

        with jax.enable_x64(True) if probes.exact else contextlib.nullcontext():
            facts = find_step_sizes(probes, look_behind_the_moments(probes, facts), extra_args)
            skipped = moved_in_skipped_steps(probes)
        scales: dict[int, bool | None] = {}
        if is_function:
            halved = (lambda count: rate(count) / 2) if callable(learning_rate) else rate / 2
            others = probed(checks.finished(where, build(halved), write), probes.longest, probes.exact)[-1]
            scales = {i: not np.isclose(facts[i].row.rate, others[i].row.rate, rtol=1e-2, atol=0) for i in facts}
        elif callable(learning_rate):
            values = {count: float(rate(count)) for count in steps}
            scales = {i: _follows([(one, values[count]) for count, one in facts[i].row.rates]) for i in facts}

        def in_own_dtypes(longest: int | None) -> tuple[dict[int, float], set[int]]:
            own = Probes(finished, params, extra_args, longest=longest, exact=False)
            is_narrow = any(is_low(own.leaves[i]) for i in own.indices)
            no_number = own.without_a_number() if is_narrow else set()
            rows = {i: fact.row for i, fact in facts.items()}
            return _kept(own, writers, probes.calls, rows, can_run=not (drift[0] or no_number)), no_number

        # Thousands of steps are slow with large arrays, so small ones come first.
        kept, no_number = _first_that_runs(in_own_dtypes, (16 if probes.longest else None, probes.longest))
        calls, offset = probes.calls, probes.offset
        wanted, wanted_later, masked, later = {}, {}, {}, {}
        if expected is not None:
            wanted = _rates_at(action, params, offset // calls)
            later = {count: _rates_at(action, params, count) for count in steps}
            # A schedule says what should come later, also if it is constant.
            if callable(expected) or any(rates != wanted for rates in later.values()):
                wanted_later = {c: {path: most for path, (_, most) in rates.items()} for c, rates in later.items()}
        elif mask is not None:
            masked = {path: bool(np.any(flag)) for (path, _), flag in zip(leaves, mask_flags, strict=True)}
        meant = _meant(leaves, mask, mask_flags, expected, [wanted, *later.values()])
        shapes = {leaf.path: leaf.shape for leaf in probes.leaves}
        for i, fact in facts.items():
            path, found = fact.row.path, role(parameter_at(fact.row.path, shapes))
            row = fact.row._replace(kept=kept[i], role=found.name if found else "")
            if row.decays:
                row = row._replace(scales_with_learning_rate=scales.get(i))
            said = {"expected": wanted.get(path), "is_frozen": path in frozen_paths, "tolerance": probes.tolerance}
            said |= {
                "is_rounded_to_nearest": not writers,
                "moves_when_skipped": i in skipped,
                "should_decay": masked.get(path),
                "is_meant": path in meant,
                "expected_later": {c: at[path] for c, at in wanted_later.items()},
            }
            facts[i] = fact._replace(row=row, is_finite=fact.is_finite and i not in no_number, **said)
        narrow = next((str(each.message) for each in caught if NARROW_UPDATES in str(each.message)), "")
        integers = sorted(probes.moved_integers)
        findings = findings_of(list(facts.values()), drift, narrow, integers, offset + calls)
        return Audit(tuple(fact.row for fact in facts.values()), findings, calls, probes.first)


def _check_options(steps: Any, extra_args: Any, full_size: Any) -> None:
    counts: list[Any] = list(steps) if isinstance(steps, Iterable) and not isinstance(steps, (str, bytes)) else [None]
    if not all(checks.is_whole(count) and count >= 0 for count in counts):
        raise TypeError(f"audit: steps must be counts, integers >= 0, got {shown(steps)}. Write steps=(0, 10, 100).")
    if not isinstance(extra_args, Mapping):
        raise TypeError(
            f"audit: extra_args must map names to values, got {shown(extra_args)}. Write extra_args={{'value': 1.0}}."
        )
    if not isinstance(full_size, bool):
        raise TypeError(f"audit: full_size must be True or False, got {shown(full_size)}.")


def _first_that_runs(run: Callable[[Any], Any], kinds: Sequence[Any]) -> Any:
    """The result for the first of these kinds with which it runs."""
    for kind in kinds[:-1]:
        with contextlib.suppress(TypeError, ValueError):
            return run(kind)
    return run(kinds[-1])


def _rates_at(action: Action, params: Params, count: int) -> dict[str, tuple[float, float]]:
    """The smallest and the largest expected rate of each parameter at a count."""
    leaves = trees.flatten_with_paths(params)
    terms = action.terms(params, leaves, DecayState(jnp.asarray(count, jnp.int32)))
    rates = [0.0 if term is None else term.known() for term in terms]
    return {path: (float(np.min(x)), float(np.max(x))) for (path, _), x in zip(leaves, rates, strict=True)}


def _meant(leaves: Any, mask: Any, mask_flags: Any, expected: Any, rates: Sequence[dict[str, Any]]) -> set[str]:
    """The paths of which a mask, or else a table of rates, says that they should decay. One number doesn't say it."""
    if mask is not None:
        return {path for (path, _), flag in zip(leaves, mask_flags, strict=True) if np.any(flag)}
    is_one = not isinstance(expected, Rules) and jax.tree_util.all_leaves([expected])
    return set() if is_one else {path for at in rates for path, (_, most) in at.items() if most > 0}


def _follows(pairs: Sequence[tuple[float, float]]) -> bool | None:
    """Whether rates follow a schedule, from pairs of a rate and a learning rate; None if the pairs can't tell."""
    largest = max((lr for _, lr in pairs), default=0.0)
    pairs = [(rate, lr) for rate, lr in pairs if lr > 1e-3 * largest]
    if not pairs or largest < 1.01 * min(lr for _, lr in pairs):
        return None
    ratios = [rate / lr for rate, lr in pairs]
    if np.allclose(ratios, ratios[0], rtol=1e-2):
        return True
    return False if np.allclose([rate for rate, _ in pairs], pairs[0][0], rtol=1e-2) else None


def _kept(own: Probes, writers: set[type], calls: int, rows: dict[int, Audited], *, can_run: bool) -> dict[int, float]:
    """The share of each parameter's decay that survives rounding, with these writers of low precision."""
    shares = {}
    for i, row in rows.items():
        largest = max(abs(rate) for rate in (row.rate, *(rate for _, rate in row.rates)))
        is_lost = 0 < largest < smallest_fraction(row.dtype) and CompensatedState not in writers
        shares[i] = float(not is_lost)
        if row.needs_gradient and (is_lost or is_low(own.leaves[i])):
            shares[i] = math.nan  # Gradients move the weights too, so what is lost depends on them.
    # A writer may change nothing in one step, so low precision takes enough for four units in the last place.
    low = {i: row for i, row in rows.items() if row.decays and is_low(own.leaves[i]) and not row.needs_gradient}
    rates = [abs(row.rate) for row in low.values() if row.rate]
    if not can_run or not rates:
        return shares | dict.fromkeys(low, 1.0 if can_run else math.nan)
    narrowest = max(smallest_fraction(row.dtype) for row in low.values())
    length = calls * min(_LONGEST_RUN, 2 ** math.ceil(math.log2(max(16 * narrowest / min(rates), 8))))
    start = own.numbers(own.tree(own.weights, wide=False))
    ends = [own.trajectory(length, wide=wide) for wide in (True, False)]
    for i, row in low.items():
        # Summed over all weights, because rounding moves a single weight by more than the decay.
        meant, moved = (float(np.sum(np.sign(start[i]) * (start[i] - end[i]))) for end in ends)
        is_seen = abs(meant) >= 8 * smallest_fraction(row.dtype) * float(np.sum(np.abs(start[i])))
        shares[i] = math.nan if writers and not is_seen else moved / meant if meant else 1.0
    return shares
