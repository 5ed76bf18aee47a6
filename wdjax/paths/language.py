"""The pattern language: what a pattern matches, and the error message for a pattern that matches nothing."""

import dataclasses
import difflib
import functools
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .._engine.rules import Rules, Tree, answers, check_booleans, check_whole
from .._engine.trees import Leaf


@dataclasses.dataclass(frozen=True)
class Piece:
    """A string that may match anywhere in a path, as "search" or "contains" reads it."""

    text: str
    syntax: str
    compiled: re.Pattern[str]


Pattern = str | re.Pattern[str] | Piece | Callable[[Leaf], bool] | Rules | tuple[Any, ...]

BELOW = r"(?:/|\Z)"  # A pattern that matches an inner node matches everything below it.
SYNTAXES = ("shell", "regex", "search", "contains")


def checked_patterns(where: str, pattern: Any, syntax: str = "shell") -> tuple[Pattern, ...]:
    """The patterns of one rule as a tuple. Errors for an invalid pattern name the function `where`."""
    if syntax not in SYNTAXES:
        raise ValueError(f"{where}: syntax must be one of {', '.join(map(repr, SYNTAXES))}, got {syntax!r}.")
    patterns = pattern if isinstance(pattern, tuple) else (pattern,)
    if not patterns:
        raise ValueError(f"{where}: no pattern was given. Write {where}('kernel').")
    return tuple(_checked_one(where, one, syntax) for one in patterns)


def _checked_one(where: str, pattern: Any, syntax: str) -> Pattern:
    if isinstance(pattern, str):
        if syntax == "shell":
            compiled(pattern)
            return pattern
        found = _compiled_as(where, pattern, syntax)
        return found if syntax == "regex" else Piece(pattern, syntax, found)
    if isinstance(pattern, Rules):
        check_booleans(pattern, where)
        check_whole(pattern, where)
        return pattern
    of_text = isinstance(pattern, Piece) or (isinstance(pattern, re.Pattern) and isinstance(pattern.pattern, str))
    if not of_text and (not callable(pattern) or isinstance(pattern, type)):
        raise TypeError(
            f"{where}: a pattern must be a string, a compiled regular expression, a function of a Leaf or a mask such "
            f"as weights_only(), got {pattern!r}. "
            "Write several patterns as separate arguments, only('kernel', 'embedding'), or as a tuple in a table."
        )
    return pattern  # pyright: ignore[reportReturnType]


def matching(tree: Tree, pattern: Pattern, asked: Sequence[int], left: Sequence[int]) -> set[int]:
    """The indices among `asked` of the leaves that a pattern matches. A rule set decides only on those in `left`.

    Raises:
        ValueError: if it matches none. A hole has a path but no shape. So where there are holes, a pattern that looks
            at more than the path may match nothing: the leaves that it is for may be hidden.
    """
    if isinstance(pattern, Rules):  # For leaves that earlier rules decide, it may raise an error.
        asked = left
    if not asked:
        return set()
    if isinstance(pattern, Rules):
        found = {i for i, answer in answers(pattern, tree, asked).items() if answer.value}
    else:
        matches = _matcher(tree.where, pattern)
        found = {i for i in asked if matches(tree.leaves[i])}
    by_path = isinstance(pattern, (str, re.Pattern, Piece))
    if not found and (by_path or all(tree.leaves[i].dtype is not None for i in asked)):
        raise ValueError(f"{tree.where}: {_no_match(tree, pattern, asked)}")
    return found


def show(patterns: tuple[Pattern, ...]) -> str:
    """The patterns of one rule as the user wrote them."""
    shown = [_show(pattern) for pattern in patterns]
    return shown[0] if len(shown) == 1 else f"({', '.join(shown)})"


def _show(pattern: Pattern) -> str:
    if isinstance(pattern, (str, Rules)):
        return repr(pattern)
    if isinstance(pattern, Piece):
        return f"{pattern.text!r} ({pattern.syntax})"
    if isinstance(pattern, re.Pattern):
        return f"re.compile({_with_flags(pattern)!r})"
    return getattr(pattern, "__qualname__", repr(pattern))


