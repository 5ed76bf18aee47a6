"""Rule sets: tables from patterns to values, decided on the leaves of a tree."""

import dataclasses
import enum
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from .. import _checks, _leaves
from . import _patterns
from ._patterns import Pattern

PyTree = Any


class _Missing(enum.Enum):
    """A member of an enumeration stays itself under copy and pickle."""

    MISSING = enum.auto()

    def __repr__(self) -> str:
        return "..."


_MISSING: Any = _Missing.MISSING
_TABLE = "by_path({'kernel': 0.1}, default=0.0)"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Rules:
    """An ordered table from patterns to values; made by `by_path`, `only` and `all_but`.

    It is an object and no function, so nothing takes it for a schedule. Give it to wdjax as it is; give its method
    `mask` to the `mask=` arguments of Optax, and its method `values` to `optax.partition`.

    A table of multipliers becomes a table of rates by `rate * rules`, where the rate is a number, a 0-d array or a
    schedule: `schedule * by_path({"embedding": 0.1, "kernel": 1.0}, default=0.0)`.
    """

    rules: tuple[tuple[tuple[Pattern, ...], Any], ...]
    default: Any = _MISSING
    factors: tuple[Any, ...] = ()

    __array_ufunc__ = None  # Leaves `numpy_scalar * rules` to `__rmul__`.

    def mask(self, params: PyTree) -> PyTree:
        """The tree of booleans for `params`; integers, booleans and keys are never decayed and get False.

        Raises:
            TypeError: if the values of the rules are not booleans.
            ValueError: if a rule matches nothing or never decides, or a parameter is not covered.
        """
        leaves = _leaves.flatten_with_paths(params)
        return _like(params, leaves, self.booleans("Rules.mask", leaves))

    def values(self, params: PyTree) -> PyTree:
        """The tree of each leaf's value as it stands in the table: labels, booleans, rates, multipliers, schedules.

        Raises:
            ValueError: if a rule matches nothing or never decides, or a leaf (of any dtype) is not covered.
        """
        leaves = _leaves.flatten_with_paths(params)
        return _like(params, leaves, self.decide("Rules.values", leaves, lambda leaf: not _leaves.is_hole(leaf)))

    def booleans(self, where: str, leaves: Sequence[tuple[str, Any]]) -> list[bool]:
        """Each leaf's boolean, for an error in the name of the function `where`."""
        self.check_booleans(where)
        return [bool(value) and _leaves.is_decayable(leaf) for value, (_, leaf) in self._paired(where, leaves)]

    def check_booleans(self, where: str) -> None:
        """Refuses a table of rates or labels as a mask."""
        wrong = [v for v in self._all_values() if not isinstance(v, (bool, np.bool_))]
        if wrong or self.factors:
            raise TypeError(
                f"{where}: a mask says True or False, and {self!r} holds {wrong[0] if wrong else 'rates'!r}. "
                "A table of rates is given as the rate itself, a table of multipliers as a rate times the table: "
                "weight_decay=0.1 * by_path({'kernel': 1.0, 'embedding': 0.5}, default=0.0)."
            )

    def rates(self, where: str, leaves: Sequence[tuple[str, Any]]) -> list[tuple[Any, ...]]:
        """Each leaf's rate as the factors whose product it is (numbers, arrays, schedules)."""
        self.check_rates(where)
        return [(0.0,) if value is None else (*self.factors, value) for value, _ in self._paired(where, leaves)]

    def decide(
        self, where: str, leaves: Sequence[tuple[str, Any]], covers: Callable[[Any], bool] = _leaves.is_decayable
    ) -> list[Any]:
        """Each leaf's value in the table; None for a leaf that no rule covers and `covers` does not ask for.

        A hole counts as matched, so that a rule set for the whole model also serves inside `optax.masked` or
        `optax.partition`, where a part of the model is hidden.
        """
        if not leaves:
            return []
        described = [_leaves.describe(path, leaf) for path, leaf in leaves]
        deciders: list[int | None] = [None] * len(leaves)
        for number, (patterns, _) in enumerate(self.rules):
            matched = set().union(*(_patterns.matching(where, pattern, described) for pattern in patterns))
            undecided = [i for i in matched if deciders[i] is None]
            if matched and not undecided:
                raise ValueError(f"{where}: {self._shadowed(number, {deciders[i] for i in matched})}")
            for i in undecided:
                deciders[i] = number
        if self.default is _MISSING:
            bare = [path for n, (path, leaf) in zip(deciders, leaves, strict=True) if n is None and covers(leaf)]
            if bare:
                raise ValueError(f"{where}: {_uncovered(bare)}")
        default = None if self.default is _MISSING else self.default
        return [default if number is None else self.rules[number][1] for number in deciders]

    def __mul__(self, factor: Any) -> "Rules":
        if isinstance(factor, Rules):
            raise TypeError("by_path: the product of two rule sets is not defined: write one table with the products.")
        self.check_rates("by_path")
        factor = _checks.rate("by_path", "the factor of a table", factor, write=f"0.1 * {_TABLE}")
        return dataclasses.replace(self, factors=(*self.factors, factor))

    __rmul__ = __mul__

    def __bool__(self) -> bool:
        # Optax would take the rule set for one leaf that says yes to everything.
        raise TypeError(
            f"{self!r} has no truth value. Optax takes its method: optax.adamw(..., mask=rules.mask), "
            "optax.masked(optimizer, rules.mask)."
        )

    def __repr__(self) -> str:
        table = ", ".join(f"{_patterns.show(patterns)}: {value!r}" for patterns, value in self.rules)
        default = "" if self.default is _MISSING else f", default={self.default!r}"
        return "".join(f"{factor!r} * " for factor in self.factors) + f"by_path({{{table}}}{default})"

    def _all_values(self) -> list[Any]:
        return [v for v in (*(value for _, value in self.rules), self.default) if v is not _MISSING]

    def check_rates(self, where: str) -> None:
        """Refuses a table of booleans or labels as a rate."""
        for value in self._all_values():
            if isinstance(value, (bool, np.bool_, str)):
                raise TypeError(
                    f"{where}: a table of rates holds numbers, 0-d arrays or schedules, and {self!r} holds {value!r}. "
                    f"Write {_TABLE}; a table of booleans is a mask."
                )

    def _paired(self, where: str, leaves: Sequence[tuple[str, Any]]) -> Iterable[tuple[Any, tuple[str, Any]]]:
        return zip(self.decide(where, leaves), leaves, strict=True)

    def _shadowed(self, number: int, deciders: set[int | None]) -> str:
        earlier = [_patterns.show(self.rules[i][0]) for i in sorted(i for i in deciders if i is not None)]
        return (
            f"the rule {_patterns.show(self.rules[number][0])} never decides: every parameter that it matches is taken "
            f"by {' or '.join(earlier)} before it. The first match wins: put the narrower rule first, or drop this one."
        )


