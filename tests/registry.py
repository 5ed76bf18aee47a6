"""One row for every transformation: how to build it from a rate, and what it does to one array in NumPy float64.

A new method needs one row here, and the whole contract suite runs on it. Tests of what a row computes always run on
every row (`every_row`). The engine around the rows is the same for many of them, so its tests run on the core rows by
default, and on the others only with the slow tests (`core_row`).
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wdjax
from wdjax._engine import trees

LEARNING_RATE = 0.5
ANCHOR = 0.25


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


CONSTRAINTS: dict[str, tuple[Any, Callable[[np.ndarray, float], np.ndarray]]] = {
    "L2Ball": (wdjax.L2Ball(), into_ball),
    "L2Sphere": (wdjax.L2Sphere(), onto_sphere),
    "L1Ball": (wdjax.L1Ball(), into_l1_ball),
}


def has_gradient(u: np.ndarray) -> np.ndarray:
    return np.any(u != 0, axis=tuple(range(1, u.ndim)), keepdims=True)


KINDS: dict[str, tuple[Any, Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray, float], np.ndarray]]] = {
    "L2": (wdjax.L2(), lambda w: w, lambda w, k: w / (1 + k)),
    "L1": (wdjax.L1(), np.sign, soft),
    "ElasticNet": (
        wdjax.ElasticNet(0.3),
        lambda w: 0.3 * np.sign(w) + 0.7 * w,
        lambda w, k: soft(w, 0.3 * k) / (1 + 0.7 * k),
    ),
    "GroupLasso": (wdjax.GroupLasso(), lambda w: w / np.linalg.norm(w), group),
    "Huber": (wdjax.Huber(0.5), lambda w: np.clip(w, -0.5, 0.5), lambda w, k: huber(w, k, 0.5)),
}


def _in_gradient(name: str) -> Row:
    kind, gradient, _ = KINDS[name]
    return Row(
        f"add_penalty_to_grads[{name}]",
        lambda rate, mask=None, toward=None: wdjax.add_penalty_to_grads(kind, rate, mask, toward=toward),
        lambda u, w, rate, a: u + rate * gradient(w - a),
        core=name == "GroupLasso",
        is_elementwise=name != "GroupLasso",
        has_norm=name == "GroupLasso",
    )


def _on_weights(name: str) -> Row:
    kind, _, prox = KINDS[name]
    return Row(
        f"proximal_step[{name}]",
        lambda rate, mask=None, toward=None: wdjax.proximal_step(
            kind, rate, mask, learning_rate=LEARNING_RATE, toward=toward
        ),
        lambda u, w, rate, a: a + prox(w + u - a, LEARNING_RATE * rate) - w,
        core=name == "L1",  # Its rule uses weights and updates.
        is_elementwise=name != "GroupLasso",
        has_norm=name == "GroupLasso",
    )


def _constrained(name: str) -> Row:
    kind, project = CONSTRAINTS[name]
    return Row(
        f"constrain[{name}]",
        lambda rate, mask=None, toward=None: wdjax.constrain(kind, rate, mask),
        lambda u, w, rate, a: project(w + u, rate) - w,
        core=name == "L2Ball",  # It always acts.
        has_anchor=False,
        off_at=None,
        is_elementwise=False,
        has_norm=True,
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
    *map(_on_weights, KINDS),
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
    Row(
        "constrain[NonNegative]",
        lambda rate, mask=None, toward=None: wdjax.constrain(wdjax.NonNegative(), mask=mask),
        lambda u, w, rate, a: np.maximum(w + u, 0) - w,
        has_anchor=False,
        off_at=None,
        has_rate=False,
        is_real=True,
    ),
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
