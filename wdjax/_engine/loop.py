"""The loop that every place runs. It finds the rate, mask and anchor of each parameter, and applies the place's rule.

A place is an `Action` (how strong, on which parameters, toward what) and a `LeafRule` (what happens to one parameter).
The action guarantees for every place:

- The rule runs in at least float32, and in float64 if the update or the parameter is float64. The rate is converted to
  that dtype before anything is multiplied. The result has the dtype of the incoming update.
- Where the decay is permanently off (rate 0, mask False, integers, holes), the update is returned unchanged and nothing
  is computed. A rate that is 0 only in this step (a schedule, a traced rate, a part of an array) also leaves every bit,
  except for denormal updates on hardware that flushes them to zero when it adds.
- Each schedule is evaluated once a step, however many parameters share it. A rule is traced and compiled once for all
  parameters of one shape, whatever their rates are.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from . import checks, hazards, mesh_axes, trees
from .arithmetic import LeafRule, Term, act, compute_dtype, init_state, jitted_act, reduced
from .masks import flags
from .rules import PerLayer, Rules, check_booleans, decisions, rate_or_rules, rates_of, stack_of
from .unstable import as_arguments

PyTree = Any


class DecayState(NamedTuple):
    """The state of every decay. It has the same structure for constant and scheduled rates and for any mask.

    Attributes:
        count: shape (), int32: the number of updates so far. Schedules are called with it.
        anchor: None; with `toward="init"`, a copy of params at `init`.
        leaf: None; for a rule with a state for each parameter, a tree like params of arrays.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    anchor: PyTree = None
    leaf: PyTree = None


class _Row(NamedTuple):
    """The decay of one parameter before this step: named factors, with unevaluated schedules, and the stacked axes."""

    factors: tuple[tuple[str, Any], ...]
    stack: tuple[int, ...]