def plain(patterns: tuple[Pattern, ...]) -> Any:
    """The patterns of one rule for JSON and TOML: a string, {syntax: string}, a rule set, or a list of these.

    Raises:
        TypeError: for a function.
    """
    written = [_plain(pattern) for pattern in patterns]
    return written[0] if len(written) == 1 else written


def _plain(pattern: Pattern) -> Any:
    if isinstance(pattern, str):
        return pattern
    if isinstance(pattern, Rules):
        return pattern.to_dict()
    if isinstance(pattern, Piece):
        return {pattern.syntax: pattern.text}
    if isinstance(pattern, re.Pattern):
        return {"regex": _with_flags(pattern)}
    raise TypeError(
        f"Rules.to_dict: the function {_show(pattern)} can't be written to a file. Name the parameters by path."
    )


def from_plain(written: Any) -> Any:
    """The pattern that `plain` wrote."""
    if isinstance(written, (list, tuple)):
        return tuple(map(from_plain, written))
    if isinstance(written, Mapping):
        syntax = next(iter(written), None)
        if len(written) == 1 and syntax in SYNTAXES:
            return checked_patterns("Rules.from_dict", written[syntax], syntax)[0]
        return Rules.from_dict(written)
    return written


def _with_flags(pattern: re.Pattern[str]) -> str:
    """The string that compiles to a regular expression, with its flags inside."""
    if re.compile(pattern.pattern).flags == pattern.flags:
        return pattern.pattern
    return f"(?{''.join(flag for flag in 'aimsx' if pattern.flags & getattr(re, flag.upper()))}){pattern.pattern}"


def _compiled_as(where: str, text: str, syntax: str) -> re.Pattern[str]:
    if not text:
        raise ValueError(
            f"{where}: the pattern is an empty string. Write the path, or the part of a path, to look for."
        )
    if syntax == "contains":
        return re.compile(re.sub(r"\\\.|/", "[./]", re.escape(text)))
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(f"{where}: the regular expression {text!r} is malformed: {error}.") from error


@functools.lru_cache(maxsize=4096)
def compiled(pattern: str, star: str = "[^/]*") -> re.Pattern[str]:
    """A shell pattern as a regular expression, to `search` a canonical path with. `star` replaces each "*"."""
    segments = pattern.split("/")
    if not all(segments):
        raise ValueError(
            f"by_path: the pattern {pattern!r} has an empty segment. Remove the extra '/'. 'encoder/kernel' is "
            "compared from the root, and 'kernel' at any depth. A node includes everything below it."
        )
    if any("**" in segment and segment != "**" for segment in segments):
        raise ValueError(f"by_path: in {pattern!r}, '**' must stand alone in its segment, as in 'encoder/**/kernel'.")
    if pattern == "**":
        return re.compile("")
    start = r"\A" if len(segments) > 1 else r"(?:\A|/)"
    body = "".join("(?:[^/]*/)*" if segment == "**" else _segment(segment, star) + "/" for segment in segments[:-1])
    end = "" if segments[-1] == "**" else _segment(segments[-1], star) + BELOW
    try:
        return re.compile(start + body + end)
    except re.error as error:
        raise ValueError(f"by_path: the pattern {pattern!r} is malformed: {error}.") from error


def _segment(pattern: str, star: str) -> str:
    """One segment of a shell pattern as a regular expression. It is read as by `fnmatch`, but never crosses a "/"."""
    out, i = "", 0
    while i < len(pattern):
        char, i = pattern[i], i + 1
        if char == "*":
            out += star
        elif char == "?":
            out += "[^/]"
        elif char == "[" and (end := pattern.find("]", i + 1 + pattern.startswith("!", i))) >= 0:
            negated = pattern[i] == "!"
            inside = re.sub(r"([\\\[\]^&~|])", r"\\\1", pattern[i + negated : end])
            out += f"(?!/)[{'^' if negated else ''}{inside}]"
            i = end + 1
        else:
            out += re.escape(char)
    return out


def _matcher(where: str, pattern: Pattern) -> Callable[[Leaf], bool]:
    if isinstance(pattern, str):
        found = compiled(pattern).search
        return lambda leaf: found(leaf.path) is not None
    if isinstance(pattern, (re.Pattern, Piece)):
        match = pattern.fullmatch if isinstance(pattern, re.Pattern) else pattern.compiled.search
        return lambda leaf: match(leaf.path) is not None

    def predicate(leaf: Leaf) -> bool:
        answer = leaf.dtype is not None and pattern(leaf)  # pyright: ignore[reportCallIssue]
        if not isinstance(answer, (bool, np.bool_)):
            raise TypeError(
                f"{where}: the predicate {show((pattern,))} must return True or False, "
                f"but for {leaf.path!r} it returned {answer!r}."
            )
        return bool(answer)

    return predicate


