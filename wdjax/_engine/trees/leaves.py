"""One leaf of a tree: its description without values, whether it decays, and the holes, which hold nothing to decay."""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


class Leaf(NamedTuple):
    """What a rule may know about a parameter. It holds no values, so that rules can be decided during tracing.

    Attributes:
        path: its canonical path: the keys that lead to it, joined by "/".
        shape, dtype: those of the array.

    Example:

        >>> import jax.numpy as jnp, wdjax
        >>> matrices = wdjax.only(lambda leaf: leaf.ndim >= 2 and not leaf.path.startswith("head/"))
        >>> matrices.mask({"kernel": jnp.ones((2, 3)), "head": {"kernel": jnp.ones((3, 1))}, "bias": jnp.ones(3)})
        {'bias': False, 'head': {'kernel': False}, 'kernel': True}
    """

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
HOLES = (type(None), optax.MaskedNode)


def hidden_where(flags: Sequence[Any], leaves: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """The leaves, with those hidden whose flag is False: no rule must cover what doesn't decay."""
    return [
        (path, Hidden.of(leaf) if flag is False else leaf) for flag, (path, leaf) in zip(flags, leaves, strict=True)
    ]


def is_hole(node: Any) -> bool:
    """Whether a node is a hole: `None`, or the `MaskedNode` that `optax.masked` leaves."""
    return isinstance(node, HOLES)


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
