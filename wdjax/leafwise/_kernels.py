"""A chain for one parameter alone: where its own parts of the state are, and the functions that are compiled."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from .._action import Action, Owner, Told, telling
from .._leaves import Alone
from ._parting import parted

# What the update of one parameter depends on, but for what all parameters share: its arrays (the update; the parameter,
# None if it is not given; those in its own parts of the state), and for each decay what it does here, as `Told` without
# the axis, or None for nothing.
Leaf = tuple[tuple[Any, ...], tuple[Any, ...]]


class Layout(NamedTuple):
    """The structure of a state for one parameter alone.

    Attributes:
        treedef: with every part as a leaf.
        own: for each part that every parameter has one of, the structure of that one; None for what all share.
        actions: the decays in the chain, each with the place of its count among the parts; its anchor is the next.
    """

    treedef: Any
    own: list[Any]
    actions: list[tuple[int, Action]]


def layout_of(chain: optax.GradientTransformation) -> Layout:
    init: Any = chain.init
    found: list[Layout] = []

    def look() -> None:
        parts, treedef = jax.tree.flatten(init(Alone(np.zeros([], np.float32))), is_leaf=is_own)
        actions = [(i, part.action) for i, part in enumerate(parts) if isinstance(part, Owner)]
        own = [jax.tree.structure(part.leaf) if is_own(part) else None for part in parts]
        found.append(Layout(treedef, own, actions))

    jax.eval_shape(look)  # Nothing is computed: only the structure is wanted.
    return found[0]


class Step(NamedTuple):
    """The update of parameters that are alike.

    Attributes:
        several: from the arrays of several parameters, by column, and what the decays do to each, to columns: new
            updates, and new arrays of their own parts of the state.
        shared: gives the new shared parts of the state.
    """

    several: Callable[[Sequence[Sequence[Any]], Sequence[Any]], Sequence[Sequence[Any]]]
    shared: Callable[[], Sequence[Any]]


class Kernel:
    """A chain for one parameter alone: what is traced and compiled once for all parameters of one shape and dtype."""

    def __init__(self, chain: optax.GradientTransformationExtraArgs):
        self.chain = chain
        self._all = jax.jit(self._update, static_argnums=0)
        one = jax.jit(lambda axes, leaf, shared: self._update(axes, leaf, shared)[0], static_argnums=0)

        def several(axes: Any, columns: Any, told: Any, shared: Any) -> Any:
            leaves = zip(zip(*columns, strict=True), told, strict=True)
            return list(zip(*[one(axes, leaf, shared) for leaf in leaves], strict=True))

        self._several = jax.jit(several, static_argnums=0)
        self._shared = jax.jit(lambda axes, leaf, shared: self._update(axes, leaf, shared)[1], static_argnums=0)

    @functools.cached_property
    def layout(self) -> Layout:
        return layout_of(self.chain)

    def step(self, axes: tuple[int | None, ...], leaf: Leaf, shared: list[Any], is_traced: bool) -> Step:
        """The update of all parameters that are like this one.

        Args:
            axes: for each decay the `axis` of `Told`.
            leaf: one of the parameters.
            shared: the parts of the state that all share.
            is_traced: whether this is a part of a larger program.
        """
        if is_traced:
            inputs = len(jax.tree.leaves(leaf))
            program = self._all.trace(axes, leaf, shared).jaxpr
            if len(program.jaxpr.invars) > inputs + len(shared):
                # Built from what is traced itself, a learning rate for one, it is of use only within that trace.
                program = jax.make_jaxpr(functools.partial(self._update, axes))(leaf, shared)
            parts = parted(program, inputs, len(program.jaxpr.outvars) - len(shared))
            if parts is not None:
                found = parts.for_all(*program.consts, *shared)
                # Else XLA divides by what is known in one way for one device and in another for several.
                known = jax.lax.optimization_barrier(list(found[len(shared) :]))
                return Step(functools.partial(parts.for_each, known), lambda: found[: len(shared)])
        return Step(
            lambda columns, told: self._several(axes, columns, told, shared),
            lambda: self._shared(axes, leaf, shared),
        )

    def _update(self, axes: tuple[int | None, ...], leaf: Leaf, shared: list[Any]) -> tuple[list[Any], list[Any]]:
        layout = self.layout
        (update, param, *own_arrays), whats = leaf
        told = {
            action: None if what is None else Told(axis, *what)
            for (_, action), axis, what in zip(layout.actions, axes, whats, strict=True)
        }
        own, common = iter(own_arrays), iter(shared)
        state = layout.treedef.unflatten(
            next(common) if inner is None else Alone(inner.unflatten(itertools.islice(own, inner.num_leaves)))
            for inner in layout.own
        )
        run: Any = self.chain.update  # Optax's types know no trees of one's own.
        with telling(told):
            new, state = run(Alone(update), state, None if param is None else Alone(param))
        parts = layout.treedef.flatten_up_to(state)
        own_parts = [array for part in parts if is_own(part) for array in jax.tree.leaves(part.leaf)]
        return [new.leaf, *own_parts], [part for part in parts if not is_own(part)]


def is_own(part: Any) -> bool:
    return isinstance(part, Alone)
