"""Probe weights and gradients, and the optimizer's steps on them. `_measures` interprets the steps."""

import copy
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .._engine import trees
from ..low_precision import apply_updates
from ..low_precision.rounding import is_low
from ._integers import is_integer, moved_integers, spread
from ._states import Change, is_a

PyTree = Any
Arrays = dict[int, Any]  # A NumPy array for each leaf that is a number.
_SMALLEST = 8  # Axes of probes of further layers.
_MOST_CALLS = 64  # How long to wait for an optimizer that accumulates gradients or warms up.


class Step(NamedTuple):
    """One real step of an optimizer, which takes as many calls of `update` as it needs to react to gradients."""

    start: Arrays  # The weights before the step.
    moved: list[Arrays]  # What each call added to the weights.
    before: PyTree  # The state before the step.
    after: PyTree  # The state after it.

    def total(self, i: int) -> np.ndarray:
        """What the step added to a leaf."""
        return np.sum([call[i] for call in self.moved], axis=0)

    def bare(self) -> "Step":
        """The step without its states, which are large."""
        return self._replace(before=None, after=None)

    def end(self) -> Arrays:
        """The weights after the step."""
        return {i: start + self.total(i) for i, start in self.start.items()}


class Probes:
    """Small copies of the leaves of a tree, and an optimizer to run on them.

    Attributes:
        leaves, indices: descriptions of the leaves, with their true shapes and dtypes; and which are numbers.
        weights, origin, gradients: probe values of both signs, with magnitudes of 0.1 to 2, 0.1 to 2 and 2 to 4.
        eps, update_eps: the relative rounding errors of the measurements, and of the updates in their own dtype.
        moved, moved_integers: the leaves that gradients move; the paths of the integers that move without one.
        first, calls, offset: the first call that makes a real step, how many make one, and how many come before.
    """

    def __init__(
        self, optimizer: Any, params: PyTree, extra_args: Mapping[str, Any], *, longest: int | None, exact: bool
    ):
        found = trees.flatten_with_paths(params)
        self.leaves = [trees.describe(path, leaf) for path, leaf in found]
        self.indices = [i for i, (_, leaf) in enumerate(found) if trees.is_decayable(leaf)]
        self.longest, self.exact = longest, exact
        self.eps, self.update_eps = 2.0 ** (-52 if exact else -23), 0.0
        self.first, self.calls, self.offset = 0, 1, 0
        self.moved: set[int] = set()
        self.moved_integers: set[str] = set()
        self._treedef = trees.structure(params)
        self._given = [spread(leaf) if is_integer(leaf) else leaf for _, leaf in found]
        shapes = _probe_shapes(self.leaves, longest)
        rng = np.random.default_rng(0)

        def drawn(least: float, most: float) -> Arrays:
            return {i: _values(rng, shapes[i], self.leaves[i].dtype, least, most) for i in self.indices}

        self.weights, self.origin, self.gradients = drawn(0.1, 2.0), drawn(0.1, 2.0), drawn(2.0, 4.0)
        if isinstance(params, optax.LookaheadParams):  # Otherwise the synchronization of the two looks like a decay.
            half = len(found) // 2
            for arrays in (self.weights, self.origin):
                arrays |= {i: arrays[i - half] for i in self.indices if i >= half}
        self._shapes = {} if shapes == [leaf.shape for leaf in self.leaves] else {x.path: x.shape for x in self.leaves}
        self._optimizer = optimizer
        self._compile(extra_args)

    def _compile(self, extra_args: Mapping[str, Any]) -> None:
        asked_of_true_shapes, optimizer = trees.shapes_taken_for(self._shapes), self._optimizer
        self._init = asked_of_true_shapes(optimizer.init)
        self._update = asked_of_true_shapes(lambda *args: optimizer.update(*args, **extra_args))
        self._compiled_init, self._compiled_call = jax.jit(self._init), jax.jit(self._call)

    @property
    def tolerance(self) -> float:
        """By how much rates may differ, relatively. The optimizer may have computed in float32."""
        return max(2e-3, 4 * self.update_eps)

    def tree(self, arrays: Arrays, *, wide: bool = True, zeros: bool = False) -> PyTree:
        """A tree like params with these values. With `wide`, it is in float64, or low precision becomes float32."""

        def leaf(i: int, given: Any) -> Any:
            if i in arrays:
                dtype = self.leaves[i].dtype if hasattr(given, "dtype") else jnp.float32
                if wide and self.exact:
                    dtype = jnp.complex128 if jnp.issubdtype(dtype, jnp.complexfloating) else jnp.float64
                elif wide and is_low(jax.ShapeDtypeStruct((), dtype)):
                    dtype = jnp.float32
                return np.asarray(arrays[i], dtype)
            if not isinstance(given, jax.ShapeDtypeStruct):
                return jax.tree.map(jnp.zeros_like, given) if zeros and not is_a(given, jax.dtypes.prng_key) else given
            if is_a(given, jax.dtypes.prng_key):
                return jax.random.split(jax.random.key(0), given.shape)
            return jnp.zeros(given.shape, given.dtype)

        return jax.tree.unflatten(self._treedef, [leaf(i, given) for i, given in enumerate(self._given)])

    def gradients_of(self, arrays: Arrays, *, wide: bool = True) -> PyTree:
        """A tree of gradients with these values."""
        tree = self.tree(arrays, wide=wide, zeros=True)
        return tree.fast if isinstance(tree, optax.LookaheadParams) else tree

    def scaled(self, arrays: Arrays, factor: float) -> Arrays:
        """The arrays times a number."""
        return {i: factor * array for i, array in arrays.items()}

    def init(self, weights: Arrays, *, wide: bool = True) -> PyTree:
        """The optimizer's state for these weights."""
        return self._compiled_init(self.tree(weights, wide=wide))

    def _call(self, grads: PyTree, state: PyTree, params: PyTree) -> tuple[PyTree, PyTree, PyTree]:
        updates, state = self._update(grads, state, params)
        return updates, state, apply_updates(params, updates)

    def call(self, grads: PyTree, state: PyTree, params: PyTree) -> tuple[Arrays, PyTree, PyTree]:
        """What one call of `update` adds to the weights, the new state and the new weights."""
        updates, state, params = self._compiled_call(grads, state, params)
        dtypes = {x.dtype for x in jax.tree.leaves(updates) if trees.is_decayable(x)}
        self.update_eps = max(self.update_eps, *(float(jnp.finfo(dtype).eps) for dtype in dtypes), 0.0)
        return self.numbers(updates), state, params

    def step(self, weights: Arrays, gradients: Arrays, state: PyTree, calls: int | None = None) -> Step:
        """Runs the calls of one real step from a state, or this many."""
        params, grads = self.tree(weights), self.gradients_of(gradients)
        start, before, moved = self.numbers(params), state, []
        for _ in range(self.calls if calls is None else calls):
            added, state, params = self.call(grads, state, params)
            moved.append(added)
        return Step(start, moved, before, state)

    def first_step(
        self,
        weights: Arrays,
        gradients: Arrays,
        origin: Arrays | None = None,
        change: Change = lambda state: state,
        idle: Arrays | None = None,
    ) -> Step:
        """The first real step from a new state, which is made at the weights or the origin, and then changed.

        The calls before it have zero gradients, or the idle ones.
        """
        state = self.init(weights if origin is None else origin)
        if self.offset:
            before = self.step(weights, self.scaled(weights, 0.0) if idle is None else idle, state, self.offset)
            weights, state = before.end(), before.after
        return self.step(weights, gradients, change(state))

    def with_extra_args(self, extra_args: Mapping[str, Any]) -> "Probes":
        """The same probes with other keyword arguments for `update`."""
        other = copy.copy(self)
        other._compile(extra_args)
        return other

    def find_rhythm(self) -> None:
        """Finds the first call that makes a real step, and how many calls make one.

        A real step reacts to gradients: with `optax.MultiSteps`, every k-th call does. Calls that react to gradients
        but do nothing without one, such as the ascents of SAM, form one step with the next call that decays.
        """
        params = self.tree(self.weights)
        kinds = [self.gradients_of(self.scaled(self.gradients, factor)) for factor in (1.0, 0.0)]
        states = [self.init(self.weights)] * 2
        reacting, moving, descends = [], [], True
        rounding = {
            i: 2 * self.eps * np.abs(w) for i, w in self.weights.items()
        }  # Averages of equal weights have some.
        for call in range(_MOST_CALLS):
            results = [self.call(grads, state, params) for grads, state in zip(kinds, states, strict=True)]
            with_gradients, without = (added for added, *_ in results)
            states = [state for _, state, _ in results]
            self.moved_integers |= moved_integers(params, results[1][2])
            if moved := {i for i in self.indices if not np.array_equal(with_gradients[i], without[i])}:
                reacting.append(call)
                self.moved |= moved
                along = sum(np.real(np.vdot(self.gradients[i], with_gradients[i] - without[i])) for i in moved)
                descends = descends and bool(along < 0)
            if any(np.any(np.isfinite(without[i]) & (np.abs(without[i]) > rounding[i])) for i in self.indices):
                moving.append(call)
            if len(reacting) > 1 and (len(moving) > 1 or call >= reacting[1] + 8):
                break
        rhythms = [(found[1] - found[0], found[0]) for found in (reacting, moving) if len(found) > 1]
        self.calls, self.first = max(rhythms, default=(1, (reacting or [0])[0]))
        self.offset = max(self.first + 1 - self.calls, 0)
        # If every call descends, every call is a step, and only the decay pauses. Ascents of SAM go up.
        if descends and len(rhythms) == 2 and rhythms[0][0] == 1 < self.calls:
            self.calls, self.first, self.offset = 1, reacting[0], max(reacting[0], moving[0])

    def trajectory(self, steps: int, *, wide: bool) -> Arrays:
        """The probe weights after many calls with zero gradients, in their own dtypes or in wide ones."""
        grads = self.gradients_of(self.scaled(self.weights, 0.0), wide=wide)
        start = self.tree(self.weights, wide=wide), self.init(self.weights, wide=wide)

        @jax.jit
        def run(grads: PyTree, params: PyTree, state: PyTree) -> PyTree:
            def call(carry: Any, _: Any) -> Any:
                _, state, params = self._call(grads, carry[1], carry[0])
                return (params, state), None

            return jax.lax.scan(call, (params, state), length=steps)[0][0]

        return self.numbers(run(grads, *start))

    def without_a_number(self) -> set[int]:
        """Leaves whose updates are not finite in their own dtypes, with zero or nonzero gradients."""
        params, state = self.tree(self.weights, wide=False), self.init(self.weights, wide=False)
        found: set[int] = set()
        for factor in (0.0, 1.0):
            grads = self.gradients_of(self.scaled(self.gradients, factor), wide=False)
            moved = self.call(grads, state, params)[0]
            found |= {i for i in self.indices if not np.all(np.isfinite(moved[i]))}
        return found

    def numbers(self, tree: PyTree) -> Arrays:
        """The leaves of a tree that are numbers, in double precision."""
        found = dict(trees.flatten_with_paths(tree))

        def number(i: int) -> np.ndarray:
            value = found.get(self.leaves[i].path)
            array = np.zeros(self.weights[i].shape) if trees.is_hole(value) else np.asarray(value)
            return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)

        return {i: number(i) for i in self.indices}


