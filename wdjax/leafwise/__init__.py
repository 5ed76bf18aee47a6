"""Leaf by leaf: any elementwise optimizer as one small compiled function, called for each parameter.

A chain of Optax maps over the whole tree once for every operation in it, and JAX traces, lowers and (outside of `jit`)
dispatches each of these for every parameter. The operations are the same for all parameters of one shape. Here they
are traced once for that shape, and what is left for each parameter is a call. Compiled, both are the same loops: XLA
inlines the calls before it fuses anything.

What makes it possible is that the chain can be run on one parameter alone. Its state is then a state for one
parameter, and says by its structure where in the whole state a parameter's own part is (moments), and what all share
(counts). Decays of wdjax ask their rules with all parameters at hand, and bring the answer along as data. What needs
to see several parameters at once can't be run so, and is refused.
"""

import functools
import itertools
import operator
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from .. import _checks, _leaves
from .._action import Action, DecayState, Told
from .._leaves import Alone
from ._dependence import refuse_mixing
from ._kernels import Kernel, Layout, layout_of

PyTree = Any
_CHUNK = 8  # Parameters in one call: outside of jit a dispatch costs as much as the work.


@_checks.known_arguments
def leafwise(optimizer: Any) -> optax.GradientTransformationExtraArgs:
    """Runs an elementwise optimizer leaf by leaf: the same updates and state, traced and dispatched many times sooner.

    Rule:   u <- optimizer's u
    Place:  around an optimizer or a part of a chain that treats every parameter by itself. What looks at several at
            once (a clip by the global norm, `apply_if_finite`, `MultiSteps`) or chooses by path (`freeze`,
            `optax.masked`, `optax.partition`) goes around it, or before or behind it in a chain.
    Units:  none.
    Source: ours.

    Args:
        optimizer: an `optax.GradientTransformation`. The recipes of wdjax are leafwise already, and those inside one
            more `leafwise` are no slower. Decays of wdjax may have any rates and masks; Optax's own `mask=` can't be
            asked of one parameter: `wdjax.adamw(lr, 0.1, mask)` for `optax.adamw(lr, weight_decay=0.1, mask=mask)`.

    Returns:
        An `optax.GradientTransformationExtraArgs` with the state of `optimizer`, so that a checkpoint of one is one of
        the other. Where updates, parameters and state do not correspond leaf for leaf (a gradient that is None), and
        when `update` gets extra arguments that the optimizer takes, it runs the optimizer as it is.

    Raises:
        TypeError: if `optimizer` is no optimizer.
        ValueError: if it mixes parameters, treats them by their place in the tree, or chooses them by path.

    Example:

        >>> import jax.numpy as jnp, optax, wdjax
        >>> optimizer = optax.chain(optax.clip_by_global_norm(1.0), wdjax.leafwise(optax.lion(0.1, weight_decay=0.0)))
        >>> params = {"kernel": jnp.array([2.0]), "bias": jnp.array([3.0])}
        >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
        >>> {name: round(float(update[0]), 6) for name, update in updates.items()}
        {'bias': -0.1, 'kernel': -0.1}
    """
    chain = _checks.finished("leafwise", optimizer, "leafwise(optax.adam(1e-3))")
    refuse_mixing(chain)
    takes_more = isinstance(optimizer, optax.GradientTransformationExtraArgs)
    return run_leafwise(chain, object(), takes_more=takes_more)


def run_leafwise(
    chain: optax.GradientTransformation, key: Hashable | None, *, takes_more: bool = False
) -> optax.GradientTransformationExtraArgs:
    """`leafwise` of a chain that is known to be elementwise.

    Args:
        chain: the chain.
        key: what it was built from, but for rates and masks of decays: chains of one key share what is compiled. None
            where that can't be said, as of arrays. Such a chain may be built anew in each step, as
            `optax.inject_hyperparams` does, and is compiled only as a part of something else.
        takes_more: whether extra arguments of `update` mean something to it.
    """
    chain = optax.with_extra_args_support(chain)
    kernel = Kernel(chain) if key is None else _kernels.setdefault(key, Kernel(chain))
    runner = _Runner(chain, kernel)
    run: Any = chain.update  # Optax's types know no trees of one's own.

    def update_fn(updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any) -> tuple[PyTree, Any]:
        is_lasting = key is not None or any(isinstance(update, Tracer) for update in jax.tree.leaves(updates))
        if is_lasting and not (isinstance(updates, Alone) or (extra_args and takes_more)):
            new = runner.update(updates, state, params)
            if new is not None:
                return new
        return run(updates, state, params, **(extra_args if takes_more else {}))

    return optax.GradientTransformationExtraArgs(chain.init, update_fn)


