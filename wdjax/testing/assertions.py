"""Assertions about optimizers, whoever built them, and about plans."""

import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from .._engine import checks, trees
from .._engine.arithmetic import compute_dtype
from .._engine.loop import Action, DecayState
from .._engine.text import shown
from .._engine.types import Anchor, Mask, Optimizer, Params, Rate
from .._engine.unstable import whole
from ..audits import Audit, audit
from ..audits.findings import NAMES
from ..plans import Plan
from ..plans.table import show_rate


@checks.known_arguments
def assert_only_decays(
    optimizer: optax.GradientTransformation, params: Params, expected: Rate, mask: Mask = None, *, toward: Anchor = None
) -> None:
    """Asserts that, with zero gradients, one step removes the fraction `expected` of each weight, and nothing else.

    The optimizer takes one step from a probe: `params` with every number moved away from zero by one, so that a decay
    also shows on biases that start at zero. It is initialized at the probe, or with `toward` at `params`. The update
    must be -expected * (p - toward), up to a few roundings of its own and one of a float32 weight, and change some bit,
    or none if `expected` is 0. Only the first step is tested, so no learning rate may warm up from 0. `assert_audit`
    also covers later steps, gradients, `MultiSteps`, and chains that end in `stochastic_rounding` or `compensated`.

    A constraint that moves the probe fails, and a sphere rescales weights by about one rounding even if they obey it.
    For such a chain, write `assert_audit(optimizer, params, expected=0.0)`, and test the norms of the weights.

    Args:
        optimizer: any finished Optax optimizer, wdjax or not.
        params: a tree of parameters.
        expected: the fraction of a weight that one step removes, such as learning_rate * weight_decay for decoupled
            decay: a number >= 0, or a `by_path` table.
        mask: which parameters should decay.
        toward: the anchor: None for zero, or a tree like params (`params` itself for `toward="init"`).

    Raises: AssertionError with the parameter, what was expected and what happened; TypeError, ValueError for arguments
            that are not as above.

    Example:

        >>> import jax.numpy as jnp, wdjax, wdjax.testing
        >>> params = {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}
        >>> optimizer = wdjax.adamw(0.1, 0.01, wdjax.only("kernel"))
        >>> wdjax.testing.assert_only_decays(optimizer, params, 0.1 * 0.01, wdjax.only("kernel"))
    """
    where = "assert_only_decays"
    optimizer = checks.finished(where, optimizer, f"{where}(optax.adamw(1e-3), params, 1e-7)")
    action = Action(where, {"expected": expected}, mask, toward)
    trees.parameters(where, params)

    def moved_from_zero(x: Any) -> Any:
        return x + jnp.where(jnp.real(x) < 0, -1, 1).astype(jnp.asarray(x).dtype) if trees.is_decayable(x) else x

    probe = jax.tree.map(moved_from_zero, params)
    state = optimizer.init(probe if toward is None else params)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, probe)
    chex.assert_trees_all_equal_structs(updates, probe)
    leaves = trees.flatten_with_paths(probe)
    terms = action.terms(probe, leaves, DecayState(jnp.zeros([], jnp.int32)))
    both = (updates, optax.apply_updates(probe, updates))
    moves, results = ([leaf for _, leaf in trees.flatten_with_paths(tree)] for tree in both)
    for (path, before), update, after, term in zip(leaves, moves, results, terms, strict=True):
        if trees.is_hole(before) or jnp.size(before) == 0:
            continue
        is_still = term is None or not np.any(term.known())
        fault = _fault_if_touched(before, after) if is_still else _fault_unless_decayed(before, update, after, term)
        if fault:
            raise AssertionError(f"assert_only_decays: {path!r} {fault}")


def assert_audit(
    optimizer: Optimizer | Callable[[Any], Optimizer],
    params: Params,
    expected: Rate | None = None,
    mask: Mask = None,
    *,
    allow: str | Sequence[str] = (),
    **options: Any,
) -> Audit:
    """Asserts that an audit finds nothing wrong or suspect in an optimizer, and returns the audit for more assertions.

    Args:
        optimizer, params, expected, mask: as `wdjax.audit`.
        allow: one name of a finding that you accept, or several: "seen by the moments" for L2 regularization.
        **options: as `wdjax.audit`: learning_rate, frozen, steps, extra_args, full_size.

    Returns: the audit.
    Raises: AssertionError with what was found; ValueError for a name that no finding has; otherwise as `wdjax.audit`.

    Example:

        >>> import jax.numpy as jnp, optax, wdjax, wdjax.testing
        >>> params = {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}
        >>> optimizer = optax.lion(0.1, weight_decay=0.01, mask=wdjax.only("kernel").mask)
        >>> audit = wdjax.testing.assert_audit(optimizer, params, 0.1 * 0.01, wdjax.only("kernel"))
        >>> audit["kernel"].place, audit["kernel"].kind, audit["kernel"].toward
        ('update', 'L2', 'zero')
    """
    __tracebackhide__ = True  # So pytest shows the audit and not this function.
    allow = (allow,) if isinstance(allow, str) else allow
    if unknown := [name for name in allow if name not in NAMES]:
        known = ", ".join(map(repr, sorted(NAMES)))
        raise ValueError(f"assert_audit: no finding is named {shown(unknown[0])}. The names are: {known}.")
    report = audit(optimizer, params, expected, mask, **options)
    faults = [finding for finding in report.findings if finding.harm != "note" and finding.name not in allow]
    if faults:
        accept = "To accept a finding, write its name into allow=[...]."
        raise AssertionError("\n  ".join(("assert_audit:", *map(str, faults))) + f"\n{accept}\n\n{report.table()}")
    return report


