"""Tables from patterns to values, in which the first match wins: `by_path`, `only`, `all_but`."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .._engine import checks
from .._engine.anchors import EMA
from .._engine.decision import Decision, Tree
from .._engine.rules import TABLE, Rules, answers, from_plain, is_flag
from .._engine.text import printed, shown
from . import language
from .language import Pattern, Patterns


class _Missing:
    def __repr__(self) -> str:
        return "..."


MISSING: Any = _Missing()  # Stands for no default in the signature of `by_path`.


class Row(NamedTuple):
    match: Patterns
    value: Any


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Table(Rules, kind="by_path"):
    """An ordered table from patterns to values. A rule set as a value decides on what its pattern matched."""

    rules: tuple[Row, ...]
    default: Any = None

    def _decide(self, tree: Tree, asked: Sequence[int]) -> dict[int, Decision]:
        # A hole counts as matched, because inside `optax.masked` or `optax.partition` part of the model is hidden.
        deciders: dict[int, str] = {}
        parts: list[tuple[Any, dict[int, str]]] = []  # Each value, and its leaves with the pattern that matched.
        for patterns, value in self.rules:
            left = [i for i in asked if i not in deciders]
            matched: dict[int, str] = {}
            for pattern in patterns:
                new = language.matching(tree, pattern, asked, left)
                matched = {**dict.fromkeys(new, language.show(pattern)), **matched}
            group = {i: matched[i] for i in left if i in matched}
            if asked and not group and (matched or not left):
                earlier = dict.fromkeys(shown for i, shown in deciders.items() if i in (matched or asked))
                raise ValueError(
                    f"{tree.where}: the rule {patterns} never decides: {' or '.join(earlier)} comes first and matches "
                    "the same parameters. Put the narrower rule first, or remove this one."
                )
            deciders.update(dict.fromkeys(group, repr(patterns)))
            parts.append((value, group))
        rest = [i for i in asked if i not in deciders]
        bare = [tree.leaves[i].path for i in rest if i in tree.required]
        if self.default is not None:
            parts.append((self.default, dict.fromkeys(rest, "")))
        elif bare:
            pattern = language.at(bare[0].rpartition("/")[2] or bare[0])
            more = f" (and {len(bare) - 1} more: {', '.join(map(repr, bare[1:4]))})" if len(bare) > 1 else ""
            raise ValueError(
                f"{tree.where}: no rule covers the parameter {bare[0]!r}{more}. Add a rule such as "
                f"{{{pattern}: ...}}, or a value for all others: by_path({{...}}, default=...)."
            )
        decided: dict[int, Decision] = {}
        for value, group in parts:
            if isinstance(value, Rules):
                found = answers(value, tree, list(group)) if group else {}
            else:
                found = dict.fromkeys(group, Decision(value, ""))
            for i, decision in found.items():
                decided[i] = decision._replace(rule=" → ".join(filter(None, (group[i], decision.rule))) or "default")
        return decided

    def _values(self) -> list[Any]:
        values = [value for value in (*(row.value for row in self.rules), self.default) if value is not None]
        return [v for value in values for v in (value._values() if isinstance(value, Rules) else [value])]

    def _written(self) -> str:
        table = ", ".join(f"{patterns}: {printed(value)}" for patterns, value in self.rules)
        default = "" if self.default is None else f", default={printed(self.default)}"
        return f"by_path({{{table}}}{default})"

    @staticmethod
    def _from_plain(rules: Any, default: Any = MISSING) -> Rules:
        if not isinstance(rules, list):
            raise TypeError(f"Rules.from_dict: the rules of by_path must be a list, got {shown(rules)}.")
        rows = [checks.read("a rule of by_path", Row, rule) for rule in rules]
        table = [(language.from_plain(match), from_plain(value)) for match, value in rows]
        return by_path(table, default=from_plain(default))


@checks.known_arguments
def by_path(
    rules: Mapping[Any, Any] | Iterable[tuple[Any, Any]], *, default: Any = MISSING, syntax: str = "shell"
) -> Rules:
    """A table from patterns to values. For each parameter, the first rule that matches wins.

    Place:  a mask, a rate, an anchor or labels: wherever wdjax takes `Rules`. Its method `mask` is for Optax.
    Args:
        rules: a dictionary, or a list of pairs (pattern, value). For patterns see `wdjax.paths`. Values: booleans for a
            mask; finite numbers >= 0, 0-d arrays or schedules for rates; strings for labels; `"init"` and
            `EMA(...)` for anchors; or a rule set of these.
        default: the value of parameters that no rule matches: `default=weights_only()`. Without it, they are an error.
        syntax: how strings are read: "shell" as in `wdjax.paths`; "regex" as a regular expression for the whole path;
            "search" as one for any part of it; "contains" as a part of the path, where "." also matches "/".

    Returns: `Rules`.
    Raises: TypeError, ValueError for what is not a table, a pattern, a value or a syntax; and where the table is used,
            if a rule matches nothing or never decides, or if a parameter has neither a rule nor a default.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> params = {"Dense_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
        >>> wdjax.by_path({"bias": 0.0, "Dense_*": 0.1}).values(params)
        {'Dense_0': {'bias': 0.0, 'kernel': 0.1}}
    """
    if isinstance(rules, (str, Rules)):
        instead = f"only({rules!r})" if isinstance(rules, str) else "it as it is"
        raise TypeError(f"by_path: the rules must be a table, got {shown(rules)}. Write {instead}, or {TABLE}.")
    table = []
    for pair in rules.items() if isinstance(rules, Mapping) else rules:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(f"by_path: a rule must be a pair (pattern, value), got {shown(pair)}. Write {TABLE}.")
        patterns = language.checked_patterns("by_path", pair[0], syntax)
        table.append(Row(patterns, _checked_value(pair[1], f"the value of {patterns}")))
    if not table and default is MISSING:
        raise ValueError(f"by_path: no rules and no default were given. Write {TABLE}.")
    return Table(tuple(table), None if default is MISSING else _checked_value(default, "default"))


@checks.known_arguments
def only(*patterns: Pattern, syntax: str = "shell") -> Rules:
    """The mask that is True for parameters that match any of the patterns, which are those of `by_path`.

    Args:
        *patterns: names, paths, regular expressions, functions of a `Leaf`, or masks. One match is enough.
        syntax: how strings are read, as in `by_path`.

    Returns: `Rules` of booleans.
    Raises: TypeError, ValueError for an invalid pattern or syntax, or no pattern; and where the mask is used, if a
            pattern matches no parameter.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> wdjax.only("kernel").mask({"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)})
        {'bias': False, 'kernel': True}
    """
    return Table((Row(language.checked_patterns("only", patterns, syntax), True),), default=False)


@checks.known_arguments
def all_but(*patterns: Pattern, syntax: str = "shell") -> Rules:
    """The mask that is False for parameters that match any of the patterns: the opposite of `only`.

    Args, Returns, Raises: as `only`.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> wdjax.all_but("bias").mask({"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)})
        {'bias': False, 'kernel': True}
    """
    return Table((Row(language.checked_patterns("all_but", patterns, syntax), False),), default=True)


def stacks(where: str, stacked_axes: Any) -> Any:
    """Checks how many leading axes stack layers; gives a dictionary from patterns to numbers as `Rules`."""
    if stacked_axes is None:
        return 0
    counts = list(stacked_axes.values()) if isinstance(stacked_axes, Mapping) else [stacked_axes]
    if any(not checks.is_whole(count) or count < 0 for count in counts):
        raise TypeError(
            f"{where}: stacked_axes counts leading axes, got {shown(stacked_axes)}. Write stacked_axes=1."
            f"{checks.static('stacked_axes', stacked_axes)}"
        )
    return by_path(stacked_axes, default=0) if isinstance(stacked_axes, Mapping) else int(stacked_axes)


def _checked_value(value: Any, of: str) -> Any:
    if value is ...:
        raise ValueError(
            f"by_path: {of} is still '...'. In a mask, write True for what decays, or False. In a table of rates, "
            "write the rate."
        )
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (str, Rules, EMA)) or is_flag(value):
        return value
    return checks.rate("by_path", "a value of the table", value, write=TABLE, may_be_array=True)
