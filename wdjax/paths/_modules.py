"""The type of the layer that holds each parameter of a model. No library is imported for it."""

import collections
import inspect
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from .._engine import checks, trees
from .._engine.text import shown
from .roles import EMBEDDING, KERNEL, Role

_LIBRARIES = ("flax.linen.", "flax.nnx.", "equinox.nn.", "haiku.")
# Base classes of the libraries, which have no parameters.
_BASES = ("Module", "Sequential", "List", "Dict", "RNNCellBase")
_STATE = tuple(f"flax.nnx.{name}" for name in ("BatchStat", "Cache", "Intermediate", "RngState", "Perturbation"))
_MODULES = ("flax.nnx.Module", "equinox.Module")


class Owner(NamedTuple):
    """The module that holds a parameter."""

    name: str  # Of its class, or of the library layer that it inherits from.
    is_library: bool


Held = tuple[str, Role | tuple[type, str]]  # A path, and the role or the class and the attribute that hold it.
_REGISTRY: dict[type, dict[str, str]] = {}  # The roles of the parameters of each registered layer.


@checks.known_arguments
def register_layer(layer: type, *, weights: Sequence[str] = (), embeddings: Sequence[str] = ()) -> None:
    """Tells `weights_only(model)` which parameters of your own layer class are weights.

    Its other parameters don't decay. Submodules are not affected, and subclasses are. A second call for the same class
    replaces the first.

    Args:
        layer: the class.
        weights: the names of the parameters that decay.
        embeddings: the names of tables, which decay except with `weights_only(embeddings=False)`.

    Raises: TypeError if `layer` is not a class, or if names are not strings. A name that no layer has is a ValueError
            of `weights_only(model)`.

    Example:

        >>> import equinox as eqx, jax, jax.numpy as jnp, wdjax
        >>> class Bilinear(eqx.Module):
        ...     tensor: jax.Array
        >>> wdjax.paths.register_layer(Bilinear, weights=("tensor",))
        >>> model = Bilinear(tensor=jnp.ones((2, 2, 2)))
        >>> wdjax.weights_only(model).mask(model).tensor
        True
    """
    if not isinstance(layer, type):
        raise TypeError(
            f"register_layer: layer must be a class, got {shown(layer)}. Write register_layer(type(module), ...)."
        )
    for name, given in (("weights", weights), ("embeddings", embeddings)):
        if isinstance(given, str) or not all(isinstance(one, str) for one in given):
            raise TypeError(
                f"register_layer: {name} must be a sequence of names, got {shown(given)}. Write {name}=('kernel',)."
            )
    _REGISTRY[layer] = {name: KERNEL if name in weights else EMBEDDING for name in (*weights, *embeddings)}


def registered() -> list[tuple[str, str]]:
    """The class and the name of each parameter that `register_layer` was told of."""
    return [(layer.__name__, name) for layer, names in _REGISTRY.items() for name in names]


def owners_of(model: Any, inputs: Sequence[Any], call_kwargs: dict[str, Any]) -> dict[str, Owner | Role]:
    """The owner of each parameter of a model by canonical path, or its role where that is already known."""
    if inspect.isclass(model):
        raise TypeError(f"weights_only: got the class {model.__name__}. Give an instance of it: {model.__name__}(...).")
    if isinstance(model, trees.classes("flax.linen.Module")):
        return _resolved(_held_by_linen(model, inputs, call_kwargs))
    if not _has_modules(model):
        raise TypeError(
            "weights_only: the model must be an nnx.Module, an equinox.Module, or a Linen module with its inputs, got "
            f"{type(model).__name__}. If you have only parameters, write weights_only()."
        )
    if inputs or call_kwargs:
        raise TypeError(
            f"weights_only: only a Linen module needs inputs, and {type(model).__name__} holds its parameters. "
            "Write weights_only(model)."
        )
    return _resolved(_held_by_tree(model, (), 0, type(model), frozenset()))


