"""Metrics of weight decay, measured during the step: the sizes of weights, updates and decay, by group.

`monitor` wraps a finished optimizer, changes nothing, and keeps a few scalars for each group of parameters in its
state. `scalars` reads them from any state that holds the monitor.

An update does not show which part of it is decay, so the monitor computes that part from the arguments of the decay.
For each array, one fused reduction (`_sums`) sums a few products of parameter, update and decay. All metrics are
arithmetic on these sums.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .._engine import checks, mesh_axes, trees
from .._engine.loop import Action, DecayState
from .._engine.rules import Decision, decisions, possible_values
from .._engine.steps import nodes, stepped
from .._engine.text import shown
from .._engine.types import Anchor, Mask, Optimizer, Rate
from ..low_precision import WRITERS, CompensatedState
from ..low_precision.rounding import is_low, is_narrow
from ..paths import Leaf, Rules
from ..plans import asked, row_of
from ._sums import METRICS as METRICS
from ._sums import Sums, metrics, sums

PyTree = Any
UNDECAYED = "undecayed"


class MonitorState(NamedTuple):
    """The state of `monitor`."""

    decay: DecayState  # The count of real steps, and the anchor if there is one.
    measured: dict[str, dict[str, jax.Array]]  # For each group, the metrics of the last real step: shape (), float32.
    inner_state: Any  # The state of the wrapped optimizer.


@checks.known_arguments
def monitor(
    optimizer: Optimizer,
    weight_decay: Rate = 0.0,
    mask: Mask = None,
    *,
    learning_rate: Rate = 1.0,
    toward: Anchor = None,
    groups: Rules | Callable[[Leaf], str] | None = None,
    axis_name: Hashable = None,
) -> optax.GradientTransformationExtraArgs:
    """Measures, in each step of an optimizer, what its decay and its updates do to the weights.

    Rule:   u <- the optimizer's u, unchanged. It measures u, the weights p before the step, and the decay
            d = learning_rate * weight_decay * (p - toward)
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
    Source: Kosson et al. 2024 (arXiv 2305.17212) for angular updates and equilibrium; Zamirai et al. 2020 (arXiv
            2010.06192) for decays that round away; otherwise ours.

    Sums are in float32, or in float64 for float64 parameters. Undefined values are 0: ratios to 0, angles of zero
    weights, the decay of groups that don't decay. An angle of less than a thousandth of |u| / |p| is rounding error.
    Steps are assumed to land as with `optax.apply_updates`: for parameters below float32, the angle and the shrinkage
    are those of the rounded step. If the optimizer holds a writer of `low_precision`, its rounding loses nothing in the
    long run, so nothing counts as rounded away.

    Args:
        optimizer: an `optax.GradientTransformation` or `optax.MultiSteps`, with the decay inside.
        weight_decay, mask, toward: the arguments of the decay in the optimizer; 0 if there is none. The monitor does
            not know modifiers such as `cautious` and measures the decay without them. L2 in the gradient is a decay of
            unknown size: leave weight_decay at 0 and look at the shrinkage.
        learning_rate: the factor of the decay: the number or schedule of the optimizer, or 1 for `independent_decay`.
            A schedule is called with the monitor's own count of real steps, which starts at 0. For values that change
            in `optax.inject_hyperparams`, inject the monitor too:
            `inject_hyperparams(lambda lr: monitor(adamw(lr, 0.1), 0.1, learning_rate=lr))(lr=1e-3)`.
        groups: None for one group for each rule that decays parameters, as `plan` names it, and "undecayed" for the
            rest; or `Rules` whose values are strings; or a function from a `Leaf` to a string, such as
            `lambda leaf: leaf.path`. A checkpoint of the state can be restored into monitors with the same groups.
        axis_name: within `shard_map`, the mesh axis, or a tuple of axes, that splits parameters. Every device then
            measures the whole parameters. An array that is known to be the same on all devices of the axis counts once.
            With check_vma=False nothing is known, and all arrays count as split. Under `jit` and `pmap` leave it out.

    Returns:
        An `optax.GradientTransformationExtraArgs` with a `MonitorState`. Its `update` needs `params`. In a mini-step of
        `optax.MultiSteps`, and in a step that `apply_if_finite` skips, the metrics do not change.

    Raises: as `decoupled_decay`; a TypeError also if `optimizer` is not an optimizer or groups are not strings, and at
        `init` and `update` errors for groups that don't fit params.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> mask = wdjax.only("kernel")
        >>> optimizer = wdjax.monitor(wdjax.adamw(0.5, 0.1, mask), 0.1, mask, learning_rate=0.5)
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
    action = Action(where, {"weight_decay": weight_decay, "learning_rate": learning_rate}, mask, toward)
    _check_groups(where, groups)
    axes = mesh_axes.names(where, axis_name)

    def init_fn(params: PyTree) -> MonitorState:
        trees.parameters(where, params)
        measured = _nothing_measured(action, groups, params)
        # The decay itself warns of arrays that occur twice.
        return MonitorState(action.init(params, aliases=lambda path: False), measured, inner.init(params))

    def update_fn(updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any) -> tuple[PyTree, MonitorState]:
        checks.params_given(where, params)
        updates, after = inner.update(updates, state.inner_state, params, **extra_args)
        measured = _measured(action, groups, updates, state._replace(inner_state=after), params, axes)
        flags = jnp.array(stepped(state.inner_state, after), bool)
        count = state.decay.count
        next_count = optax.safe_increment(count)
        if flags.size:
            is_step = jnp.all(flags)
            measured = jax.tree.map(lambda new, old: jnp.where(is_step, new, old), measured, state.measured)
            next_count = jnp.where(is_step, next_count, count)
        return updates, MonitorState(state.decay._replace(count=next_count), measured, after)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@checks.known_arguments
