"""The pattern language: what a pattern matches, and the error message for a pattern that matches nothing."""

import collections
import contextlib
import dataclasses
import difflib
import functools
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .._engine.rules import Rules, Tree, answers, check_booleans, check_whole, plain
from .._engine.text import merged, merged_texts, shown
from .._engine.trees import Leaf

Pattern = str | re.Pattern[str] | Callable[[Leaf], bool] | Rules | tuple[Any, ...]
SYNTAXES = ("shell", "regex", "search", "contains")

# What the libraries call one parameter.
_CALLED: dict[str, dict[str, str]] = {
    "a norm's scale": {"gamma": "Keras", "scale": "Flax and Haiku", "weight": "PyTorch and Equinox"},
    "a norm's shift": {"beta": "Keras", "offset": "Haiku", "bias": "Flax, PyTorch and Equinox"},
    "a layer's matrix": {"kernel": "Flax and Keras", "weight": "PyTorch and Equinox", "w": "Haiku"},
    "a layer's bias": {"bias": "Flax, Keras, PyTorch and Equinox", "b": "Haiku"},
    "an embedding's table": {
        "embedding": "Flax",
        "embeddings": "Keras and Haiku",
        "weight": "PyTorch and Equinox",
    },
    "the mean of a batch norm": {"mean": "Flax", "moving_mean": "Keras", "running_mean": "PyTorch"},
    "the variance of a batch norm": {"var": "Flax", "moving_variance": "Keras", "running_var": "PyTorch"},
    **{
        f"an attention's {name} projection": {
            name: "Flax, Keras and Haiku",
            f"{name}_proj": "Equinox",
            f"{name[0]}_proj": "PyTorch",
            "in_proj_weight": "PyTorch",
        }
        for name in ("query", "key", "value")
    },
    "an attention's output projection": {
        "out_proj": "PyTorch",
        "out": "Flax",
        "attention_output": "Keras",
        "output_proj": "Equinox",
    },
    "a recurrent layer's matrix for its state": {
        "recurrent_kernel": "Keras",
        "weight_hh_l0": "PyTorch",
        "weight_hh": "Equinox",
        "w_h": "Haiku",
        "hi": "Flax",
    },
}


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
        return Text(pattern, syntax, _regex(where, f"the regular expression {pattern!r}", regex))
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
    with contextlib.suppress(re.error):  # Without its flags, it may be malformed.
        if re.compile(pattern.pattern).flags == pattern.flags:
            return pattern.pattern
    return f"(?{''.join(flag for flag in 'aimsx' if pattern.flags & getattr(re, flag.upper()))}){pattern.pattern}"


