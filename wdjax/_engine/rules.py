"""The base class of rule sets. A rule set is a decision for each parameter, times factors: a mask, rates or labels."""

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np

from . import checks, trees
from .decision import Decision, Tree, check_product, product, times
from .text import printed, shown
from .unstable import is_traced

PyTree = Any
TABLE = "by_path({'kernel': 0.1}, default=0.0)"
_KINDS: dict[str, type["Rules"]] = {}
_MOST_NESTED = 64  # Rule sets in rule sets. It keeps recursion shallow, and `from_dict` reads what `to_dict` writes.
_OF_A_MODEL = ("functions", "variables", "names")  # Rules may be asked about a whole model.


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Rules(abc.ABC):
    """What decays and how strongly: made by `by_path`, `only`, `all_but`, `weights_only`, `by_depth` and `by_width`.

    A rule set is an object, not a function, so it can't be mistaken for a schedule. Pass it to wdjax directly. Pass its
    method `mask` to the `mask=` arguments of Optax, and its method `values` to `optax.partition`.

    `rate * rules` turns multipliers into rates. The rate is a number, a 0-d array, a schedule or another rule set of
    multipliers: `schedule * by_path({"embedding": 0.1}, default=1.0)`, `0.1 * by_depth("Block_*", 0.75)`.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
        >>> (0.1 * wdjax.by_path({"bias": 0.0}, default=1.0)).values(params)
        {'bias': 0.0, 'kernel': 0.1}
        >>> wdjax.Rules.from_dict(wdjax.only("kernel").to_dict()).mask(params)
        {'bias': False, 'kernel': True}
    """

    factors: tuple[Any, ...] = ()

    kind: ClassVar[str]  # The public function that makes it.
    _from_plain: ClassVar[Callable[..., "Rules"]]  # Makes it from its fields, as `plain` writes them.
    __array_ufunc__ = None  # Leaves `numpy_scalar * rules` to `__rmul__`.

    def __init_subclass__(cls, kind: str, *, is_written: bool = True) -> None:
        cls.kind = kind
        if is_written:
            _KINDS[kind] = cls

    def __post_init__(self) -> None:
        if self._depth > _MOST_NESTED:
            raise ValueError(
                f"{self.kind}: rule sets are nested more than {_MOST_NESTED} deep. Write the rules in one table, where "
                "the first that matches wins. Write a product of many as rules = rules * factor, not factor * rules."
            )

    @functools.cached_property
    def _depth(self) -> int:
        """How many rule sets hold each other, this one included."""
        return 1 + max(_depth(getattr(self, field.name)) for field in dataclasses.fields(self))

    def mask(self, params: PyTree) -> PyTree:
        """The tree of booleans for `params`. Integers, booleans and keys never decay and get False.

        Raises:
            TypeError: if the values of the rules are not booleans.
            ValueError: if a rule matches nothing or never decides, or if no rule covers a parameter.
        """
        leaves = trees.parameters("Rules.mask", params, may_hold=_OF_A_MODEL)
        check_whole(self, "Rules.mask")
        return _like(params, leaves, flags_of(self, "Rules.mask", leaves))

    def values(self, params: PyTree) -> PyTree:
        """The tree of each leaf's value: labels, booleans, rates, multipliers or schedules.

        The values include the factors of the rules. The multipliers of a stacked parameter are an array that broadcasts
        against it.

        Raises:
            ValueError: if a rule matches nothing or never decides, or if no rule covers a leaf (of any dtype).
        """
        leaves = trees.parameters("Rules.values", params, may_hold=_OF_A_MODEL)
        found = decisions(self, "Rules.values", leaves, lambda leaf: not trees.is_hole(leaf))
        return _like(params, leaves, [product(d, leaf) for d, (_, leaf) in zip(found, leaves, strict=True)])

    def to_dict(self) -> dict[str, Any]:
        """The rules as plain dictionaries, lists, strings, numbers and booleans, for JSON, TOML or a tracker.

        Raises:
            TypeError: if the rules hold a function (a predicate or a schedule).
        """
        arguments = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del arguments["factors"]
        written = {self.kind: {name: plain(value) for name, value in arguments.items() if value is not None}}
        return {**written, "times": [plain(factor) for factor in self.factors]} if self.factors else written

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> "Rules":
        """The rules from a dictionary that `to_dict` wrote, or from a configuration file in the same format.

        Raises:
            TypeError, ValueError: if `data` is not in the format of `to_dict`.
        """
        checks.nesting("Rules.from_dict", data, "the rules in one list, where the first that matches wins")
        kinds = [kind for kind in _KINDS if isinstance(data, Mapping) and kind in data]
        if len(kinds) != 1 or set(data) - {kinds[0], "times"}:
            raise ValueError(
                f"Rules.from_dict: expected one of the keys {', '.join(map(repr, _KINDS))}, and optionally 'times', "
                f"got {list(data) if isinstance(data, Mapping) else shown(data)}. "
                "Write {'by_path': {'rules': [{'match': 'bias', 'value': 0.0}], 'default': 0.1}}."
            )
        arguments, factors = data[kinds[0]], data.get("times", [])
        if not isinstance(factors, list):
            raise TypeError(f"Rules.from_dict: 'times' must be a list of factors, got {shown(factors)}.")
        rules = checks.read(kinds[0], _KINDS[kinds[0]]._from_plain, arguments)
        for factor in factors:
            rules = rules * from_plain(factor)
        return rules

    def __mul__(self, factor: Any) -> "Rules":
        check_rates(self, self.kind)
        if isinstance(factor, Rules):
            check_rates(factor, factor.kind)
        elif isinstance(factor, (np.ndarray, jax.Array)) and factor.ndim > 0:
            raise TypeError(
                f"{self.kind}: the factor of a table must be a scalar, got an array of shape {np.shape(factor)}. "
                "Optax accepts no table as weight_decay: use wdjax.adamw or wdjax.decoupled_decay."
            )
        else:
            factor = checks.rate(self.kind, "the factor of a table", factor, write=f"0.1 * {TABLE}")
        return dataclasses.replace(self, factors=(*self.factors, factor))

    __rmul__ = __mul__

    def __bool__(self) -> bool:
        # Optax would take the rule set for a mask of one leaf that is true.
        raise TypeError(
            f"{self!r} has no truth value. Give Optax its method: optax.adamw(..., mask=rules.mask), "
            "optax.masked(optimizer, rules.mask)."
        )

    def _no_algebra(self, *_: Any) -> Any:
        raise TypeError(
            "Rules: masks do not support &, |, ~ or -. Write exceptions first, since the first match wins: "
            "by_path({'head': False}, default=weights_only()). The opposite of only(...) is all_but(...)."
        )

    __and__ = __rand__ = __or__ = __ror__ = __sub__ = __rsub__ = __invert__ = _no_algebra

    def __repr__(self) -> str:
        return "".join(f"{printed(factor)} * " for factor in self.factors) + self._written()

    @abc.abstractmethod
    def _decide(self, tree: Tree, asked: Sequence[int]) -> dict[int, Decision]:
        """The decisions on the leaves at these indices, or an error. A leaf that no rule covers is left out."""

    def _values(self) -> list[Any]:
        """Every value that a decision may have, to tell masks from rates. Here, a multiplier."""
        return [1.0]

    @abc.abstractmethod
    def _written(self) -> str:
        """The call that makes the rule set, without its factors."""


