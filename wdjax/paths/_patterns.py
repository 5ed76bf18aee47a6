"""The pattern language: what one pattern matches, and what to say of one that matches nothing."""

import difflib
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .._leaves import Leaf

Pattern = str | re.Pattern[str] | Callable[[Leaf], bool] | tuple[Any, ...]

BELOW = r"(?:/|\Z)"  # A match of an inner node takes all that is below it.


def checked(where: str, pattern: Any) -> tuple[Pattern, ...]:
    """The patterns of one rule as a tuple; refuses what is no pattern, in the name of the function `where`."""
    patterns = pattern if isinstance(pattern, tuple) else (pattern,)
    if not patterns:
        raise ValueError(f"{where}: no pattern was given. Write {where}('kernel').")
    for one in patterns:
        if isinstance(one, str):
            compiled(one)
        elif not isinstance(one, re.Pattern) and (not callable(one) or isinstance(one, type)):
            raise TypeError(
                f"{where}: a pattern is a text, a compiled regular expression or a function of a Leaf, got {one!r}. "
                "Write several patterns as separate arguments, only('kernel', 'embedding'), or as a tuple in a table."
            )
    return patterns


def matching(where: str, pattern: Pattern, leaves: Sequence[Leaf]) -> set[int]:
    """The indices of the leaves that a pattern matches.

    Raises:
        ValueError: if it matches none. A hole has a path but no shape, so a predicate that matches nothing is let
            pass where there are holes: what it is for may be hidden.
    """
    matches = _matcher(where, pattern)
    found = {i for i, leaf in enumerate(leaves) if matches(leaf)}
    is_predicate = not isinstance(pattern, (str, re.Pattern))
    if not found and not (is_predicate and any(leaf.dtype is None for leaf in leaves)):
        raise ValueError(f"{where}: {_no_match(pattern, leaves)}")
    return found


def show(patterns: tuple[Pattern, ...]) -> str:
    """The patterns of one rule as a person wrote them."""
    shown = [
        repr(p)
        if isinstance(p, str)
        else f"re.compile({p.pattern!r})"
        if isinstance(p, re.Pattern)
        else getattr(p, "__qualname__", repr(p))
        for p in patterns
    ]
    return shown[0] if len(shown) == 1 else f"({', '.join(shown)})"


@functools.lru_cache(maxsize=4096)
def compiled(pattern: str) -> re.Pattern[str]:
    """A text pattern as a regular expression to `search` a canonical path with."""
    segments = pattern.split("/")
    if not all(segments):
        raise ValueError(
            f"by_path: the pattern {pattern!r} has an empty segment. Paths have no '/' at their ends: 'encoder/kernel' "
            "is compared from the root, 'kernel' at any depth; a node takes all below it."
        )
    if any("**" in segment and segment != "**" for segment in segments):
        raise ValueError(f"by_path: in {pattern!r}, '**' must stand alone in its segment, as in 'encoder/**/kernel'.")
    if pattern == "**":
        return re.compile("")
    start = r"\A" if len(segments) > 1 else r"(?:\A|/)"
    body = "".join("(?:[^/]*/)*" if segment == "**" else _segment(segment) + "/" for segment in segments[:-1])
    end = "" if segments[-1] == "**" else _segment(segments[-1]) + BELOW
    try:
        return re.compile(start + body + end)
    except re.error as error:
        raise ValueError(f"by_path: the pattern {pattern!r} is malformed: {error}.") from error


def _segment(pattern: str) -> str:
    """One segment of a shell pattern as a regular expression, as `fnmatch` reads it but never crossing a "/"."""
    out, i = "", 0
    while i < len(pattern):
        char, i = pattern[i], i + 1
        if char == "*":
            out += "[^/]*"
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
    if isinstance(pattern, re.Pattern):
        whole = pattern.fullmatch
        return lambda leaf: whole(leaf.path) is not None

    def predicate(leaf: Leaf) -> bool:
        answer = leaf.dtype is not None and pattern(leaf)  # pyright: ignore[reportCallIssue]
        if not isinstance(answer, (bool, np.bool_)):
            raise TypeError(
                f"{where}: the predicate {show((pattern,))} must answer True or False, "
                f"and for {leaf.path!r} it answered {answer!r}."
            )
        return bool(answer)

    return predicate


def _no_match(pattern: Pattern, leaves: Sequence[Leaf]) -> str:
    paths = [leaf.path for leaf in leaves]
    message = f"the pattern {show((pattern,))} matches no parameter."
    if paths == [""]:
        return (
            f"{message} The params are one array and have no paths. Give rules the tree: outside optax.flatten, and "
            "under optax.inject_hyperparams the rule set itself, not its method mask."
        )
    if isinstance(pattern, str):
        names = set(paths) if "/" in pattern else {name for path in paths for name in path.split("/")}
        by_lower = {name.lower(): name for name in sorted(names)}
        near = difflib.get_close_matches(pattern.lower(), by_lower, n=1, cutoff=0.6)
        if near:
            name = by_lower[near[0]]
            count = sum(name == path or name in path.split("/") for path in paths)
            message += f" Did you mean {name!r}? It matches {count} parameter{'s' * (count != 1)}."
    text = pattern if isinstance(pattern, str) else getattr(pattern, "pattern", "")
    nearest = difflib.get_close_matches(text, paths, n=3, cutoff=0.0)
    message += f" The nearest of {len(paths)} paths: {', '.join(map(repr, nearest))}."
    hidden = sum(leaf.dtype is None for leaf in leaves)
    if hidden:
        message += (
            f" {hidden} of them are empty here (None, or hidden by optax.masked): if the rule is for what they hide, "
            "build the tree on all parameters first: mask=rules.mask(params)."
        )
    return message
