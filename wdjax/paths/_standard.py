"""The standard rule, `weights_only`: the weights of layers decay, and nothing else."""

import collections
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .. import _checks
from .._leaves import Leaf
from . import _modules, _patterns
from ._roles import ADAPTER, EMBEDDING, KERNEL, LAYER, NORM, Parameter, Role, role, words
from ._rules import Decision, Rules, Tree

# What holds an array inside a parameter (a Variable, a named array) and says nothing of it.
_STORAGE = frozenset(("value", "raw_value", "array"))
_NOT_PARAMETERS = frozenset(("batch_stats", "cache", "intermediates", "_overwrite_with_gradient"))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class WeightsOnly(Rules, kind="weights_only"):
    """The standard rule; `roles` holds what the modules of a model said of each path, None to ask the names."""

    embeddings: bool
    unknown: bool | str
    stacked_axes: tuple[tuple[str, int], ...]
    roles: dict[str, Role | None] | None = None

    def _decide(self, tree: Tree, asked: Sequence[int]) -> dict[int, Decision]:
        if [leaf.path for leaf in tree.leaves] == [""]:
            raise ValueError(
                f"{tree.where}: weights_only can't tell a parameter without a name. The params are one array: give it "
                "the tree, outside optax.flatten."
            )
        roles = self._by_type(tree, asked) if self.roles is not None else self._by_name(tree, asked)
        decided, unknown = {}, []
        for i in asked:
            leaf, found = tree.leaves[i], roles.get(i)
            if i not in tree.required:
                if leaf.dtype is not None:
                    decided[i] = Decision(False, "weights_only", "no real number")
            elif found is not None:
                decays = found.name in (KERNEL, ADAPTER) or (found.name == EMBEDDING and self.embeddings)
                decided[i] = Decision(decays, "weights_only", f"{found.name}: {found.reason}")
            elif isinstance(self.unknown, bool):
                decided[i] = Decision(self.unknown, "weights_only", f"unknown={self.unknown}")
            else:
                unknown.append(leaf)
        if unknown:
            raise ValueError(f"{tree.where}: {_unknown(unknown)}")
        return decided

    def _by_name(self, tree: Tree, asked: Sequence[int]) -> dict[int, Role | None]:
        stacked = self._stacked(tree)
        held = [(i, leaf) for i, leaf in enumerate(tree.leaves) if leaf.dtype is not None]
        shapes = {leaf.path: leaf.shape[stacked.get(i, 0) :] for i, leaf in held}
        stacks = None
        roles: dict[int, Role | None] = {}
        for i in asked:
            leaf = tree.leaves[i]
            if i not in tree.required:
                continue
            collection = _NOT_PARAMETERS.intersection(leaf.path.split("/")[:-1])
            if collection:
                roles[i] = Role("statistic", f"in {min(collection)!r}")
                continue
            parameter = parameter_at(leaf.path, shapes)
            roles[i] = role(parameter)
            if i not in stacked and _may_be_a_stacked_vector(parameter, roles[i]):
                stacks = _stacks(shapes) if stacks is None else stacks
                roles[i] = _unstacked(leaf.path, roles[i], parameter.shape, stacks)
        return roles

    def _by_type(self, tree: Tree, asked: Sequence[int]) -> dict[int, Role | None]:
        known = self.roles or {}
        found: dict[int, Role | None] = {}
        for i in asked:
            path = tree.leaves[i].path
            if i not in tree.required:
                continue
            if path not in known and path.removeprefix("params/") not in known:
                near = _patterns.nearest(path, list(known))
                raise ValueError(
                    f"{tree.where}: weights_only was given a model that has no parameter {path!r}. The nearest of its "
                    f"{len(known)}: {near}. Give weights_only the model that these params are of."
                )
            found[i] = known.get(path, known.get(path.removeprefix("params/")))
        return found

    def _stacked(self, tree: Tree) -> dict[int, int]:
        """The number of stacked axes of each leaf for which it was said."""
        everyone = range(len(tree.leaves))
        found: dict[int, int] = {}
        for pattern, axes in self.stacked_axes:
            for i in _patterns.matching(tree, pattern, everyone, everyone):
                found.setdefault(i, axes)
        for i, axes in found.items():
            leaf = tree.leaves[i]
            if i in tree.required and axes > len(leaf.shape):
                raise ValueError(
                    f"{tree.where}: weights_only has stacked_axes={axes} for {leaf.path!r}, of shape {leaf.shape}."
                )
        return found

    def _values(self) -> list[Any]:
        return [True, False]

    def _written(self) -> str:
        said = ["<model>"] if self.roles is not None else []
        said += [] if self.embeddings else ["embeddings=False"]
        said += [] if self.unknown == "error" else [f"unknown={self.unknown}"]
        said += [f"stacked_axes={dict(self.stacked_axes)}"] if self.stacked_axes else []
        return f"weights_only({', '.join(said)})"

    def _arguments(self) -> dict[str, Any]:
        arguments: dict[str, Any] = {"embeddings": self.embeddings, "unknown": self.unknown}
        arguments["stacked_axes"] = dict(self.stacked_axes)
        if self.roles is not None:
            arguments["roles"] = {path: list(found) if found else [] for path, found in self.roles.items()}
        return arguments

    @classmethod
    def _from_arguments(cls, arguments: dict[str, Any]) -> Rules:
        roles = arguments.pop("roles", None)
        rules = weights_only(**arguments)
        found = None if roles is None else {path: Role(*row) if row else None for path, row in roles.items()}
        return dataclasses.replace(rules, roles=found)  # pyright: ignore[reportCallIssue]


