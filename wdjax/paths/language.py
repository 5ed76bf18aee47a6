"""The pattern language: which parameters a pattern matches. A pattern that matches nothing is an error."""

import contextlib
import dataclasses
import glob
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .._engine.decision import Tree
from .._engine.rules import Rules, answers, check_booleans, check_whole, plain
from .._engine.text import shown
from .._engine.trees import Leaf
from ._shell import compiled, compiled_regex
from .hints import near_names, nearest, other_names

Pattern = str | re.Pattern[str] | Callable[[Leaf], bool] | Rules | tuple[Any, ...]
SYNTAXES = ("shell", "regex", "search", "contains")


@dataclasses.dataclass(frozen=True)
class Text:
    """A pattern of paths, as its syntax reads it."""

    text: str
    syntax: str
    regex: re.Pattern[str]

    def to_plain(self) -> Any:
        return self.text if self.syntax == "shell" else {self.syntax: self.text}

    def __repr__(self) -> str:
        written = {"shell": f"{self.text!r}", "regex": f"re.compile({self.text!r})"}
        return written.get(self.syntax, f"{self.text!r} ({self.syntax})")


class Patterns(tuple[Any, ...]):
    """The patterns of one rule: texts, predicates and rule sets."""

    def to_plain(self) -> Any:
        written = [plain(pattern) for pattern in self]
        return written[0] if len(written) == 1 else written

    def __repr__(self) -> str:
        return show(self[0]) if len(self) == 1 else f"({', '.join(map(show, self))})"


def at(path: str) -> Text:
    """The pattern of a node and all below it. A shell pattern has no empty segment."""
    pattern = glob.escape(path) if all(path.split("/")) else re.compile(f"{re.escape(path)}(?:/.*)?")
    return _checked("", pattern, "shell")


def show(pattern: Any) -> str:
    """A pattern as the user wrote it."""
    return getattr(pattern, "__qualname__", repr(pattern))


def checked_patterns(where: str, pattern: Any, syntax: str = "shell") -> Patterns:
    """The patterns of one rule. Errors for an invalid pattern name the function `where`."""
    if syntax not in SYNTAXES:
        raise ValueError(f"{where}: syntax must be one of {', '.join(map(repr, SYNTAXES))}, got {shown(syntax)}.")
    patterns = pattern if isinstance(pattern, tuple) else (pattern,)
    if not patterns:
        raise ValueError(f"{where}: no pattern was given. Write {where}('kernel').")
    return Patterns(_checked(where, one, syntax) for one in patterns)


def _checked(where: str, pattern: Any, syntax: str) -> Any:
    if isinstance(pattern, str):
        if syntax == "shell":
            return Text(pattern, syntax, compiled(pattern))
        if not pattern:
            raise ValueError(f"{where}: the pattern is an empty string. Write the path, or a part of it.")
        regex = re.sub(r"\\\.|/", "[./]", re.escape(pattern)) if syntax == "contains" else pattern
        return Text(pattern, syntax, compiled_regex(where, f"the regular expression {shown(pattern)}", regex))
    if isinstance(pattern, re.Pattern) and isinstance(pattern.pattern, str):
        return Text(_with_flags(pattern), "regex", pattern)
    if isinstance(pattern, Rules):
        check_booleans(pattern, where)
        check_whole(pattern, where)
    elif not isinstance(pattern, Text) and (isinstance(pattern, type) or not callable(pattern)):
        raise TypeError(
            f"{where}: a pattern must be a string, a compiled regular expression, a function of a Leaf or a mask such "
            f"as weights_only(), got {shown(pattern)}. Write only('kernel', 'embedding'), or several as a "
            "tuple in a table."
        )
    return pattern