def _regex(where: str, what: str, text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(f"{where}: {what} is malformed: {error}.") from error


@functools.lru_cache(maxsize=4096)
def compiled(pattern: str, *, is_numbered: bool = False) -> re.Pattern[str]:
    """A shell pattern as a regular expression, to `search` a canonical path with.

    If `is_numbered`, each "*" is a group for a whole number. The time is polynomial, because no step after a star is
    taken back: if what follows a star matches anywhere, its leftmost place leaves the most for the rest.
    """
    segments = pattern.split("/")
    if not all(segments):
        raise ValueError(
            f"by_path: the pattern {pattern!r} has an empty segment. Remove the extra '/'. 'encoder/kernel' is "
            "compared from the root, and 'kernel' at any depth. A node includes everything below it."
        )
    if any("**" in segment and segment != "**" for segment in segments):
        raise ValueError(f"by_path: in {pattern!r}, '**' must stand alone in its segment, as in 'encoder/**/kernel'.")
    runs = [""]  # The segments between one "**" and the next.
    for k, segment in enumerate(segments, 1):
        # A pattern that matches an inner node matches everything below it.
        end = r"(?:/|\Z)" if k == len(segments) else "/"
        runs = [*runs, ""] if segment == "**" else [*runs[:-1], runs[-1] + _segment(segment, is_numbered) + end]
    start = r"\A" if len(segments) > 1 else r"(?:\A|/)"
    regex = start + runs[0] + "".join(f"(?>(?:[^/]*/)*?{run})" for run in runs[1:])
    return _regex("by_path", f"the pattern {pattern!r}", regex)


def _segment(pattern: str, is_numbered: bool) -> str:
    """One segment of a shell pattern as a regular expression. It is read as by `fnmatch`, but never crosses a "/"."""
    pieces = [""]  # The parts between one star and the next.
    for token in re.finditer(r"\[(?P<negated>!?+)(?P<inside>.[^\]]*)\]|.", pattern, flags=re.DOTALL):
        if token[0] == "*":
            pieces.append("")
        elif token["inside"]:
            inside = re.sub(r"([\\\[\]^&~|])", r"\\\1", token["inside"])
            pieces[-1] += f"(?!/)[{'^' if token['negated'] else ''}{inside}]"
        else:
            pieces[-1] += "[^/]" if token[0] == "?" else re.escape(token[0])
    if is_numbered or len(pieces) == 1:
        return r"(\d++)".join(pieces)
    first, *middle, last = pieces
    return first + "".join(f"(?>[^/]*?{piece})" for piece in middle) + "[^/]*" + last


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
        message += _other_names(pattern.text, paths)
        message += _near_names(pattern.text, paths) if pattern.syntax == "shell" else ""
    message += f" The nearest of {len(paths)} paths: {nearest(getattr(pattern, 'text', ''), paths)}."
    hidden = sum(leaf.dtype is None for leaf in leaves)
    remedy = "If the rule is for hidden parameters, build the mask on all parameters first: mask=rules.mask(params)."
    empty = f" {hidden} of them are empty here (None, or hidden by optax.masked). {remedy}" if hidden else ""
    return message + empty


def grouped(leaves: Iterable[Leaf]) -> list[list[Leaf]]:
    """The parameters in groups of one shape, whose paths differ only in their numbers."""
    groups: dict[Any, list[Leaf]] = collections.defaultdict(list)
    for leaf in leaves:
        groups[re.sub(r"\d+", "0", leaf.path), leaf.shape].append(leaf)
    return [part for group in groups.values() for part in merged(group)]


def with_shapes(leaves: Iterable[Leaf]) -> str:
    """The parameters and their shapes, with repeated blocks as one."""
    groups = grouped(leaves)
    return ", ".join(f"{merged_texts([leaf.path for leaf in group])!r} {group[0].shape}" for group in groups)


def nearest(text: str, paths: Sequence[str]) -> str:
    """The three paths that are nearest to a string."""
    return ", ".join(map(repr, difflib.get_close_matches(text, paths, n=3, cutoff=0.0)))


def _other_names(text: str, paths: Sequence[str]) -> str:
    """Hints: what this tree calls the parameters that another library has under a name in a pattern."""
    names = {name for path in paths for name in re.split("[/.]", path)}
    hints = [
        f" {name!r} is {what} in {called[name]}. Here it is {other!r}, which matches {_parameters(other, paths)}."
        for name in dict.fromkeys(re.findall(r"[\w\[\]]+", text))
        for what, called in _CALLED.items()
        if name in called and name not in names
        for other in called
        if other in names and _count(other, paths)
    ]
    for name in dict.fromkeys(re.findall(r"\w+", text)):
        kept = [what for what, called in _CALLED.items() if name in called and "batch norm" in what]
        if kept and not hints:
            hints = [f" {name!r} is {kept[0]}. These params hold none, so leave the pattern out."]
    return "".join(hints)


def _near_names(pattern: str, paths: Sequence[str]) -> str:
    """Hints: the name that is nearest to a pattern, and a name that contains it."""
    count = functools.partial(_count, paths=paths)
    anywhere = f"**/{pattern}"
    if "/" in pattern and count(anywhere):
        return f" It is compared from the root. At any depth, {anywhere!r} matches {count(anywhere)}."
    matched = re.search(r"\.[*+]|[()|^$\\]", pattern) and count(pattern, as_regex=True)
    if matched:
        return f" As a regular expression it matches {matched}. Write syntax='regex', or re.compile({pattern!r})."
    names = sorted(set(paths) if "/" in pattern else {name for path in paths for name in path.split("/")})
    by_lower = {name.lower(): name for name in reversed(names)}
    hint = ""
    near = difflib.get_close_matches(pattern.lower(), by_lower, n=1, cutoff=0.6)
    if near and count(by_lower[near[0]]):
        name = by_lower[near[0]]
        numbered = re.sub(r"\d+", "*", name)
        # A pattern without a number probably means all the numbered siblings.
        if count(numbered) > count(name) and not re.search(r"\d", pattern):
            name = numbered
        hint += f" Did you mean {name!r}? It matches {_parameters(name, paths)}."
    longer = (name for name in names if len(name) > len(pattern) > 1 and pattern.lower() in name.lower())
    whole = None if "/" in pattern else next(longer, None)
    if whole:
        start = whole.lower().index(pattern.lower())
        wider = f"*{whole[start : start + len(pattern)]}*"
        hint += f" {pattern!r} is part of {whole!r}, not a whole name. {wider!r} matches {count(wider)}."
    return hint


def _parameters(pattern: str, paths: Sequence[str]) -> str:
    return f"{(count := _count(pattern, paths))} parameter{'s' * (count != 1)}"


def _count(pattern: str, paths: Sequence[str], *, as_regex: bool = False) -> int:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # The pattern was not meant as a regular expression.
            match = _regex("", "", pattern).fullmatch if as_regex else compiled(pattern).search
    except ValueError:  # Not every name is a valid pattern.
        return 0
    return sum(map(bool, map(match, paths)))
