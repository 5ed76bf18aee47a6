"""One row for every transformation: how to build it from a rate, and what it does to one array in NumPy float64.

A new method needs one row here, and the whole contract suite runs on it. Tests of what a row computes always run on
every row (`every_row`). The engine around the rows is the same for many of them, so its tests run on the core rows by
default, and on the others only with the slow tests (`core_row`).
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

import wdjax
from wdjax import penalties, wrappers
from wdjax._engine import trees

LEARNING_RATE = 0.5
ANCHOR = 0.25
RADIUS = 2.0  # Of the norms that are controlled.


class Row(NamedTuple):
    """A transformation under test.

    Attributes:
        name: the id of the test.
        build: (rate, mask, toward) -> transformation.
        oracle: (update, weight, rate, anchor) -> update, in float64, without JAX.
        core: whether it is a core row. The core rows cover all paths through the engine.
        has_anchor: whether it takes `toward`.
        off_at: the rate at which it does nothing; None if it always acts.
        keeps_bits: whether an update that it does not act on keeps every bit.
        is_elementwise: whether an element of the result depends on that element alone.
        has_norm: whether it takes the norm of a whole array.
        has_rate: whether it takes a rate. A row without one ignores it, in `build` and in `oracle`.
        is_real: whether it is for real weights only.
        is_stateful: whether its state holds something of each parameter. Then layers of a stack must be declared, and
            are not found by a rate that differs between them.
    """

    name: str
    build: Callable[..., Any]
    oracle: Callable[[np.ndarray, np.ndarray, float, float], np.ndarray]
    core: bool = False
    has_anchor: bool = True
    off_at: float | None = 0.0
    keeps_bits: bool = True
    is_elementwise: bool = True
    has_norm: bool = False
    has_rate: bool = True
    is_real: bool = False
    is_stateful: bool = False

    def masked(self, update: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """The update of a parameter that a mask leaves out."""
        return update if self.keeps_bits else self.oracle(update, weight, 0.0, 0.0)


def soft(w: np.ndarray, k: float) -> np.ndarray:
    return np.sign(w) * np.maximum(np.abs(w) - k, 0)


def group(w: np.ndarray, k: float) -> np.ndarray:
    return w * max(1 - k / np.linalg.norm(w), 0)


def huber(w: np.ndarray, k: float, delta: float) -> np.ndarray:
    return np.where(np.abs(w) <= (1 + k) * delta, w / (1 + k), w - k * delta * np.sign(w))


def of_power_three_halves(w: np.ndarray, k: float) -> np.ndarray:
    """The root of v + k sqrt(v) = |w| (Chaux et al. 2007)."""
    return np.sign(w) * (np.sqrt(k**2 / 4 + np.abs(w)) - k / 2) ** 2


def of_power_one_half(w: np.ndarray, k: float) -> np.ndarray:
    """Half thresholding (Xu et al. 2012): a root of a cubic equation, or zero."""
    if k == 0:
        return w
    threshold = 1.5 * (2 * k) ** (2 / 3)
    size = np.maximum(np.abs(w), threshold)
    root = 2 / 3 * size * (1 + np.cos(2 / 3 * np.arccos(-k / 2 * (3 / size) ** 1.5)))
    return np.where(np.abs(w) > threshold, np.sign(w) * root, 0)


def both(w: np.ndarray, k: float) -> np.ndarray:
    """Soft thresholding, and then that of a group."""
    thin = soft(w, 0.3 * k)
    return group(thin, 0.7 * k) if np.any(thin) else thin


def agreeing(u: np.ndarray, t: np.ndarray) -> np.ndarray:
    return np.where(u * t >= 0, u + t, u)


def onto_sphere(w: np.ndarray, radius: float) -> np.ndarray:
    return w * (radius / np.linalg.norm(w))


def into_ball(w: np.ndarray, radius: float) -> np.ndarray:
    return w * min(1, radius / np.linalg.norm(w))


def into_l1_ball(w: np.ndarray, radius: float) -> np.ndarray:
    """Soft thresholding by the number that leaves a sum of `radius`, found by sorting."""
    moduli = np.abs(w)
    if moduli.sum() <= radius:
        return w
    largest = np.sort(moduli, axis=None)[::-1]
    thresholds = (np.cumsum(largest) - radius) / np.arange(1, largest.size + 1)
    count = max(np.count_nonzero(largest > thresholds), 1)
    return soft(w, thresholds[count - 1])


class Limit(NamedTuple):
    """A constraint under test, and its definition in NumPy float64.

    Attributes:
        constraint: the object. If it takes `axis` and `per`, this one has neither, so that an array is one group.
        project: (w, radius) -> the nearest array that obeys.
        is_elementwise: whether it is a constraint on each weight.
        has_radius: whether it takes a radius. `project` then gets one.
        is_real: whether it is for real weights only.
    """

    constraint: Any
    project: Callable[[np.ndarray, Any], np.ndarray]
    is_elementwise: bool = False
    has_radius: bool = True
    is_real: bool = False


CONSTRAINTS = {
    "L2Ball": Limit(wdjax.L2Ball(), into_ball),
    "L2Sphere": Limit(wdjax.L2Sphere(), onto_sphere),
    "L1Ball": Limit(wdjax.L1Ball(), into_l1_ball),
    "NonNegative": Limit(
        wdjax.NonNegative(), lambda w, radius: np.maximum(w, 0), is_elementwise=True, has_radius=False, is_real=True
    ),
}


def has_gradient(u: np.ndarray) -> np.ndarray:
    return np.any(u != 0, axis=tuple(range(1, u.ndim)), keepdims=True)


class Kind(NamedTuple):
    """A penalty under test, and its definition in NumPy float64.

    Attributes:
        penalty: the object.
        value: w -> the penalty.
        gradient: w -> its gradient.
        prox: (w, step) -> its proximal map; None for a penalty without one.
        is_elementwise: whether it is a sum over single weights.
        is_of_matrices: whether it is for matrices only. In the contract suite a vector is then a matrix with one row.
        rtol: the relative tolerance of its closed forms in float64.
    """

    penalty: Any
    value: Callable[[np.ndarray], Any]
    gradient: Callable[[np.ndarray], np.ndarray]
    prox: Callable[[np.ndarray, float], np.ndarray] | None
    is_elementwise: bool = True
    is_of_matrices: bool = False
    rtol: float = 1e-14


def as_matrix(w: np.ndarray) -> np.ndarray:
    """The array as a matrix whose columns are the last axis. A vector is a row."""
    return np.reshape(w, (-1, np.atleast_1d(w).shape[-1]))


def singular(w: np.ndarray) -> np.ndarray:
    return np.linalg.svd(as_matrix(w), compute_uv=False)


def with_singular(w: np.ndarray, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The array with a function of its singular values in place of these."""
    u, s, vh = np.linalg.svd(as_matrix(w), full_matrices=False)
    return ((u * function(s)) @ vh).reshape(w.shape)


