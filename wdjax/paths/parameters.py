"""What names and shapes say about one parameter: its own, its module's and those of the parameters beside it."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

Axes = tuple[int, ...]
# Names of the box around an array (a Variable, a named array). They tell nothing about the parameter.
_STORAGE = re.compile("value|raw_value|array|param|variable(_[0-9]+)?")
_WEIGHTS = ("weight", "kernel", "w", "W", "weight_orig", "weight_bar")


class Parameter(NamedTuple):
    """What a role is decided from."""

    name: str  # The last segment of its path that carries meaning.
    owner: str  # The module that holds it, the list that this module is in, or its class; "" if there is none.
    shape: tuple[int, ...]  # Without the axes that are known to stack layers.
    bias: tuple[int, ...] | None = None  # The shape of the bias beside it, also without these axes.
    is_library: bool = False  # Whether the owner is a library layer. Then its name decides, whatever the shape.
    in_list: bool = False  # Whether the owner is a list. Its name doesn't tell which of its layers this is.
    around: str = ""  # The name of the owner's owner.
    is_own: bool = False  # Whether the model says that the owner is a class of the user's, and not a library layer.
    is_beside_weight: bool = False  # Whether it is named `u` or `v`, and the module holds a weight too.
    is_beside_a: bool = False  # Whether the module holds a matrix `a` too. Then its `b` is a matrix and not a bias.

    @property
    def is_wide(self) -> bool:
        """Whether its shape is not that of a vector. A convolution's bias may have axes of size 1 beside its own."""
        return sum(size > 1 for size in self.shape) > 1

    @property
    def is_added(self) -> bool:
        """Whether it is (1, T, C), to be added to activations. No table that is looked up begins with an axis of 1."""
        return len(self.shape) > 2 and self.shape[0] == 1 and self.is_wide


def parameter_at(path: str, shapes: Mapping[str, Axes]) -> Parameter:
    """What names and shapes say about the parameter at a path. PyTorch's names have "." instead of "/"."""
    found = [(match.start(), match.group()) for match in re.finditer(r"[^/.]+", path)] or [(0, "")]
    while len(found) > 1 and _STORAGE.fullmatch(found[-1][1]):
        found.pop()
    said = [k for k, (_, segment) in enumerate(found) if not segment.isdigit() and not segment.startswith("~")]
    own = said[-1] if said else len(found) - 1
    around, owner = ("", "", *(found[k][1] for k in said[:-1]))[-2:]
    start, name = found[own]

    def beside(names: Sequence[str]) -> Axes | None:
        others = (path[:start] + other + path[start + len(name) :] for other in names)
        return next((shapes[other] for other in others if other in shapes), None)

    return Parameter(
        name,
        owner,
        shapes[path],
        beside(_names_of_the_bias(name)),
        in_list=own > 0 and found[own - 1][1].isdigit(),
        around=around,
        is_beside_weight=name.strip("_0123456789") in ("u", "v") and beside(_WEIGHTS) is not None,
        is_beside_a=name in ("b", "B") and len(beside(("a", "A")) or ()) > 1,
    )


def _names_of_the_bias(name: str) -> list[str]:
    """Possible names of the bias beside a parameter of this name, the most likely first."""
    raw = [("b" if name[0] == "w" else "B") + name[1:], "b" + name[1:]] if re.fullmatch(r"[wW](\d*|_\w+)", name) else []
    raw += [name[:-1] + "b"] if name.endswith("_w") else []
    matrices = [matrix for matrix in ("kernel", "weights", "weight") if matrix in name]
    return [*raw, *(name.replace(matrix, bias) for matrix in matrices for bias in ("bias", "biases")), "bias", "b"]
