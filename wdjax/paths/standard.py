"""The standard rule, `weights_only`: the weights of layers decay, and nothing else does."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from .._engine import checks
from .._engine.decision import Decision, Tree
from .._engine.rules import Rules
from .._engine.text import call, shown
from . import _modules, hints, language
from ._modules import Owner
from ._question import question
from ._stacked import STACKED, stacks_of, unstacked
from ._words import words
from .parameters import parameter_at
from .roles import ADAPTER, EMBEDDING, KERNEL, Role, is_layer, role

# Linen's collections beside "params".
_COLLECTIONS = frozenset(("batch_stats", "cache", "intermediates", "aqt", "_overwrite_with_gradient"))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class WeightsOnly(Rules, kind="weights_only"):
    """The standard rule. `owners` holds what the model says about each path."""

    embeddings: bool
    unknown: bool | str
    stacked_axes: dict[str, int]
    owners: dict[str, Owner | Role] | None = None

    def _decide(self, tree: Tree, asked: Sequence[int]) -> dict[int, Decision]:
        if [leaf.path for leaf in tree.leaves] == [""]:
            raise ValueError(
                f"{tree.where}: weights_only can't tell what a parameter without a name is. The params are a single "
                "array. Give it the tree of parameters, outside optax.flatten."
            )
        stacked = self._stacked(tree)
        roles = self._roles(tree, [i for i in asked if i in tree.required], stacked)
        decided, unknown = {}, []
        for i in asked:
            leaf, found = tree.leaves[i], roles.get(i)
            if i not in tree.required:
                if leaf.dtype is not None:
                    decided[i] = Decision(False, "weights_only", "not a real number")
            elif found is not None and found is not STACKED and (self.embeddings or not found.or_table):
                decays = found.name in (KERNEL, ADAPTER) or (found.name == EMBEDDING and self.embeddings)
                decided[i] = Decision(decays, "weights_only", f"{found.name}: {found.reason}")
            elif isinstance(self.unknown, bool):
                decided[i] = Decision(self.unknown, "weights_only", f"unknown={self.unknown}")
            else:
                unknown.append(leaf)
        if unknown:
            default = self._written().replace("<model>", "model")
            raise ValueError(f"{tree.where}: {question(unknown, tree, default, self.owners)}")
        return decided

    def _stacked(self, tree: Tree) -> dict[int, int]:
        """The number of leading axes that stack layers, for each leaf that `stacked_axes` names."""
        stacked: dict[int, int] = {}
        for pattern, axes in self.stacked_axes.items():
            matched = language.matching_all(tree, language.checked_patterns("weights_only", pattern))
            stacked = {**dict.fromkeys(matched, axes), **stacked}
        for i, axes in stacked.items():
            path, shape, _ = tree.leaves[i]
            if i in tree.required and axes > len(shape):
                raise ValueError(
                    f"{tree.where}: weights_only has stacked_axes={axes} for {path!r}, but its shape is {shape}. "
                    "Write the number of axes that stack layers, such as stacked_axes={'layers': 1}."
                )
        return stacked

    def _roles(self, tree: Tree, asked: Sequence[int], stacked: Mapping[int, int]) -> dict[int, Role | None]:
        held = [(i, leaf) for i, leaf in enumerate(tree.leaves) if leaf.dtype is not None]
        shapes = {leaf.path: leaf.shape[stacked.get(i, 0) :] for i, leaf in held}
        stacks = stacks_of(shapes)
        roles: dict[int, Role | None] = {}
        for i in asked:
            path = tree.leaves[i].path
            owner, parameter = self._owner(tree, path), parameter_at(path, shapes)
            named = None
            if isinstance(owner, Owner):
                # Where the class of the user's own layer does not say what it is, the name of the attribute may.
                says = is_layer(owner.name) or "attention" in words(owner.name)
                named = None if owner.is_library or says else role(parameter._replace(is_own=True))
                typed = {"is_library": owner.is_library, "is_own": not owner.is_library}
                parameter = parameter._replace(owner=owner.name, in_list=False, **typed)
            roles[i] = owner if isinstance(owner, Role) else role(parameter)
            if named is not None and named.name not in (KERNEL, EMBEDDING, ADAPTER):
                roles[i] = named
            if i not in stacked and not isinstance(owner, Role):
                roles[i] = unstacked(path, roles[i], parameter, stacks)
        return roles

    def _owner(self, tree: Tree, path: str) -> Owner | Role | None:
        """What is known about a path before its name is read."""
        if self.owners is None:
            first, *inner = path.split("/")
            # NNX's SpectralNorm and WeightNorm hold statistics with this name.
            named = first if inner and first in _COLLECTIONS else "batch_stats" if "batch_stats" in inner[:-1] else ""
            return Role("statistic", f"in {named!r}") if named else None
        found = self.owners.get(path, self.owners.get(path.removeprefix("params/")))
        if found is None:
            near = hints.nearest(path, list(self.owners))
            raise ValueError(
                f"{tree.where}: weights_only was given a model that has no parameter {path!r}. The nearest of its "
                f"{len(self.owners)}: {near}. Give weights_only the model that these params belong to."
            )
        return found

    def _values(self) -> list[Any]:
        return [True]

    def _written(self) -> str:
        model = () if self.owners is None else ("<model>",)
        embeddings, unknown = None if self.embeddings else False, None if self.unknown == "error" else self.unknown
        stacked = self.stacked_axes or None
        return call("weights_only", *model, embeddings=embeddings, unknown=unknown, stacked_axes=stacked)

    @staticmethod
    def _from_plain(embeddings: Any = True, unknown: Any = "error", stacked_axes: Any = 0, owners: Any = None) -> Rules:
        rules = weights_only(embeddings=embeddings, unknown=unknown, stacked_axes=stacked_axes)
        if owners is None:
            return rules
        if not isinstance(owners, Mapping) or not all(isinstance(path, str) for path in owners):
            raise TypeError(
                f"Rules.from_dict: the owners of weights_only must be a dictionary by path, got {shown(owners)}. "
                "Pass what weights_only(model).to_dict() returned."
            )
        found = {path: _owner_from_plain(path, written) for path, written in owners.items()}
        return dataclasses.replace(rules, owners=found)  # pyright: ignore[reportCallIssue]


def _owner_from_plain(path: str, written: Any) -> Owner | Role:
    kind = Role if isinstance(written, Mapping) and "reason" in written else Owner
    found = checks.read(f"the owner of {path!r}", kind, written)
    for name, type_ in kind.__annotations__.items():
        if not isinstance(value := getattr(found, name), type_):
            raise TypeError(
                f"Rules.from_dict: {name!r} of the owner of {path!r} must be a {type_.__name__}, got {shown(value)}."
            )
    return found


@checks.known_arguments
def weights_only(
    model: Any = None,
    *inputs: Any,
    embeddings: bool = True,
    unknown: bool | str = "error",
    stacked_axes: int | Mapping[str, int] = 0,
    call_kwargs: Mapping[str, Any] | None = None,
) -> Rules:
    """The mask that is True for the weights of layers, and False for everything else.

    Weights are the matrices of dense, convolutional, recurrent, einsum and attention layers, LoRA factors, and the
    tables of embedding layers. Not weights: biases, scales and offsets of norms, positional embeddings and tables of
    relative positions, class tokens and other learned inputs, layer scales, temperatures, batch statistics, buffers,
    the dynamics of state-space models, and integers.

    Without a model, it goes by the names and shapes of Flax Linen, Flax NNX, Equinox, Haiku and PyTorch. With an
    `nnx.Module`, an `equinox.Module`, or a Linen module and the (abstract) inputs of its `init`, it goes by the types
    of the modules, and by names only for parameters that no library layer holds. The table of an embedding layer is an
    embedding even if it is indexed by position, and an array that is added to activations is not.

    Args:
        model, *inputs: nothing; or the model, and for a Linen model the inputs of its `init`.
        embeddings: whether the tables of embedding layers decay. If False, an Equinox `weight` in a list may be unknown
            without the model, because a linear layer without a bias looks like an embedding.
        unknown: what to do with parameters that neither name nor type identifies: "error", or the boolean for them.
        stacked_axes: the number of leading axes that stack layers (`filter_vmap`), if names don't distinguish a stacked
            scale from a matrix: for all parameters, or {pattern: number} for some. Linen, NNX and Haiku don't need it.
        call_kwargs: keyword arguments for the call of a Linen model: `{"train": False}`.

    Returns: `Rules` of booleans.
    Raises: TypeError, ValueError for arguments that are not as above, and for a model that is none of these; and where
            the mask is used, ValueError if a parameter can't be identified. It has the line to complete for these.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> params = {"Dense_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, "cls_token": jnp.ones((1, 1, 3))}
        >>> wdjax.weights_only().mask(params)
        {'Dense_0': {'bias': False, 'kernel': True}, 'cls_token': False}
    """
    if not isinstance(unknown, bool) and unknown != "error":
        raise ValueError(
            f"weights_only: unknown must be 'error', True (decay) or False (no decay), got {shown(unknown)}."
        )
    if not isinstance(embeddings, bool):
        raise TypeError(f"weights_only: embeddings must be True or False, got {shown(embeddings)}.")
    stacks = dict(stacked_axes) if isinstance(stacked_axes, Mapping) else {"**": stacked_axes} if stacked_axes else {}
    for pattern, axes in stacks.items():
        if not isinstance(pattern, str):
            raise TypeError(f"weights_only: a pattern of stacked_axes must be a string, got {shown(pattern)}.")
        if not checks.is_whole(axes) or axes < 0:
            raise ValueError(
                f"weights_only: stacked_axes must be a number of leading axes >= 0, got {shown(axes)} for {pattern!r}. "
                "Write stacked_axes=1, or stacked_axes={'layers': 1}."
            )
        language.checked_patterns("weights_only", pattern)
    owners = None if model is None else _modules.owners_of(model, inputs, dict(call_kwargs or {}))
    return WeightsOnly(embeddings, unknown, {pattern: int(axes) for pattern, axes in stacks.items()}, owners)