def capping(s: np.ndarray, step: float) -> np.ndarray:
    """The cap at the level above which the parts of the singular values add up to step times the level."""
    level = scipy.optimize.brentq(lambda t: step * t - np.sum(np.maximum(s - t, 0)), 0, s[0], xtol=1e-15, rtol=1e-14)
    return np.minimum(s, level)


KINDS = {
    "L2": Kind(wdjax.L2(), lambda w: 0.5 * np.sum(w**2), lambda w: w, lambda w, k: w / (1 + k)),
    "L1": Kind(wdjax.L1(), lambda w: np.sum(np.abs(w)), np.sign, soft),
    "ElasticNet": Kind(
        wdjax.ElasticNet(0.3),
        lambda w: 0.3 * np.sum(np.abs(w)) + 0.35 * np.sum(w**2),
        lambda w: 0.3 * np.sign(w) + 0.7 * w,
        lambda w, k: soft(w, 0.3 * k) / (1 + 0.7 * k),
    ),
    "GroupLasso": Kind(
        wdjax.GroupLasso(), np.linalg.norm, lambda w: w / np.linalg.norm(w), group, is_elementwise=False
    ),
    "SparseGroupLasso": Kind(
        penalties.SparseGroupLasso(l1_ratio=0.3),
        lambda w: 0.3 * np.sum(np.abs(w)) + 0.7 * np.linalg.norm(w),
        lambda w: 0.3 * np.sign(w) + 0.7 * w / np.linalg.norm(w),
        both,
        is_elementwise=False,
    ),
    "Huber": Kind(
        wdjax.Huber(0.5),
        lambda w: np.sum(np.where(np.abs(w) <= 0.5, 0.5 * w**2, 0.5 * (np.abs(w) - 0.25))),
        lambda w: np.clip(w, -0.5, 0.5),
        lambda w, k: huber(w, k, 0.5),
    ),
    "Lp(1.5)": Kind(
        penalties.Lp(1.5),
        lambda w: np.sum(np.abs(w) ** 1.5) / 1.5,
        lambda w: np.sign(w) * np.sqrt(np.abs(w)),
        of_power_three_halves,
    ),
    "Lp(0.5)": Kind(
        penalties.Lp(0.5),
        lambda w: 2 * np.sum(np.sqrt(np.abs(w))),
        lambda w: np.sign(w) / np.sqrt(np.where(w == 0, 1, np.abs(w))),
        of_power_one_half,
    ),
    "NuclearNorm": Kind(
        wdjax.penalties.NuclearNorm(),
        lambda w: np.sum(singular(w)),
        lambda w: with_singular(w, np.sign),
        lambda w, k: with_singular(w, lambda s: np.maximum(s - k, 0)),
        is_elementwise=False,
        is_of_matrices=True,
        rtol=1e-13,
    ),
    "SpectralNorm": Kind(
        wdjax.penalties.SpectralNorm(),
        lambda w: 0.5 * singular(w)[0] ** 2,
        lambda w: with_singular(w, lambda s: np.where(np.arange(s.size) == 0, s, 0)),
        lambda w, k: with_singular(w, lambda s: capping(s, k)),
        is_elementwise=False,
        is_of_matrices=True,
        rtol=1e-12,
    ),
    "Orthogonality": Kind(
        wdjax.penalties.Orthogonality(),
        lambda w: 0.25 * (np.sum((singular(w) ** 2 - 1) ** 2)),
        lambda w: with_singular(w, lambda s: s * (s**2 - 1)),
        None,
        is_elementwise=False,
        is_of_matrices=True,
        rtol=1e-13,
    ),
}