# Those in use, by what they were built from.
_kernels: weakref.WeakValueDictionary[Hashable, Kernel] = weakref.WeakValueDictionary()


class _Group(NamedTuple):
    """Leaves that are alike.

    Attributes:
        first: the index of one of them.
        axes: for each decay the `axis` of `Told`.
        calls: for each call what takes its leaves out of a list of all, and what the decays do to each (see `Leaf`).
    """

    first: int
    axes: tuple[int | None, ...]
    calls: list[tuple[Callable[[Sequence[Any]], tuple[Any, ...]], list[tuple[Any, ...]]]]


class _Plan(NamedTuple):
    """How a tree is gone through.

    Attributes:
        groups: of leaves that are alike.
        restored: brings what comes group by group back into the order of the tree.
        serves: the trees that it is for, as `_at_hand` has them; False if another such tree may differ.
    """

    groups: list[_Group]
    restored: Callable[[Sequence[Any]], tuple[Any, ...]]
    serves: Any = False


class _Runner:
    """Runs a kernel on every leaf of a tree."""

    def __init__(self, chain: optax.GradientTransformationExtraArgs, kernel: Kernel):
        self.chain = chain  # The kernel's may be another one, with other rates and masks.
        self.kernel = kernel
        self.plan = _Plan([], tuple)  # The last one: outside of jit one step is like the other.

    @functools.cached_property
    def layout(self) -> Layout:
        return layout_of(self.chain)

    def update(self, updates: PyTree, state: Any, params: PyTree) -> tuple[PyTree, Any] | None:
        """The new updates and state; None if updates, parameters and state do not correspond leaf for leaf."""
        layout = self.layout
        arrays, treedef = jax.tree.flatten(updates)
        weights, params_def = (None, treedef) if params is None else jax.tree.flatten(params)
        if not arrays or params_def != treedef or (layout.actions and params is None):
            return None
        columns = [arrays] if weights is None else [arrays, weights]
        try:
            parts = layout.treedef.flatten_up_to(state)
            for inner, part in zip(layout.own, parts, strict=True):
                if inner is not None:
                    columns += _columns(treedef, inner, part)
        except (TypeError, ValueError):
            return None

        at_hand = _at_hand(treedef, columns)
        plan = self.plan
        if at_hand is None or at_hand != plan.serves or _leaves.shapes_are_taken():
            if not all(_is_array(array) for column in columns for array in column):
                return None
            states = [parts[i : i + 2] if action.keeps_anchor else [parts[i], None] for i, action in layout.actions]
            plan = self._planned(columns, arrays, params, list(itertools.starmap(DecayState, states)))
            if at_hand is not None and plan.serves:
                self.plan = plan = plan._replace(serves=at_hand)

        if weights is None:
            columns.insert(1, [None] * len(arrays))
        shared = [part for inner, part in zip(layout.own, parts, strict=True) if inner is None]
        is_traced = _sort(type(arrays[0])) == "tracer"
        results: list[Sequence[Sequence[Any]]] = []
        new_shared: Sequence[Any] = []
        for number, (first, axes, calls) in enumerate(plan.groups):
            leaf = tuple(column[first] for column in columns), calls[0][1][0]
            step = self.kernel.step(axes, leaf, shared, is_traced)
            if number == 0 and shared:
                new_shared = step.shared()
            results += [step.several([take(column) for column in columns], told) for take, told in calls]
        new_columns = (plan.restored(list(itertools.chain(*column))) for column in zip(*results, strict=True))
        new_updates = treedef.unflatten(next(new_columns))
        common = iter(new_shared)
        state = layout.treedef.unflatten(
            next(common) if inner is None else _from_columns(treedef, inner, new_columns) for inner in layout.own
        )
        return new_updates, state

    def _planned(self, columns: Any, updates: Sequence[Any], params: PyTree, states: Sequence[DecayState]) -> _Plan:
        told: list[tuple[Told | None, ...]] = [()] * len(updates)
        for (_, action), state in zip(self.layout.actions, states, strict=True):
            told = [(*told[i], what) for i, what in enumerate(_told(action, updates, params, state))]
        alike: dict[Any, list[int]] = {}
        for i, (row, whats) in enumerate(zip(zip(*columns, strict=True), told, strict=True)):
            alike.setdefault((*map(_kind, row), *map(_kind_of_told, whats)), []).append(i)
        is_lasting = (
            all(action.is_lasting for _, action in self.layout.actions)
            and not any(w.arrays or w.anchor is not None for w in itertools.chain(*told) if w is not None)
            and not _leaves.shapes_are_taken()
        )
        arguments = [tuple(None if what is None else what[1:] for what in whats) for whats in told]
        if is_lasting and isinstance(updates[0], jax.Array) and not isinstance(updates[0], Tracer):
            arguments = _put(arguments)
        groups = [
            _Group(
                indices[0],
                tuple(None if what is None else what.axis for what in told[indices[0]]),
                [
                    (_taking(chunk), [arguments[i] for i in chunk])
                    for chunk in (indices[start : start + _CHUNK] for start in range(0, len(indices), _CHUNK))
                ],
            )
            for indices in alike.values()
        ]
        order = list(itertools.chain(*alike.values()))
        return _Plan(groups, _taking(sorted(range(len(order)), key=order.__getitem__)), is_lasting)