@_checks.known_arguments
def by_path(rules: Mapping[Any, Any] | Iterable[tuple[Any, Any]], *, default: Any = _MISSING) -> Rules:
    """A table from patterns to values; for each parameter the first rule that matches wins.

    Args:
        rules: a dictionary, or a list of pairs (pattern, value); the order counts. For patterns see `wdjax.paths`.
            Values: booleans for a mask; finite numbers >= 0, 0-d arrays or schedules for rates; text for labels.
        default: the value of parameters that no rule matches. Without one they are an error.

    Returns:
        `Rules`, to give as the mask or as the rate of any wdjax function.

    Raises:
        TypeError: if a pattern or a value is of a kind that has no meaning here.
        ValueError: if a pattern is malformed, or a rate is negative, NaN, infinite or not a scalar. At `init` and
            `update`: if a rule matches no parameter or never decides, or a parameter is not covered.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> params = {"Dense_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
        >>> rules = wdjax.by_path({"bias": 0.0, "Dense_*": 0.1})
        >>> rules.values(params)
        {'Dense_0': {'bias': 0.0, 'kernel': 0.1}}
    """
    table = []
    if isinstance(rules, str):
        raise TypeError(f"by_path: the rules are a table, got the text {rules!r}. Write only({rules!r}), or {_TABLE}.")
    for pair in rules.items() if isinstance(rules, Mapping) else rules:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(f"by_path: a rule is a pair (pattern, value), got {pair!r}. Write {_TABLE}.")
        table.append((_patterns.checked("by_path", pair[0]), _checked_value(pair[1])))
    if not table and default is _MISSING:
        raise ValueError(f"by_path: no rules and no default were given. Write {_TABLE}.")
    return Rules(tuple(table), default if default is _MISSING else _checked_value(default))


@_checks.known_arguments
def only(*patterns: Pattern) -> Rules:
    """The mask that is True for the parameters that any of the patterns matches, and False for all others.

    Raises:
        TypeError, ValueError: as `by_path`; each pattern must match at least one parameter.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> params = {"Dense_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
        >>> wdjax.only("kernel").mask(params)
        {'Dense_0': {'bias': False, 'kernel': True}}
    """
    return Rules(((_patterns.checked("only", patterns), True),), default=False)


@_checks.known_arguments
def all_but(*patterns: Pattern) -> Rules:
    """The mask that is False for the parameters that any of the patterns matches, and True for all others.

    Raises:
        TypeError, ValueError: as `by_path`; each pattern must match at least one parameter.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> params = {"Dense_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
        >>> wdjax.all_but("bias").mask(params)
        {'Dense_0': {'bias': False, 'kernel': True}}
    """
    return Rules(((_patterns.checked("all_but", patterns), False),), default=True)


def _checked_value(value: Any) -> Any:
    if isinstance(value, (bool, np.bool_, str)):
        return value
    return _checks.rate("by_path", "a value of the table", value, write=_TABLE)


def _like(params: PyTree, leaves: Sequence[tuple[str, Any]], values: Sequence[Any]) -> PyTree:
    filled = [leaf if _leaves.is_hole(leaf) else value for (_, leaf), value in zip(leaves, values, strict=True)]
    return jax.tree.unflatten(_leaves.structure(params), filled)


def _uncovered(paths: list[str]) -> str:
    name = paths[0].rpartition("/")[2]
    more = f" (and {len(paths) - 1} more: {', '.join(map(repr, paths[1:4]))})" if len(paths) > 1 else ""
    return (
        f"no rule covers the parameter {paths[0]!r}{more}. "
        f"Add a rule, such as {{{name!r}: ...}}, or a value for all the rest: by_path({{...}}, default=...)."
    )