@_checks.known_arguments
def weights_only(
    model: Any = None,
    *inputs: Any,
    embeddings: bool = True,
    unknown: bool | str = "error",
    stacked_axes: int | Mapping[str, int] = 0,
    call_kwargs: Mapping[str, Any] | None = None,
) -> Rules:
    """The mask that is True for the weights of layers, and False for all else.

    Weights are the matrices of dense, convolutional, recurrent, einsum and attention layers, LoRA factors, and the
    tables of embedding layers. Not weights: biases, scales and offsets of norms, positional embeddings and tables of
    relative positions, class tokens and other learned inputs, layer scales, temperatures, batch statistics, buffers,
    the dynamics of state-space models, integers.

    Without a model it goes by names and shapes, those of Flax Linen, Flax NNX, Equinox and Haiku. With a model it asks
    the types of the modules: an `nnx.Module`, an `equinox.Module`, or a Linen module with the inputs of its `init`
    (arrays or `jax.ShapeDtypeStruct`s; nothing is run). A table of an embedding layer is an embedding also where
    positions are looked up in it; what is added to activations as it is, is a positional embedding.

    Args:
        model, inputs: the model whose modules to ask; for Linen also what it is called with.
        embeddings: whether the tables of embedding layers decay.
        unknown: what to do with parameters that neither name nor type tells: "error", or the boolean for them.
        stacked_axes: the number of leading axes that stack layers (`filter_vmap`), where names don't tell a stacked
            scale from a matrix: for all parameters, or {pattern: number} for some. Linen, NNX and Haiku need none.
        call_kwargs: keyword arguments of a Linen model's call: `{"train": False}`.

    Returns:
        `Rules`: a mask for any wdjax function, a pattern or a default in `by_path`; `.mask` is for Optax.

    Raises:
        TypeError: if `model` is no module of these libraries.
        ValueError: at `init` and `update`: listing the unknown parameters and the line to add; with a model, for a
            parameter that it has not.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> params = {"Dense_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, "cls_token": jnp.ones((1, 1, 3))}
        >>> wdjax.weights_only().mask(params)
        {'Dense_0': {'bias': False, 'kernel': True}, 'cls_token': False}
    """
    if not isinstance(unknown, bool) and unknown != "error":
        raise ValueError(f"weights_only: unknown must be 'error', True (decay) or False (don't), got {unknown!r}.")
    if not isinstance(embeddings, bool):
        raise TypeError(f"weights_only: embeddings must be True or False, got {embeddings!r}.")
    said = stacked_axes if isinstance(stacked_axes, Mapping) else {"**": stacked_axes} if stacked_axes else {}
    for pattern, axes in said.items():
        if not isinstance(axes, int) or isinstance(axes, bool) or axes < 0:
            raise ValueError(
                f"weights_only: stacked_axes counts leading axes, got {axes!r} for {pattern!r}. "
                "Write stacked_axes=1, or stacked_axes={'layers': 1}."
            )
        _patterns.checked("weights_only", pattern)
    roles = None if model is None else _modules.roles_of(model, inputs, dict(call_kwargs or {}))
    return WeightsOnly(embeddings, unknown, tuple(said.items()), roles)


