"""What the modules of a model say of its parameters: the type of the layer that holds each, whatever it is called.

The libraries are never imported: a model of one means that it is imported already.
"""

import inspect
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax

from .. import _checks, _leaves
from ._roles import BIAS, EMBEDDING, KERNEL, Parameter, Role, role

PyTree = Any
_LIBRARIES = ("flax.linen.", "flax.nnx.", "equinox.nn.", "haiku.")
_ALIKE = "an nnx.Module, an equinox.Module, or a Linen module with its inputs"


class _Registered(NamedTuple):
    weights: tuple[str, ...]
    embeddings: tuple[str, ...]


_REGISTRY: dict[type, _Registered] = {}


@_checks.known_arguments
def register_layer(layer: type, *, weights: Sequence[str] = (), embeddings: Sequence[str] = ()) -> None:
    """Says of a layer class of your own which of its parameters are weights, for `weights_only(model)`.

    What the layer holds itself and isn't named here doesn't decay; what its submodules hold is theirs. It goes for
    subclasses too, and a second call for the same class replaces the first.

    Args:
        layer: the class: of an NNX, Equinox or Linen module.
        weights: the names of its parameters that decay.
        embeddings: the names of its tables, which decay unless `weights_only(embeddings=False)`.

    Raises:
        TypeError: if `layer` is no class, or the names are no sequence of texts.

    Example:

        >>> import equinox as eqx, jax, jax.numpy as jnp, wdjax
        >>> class Bilinear(eqx.Module):
        ...     tensor: jax.Array
        ...     center: jax.Array
        >>> wdjax.register_layer(Bilinear, weights=("tensor",))
        >>> model = Bilinear(tensor=jnp.ones((2, 2, 2)), center=jnp.ones(2))
        >>> mask = wdjax.weights_only(model).mask(model)
        >>> mask.tensor, mask.center
        (True, False)
    """
    if not isinstance(layer, type):
        raise TypeError(
            f"register_layer: layer must be a class, got {layer!r}. Write register_layer(type(module), ...)."
        )
    for name, given in (("weights", weights), ("embeddings", embeddings)):
        if isinstance(given, str) or not all(isinstance(one, str) for one in given):
            raise TypeError(
                f"register_layer: {name} must be a sequence of names, got {given!r}. Write {name}=('kernel',)."
            )
    _REGISTRY[layer] = _Registered(tuple(weights), tuple(embeddings))


def roles_of(model: Any, inputs: Sequence[Any], call_kwargs: dict[str, Any]) -> dict[str, Role | None]:
    """The role of every parameter of a model by canonical path; None where its module doesn't tell."""
    if _is_a(model, "flax.linen", "Module"):
        return dict(_roles_of_linen(model, inputs, call_kwargs))
    if not _has_modules(model):
        raise TypeError(
            f"weights_only: a model is {_ALIKE}, got {type(model).__name__}. Of parameters alone names and shapes "
            "tell: weights_only()."
        )
    if inputs or call_kwargs:
        raise TypeError(
            f"weights_only: inputs are for a Linen module, whose parameters appear when it is called; "
            f"{type(model).__name__} holds its own. Write weights_only(model)."
        )
    return dict(_roles_of_tree(model))


def _roles_of_linen(
    model: Any, inputs: Sequence[Any], call_kwargs: dict[str, Any]
) -> Iterator[tuple[str, Role | None]]:
    types: dict[tuple[str, ...], type] = {}

    def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        types[context.module.path] = type(context.module)
        return call(*args, **kwargs)

    leaves, treedef = jax.tree.flatten(tuple(inputs))
    is_array = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves]

    def init(key: jax.Array, arrays: list[Any]) -> Any:
        given = iter(arrays)
        filled = [next(given) if array else leaf for leaf, array in zip(leaves, is_array, strict=True)]
        return model.init(key, *jax.tree.unflatten(treedef, filled), **call_kwargs)

    arrays = [leaf for leaf, array in zip(leaves, is_array, strict=True) if array]
    with sys.modules["flax.linen"].intercept_methods(note):
        try:
            variables = jax.eval_shape(init, jax.random.key(0), arrays)
        except Exception as error:
            raise TypeError(
                f"weights_only: {type(model).__name__}.init failed on the inputs that were given, {len(inputs)} of "
                f"them: {error} Write weights_only(model, x), with what model.init gets, and "
                "call_kwargs={'train': False} for its keyword arguments."
            ) from error
    for collection, tree in variables.items():
        held: dict[tuple[str, ...], dict[str, Any]] = {}
        for path, leaf in _leaves.flatten_with_paths(tree):
            segments = tuple(path.split("/"))
            owner = next(segments[:k] for k in range(len(segments) - 1, -1, -1) if segments[:k] in types or not k)
            held.setdefault(owner, {})["/".join(segments[len(owner) :])] = leaf
        for owner, parameters in held.items():
            for name, leaf in parameters.items():
                path = "/".join((*owner, name))
                if collection == "params":
                    yield path, _role_in(types.get(owner, type(model)), name, leaf, parameters)
                else:
                    yield f"{collection}/{path}", Role("statistic", f"in the collection {collection!r}")