def _in_gradient(name: str) -> Row:
    kind = KINDS[name]
    penalty = _of_all(kind)
    return Row(
        f"add_penalty_to_grads[{name}]",
        lambda rate, mask=None, toward=None: wdjax.add_penalty_to_grads(penalty, rate, mask, toward=toward),
        lambda u, w, rate, a: u + rate * kind.gradient(w - a),
        core=name == "GroupLasso",
        is_elementwise=kind.is_elementwise,
        has_norm=not kind.is_elementwise,
    )


def _on_weights(name: str) -> Row:
    kind = KINDS[name]
    penalty, prox = _of_all(kind), kind.prox
    assert prox is not None
    return Row(
        f"proximal_step[{name}]",
        lambda rate, mask=None, toward=None: wdjax.proximal_step(
            penalty, rate, mask, learning_rate=LEARNING_RATE, toward=toward
        ),
        lambda u, w, rate, a: a + prox(w + u - a, LEARNING_RATE * rate) - w,
        core=name == "L1",  # Its rule uses weights and updates.
        is_elementwise=kind.is_elementwise,
        has_norm=not kind.is_elementwise,
    )


def _of_all(kind: Kind) -> Any:
    """The penalty. One for matrices also takes vectors and scalars, because the suite's trees hold them."""
    if not kind.is_of_matrices:
        return kind.penalty
    base = type(kind.penalty)

    def with_rows(method: str) -> Any:
        def call(self: Any, w: Any, *step: Any) -> Any:
            result = getattr(base, method)(self, w if w.ndim > 1 else jnp.reshape(w, (1, -1)), *step)
            return jnp.reshape(result, w.shape) if np.ndim(result) else result

        return call

    methods = {name: with_rows(name) for name in ("value", "gradient", "prox") if hasattr(base, name)}
    of_all = type(base.__name__, (base,), {**methods, "__module__": base.__module__})
    return of_all(**{field.name: getattr(kind.penalty, field.name) for field in dataclasses.fields(base) if field.init})


