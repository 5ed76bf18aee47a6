"""The leaves of a parameter tree, each with its canonical path.

A parameter has one name, its *canonical path*: the keys that lead to it, joined by "/". Libraries put more than
parameters into a tree: an NNX `Variable` or a Linen `Partitioned` box around an array, `None` where an Equinox filter
removed a leaf, `optax.MaskedNode` where `optax.masked` did. Boxes do not appear in the path, so that a parameter has
the same path in `init` (which sees NNX Variables) and in `update` (which sees bare arrays). `None` and `MaskedNode` are
*holes*: rules may name these places, but they hold nothing to decay.
"""

import collections
import contextlib
import contextvars
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey, keystr

from . import checks
from .text import kind_of, listed, shown

PyTree = Any


class Leaf(NamedTuple):
    """What a rule may know about a parameter. It holds no values, so that rules can be decided during tracing."""

    path: str
    shape: tuple[int, ...]
    dtype: Any

    @property
    def ndim(self) -> int:
        return len(self.shape)


class Hidden(optax.MaskedNode):
    """A hole for a parameter that is hidden from an optimizer. Unlike `optax.MaskedNode`, it keeps shape and dtype.

    So the rules inside that optimizer decide as on the whole tree. For example, they recognize a norm by its bias, and
    the number of layers by the size of a stack. Arithmetic on it is an error: another optimizer, which trains the
    parameter, got the state of `freeze`.
    """

    shape: tuple[int, ...] = ()
    dtype: Any = None

    @staticmethod
    def of(leaf: Any) -> "Hidden":
        return _hidden(describe("", leaf), ())

    def refuse(self, *_: Any) -> Any:
        raise TypeError(
            f"This is a state of wdjax.freeze. It has nothing for a parameter of shape {self.shape} that was frozen, "
            "and now the optimizer trains it. Carry the state over: state = wdjax.thaw(state, optimizer, params)."
        )


_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
_OTHERS = ("neg", "abs", "lt", "le", "gt", "ge", "getitem", "array", "jax_array")
for _name in (*_BINARY, *map("r{}".format, _BINARY), *_OTHERS):
    setattr(Hidden, f"__{_name}__", Hidden.refuse)


@dataclasses.dataclass(eq=False)
class _Remembered:
    shape: tuple[int, ...]
    dtype: Any

    # Two trees with the same holes have the same structure, whatever was hidden there.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Remembered)

    def __hash__(self) -> int:
        return hash(_Remembered)


def _hidden(remembered: Any, _: Any) -> Hidden:
    place = Hidden()
    place.shape, place.dtype = remembered.shape, remembered.dtype
    return place


jax.tree_util.register_pytree_node(Hidden, lambda place: ((), _Remembered(place.shape, place.dtype)), _hidden)


_HOLES = (type(None), optax.MaskedNode)