def parameter_at(path: str, shapes: Mapping[str, tuple[int, ...]]) -> Parameter:
    """What names and shapes say of the parameter at a path."""
    segments = path.split("/")
    while len(segments) > 1 and segments[-1] in _STORAGE:
        segments.pop()
    said = [k for k, segment in enumerate(segments) if not segment.isdigit() and not segment.startswith("~")]
    own = said[-1] if said else len(segments) - 1
    owner = segments[said[-2]] if len(said) > 1 else ""
    in_lora = any("lora" in segment.lower() for segment in segments[max(own - 2, 0) : own])
    bias = None
    for name in _names_of_the_bias(segments[own]):
        beside = "/".join((*segments[:own], name, *path.split("/")[own + 1 :]))
        if beside in shapes:
            bias = shapes[beside]
            break
    return Parameter(segments[own], owner, shapes[path], bias, in_lora=in_lora)


def _names_of_the_bias(name: str) -> Iterator[str]:
    """What the bias beside a parameter of this name may be called, the likeliest first."""
    if name == "w" or re.fullmatch(r"w\d*|w_\w+", name):
        yield "b" + name[1:]
    if name.endswith("_w"):
        yield name[:-1] + "b"
    for matrix in ("kernel", "weights", "weight"):
        if matrix in name:
            yield name.replace(matrix, "bias")
    yield "bias"
    yield "b"


def _may_be_a_stacked_vector(parameter: Parameter, found: Role | None) -> bool:
    """Whether only the shape says that it is a matrix, as of an Equinox layer in a list that has no bias."""
    by_shape = found is not None and found.name == KERNEL and parameter.name == "weight" and parameter.bias is None
    return by_shape and len(parameter.shape) >= 2 and not frozenset(words(parameter.owner)) & LAYER


Axes = tuple[int, ...]


def _stacks(shapes: Mapping[str, Axes]) -> dict[str, tuple[set[Axes], set[Axes]]]:
    """For each node of the tree, the leading axes that the layers below it have too many: surely, and perhaps.

    A bias has one axis (a convolution's has ones behind it): what it has more of stacks layers. A `weight` without a
    bias has two, unless it is a convolution's.
    """
    found: dict[str, tuple[set[Axes], set[Axes]]] = collections.defaultdict(lambda: (set(), set()))
    for path, shape in shapes.items():
        if not path.endswith("/weight"):
            continue
        node = path.removesuffix("/weight")
        bias = shapes.get(node + "/bias")
        if bias == shape or (bias is not None and len(bias) > 1 and bias[-1] == 1) or (bias is None and len(shape) < 3):
            continue
        while True:
            surely, perhaps = found[node]
            surely.add(bias[:-1]) if bias is not None else perhaps.add(shape[:-2])
            if not node:
                break
            node = node.rpartition("/")[0]
    return found


def _unstacked(path: str, found: Role | None, shape: Axes, stacks: Mapping[str, tuple[set[Axes], set[Axes]]]) -> Any:
    """The role of what is a matrix or a stacked vector, by the layers nearest to it; None if they don't tell."""
    node = path
    while node:
        node = node.rpartition("/")[0]
        surely, perhaps = stacks.get(node, ((), ()))
        if surely:
            is_vector = surely == {shape[:-1]}
            return Role(NORM, f"'weight', one vector in each of {shape[:-1]} layers") if is_vector else found
        if shape[:-1] in perhaps:
            return None
    return found


def _unknown(leaves: Sequence[Leaf]) -> str:
    shown = ", ".join(f"{leaf.path!r} {leaf.shape}" for leaf in leaves[:8])
    more = f" and {len(leaves) - 8} more" if len(leaves) > 8 else ""
    name = leaves[0].path.rpartition("/")[2] or leaves[0].path
    return (
        f"weights_only can't tell what {'these parameters are' if len(leaves) > 1 else 'this parameter is'}: {shown}"
        f"{more}. Say whether they decay: by_path({{{name!r}: True}}, default=weights_only()), or "
        "weights_only(unknown=False) for all of them. For a layer of your own: register_layer(MyLayer, "
        f"weights=({name!r},)) and weights_only(model). For layers that are stacked: stacked_axes={{'layers': 1}}."
    )