def _roles_of_tree(model: Any) -> Iterator[tuple[str, Role | None]]:
    """The roles in a model that is itself a tree of its parameters."""
    held: dict[str, tuple[type, dict[str, tuple[str, Any]]]] = {}
    for path, leaf, (start, owner) in _held(model, (), ((), type(model)), frozenset()):
        parameters = held.setdefault("/".join(start), (owner, {}))[1]
        parameters["/".join(path[len(start) :])] = ("/".join(path), leaf)
    for owner, parameters in held.values():
        leaves = {name: leaf for name, (_, leaf) in parameters.items()}
        for name, (path, leaf) in parameters.items():
            if _is_a(leaf, "flax.nnx", "Variable") and not _is_a(leaf, "flax.nnx", "Param"):
                yield path, Role("statistic", f"a {type(leaf).__name__}")
            else:
                yield path, _role_in(owner, name, leaf, leaves)


Owner = tuple[tuple[str, ...], type]


def _held(
    node: Any, path: tuple[str, ...], owner: Owner, above: frozenset[int]
) -> Iterator[tuple[tuple[str, ...], Any, Owner]]:
    """Every array or NNX Variable below a node, with its path, and the path and type of the module that holds it."""
    if _is_a(node, "flax.nnx", "Variable") or (hasattr(node, "shape") and hasattr(node, "dtype")):
        yield path, node, owner
        return
    if id(node) in above:
        return
    # nnx.List and nnx.Dict hold for their owner.
    if _is_module(node) and not type(node).__module__.startswith("flax.nnx.helpers"):
        owner = (path, type(node))
    children = [(keys, child) for keys, child in _children(node) if child is not node]
    for key, child in children:
        yield from _held(child, (*path, key), owner, above | {id(node)})


def _has_modules(node: Any) -> bool:
    """Whether it is a module, or a container of modules."""
    if _is_module(node):
        return True
    return isinstance(node, (dict, list, tuple)) and any(_has_modules(child) for _, child in _children(node))


def _children(node: Any) -> list[tuple[str, Any]]:
    flat = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)[0]
    if len(flat) == 1 and not flat[0][0]:  # It is no tree: a plain value, or an NNX module of the older kind.
        return sorted(vars(node).items()) if _is_a(node, "flax.nnx", "Module") else []
    return [("/".join(map(_leaves.key_text, keys)), child) for keys, child in flat]


def _role_in(owner: type, name: str, leaf: Any, beside: dict[str, Any]) -> Role | None:
    """The role of a parameter in a module of this type."""
    for kind in owner.__mro__:
        if kind in _REGISTRY:
            registered = _REGISTRY[kind]
            own = name.partition("/")[0]
            found = KERNEL if own in registered.weights else EMBEDDING if own in registered.embeddings else "other"
            return Role(found, f"{own!r} of a {kind.__name__}, as registered")
    library = next((kind for kind in owner.__mro__ if kind.__module__.startswith(_LIBRARIES)), None)
    is_layer = library is not None and not library.__module__.endswith((".module", ".helpers", "._module"))
    said = [segment for segment in name.split("/") if not segment.isdigit()]
    shapes = {other: tuple(getattr(array, "shape", ())) for other, array in beside.items()}
    bias = next((shapes[other] for other in ("bias", "b") if other in shapes), None)
    parameter = Parameter(
        said[-1] if said else name,
        (library if is_layer and library is not None else owner).__name__,
        shapes[name],
        bias,
        is_library=is_layer,
        in_lora="lora" in owner.__name__.lower(),
    )
    found = role(parameter)
    if found is None or found.name == BIAS:
        return found
    return Role(found.name, f"{parameter.name!r} of a {owner.__name__}")


def _is_module(value: Any) -> bool:
    return _is_a(value, "flax.nnx", "Module") or _is_a(value, "equinox", "Module")


def _is_a(value: Any, module: str, name: str) -> bool:
    kind = getattr(sys.modules.get(module), name, None)
    return inspect.isclass(kind) and isinstance(value, kind)