def hidden_where(flags: Sequence[Any], leaves: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """The leaves, with those hidden whose flag is False: no rule must cover what doesn't decay."""
    return [
        (path, Hidden.of(leaf) if flag is False else leaf) for flag, (path, leaf) in zip(flags, leaves, strict=True)
    ]


def canonical_paths(params: PyTree) -> list[str]:
    """The canonical path of every leaf, in the order of the tree. Patterns are matched against these paths.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> wdjax.paths.canonical_paths({"Dense_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}})
        ['Dense_0/bias', 'Dense_0/kernel']
    """
    return [path for path, leaf in flatten_with_paths(params) if not is_hole(leaf)]


def is_hole(node: Any) -> bool:
    """Whether a node is a hole: `None`, or the `MaskedNode` that `optax.masked` leaves."""
    return isinstance(node, _HOLES)


def is_decayable(leaf: Any) -> bool:
    """Whether the leaf is a real or complex number or array: not an integer, a boolean, a PRNG key or a hole."""
    dtype = getattr(leaf, "dtype", None)
    if is_hole(leaf) or dtype is None:
        return isinstance(leaf, (float, complex))
    return _is_inexact(dtype)


@functools.cache
def _is_inexact(dtype: Any) -> bool:
    # The dtype of a `Leaf` that describes a Python number is its type.
    is_python = type(dtype) is type and not issubclass(dtype, np.generic)
    return dtype in (float, complex) if is_python else jnp.issubdtype(dtype, jnp.inexact)


def flatten_with_paths(tree: PyTree) -> list[tuple[str, Any]]:
    """Every leaf and hole of a tree with its canonical path, in the order of `structure(tree)`."""
    boxes = box_types()
    stops = (*_HOLES, *boxes)

    def is_stop(x: Any) -> bool:
        return isinstance(x, stops)

    found = [("/".join(keys), leaf) for keys, leaf in _walk(tree, (), is_stop)]
    paths = [path for path, _ in found]
    if len(set(paths)) < len(paths):
        twice = next(path for path, times in collections.Counter(paths).items() if times > 1)
        raise ValueError(
            f"wdjax: two parameters have the path {twice!r}, as in {{'a/b': ..., 'a': {{'b': ...}}}}. "
            "Rename one: a rule by path could not tell them apart."
        )
    return found


def parameters(
    where: str, params: PyTree, name: str = "params", *, may_hold: Sequence[str] = ()
) -> list[tuple[str, Any]]:
    """`flatten_with_paths`, with an error for what is not a tree of parameters, such as a training state.

    It `may_hold` "functions" as a whole Equinox model does, and "variables" that are not parameters as an NNX model
    does.
    """

    def has(name: str) -> bool:
        return name in params if isinstance(params, Mapping) else hasattr(params, name)

    variables = () if "variables" in may_hold else ("BatchStat", "Cache", "Intermediate", "OptState", "RngState")
    of_nnx = classes(*(f"flax.nnx.{kind}" for kind in ("Optimizer", *variables)))

    def is_state(node: Any) -> bool:
        return type(node).__name__.endswith("State") and _package(node) in ("optax", "wdjax")

    is_whole = has("params") and (has("opt_state") or has("tx"))
    nodes: list[tuple[Any, Any]] = [((), params)]
    if not (is_whole or isinstance(params, Iterator)):
        nodes = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda x: isinstance(x, of_nnx) or is_state(x))[0]
    # A model holds arrays beside its functions; `hk.transform` makes a pair of functions.
    is_model = "functions" in may_hold and any(hasattr(node, "shape") for _, node in nodes)
    for keys, node in nodes:
        if is_whole:
            remedy = "Pass state['params']." if isinstance(params, Mapping) else "Pass state.params."
        elif isinstance(node, of_nnx):
            remedy = "Pass nnx.state(model, nnx.Param)."
        elif is_state(node):
            remedy = "Pass the parameters that optimizer.init got, not its state."
        elif _package(node) == "torch":
            remedy = "Convert them: {name: jnp.asarray(x.detach().numpy()) for name, x in model.state_dict().items()}."
        elif getattr(node, "dtype", None) == jax.dtypes.float0:
            remedy = "It is the gradient of an integer. Pass the parameters, not their gradients."
        elif _holds_numbers(node) or (is_model and keys):
            continue
        else:
            remedy = (
                "Pass the arrays of a model: model.init(key, inputs)['params'] in Linen, nnx.state(model, nnx.Param) "
                "in NNX, eqx.filter(model, eqx.is_inexact_array) in Equinox."
            )
        path = "/".join(map(key_text, keys))
        at = f" at {path!r}" if path else ""
        raise TypeError(f"{where}: {name} must be a tree of parameters, got {shown(node)}{at}. {remedy}")
    return flatten_with_paths(params)


def _holds_numbers(leaf: Any) -> bool:
    if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct, bool, int, float, complex)):
        return True
    dtype = getattr(leaf, "dtype", None)
    return dtype.kind not in "OSUMm" if isinstance(dtype, np.dtype) else isinstance(dtype, type)


def _package(node: Any) -> str:
    return type(node).__module__.partition(".")[0]


def structure(tree: PyTree) -> Any:
    """The structure of a tree in which holes count as leaves."""
    return jax.tree.structure(tree, is_leaf=is_hole)


def check_broadcasts(where: str, what: str, array: Any, shape: tuple[int, ...]) -> None:
    """Raises an error if an array does not broadcast against a parameter of this shape."""
    sizes = np.shape(array)
    pairs = zip(reversed(sizes), reversed(shape), strict=False)
    if len(sizes) > len(shape) or any(size not in (1, of_param) for size, of_param in pairs):
        raise ValueError(
            f"{where}: {what} is an array of shape {sizes}, which does not broadcast against the parameter's shape "
            f"{shape}. Give an array of shape {shape}, where axes may have size 1, or one number."
        )