def _constrained(name: str) -> Row:
    limit = CONSTRAINTS[name]
    return Row(
        f"constrain[{name}]",
        lambda rate, mask=None, toward=None: wdjax.constrain(
            limit.constraint, rate if limit.has_radius else None, mask
        ),
        lambda u, w, rate, a: limit.project(w + u, rate) - w,
        core=name == "L2Ball",  # It always acts.
        has_anchor=False,
        off_at=None,
        is_elementwise=limit.is_elementwise,
        has_norm=not limit.is_elementwise,
        has_rate=limit.has_radius,
        is_real=limit.is_real,
    )


def first_step(optimizer: Any) -> Any:
    """What a transformation does in its first step, in every step: what its state holds of the parameters stays."""

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        new, after = optimizer.update(updates, state, params, **extra)
        return new, after._replace(leaf=state.leaf)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def held(u: np.ndarray, w: np.ndarray, bound: float, value: float, gradient: np.ndarray) -> np.ndarray:
    return u - max(value - bound, 0) / w.size * gradient


def _held(name: str) -> Row:
    # Its multiplier changes from step to step, which tests/on_weights/test_cpr.py tests.
    kind = KINDS[name]
    return Row(
        f"cpr[{name}]",
        lambda rate, mask=None, toward=None: first_step(wdjax.on_weights.cpr(kind.penalty, rate, mask)),
        lambda u, w, rate, a: held(u, w, rate, kind.value(w), kind.gradient(w)),
        core=name == "L2",  # It has a state for each parameter, which depends on a norm.
        has_anchor=False,
        off_at=None,
        is_elementwise=False,
        has_norm=True,
        is_stateful=True,
    )


def _perturbed(rate: Any, mask: Any = None, toward: Any = None) -> Any:
    """Fresh weights of ones, so that the noise is known. Gaussian noise is tested beside the method."""

    def one(p: Any) -> Any:
        return jnp.sign(p) if jnp.iscomplexobj(p) else jnp.ones_like(p) if trees.is_decayable(p) else None

    def of(params: Any) -> Any:
        return wdjax.on_weights.shrink_and_perturb(rate, rate, mask, seed=0, fresh=lambda _: jax.tree.map(one, params))

    of({})  # Bad rates are refused when it is built.
    return optax.GradientTransformationExtraArgs(
        lambda params: of(params).init(params),
        lambda updates, state, params=None, **extra: of(params).update(updates, state, params, **extra),
    )


def _of_rows(wrapper: Any) -> Row:
    # In one step, or if the same rows have a gradient in every step, the two are the same.
    return Row(
        f"{wrapper.__name__}[identity]",
        lambda rate, mask=None, toward=None: wrapper(
            optax.identity(), rate, mask, learning_rate=LEARNING_RATE, toward=toward
        ),
        lambda u, w, rate, a: u - LEARNING_RATE * rate * (w - a) * has_gradient(u),
        core=wrapper is wdjax.with_lazy_decay,
        is_stateful=wrapper is wdjax.with_lazy_decay,  # A number for each row.
        is_elementwise=False,
    )