def _resolved(held: Iterable[Held]) -> dict[str, Owner | Role]:
    """The owners, or the registered roles. Raises an error for a registered name that no layer of its class has."""
    owners: dict[str, Owner | Role] = {}
    seen: dict[type, set[str]] = collections.defaultdict(set)
    for path, what in held:
        if isinstance(what, Role):
            owners[path] = what
            continue
        kind, name = what
        layer = next((base for base in kind.__mro__ if base in _REGISTRY), None)
        if layer is None:
            owners[path] = _owner(kind, name)
        else:
            seen[layer].add(name)
            found = _REGISTRY[layer].get(name, "other")
            owners[path] = Role(found, f"{name!r} of {layer.__name__!r}, as registered")
    for layer, names in seen.items():
        missing = [name for name in _REGISTRY[layer] if name not in names]
        if missing:
            raise ValueError(
                f"register_layer: {layer.__name__} was registered with {missing[0]!r}, but in this model it has "
                f"{sorted(names)}. Write register_layer({layer.__name__}, weights=(...)) with names that it has."
            )
    return owners


def _held_by_linen(model: Any, inputs: Sequence[Any], call_kwargs: dict[str, Any]) -> Iterator[Held]:
    types: dict[tuple[str, ...], type] = {}

    def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        types[context.module.path] = type(context.module)
        return call(*args, **kwargs)

    leaves, treedef = jax.tree.flatten(tuple(inputs))
    arrays = [leaf if trees.is_array(leaf) else None for leaf in leaves]

    def init(key: jax.Array, arrays: list[Any]) -> Any:
        filled = [leaf if array is None else array for leaf, array in zip(leaves, arrays, strict=True)]
        return model.init(key, *jax.tree.unflatten(treedef, filled), **call_kwargs)

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
            yield path, (types.get(segments[:start], type(model)), segments[start])


def _held_by_tree(node: Any, path: tuple[str, ...], start: int, kind: type, above: frozenset[int]) -> Iterator[Held]:
    """Every array, number or NNX Variable below a node, whose module is of this class and has a path of this length."""
    is_number = isinstance(node, (float, complex, *trees.classes("flax.nnx.Variable")))
    if isinstance(node, trees.classes(*_STATE)):
        yield "/".join(path), Role("statistic", f"a {type(node).__name__}")
    elif is_number or trees.is_array(node):
        yield "/".join(path), (kind, "/".join(path[start:]).partition("/")[0])
    elif id(node) not in above:
        # nnx.List and nnx.Dict are modules, but the parameters in them belong to their owner.
        if trees.is_module(node) and not type(node).__module__.startswith("flax.nnx.helpers"):
            start, kind = len(path), type(node)
        for key, child in _children(node):
            if child is not node:
                yield from _held_by_tree(child, (*path, key), start, kind, above | {id(node)})


def _has_modules(node: Any) -> bool:
    """Whether the node is a module or a container of modules."""
    is_container = isinstance(node, (dict, list, tuple))
    found = isinstance(node, trees.classes(*_MODULES))
    return found or (is_container and any(_has_modules(child) for _, child in _children(node)))


def _children(node: Any) -> list[tuple[str, Any]]:
    flat = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)[0]
    if len(flat) == 1 and not flat[0][0]:  # Not a tree: a plain value, or an NNX module of an older Flax.
        return sorted(vars(node).items()) if isinstance(node, trees.classes("flax.nnx.Module")) else []
    return [("/".join(map(trees.key_text, keys)), child) for keys, child in flat]


def _owner(kind: type, name: str) -> Owner:
    """The owner of the attribute or parameter `name`, which is a module of this type."""
    library = next((base for base in kind.__mro__ if base.__module__.startswith(_LIBRARIES)), None)
    # The fields of an Equinox layer distinguish its own parameters from those that a subclass adds.
    fields = (
        getattr(library, "__dataclass_fields__", {}) if issubclass(kind, trees.classes("equinox.Module")) else {name}
    )
    if library is None or library.__name__ in _BASES or name not in fields:
        return Owner(kind.__name__, is_library=False)
    return Owner(library.__name__, is_library=True)