class _Argument(NamedTuple):
    """The decay of one parameter in this step, as arguments of `act`."""

    stack: tuple[int, ...]
    anchor: Any
    number: Any
    arrays: tuple[Any, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Action:
    """How strong, on which parameters, toward what.

    Attributes:
        where: the public function, for errors.
        rates: the arguments whose product is the rate, by name: numbers, 0-d arrays, schedules, `Rules` or trees of
            these. If it is empty, the rule acts on all parameters of the mask.
        mask: anything that `masks.flags` takes.
        toward: None, a tree like params, or "init".
        is_per_step: whether the rate is the fraction of a weight that one step removes. Then `init` warns of rates
            that round to nothing or overshoot.
        can_overshoot: whether a rate above 1 moves a weight past its anchor.
        zero_is_off: whether the rule does nothing at a rate of 0. A projection onto a radius of 0, for example, acts.
        stacked_axes: how many leading axes stack layers: a number, or `Rules` of numbers.
    """

    where: str
    rates: dict[str, Any] = dataclasses.field(default_factory=dict)
    mask: Any = None
    toward: Any = None
    is_per_step: bool = False
    can_overshoot: bool = True
    zero_is_off: bool = True
    stacked_axes: Any = 0

    def __post_init__(self) -> None:
        checked = {name: rate_or_rules(self.where, name, value) for name, value in self.rates.items()}
        object.__setattr__(self, "rates", checked)
        if isinstance(self.mask, Rules):
            check_booleans(self.mask, self.where)
        if isinstance(self.toward, str) and self.toward != "init":
            raise ValueError(
                f"{self.where}: toward must be None (zero), a tree like params, or 'init', got {self.toward!r}. "
                f"Write {self.where}(..., toward='init') for the values at init."
            )

    @property
    def keeps_anchor(self) -> bool:
        return isinstance(self.toward, str)

    def init(
        self, params: PyTree, rule: LeafRule | None = None, *, aliases: Callable[[str], bool] = lambda path: True
    ) -> DecayState:
        """The state, after a check that rules, mask and anchor fit the parameters.

        It warns if one array has two of the paths that `aliases` selects and the rule acts on both.
        """
        leaves = trees.flatten_with_paths(params)
        anchor = None
        if self.keeps_anchor:
            # If the state shared the buffers of params, the two could not both be donated.
            anchor = jax.tree.map(lambda p: p.copy() if hasattr(p, "copy") else p, params)
        rows = self._rows(params, leaves)
        self._anchors(leaves, rows, anchor)
        acted_on = [leaf for leaf, row in zip(leaves, rows, strict=True) if self._acts(row) and aliases(leaf[0])]
        trees.warn_of_aliases(self.where, acted_on)
        if self.is_per_step:
            self._warn_of_rates(leaves, rows)
        kept = None if rule is None or rule.init is None else self._init_leaves(rule, params, leaves)
        return DecayState(jnp.zeros([], jnp.int32), anchor, kept)

    def _init_leaves(self, rule: LeafRule, params: PyTree, leaves: Sequence[tuple[str, Any]]) -> PyTree:
        # The mask and the rate do not matter here, so that a state can be restored under other ones.
        stacks = []
        for stack, (path, leaf) in zip(self._stacks(leaves), leaves, strict=True):
            if rule.acts_on(leaf):
                self._check_stack(path, leaf, stack)
                stacks.append(stack)
        found = iter(stacks)
        return trees.of_each(params, rule.acts_on, lambda p: init_state(rule, next(found), p))

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
            updates, params: trees of one structure.
            state: the state from `init`.
            gates: additional factors of every rate.
            inputs: for a stateless rule, the input it gets instead of a state, for each parameter.
            axis_name: the mesh axes to sum totals over.
        """
        checks.params_given(self.where, params)
        leaves = trees.flatten_with_paths(params)
        found, rebuilt = trees.beside(self.where, updates, params, [path for path, _ in leaves])
        rules = [rule] * len(leaves) if isinstance(rule, LeafRule) else rule
        arguments = self._arguments(rules, found, leaves, self.terms(params, leaves, state))
        totals = None
        if isinstance(rule, LeafRule) and rule.reduce is not None:
            totals = self._totals(rule, found, leaves, arguments, axis_name, gates)
        kept = dict(trees.flatten_with_paths(state.leaf))
        for i, ((path, param), each, argument) in enumerate(zip(leaves, rules, arguments, strict=True)):
            if each is None or argument is None:
                continue
            if each.init is not None and trees.is_hole(kept.get(path)):
                raise ValueError(
                    f"{self.where}: the state has nothing for {path!r}, which is {jnp.result_type(param)} now. The "
                    "state was made for other parameters. Make a new one: optimizer.init(params)."
                )
            own = kept.get(path) if inputs is None else inputs[i]
            stack, anchor, number, arrays = argument
            run = jitted_act if each.is_kept else act
            found[i], new = run(each, stack, found[i], param, anchor, number, (*arrays, *gates), own, totals)
            if each.init is not None:
                kept[path] = new
        order = [path for path, _ in trees.flatten_with_paths(state.leaf)]
        return rebuilt(found), jax.tree.unflatten(trees.structure(state.leaf), [kept[path] for path in order])

    def _totals(
        self,
        rule: LeafRule,
        found: Sequence[Any],
        leaves: Sequence[tuple[str, Any]],
        arguments: Sequence[_Argument | None],
        axis_name: mesh_axes.Names,
        gates: Sequence[jax.Array] = (),
    ) -> Any:
        parts = [
            ("", reduced(rule, what.stack, update, param, what.anchor, what.number, (*what.arrays, *gates)), param)
            for update, (_, param), what in zip(found, leaves, arguments, strict=True)
            if what is not None
        ]
        return mesh_axes.added_up(self.where, parts, axis_name).get("")

    def total(self, rule: LeafRule, params: PyTree, axis_name: mesh_axes.Names = ()) -> Any:
        """The totals of a rule that reduces only parameters, without updates; None if it acts on no parameter."""
        leaves = trees.flatten_with_paths(params)
        values = [leaf for _, leaf in leaves]
        arguments = self._arguments([rule] * len(leaves), values, leaves, self.terms(params, leaves, None))
        return self._totals(rule, values, leaves, arguments, axis_name)

    def _arguments(
        self,
        rules: Sequence[LeafRule | None],
        updates: Sequence[Any],
        leaves: Sequence[tuple[str, Any]],
        terms: Sequence[Term | None],
    ) -> list[_Argument | None]:
        """The arguments of `act` for each leaf; None where nothing acts."""
        parted: dict[tuple[int, ...], Any] = {}
        arguments: list[_Argument | None] = []
        for rule, update, (path, param), term in zip(rules, updates, leaves, terms, strict=True):
            if rule is None or term is None or not (trees.is_decayable(update) and rule.acts_on(param)):
                arguments.append(None)
                continue
            checks.same_shape(self.where, path, update, param)
            key = tuple(map(id, term.factors))
            if key not in parted:
                parted[key] = term.parted()
            number, arrays = parted[key]
            number = jnp.finfo(compute_dtype(update, param)).dtype.type(number)
            # A very small number may be 0 in this dtype.
            is_off = number == 0 and self.zero_is_off
            arguments.append(None if is_off else _Argument(term.stack, term.anchor, number, arrays))
        numbers = iter(as_arguments([what.number for what in arguments if what], updates))
        return [what and what._replace(number=next(numbers)) for what in arguments]

    def terms(self, params: PyTree, leaves: Sequence[tuple[str, Any]], state: DecayState | None) -> list[Term | None]:
        """The decay of each leaf in this step; None where it is permanently off."""
        rows = self._rows(params, leaves)
        anchors = self._anchors(leaves, rows, None if state is None else state.anchor)
        evaluated: dict[int, Any] = {}

        def at_this_step(name: str, factor: Any) -> Any:
            if not callable(factor):
                return factor
            if id(factor) not in evaluated:
                evaluated[id(factor)] = self._evaluate(name, factor, state)
            return evaluated[id(factor)]

        terms = []
        for row, anchor in zip(rows, anchors, strict=True):
            if row is None:
                terms.append(None)
                continue
            values = tuple(at_this_step(*factor) for factor in row.factors)
            is_off = self.zero_is_off and any(map(_is_zero, values))
            terms.append(None if is_off else Term(values, anchor, row.stack))
        return terms

    def _rows(self, params: PyTree, leaves: Sequence[tuple[str, Any]]) -> list[_Row | None]:
        """The row of each leaf; None for a leaf that does not decay."""
        columns = []
        for name, rate in self.rates.items():
            of_each = itertools.repeat((rate,), len(leaves))
            if isinstance(rate, Rules):
                of_each = rates_of(rate, self.where, leaves)
            columns.append([[(name, factor) for factor in factors] for factors in of_each])
        rows: list[_Row | None] = []
        stacks = self._stacks(leaves)
        chosen = flags(self.where, self.mask, params, leaves)
        for flag, stack, (path, leaf), *named in zip(chosen, stacks, leaves, *columns, strict=True):
            if flag is False or not trees.is_decayable(leaf):
                rows.append(None)
                continue
            self._check_stack(path, leaf, stack)
            factors = list(itertools.chain(*named))
            stack = tuple(sorted({*stack, *stack_of(self.where, path, (factor for _, factor in factors))}))
            if flag is not True:
                factors.append(("mask", flag))
            rows.append(_Row(tuple((name, self._spread(name, f, path, leaf)) for name, f in factors), stack))
        return rows

    def _spread(self, name: str, factor: Any, path: str, leaf: Any) -> Any:
        """The factor. An array, or a number for each layer, becomes an array of the parameter's rank."""
        if isinstance(factor, PerLayer):
            return factor.along(np.ndim(leaf))
        if callable(factor) or np.ndim(factor) == 0:
            return factor
        shape = np.shape(leaf)
        trees.check_broadcasts(self.where, f"{name} at {path!r}", factor, shape)
        return factor.reshape((1,) * (len(shape) - factor.ndim) + factor.shape)

    def _stacks(self, leaves: Sequence[tuple[str, Any]]) -> list[tuple[int, ...]]:
        """The leading axes of each leaf that stack layers."""
        if not isinstance(self.stacked_axes, Rules):
            counts: list[Any] = [self.stacked_axes] * len(leaves)
        else:
            found = decisions(self.stacked_axes, self.where, leaves)
            counts = [0 if decision is None else int(decision.value) for decision in found]
        return [tuple(range(count)) for count in counts]

    def _check_stack(self, path: str, leaf: Any, stack: tuple[int, ...]) -> None:
        if len(stack) > np.ndim(leaf):
            raise ValueError(
                f"{self.where}: stacked_axes={len(stack)} for {path!r}, whose shape is {np.shape(leaf)}. Write "
                "stacked_axes={'layers': 1} if only the first axis of 'layers' stacks layers."
            )

    def warn_of_rates(self, params: PyTree) -> None:
        """Warns of rates that round to nothing or overshoot, for an action that is never run."""
        leaves = trees.flatten_with_paths(params)
        self._warn_of_rates(leaves, self._rows(params, leaves))

    def _warn_of_rates(self, leaves: Sequence[tuple[str, Any]], rows: Sequence[_Row | None]) -> None:
        decays = (
            (path, getattr(leaf, "dtype", jnp.float32), Term(tuple(factor for _, factor in row.factors)))
            for (path, leaf), row in zip(leaves, rows, strict=True)
            if row is not None and self._acts(row)
        )
        hazards.warn_of_rates(self.where, " * ".join(self.rates), decays, can_overshoot=self.can_overshoot)

    def _acts(self, row: _Row | None) -> bool:
        return row is not None and not (self.zero_is_off and any(_is_zero(factor) for _, factor in row.factors))

    def acts_on(self, params: PyTree, leaves: Sequence[tuple[str, Any]]) -> list[bool]:
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
        return checks.rate(self.where, f"the value of the schedule {name}", value, write=f"{name}=schedule")

    def _anchors(self, leaves: Sequence[tuple[str, Any]], rows: Sequence[_Row | None], initial: PyTree) -> list[Any]:
        """Each leaf's anchor, found by canonical path; None for zero. Leaves that do not decay need no anchor."""
        if self.toward is None or not leaves:
            return [None] * len(leaves)
        if self.keeps_anchor and initial is None:
            raise ValueError(
                f"{self.where}: toward='init', but the state holds no anchor: an optimizer without one made it. "
                "Make a new state, optimizer.init(params), and copy the rest of the old state into it."
            )
        given = dict(trees.flatten_with_paths(initial if self.keeps_anchor else self.toward))
        holes = tuple(path + "/" for path, leaf in leaves if trees.is_hole(leaf))
        paths = {path for path, _ in leaves}
        pulled = [leaf for leaf, row in zip(leaves, rows, strict=True) if self._acts(row)]
        missing = [path for path, _ in pulled if trees.is_hole(given.get(path))]
        extra = [p for p, a in given.items() if not (p in paths or p.startswith(holes) or trees.is_hole(a))]
        if missing or extra:
            raise ValueError(
                f"{self.where}: toward must be a tree like params. It lacks {missing[:5]}, and params lack "
                f"{extra[:5]}. Write {self.where}(..., toward=pretrained_params), or toward='init'."
            )
        for path, leaf in pulled:
            if np.shape(given[path]) != np.shape(leaf):
                raise ValueError(
                    f"{self.where}: toward has shape {np.shape(given[path])} at {path!r}, but the parameter has "
                    f"{np.shape(leaf)}. Write {self.where}(..., toward=pretrained_params), or toward='init'."
                )
        return [given.get(path) for path, _ in leaves]


def transformation(action: Action, rule: LeafRule, axis_name: mesh_axes.Names = ()) -> optax.GradientTransformation:
    """The gradient transformation that runs the action at every update and counts the updates."""

    def init_fn(params: PyTree) -> DecayState:
        return action.init(params, rule)

    def update_fn(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, DecayState]:
        updates, leaf = action.run(rule, updates, state, params, axis_name=axis_name)
        return updates, state._replace(count=optax.safe_increment(state.count), leaf=leaf)

    return optax.GradientTransformation(init_fn, update_fn)


def _is_zero(value: Any) -> bool:
    return isinstance(value, float) and value == 0