def scalars(opt_state: PyTree, prefix: str = "") -> dict[str, jax.Array]:
    """Reads what `monitor` measured in the last step, as a flat dictionary to log.

    Call it on the state after `update`, inside or outside the compiled step. TensorBoard, Weights & Biases and clu
    group plots by the "/" in names.

    Args:
        opt_state: the state of an optimizer with a `monitor` anywhere in it, or an object that holds the state: a
            `TrainState`, an `nnx.Optimizer` or its `nnx.state`, a checkpoint that was restored into dictionaries.
        prefix: a string before each name, such as "train/".

    Returns: {prefix + "group/metric": value} for every monitor in the state. Values are 0-d float32 arrays; under
        `vmap` and `pmap` they have more axes. `jax.device_get` turns them all into NumPy scalars at once.
    Raises: a ValueError if the state holds no monitor, or several monitors with the same group name.

    Example:

        >>> import jax.numpy as jnp, optax, wdjax
        >>> optimizer = optax.chain(optax.clip(1.0), wdjax.monitor(optax.sgd(0.1)))
        >>> params = {"w": jnp.array([3.0, 4.0])}
        >>> _, state = optimizer.update(params, optimizer.init(params), params)
        >>> float(wdjax.scalars(state, "train/")["train/undecayed/weight_norm"])
        5.0
    """
    found: dict[str, jax.Array] = {}
    monitors = _monitors(opt_state)
    if not monitors:
        raise ValueError(
            "scalars: there is no MonitorState in this state. Wrap the optimizer before init: "
            "monitor(optax.adamw(1e-3, weight_decay=0.1), 0.1, learning_rate=1e-3)."
        )
    for measured in monitors:
        for path, value in trees.flatten_with_paths(measured):
            if prefix + path in found:
                what = f"scalars: {len(monitors)} monitors in this state measure {path!r}."
                write = "Give their groups different names: monitor(..., groups=lambda leaf: 'encoder')."
                raise ValueError(f"{what} {write}")
            found[prefix + path] = value
    return found


def _monitors(state: PyTree) -> list[Any]:
    """What each monitor in a state measured."""
    found = []
    for node in jax.tree.leaves(state, is_leaf=_is_monitor):
        if _is_monitor(node):
            fields = node._asdict() if isinstance(node, MonitorState) else node
            found += [fields["measured"], *_monitors(fields["inner_state"])]
    return found


def _is_monitor(node: Any) -> bool:
    # NNX and checkpoints turn named tuples into mappings.
    return isinstance(node, MonitorState) or (isinstance(node, Mapping) and set(node) == set(MonitorState._fields))


