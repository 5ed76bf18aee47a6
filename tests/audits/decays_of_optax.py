"""What each optimizer of Optax 0.2.8 does with its weight decay, as read in its source and put down in NumPy.

Every row is about the probe tree `probe()`; the audit is held against this table and shares no code with it.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

WD = 0.1
PEAK_STEPS = 10  # Warm-up steps of the rows that warm up.
OTHER_LEARNING_RATE = 0.03  # For the branch that takes a learning rate of its own.

Shape = tuple[int, ...]
Tree = dict[str, dict[str, Any]]
Rate = Callable[[float, Shape], float]
Walk = Callable[[float, Tree, int], list[Tree]]


class Row(NamedTuple):
    """An optimizer with its weight decay on, and the facts about it.

    Attributes:
        name: for the test's id.
        build: (learning_rate, weight_decay=WD) -> transformation; rows without `argument` ignore the second.
        rate: (learning_rate, shape) -> the fraction of a weight that the first step from a fresh state removes with
            zero gradient; negative where the weight grows, NaN where it is not one fraction for all weights (`walk`
            has the numbers then, unless they are noise). With a schedule, learning_rate is its value at 0.
        place: where the term joins. "update": the finished direction, which no moment, momentum or norm sees
            afterwards; "gradient": before one of these; "weights": a rule on the weights after the step; "none": no
            weight is decayed.
        why: what in the source says so.
        argument: the argument that is the weight decay; "" where there is none.
        mask: the argument that chooses parameters; "" where there is none, and then all leaves are treated alike.
        extra: what `update` wants by keyword.
        second_step: as `rate`, of the second step (weights stepped, gradient zero again); None where it is `rate`.
        walk: (learning_rate, params, steps) -> the weights after each step with zero gradients, in NumPy.
        additive: whether the gradient of this step leaves the decay of this step alone.
        memory: whether decays of earlier steps come back through the state.
        estimated: whether the decay is multiplied by a step size that is estimated from the gradients so far.
        reads_weights: whether the gradient's own part of the update depends on the weights, decay or no decay.
        by_difference: whether the update is a difference of weights, and so carries the rounding of the weights.
        nan_from_step: the first step (1, 2, …) whose update is NaN when every gradient is zero; 0 for never.
        in_weight: how the first change with zero gradient depends on the weight. "normalized": its direction is the
            weight's, its size comes from the norm of the tree.
        in_decay: how it depends on the weight decay. "none": up to an eps, any positive decay does the same.
        scales_with_lr: whether another learning rate, and a schedule with it, makes another change.
        takes_schedule: whether learning_rate may be a schedule.
        decay_takes_schedule: whether the weight decay may be one; it is called with 0 first.
        decays_bias_by_default: whether the bias of the probe tree decays when no mask is given.
        notes: what surprises.
    """

    name: str
    build: Callable[..., Any]
    rate: Rate
    place: Literal["update", "gradient", "weights", "none"]
    why: str
    argument: str = "weight_decay"
    mask: str = "mask"
    extra: dict[str, Any] = {}  # noqa: RUF012
    second_step: Rate | None = None
    walk: Walk | None = None
    additive: bool = True
    memory: bool = False
    estimated: bool = False
    reads_weights: bool = False
    by_difference: bool = False
    nan_from_step: int = 0
    in_weight: Literal["linear", "normalized", "saturating", "cube root", "sign", "projection", "none"] = "linear"
    in_decay: Literal["linear", "saturating", "cube root", "inverse", "none"] = "linear"
    scales_with_lr: bool = True
    takes_schedule: bool = True
    decay_takes_schedule: bool = True
    decays_bias_by_default: bool = True
    notes: str = ""

    @property
    def linear(self) -> bool:
        """Whether the first step with zero gradient removes one fraction, whatever the weight."""
        return self.in_weight == "linear"


def probe(seed: int = 0) -> Tree:
    rng = np.random.default_rng(seed)
    return {"Dense_0": {"kernel": jnp.asarray(rng.normal(size=(8, 6))), "bias": jnp.asarray(rng.normal(size=6))}}


def kernels(params: Any) -> Any:
    """The mask of the rows named "…, kernels"."""
    return jax.tree.map(lambda p: p.ndim > 1, params)


# Rates.


def times_lr(lr: float, shape: Shape) -> float:
    return lr * WD


def without_lr(lr: float, shape: Shape) -> float:
    return WD


def lr_alone(lr: float, shape: Shape) -> float:
    return lr


def implicit(lr: float, shape: Shape) -> float:
    return lr * WD / (1 + lr * WD)


def nothing(lr: float, shape: Shape) -> float:
    return 0.0


def not_one(lr: float, shape: Shape) -> float:
    return float("nan")


def scaled(factor: float, rate: Rate = times_lr) -> Rate:
    return lambda lr, shape: factor * rate(lr, shape)


def by_ndim(weights: Rate, biases: Rate) -> Rate:
    return lambda lr, shape: weights(lr, shape) if len(shape) > 1 else biases(lr, shape)


def with_momentum(momentum: float, rate: Rate = times_lr) -> Rate:
    """The second step behind a trace that is not damped: `momentum` times the first change, and a change of its own."""
    return lambda lr, shape: rate(lr, shape) * (1 + momentum / (1 - rate(lr, shape)))


def with_nesterov(momentum: float) -> Rate:
    def rate(lr: float, shape: Shape) -> float:
        before = 1 / (1 - (1 + momentum) * lr * WD)  # The weights of the first step, in weights of the second.
        return lr * WD * (1 + momentum * (1 + momentum * before))

    return rate


# Adam's bias correction of the first and the second step, by which Prodigy and D-Adaptation multiply all they do.
CORRECTION = (0.001**0.5 / 0.1, (1 - 0.999**2) ** 0.5 / (1 - 0.9**2))
ESTIMATE = 1e-6  # Their first estimate, Mechanic's s_init and DoG's reps_rel.


# Walks: the weights after each step with zero gradients, for what is not one fraction.


def each_leaf(walk: Callable[[float, np.ndarray, int], list[np.ndarray]]) -> Walk:
    def whole(lr: float, params: Tree, steps: int) -> list[Tree]:
        walks = {m: {n: walk(lr, np.asarray(w), steps) for n, w in leaves.items()} for m, leaves in params.items()}
        return [{m: {n: w[i] for n, w in leaves.items()} for m, leaves in walks.items()} for i in range(steps)]

    return whole


def norm(tree: Tree) -> float:
    return float(np.sqrt(sum(np.sum(np.square(w)) for leaves in tree.values() for w in leaves.values())))


def times(factor: float, tree: Tree) -> Tree:
    return {m: {n: factor * np.asarray(w) for n, w in leaves.items()} for m, leaves in tree.items()}


def shrinks(factors: Callable[[float, float, int], list[float]]) -> Walk:
    """A walk on which all weights shrink alike: (lr, norm of the tree, steps) -> what is left after each step."""
    return lambda lr, params, steps: [times(left, params) for left in factors(lr, norm(params), steps)]


def adadelta_walk(sign: float) -> Walk:
    def walk(lr: float, w: np.ndarray, steps: int, rho: float = 0.9, eps: float = 1e-6) -> list[np.ndarray]:
        square_g, square_x, out = np.zeros_like(w), np.zeros_like(w), []
        for _ in range(steps):
            g = WD * w
            square_g = rho * square_g + (1 - rho) * g**2
            d = np.sqrt(square_x + eps) / np.sqrt(square_g + eps) * g
            square_x = rho * square_x + (1 - rho) * d**2
            w = w + sign * (lr if sign < 0 else 1.0) * d
            out.append(w)
        return out

    return each_leaf(walk)


def adam_walk(lr: float, w: np.ndarray, steps: int) -> list[np.ndarray]:
    m, v, out = np.zeros_like(w), np.zeros_like(w), []
    for t in range(1, steps + 1):
        g = WD * w
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        w = w - lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        out.append(w)
    return out


def yogi_walk(lr: float, w: np.ndarray, steps: int, start: float = 1e-6) -> list[np.ndarray]:
    out = []
    for t in range(1, steps + 1):
        w = w - lr * (start * 0.9**t / (1 - 0.9**t)) / (np.sqrt(start / (1 - 0.999**t)) + 1e-3)
        out.append(w)
    return out


def madgrad_walk(lr: float, w: np.ndarray, steps: int, momentum: float = 0.9, eps: float = 1e-6) -> list[np.ndarray]:
    start, square, s, out = w, np.zeros_like(w), np.zeros_like(w), []
    for k in range(steps):
        g, step = WD * w, (lr + eps) * np.sqrt(k + 1)
        square, s = square + step * g**2, s + step * g
        w = momentum * w + (1 - momentum) * (start - s / (np.cbrt(square) + eps))
        out.append(w)
    return out


def cocob_walk(lr: float, w: np.ndarray, steps: int, alpha: float = 100.0, eps: float = 1e-8) -> list[np.ndarray]:
    start, largest, total, bets, reward, out = w, np.full_like(w, eps), np.zeros_like(w), 0.0, np.zeros_like(w), []
    for _ in range(steps):
        c = lr * WD * w
        largest, total = np.maximum(largest, np.abs(c)), total + np.abs(c)
        reward, bets = np.maximum(reward - c * (w - start), 0), bets - c
        w = start + bets / (largest * np.maximum(total + largest, alpha * largest)) * (largest + reward)
        out.append(w)
    return out


def schedule_free_walk(lr: float, y: np.ndarray, steps: int, b1: float = 0.9, eps: float = 1e-8) -> list[np.ndarray]:
    """Of add_decayed_weights and scale_by_rms: x is the plain mean of z, and y between them."""
    x, z, v, out = y, y, np.zeros_like(y), []
    for t in range(1, steps + 1):
        g = WD * y
        v = 0.999 * v + 0.001 * g**2
        z = z - lr * g / np.sqrt(v / (1 - 0.999**t) + eps)
        x = x + (z - x) / t
        y = b1 * x + (1 - b1) * z
        out.append(y)
    return out


def dog_factors(first_step: float | None) -> Callable[[float, float, int], list[float]]:
    def factors(lr: float, size: float, steps: int, eps: float = 1e-8) -> list[float]:
        farthest, squares, left, out = (ESTIMATE * (1 + size) if first_step is None else 0.0), 0.0, 1.0, []
        for k in range(steps):
            farthest, squares = max(farthest, abs(1 - left) * size), squares + (WD * left * size) ** 2
            step = farthest / np.sqrt(squares + eps)
            left = left * (1 - lr * WD * (first_step if k == 0 and first_step is not None else step))
            out.append(left)
        return out

    return factors


def dowg_factors(lr: float, size: float, steps: int, eps: float = 1e-4) -> list[float]:
    farthest, squares, left, out = eps, 0.0, 1.0, []
    for _ in range(steps):
        farthest = max(farthest, ((1 - left) * size) ** 2)
        squares = squares + farthest * (WD * left * size) ** 2
        left = left * (1 - lr * WD * farthest / (np.sqrt(squares) + eps))
        out.append(left)
    return out


def polyak_factors(lr: float, size: float, steps: int, value: float = 1e-6) -> list[float]:
    left, out = 1.0, []
    for _ in range(steps):
        left = left * (1 - lr * WD * min(value / (lr * WD * left * size) ** 2, 1.0))
        out.append(left)
    return out


def loss(params: Any) -> Any:
    return sum(jnp.sum(p**4) for p in jax.tree.leaves(params)) / 4


DIRECTION = "the chain adds weight_decay times the weights after the scaling of gradients, before the learning rate"


def decoupled(name: str, optimizer: Callable[..., Any], **facts: Any) -> Row:
    """A chain of scaling, add_decayed_weights and learning rate, which is what most of them are."""
    options = facts.pop("options", {})
    return Row(
        name,
        lambda lr, wd=WD: optimizer(lr, weight_decay=wd, **options),
        **{"rate": times_lr, "place": "update", "why": DIRECTION, **facts},
    )


def muon(name: str, rate: Rate, place: Any, why: str, **facts: Any) -> Row:
    """Muon with both decays, or as `options` says of a weight decay."""
    options = facts.pop("options")
    return Row(name, lambda lr, wd=WD: contrib.muon(lr, **options(wd)), rate, place, why, **facts)


DECOUPLED = [
    decoupled("adamw", optax.adamw, notes="weight_decay is 1e-4 when it is not given, so that it decays unasked"),
    decoupled(
        "adamw, kernels",
        optax.adamw,
        options={"mask": kernels},
        rate=by_ndim(times_lr, nothing),
        notes="the mask is called with the updates at update, and with the params only at init",
    ),
    Row(
        "adamw, weight_decay halved each step",
        lambda lr, wd=WD: optax.adamw(lr, weight_decay=lambda count: wd / 2**count),
        times_lr,
        "update",
        "add_decayed_weights keeps a counter of its own for a schedule and calls it before it counts",
        second_step=scaled(0.5),
        decay_takes_schedule=False,  # The row gives it one already.
        notes="the two schedules multiply: weight_decay(t) times learning_rate(t)",
    ),
    decoupled("nadamw", optax.nadamw, notes="partial(adamw, nesterov=True); the look-ahead is not in the decay"),
    decoupled("adamaxw", optax.adamaxw, notes="weight_decay is 1e-4 when it is not given"),
    decoupled("adan", optax.adan, notes="a term in the update, where the paper divides by 1 + lr * weight_decay"),
    decoupled("lion", optax.lion, notes="weight_decay is 1e-3 when it is not given; the sign is taken before it"),
    decoupled("acprop", contrib.acprop),
    decoupled("ademamix", contrib.ademamix),
    decoupled("simplified_ademamix", contrib.simplified_ademamix),
    decoupled(
        "sophia",
        contrib.sophia,
        mask="weight_decay_mask",
        extra={"obj_fn": loss},
        reads_weights=True,
        notes="weight_decay is 1e-4 when it is not given; update needs obj_fn, and the Hessian is that of the weights",
    ),
    decoupled(
        "galore",
        contrib.galore,
        notes="decays in full rank, the bias too; a base_optimizer that decays fails, it is updated without params",
    ),
    Row(
        "adafactor",
        lambda lr, wd=WD: optax.adafactor(lr, weight_decay_rate=wd),
        without_lr,
        "update",
        "add_decayed_weights comes after the learning rate and the scale of the parameters, before the last change of "
        "sign",
        argument="weight_decay_rate",
        mask="weight_decay_mask",
        reads_weights=True,
        scales_with_lr=False,
        notes="no learning rate and no schedule of it: weight_decay_rate is what a step takes. It decays as much "
        "without a learning rate. Its momentum comes before and never sees it",
    ),
    Row(
        "adafactor, momentum, kernels",
        lambda lr, wd=WD: optax.adafactor(lr, momentum=0.9, weight_decay_rate=wd, weight_decay_mask=kernels),
        by_ndim(without_lr, nothing),
        "update",
        "the average of updates comes before the decay",
        argument="weight_decay_rate",
        mask="weight_decay_mask",
        reads_weights=True,
        scales_with_lr=False,
    ),
]

SGD = [
    Row(
        "add_decayed_weights, sgd",
        lambda lr, wd=WD: optax.chain(optax.add_decayed_weights(wd), optax.sgd(lr)),
        times_lr,
        "update",
        "added to the gradient; with nothing between there and the learning rate that is the same as the update",
        notes="L2 in the gradient and decoupled decay are one and the same here, no run can tell them apart",
    ),
    Row(
        "add_decayed_weights, sgd with momentum",
        lambda lr, wd=WD: optax.chain(optax.add_decayed_weights(wd), optax.sgd(lr, momentum=0.9)),
        times_lr,
        "gradient",
        "trace adds 0.9 of its last sum, in which the decay already is",
        second_step=with_momentum(0.9),
        memory=True,
        notes="settles at ten times the first step",
    ),
    Row(
        "add_decayed_weights, sgd with Nesterov momentum",
        lambda lr, wd=WD: optax.chain(optax.add_decayed_weights(wd), optax.sgd(lr, momentum=0.9, nesterov=True)),
        scaled(1.9),
        "gradient",
        "trace adds the gradient to 0.9 of the new sum, so that the decay counts 1.9 times at once",
        second_step=with_nesterov(0.9),
        memory=True,
    ),
    Row(
        "trace, add_decayed_weights, learning rate",
        lambda lr, wd=WD: optax.chain(
            optax.trace(0.9), optax.add_decayed_weights(wd), optax.scale_by_learning_rate(lr)
        ),
        times_lr,
        "update",
        "added behind the trace: SGDW",
    ),
    Row(
        "sgd, add_decayed_weights",
        lambda lr, wd=WD: optax.chain(optax.sgd(lr), optax.add_decayed_weights(wd)),
        scaled(-1.0, without_lr),
        "update",
        "behind the learning rate the sign is turned already, and what is added makes the weights grow",
        scales_with_lr=False,
    ),
    Row(
        "sgd with momentum, add_decayed_weights of the negative",
        lambda lr, wd=WD: optax.chain(
            optax.sgd(lr, momentum=0.9),
            optax.add_decayed_weights((lambda count: -wd(count)) if callable(wd) else -wd),
        ),
        without_lr,
        "update",
        "behind the learning rate, with the sign that it needs there",
        scales_with_lr=False,
    ),
    Row(
        "add_decayed_weights, adam",
        lambda lr, wd=WD: optax.chain(optax.add_decayed_weights(wd), optax.adam(lr)),
        not_one,
        "gradient",
        "both moments of Adam are of gradient plus decay",
        walk=each_leaf(adam_walk),
        additive=False,
        memory=True,
        in_weight="sign",
        in_decay="none",
        notes="lr * sign(w) in the first step, whatever the decay",
    ),
    Row(
        "add_decayed_weights, polyak_sgd",
        lambda lr, wd=WD: optax.chain(optax.add_decayed_weights(wd), optax.polyak_sgd(scaling=lr)),
        not_one,
        "gradient",
        "the step is value over the squared norm of the scaled gradient plus decay, at most 1",
        extra={"value": 1e-6},
        walk=shrinks(polyak_factors),
        additive=False,
        estimated=True,
        in_weight="normalized",
        in_decay="inverse",
        notes="value / (lr * weight_decay * norm^2) of each weight, so that twice the decay takes half, where the step "
        "is not capped; the norm is of the whole tree",
    ),
]

IN_GRADIENT = [
    Row(
        "adadelta",
        lambda lr, wd=WD: optax.adadelta(lr, weight_decay=wd),
        not_one,
        "gradient",
        "add_decayed_weights is first in the chain, and both averages of squares are of gradient plus decay",
        mask="weight_decay_mask",
        walk=adadelta_walk(-1.0),
        additive=False,
        memory=True,
        in_weight="saturating",
        in_decay="saturating",
        notes="L2: linear for weights far below sqrt(eps / (1 - rho)) / weight_decay, of one size far above",
    ),
    Row(
        "adadelta, no learning rate",
        lambda lr, wd=WD: optax.adadelta(weight_decay=wd),
        not_one,
        "gradient",
        "without a learning rate scale_by_learning_rate is the identity, and the identity does not turn the sign",
        mask="weight_decay_mask",
        walk=adadelta_walk(1.0),
        additive=False,
        memory=True,
        in_weight="saturating",
        in_decay="saturating",
        scales_with_lr=False,
        notes="adadelta() climbs: None is the default of learning_rate, and with it weights grow",
    ),
    Row(
        "novograd",
        lambda lr, wd=WD: optax.novograd(lr, weight_decay=wd),
        times_lr,
        "gradient",
        "scale_by_novograd adds it to the normalized gradient and then both to b1 times the momentum, not damped",
        mask="",
        second_step=with_momentum(0.9),
        memory=True,
        decay_takes_schedule=False,
        notes="the norm does not see it, the momentum does: settles at ten times the first step. Its annotation allows "
        "a schedule of weight_decay, its code multiplies the function and fails",
    ),
    Row(
        "scale_by_novograd, learning rate",
        lambda lr, wd=WD: optax.chain(optax.scale_by_novograd(weight_decay=wd), optax.scale_by_learning_rate(lr)),
        times_lr,
        "gradient",
        "as novograd",
        mask="",
        second_step=with_momentum(0.9),
        memory=True,
        decay_takes_schedule=False,
    ),
    Row(
        "lamb",
        lambda lr, wd=WD: optax.lamb(lr, weight_decay=wd),
        lr_alone,
        "gradient",
        "added behind Adam's moments but in front of the trust ratio, which scales each leaf to its weights' norm",
        additive=False,
        reads_weights=True,
        in_decay="none",
        notes="with zero gradient the decay is the whole direction and is scaled to the norm of the weights: lr of "
        "each weight, whatever the decay",
    ),
    Row(
        "lamb, kernels",
        lambda lr, wd=WD: optax.lamb(lr, weight_decay=wd, mask=kernels),
        by_ndim(lr_alone, nothing),
        "gradient",
        "a leaf without decay has a zero direction, and the trust ratio of that is 1",
        additive=False,
        reads_weights=True,
        in_decay="none",
    ),
    Row(
        "lars",
        lambda lr, wd=WD: optax.lars(lr, weight_decay=wd),
        scaled(0.001, lr_alone),
        "gradient",
        "added to the gradient, then the trust ratio, then the learning rate, then momentum",
        mask="weight_decay_mask",
        second_step=with_momentum(0.9, scaled(0.001, lr_alone)),
        additive=False,
        memory=True,
        reads_weights=True,
        in_decay="none",
        notes="with zero gradient trust_coefficient * lr of each weight, whatever the decay; weight_decay_mask is "
        "True, not None, when it is not given",
    ),
    Row(
        "lars, trust ratio of kernels",
        lambda lr, wd=WD: optax.lars(lr, weight_decay=wd, trust_ratio_mask=kernels),
        by_ndim(scaled(0.001, lr_alone), times_lr),
        "gradient",
        "a leaf without trust ratio is SGD with L2: momentum sees it",
        mask="weight_decay_mask",
        second_step=by_ndim(with_momentum(0.9, scaled(0.001, lr_alone)), with_momentum(0.9)),
        additive=False,
        memory=True,
        reads_weights=True,
        in_decay="none",
        notes="in_decay and additive are of the kernel; the bias is SGD with L2, linear and additive, and decays a "
        "hundred times as fast as the kernel",
    ),
    Row(
        "madgrad",
        lambda lr, wd=WD: contrib.madgrad(lr, weight_decay=wd),
        not_one,
        "gradient",
        "add_decayed_weights is first, and gradient plus decay enters the sum and the sum of squares",
        mask="",
        walk=each_leaf(madgrad_walk),
        additive=False,
        memory=True,
        reads_weights=True,
        by_difference=True,
        in_weight="cube root",
        in_decay="cube root",
        notes="0.1 * lr^(2/3) * cbrt(weight_decay * w) in the first step. Without decay, and with zero gradients, it "
        "pulls to the weights of init",
    ),
    Row(
        "cocob",
        lambda lr, wd=WD: contrib.cocob(lr, weight_decay=wd),
        not_one,
        "gradient",
        "add_decayed_weights is first, then the learning rate, then bets that are scaled by the largest gradient",
        walk=each_leaf(cocob_walk),
        additive=False,
        memory=True,
        reads_weights=True,
        by_difference=True,
        in_weight="sign",
        in_decay="none",
        scales_with_lr=False,
        notes="1 / alpha * sign(w) in the first step, whatever decay, learning rate and weight",
    ),
    Row(
        "dog",
        lambda lr, wd=WD: contrib.dog(lr, weight_decay=wd),
        not_one,
        "gradient",
        "add_decayed_weights is first, and the step is distance over the norm of all gradients plus decays so far",
        walk=shrinks(dog_factors(None)),
        additive=False,
        memory=True,
        estimated=True,
        reads_weights=True,
        in_weight="normalized",
        in_decay="none",
        notes="lr * 1e-6 * (1 + norm) / norm of a weight in the first step, whatever the decay; the norm is of the "
        "whole tree, so that the decay of a leaf depends on the others",
    ),
    Row(
        "dog, first step given",
        lambda lr, wd=WD: contrib.dog(lr, init_step=("learning_rate", 0.5), weight_decay=wd),
        scaled(0.5),
        "gradient",
        "the first step is the given one, and then as dog",
        walk=shrinks(dog_factors(0.5)),
        memory=True,
        additive=False,
        estimated=True,
        reads_weights=True,
        second_step=not_one,
        notes="additive in the first step, not after it",
    ),
    Row(
        "dowg",
        lambda lr, wd=WD: contrib.dowg(lr, weight_decay=wd),
        not_one,
        "gradient",
        "add_decayed_weights is first, and the step is squared distance over a weighted norm of gradients plus decays",
        walk=shrinks(dowg_factors),
        additive=False,
        memory=True,
        estimated=True,
        reads_weights=True,
        in_weight="normalized",
        in_decay="saturating",
    ),
]

ESTIMATED = [
    Row(
        "prodigy",
        lambda lr, wd=WD: contrib.prodigy(lr, weight_decay=wd),
        scaled(ESTIMATE * CORRECTION[0]),
        "update",
        "the term is weight_decay times weights times the step: estimate, learning rate and Adam's bias correction",
        mask="",
        second_step=scaled(ESTIMATE * CORRECTION[1]),
        estimated=True,
        reads_weights=True,
        nan_from_step=1,
        decay_takes_schedule=False,
        notes="with zero gradients the new estimate is 0 / 0 and the same step is NaN; the rates are those beside a "
        "gradient that is not zero. The estimate that decays is that of the steps before this one",
    ),
    Row(
        "dadapt_adamw",
        lambda lr, wd=WD: contrib.dadapt_adamw(lr, weight_decay=wd),
        scaled(ESTIMATE * CORRECTION[0]),
        "update",
        "the term is weight_decay times weights times the step: estimate, learning rate and Adam's bias correction",
        mask="",
        second_step=scaled(ESTIMATE * CORRECTION[1]),
        estimated=True,
        nan_from_step=2,
        decay_takes_schedule=False,
        notes="a first zero gradient makes the next estimate 0 / 0, and all steps from the second on NaN; the second "
        "rate is that beside a gradient that is not zero",
    ),
    Row(
        "mechanize, its weight_decay",
        lambda lr, wd=WD: contrib.mechanize(optax.sgd(lr), weight_decay=wd),
        nothing,
        "none",
        "the term, times the gradient's norm over that of the weights, goes only into the gradient of the tuned scale; "
        "the base optimizer gets the gradient without it",
        mask="",
        additive=False,
        memory=True,
        estimated=True,
        reads_weights=True,
        by_difference=True,
        in_weight="none",
        in_decay="none",
        decay_takes_schedule=False,
        decays_bias_by_default=False,
        notes="no weight is pulled to zero; it changes how long later steps are. The default is 1e-2",
    ),
    Row(
        "mechanize of adamw",
        lambda lr, wd=WD: contrib.mechanize(optax.adamw(lr, weight_decay=wd), weight_decay=0.0),
        scaled(ESTIMATE),
        "update",
        "the base optimizer's update is multiplied by the sum of the tuned scales",
        additive=False,
        estimated=True,
        reads_weights=True,
        by_difference=True,
        notes="additive in the first step; later the scale is that after this step's gradient. argument and mask are "
        "those of adamw",
    ),
    Row(
        "momo",
        lambda lr, wd=WD: contrib.momo(lr, weight_decay=wd),
        implicit,
        "update",
        "the term is lr * weight_decay / (1 + lr * weight_decay) of the weights, beside the step and not in its moment",
        mask="",
        extra={"value": 1e6},
        in_decay="saturating",
        decay_takes_schedule=False,
        notes="the factor of a proximal step, but of the weights before the step. As long as the learning rate caps "
        "the step, as it does at this value, the step reads no weights and the decay is additive",
    ),
    Row(
        "momo, step below the cap",
        lambda lr, wd=WD: contrib.momo(lr, weight_decay=wd),
        implicit,
        "update",
        "the bound from loss and gradient has 1 + lr * weight_decay in it, and the decay so changes the step's length",
        mask="",
        extra={"value": 1e-3},
        additive=False,
        reads_weights=True,
        in_decay="saturating",
        decay_takes_schedule=False,
        notes="the decay of the weights is the same in every step, it is the gradient's part that changes with it",
    ),
    Row(
        "momo_adam",
        lambda lr, wd=WD: contrib.momo_adam(lr, weight_decay=wd),
        implicit,
        "update",
        "as momo, beside a step that Adam's second moment scales",
        mask="",
        extra={"value": 1e6},
        in_decay="saturating",
        decay_takes_schedule=False,
        notes="not AdamW's factor, lr * weight_decay, but that over 1 + lr * weight_decay",
    ),
]

AT_Y = "the base optimizer decays z by y, the weights at which gradients are taken; the new y is of z and its average"
SCHEDULE_FREE = [
    Row(
        "schedule_free_sgd",
        lambda lr, wd=WD: contrib.schedule_free_sgd(lr, weight_decay=wd),
        times_lr,
        "update",
        AT_Y,
        mask="",
        second_step=scaled(0.55),
        memory=True,
        reads_weights=True,
        by_difference=True,
        notes="the first average is z itself; the second step moves y by (1 - b1) + b1 / 2 of what z moves. Memory is "
        "that of the average, as of the gradient's own part; learning_rate is annotated as a number, a schedule works",
    ),
    Row(
        "schedule_free_sgd, warm-up",
        lambda lr, wd=WD: contrib.schedule_free_sgd(lr, warmup_steps=PEAK_STEPS, weight_decay=wd),
        nothing,
        "update",
        AT_Y,
        mask="",
        second_step=scaled(0.82 / PEAK_STEPS),
        memory=True,
        reads_weights=True,
        by_difference=True,
        takes_schedule=False,
        notes="the base optimizer counts from 0 and its first learning rate is 0; the average counts from 1 and weighs "
        "the second z with 4 / 5, y with 0.1 + 0.9 * 4 / 5",
    ),
    Row(
        "schedule_free_adamw",
        lambda lr, wd=WD: contrib.schedule_free_adamw(lr, weight_decay=wd),
        times_lr,
        "update",
        AT_Y + "; added behind the second moment",
        mask="",
        second_step=scaled(0.55),
        memory=True,
        reads_weights=True,
        by_difference=True,
    ),
    Row(
        "schedule_free of adamw, kernels",
        lambda lr, wd=WD: contrib.schedule_free(
            optax.adamw(lr, b1=0.0, weight_decay=wd, mask=kernels), learning_rate=lr
        ),
        by_ndim(times_lr, nothing),
        "update",
        AT_Y,
        second_step=by_ndim(scaled(0.55), nothing),
        memory=True,
        reads_weights=True,
        by_difference=True,
        notes="argument and mask are those of adamw",
    ),
    Row(
        "schedule_free of add_decayed_weights, adam",
        lambda lr, wd=WD: contrib.schedule_free(
            optax.chain(optax.add_decayed_weights(wd), optax.scale_by_rms(0.999, bias_correction=True), optax.sgd(lr)),
            learning_rate=lr,
        ),
        not_one,
        "gradient",
        "the second moment of the base optimizer is of gradient plus decay",
        walk=each_leaf(schedule_free_walk),
        additive=False,
        memory=True,
        reads_weights=True,
        by_difference=True,
        in_weight="sign",
        in_decay="none",
        notes="lr * sign(w) in the first step, whatever the decay, up to eps",
    ),
]

MUON = [
    muon(
        "muon",
        by_ndim(times_lr, nothing),
        "update",
        "the two-dimensional leaves get Muon and its weight_decay, all others adamw with adam_weight_decay, which is 0",
        options=lambda wd: {"weight_decay": wd},
        mask="weight_decay_mask",
        decays_bias_by_default=False,
        notes="by rank alone: embeddings are Muon's, kernels of convolutions Adam's and so not decayed",
    ),
    muon(
        "muon, adam_weight_decay",
        by_ndim(nothing, times_lr),
        "update",
        "adam_weight_decay is adamw's for the leaves that are not two-dimensional",
        options=lambda wd: {"adam_weight_decay": wd},
        argument="adam_weight_decay",
        mask="",
    ),
    muon(
        "muon, both, mask of nothing",
        by_ndim(nothing, times_lr),
        "update",
        "weight_decay_mask goes to the branch of Muon alone, adamw gets none",
        options=lambda wd: {
            "weight_decay": wd,
            "adam_weight_decay": wd,
            "weight_decay_mask": lambda params: jax.tree.map(lambda _: False, params),
        },
        argument="adam_weight_decay",
        mask="",
        notes="biases decay though the mask is False everywhere",
    ),
    muon(
        "muon, both, learning rate of Adam's own",
        by_ndim(times_lr, lambda lr, shape: OTHER_LEARNING_RATE * WD),
        "update",
        "each branch ends with its own learning rate",
        options=lambda wd: {
            "weight_decay": wd,
            "adam_weight_decay": wd,
            "adam_learning_rate": OTHER_LEARNING_RATE,
        },
        mask="weight_decay_mask",
        notes="scales_with_lr is of the kernel",
    ),
    muon(
        "muon, all leaves Adam's",
        nothing,
        "none",
        "a leaf whose dimension numbers are None is Adam's, and weight_decay is Muon's",
        options=lambda wd: {
            "weight_decay": wd,
            "muon_weight_dimension_numbers": lambda params: jax.tree.map(lambda _: None, params),
        },
        mask="weight_decay_mask",
        in_weight="none",
        in_decay="none",
        decays_bias_by_default=False,
    ),
]

WRAPPED = [
    Row(
        "MultiSteps of adamw",
        lambda lr, wd=WD: optax.MultiSteps(optax.adamw(lr, weight_decay=wd), 2).gradient_transformation(),
        nothing,
        "update",
        "the inner optimizer runs on every second call; calls between give zero",
        second_step=times_lr,
    ),
    Row(
        "adamw, apply_every",
        lambda lr, wd=WD: optax.chain(optax.adamw(lr, weight_decay=wd), optax.apply_every(2)),
        nothing,
        "update",
        "adamw runs on every call, and every second one gives the sum of two updates",
        second_step=scaled(2.0),
        memory=True,
        notes="decays as often as there are calls, where MultiSteps decays as often as there are steps",
    ),
    Row(
        "sam of adamw",
        lambda lr, wd=WD: contrib.sam(optax.adamw(lr, weight_decay=wd), optax.sgd(0.05)),
        nothing,
        "update",
        "the first call is the adversarial step, the second returns to the weights before it and decays those",
        second_step=times_lr,
        reads_weights=True,
        notes="decays the weights that it kept at the first call, not those that the second is given. With "
        "contrib.normalize in the adversarial optimizer zero gradients are 0 / 0",
    ),
    Row(
        "adamw, reduce_on_plateau",
        lambda lr, wd=WD: optax.chain(optax.adamw(lr, weight_decay=wd), contrib.reduce_on_plateau(patience=1)),
        times_lr,
        "update",
        "the scale of the plateau multiplies the whole update, and so the decay",
        extra={"value": 1.0},
        second_step=scaled(0.1),
        notes="a second value that is no better is a plateau here, and the scale 0.1 is on at once",
    ),
]


def fromage_rate(lr: float, shape: Shape) -> float:
    return 1 - 1 / np.sqrt(1 + lr**2)


# What moves weights with zero gradient and has no argument for it.
UNASKED = [
    Row(
        "fromage",
        lambda lr, wd=WD: optax.fromage(lr),
        fromage_rate,
        "update",
        "add_decayed_weights with 1 / sqrt(1 + lr^2) - 1 behind the learning rate",
        argument="",
        mask="",
        reads_weights=True,
        in_decay="none",
        decay_takes_schedule=False,
        notes="about lr^2 / 2 of each weight; grows with the square of the learning rate",
    ),
    Row(
        "sgd, keep_params_nonnegative",
        lambda lr, wd=WD: optax.chain(optax.sgd(lr), optax.keep_params_nonnegative()),
        nothing,
        "none",
        "a weight that the step leaves negative becomes 0: a constraint",
        argument="",
        mask="",
        walk=each_leaf(lambda lr, w, steps: [np.maximum(w, 0.0)] * steps),
        additive=False,
        reads_weights=True,
        in_weight="projection",
        in_decay="none",
        scales_with_lr=False,
        decay_takes_schedule=False,
        decays_bias_by_default=False,
    ),
    Row(
        "yogi",
        lambda lr, wd=WD: optax.yogi(lr),
        not_one,
        "none",
        "both moments start at 1e-6 instead of 0",
        argument="",
        mask="",
        walk=each_leaf(yogi_walk),
        in_weight="none",
        in_decay="none",
        decay_takes_schedule=False,
        decays_bias_by_default=False,
        notes="all weights drift by the same amount, whatever they are: no decay, though they move with zero gradient",
    ),
    Row(
        "noisy_sgd",
        lambda lr, wd=WD: optax.noisy_sgd(lr, key=0),
        not_one,
        "none",
        "add_noise adds a normal draw to the gradient, from a key that it keeps",
        argument="",
        mask="",
        in_weight="none",
        in_decay="none",
        decay_takes_schedule=False,
        decays_bias_by_default=False,
        notes="no decay, though weights move with zero gradient; the same noise again from the same state",
    ),
]

ROWS = DECOUPLED + SGD + IN_GRADIENT + ESTIMATED + SCHEDULE_FREE + MUON + WRAPPED + UNASKED