def weights_from(origin: Arrays | None, weights: Arrays, factor: float) -> Arrays:
    """Weights times a factor, as offsets from the origin if there is one."""
    return {i: factor * w if origin is None else origin[i] + factor * w for i, w in weights.items()}


def _probe_shapes(leaves: Sequence[trees.Leaf], longest: int | None) -> list[tuple[int, ...]]:
    """The shapes, with axes cut to `longest` in arrays of more than 4 * longest**2 elements.

    Of such arrays whose paths differ only in their numbers, all but the first have axes of at most 8.
    """
    shapes, seen = [], set[object]()
    for leaf in leaves:
        shape = tuple(leaf.shape)
        if longest is not None and math.prod(shape) > 4 * longest**2:
            layer = (re.sub(r"\d+", "", leaf.path), shape, leaf.dtype)
            shape = tuple(min(size, _SMALLEST if layer in seen else longest) for size in shape)
            seen.add(layer)
        shapes.append(shape)
    return shapes


def _values(rng: np.random.Generator, shape: Sequence[int], dtype: Any, least: float, most: float) -> np.ndarray:
    magnitudes = np.exp(rng.uniform(np.log(least), np.log(most), shape))
    if isinstance(dtype, np.dtype) and jnp.issubdtype(dtype, jnp.complexfloating):
        return magnitudes * np.exp(1j * rng.uniform(0, 2 * np.pi, shape))
    # The values are exact in the parameter's dtype, so low precision does not round them at the start.
    dtype = dtype if isinstance(dtype, np.dtype) else np.dtype(np.float32)
    signs = rng.permutation(np.resize([1.0, -1.0], math.prod(shape))).reshape(shape)  # Half of each.
    return (magnitudes * signs).astype(dtype).astype(np.float64)
