"""Unexpected measurements, and what to write instead: one entry for each, the most harmful first."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..paths.roles import ADAPTER, EMBEDDING, KERNEL
from ._measures import Facts
from ._report import Audited, Finding

_DECAYING_ROLES = ("", KERNEL, EMBEDDING, ADAPTER)


class Context(NamedTuple):
    """What is known about one parameter in addition to its row.

    Attributes:
        facts: what was measured.
        expected: the smallest and the largest expected rate; None if no rate was given.
        is_frozen: whether the user says that it is frozen.
        tolerance: by how much rates may differ, relatively.
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
    return f": it is {got} per step, not {want}"


_CHECKS = (
    _Check(
        "wrong",
        "not finite",
        "finite weights get updates that are inf or NaN, with zero gradients or with nonzero ones",
        "Look at the learning rate, at eps and at the dtype. Some optimizers divide by a norm of the gradients.",
        lambda row, context: not context.facts.is_finite,
    ),
    _Check(
        "wrong",
        "raw gradients",
        "the update is the gradient itself, so each step climbs the loss",
        "optax.masked returns the raw gradients of parameters outside its mask. To keep these parameters fixed, write "
        "freeze(optimizer, mask). To train them with another optimizer, use optax.partition.",
        lambda row, context: context.facts.is_raw,
    ),
    _Check(
        "wrong",
        "grows",
        "weights grow where they should decay",
        "The decay is on the wrong side of the learning rate. Put decoupled_decay and optax.add_decayed_weights before "
        "it, and independent_decay after it.",
        lambda row, context: context.facts.grows,
    ),
    _Check(
        "wrong",
        "diverges",
        "the rate is 2 or more per step, so weights never settle",
        "Is a factor missing, such as the learning rate?",
        lambda row, context: row.most >= 2,
    ),
    _Check(
        "wrong",
        "decays frozen",
        "a parameter moves although it is frozen, or decays although no gradient moves it",
        "Put freeze(optimizer, mask) around the whole optimizer. It keeps every bit.",
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
        "Put the decay inside the wrapper that accumulates the gradients, or with_decoupled_decay around it.",
        lambda row, context: context.facts.is_repeated,
    ),
    _Check(
        "wrong",
        "twice",
        "the decay is twice what is expected",
        "Two decays act on it. Set weight_decay=0.0 in an optimizer that decays by itself, such as optax.adamw or "
        "optax.lion.",
        _is_twice,
    ),
    _Check(
        "wrong",
        "not as expected",
        "the rate is not what is expected",
        "Check the mask, the rate and the learning rate.",
        _is_other,
    ),
    _Check(
        "suspect",
        "overshoots",
        "the rate is 1 or more per step, so weights land on zero or jump past it",
        "Lower the rate, or use continuous_decay or proximal_step(L2(), ...), which never overshoot.",
        lambda row, context: 1 <= row.most < 2,
    ),
    _Check(
        "suspect",
        "decays non-weights",
        "the decay acts on a bias, a norm or another parameter that is not a layer's weight",
        "Write mask=weights_only(), or mask=weights_only().mask for Optax.",
        lambda row, context: row.decays and row.role not in _DECAYING_ROLES,
    ),
    _Check(
        "suspect",
        "seen by the moments",
        "the decay is scaled with the gradient: this is L2 regularization, not weight decay",
        "If you want weight decay, put decoupled_decay after the scaling, as adamw does.",
        lambda row, context: row.place == "gradient" and not context.facts.rescaled,
    ),
    _Check(
        "suspect",
        "rescaled",
        "a norm rescales the decay together with the gradient, as a trust ratio does",
        "The decay of a step depends on the gradient. With zero gradient it may not depend on weight_decay at all.",
        lambda row, context: context.facts.rescaled,
    ),
    _Check(
        "note",
        "not times the learning rate",
        "the learning rate and its schedule do not scale the decay",
        "independent_decay does this. decoupled_decay scales with the learning rate.",
        lambda row, context: row.decays and row.scales_with_learning_rate is False,
    ),
)
_DRIFTS = "state drifts"
_NARROW = "lost beside gradients"
_NOTHING = "no decay"
NAMES = (_DRIFTS, _NARROW, *(check.name for check in _CHECKS), _NOTHING)


def findings_of(pairs: Sequence[tuple[Audited, Context]], drift: str, narrow: str, calls: int) -> tuple[Finding, ...]:
    """The findings: from each parameter, from changes in the types of the state, and from warnings of a writer."""
    found = []
    if drift:
        remedy = (
            "So the step is compiled again, and jax.lax.scan and checkpoints fail. With low precision, "
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
                f"nothing decays in the first {calls} calls or at the tested counts",
                "If this is not intended, look at masks and rates.",
            )
        )
    return tuple(found)
