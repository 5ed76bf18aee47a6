"""The wrapper that measures: it runs the optimizer, finds its decays, and keeps the metrics of the last real step."""

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .._engine import anchors, checks, mesh_axes, trees
from .._engine.arithmetic import Term
from .._engine.loop import Action, DecayState
from .._engine.steps import learning_rates, nodes, stepped
from .._engine.types import Anchor, Mask, Optimizer, Rate
from ..low_precision import WRITERS, CompensatedState
from ..low_precision.rounding import is_low, is_narrow
from ..paths import Leaf, Rules
from ._groups import check_groups, labels_of
from ._reading import Found, rate_of_all_decays, read, try_to_read
from ._sums import METRICS, Sums, metrics, ratio, sums

PyTree = Any


class MonitorState(NamedTuple):
    """The state of `monitor`.

    Attributes:
        decay: the count of real steps, and the anchor if there is one.
        measured: for each group, the metrics of the last real step: shape (), float32.
        rates: the learning rate of that step, if the monitor was given a number or a schedule.
        inner_state: the state of the wrapped optimizer.

    Example:

        >>> import jax.numpy as jnp, optax, wdjax
        >>> list(wdjax.monitor(optax.sgd(0.1)).init(jnp.ones(2)).measured)
        ['undecayed']
    """

    decay: DecayState
    measured: dict[str, dict[str, jax.Array]]
    rates: dict[str, jax.Array]
    inner_state: Any