def describe(path: str, leaf: Any) -> Leaf:
    """The description of a leaf, as predicates get it."""
    if is_hole(leaf) and not isinstance(leaf, Hidden):
        return Leaf(path, (), None)
    shape = (_shapes_taken.get() or {}).get(path, getattr(leaf, "shape", ()))
    return Leaf(path, tuple(shape), getattr(leaf, "dtype", type(leaf)))


_Shapes = Mapping[str, tuple[int, ...]]
_shapes_taken: contextvars.ContextVar[_Shapes | None] = contextvars.ContextVar("shapes", default=None)


@contextlib.contextmanager
def shapes_taken_for(shapes: _Shapes) -> Iterator[None]:
    """Makes rules see leaves with these shapes, so that they decide on small copies of a model as on the model."""
    token = _shapes_taken.set(shapes)
    try:
        yield
    finally:
        _shapes_taken.reset(token)


def warn_of_aliases(where: str, leaves: Sequence[tuple[str, Any]]) -> None:
    """Warns if one array occurs twice in a tree: each occurrence would get its own update and its own decay."""
    paths: dict[int, list[str]] = {}
    for path, leaf in leaves:
        if isinstance(leaf, (jax.Array, np.ndarray)):
            paths.setdefault(id(leaf), []).append(path)
    tied = [" and ".join(map(repr, same[:3])) for same in paths.values() if len(same) > 1]
    if tied:
        more = f" (and {len(tied) - 1} more such arrays)" if len(tied) > 1 else ""
        checks.warn(
            f"{where}: {tied[0]} are one array{more}. As separate parameters, each gets its own update and decay, and "
            "they differ after the first step. To keep them tied, put the array into params once: in NNX share the "
            "Variable and take nnx.state(model, nnx.Param), in Equinox use eqx.nn.Shared. To let them only start "
            "equal, copy it."
        )


def beside(
    where: str, tree: PyTree, params: PyTree, paths: Sequence[str]
) -> tuple[list[Any], Callable[[Sequence[Any]], PyTree]]:
    """The leaf of a tree for each parameter, or None, and a function that rebuilds the tree from new leaves.

    The tree may have holes, which stay, and may lack boxes that params have. The canonical paths are for the error.
    """
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_hole)
    params_def = structure(params)
    places: list[Any] = list(range(params_def.num_leaves))
    if treedef != params_def:
        try:
            places = treedef.flatten_up_to(jax.tree.unflatten(params_def, places))
        except (ValueError, TypeError) as error:
            raise ValueError(_structure_message(where, tree, params, paths)) from error
    found: list[Any] = [None] * len(paths)
    for n, (leaf, place) in enumerate(zip(leaves, places, strict=True)):
        indices = jax.tree.leaves(place)
        if len(indices) == 1:
            places[n] = indices[0]
            found[indices[0]] = leaf
        elif is_hole(leaf):  # A hole may stand for a whole subtree of parameters.
            places[n] = None
        else:
            raise ValueError(_structure_message(where, tree, params, paths))

    def rebuilt(new: Sequence[Any]) -> PyTree:
        filled = [leaf if i is None else new[i] for leaf, i in zip(leaves, places, strict=True)]
        return jax.tree.unflatten(treedef, filled)

    return found, rebuilt


def of_each(
    tree: PyTree,
    acts: Callable[[Any], bool],
    leaf_fn: Callable[[Any], Any],
    other_fn: Callable[[Any], Any] = lambda x: None,
) -> PyTree:
    """Maps `leaf_fn` over the leaves that `acts` selects (arrays or their shapes), and `other_fn` over the others.

    A box whose leaves all vanish becomes None, because Flax would ask it for the sharding of its content.
    """
    boxes = box_types()

    def act(x: Any) -> Any:
        if isinstance(x, boxes):
            new = jax.tree.map(act, x)
            return None if jax.tree.leaves(x) and not jax.tree.leaves(new) else new
        if not acts(x):
            return other_fn(x)
        return jax.eval_shape(leaf_fn, x) if isinstance(x, jax.ShapeDtypeStruct) else leaf_fn(jnp.asarray(x))

    return jax.tree.map(act, tree, is_leaf=lambda x: isinstance(x, boxes))


