"""What is unexpected in what was measured, and what to write instead: one entry for each, the most harmful first."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..paths._roles import ADAPTER, EMBEDDING, KERNEL
from ._measures import Facts
from ._report import Audited, Finding

_DECAYING_ROLES = ("", KERNEL, EMBEDDING, ADAPTER)


class Context(NamedTuple):
    """What is known of one parameter besides its row.

    Attributes:
        facts: what was measured.
        expected: the smallest and the largest rate that is expected; None if nothing is.
        is_frozen: whether it is said to be.
        tolerance: what rates may differ by, relatively.
    """

    facts: Facts
    expected: tuple[float, float] | None
    is_frozen: bool
    tolerance: float


class _Check(NamedTuple):
    harm: str
    name: str
    message: str
    remedy: str
    applies: Callable[[Audited, Context], Any]


def _is_twice(row: Audited, context: Context) -> bool:
    return row.decays and context.expected is not None and _is_times(row, context, 2.0)


def _is_other(row: Audited, context: Context) -> bool:
    return context.expected is not None and not (_is_twice(row, context) or _is_times(row, context, 1.0))


def _is_times(row: Audited, context: Context, factor: float) -> bool:
    expected = np.multiply(context.expected or 0.0, factor)
    is_empty = 0 in row.shape
    return is_empty or bool(np.allclose((row.least, row.most), expected, rtol=context.tolerance, atol=1e-12))


def _compared(row: Audited, context: Context) -> str:
    ranges = ((row.least, row.most), context.expected or (0.0, 0.0))
    got, want = (" to ".join(dict.fromkeys((f"{least:.6g}", f"{most:.6g}"))) for least, most in ranges)
    return f", {got} and not {want} a step"


_CHECKS = (
    _Check(
        "wrong",
        "not finite",
        "finite weights give updates that are inf or NaN, with zero gradients or with others",
        "Look at the learning rate, at eps and at the dtype; some optimizers divide by a norm of the gradients.",
        lambda row, context: not context.facts.is_finite,
    ),
    _Check(
        "wrong",
        "raw gradients",
        "the update is the gradient itself, so that the loss is climbed",
        "optax.masked passes on what its mask leaves out: freeze(optimizer, mask) keeps it, optax.partition gives it "
        "an optimizer.",
        lambda row, context: context.facts.is_raw,
    ),
    _Check(
        "wrong",
        "grows",
        "weights grow where they should decay",
        "The decay stands on the wrong side of the learning rate: decoupled_decay and optax.add_decayed_weights come "
        "before it, independent_decay after it.",
        lambda row, context: context.facts.grows,
    ),
    _Check(
        "wrong",
        "diverges",
        "the rate is 2 or more a step: weights never settle",
        "Is a factor missing, the learning rate say?",
        lambda row, context: row.most >= 2,
    ),
    _Check(
        "wrong",
        "decays frozen",
        "what is frozen, or what no gradient moves, moves",
        "freeze(optimizer, mask) around the whole optimizer keeps every bit.",
        lambda row, context: (
            (context.is_frozen and context.facts.is_touched)
            or (row.decays and (context.is_frozen or not context.facts.moves))
        ),
    ),
    _Check(
        "wrong",
        "rounds to nothing",
        "the decay is lost in rounding to the parameter's dtype",
        "Keep float32 parameters, or write optax.chain(in_float32(optimizer), compensated()) with the decay inside.",
        lambda row, context: row.decays and row.kept < 0.5,
    ),
    _Check(
        "wrong",
        "decays between steps",
        "a step takes several calls of update, and the decay acts in each of them",
        "Put the decay inside what accumulates the gradients, or write with_decoupled_decay around it.",
        lambda row, context: context.facts.is_repeated,
    ),
    _Check(
        "wrong",
        "twice",
        "the decay is twice what is expected",
        "Two decays act on it: an optimizer that decays by itself, such as optax.adamw or optax.lion, wants "
        "weight_decay=0.0 beside another.",
        _is_twice,
    ),
    _Check(
        "wrong",
        "not as expected",
        "the rate is not what is expected",
        "Are the mask, the rate and the learning rate those that you think?",
        _is_other,
    ),
    _Check(
        "suspect",
        "overshoots",
        "the rate is 1 or more a step: weights land on zero or jump past it",
        "continuous_decay and proximal_step(L2(), ...) never overshoot.",
        lambda row, context: 1 <= row.most < 2,
    ),
    _Check(
        "suspect",
        "decays non-weights",
        "a bias, a norm or another parameter that is no weight of a layer decays",
        "Give mask=weights_only(), or its .mask to a function of Optax.",
        lambda row, context: row.decays and row.role not in _DECAYING_ROLES,
    ),
    _Check(
        "suspect",
        "seen by the moments",
        "the decay is scaled with the gradient: L2 regularization, no weight decay",
        "If weight decay is meant, put decoupled_decay after the scaling, as adamw does.",
        lambda row, context: row.place == "gradient" and not context.facts.rescaled,
    ),
    _Check(
        "suspect",
        "rescaled",
        "a norm rescales the decay together with the gradient's part, as a trust ratio does",
        "What a step takes depends on the gradient, and without one it need not depend on the weight decay at all.",
        lambda row, context: context.facts.rescaled,
    ),
    _Check(
        "note",
        "not times the learning rate",
        "the learning rate and its schedule do not scale the decay",
        "That is independent_decay; decoupled_decay scales with it.",
        lambda row, context: row.decays and row.scales_with_learning_rate is False,
    ),
)
_DRIFTS = "state drifts"
_NARROW = "lost beside gradients"
_NOTHING = "no decay"
NAMES = (_DRIFTS, _NARROW, *(check.name for check in _CHECKS), _NOTHING)


def findings_of(pairs: Sequence[tuple[Audited, Context]], drift: str, narrow: str, calls: int) -> tuple[Finding, ...]:
    """The findings: what every parameter shows, how the state changes its types, what a writer warned of."""
    found = []
    if drift:
        remedy = (
            "It is compiled again, and neither jax.lax.scan nor a checkpoint takes it. With low precision, "
            "in_float32(optimizer) keeps the state in float32 from the start."
        )
        found.append(Finding("wrong", _DRIFTS, drift, remedy))
    if narrow:
        message, _, remedy = narrow.partition(". ")
        found.append(Finding("wrong", _NARROW, message, remedy))
    for check in _CHECKS:
        those = [(row, context) for row, context in pairs if check.applies(row, context)]
        if those:
            message = check.message + (_compared(*those[0]) if check.applies is _is_other else "")
            found.append(Finding(check.harm, check.name, message, check.remedy, tuple(row.path for row, _ in those)))
    if pairs and not any(row.decays for row, _ in pairs):
        found.append(
            Finding(
                "note",
                _NOTHING,
                f"nothing decays, in the first {calls} calls and at the counts tried",
                "If that is not meant, look at masks and rates.",
            )
        )
    return tuple(found)
