"""What an audit reports on: a row for each parameter, and the findings."""

from collections.abc import Sequence
from typing import NamedTuple

from .._engine.text import listed

GRADIENT_AND_UPDATE = "gradient and update"
CONSTRAINT = "constraint"
MOVING_AVERAGE = "a moving average"


class Audited(NamedTuple):
    """What an optimizer does to one parameter.

    Attributes:
        path, shape, dtype: its canonical path, its shape, and the name of its dtype.
        rate: the fraction of a weight that the first real step removes with zero gradient (the median over weights). If
            that step decays nothing, that at the first of `steps` that does, or that beside a gradient. 0.0 for no
            decay, negative for growth.
        least, most: the smallest and the largest rate of an array with a rate for each layer; otherwise both the rate.
        rates: pairs of a count and the rate at that count; empty for an optimizer without a count.
        beside_gradient: the same fraction when there is a gradient.
        needs_gradient: whether it decays only beside a gradient.
        place: "update": added to the finished update; "gradient": it enters the moments, or is scaled with the
            gradient; "weights": a rule for the weights after the step; "gradient and update": two decays; "none".
        kind: "L2": proportional to the weight; "L1": the same size for all weights; "norm": proportional to the weight
            divided by a norm; "Huber": L2 for small and L1 for large weights; "cautious ..."; "other"; "unknown":
            the moments or a constraint hide it; "constraint": weights outside a set are put back onto it, which is not
            a decay; "none".
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
        parts = [f"{numbers} ({listed(paths, 3)})".lstrip() for numbers, paths in groups.items()]
        where = f"{'' if '' in groups else ':'} {'; '.join(parts)}" if parts else ""
        return f"{self.harm} [{self.name}]: {self.message}{where}. {self.remedy}".rstrip()


def in_words(rates: Sequence[float]) -> list[str]:
    """The rates of one parameter at several counts. What a schedule's float32 leaves of the largest rate is 0."""
    largest = max(map(abs, rates), default=0.0)
    return [f"{0.0 if abs(rate) <= 2e-7 * largest else rate:.3g}" for rate in rates]