def flags_of(rules: Rules, where: str, leaves: Sequence[tuple[str, Any]], *, of_all: bool = False) -> list[Any]:
    """Each leaf's boolean or array of booleans. Errors name the function `where`."""
    check_booleans(rules, where)
    pairs = zip(decisions(rules, where, leaves), leaves, strict=True)
    return [d.value if d is not None and (of_all or trees.is_decayable(leaf)) else False for d, (_, leaf) in pairs]


def rates_of(rules: Rules, where: str, leaves: Sequence[tuple[str, Any]]) -> list[tuple[Any, ...] | None]:
    """Each leaf's rate as a tuple of factors: numbers, arrays, schedules and `PerLayer`; None for no rate."""
    check_rates(rules, where)
    return [None if d is None else (*d.factors, d.value) for d in decisions(rules, where, leaves)]


def decisions(
    rules: Rules, where: str, leaves: Sequence[tuple[str, Any]], covers: Callable[[Any], bool] = trees.is_decayable
) -> list[Decision | None]:
    """The decision on each leaf; None if no rule covers it. Leaves that `covers` selects must be covered."""
    if not leaves:
        return []
    required = frozenset(i for i, (_, leaf) in enumerate(leaves) if covers(leaf))
    tree = Tree(where, [trees.describe(path, leaf) for path, leaf in leaves], required)
    decided = answers(rules, tree, range(len(leaves)))
    for i, decision in decided.items():
        check_product(where, leaves[i][0], decision)
    return [decided.get(i) for i in range(len(leaves))]


