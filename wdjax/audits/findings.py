"""Unexpected measurements, and what to write instead: one entry for each, the most harmful first."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..paths.roles import ADAPTER, EMBEDDING, KERNEL
from ._measures import Facts
from ._report import Finding


def _is_times(facts: Facts, factor: float) -> bool:
    """Whether the rate is this many times the expected one."""
    rates, expected = (facts.row.least, facts.row.most), np.multiply(facts.expected or 0.0, factor)
    return 0 in facts.row.shape or bool(np.allclose(rates, expected, rtol=facts.tolerance, atol=1e-12))


def _is_other(facts: Facts) -> bool:
    is_twice = facts.row.decays and _is_times(facts, 2.0)
    return facts.expected is not None and not is_twice and not _is_times(facts, 1.0)


def _compared(facts: Facts) -> str:
    ranges = ((facts.row.least, facts.row.most), facts.expected or (0.0, 0.0))
    got, want = (" to ".join(dict.fromkeys((f"{least:.6g}", f"{most:.6g}"))) for least, most in ranges)
    return f": it is {got} per step, not {want}"


# By name: what was measured, what to write instead, and whether it applies.
_Checks = dict[str, tuple[str, str, Callable[[Facts], Any]]]
_WRONG: _Checks = {
    "not finite": (
        "finite weights get updates that are inf or NaN, with zero gradients or with nonzero ones",
        "Look at the learning rate, at eps and at the dtype. Some optimizers divide by a norm of the gradients.",
        lambda f: not f.is_finite,
    ),
    "raw gradients": (
        "the update is the gradient itself, so each step climbs the loss",
        "optax.masked returns raw gradients outside its mask. Write freeze(optimizer, mask), or use optax.partition.",
        lambda f: f.is_raw,
    ),
    "grows": (
        "weights grow where they should decay",
        "Put decoupled_decay and optax.add_decayed_weights before the learning rate, and independent_decay after it.",
        lambda f: f.grows,
    ),
    "diverges": (
        "the rate is 2 or more per step, so weights never settle",
        "Is a factor missing, such as the learning rate?",
        lambda f: f.row.most >= 2,
    ),
    "decays frozen": (
        "a parameter moves although it is frozen, or decays although no gradient moves it",
        "Put freeze(optimizer, mask) around the whole optimizer. It keeps every bit.",
        lambda f: (f.is_frozen and f.is_touched) or (f.row.decays and (f.is_frozen or not f.moves)),
    ),
    "rounds to nothing": (
        "the decay is lost in rounding to the parameter's dtype",
        "Keep float32 parameters, or write optax.chain(in_float32(optimizer), compensated()) with the decay inside.",
        lambda f: f.row.decays and f.row.kept < 0.5,
    ),
    "decays between steps": (
        "a step takes several calls of update, and the decay acts in each of them",
        "Put the decay inside the wrapper that accumulates the gradients, or with_decoupled_decay around it.",
        lambda f: f.is_repeated,
    ),
    "twice": (
        "the decay is twice what is expected",
        "Set weight_decay=0.0 in an optimizer that decays by itself, such as optax.adamw or optax.lion.",
        lambda f: f.row.decays and f.expected is not None and _is_times(f, 2.0),
    ),
    "not as expected": (
        "the rate is not what is expected",
        "Check the mask, the rate and the learning rate.",
        _is_other,
    ),
}
_SUSPECT: _Checks = {
    "overshoots": (
        "the rate is 1 or more per step, so weights land on zero or jump past it",
        "Lower the rate, or use continuous_decay or proximal_step(L2(), ...), which never overshoot.",
        lambda f: 1 <= f.row.most < 2,
    ),
    "decays non-weights": (
        "the decay acts on a bias, a norm or another parameter that is not a layer's weight",
        "Write mask=weights_only(), or mask=weights_only().mask for Optax.",
        lambda f: f.row.decays and f.row.role not in ("", KERNEL, EMBEDDING, ADAPTER),
    ),
    "seen by the moments": (
        "the decay is scaled with the gradient: this is L2 regularization, not weight decay",
        "If you want weight decay, put decoupled_decay after the scaling, as adamw does.",
        lambda f: f.row.place == "gradient" and not f.rescaled,
    ),
    "rescaled": (
        "a norm rescales the decay together with the gradient, as a trust ratio does",
        "The decay of a step depends on the gradient. With zero gradient it may not depend on weight_decay at all.",
        lambda f: f.rescaled,
    ),
}
_NOTE: _Checks = {
    "not times the learning rate": (
        "the learning rate and its schedule do not scale the decay",
        "independent_decay does this. decoupled_decay scales with the learning rate.",
        lambda f: f.row.decays and f.row.scales_with_learning_rate is False,
    ),
}
_DRIFTS, _NARROW, _NOTHING = "state drifts", "lost beside gradients", "no decay"
NAMES = (_DRIFTS, _NARROW, *_WRONG, *_SUSPECT, *_NOTE, _NOTHING)


def findings_of(facts: Sequence[Facts], drift: str, narrow: str, calls: int) -> tuple[Finding, ...]:
    """The findings: from each parameter, from changes in the types of the state, and from warnings of a writer."""
    found = []
    if drift:
        remedy = "So the step compiles again, and scan and checkpoints fail. For low precision, write in_float32(...)."
        found.append(Finding("wrong", _DRIFTS, drift, remedy))
    if narrow:
        message, _, remedy = narrow.partition(". ")
        found.append(Finding("wrong", _NARROW, message, remedy))
    for harm, checks in (("wrong", _WRONG), ("suspect", _SUSPECT), ("note", _NOTE)):
        for name, (message, remedy, applies) in checks.items():
            if those := [each for each in facts if applies(each)]:
                message += _compared(those[0]) if applies is _is_other else ""
                found.append(Finding(harm, name, message, remedy, tuple(each.row.path for each in those)))
    if facts and not any(each.row.decays for each in facts):
        message = f"nothing decays in the first {calls} calls or at the tested counts"
        found.append(Finding("note", _NOTHING, message, "If this is not intended, look at masks and rates."))
    return tuple(found)
