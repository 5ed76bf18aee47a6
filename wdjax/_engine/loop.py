"""The loop that every place runs. It finds the rate, mask and anchor of each parameter, and applies the place's rule.

A place is an `Action` (how strong, on which parameters, toward what) and a `LeafRule` (what happens to one parameter).
The action guarantees for every place:

- The rule runs in at least float32, and in float64 if the update or the parameter is float64. The rate is converted to
  that dtype before anything is multiplied. The result has the dtype of the incoming update.
- Where the decay is permanently off (rate 0, mask False, integers, holes), the update is returned unchanged and nothing
  is computed. A rate that is 0 only in this step (a schedule, a traced rate, a part of an array) also leaves every bit,
  except for subnormal updates on hardware that flushes them to zero when it adds.
- Each schedule is evaluated once a step, however many parameters share it. A rule is traced and compiled once for all
  parameters of one shape, whatever their rates are.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from . import anchors, checks, devices, hazards, mesh_axes, trees
from .arithmetic import LeafRule, Term, act, compute_dtype, init_state, jitted_act, reduced
from .per_leaf import Leaves, Terms, known_stacks, terms_of_leaves
from .probe import DecayProbe, gated
from .rates import rate_or_rules
from .rules import Rules, check_booleans
from .unstable import as_arguments

PyTree = Any


class DecayState(NamedTuple):
    """The state of every decay, penalty and constraint. Its structure is the same for all rates, schedules and masks.

    Attributes:
        count: shape (), int32: the number of updates so far. Schedules are called with it.
        anchor: None; with `toward="init"`, a copy of params at `init`; with an `EMA`, a tree like params with their
            average, in at least float32.
        leaf: None; for a rule with a state for each parameter, a tree like params of arrays.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> int(wdjax.decoupled_decay(0.1).init(jnp.ones(2)).count)
        0
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    anchor: PyTree = None
    leaf: PyTree = None


