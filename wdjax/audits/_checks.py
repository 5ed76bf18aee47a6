"""Unexpected measurements of one parameter, and what to write instead: one entry for each, the most harmful first."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .._engine.hazards import smallest_fraction
from ..paths.roles import ADAPTER, EMBEDDING, KERNEL
from . import _rounding
from ._facts import LAPSES, Facts
from ._rows import GRADIENT_AND_UPDATE, in_words

_ROUNDING = 1e-6  # Of a rate that is the product of two numbers.
_WEIGHTS = (KERNEL, EMBEDDING, ADAPTER)


def _range(least: float, most: float) -> str:
    return " to ".join(dict.fromkeys((f"{least:.6g}", f"{most:.6g}")))


def rate_text(facts: Facts) -> str:
    return f"{_range(facts.row.least, facts.row.most)} per step" if facts.row.decays else ""


def _rates(facts: Facts) -> str:
    """The rate at each count, where it changes."""
    rates = in_words([one.rate for one in facts.later])
    pairs = [(one.at + one.after, rate) for one, rate in zip(facts.later, rates, strict=True)]
    texts = [f"{rate} (step {count})" for k, (count, rate) in enumerate(pairs) if not k or rate != pairs[k - 1][1]]
    if len(texts) > 6:
        texts = [*texts[:3], "…", *texts[-2:]]
    return ", ".join(texts) if len(texts) > 1 else rate_text(facts)


def _largest(facts: Facts) -> float:
    """The largest rate, also at later counts, where it may be infinite."""
    if facts.next_rate is not None:  # It depends on the size of the probe weights, so it says nothing about training.
        return 0.0
    later = [one.rate for one in facts.later] if facts.is_proportional else []
    return max(facts.row.most, *later) if later else facts.row.most


def _is_times(facts: Facts, factor: float) -> bool:
    """Whether the rate is this many times the expected one."""
    rates, expected = (facts.row.least, facts.row.most), np.multiply(facts.expected or 0.0, factor)
    return 0 in facts.row.shape or bool(np.allclose(rates, expected, rtol=facts.tolerance, atol=1e-12))


def _is_twice(facts: Facts) -> bool:
    return facts.row.decays and facts.expected is not None and _is_times(facts, 2.0)


def _unexpected(facts: Facts) -> str:
    """In which way the decay is not as expected; "" if it is."""
    row = facts.row
    if facts.expected is not None and not _is_twice(facts) and not _is_times(facts, 1.0):
        return f"it is {_range(row.least, row.most)} per step, not {_range(*facts.expected)}"
    if facts.should_decay is not None and facts.should_decay != row.decays and 0 not in row.shape:
        return f"it is {_range(row.least, row.most)} per step, not {'more than 0' if facts.should_decay else '0'}"
    # Schedules are float32: where they should end at 0, a little of their largest value may be left.
    left = max(1e-12, _ROUNDING * max(map(abs, facts.expected_later.values()), default=0.0))
    for count, want in facts.expected_later.items():
        rate = dict(row.rates).get(count, want)
        if not np.isclose(rate, want, rtol=facts.tolerance, atol=left):
            return f"it is {rate:.6g} per step at step {count}, not {want:.6g}"
    return ""


class _Check(NamedTuple):
    """A finding for each parameter to which it applies, with the numbers. The remedy may differ by parameter."""

    harm: str
    name: str
    message: str
    remedy: str | Callable[[Facts], str]
    applies: Callable[[Facts], Any]
    measured: Callable[[Facts], str] = lambda _: ""


CHECKS = (
    _Check(
        "wrong",
        "not finite",
        "finite weights get updates that are inf or NaN, with zero gradients or with nonzero ones",
        "Look at the learning rate, at eps and at the dtype. Some optimizers divide by a norm of the gradients.",
        lambda f: not f.is_finite,
    ),
    _Check(
        "wrong",
        "raw gradients",
        "the update is the gradient itself, so each step climbs the loss",
        "optax.masked returns raw gradients outside its mask. Write freeze(optimizer, mask), or use optax.partition.",
        lambda f: f.is_raw,
    ),
    _Check(
        "wrong",
        "grows",
        "weights grow where they should decay",
        "Put decoupled_decay and optax.add_decayed_weights before the learning rate, and independent_decay after it; "
        "or a constraint or proximal_step comes before the optimizer: put it last.",
        lambda f: f.grows,
        rate_text,
    ),
    _Check(
        "wrong",
        "diverges",
        "the rate is 2 or more per step, so weights never settle",
        "Is a factor missing, such as the learning rate?",
        lambda f: _largest(f) >= 2 - _ROUNDING,
        _rates,
    ),
    _Check(
        "wrong",
        "decays frozen",
        "a parameter moves although it is frozen, or decays although no gradient moves it",
        "Put freeze(optimizer, mask) around the whole optimizer. It keeps every bit.",
        lambda f: (f.is_frozen and f.is_touched) or (f.row.decays and (f.is_frozen or not f.moves)),
        lambda f: rate_text(f) or "0 per step, but it moves",
    ),
    _Check(
        "wrong",
        "rounds to nothing",
        "the decay is lost in rounding to the parameter's dtype",
        _rounding.remedy,
        _rounding.is_lost,
        lambda f: f"{rate_text(f)} in {f.row.dtype}, which keeps no change below {smallest_fraction(f.row.dtype):.3g}",
    ),
    _Check(
        "wrong",
        "changed by rounding",
        "rounding to the parameter's dtype makes the decay another one",
        _rounding.remedy,
        _rounding.is_changed,
        _rounding.text,
    ),
    _Check(
        "wrong",
        "decays between steps",
        "a step takes several calls of update, and the decay acts in each of them",
        "Put the decay inside the wrapper that accumulates the gradients, or with_decoupled_decay around it.",
        lambda f: f.is_repeated,
        rate_text,
    ),
    _Check(
        "wrong",
        "moves in skipped steps",
        "a step is skipped if a gradient is NaN, but the parameter still moves in it",
        "Put the decay inside the wrapper that skips: optax.apply_if_finite(optax.chain(optimizer, decay), ...).",
        lambda f: f.moves_when_skipped,
        rate_text,
    ),
    _Check(
        "wrong",
        "twice",
        "the decay is twice what is expected",
        "Set weight_decay=0.0 in an optimizer that decays by itself, such as optax.adamw or optax.lion.",
        _is_twice,
        lambda f: f"it is {_range(f.row.least, f.row.most)} per step, not {_range(*(f.expected or (0.0, 0.0)))}",
    ),
    _Check(
        "wrong",
        "not as expected",
        "the rate is not what is expected",
        "Check the mask, the rate and the learning rate.",
        _unexpected,
        _unexpected,
    ),
    _Check(
        "suspect",
        "overshoots",
        "the rate is 1 or more per step, so weights land on zero or jump past it",
        "Lower the rate, or use continuous_decay or proximal_step(L2(), ...), which never overshoot.",
        lambda f: 1 - _ROUNDING <= _largest(f) < 2 - _ROUNDING,
        _rates,
    ),
    _Check(
        "suspect",
        "not times the step size",
        "a number in the optimizer's state or arguments scales the step, but not the decay",
        "Put the decay inside the optimizer, before this number. If the decay is meant to be independent, allow this.",
        lambda f: f.step_size,
        lambda f: f"{f.step_size}, {rate_text(f)}",
    ),
    _Check(
        "suspect",
        "decays non-weights",
        "the decay acts on a bias, a norm or another parameter that is not a layer's weight",
        "Write mask=weights_only(), or mask=weights_only().mask for Optax.",
        lambda f: f.row.decays and not f.is_meant and f.row.role not in ("", *_WEIGHTS),
        rate_text,
    ),
    _Check(
        "suspect",
        LAPSES[0],
        "the decay stops while gradients still move the weights",
        "Check its schedule. A constant weight decay follows the learning rate in decoupled_decay.",
        lambda f: f.lapse == LAPSES[0],
        _rates,
    ),
    _Check(
        "suspect",
        "two decays",
        "a decay in the update acts beside a penalty in the gradient",
        "Remove one: set weight_decay=0.0 in the optimizer, or leave out the L2 in front of it.",
        lambda f: f.row.place == GRADIENT_AND_UPDATE,
        lambda f: (
            f"{f.row.in_update:.6g} per step in the update, and {f.row.kind}"
            + (f" of {f.strength:.3g}" if f.strength else "")
            + " in the gradient"
        ),
    ),
    _Check(
        "suspect",
        "seen by the moments",
        "the decay is scaled with the gradient: this is regularization in the gradient, not weight decay",
        "If you want weight decay, put decoupled_decay after the scaling, as adamw does.",
        lambda f: f.row.place in ("gradient", GRADIENT_AND_UPDATE) and not f.rescaled,
        lambda f: f"{f.row.kind}, {rate_text(f)}",
    ),
    _Check(
        "suspect",
        "rescaled",
        "a norm rescales the decay together with the gradient, as a trust ratio does",
        "The decay of a step depends on the gradient. With zero gradient it may not depend on weight_decay at all.",
        lambda f: f.rescaled,
        lambda f: f"{rate_text(f)}, and {f.row.beside_gradient:.3g} beside a gradient",
    ),
    _Check(
        "note",
        "not times the learning rate",
        "the learning rate and its schedule do not scale the decay",
        "independent_decay does this. decoupled_decay scales with the learning rate.",
        lambda f: f.row.decays and f.row.scales_with_learning_rate is False,
        rate_text,
    ),
    _Check(
        "note",
        "needs a gradient",
        "the decay acts only beside a gradient",
        "with_sparse_decay does this. Where every step should decay, write decoupled_decay.",
        lambda f: f.row.needs_gradient and not f.late_rate and not f.is_divided,
        lambda f: f"{rate_text(f)} for each {f.needed_by} with a gradient, 0 for others",
    ),
    _Check(
        "note",
        "catches up",
        "the decay acts only beside a gradient, and then makes up for the steps without one",
        "with_lazy_decay does this. Before weights are evaluated, pay what they still owe.",
        lambda f: f.late_rate,
        lambda f: f"{rate_text(f)} for each {f.needed_by} with a gradient, {f.late_rate:.6g} after a step without one",
    ),
    _Check(
        "note",
        "divided by gradients",
        "the decay is divided by the size of the gradients, which were about 3 here",
        "with_stable_decay does this. Its rate is that of gradients of your size only.",
        lambda f: f.is_divided,
        lambda f: f"{rate_text(f)}, and {f.row.beside_gradient:.6g} beside a gradient of twice the size",
    ),
    _Check(
        "note",
        "adapts",
        "the strength of the decay depends on the weights of earlier steps",
        "on_weights.cpr does this. Its rates are those of the audit's weights. Look at its state during training.",
        lambda f: f.next_rate is not None,
        lambda f: f"{rate_text(f)}, then {f.next_rate:.6g}",
    ),
    _Check(
        "note",
        "constrained",
        "weights outside a set are put back onto it in one step: a constraint, not a decay",
        "constrain does this. Its radius and axes are not checked. It may hide a decay: audit the optimizer alone.",
        lambda f: f.is_constrained,
        lambda f: f"beside it, {rate_text(f)}" if f.row.decays else "",
    ),
    *(
        _Check(
            "note",
            lapse,
            message,
            "If this is not intended, check its schedule.",
            lambda f, lapse=lapse: f.lapse == lapse,
            _rates,
        )
        for lapse, message in (
            (LAPSES[1], "the decay starts some steps after the gradients"),
            (LAPSES[2], "the decay is missing in some of the steps in which gradients move the weights"),
        )
    ),
)
