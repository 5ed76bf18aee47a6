"""Tables from patterns to values, in which the first match wins: `by_path`, `only`, `all_but`."""

import dataclasses
import enum
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .._engine import checks
from .._engine.rules import TABLE, Decision, Rules, Tree, answers, entries, from_plain, is_flag, plain, possible_values
from . import language
from .language import Pattern


class _Missing(enum.Enum):
    """An enumeration, because its member stays identical under copy and pickle."""

    MISSING = enum.auto()

    def __repr__(self) -> str:
        return "..."


MISSING: Any = _Missing.MISSING


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Table(Rules, kind="by_path"):
    """An ordered table from patterns to values. A rule set as a value decides on what its pattern matched."""

    rules: tuple[tuple[tuple[Pattern, ...], Any], ...]
    default: Any = MISSING

    def _decide(self, tree: Tree, asked: Sequence[int]) -> dict[int, Decision]:
        # A hole counts as matched, so that a rule set for the whole model also works inside `optax.masked` or
        # `optax.partition`, where part of the model is hidden.
        deciders: dict[int, int] = {}
        groups: list[dict[int, Pattern]] = []  # For each rule, the leaves it decides on and the pattern that matched.
        for number, (patterns, _) in enumerate(self.rules):
            left = [i for i in asked if i not in deciders]
            matched: dict[int, Pattern] = {}
            for pattern in patterns:
                matched = {**dict.fromkeys(language.matching(tree, pattern, asked, left), pattern), **matched}
            groups.append({i: matched[i] for i in left if i in matched})
            if asked and not groups[-1] and (matched or not left):
                raise ValueError(f"{tree.where}: {self._shadowed(number, {deciders[i] for i in matched or asked})}")
            deciders.update(dict.fromkeys(groups[-1], number))
        rest = [i for i in asked if i not in deciders]
        bare = [tree.leaves[i].path for i in rest if i in tree.required]
        if self.default is MISSING and bare:
            raise ValueError(f"{tree.where}: {_uncovered(bare)}")
        decided: dict[int, Decision] = {}
        for (_, value), group in zip(self.rules, groups, strict=True):
            for i, decision in _decisions(tree, list(group), value).items():
                inner = f" → {decision.rule}" if decision.rule else ""
                decided[i] = decision._replace(rule=language.show((group[i],)) + inner)
        if self.default is not MISSING:
            for i, decision in _decisions(tree, rest, self.default).items():
                decided[i] = decision._replace(rule=decision.rule or "default")
        return decided

    def _values(self) -> list[Any]:
        values = [v for v in (*(value for _, value in self.rules), self.default) if v is not MISSING]
        return [v for value in values for v in (possible_values(value) if isinstance(value, Rules) else [value])]

    def _written(self) -> str:
        table = ", ".join(f"{language.show(patterns)}: {value!r}" for patterns, value in self.rules)
        default = "" if self.default is MISSING else f", default={self.default!r}"
        return f"by_path({{{table}}}{default})"

    def _arguments(self) -> dict[str, Any]:
        rules = [{"match": language.plain(patterns), "value": plain(value)} for patterns, value in self.rules]
        return {"rules": rules} if self.default is MISSING else {"rules": rules, "default": plain(self.default)}

    @classmethod
    def _from_arguments(cls, arguments: dict[str, Any]) -> Rules:
        arguments = entries("by_path", arguments, {"rules"}, {"default"})
        if not isinstance(arguments["rules"], list):
            raise TypeError(f"Rules.from_dict: the rules of by_path must be a list, got {arguments['rules']!r}.")
        rows = [entries("a rule of by_path", rule, {"match", "value"}) for rule in arguments["rules"]]
        rules = [(language.from_plain(row["match"]), from_plain(row["value"])) for row in rows]
        return by_path(rules, default=from_plain(arguments["default"]) if "default" in arguments else MISSING)

    def _shadowed(self, number: int, deciders: set[int]) -> str:
        earlier = [language.show(self.rules[i][0]) for i in sorted(deciders)]
        return (
            f"the rule {language.show(self.rules[number][0])} never decides: {' or '.join(earlier)} comes first and "
            "matches the same parameters. The first match wins. Put the narrower rule first, or remove this one."
        )


def _decisions(tree: Tree, group: Sequence[int], value: Any) -> dict[int, Decision]:
    if isinstance(value, Rules):
        return answers(value, tree, group) if group else {}
    return dict.fromkeys(group, Decision(value, ""))