def _no_match(tree: Tree, pattern: Pattern, asked: Sequence[int]) -> str:
    leaves = [tree.leaves[i] for i in asked]
    paths = [leaf.path for leaf in leaves]
    message = f"the pattern {show((pattern,))} matches "
    if isinstance(pattern, Rules):
        message += f"none of the {len(paths)} parameters that earlier rules leave undecided."
    elif len(paths) < len(tree.leaves):
        message += f"none of the parameters that its rule set decides on ({len(paths)} of {len(tree.leaves)})."
    else:
        message += "no parameter."
    if paths == [""]:
        return (
            f"{message} The params are a single array, so they have no paths. Rules need the tree of parameters: put "
            "them outside optax.flatten. With optax.inject_hyperparams, pass the rule set itself and not its .mask."
        )
    if isinstance(pattern, str):
        message += _near_names(pattern, paths)
    text = pattern if isinstance(pattern, str) else getattr(pattern, "text", getattr(pattern, "pattern", ""))
    message += f" The nearest of {len(paths)} paths: {nearest(text, paths)}."
    hidden = sum(leaf.dtype is None for leaf in leaves)
    if hidden:
        message += (
            f" {hidden} of them are empty here (None, or hidden by optax.masked). If the rule is for hidden "
            "parameters, build the mask on all parameters first: mask=rules.mask(params)."
        )
    return message


def nearest(text: str, paths: Sequence[str]) -> str:
    """The three paths that are nearest to a string."""
    return ", ".join(map(repr, difflib.get_close_matches(text, paths, n=3, cutoff=0.0)))


def _near_names(pattern: str, paths: Sequence[str]) -> str:
    """Hints: the name that is nearest to a pattern, and a name that contains it."""
    anywhere = f"**/{pattern}"
    if "/" in pattern and _count(anywhere, paths):
        return f" It is compared from the root. At any depth, {anywhere!r} matches {_count(anywhere, paths)}."
    matched = _count_as_regex(pattern, paths)
    if matched:
        return f" As a regular expression it matches {matched}. Write syntax='regex', or re.compile({pattern!r})."
    names = sorted(set(paths) if "/" in pattern else {name for path in paths for name in path.split("/")})
    by_lower = {name.lower(): name for name in reversed(names)}
    hint = ""
    near = difflib.get_close_matches(pattern.lower(), by_lower, n=1, cutoff=0.6)
    if near and _count(by_lower[near[0]], paths):
        name = by_lower[near[0]]
        numbered = re.sub(r"\d+", "*", name)
        counts = {text: _count(text, paths) for text in (name, numbered)}
        # A pattern without a number probably means all the numbered siblings.
        if counts[numbered] > counts[name] and not re.search(r"\d", pattern):
            name = numbered
        hint += f" Did you mean {name!r}? It matches {counts[name]} parameter{'s' * (counts[name] != 1)}."
    longer = (name for name in names if len(name) > len(pattern) > 1 and pattern.lower() in name.lower())
    whole = None if "/" in pattern else next(longer, None)
    if whole:
        start = whole.lower().index(pattern.lower())
        wider = f"*{whole[start : start + len(pattern)]}*"
        hint += (
            f" {pattern!r} is part of {whole!r}, but patterns are compared with whole names. {wider!r} matches "
            f"{_count(wider, paths)}."
        )
    return hint


def _count_as_regex(pattern: str, paths: Sequence[str]) -> int:
    if not re.search(r"\.[*+]|[()|^$\\]", pattern):
        return 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # The pattern was not meant as a regular expression.
            found = re.compile(pattern).fullmatch
    except re.error:
        return 0
    return sum(found(path) is not None for path in paths)


def _count(pattern: str, paths: Sequence[str]) -> int:
    try:
        found = compiled(pattern).search
    except ValueError:  # Not every name is a valid pattern.
        return 0
    return sum(found(path) is not None for path in paths)
