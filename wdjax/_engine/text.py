"""How errors and tables show values and paths: an array by its shape, and repeated blocks as one path."""

import collections
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

_NUMBER = re.compile(r"\d+")
_LONGEST = 80


def shown(value: Any) -> str:
    """A value in an error: short, and without the numbers in arrays."""
    if isinstance(value, (np.ndarray, jax.Array)) and value.shape:
        return f"an array of shape {value.shape}"
    leaves = jax.tree.leaves(value)
    if len(leaves) == 1 and leaves[0] is value:
        text = repr(value)
        return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    arrays = sum(hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves)
    name = f"{type(value).__module__.partition('.')[0]}.{type(value).__name__}".removeprefix("builtins.")
    if not arrays:
        text = repr(value)
        return text if len(text) <= _LONGEST else f"a {name} of {len(leaves)} leaves"
    return f"a {name} of {arrays} array{'s' * (arrays != 1)}"


def merged(group: Sequence[Any]) -> list[list[Any]]:
    """The rows in parts. Each has every combination of the numbers in its paths, so that its line is exact."""
    columns = _columns([row.path for row in group])
    if math.prod(map(len, columns)) == len(group):
        return [list(group)]
    first = next(k for k, column in enumerate(columns) if len(column) > 1)
    parts: dict[str, list[Any]] = collections.defaultdict(list)
    for row in group:
        parts[_NUMBER.findall(row.path)[first]].append(row)
    return [part for each in parts.values() for part in merged(each)]


def _columns(texts: Sequence[str]) -> list[list[str]]:
    """The sorted numbers at each position in strings that differ only in their numbers, as they are written."""
    columns = zip(*map(_NUMBER.findall, texts), strict=True)
    return [sorted(set(column), key=lambda digits: (int(digits), digits)) for column in columns]


def merged_texts(texts: Sequence[str]) -> str:
    """One string for strings that differ only in their numbers: "blocks/{0..11}/kernel"."""
    shown = map(_range, _columns(texts))
    return _NUMBER.sub(lambda match: next(shown), texts[0])


def _range(digits: Sequence[str]) -> str:
    if len(digits) == 1:
        return digits[0]
    first, last = digits[0], digits[-1]
    is_range = len(digits) > 2 and list(digits) == list(map(str, range(int(first), int(last) + 1)))
    return f"{{{first}..{last}}}" if is_range else f"{{{','.join(digits)}}}"
