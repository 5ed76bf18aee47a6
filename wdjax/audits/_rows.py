"""What an audit reports on: a row for each parameter, and the findings."""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .._engine.text import listed

GRADIENT_AND_UPDATE = "gradient and update"
CONSTRAINT = "constraint"
MOVING_AVERAGE = "a moving average"
_MOST_NUMBERS = 4  # That a finding shows one by one. Of more, it shows the range.
_NUMBER = r"(-?\d+(?:\.\d+)?(?:e[+-]?\d+)?)"
# A number or "... to ...". Those after "not" and "step" were not measured, so they have no group.
_NUMBERS = re.compile(rf"(?:not|step) {_NUMBER[1:-1]}(?: to {_NUMBER[1:-1]})?|(?<![\w.\[-]){_NUMBER}(?: to {_NUMBER})?")


class Audited(NamedTuple):
    """What an optimizer does to one parameter.

    Attributes:
        path, shape, dtype: its canonical path, its shape, and the name of its dtype.
        rate: the fraction of a weight that the first real step removes with zero gradient (the median over weights). If
            that step decays nothing, that at the first of `steps` that does, or that beside a gradient. 0.0 for no
            decay, negative for growth.
        least, most: the smallest and the largest rate of an array with a rate for each layer; otherwise both the rate.
        rates: pairs of a count and the rate at that count; empty for an optimizer without a count. Moments are new at
            each count. So for a decay that the moments see, only the first rate is that of a real run.
        beside_gradient: the same fraction when there is a gradient.
        needs_gradient: whether it decays only beside a gradient.
        place: "update": added to the finished update; "gradient": it enters the moments, or is scaled with the
            gradient; "weights": a rule for the weights after the step; "gradient and update": two decays; "none".
        kind: "L2": proportional to the weight; "L1": the same size for all weights; "norm": proportional to the weight
            divided by a norm, also in a sum with L1; "Huber": L2 for small and L1 for large weights; "cautious ...";
            "other"; "unknown": the moments or a constraint hide it; "constraint": weights outside a set are put back
            onto it, which is not a decay; "none".
        toward: "zero"; "init": the weights at the optimizer's `init`; "a moving average" of past weights; "a tree":
            others; "" for no decay.
        scales_with_learning_rate: whether the rate changes with the learning rate; None if the audit can't tell.
        in_update: if the place is "gradient and update", the part of the rate that the decay in the update takes.
        kept: the share of the decay that remains after rounding to the parameter's dtype. NaN if it can't be measured:
            the state changes its dtypes, updates are not finite, a writer would need more steps than were run, or a low
            precision rounds a decay that needs a gradient.
        role: what it is by its name and shape, as in `weights_only`: "kernel", "bias", "norm", ...; "" if unknown.

    Example:

        >>> import jax.numpy as jnp, optax, wdjax
        >>> row = wdjax.audit(optax.adamw(1e-3, weight_decay=0.1), {"kernel": jnp.ones((2, 3))})["kernel"]
        >>> row.decays, row.place, row.kind, row.toward, row.kept, row.role
        (True, 'update', 'L2', 'zero', 1.0, 'kernel')
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    rate: float = 0.0
    least: float = 0.0
    most: float = 0.0
    rates: tuple[tuple[int, float], ...] = ()
    beside_gradient: float = 0.0
    needs_gradient: bool = False
    place: str = "none"
    kind: str = "none"
    toward: str = ""
    scales_with_learning_rate: bool | None = None
    in_update: float = 0.0
    kept: float = 1.0
    role: str = ""

    @property
    def decays(self) -> bool:
        """Whether any decay acts on it, even if rounding removes it."""
        return self.kind not in ("none", CONSTRAINT)


class Finding(NamedTuple):
    """Something that a reader of the code would not expect.

    Attributes:
        harm: "wrong": the training is not what the code says; "suspect": probably not what you want; "note".
        name: its name, which `assert_audit` can allow.
        message, remedy: what it is, and what to write instead.
        paths: the parameters that it concerns; empty for all.
        measured: for each of these paths, the numbers, in words; "" where there are none.

    Example:

        >>> import jax.numpy as jnp, optax, wdjax
        >>> found = wdjax.audit(optax.adamw(1e-3, weight_decay=0.1), {"bias": jnp.ones(3)}).findings[0]
        >>> found.harm, found.name, found.paths
        ('suspect', 'decays non-weights', ('bias',))
        >>> found.remedy
        'Write mask=weights_only(), or mask=weights_only().mask for Optax.'
    """

    harm: str
    name: str
    message: str
    remedy: str
    paths: tuple[str, ...] = ()
    measured: tuple[str, ...] = ()

    def __str__(self) -> str:
        groups: dict[str, list[str]] = {}
        for path, numbers in zip(self.paths, self.measured or [""] * len(self.paths), strict=True):
            groups.setdefault(numbers, []).append(path)
        if len(groups) > _MOST_NUMBERS:
            groups = _as_ranges(groups)
        parts = [f"{numbers} ({listed(paths, 3)})".lstrip() for numbers, paths in groups.items()]
        where = f"{'' if '' in groups else ':'} {'; '.join(parts)}" if parts else ""
        return f"{self.harm} [{self.name}]: {self.message}{where}. {self.remedy}".rstrip()


def _as_ranges(groups: dict[str, list[str]]) -> dict[str, list[str]]:
    """Paths by texts, with one text for all that differ only in what was measured. It has the range of each number."""
    alike: dict[str, list[str]] = {}
    for text in groups:
        alike.setdefault(_replaced(text, lambda _: "#"), []).append(text)
    merged = {}
    for texts in alike.values():
        paths = [path for text in texts for path in groups[text]]
        columns = zip(*map(_measured, texts), strict=True)
        ranges = iter([_range([number for numbers in column for number in numbers]) for column in columns])
        text = f"{_replaced(texts[0], lambda _, ranges=ranges: next(ranges))}, at {len(paths)} parameters"
        merged[text if len(texts) > 1 else texts[0]] = paths
    return merged


def _replaced(text: str, by: Callable[[Any], str]) -> str:
    """The text with other words for what was measured."""
    return _NUMBERS.sub(lambda found: by(found) if found[1] else found[0], text)


def _measured(text: str) -> list[list[str]]:
    """The numbers in a text, those of a range together."""
    return [[each for each in found.groups() if each] for found in _NUMBERS.finditer(text) if found[1]]


def _range(numbers: Sequence[str]) -> str:
    ends = min(numbers, key=float), max(numbers, key=float)
    return ends[0] if float(ends[0]) == float(ends[1]) else " to ".join(f"{float(end):.3g}" for end in ends)


def in_words(rates: Sequence[float]) -> list[str]:
    """The rates of one parameter at several counts. What a schedule's float32 leaves of the largest rate is 0."""
    largest = max(map(abs, rates), default=0.0)
    return [f"{0.0 if abs(rate) <= 2e-7 * largest else rate:.3g}" for rate in rates]