@checks.known_arguments
def monitor(
    optimizer: Optimizer,
    weight_decay: Rate | None = None,
    mask: Mask = None,
    *,
    learning_rate: Rate | None = None,
    toward: Anchor = None,
    groups: Rules | Callable[[Leaf], str] | None = None,
    axis_name: Hashable = None,
) -> optax.GradientTransformationExtraArgs:
    """Measures, in each step of an optimizer, what its decay and its updates do to the weights.

    Rule:   u <- the optimizer's u, unchanged. It measures u, the weights p before the step, and the decay d in u, read
            from the optimizer; or if it is given, d = learning_rate * weight_decay * (p - toward)
    Place:  around the whole optimizer, within `freeze`, directly before `optax.apply_updates`.
    Units:  per step. For each group, as one vector:

            weight_norm      |p|
            weight_rms       |p| / sqrt(number of weights): with AdamW and noisy gradients about sqrt(eta / (2 lambda))
            update_norm      |u|
            decay_norm       |d|
            decay_to_update  |d| / |u|
            angular_update   the angle from p to where the step lands, in radians
            effective_rate   |d| / |p - toward|: eta * lambda, or a mean where rates differ
            shrinkage        -<step, p> / <p, p>, the fraction by which the step shrinks the weights: with zero
                             gradient the effective rate, in equilibrium about 0
            rounded_away     of the weights that d should move, the fraction that land where they would without it
            decay_landed     the fraction of d in the step as it lands: 1 in exact arithmetic, 0 if rounding removes all
                             of it in each step, about 1 if different weights are rounded a step further each time
            weight_decay     lambda: the effective rate, divided by the learning rate unless the decay is independent of
                             it. Only for groups that decay in one of these ways, if the learning rate is known
    Source: Kosson et al. 2024 (arXiv 2305.17212) for angular updates and equilibrium; Zamirai et al. 2020 (arXiv
            2010.06192) for decays that round away; otherwise ours.

    Sums are in float32, or in float64 for float64 parameters. Undefined values are 0: ratios to 0, angles of zero
    weights, the decay of groups that don't decay. An angle of less than a thousandth of |u| / |p| is rounding error.
    Steps are assumed to land as with `optax.apply_updates`: for parameters below float32, the angle and the shrinkage
    are those of the rounded step. If the optimizer holds a writer of `low_precision`, its rounding loses nothing in the
    long run, so nothing counts as rounded away.

    Args:
        optimizer: an `optax.GradientTransformation` or `optax.MultiSteps`, with the decay inside.
        weight_decay: None to read the decays from the optimizer: `decoupled_decay`, `independent_decay` and
            `continuous_decay`, also in recipes and in `cautious`, and `with_decoupled_decay`. The derivative of the
            update with respect to a factor of all decays tells what they are after everything that follows them. For
            another decay, such as that of `optax.adamw`, its weight_decay. The monitor then computes d from the
            arguments and does not know what follows. 0 if there is no decay. L2 in the gradient is a decay of unknown
            size: look at the shrinkage.
        mask, toward: with a weight_decay, the arguments of the same decay.
        learning_rate: with a weight_decay, the factor of the decay: the number or schedule of the optimizer, or 1 for
            an independent decay. A schedule is called with the monitor's own count of real steps, which starts at 0.
            With None it is the learning rate that `optax.inject_hyperparams` keeps, or else 1. Without a weight_decay,
            a learning rate is only needed for the metric weight_decay, and to log it with `scalars`.
        groups: None for one group for each rule that decays parameters, as `plan` names it ("a + b" for two decays by
            the rules a and b), and "undecayed" for the rest; or `Rules` whose values are strings; or a function from a
            `Leaf` to a string, such as `lambda leaf: leaf.path`. A checkpoint of the state can be restored into
            monitors with the same groups.
        axis_name: within `shard_map`, the mesh axis, or a tuple of axes, that splits parameters. Every device then
            measures the whole parameters. An array that is known to be the same on all devices of the axis counts once.
            With check_vma=False nothing is known, and all arrays count as split. Under `jit` and `pmap` leave it out.

    Returns:
        An `optax.GradientTransformationExtraArgs` with a `MonitorState`. Its `update` needs `params`. In a mini-step of
        `optax.MultiSteps`, and in a step that `apply_if_finite` skips, the metrics do not change.

    Raises: as `decoupled_decay`; a TypeError also if `optimizer` is not an optimizer or groups are not strings; a
        ValueError for a mask or an anchor without a weight_decay, for a weight_decay with several injected learning
        rates, and at `init` if the decays can't be read; and at `init` and `update` errors for groups that don't fit
        params.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> optimizer = wdjax.monitor(wdjax.adamw(0.5, 0.1, wdjax.only("kernel")))
        >>> params = {"kernel": jnp.array([3.0, 4.0]), "bias": jnp.array([2.0])}
        >>> updates, state = optimizer.update({k: jnp.zeros_like(p) for k, p in params.items()},
        ...                                   optimizer.init(params), params)
        >>> kernel = state.measured["kernel"]
        >>> [round(float(kernel[name]), 4) for name in ("weight_norm", "decay_norm", "effective_rate", "shrinkage")]
        [5.0, 0.25, 0.05, 0.05]
        >>> sorted(wdjax.scalars(state))[-2:]
        ['undecayed/weight_norm', 'undecayed/weight_rms']
    """
    where = "monitor"
    inner = checks.finished(where, optimizer, f"{where}(optax.adamw(1e-3, weight_decay=0.1), 0.1, learning_rate=1e-3)")
    is_told = weight_decay is not None
    if not is_told and not (mask is None and toward is None):
        raise ValueError(
            f"{where}: mask and toward belong to a weight_decay, and none is given. Write {where}(optimizer) to read "
            f"the decays from the optimizer, or {where}(optimizer, 0.1, mask) to give all arguments."
        )
    factors = {
        "weight_decay": 0.0 if weight_decay is None else weight_decay,
        "learning_rate": 1.0 if learning_rate is None else learning_rate,
    }
    given = Action(where, factors, mask, toward)
    check_groups(where, groups)
    axes = mesh_axes.names(where, axis_name)

    def action_and_rate(inner_state: Any, count: Any) -> tuple[Action, Any]:
        """The decay as it was given, and the learning rate, if it is known and one number for all parameters."""
        rate = given.rates["learning_rate"]
        if learning_rate is not None:
            return given, rate(jnp.asarray(count)) if callable(rate) else None if isinstance(rate, Rules) else rate
        if not is_told:
            return given, rate_of_all_decays(inner_state)
        found = learning_rates(inner_state)
        if len(found) > 1:
            raise ValueError(
                f"{where}: the optimizer holds {len(found)} learning rates. Say which one multiplies the decay, "
                f"{where}(optimizer, 0.1, learning_rate=schedule), or {where}(optimizer) to read the decays from it."
            )
        rate = found[0] if found else 1.0
        return dataclasses.replace(given, rates={**given.rates, "learning_rate": rate}), rate

    def kept(rate: Any) -> dict[str, jax.Array]:
        is_given = learning_rate is not None and rate is not None
        return {"learning_rate": jnp.asarray(rate, jnp.float32)} if is_given else {}

    def init_fn(params: PyTree) -> MonitorState:
        trees.parameters(where, params)
        inner_state = inner.init(params)
        # The decay itself warns of arrays that occur twice.
        decay = given.init(params, aliases=lambda path: False)
        action, rate = action_and_rate(inner_state, decay.count)
        found = Found()
        if is_told:
            found.report(action, params)
        elif trees.flatten_with_paths(params):
            try_to_read(inner, found, inner_state, params)
        measured = _nothing_measured(found, groups, params, rate)
        return MonitorState(decay, measured, jax.tree.map(jnp.zeros_like, kept(rate)), inner_state)

    def update_fn(updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any) -> tuple[PyTree, MonitorState]:
        checks.params_given(where, params)
        leaves, found, count = trees.flatten_with_paths(params), Found(), state.decay.count
        if is_told:
            updates, after = inner.update(updates, state.inner_state, params, **extra_args)
            action, rate = action_and_rate(after, count)
            found.report(action, params)
            terms, decays = action.terms(params, leaves, state.decay), {}
        else:
            decays, (updates, after) = read(inner, found, updates, state.inner_state, params, **extra_args)
            rate = action_and_rate(after, count)[1]
            pulled_to = found.anchors(state.inner_state)
            terms = [Term((), anchor=pulled_to[path]) if path in decays else None for path, _ in leaves]
        measured, rates = _measured(found, groups, updates, after, params, axes, rate, terms, decays), kept(rate)
        flags = jnp.array(stepped(state.inner_state, after), bool)
        next_count, is_step = optax.safe_increment(count), None
        if flags.size:
            is_step = jnp.all(flags)
            before = state.measured, state.rates
            measured, rates = jax.tree.map(lambda new, old: jnp.where(is_step, new, old), (measured, rates), before)
            next_count = jnp.where(is_step, next_count, count)
        anchor = anchors.moved(where, toward, state.decay.anchor, params, is_step)
        return updates, MonitorState(state.decay._replace(count=next_count, anchor=anchor), measured, rates, after)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _nothing_measured(found: Found, groups: Any, params: PyTree, rate: Any) -> Any:
    leaves = trees.flatten_with_paths(params)
    if not leaves:
        # `optax.tree.map_params` calls init on an empty tree; one leaf then stands for any groups.
        return jnp.zeros([], jnp.float32)
    labels, paths = labels_of(found, groups, leaves), [path for path, _ in leaves]
    measured = {}
    for label in dict.fromkeys(label for label in labels if label is not None):
        is_known = found.is_rate_scaled(label, labels, paths, rate) is not None
        names = (*METRICS, "weight_decay") if is_known else METRICS
        measured[label] = {name: jnp.zeros([], jnp.float32) for name in names}
    return measured