@checks.known_arguments
def by_path(
    rules: Mapping[Any, Any] | Iterable[tuple[Any, Any]], *, default: Any = MISSING, syntax: str = "shell"
) -> Rules:
    """A table from patterns to values. For each parameter, the first rule that matches wins.

    Args:
        rules: a dictionary, or a list of pairs (pattern, value). The order counts. For patterns see `wdjax.paths`.
            Values: booleans for a mask; finite numbers >= 0, 0-d arrays or schedules for rates; strings for labels; or
            a rule set of these, which decides on the parameters that the pattern matches.
        default: the value of parameters that no rule matches. It may be a rule set: `default=weights_only()`. Without a
            default, such parameters are an error.
        syntax: how strings are read, for tables from other libraries: "shell" as described in `wdjax.paths`; "regex" as
            a regular expression for the whole path; "search" as one for any part of it; "contains" as a part of the
            path, where "." also stands for "/".

    Returns:
        `Rules`, to use as the mask or the rate of any wdjax function.

    Raises:
        TypeError: if a pattern or a value has an invalid type.
        ValueError: if a pattern is malformed, or a rate is negative, NaN, infinite or not a scalar. At `init` and
            `update`: if a rule matches no parameter or never decides, or if no rule covers a parameter.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> params = {"Dense_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
        >>> rules = wdjax.by_path({"bias": 0.0, "Dense_*": 0.1})
        >>> rules.values(params)
        {'Dense_0': {'bias': 0.0, 'kernel': 0.1}}
    """
    table = []
    if isinstance(rules, str):
        raise TypeError(
            f"by_path: the rules must be a table, got the string {rules!r}. Write only({rules!r}), or {TABLE}."
        )
    if isinstance(rules, Rules):
        raise TypeError(
            f"by_path: the rules must be a table, got the rule set {rules!r}. Use it as it is, or write {TABLE}."
        )
    for pair in rules.items() if isinstance(rules, Mapping) else rules:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(f"by_path: a rule must be a pair (pattern, value), got {pair!r}. Write {TABLE}.")
        table.append((language.checked_patterns("by_path", pair[0], syntax), _checked_value(pair[1])))
    if not table and default is MISSING:
        raise ValueError(f"by_path: no rules and no default were given. Write {TABLE}.")
    return Table(tuple(table), default if default is MISSING else _checked_value(default))


@checks.known_arguments
def only(*patterns: Pattern, syntax: str = "shell") -> Rules:
    """The mask that is True for parameters that match any of the patterns, and False for all others.

    Args:
        patterns: as in `wdjax.paths`; each must match at least one parameter.
        syntax: how strings are read, as in `by_path`.

    Raises:
        TypeError, ValueError: as `by_path`.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> params = {"Dense_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
        >>> wdjax.only("kernel").mask(params)
        {'Dense_0': {'bias': False, 'kernel': True}}
    """
    return Table(((language.checked_patterns("only", patterns, syntax), True),), default=False)


@checks.known_arguments
def all_but(*patterns: Pattern, syntax: str = "shell") -> Rules:
    """The mask that is False for parameters that match any of the patterns, and True for all others.

    Args:
        patterns: as in `wdjax.paths`; each must match at least one parameter.
        syntax: how strings are read, as in `by_path`: `all_but("bias", "LayerNorm.weight", syntax="contains")`.

    Raises:
        TypeError, ValueError: as `by_path`.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> params = {"Dense_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
        >>> wdjax.all_but("bias").mask(params)
        {'Dense_0': {'bias': False, 'kernel': True}}
    """
    return Table(((language.checked_patterns("all_but", patterns, syntax), False),), default=True)


def stacks(where: str, stacked_axes: Any) -> Any:
    """Checks how many leading axes stack layers; gives a dictionary from patterns to numbers as `Rules`.

    Raises:
        TypeError: if they are not whole numbers >= 0.
    """
    if stacked_axes is None:
        return 0
    counts = list(stacked_axes.values()) if isinstance(stacked_axes, Mapping) else [stacked_axes]
    if any(not isinstance(count, int) or isinstance(count, bool) or count < 0 for count in counts):
        raise TypeError(
            f"{where}: stacked_axes counts leading axes, got {stacked_axes!r}. "
            "Write stacked_axes=1, or stacked_axes={'layers': 1}."
        )
    return by_path(stacked_axes, default=0) if isinstance(stacked_axes, Mapping) else stacked_axes


def _checked_value(value: Any) -> Any:
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (str, Rules)) or is_flag(value):
        return value
    return checks.rate("by_path", "a value of the table", value, write=TABLE, may_be_array=True)


def _uncovered(paths: list[str]) -> str:
    name = paths[0].rpartition("/")[2]
    more = f" (and {len(paths) - 1} more: {', '.join(map(repr, paths[1:4]))})" if len(paths) > 1 else ""
    return (
        f"no rule covers the parameter {paths[0]!r}{more}. "
        f"Add a rule such as {{{name!r}: ...}}, or a value for all other parameters: by_path({{...}}, default=...)."
    )
