"""The type of the layer that holds each parameter of a model, whatever the parameter is called.

The libraries are never imported here. If a model comes from one, it is imported already.
"""

import inspect
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax

from .._engine import checks, trees
from .roles import EMBEDDING, KERNEL, Role

PyTree = Any
_LIBRARIES = ("flax.linen.", "flax.nnx.", "equinox.nn.", "haiku.")
# Base classes of the libraries, which have no parameters.
_BASES = ("Module", "Sequential", "List", "Dict", "RNNCellBase")
_VARIABLES_OF_STATE = ("BatchStat", "Cache", "Intermediate", "RngState", "Perturbation")
_ALIKE = "an nnx.Module, an equinox.Module, or a Linen module with its inputs"


class Owner(NamedTuple):
    """The module that holds a parameter.

    Attributes:
        name: the name of its class, or of the library layer that it inherits from.
        is_library: whether it is a library layer.
    """

    name: str
    is_library: bool


class _Own(NamedTuple):
    """A parameter of a registered layer, and the role that it was registered with."""

    layer: type
    name: str
    role: Role


class _Registered(NamedTuple):
    weights: tuple[str, ...]
    embeddings: tuple[str, ...]


_REGISTRY: dict[type, _Registered] = {}


@checks.known_arguments
def register_layer(layer: type, *, weights: Sequence[str] = (), embeddings: Sequence[str] = ()) -> None:
    """Tells `weights_only(model)` which parameters of your own layer class are weights.

    The layer's other parameters don't decay. Parameters of its submodules are not affected. The call also applies to
    subclasses. A second call for the same class replaces the first.

    Args:
        layer: the class of an NNX, Equinox or Linen module.
        weights: the names of its parameters that decay.
        embeddings: the names of its tables, which decay except with `weights_only(embeddings=False)`.

    Raises:
        TypeError: if `layer` is not a class, or the names are not a sequence of strings. `weights_only(model)` raises
            a ValueError if no layer of the class has a parameter with one of the names.

    Example:

        >>> import equinox as eqx, jax, jax.numpy as jnp, wdjax
        >>> class Bilinear(eqx.Module):
        ...     tensor: jax.Array
        ...     center: jax.Array
        >>> wdjax.paths.register_layer(Bilinear, weights=("tensor",))
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


def owners_of(model: Any, inputs: Sequence[Any], call_kwargs: dict[str, Any]) -> dict[str, Owner | Role]:
    """The owner of each parameter of a model by canonical path, or its role where that is already known."""
    if inspect.isclass(model):
        raise TypeError(f"weights_only: got the class {model.__name__}. Give an instance of it: {model.__name__}(...).")
    if _is_a(model, "flax.linen", "Module"):
        return _checked(_owners_in_linen(model, inputs, call_kwargs))
    if not _has_modules(model):
        raise TypeError(
            f"weights_only: the model must be {_ALIKE}, got {type(model).__name__}. If you have only parameters, write "
            "weights_only(), which goes by names and shapes."
        )
    if inputs or call_kwargs:
        raise TypeError(
            f"weights_only: only a Linen module needs inputs, because its parameters appear when it is called. "
            f"{type(model).__name__} holds its parameters. Write weights_only(model)."
        )
    return _checked(_owners_in_tree(model))


def _checked(owners: Iterator[tuple[str, Owner | Role | _Own]]) -> dict[str, Owner | Role]:
    """The owners, with the registered roles. Raises an error for a registered name that no layer of its class has."""
    found: dict[str, Owner | Role] = {}
    held: dict[type, set[str]] = {}
    for path, owner in owners:
        if isinstance(owner, _Own):
            held.setdefault(owner.layer, set()).add(owner.name)
            owner = owner.role
        found[path] = owner
    for layer, names in held.items():
        missing = [name for name in (*_REGISTRY[layer].weights, *_REGISTRY[layer].embeddings) if name not in names]
        if missing:
            raise ValueError(
                f"register_layer: {layer.__name__} was registered with {missing[0]!r}, but in this model it has "
                f"{sorted(names)}. Write register_layer({layer.__name__}, weights=(...)) with names that it has."
            )
    return found


def _owners_in_linen(
    model: Any, inputs: Sequence[Any], call_kwargs: dict[str, Any]
) -> Iterator[tuple[str, Owner | Role | _Own]]:
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
                f"weights_only: {type(model).__name__}.init failed with {len(inputs)} input{'s' * (len(inputs) != 1)}. "
                "Write weights_only(model, x), with the arguments of model.init, and call_kwargs={'train': False} for "
                f"its keyword arguments. The error of init: {error}"
            ) from error
    for collection, tree in variables.items():
        for path, _ in trees.flatten_with_paths(tree):
            if collection != "params":
                yield f"{collection}/{path}", Role("statistic", f"in the collection {collection!r}")
                continue
            segments = tuple(path.split("/"))
            start = next(k for k in range(len(segments) - 1, -1, -1) if segments[:k] in types or not k)
            yield path, _owner(types.get(segments[:start], type(model)), segments[start])


def _owners_in_tree(model: Any) -> Iterator[tuple[str, Owner | Role | _Own]]:
    """The owners in a model that is itself the tree of its parameters."""
    for path, leaf, start, kind in _held(model, (), 0, type(model), frozenset()):
        if any(_is_a(leaf, "flax.nnx", name) for name in _VARIABLES_OF_STATE):
            yield "/".join(path), Role("statistic", f"a {type(leaf).__name__}")
        else:
            yield "/".join(path), _owner(kind, "/".join(path[start:]).partition("/")[0])


def _held(
    node: Any, path: tuple[str, ...], start: int, kind: type, above: frozenset[int]
) -> Iterator[tuple[tuple[str, ...], Any, int, type]]:
    """Every array, number or NNX Variable below a node.

    Each comes with its path, the length of its module's path, and the type of that module.
    """
    is_array = isinstance(node, (float, complex)) or (hasattr(node, "shape") and hasattr(node, "dtype"))
    if is_array or _is_a(node, "flax.nnx", "Variable"):
        yield path, node, start, kind
        return
    if id(node) in above:
        return
    # nnx.List and nnx.Dict are modules, but the parameters in them belong to their owner.
    if _is_module(node) and not type(node).__module__.startswith("flax.nnx.helpers"):
        start, kind = len(path), type(node)
    for key, child in _children(node):
        if child is not node:
            yield from _held(child, (*path, key), start, kind, above | {id(node)})


def _has_modules(node: Any) -> bool:
    """Whether the node is a module or a container of modules."""
    if _is_module(node):
        return True
    return isinstance(node, (dict, list, tuple)) and any(_has_modules(child) for _, child in _children(node))


def _children(node: Any) -> list[tuple[str, Any]]:
    flat = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)[0]
    if len(flat) == 1 and not flat[0][0]:  # Not a tree: a plain value, or an NNX module of an older Flax.
        return sorted(vars(node).items()) if _is_a(node, "flax.nnx", "Module") else []
    return [("/".join(map(trees.key_text, keys)), child) for keys, child in flat]


def _owner(kind: type, name: str) -> Owner | _Own:
    """The owner of the attribute or parameter `name`, which is a module of this type; its role if it is registered."""
    for base in kind.__mro__:
        if base in _REGISTRY:
            registered = _REGISTRY[base]
            found = KERNEL if name in registered.weights else EMBEDDING if name in registered.embeddings else "other"
            return _Own(base, name, Role(found, f"{name!r} of {base.__name__!r}, as registered"))
    library = next((base for base in kind.__mro__ if base.__module__.startswith(_LIBRARIES)), None)
    # The fields of an Equinox layer distinguish its own parameters from those that a subclass adds.
    fields = getattr(library, "__dataclass_fields__", {}) if issubclass(kind, _class("equinox", "Module")) else {name}
    if library is None or library.__name__ in _BASES or name not in fields:
        return Owner(kind.__name__, is_library=False)
    return Owner(library.__name__, is_library=True)


def _is_module(value: Any) -> bool:
    return _is_a(value, "flax.nnx", "Module") or _is_a(value, "equinox", "Module")


def _is_a(value: Any, module: str, name: str) -> bool:
    return isinstance(value, _class(module, name))


def _class(module: str, name: str) -> Any:
    """The class of this name. If its module isn't imported, an empty tuple, of which nothing is an instance."""
    kind = getattr(sys.modules.get(module), name, None)
    return kind if inspect.isclass(kind) else ()
