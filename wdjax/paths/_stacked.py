"""Which arrays are rather one for each of several stacked layers, as the layers around them tell."""

import collections
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from .parameters import Axes, Parameter
from .roles import ADAPTER, EMBEDDING, KERNEL, NORM, Role, is_layer, role

# The role of a matrix that is more likely a vector in each of several stacked layers.
STACKED = Role("unknown", "a matrix, or one vector in each layer")
# What library layers call their vectors. If they have two axes, the first stacks layers, or the second of a scale.
_VECTORS = (("bias", "scale", "offset"), ("scale",))


class Stacks(NamedTuple):
    """What a tree says about stacked layers, by the paths of its nodes.

    Attributes:
        surplus: the leading axes that layers have too many: the certain ones, then the possible ones.
        shared: the axis that stacks all that is below a node, as a bias or a norm with two axes proves.
    """

    surplus: dict[str, tuple[set[Axes], set[Axes]]]
    shared: dict[str, int]


def stacks_of(shapes: Mapping[str, Axes]) -> Stacks:
    """What the shapes of a tree say about its stacked layers."""
    return Stacks(_surplus(shapes), _shared(shapes))


def unstacked(path: str, found: Role | None, parameter: Parameter, stacks: Stacks) -> Role | None:
    """The role of a parameter that may be stacked, by the layers nearest to it. STACKED if it can't be told."""
    if parameter.is_library:
        return found
    by_shape = _without_bias(path, found, parameter, stacks)
    axis = next((stacks.shared[node] for node in _above(path) if node in stacks.shared), None)
    if by_shape is not found or axis is None:
        return by_shape
    alone = role(parameter._replace(shape=_without(parameter.shape, axis), bias=_without(parameter.bias, axis)))
    if found is None:
        return alone
    is_named = is_layer(parameter.owner) and not parameter.in_list and path.endswith(parameter.name)
    is_told = not _decays(found) or is_named or (alone is not None and _decays(alone))
    return found if is_told else STACKED


def _decays(found: Role) -> bool:
    return found.name in (KERNEL, EMBEDDING, ADAPTER)


def _without(shape: Axes | None, axis: int) -> Axes | None:
    return None if shape is None else shape[:axis] + shape[axis + 1 :]


def _above(path: str) -> Iterator[str]:
    """The nodes that hold a parameter, from the nearest to the root, whose path is empty."""
    while path:
        path = path.rpartition("/")[0]
        yield path


def _surplus(shapes: Mapping[str, Axes]) -> dict[str, tuple[set[Axes], set[Axes]]]:
    """The surplus leading axes of layers that have a `weight`.

    A bias has one axis, to which a convolution adds axes of size 1. A `weight` without a bias has two, and more in a
    convolution. Any more axes stack layers.
    """
    found: dict[str, tuple[set[Axes], set[Axes]]] = collections.defaultdict(lambda: (set(), set()))
    for path, shape in shapes.items():
        if not path.endswith("/weight"):
            continue
        node = path.removesuffix("/weight")
        bias = shapes.get(node + "/bias")
        if bias == shape or (bias is not None and len(bias) > 1 and bias[-1] == 1) or (bias is None and len(shape) < 3):
            continue
        axes = shape[:-2] if bias is None else bias[:-1]
        parent, *others = list(_above(node)) or [""]  # The node itself may have an empty name.
        found[parent][bias is None].add(axes)
        for other in others:
            found[other][1].add(axes)
    return found


def _shared(shapes: Mapping[str, Axes]) -> dict[str, int]:
    """The first or second axis, if all that is below a node has it in one size, and a bias or a norm proves it."""
    below: dict[str, list[str]] = collections.defaultdict(list)
    for path in shapes:
        for node in _above(path):
            below[node].append(path)
    found: dict[str, int] = {}
    for node, paths in below.items():
        has_matrix = any(len(shapes[path]) > 2 for path in paths)
        axes = (axis for axis in (0, 1) if has_matrix and _stacks_all(axis, paths, shapes))
        axis = next((axis for axis in axes if any(_proves(axis, path, shapes[path]) for path in paths)), None)
        if axis is not None:
            found[node] = axis
    return found


def _stacks_all(axis: int, paths: list[str], shapes: Mapping[str, Axes]) -> bool:
    """Whether all of these arrays have the axis, with one size that is greater than 1."""
    sizes = {shapes[path][axis : axis + 1] for path in paths}
    return len(sizes) == 1 and sizes.isdisjoint(((), (1,)))


def _proves(axis: int, path: str, shape: Axes) -> bool:
    """Whether this is the bias or the scale of each of several layers."""
    return len(shape) == 2 and path.rpartition("/")[2] in _VECTORS[axis] and shape[1 - axis] > 1


def _without_bias(path: str, found: Role | None, parameter: Parameter, stacks: Stacks) -> Role | None:
    """The role of a `weight` without a bias, which only its shape shows to be a matrix and no stacked vector."""
    is_bare = parameter.name == "weight" and parameter.bias is None
    by_shape = is_bare and found is not None and found.name == KERNEL and len(parameter.shape) >= 2
    if not by_shape or (is_layer(parameter.owner) and not parameter.in_list):
        return found
    leading = parameter.shape[:-1]
    beside = node = path.removesuffix("/weight").rpartition("/")[0]
    while True:
        surely, perhaps = stacks.surplus.get(node, (set(), set()))
        if surely == {leading} and node == beside and parameter.in_list:
            return Role(NORM, f"'weight', one vector in each of {leading} layers")
        if leading in (surely or perhaps):
            return STACKED
        if surely or not node:
            return found
        node = node.rpartition("/")[0]
