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
import weakref
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.core import Tracer

from .. import _checks, _leaves
from .._action import Action, DecayState, Told
from .._leaves import Alone
from ._dependence import refuse_mixing
from ._kernels import Kernel, Layout, Leaf, layout_of

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


class _Plan(NamedTuple):
    """How a tree is gone through.

    Attributes:
        kinds: the structure of the tree and the kinds of its arrays, or None if another tree of these may differ.
        told: for each leaf, what the decays do there, as in `Leaf`.
        groups: the indices of leaves that are alike, and for each decay the `axis` of `Told`.
    """

    kinds: Any
    told: list[tuple[Any, ...]]
    groups: list[tuple[list[int], tuple[int | None, ...]]]


class _Runner:
    """Runs a kernel on every leaf of a tree."""

    def __init__(self, chain: optax.GradientTransformationExtraArgs, kernel: Kernel):
        self.chain = chain  # The kernel's may be another one, with other rates and masks.
        self.kernel = kernel
        self.plan = _Plan(None, [], [])  # The last one: outside of jit one step is like the other.

    @functools.cached_property
    def layout(self) -> Layout:
        return layout_of(self.chain)

    def update(self, updates: PyTree, state: Any, params: PyTree) -> tuple[PyTree, Any] | None:
        """The new updates and state; None if updates, parameters and state do not correspond leaf for leaf."""
        layout = self.layout
        arrays, treedef = jax.tree.flatten(updates)
        weights, params_def = ([None] * len(arrays), treedef) if params is None else jax.tree.flatten(params)
        if not arrays or params_def != treedef or (layout.actions and params is None):
            return None
        if not all(map(_is_array, arrays)) or not (params is None or all(map(_is_array, weights))):
            return None
        try:
            parts = layout.treedef.flatten_up_to(state)
            own = [_by_leaf(treedef, inner, part) for inner, part in zip(layout.own, parts, strict=True) if inner]
        except (TypeError, ValueError):
            return None
        shared = [part for inner, part in zip(layout.own, parts, strict=True) if not inner]
        decays = [DecayState(parts[i], parts[i + 1] if action.keeps_anchor else None) for i, action in layout.actions]
        own_of_each = zip(*own, strict=True) if own else [()] * len(arrays)
        rows = list(zip(arrays, weights, own_of_each, strict=True))

        plan = self._planned(treedef, rows, params, decays)
        leaves = [Leaf(*row, told) for row, told in zip(rows, plan.told, strict=True)]
        is_traced = _sort(type(arrays[0])) == "tracer"
        results: list[list[Any]] = [[]] * len(leaves)
        new_shared: Sequence[Any] = []
        for number, (indices, axes) in enumerate(plan.groups):
            step = self.kernel.step(axes, leaves[indices[0]], shared, is_traced)
            if number == 0 and shared:
                new_shared = step.shared()
            for chunk in (indices[start : start + _CHUNK] for start in range(0, len(indices), _CHUNK)):
                for i, result in zip(chunk, step.several([leaves[i] for i in chunk]), strict=True):
                    results[i] = result
        first, *columns = zip(*results, strict=True)
        own_arrays, common = iter(columns), iter(new_shared)
        state = layout.treedef.unflatten(
            next(common)
            if inner is None
            else treedef.unflatten(
                map(inner.unflatten, zip(*itertools.islice(own_arrays, inner.num_leaves), strict=True))
            )
            for inner in layout.own
        )
        return treedef.unflatten(first), state

    def _planned(self, treedef: Any, rows: Sequence[Any], params: PyTree, decays: Sequence[DecayState]) -> _Plan:
        kinds = [tuple(map(_kind, (update, param, *itertools.chain(*own)))) for update, param, own in rows]
        if self.plan.kinds == (treedef, kinds) and not _leaves.shapes_are_taken():
            return self.plan
        updates = [update for update, _, _ in rows]
        told: list[tuple[Told | None, ...]] = [()] * len(rows)
        for (_, action), decay in zip(self.layout.actions, decays, strict=True):
            told = [(*told[i], what) for i, what in enumerate(_told(action, updates, params, decay))]
        alike: dict[Any, list[int]] = {}
        for i, whats in enumerate(told):
            alike.setdefault((kinds[i], *map(_kind_of_told, whats)), []).append(i)
        groups = [
            (indices, tuple(None if what is None else what.axis for what in told[indices[0]]))
            for indices in alike.values()
        ]
        plan = _Plan(None, [tuple(None if what is None else what[1:] for what in whats) for whats in told], groups)
        if (
            not any(_sort(type(array)) == "tracer" for array in jax.tree.leaves((updates, params)))
            and not any(what.arrays or what.anchor is not None for what in itertools.chain(*told) if what is not None)
            and all(action.is_lasting for _, action in self.layout.actions)
            and not _leaves.shapes_are_taken()
        ):
            self.plan = plan = plan._replace(kinds=(treedef, kinds))
        return plan


def _by_leaf(treedef: Any, inner: Any, part: PyTree) -> list[tuple[Any, ...]]:
    """The arrays in a part of the state, for each parameter."""
    if jax.tree_util.treedef_is_leaf(inner) and jax.tree.structure(part) == treedef:
        return [(array,) for array in jax.tree.leaves(part)]
    flat = [jax.tree.flatten(subtree) for subtree in treedef.flatten_up_to(part)]
    if any(structure != inner for _, structure in flat):
        raise ValueError("the state of a parameter has another structure than that of one alone")
    return [tuple(arrays) for arrays, _ in flat]


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