def matching(tree: Tree, pattern: Any, asked: Sequence[int], left: Sequence[int]) -> set[int]:
    """The indices among `asked` of the leaves that a pattern matches: at least one, or it raises an error.

    A rule set decides only on those in `left`: for the others, it may raise an error. Where there are holes, a pattern
    that looks at more than the path may match nothing.
    """
    asked = left if isinstance(pattern, Rules) else asked
    if not asked:
        return set()
    if isinstance(pattern, Rules):
        found = {i for i, answer in answers(pattern, tree, asked).items() if answer.value}
    elif isinstance(pattern, Text):
        match = pattern.regex.fullmatch if pattern.syntax == "regex" else pattern.regex.search
        found = {i for i in asked if match(tree.leaves[i].path)}
    else:
        answers_of = {i: tree.leaves[i].dtype is not None and pattern(tree.leaves[i]) for i in asked}
        for i, answer in answers_of.items():
            if not isinstance(answer, (bool, np.bool_)):
                raise TypeError(
                    f"{tree.where}: the predicate {show(pattern)} must return True or False, but for "
                    f"{tree.leaves[i].path!r} it returned {shown(answer)}."
                )
        found = {i for i, answer in answers_of.items() if answer}
    if not found and (isinstance(pattern, Text) or all(tree.leaves[i].dtype is not None for i in asked)):
        raise ValueError(f"{tree.where}: {_no_match(tree, pattern, asked)}")
    return found


def matching_all(tree: Tree, patterns: Iterable[Any]) -> set[int]:
    """The indices of all leaves that any of the patterns matches."""
    everyone = range(len(tree.leaves))
    return set().union(*(matching(tree, pattern, everyone, everyone) for pattern in patterns))


def from_plain(written: Any) -> Any:
    """The pattern that `to_plain` wrote."""
    if isinstance(written, (list, tuple)):
        return tuple(map(from_plain, written))
    if not isinstance(written, Mapping):
        return written
    syntax = next(iter(written), None)
    if len(written) == 1 and syntax in SYNTAXES:
        return checked_patterns("Rules.from_dict", written[syntax], syntax)[0]
    return Rules.from_dict(written)


def _with_flags(pattern: re.Pattern[str]) -> str:
    """The string that compiles to a regular expression, with its flags inside."""
    text = pattern.pattern or "(?:)"  # An empty string is refused, since in other syntaxes it matches everything.
    with contextlib.suppress(ValueError):  # Without its flags, it may be malformed.
        if compiled_regex("", "", text).flags == pattern.flags & ~re.DEBUG:  # DEBUG only prints.
            return text
    return f"(?{''.join(flag for flag in 'aimsx' if pattern.flags & getattr(re, flag.upper()))}){text}"


def _no_match(tree: Tree, pattern: Any, asked: Sequence[int]) -> str:
    leaves = [tree.leaves[i] for i in asked]
    paths = [leaf.path for leaf in leaves]
    of = "no parameter"
    if isinstance(pattern, Rules):
        of = f"none of the {len(paths)} parameters that earlier rules leave undecided"
    elif len(paths) < len(tree.leaves):
        of = f"none of the parameters that its rule set decides on ({len(paths)} of {len(tree.leaves)})"
    message = f"the pattern {show(pattern)} matches {of}."
    if paths == [""]:
        return (
            f"{message} The params are a single array, so they have no paths. Rules need the tree of parameters: put "
            "them outside optax.flatten. With optax.inject_hyperparams, pass the rule set itself and not its .mask."
        )
    if isinstance(pattern, Text):
        message += other_names(pattern.text, paths)
        message += near_names(pattern.text, paths) if pattern.syntax == "shell" else ""
    message += f" The nearest of {len(paths)} paths: {nearest(getattr(pattern, 'text', ''), paths)}."
    hidden = sum(leaf.dtype is None for leaf in leaves)
    remedy = "If the rule is for hidden parameters, build the mask on all parameters first: mask=rules.mask(params)."
    empty = f" {hidden} of them are empty here (None, or hidden by optax.masked). {remedy}" if hidden else ""
    return message + empty