def answers(rules: Rules, tree: Tree, asked: Sequence[int]) -> dict[int, Decision]:
    """The decisions, with the factors of the rules included. A leaf that no rule covers is left out."""
    decided = rules._decide(tree, asked)
    for factor in reversed(rules.factors):
        if isinstance(factor, Rules):
            more = answers(factor, tree, asked)
            decided = {i: times(more[i], d) if i in more else d for i, d in decided.items()}
        else:
            decided = {i: d._replace(factors=(factor, *d.factors)) for i, d in decided.items()}
    return decided


def check_booleans(rules: Rules, where: str) -> None:
    """Raises an error for rates or labels as a mask."""
    wrong = [v for v in possible_values(rules) if not is_flag(v)]
    if wrong or rules.factors:
        raise TypeError(
            f"{where}: a mask says True or False, but {shown(rules)} holds {shown(wrong[0]) if wrong else 'rates'}. "
            "Give a table of rates as the rate itself, and a table of multipliers as a rate times the table: "
            "weight_decay=0.1 * by_path({'kernel': 1.0, 'embedding': 0.5}, default=0.0)."
        )


def check_whole(rules: Rules, where: str) -> None:
    """Raises an error for masks of parts of a parameter, where only whole parameters can be selected."""
    parts = [value for value in possible_values(rules) if np.ndim(value)]
    if parts:
        raise TypeError(
            f"{where}: an array of shape {np.shape(parts[0])} selects parts of a parameter, and whole ones are needed "
            "here. Masks of parts work in the mask= of wdjax."
        )


def check_no_mask(where: str, name: str, given: Any, write: str) -> None:
    """Raises an error if a mask was given as the number before it: booleans by path, or a tree of them."""
    values = possible_values(given) if isinstance(given, Rules) else jax.tree.leaves(given)
    if (isinstance(given, (Rules, Mapping)) and values) and all(map(is_flag, values)):
        raise TypeError(f"{where}: a mask was given as {name}. Write {write}.")


def check_rates(rules: Rules, where: str) -> None:
    """Raises an error for booleans, labels or anchors as rates."""
    for value in possible_values(rules):
        if is_flag(value):
            hint = " A table of booleans is a mask, which needs a rate too: weight_decay=0.1, mask=only('kernel')."
        elif callable(value) or isinstance(value, (int, float, np.number, np.ndarray, jax.Array)):
            continue
        else:
            hint = " A table of anchors is written toward=by_path(...)."
        raise TypeError(
            f"{where}: a table of rates holds numbers, 0-d arrays or schedules, but {shown(rules)} holds "
            f"{shown(value)}.{hint} Write rates by path as {TABLE}."
        )


def possible_values(rules: Rules) -> list[Any]:
    """Every value that a decision of these rules may have."""
    return rules._values()


def is_flag(value: Any) -> bool:
    """Whether a value is a boolean, or an array of booleans for parts of a parameter."""
    return isinstance(value, bool) or (isinstance(value, (np.ndarray, jax.Array)) and value.dtype == bool)


def plain(value: Any) -> Any:
    """A value of a rule set, as JSON and TOML can hold it."""
    if isinstance(value, Rules):
        return value.to_dict()
    if hasattr(value, "to_plain"):
        return value.to_plain()
    value = value._asdict() if hasattr(value, "_asdict") else value
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    if isinstance(value, (bool, int, str)):
        return value
    if callable(value) or is_traced(value) or np.ndim(value) or np.asarray(value).dtype == object:
        raise TypeError(
            f"Rules.to_dict: {shown(value)} can't be written to a file. Write patterns instead of functions of a leaf, "
            "and multipliers instead of schedules, to multiply them in code: weight_decay=schedule * rules."
        )
    return float(value)


def from_plain(value: Any) -> Any:
    """The value that `plain` wrote."""
    return Rules.from_dict(value) if isinstance(value, Mapping) else value


def _depth(value: Any) -> int:
    if isinstance(value, tuple):  # Factors, rows, patterns.
        return max(map(_depth, value), default=0)
    return value._depth if isinstance(value, Rules) else 0


def _like(params: PyTree, leaves: Sequence[tuple[str, Any]], values: Sequence[Any]) -> PyTree:
    filled = [leaf if trees.is_hole(leaf) else value for (_, leaf), value in zip(leaves, values, strict=True)]
    return jax.tree.unflatten(trees.structure(params), filled)