def _nothing_measured(action: Action, groups: Any, params: PyTree) -> Any:
    leaves = trees.flatten_with_paths(params)
    if not leaves:
        # `optax.tree.map_params` calls init on an empty tree; one leaf then stands for any groups.
        return jnp.zeros([], jnp.float32)
    labels = dict.fromkeys(label for label in _labels(action, groups, params, leaves) if label is not None)
    return {label: {name: jnp.zeros([], jnp.float32) for name in METRICS} for label in labels}


def _check_groups(where: str, groups: Any) -> None:
    write = f"{where}(..., groups=by_path({{'embedding': 'embeddings'}}, default='rest'))"
    if isinstance(groups, Rules):
        wrong = [value for value in possible_values(groups) if not isinstance(value, str)]
        if wrong:
            raise TypeError(
                f"{where}: groups must be strings, but {shown(groups)} holds {shown(wrong[0])}. Write {write}."
            )
    elif groups is not None and (not callable(groups) or isinstance(groups, type)):
        raise TypeError(
            f"{where}: groups must be Rules of strings, or a function from a Leaf to a string, got {shown(groups)}. "
            f"Write {write}, or groups=lambda leaf: leaf.path for one group per array."
        )


def _labels(action: Action, groups: Any, params: PyTree, leaves: Sequence[tuple[str, Any]]) -> list[str | None]:
    """The group of each leaf; None for leaves that can't decay."""
    if groups is None:
        return _rules(action, params, leaves)
    if isinstance(groups, Rules):
        found = decisions(groups, action.where, leaves)
        return [d.value if d and trees.is_decayable(leaf) else None for d, (_, leaf) in zip(found, leaves, strict=True)]
    labels: list[str | None] = []
    for path, leaf in leaves:
        label = groups(trees.describe(path, leaf)) if trees.is_decayable(leaf) else None
        if trees.is_decayable(leaf) and not isinstance(label, str):
            raise TypeError(f"{action.where}: groups must return a string, but returned {shown(label)} for {path!r}.")
        labels.append(label)
    return labels


def _rules(action: Action, params: PyTree, leaves: Sequence[tuple[str, Any]]) -> list[str | None]:
    """For each leaf that decays, the rule that decides so, as `plan` shows it."""
    rate = action.rates["weight_decay"]
    chosen = asked(action.where, action.mask, params, leaves, "all")
    rates = decisions(rate, action.where, leaves) if isinstance(rate, Rules) else [Decision(rate, "")] * len(leaves)
    labels: list[str | None] = []
    for acts, (path, leaf), choice, rated in zip(action.acts_on(params, leaves), leaves, chosen, rates, strict=True):
        label = UNDECAYED if trees.is_decayable(leaf) else None
        if acts:
            shown = row_of(trees.describe(path, leaf), True, choice, rated or Decision(0.0, ""), Decision(False, ""))
            label = shown.rule.replace("'", "")
        labels.append(label)
    return labels


def _measured(
    action: Action, groups: Any, updates: PyTree, state: MonitorState, params: PyTree, axes: mesh_axes.Names
) -> dict[str, dict[str, jax.Array]]:
    """The metrics of each group. `state` holds the decay before the step, and the optimizer's state after it."""
    # A writer of low precision in the optimizer sets the parameters that it acts on.
    kinds = {type(node) for node in nodes(state.inner_state, WRITERS)}
    is_written = is_narrow if CompensatedState in kinds else is_low if kinds else lambda leaf: False
    leaves = trees.flatten_with_paths(params)
    labels, terms = _labels(action, groups, params, leaves), action.terms(params, leaves, state.decay)
    found, _ = trees.beside(action.where, updates, params, [path for path, _ in leaves])
    parts = []
    for (path, param), label, update, term in zip(leaves, labels, found, terms, strict=True):
        if label is not None:
            update = update if trees.is_decayable(update) else jnp.zeros_like(param)
            checks.same_shape(action.where, path, update, param)
            with jax.numpy_dtype_promotion("standard"):  # A real rate may multiply complex weights.
                parts.append((label, sums(update, param, term, is_written(param)), param))
    if not parts:
        return _nothing_measured(action, groups, params)
    totals = mesh_axes.added_up(action.where, parts, axes, jnp.float32)
    values = metrics(Sums(*(jnp.stack(column) for column in zip(*totals.values(), strict=True))))
    return {label: {name: values[name][i] for name in METRICS} for i, label in enumerate(totals)}