def _structure_message(where: str, updates: PyTree, params: PyTree, paths: Sequence[str]) -> str:
    found = {path for path, _ in flatten_with_paths(updates)}
    if found == set(paths):
        at, difference = _difference(updates, params, "") or ("", "their structures differ in their static data")
        place = f"at {at!r}" if at else "at the root"
        return (
            f"{where}: updates and params have the same paths in different containers: {place}, {difference}. "
            "Make both from one tree, as in jax.grad(loss)(params) and jax.tree.map(f, params)."
        )
    only = {"updates": found - set(paths), "params": set(paths) - found}
    said = ". ".join(f"Only in {name}: {listed(sorted(some))}" for name, some in only.items() if some)
    return (
        f"{where}: updates and params are trees of different structure. {said}. "
        "Pass the parameters that the gradients belong to: optimizer.update(grads, state, params)."
    )


def _difference(update: PyTree, param: PyTree, path: str) -> tuple[str, str] | None:
    """The outermost node of two trees with the same paths that differs, and how."""
    (keys, nodes, one_level), (of_param, nodes_of_param, one_level_of_param) = map(_opened, (update, param))
    if is_hole(update) or not (keys or of_param):
        return None
    if one_level == one_level_of_param:
        for key, below, below_param in zip(keys, nodes, nodes_of_param, strict=True):
            if found := _difference(below, below_param, f"{path}/{key}".removeprefix("/")):
                return found
        return None
    if type(update) is not type(param):
        return path, f"updates have {kind_of(update)} and params {kind_of(param)}"
    if keys != of_param:
        both = f"updates have the keys in the order {shown(keys)} and params in the order {shown(of_param)}"
        return path, f"{both} (JAX sorts a plain dict)"
    names = [field.name for field in dataclasses.fields(param)] if dataclasses.is_dataclass(param) else []
    static = [name for name in names if name not in keys and getattr(update, name) is not getattr(param, name)]
    return path, f"the static fields {static} of {kind_of(param)} differ" if static else f"{kind_of(param)} differs"


def _opened(node: PyTree) -> tuple[list[str], list[Any], Any]:
    """The keys, children and structure of one node. A box stands for its content."""
    children, one_level = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    if isinstance(node, box_types()) and len(children) == 1:
        return _opened(children[0][1])
    return [key_text(keys[0]) for keys, _ in children if keys], [child for _, child in children], one_level


def _walk(
    tree: PyTree, prefix: tuple[str, ...], is_stop: Callable[[Any], bool], *, box: bool = False
) -> list[tuple[tuple[str, ...], Any]]:
    found = []
    # We look inside the box, so its root is not a leaf, and its own key ("value") is not part of the path.
    stop = (lambda x: x is not tree and is_stop(x)) if box else is_stop
    for keys, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=stop)[0]:
        path = prefix + tuple(map(key_text, keys[1:] if box else keys))
        if is_stop(node) and not is_hole(node):
            found += _walk(node, path, is_stop, box=True)
        else:
            found.append((path, node))
    return found


def prefixes(path: str) -> Iterable[str]:
    """The path and the paths of all nodes above it; the root has the path ""."""
    while path:
        yield path
        path = path.rpartition("/")[0]
    yield ""


def key_text(key: Any) -> str:
    """One segment of a canonical path."""
    match key:
        case DictKey() | FlattenedIndexKey():
            return str(key.key)
        case GetAttrKey():
            return key.name
        case SequenceKey():
            return str(key.idx)
    return keystr((key,), simple=True)


def box_types() -> tuple[type, ...]:
    return classes("flax.core.meta.AxisMetadata", "flax.nnx.Variable")


def classes(*names: str) -> tuple[type, ...]:
    """The classes of these names, without those of modules that are not imported. Then no tree has such an object."""
    found = [getattr(sys.modules.get(module), name, None) for module, _, name in (n.rpartition(".") for n in names)]
    return tuple(kind for kind in found if isinstance(kind, type))
