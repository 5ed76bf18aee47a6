"""The names that the reference documents, read from its pages; and where other libraries document theirs.

Standard library only: the tests read it too.
"""

import functools
import re
from pathlib import Path
from typing import NamedTuple

PAGES = Path(__file__).parent.parent / "reference"
_ENTRY = re.compile(r"^\.\. (auto(?:function|class)|py:type|py:module):: (wdjax\S*)\n((?:   .*\n|\n(?=   ))*)", re.M)

# Of other libraries, what signatures name most. Their inventories are not at hand when the site is built.
_OPTAX, _NUMPY = "https://optax.readthedocs.io/en/latest/api", "https://numpy.org/doc/stable/reference"
ELSEWHERE = {
    "jax.Array": "https://docs.jax.dev/en/latest/_autosummary/jax.Array.html",
    "np.ndarray": f"{_NUMPY}/generated/numpy.ndarray.html",
    "np.number": f"{_NUMPY}/arrays.scalars.html#numpy.number",
    "np.integer": f"{_NUMPY}/arrays.scalars.html#numpy.integer",
    "optax.GradientTransformation": f"{_OPTAX}/transformations.html#optax.GradientTransformation",
    "optax.GradientTransformationExtraArgs": f"{_OPTAX}/transformations.html#optax.GradientTransformationExtraArgs",
    "optax.MultiSteps": f"{_OPTAX}/optimizer_wrappers.html#optax.MultiSteps",
    "optax.Schedule": f"{_OPTAX}/optimizer_schedules.html#optax.schedules.Schedule",
    "optax.ScalarOrSchedule": "",
}
# Shown without a link.
PLAIN = frozenset(
    (
        *("Any", "Callable", "Hashable", "Iterable", "Literal", "Mapping", "NamedTuple", "Protocol", "Sequence"),
        *("None", "bool", "dict", "float", "int", "list", "range", "str", "tuple", "type"),
        *("os.PathLike", "Floats", "PyTree", "Sequenced"),
    )
)


class Entry(NamedTuple):
    """A name of the reference: how it is documented, its page, and the text that the page itself has."""

    kind: str
    file: Path
    text: str


@functools.cache
def documented() -> dict[str, Entry]:
    """Every documented name of wdjax, in the order of the pages."""
    found: dict[str, Entry] = {}
    for page in sorted(PAGES.glob("*.md")):
        for kind, name, text in _ENTRY.findall(page.read_text(encoding="utf-8")):
            assert name not in found, f"{name} is documented twice: on {found[name].file.stem} and on {page.stem}"
            options, _, own = text.partition("\n\n")
            found[name] = Entry(kind, page, " ".join((own if options.lstrip().startswith(":") else text).split()))
    return found


@functools.cache
def full_name(name: str) -> str | None:
    """The documented name that a docstring or a signature means: with or without `wdjax.`, or by its last part."""
    names = documented()
    if f"wdjax.{name}" in names or name in names:
        return f"wdjax.{name}" if f"wdjax.{name}" in names else name
    ends = [full for full in names if full.endswith(f".{name}")]
    return ends[0] if len(ends) == 1 else None