def _measured(
    found: Found,
    groups: Any,
    updates: PyTree,
    inner_state: Any,
    params: PyTree,
    axes: mesh_axes.Names,
    rate: Any,
    terms: Sequence[Term | None],
    decays: Mapping[str, jax.Array],
) -> dict[str, dict[str, jax.Array]]:
    """The metrics of each group. `terms` has the decay of each leaf, and `decays` those that were read, by path."""
    # A writer of low precision in the optimizer sets the parameters that it acts on.
    kinds = {type(node) for node in nodes(inner_state, WRITERS)}
    is_written = is_narrow if CompensatedState in kinds else is_low if kinds else lambda leaf: False
    leaves = trees.flatten_with_paths(params)
    labels, paths = labels_of(found, groups, leaves), [path for path, _ in leaves]
    each, _ = trees.beside("monitor", updates, params, paths)
    parts = []
    for (path, param), label, update, term in zip(leaves, labels, each, terms, strict=True):
        if label is not None:
            update = update if trees.is_decayable(update) else jnp.zeros_like(param)
            checks.same_shape("monitor", path, update, param)
            with jax.numpy_dtype_promotion("standard"):  # A real rate may multiply complex weights.
                parts.append((label, sums(update, param, term, is_written(param), decays.get(path)), param))
    if not parts:
        return _nothing_measured(found, groups, params, rate)
    totals = mesh_axes.added_up("monitor", parts, axes, jnp.float32)
    values = metrics(Sums(*(jnp.stack(column) for column in zip(*totals.values(), strict=True))))
    measured = {label: {name: values[name][i] for name in METRICS} for i, label in enumerate(totals)}
    for label, row in measured.items():
        is_scaled = found.is_rate_scaled(label, labels, paths, rate)
        if is_scaled is not None:
            scale = jax.lax.stop_gradient(jnp.asarray(rate, jnp.float32)) if is_scaled else jnp.ones([], jnp.float32)
            row["weight_decay"] = ratio(row["effective_rate"], scale)
    return measured
