"""What every place does alike: bring a rate, a mask and an anchor to each parameter, and act there in safe arithmetic.

A place is an `Action` (how strong, on which parameters, toward what) and a rule for one parameter (see `_arithmetic`).
The action keeps the promises for all of them:

- The rule runs in at least float32, and in float64 where the update or the parameter is; the update comes back in the
  dtype it came in with. The rate is brought to that dtype before anything is multiplied.
- Where the decay is off for good (rate 0, mask False, integers, holes), the update is returned as it came and nothing
  is computed. A rate that happens to be 0 in this step (a schedule, a traced rate) leaves the same bits, but for
  denormal updates on hardware that flushes them to zero wherever it adds.
- Each schedule is evaluated once a step, however many parameters share it, and a rule is traced and compiled once for
  all parameters of one shape, whatever their rates are.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from . import checks, hazards, trees
from .arithmetic import Rule, act, as_arguments, compute_dtype, strength
from .masks import booleans
from .rules import Rules, check_stack

PyTree = Any


class DecayState(NamedTuple):
    """The state of every decay: the same structure for constant and scheduled rates and for any mask.

    Attributes:
        count: shape (), int32: the updates so far, where schedules are evaluated.
        anchor: None; with `toward="init"` a tree like params, of their shapes and dtypes: their values at `init`.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    anchor: PyTree = None


class Term(NamedTuple):
    """What acts on one parameter: the factors of the rate (for `product`), and the anchor (None for zero)."""

    factors: tuple[Any, ...]
    anchor: Any