def assert_plan(plan: Plan, golden: Mapping[str, Any] | str | os.PathLike[str]) -> None:
    """Asserts that a plan equals the golden one, so that no change of the model changes the decay unnoticed.

    Args:
        plan: `wdjax.plan(params, weight_decay, mask)`; `params` may come from `jax.eval_shape`.
        golden: the path of a text file with a rate, a tab and a path in each line, as `plan.text()` writes it. Or a
            dictionary from every canonical path to its rate, or to True or False for whether it decays.

    Raises: AssertionError with the differences and how to accept them; FileNotFoundError with the line that writes the
            file; TypeError if `plan` is not a plan.

    Example:

        >>> import jax.numpy as jnp, wdjax, wdjax.testing
        >>> params = {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}
        >>> wdjax.testing.assert_plan(wdjax.plan(params, 0.1, wdjax.weights_only()), {"kernel": 0.1, "bias": 0.0})
    """
    __tracebackhide__ = True  # So pytest shows the plan and not this function.
    if not isinstance(plan, Plan):
        got = type(plan).__name__
        raise TypeError(f"assert_plan: plan must be a Plan, got a {got}. Write assert_plan(wdjax.plan(params), file).")
    if isinstance(golden, Mapping):
        wanted, accept = dict(golden), "change the dictionary"
    else:
        file = pathlib.Path(golden)
        accept = f"write it: pathlib.Path({str(golden)!r}).write_text(plan.text(), encoding='utf-8')"
        if not file.exists():
            raise FileNotFoundError(f"assert_plan: the file {golden} does not exist. Check print(plan), and {accept}.")
        rows = (line.partition("\t") for line in file.read_text(encoding="utf-8").split("\n") if line)
        wanted = {path: rate for rate, _, path in rows}
    changed, new = [], []
    for planned in plan.parameters:
        path, rate = planned.path, show_rate(planned.rate)
        if path not in wanted:
            new.append(f"{path!r} is new, with the rate {rate}")
            continue
        want = wanted.pop(path)
        if isinstance(want, (bool, np.bool_)):
            if planned.decays != want:
                changed.append(f"{path!r} {'decays' if planned.decays else 'does not decay'}, by {planned.rule}")
        elif rate != (want if isinstance(want, str) else show_rate(np.float64(want).tolist())):
            changed.append(f"{path!r} has the rate {rate}, not {want}, by {planned.rule}")
    faults = [*changed, *(f"{path!r} is missing" for path in wanted), *new]
    if faults:
        more = [f"and {len(faults) - 20} more"] if len(faults) > 20 else []
        listed = "\n  ".join(("the plan differs from the golden one:", *faults[:20], *more))
        raise AssertionError(f"assert_plan: {listed}\nIf this is intended, {accept}.")


def _fault_if_touched(before: Any, after: Any) -> str | None:
    old, new = whole(before), whole(after)
    if old.dtype == new.dtype and old.tobytes() == new.tobytes():
        return None
    return f"must stay bit-identical with zero gradients, but one step moved it from {old.flat[0]} to {new.flat[0]}."


def _fault_unless_decayed(before: Any, update: Any, after: Any, term: Any) -> str | None:
    fraction, anchor = term.known(), 0.0 if term.anchor is None else term.anchor
    arrays = [whole(x) for x in (before, update, after, anchor)]
    old, move, new, to = (x.astype(np.complex128 if np.iscomplexobj(x) else np.float64) for x in arrays)
    wanted = -fraction * (old - to)
    shown = ", ".join(f"{one:g}" for one in np.ravel(fraction))
    must = f"must lose {shown} of its distance to the anchor in one step"
    allowed = 4 * float(jnp.finfo(update.dtype).eps) * np.abs(wanted)
    allowed += 2 * float(jnp.finfo(compute_dtype(before)).eps) * np.abs(old)
    excess = np.abs(move - wanted) - allowed
    excess = np.where(np.isnan(excess), np.inf, excess)
    worst = int(np.argmax(excess))
    if excess.flat[worst] > 0:
        got, want = move.flat[worst], wanted.flat[worst]
        hint = ""
        if got == 0:
            hint = " Does it decay at all? Is the learning rate of the first step 0?"
        elif np.real(got * np.conj(want)) < 0:
            hint = " It grows. Is the decay on the wrong side of the learning rate?"
        return f"{must}, but the update of its element {worst}, {old.flat[worst]}, is {got} and not {want}.{hint}"
    fractions = np.broadcast_to(fraction, old.shape)
    for one in np.unique(fractions[fractions != 0]):
        if np.all((old == new)[fractions == one]):
            part = "it" if np.ndim(fraction) == 0 else f"the part that must lose {one:g}"
            return f"{must}, but no bit of {part} changed. Such a small step rounds to nothing in {before.dtype}."
    return None
