"""What errors say about the parameters of a tree: near names, names in other libraries, repeated blocks as one."""

import collections
import difflib
import functools
import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from .._engine.text import merged, merged_texts
from .._engine.trees import Leaf
from ._shell import compiled, compiled_regex

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


def other_names(text: str, paths: Sequence[str]) -> str:
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


def near_names(pattern: str, paths: Sequence[str]) -> str:
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
            match = compiled_regex("", "", pattern).fullmatch if as_regex else compiled(pattern).search
    except ValueError:  # Not every name is a valid pattern.
        return 0
    return sum(map(bool, map(match, paths)))