class Told(NamedTuple):
    """What acts on one parameter, as `arithmetic.act` takes it."""

    axis: int | None
    anchor: Any
    number: Any
    arrays: tuple[Any, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Action:
    """How strong, on which parameters, toward what.

    Attributes:
        where: the public function, for errors.
        rates: the arguments whose product is the rate, by name: numbers, 0-d arrays, schedules or `Rules` of these.
        mask: anything that `paths._masks.booleans` takes.
        toward: None, a tree like params, or "init".
        is_per_step: whether the rate is the fraction of a weight that a step takes, so that `init` can warn of rates
            that round to nothing or overshoot.
        can_overshoot: whether a rate above 1 takes a weight past its anchor.
    """

    where: str
    rates: dict[str, Any]
    mask: Any = None
    toward: Any = None
    is_per_step: bool = False
    can_overshoot: bool = True

    def __post_init__(self) -> None:
        checked = {
            name: value if isinstance(value, Rules) else checks.rate(self.where, name, value)
            for name, value in self.rates.items()
        }
        object.__setattr__(self, "rates", checked)
        for rules in (rate for rate in checked.values() if isinstance(rate, Rules)):
            rules._check_rates(self.where)
        if isinstance(self.mask, Rules):
            self.mask._check_booleans(self.where)
        if isinstance(self.toward, str) and self.toward != "init":
            raise ValueError(
                f"{self.where}: toward must be None (zero), a tree like params, or 'init', got {self.toward!r}. "
                f"Write {self.where}(..., toward='init') for the values at init."
            )

    @property
    def keeps_anchor(self) -> bool:
        return isinstance(self.toward, str)

    def init(self, params: PyTree, acts_on: Callable[[str], bool] = lambda path: True) -> DecayState:
        """The state, after a check that rules, mask and anchor fit the parameters.

        A warning is given of one array at two places that `acts_on`, a function of the path, both are acted on.
        """
        leaves = trees.flatten_with_paths(params)
        anchor = None
        if self.keeps_anchor:
            # A copy: the state must not hold the buffers of params, or both could not be donated.
            anchor = jax.tree.map(lambda p: p.copy() if hasattr(p, "copy") else p, params)
        rows = self._factors(params, leaves)
        self._anchors(leaves, rows, anchor)
        acted_on = [leaf for leaf, row in zip(leaves, rows, strict=True) if _acts(row) and acts_on(leaf[0])]
        trees.warn_of_aliases(self.where, acted_on)
        if self.is_per_step:
            self._warn_of_rates(leaves, rows)
        return DecayState(jnp.zeros([], jnp.int32), anchor)

    def apply(self, rule: Rule, updates: PyTree, state: DecayState, params: PyTree, *gates: jax.Array) -> PyTree:
        """The updates after `rule` acted on every leaf that is not off; `gates` are further factors of the rate."""
        checks.params_given(self.where, params)
        leaves = trees.flatten_with_paths(params)
        paths = [path for path, _ in leaves]
        given: list[Any] = [None] * len(leaves)

        def note(update: Any, i: int) -> Any:
            given[i] = update
            return update

        trees.map_with_params(note, self.where, updates, params, paths)
        told = self.told(given, params, leaves, state)

        def act_on(update: Any, i: int) -> Any:
            (path, param), what = leaves[i], told[i]
            if what is None:
                return update
            checks.same_shape(self.where, path, update, param)
            return act(rule, what.axis, update, param, what.anchor, what.number, (*what.arrays, *gates))

        return trees.map_with_params(act_on, self.where, updates, params, paths)

    def told(
        self, updates: Sequence[Any], params: PyTree, leaves: Sequence[tuple[str, Any]], state: DecayState
    ) -> list[Told | None]:
        """What acts on each leaf in this step; None where the decay is off for good.

        Args:
            updates: the update of each leaf, None where there is none to act on.
            params, leaves, state: as `terms`.
        """
        parted: dict[tuple[int, ...], Any] = {}
        told: list[Told | None] = []
        for update, (_, param), term in zip(updates, leaves, self.terms(params, leaves, state), strict=True):
            if update is None or term is None:
                told.append(None)
                continue
            key = tuple(map(id, term.factors))
            if key not in parted:
                parted[key] = strength(term.factors)
            number, arrays, axis = parted[key]
            number = jnp.finfo(compute_dtype(update, param)).dtype.type(number)
            # It may be so small that it is nothing in this dtype.
            told.append(None if number == 0 else Told(axis, term.anchor, number, arrays))
        numbers = iter(as_arguments([what.number for what in told if what], updates))
        return [what and what._replace(number=next(numbers)) for what in told]

    def terms(self, params: PyTree, leaves: Sequence[tuple[str, Any]], state: DecayState | None) -> list[Term | None]:
        """What acts on each leaf in this step; None where the decay is off for good."""
        rows = self._factors(params, leaves)
        anchors = self._anchors(leaves, rows, None if state is None else state.anchor)
        evaluated: dict[int, Any] = {}

        def at_this_step(name: str, factor: Any) -> Any:
            if not callable(factor):
                return factor
            if id(factor) not in evaluated:
                evaluated[id(factor)] = self._evaluate(name, factor, state)
            return evaluated[id(factor)]

        terms = []
        for factors, anchor in zip(rows, anchors, strict=True):
            if factors is None:
                terms.append(None)
                continue
            values = tuple(at_this_step(*factor) for factor in factors)
            terms.append(None if any(_is_zero(value) for value in values) else Term(values, anchor))
        return terms

    def _factors(self, params: PyTree, leaves: Sequence[tuple[str, Any]]) -> list[list[tuple[str, Any]] | None]:
        """Each leaf's named factors, with schedules still unevaluated; None for a leaf that does not decay."""
        columns = []
        for name, rate in self.rates.items():
            rows = (
                rate._rates(self.where, leaves) if isinstance(rate, Rules) else itertools.repeat((rate,), len(leaves))
            )
            columns.append([[(name, factor) for factor in row] for row in rows])
        chosen = booleans(self.where, self.mask, params, leaves)
        factors: list[list[tuple[str, Any]] | None] = []
        for flag, (path, leaf), *rates in zip(chosen, leaves, *columns, strict=True):
            row = list(itertools.chain(*rates)) if flag and trees.is_decayable(leaf) else None
            check_stack(self.where, path, (factor for _, factor in row or ()))
            factors.append(row)
        return factors

    def warn_of_rates(self, params: PyTree) -> None:
        """Warns of rates that round to nothing or overshoot, where the action is only there to know them."""
        leaves = trees.flatten_with_paths(params)
        dtypes = {getattr(leaf, "dtype", jnp.float32) for _, leaf in leaves if trees.is_decayable(leaf)}
        if not hazards.is_harmless(self.rates.values(), dtypes):  # Else no rule needs to be asked once more.
            self._warn_of_rates(leaves, self._factors(params, leaves))

    def _warn_of_rates(self, leaves: Sequence[tuple[str, Any]], rows: Sequence[Any]) -> None:
        decays = (
            (path, getattr(leaf, "dtype", jnp.float32), [factor for _, factor in row])
            for (path, leaf), row in zip(leaves, rows, strict=True)
            if _acts(row)
        )
        hazards.warn_of_rates(self.where, " * ".join(self.rates), decays, can_overshoot=self.can_overshoot)

    def _evaluate(self, name: str, schedule: Any, state: DecayState | None) -> Any:
        if state is None:
            raise TypeError(
                f"{self.where}: {name} is a function, and a loss has no step to call it with. "
                f"Call the schedule yourself: {self.where}(params, schedule(step))."
            )
        # What a checkpoint gave back may be NumPy, in which a schedule would compute in float64.
        value = schedule(jnp.asarray(state.count))
        if isinstance(value, jax.Array) and value.shape == () and jnp.issubdtype(value.dtype, jnp.floating):
            return value
        return checks.rate(self.where, f"the value of the schedule {name}", value, write=f"{name}=schedule")

    def _anchors(self, leaves: Sequence[tuple[str, Any]], rows: Sequence[Any], initial: PyTree) -> list[Any]:
        """Each leaf's anchor, None for zero; found by canonical path, and needed only where there is a decay."""
        if self.toward is None or not leaves:
            return [None] * len(leaves)
        if self.keeps_anchor and initial is None:
            raise ValueError(
                f"{self.where}: toward='init', and the state holds no anchor: it comes from an optimizer without one. "
                "Make a new state, optimizer.init(params), and take over the rest of the old one."
            )
        given = dict(trees.flatten_with_paths(initial if self.keeps_anchor else self.toward))
        holes = tuple(path + "/" for path, leaf in leaves if trees.is_hole(leaf))
        paths = {path for path, _ in leaves}
        pulled = [leaf for leaf, row in zip(leaves, rows, strict=True) if _acts(row)]
        missing = [path for path, _ in pulled if trees.is_hole(given.get(path))]
        extra = [p for p, a in given.items() if not (p in paths or p.startswith(holes) or trees.is_hole(a))]
        if missing or extra:
            raise ValueError(
                f"{self.where}: toward must be a tree like params; it lacks {missing[:5]} and has besides {extra[:5]}. "
                f"Write {self.where}(..., toward=pretrained_params), or toward='init'."
            )
        for path, leaf in pulled:
            if jnp.shape(given[path]) != jnp.shape(leaf):
                raise ValueError(
                    f"{self.where}: toward has shape {jnp.shape(given[path])} at {path!r}, and the parameter "
                    f"{jnp.shape(leaf)}. Write {self.where}(..., toward=pretrained_params), or toward='init'."
                )
        return [given.get(path) for path, _ in leaves]


def transformation(action: Action, rule: Rule) -> optax.GradientTransformation:
    """The gradient transformation that acts once an update and counts its updates."""

    def update_fn(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, DecayState]:
        updates = action.apply(rule, updates, state, params)
        return updates, state._replace(count=optax.safe_increment(state.count))

    return optax.GradientTransformation(action.init, update_fn)


def _acts(row: Sequence[tuple[str, Any]] | None) -> bool:
    return row is not None and not any(_is_zero(factor) for _, factor in row)


def _is_zero(value: Any) -> bool:
    return isinstance(value, float) and value == 0