def _taking(indices: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """What takes these of a sequence."""
    return operator.itemgetter(*indices) if len(indices) > 1 else lambda sequence: (sequence[indices[0]],)


def _columns(treedef: Any, inner: Any, part: PyTree) -> list[Sequence[Any]]:
    """The arrays in a part of the state: for each array that a parameter has there, those of all parameters."""
    if jax.tree_util.treedef_is_leaf(inner):
        column, found = jax.tree.flatten(part)
        if found == treedef:
            return [column]
    flat = [jax.tree.flatten(subtree) for subtree in treedef.flatten_up_to(part)]
    if any(structure != inner for _, structure in flat):
        raise ValueError("the state of a parameter has another structure than that of one alone")
    return list(zip(*(arrays for arrays, _ in flat), strict=True))


def _put(tree: PyTree) -> PyTree:
    """The tree with arrays of JAX for numbers, one for all that are the same: a number is put there in every call."""
    put = functools.cache(lambda number, dtype: jnp.asarray(number, dtype))
    return jax.tree.map(lambda number: put(number, number.dtype), tree)


def _from_columns(treedef: Any, inner: Any, columns: Iterator[Sequence[Any]]) -> PyTree:
    """The part of the state that `_columns` took apart."""
    if jax.tree_util.treedef_is_leaf(inner):
        return treedef.unflatten(next(columns))
    return treedef.unflatten(map(inner.unflatten, zip(*itertools.islice(columns, inner.num_leaves), strict=True)))


def _at_hand(treedef: Any, columns: Sequence[Sequence[Any]]) -> Any:
    """What is the same for trees for which one plan serves; None if not all are arrays of JAX that are at hand."""
    if not isinstance(columns[0][0], jax.Array) or isinstance(columns[0][0], Tracer):
        return None
    try:
        # Not in pairs: thousands of new tuples in every step would set off Python's search for garbage.
        return treedef, *([array.aval for array in c] + [array.sharding for array in c] for c in columns)
    except AttributeError:
        return None


def _told(action: Action, updates: Sequence[Any], params: PyTree, state: DecayState) -> list[Told | None]:
    """What a decay does to each array."""
    leaves = _leaves.flatten_with_paths(params)
    each = iter(updates)
    given = [None if _leaves.is_hole(leaf) else next(each) for _, leaf in leaves]
    given = [update if _leaves.is_decayable(update) else None for update in given]
    told = action.told(given, params, leaves, state)
    for update, (path, param), what in zip(given, leaves, told, strict=True):
        if what is not None:
            _checks.same_shape(action.where, path, update, param)
    return [what for what, (_, leaf) in zip(told, leaves, strict=True) if not _leaves.is_hole(leaf)]


def _kind(array: Any) -> Any:
    """What is the same for arrays that one compiled function serves: shape and dtype, and where one at hand lies."""
    match _sort(type(array)):
        case "array":
            return array.aval, array.sharding
        case "tracer":
            return array.aval
        case "numpy":
            return array.shape, array.dtype
    return None


def _kind_of_told(what: Told | None) -> Any:
    return None if what is None else (what.axis, *map(_kind, (what.anchor, what.number, *what.arrays)))


def _is_array(leaf: Any) -> bool:
    sort = _sort(type(leaf))
    return sort is not None and (sort != "numpy" or leaf.dtype != jax.dtypes.float0)


@functools.cache
def _sort(kind: type) -> str | None:
    # Asked of every array in every step, and isinstance(x, jax.Array) takes as long as all the rest.
    sorts = {"tracer": Tracer, "array": jax.Array, "numpy": (np.ndarray, np.generic)}
    return next((sort for sort, base in sorts.items() if issubclass(kind, base)), None)
