"""Which matrices are rather one vector in each of several stacked layers, as the layers around them tell."""

import collections
from collections.abc import Mapping

from .parameters import Axes, Parameter
from .roles import KERNEL, NORM, Role, is_layer

Stacks = dict[str, tuple[set[Axes], set[Axes]]]
# The role of a matrix that is more likely a vector in each of several stacked layers.
STACKED = Role("unknown", "a matrix, or one vector in each layer")


def stacks_of(shapes: Mapping[str, Axes]) -> Stacks:
    """For each node of the tree, the surplus leading axes of its layers: the certain ones, then the possible ones.

    A bias has one axis, to which a convolution adds axes of size 1. A `weight` without a bias has two, and more in a
    convolution. Any more axes stack layers.
    """
    found: Stacks = collections.defaultdict(lambda: (set(), set()))
    for path, shape in shapes.items():
        if not path.endswith("/weight"):
            continue
        node = path.removesuffix("/weight")
        bias = shapes.get(node + "/bias")
        if bias == shape or (bias is not None and len(bias) > 1 and bias[-1] == 1) or (bias is None and len(shape) < 3):
            continue
        axes = shape[:-2] if bias is None else bias[:-1]
        parent = node.rpartition("/")[0]
        found[parent][bias is None].add(axes)
        while parent:
            parent = parent.rpartition("/")[0]
            found[parent][1].add(axes)
    return found


def unstacked(path: str, found: Role | None, parameter: Parameter, stacks: Stacks) -> Role | None:
    """The role of what only its shape shows to be a matrix and no stacked vector, by the layers nearest to it."""
    is_bare = parameter.name == "weight" and parameter.bias is None and not parameter.is_library
    by_shape = is_bare and found is not None and found.name == KERNEL and len(parameter.shape) >= 2
    if not by_shape or (is_layer(parameter.owner) and not parameter.in_list):
        return found
    leading = parameter.shape[:-1]
    beside = node = path.removesuffix("/weight").rpartition("/")[0]
    while True:
        surely, perhaps = stacks.get(node, (set(), set()))
        if surely == {leading} and node == beside and parameter.in_list:
            return Role(NORM, f"'weight', one vector in each of {leading} layers")
        if leading in (surely or perhaps):
            return STACKED
        if surely or not node:
            return found
        node = node.rpartition("/")[0]
