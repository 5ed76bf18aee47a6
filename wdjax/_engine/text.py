"""How errors and tables show values, calls and paths: an array by its shape, and repeated blocks as one path."""

import collections
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

_NUMBER = re.compile(r"\d+")
_LONGEST = 80


def shown(value: Any) -> str:
    """A value in an error: short, and without the numbers in arrays."""
    if isinstance(value, (np.ndarray, jax.Array)) and (value.shape or not isinstance(value.dtype, np.dtype)):
        return f"an array of shape {value.shape}"
    try:
        leaves = jax.tree.leaves([] if isinstance(value, Iterator) else value)
    except (TypeError, ValueError):  # A dictionary whose keys can't be sorted.
        return kind_of(value)
    arrays = sum(hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves)
    is_leaf = len(leaves) == 1 and leaves[0] is value
    if is_leaf or not arrays:
        text = repr(value)
        is_short = len(text) <= _LONGEST
        is_said = isinstance(value, (str, np.ndarray, jax.Array)) or not re.search(r"\n|rray\(|object .*at 0x", text)
        if is_said and (is_leaf or is_short):
            return text if is_short else f"{text[:_LONGEST]}..."
    if is_leaf or not leaves:
        return kind_of(value)
    return f"{kind_of(value)} of " + (f"{arrays} array{'s' * (arrays != 1)}" if arrays else f"{len(leaves)} leaves")


def printed(value: Any) -> str:
    """A value in a rule set that is printed. An array is printed by its shape."""
    return shown(value) if np.ndim(value) else repr(value)


def call(name: str, *said: Any, **named: Any) -> str:
    """A call as it is written, without the arguments that are None."""
    rest = [f"{key}={value}" for key, value in named.items() if value is not None]
    return f"{name}({', '.join([*map(str, said), *rest])})"


def kind_of(value: Any) -> str:
    """The type of a value, as "a flax.State"."""
    package = type(value).__module__.partition(".")[0]
    name = type(value).__name__ if package in ("builtins", "__main__") else f"{package}.{type(value).__name__}"
    return f"{'an' if name[0] in 'aeiouAEIO' else 'a'} {name}"


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


def listed(paths: Sequence[str], most: int = 5) -> str:
    """Paths in an error: those that differ only in their numbers as one, and no more than a few."""
    alike: dict[str, list[Any]] = collections.defaultdict(list)
    for path in paths:
        alike[_NUMBER.sub("#", path)].append(_Row(path))
    parts = [merged_texts([row.path for row in part]) for rows in alike.values() for part in merged(rows)]
    return ", ".join(map(repr, parts[:most])) + (f" and {len(parts) - most} more" if len(parts) > most else "")


class _Row(NamedTuple):
    path: str


def lacks(missing: Sequence[str], extra: Sequence[str]) -> str:
    """What a tree lacks, and what params lack, as a sentence."""
    said = (f"it lacks {listed(missing)}" if missing else "", f"params lack {listed(extra)}" if extra else "")
    sentence = ", and ".join(filter(None, said))
    return f"{sentence[:1].upper()}{sentence[1:]}."


def _range(digits: Sequence[str]) -> str:
    if len(digits) == 1:
        return digits[0]
    first, last = digits[0], digits[-1]
    is_range = len(digits) > 2 and list(digits) == list(map(str, range(int(first), int(last) + 1)))
    return f"{{{first}..{last}}}" if is_range else f"{{{','.join(digits)}}}"