def keeps_moments(value: float) -> Any:
    """An optimizer that changes nothing, with second moments that are always `value`."""

    def init_fn(params: Any) -> Any:
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), (), jax.tree.map(moment, params))

    def moment(p: Any) -> Any:  # One number stands for those of a parameter.
        dtype = jnp.result_type(p)
        return jnp.full([], value, jnp.finfo(dtype).dtype) if jnp.issubdtype(dtype, jnp.inexact) else None

    return optax.GradientTransformation(init_fn, lambda updates, state, params=None: (updates, state))


def held_back(u: np.ndarray, w: np.ndarray, rate: float, anchor: float) -> np.ndarray:
    """A step that increases the distance to the anchor against the gradient is shortened. Here the step is u = g."""
    distance, landed = np.linalg.norm(w - anchor), np.linalg.norm(w + u - anchor)
    if np.sum(u * (w - anchor)) <= 0 or landed <= distance:
        return u
    return u - rate * (landed - distance) / landed * (w + u - anchor)


ROWS = [
    Row(
        "add_l2_to_grads",
        lambda rate, mask=None, toward=None: wdjax.add_l2_to_grads(rate, mask, toward=toward),
        lambda u, w, rate, a: u + rate * (w - a),
        core=True,
    ),
    *map(_in_gradient, KINDS),
    Row(
        "decoupled_decay",
        lambda rate, mask=None, toward=None: wdjax.decoupled_decay(rate, mask, toward=toward),
        lambda u, w, rate, a: u + rate * (w - a),
        core=True,
    ),
    Row(
        "independent_decay",
        lambda rate, mask=None, toward=None: wdjax.independent_decay(rate, mask, toward=toward),
        lambda u, w, rate, a: u - rate * (w - a),
    ),
    Row(
        "weight_norm_control",
        lambda rate, mask=None, toward=None: wdjax.in_update.weight_norm_control(rate, RADIUS, mask),
        lambda u, w, rate, a: u - rate * (w - onto_sphere(w, RADIUS)),
        core=True,  # It runs two rules.
        has_anchor=False,
        is_elementwise=False,
        has_norm=True,
    ),
    Row(
        "continuous_decay",
        lambda rate, mask=None, toward=None: wdjax.continuous_decay(
            rate, mask, learning_rate=LEARNING_RATE, toward=toward
        ),
        lambda u, w, rate, a: u - (1 - np.exp(-LEARNING_RATE * rate)) * (w - a),
        core=True,  # Its rate has two factors.
    ),
    Row(
        "cautious[decoupled_decay]",
        lambda rate, mask=None, toward=None: wdjax.cautious(wdjax.decoupled_decay(rate, mask, toward=toward)),
        lambda u, w, rate, a: agreeing(u, rate * (w - a)),
    ),
    Row(
        "cautious[independent_decay]",
        lambda rate, mask=None, toward=None: wdjax.cautious(wdjax.independent_decay(rate, mask, toward=toward)),
        lambda u, w, rate, a: agreeing(u, -rate * (w - a)),
        core=True,  # It wraps another transformation.
    ),
    Row(
        "cautious[continuous_decay]",
        lambda rate, mask=None, toward=None: wdjax.cautious(
            wdjax.continuous_decay(rate, mask, learning_rate=LEARNING_RATE, toward=toward)
        ),
        lambda u, w, rate, a: agreeing(u, -(1 - np.exp(-LEARNING_RATE * rate)) * (w - a)),
    ),
    *map(_on_weights, [name for name, kind in KINDS.items() if kind.prox]),
    Row(
        "with_decoupled_decay[identity]",
        lambda rate, mask=None, toward=None: wdjax.with_decoupled_decay(
            optax.identity(), rate, mask, learning_rate=LEARNING_RATE, toward=toward
        ),
        lambda u, w, rate, a: u - LEARNING_RATE * rate * (w - a),
    ),
    Row(
        "with_decoupled_decay[sgd]",
        lambda rate, mask=None, toward=None: wdjax.with_decoupled_decay(
            optax.sgd(LEARNING_RATE), rate, mask, learning_rate=LEARNING_RATE, toward=toward
        ),
        lambda u, w, rate, a: -LEARNING_RATE * (u + rate * (w - a)),
        core=True,  # It wraps an optimizer.
        keeps_bits=False,  # SGD itself changes updates.
    ),
    *map(_of_rows, (wdjax.with_sparse_decay, wdjax.with_lazy_decay)),
    Row(
        "with_stable_decay[second moments of 4]",
        lambda rate, mask=None, toward=None: wrappers.with_stable_decay(
            keeps_moments(4.0), rate, mask, learning_rate=LEARNING_RATE, toward=toward, b2=0.0
        ),
        lambda u, w, rate, a: u - LEARNING_RATE * rate / 2 * (w - a),
        core=True,  # Its rate has a factor from another state.
        is_elementwise=False,  # The mean is one of all parameters.
    ),
    Row(
        "with_selective_decay[identity]",
        lambda rate, mask=None, toward=None: wrappers.with_selective_decay(optax.identity(), rate, mask, toward=toward),
        held_back,
        core=True,  # Its rule runs on gradients and on updates.
        is_elementwise=False,
        has_norm=True,
    ),
    Row(
        "scale_by_path",
        lambda rate, mask=None, toward=None: wdjax.scale_by_path(rate, mask),
        lambda u, w, rate, a: rate * u,
        has_anchor=False,
        off_at=1.0,
    ),
    Row(
        "shrink_and_perturb[shrink]",
        lambda rate, mask=None, toward=None: wdjax.on_weights.shrink_and_perturb(rate, 0.0, mask, seed=0),
        lambda u, w, rate, a: (1 - rate) * (w + u) - w,
        has_anchor=False,
    ),
    Row(
        "shrink_and_perturb",
        _perturbed,
        lambda u, w, rate, a: (1 - rate) * (w + u) + rate - w,
        core=True,  # Two actions share one state.
        has_anchor=False,
    ),
    *map(_constrained, CONSTRAINTS),
    *map(_held, ("L2", "GroupLasso")),
    Row(
        "normalized_update",
        lambda rate, mask=None, toward=None: wdjax.normalized_update(mask),
        lambda u, w, rate, a: onto_sphere(u, np.linalg.norm(w)),
        has_anchor=False,
        off_at=None,
        is_elementwise=False,
        has_norm=True,
        has_rate=False,
    ),
    Row(
        "tangential_update",
        lambda rate, mask=None, toward=None: wdjax.in_update.tangential_update(mask),
        lambda u, w, rate, a: u - np.sum(u * w) / np.sum(w * w) * w,
        has_anchor=False,
        off_at=None,
        is_elementwise=False,
        has_norm=True,
        has_rate=False,
    ),
]

# The rows that leave an update bit-identical at a rate of 0.
DECAYS = [row for row in ROWS if row.off_at == 0 and row.keeps_bits]
RATED = [row for row in ROWS if row.has_rate]
LAYERED = [row for row in RATED if not row.is_stateful]
ANCHORED = [row for row in ROWS if row.has_anchor]


def core_first(rows: Iterable[Row]) -> list[Any]:
    """The parameters of a test that runs on core rows by default; the other rows are marked slow."""
    return [pytest.param(row, id=row.name, marks=() if row.core else pytest.mark.slow) for row in rows]


every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
every_rated = pytest.mark.parametrize("row", RATED, ids=lambda row: row.name)
every_decay = pytest.mark.parametrize("row", DECAYS, ids=lambda row: row.name)
every_anchored = pytest.mark.parametrize("row", ANCHORED, ids=lambda row: row.name)
core_row = pytest.mark.parametrize("row", core_first(ROWS))
core_decay = pytest.mark.parametrize("row", core_first(DECAYS))
core_anchored = pytest.mark.parametrize("row", core_first(ANCHORED))