@dataclasses.dataclass(frozen=True, eq=False)
class Action:
    """How strong, on which parameters, toward what.

    Attributes:
        where: the public function, for errors.
        rates: the arguments whose product is the rate, by name: numbers, 0-d arrays, schedules, `Rules` or trees of
            these. If it is empty, the rule acts on all parameters of the mask.
        mask: anything that `masks.flags` takes.
        toward: None, a tree like params (0.0 for zeros in all below), "init", an `EMA`, or a table of the last two.
        is_per_step: whether the rate is the fraction of a weight that one step removes. Then `init` warns of rates
            that rounding removes or changes, or that overshoot.
        can_overshoot: whether a rate above 1 moves a weight past its anchor.
        is_toward_zero: whether, without an anchor, the whole weight decays, and not its distance to a norm.
        off_at: the rate at which the rule does nothing: 0 for a decay, 1 for a multiplier. None if it always acts, as a
            projection onto a radius of 0 does.
        stacked_axes: how many leading axes stack layers: a number, or `Rules` of numbers.
        probed: the values of each schedule, by its id, so that only the first `init` compiles it for the warnings.
    """

    where: str
    rates: dict[str, Any] = dataclasses.field(default_factory=dict)
    mask: Any = None
    toward: Any = None
    is_per_step: bool = False
    can_overshoot: bool = True
    is_toward_zero: bool = True
    off_at: float | None = 0.0
    stacked_axes: Any = 0
    probed: dict[int, Any] = dataclasses.field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rates", {name: rate_or_rules(self.where, name, x) for name, x in self.rates.items()})
        if isinstance(self.mask, Rules):
            check_booleans(self.mask, self.where)
        anchors.check(self.where, self.toward)

    def init(
        self, params: PyTree, rule: LeafRule | None = None, *, aliases: Callable[[str], bool] = lambda path: True
    ) -> DecayState:
        """The state, after a check that rules, mask and anchor fit the parameters.

        It warns if one array has two of the paths that `aliases` selects and the rule acts on both.
        """
        leaves = trees.parameters(self.where, params)
        anchor = anchors.initial(self.where, self.toward, params, leaves)
        rows = self._rows(params, leaves)
        anchors.found(self.where, self.toward, leaves, list(map(self._acts, rows)), anchor)
        acted_on = [leaf for leaf, row in zip(leaves, rows, strict=True) if self._acts(row) and aliases(leaf[0])]
        trees.warn_of_aliases(self.where, acted_on)
        if self.is_per_step:
            self._warn_of_rates(leaves, rows)
        kept = None
        if rule is not None and rule.init is not None:
            # The mask and the rate do not matter here, so that a state can be restored under other ones.
            known = known_stacks(self.where, self.stacked_axes, leaves, rows)
            of_layers = iter([stack for stack, (_, leaf) in zip(known, leaves, strict=True) if rule.acts_on(leaf)])
            kept = trees.of_each(params, rule.acts_on, lambda p: init_state(rule, next(of_layers), p))
        return DecayState(jnp.zeros([], jnp.int32), anchor, kept)

    @devices.explained
    def run(
        self,
        rule: LeafRule | Sequence[LeafRule | None],
        updates: PyTree,
        state: DecayState,
        params: PyTree,
        *,
        gates: Sequence[jax.Array] = (),
        inputs: Sequence[Any] | None = None,
        axis_name: mesh_axes.Names = (),
    ) -> tuple[PyTree, PyTree]:
        """Applies the rule to every parameter whose decay is not off, and returns the updates and the leaf states.

        Args:
            rule: the rule for all parameters; or one stateless rule for each parameter, None for no rule.
            gates: additional factors of every rate.
            inputs: for a stateless rule, the input it gets instead of a state, for each parameter.
            axis_name: the mesh axes to sum totals over.
        """
        checks.params_given(self.where, params)
        leaves = trees.flatten_with_paths(params)
        found, rebuilt = trees.beside(self.where, updates, params, [path for path, _ in leaves])
        rules = [rule] * len(leaves) if isinstance(rule, LeafRule) else rule
        terms = self._parted(rules, found, leaves, self.terms(params, leaves, state), gates)
        totals = None
        if isinstance(rule, LeafRule) and rule.reduce is not None:
            totals = self._totals(rule, found, leaves, terms, axis_name)
        kept = dict(trees.flatten_with_paths(state.leaf))
        for i, ((path, param), each, term) in enumerate(zip(leaves, rules, terms, strict=True)):
            if each is None or term is None:
                continue
            if each.init is not None and trees.is_hole(kept.get(path)):
                raise ValueError(
                    f"{self.where}: the state has nothing for {path!r}, which is {jnp.result_type(param)} now. The "
                    "state was made for other parameters or by another optimizer. Make a new one: "
                    "optimizer.init(params)."
                )
            own = kept.get(path) if inputs is None else inputs[i]
            run, old = jitted_act if each.is_kept else act, found[i]
            found[i], new = run(each, term.stack, old, param, term.anchor, term.factors, own, totals)
            if term.part is not None:
                found[i] = jnp.where(term.part, found[i], old)
            if each.init is not None:
                kept[path] = new
        return rebuilt(found), jax.tree.unflatten(trees.structure(state.leaf), list(kept.values()))

    @devices.explained
    def total(self, rule: LeafRule, params: PyTree, axis_name: mesh_axes.Names = ()) -> Any:
        """The totals of a rule that reduces only parameters, without updates; None if it acts on no parameter."""
        leaves = trees.flatten_with_paths(params)
        values = [leaf for _, leaf in leaves]
        terms = self._parted([rule] * len(leaves), values, leaves, self.terms(params, leaves, None))
        return self._totals(rule, values, leaves, terms, axis_name)

    def _totals(
        self, rule: LeafRule, found: Sequence[Any], leaves: Leaves, terms: Terms, axis_name: mesh_axes.Names
    ) -> Any:
        parts = [
            ("", reduced(rule, term.stack, update, param, term.anchor, term.factors), param)
            for update, (_, param), term in zip(found, leaves, terms, strict=True)
            if term is not None
        ]
        return mesh_axes.added_up(self.where, parts, axis_name).get("")

    def _parted(
        self,
        rules: Sequence[LeafRule | None],
        updates: Sequence[Any],
        leaves: Leaves,
        terms: Terms,
        gates: Sequence[jax.Array] = (),
    ) -> Terms:
        """The terms as arguments of `act`: a number, then arrays. None where nothing acts."""
        known: dict[tuple[int, ...], Any] = {}
        parted: Terms = []
        for rule, update, (path, param), term in zip(rules, updates, leaves, terms, strict=True):
            if rule is None or term is None or not (trees.is_decayable(update) and rule.acts_on(param)):
                parted.append(None)
                continue
            checks.same_shape(self.where, path, update, param)
            if term.part is not None and not rule.is_elementwise:
                raise ValueError(
                    f"{self.where}: the mask at {path!r} selects parts of the parameter, and the norm is that of whole "
                    "groups. Select whole parameters: mask=only('kernel')."
                )
            key = tuple(map(id, term.factors))
            if key not in known:
                known[key] = term.parted()
            number, arrays = known[key]
            number = jnp.finfo(compute_dtype(update, param)).dtype.type(number)
            # A very small number may be 0 in this dtype.
            is_off = number == 0 and self.off_at == 0
            stack = () if rule.is_elementwise else term.stack
            parted.append(None if is_off else Term((number, *arrays, *gates), (), term.anchor, stack, term.part))
        numbers = iter(as_arguments([term.factors[0] for term in parted if term], updates))
        return [term and term._replace(factors=(next(numbers), *term.factors[1:])) for term in parted]

    def terms(self, params: PyTree, leaves: Leaves, state: DecayState | None) -> Terms:
        """The decay of each leaf in this step; None where it is permanently off."""
        rows = self._rows(params, leaves)
        kept = None if state is None else state.anchor
        of_each = anchors.found(self.where, self.toward, leaves, list(map(self._acts, rows)), kept)
        evaluated: dict[int, Any] = {}

        def at_this_step(name: str, factor: Any) -> Any:
            if not callable(factor):
                return factor
            if id(factor) not in evaluated:
                evaluated[id(factor)] = self._evaluate(name, factor, state)
            return evaluated[id(factor)]

        terms: Terms = []
        for row, anchor in zip(rows, of_each, strict=True):
            if isinstance(anchor, jax.ShapeDtypeStruct):
                raise TypeError(f"{self.where}: toward holds shapes without values. Pass arrays: toward=pretrained.")
            term = row and row._replace(factors=tuple(map(at_this_step, row.names, row.factors)), anchor=anchor)
            terms.append(term if self._acts(term) else None)
        return terms

    def _rows(self, params: PyTree, leaves: Leaves) -> Terms:
        """The term of each leaf before this step, without its anchor; None for a leaf that does not decay."""
        return terms_of_leaves(self.where, self.rates, self.mask, self.stacked_axes, params, leaves, self.off_at)

    def warn_of_rates(self, params: PyTree) -> None:
        """Warns of rates that round to nothing or overshoot, for an action that is never run."""
        leaves = trees.flatten_with_paths(params)
        self._warn_of_rates(leaves, self._rows(params, leaves))

    def _warn_of_rates(self, leaves: Leaves, rows: Terms) -> None:
        decays = (
            (path, getattr(leaf, "dtype", jnp.float32), row)
            for (path, leaf), row in zip(leaves, rows, strict=True)
            if row is not None and self._acts(row)
        )
        argument, to_zero = " * ".join(self.rates), self.is_toward_zero and self.toward is None
        hazards.warn_of_rates(
            self.where, argument, decays, self.probed, can_overshoot=self.can_overshoot, is_toward_zero=to_zero
        )

    def _acts(self, term: Term | None) -> bool:
        if term is None or self.off_at is None:
            return term is not None
        if self.off_at == 0:
            return not any(isinstance(factor, float) and factor == 0 for factor in term.factors)
        number, arrays = term.parted()
        return bool(arrays) or number != self.off_at

    def acts_on(self, params: PyTree, leaves: Leaves) -> list[bool]:
        """Whether the action may act on each leaf in some step."""
        return [self._acts(row) for row in self._rows(params, leaves)]

    def _evaluate(self, name: str, schedule: Any, state: DecayState | None) -> Any:
        if state is None:
            raise TypeError(
                f"{self.where}: {name} is a function, but a loss has no step to call it with. "
                f"Call the schedule yourself: {self.where}(params, schedule(step))."
            )
        # A count from a checkpoint may be a NumPy scalar, and a schedule would compute in float64 with it.
        value = schedule(jnp.asarray(state.count))
        if isinstance(value, jax.Array) and value.shape == () and jnp.issubdtype(value.dtype, jnp.floating):
            return value
        return checks.value_of_schedule(self.where, name, value)


def transformation(
    action: Action, rule: LeafRule, axis_name: mesh_axes.Names = (), *, is_decay: bool = False
) -> optax.GradientTransformationExtraArgs:
    """The gradient transformation that runs the action at every update and counts the updates.

    If it is a decay, it can be read by `monitor`: it adds something to each update that does not depend on the update.
    """

    def init_fn(params: PyTree) -> DecayState:
        return action.init(params, rule)

    def update_fn(
        updates: PyTree, state: Any, params: PyTree = None, *, decay_probe: DecayProbe | None = None, **extra_args: Any
    ) -> tuple[PyTree, DecayState]:
        new, leaf = action.run(rule, updates, state, params, axis_name=axis_name)
        if is_decay:
            new = gated(decay_probe, action, params, lambda u: action.run(rule, u, state, params)[0], updates, new)
        anchor = anchors.moved(action.where, action.toward, state.anchor, params)
        return new, state._replace(count=optax.safe_increment(state.count), anchor=anchor, leaf=leaf)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
