"""The steps from which the audit draws its conclusions, by name: from different weights, with or without gradients."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ._probes import Arrays, Probes, Step, weights_from
from ._states import Change, counters_of, moving_anchors, positions_of_keys, replaced


class Runs(NamedTuple):
    """Steps by name, and for counts: the count, 0 or 1 for the step after it, and "plus", "minus" and "plus_grad"."""

    steps: dict[str, Step]
    later: Sequence[tuple[int, int, Step, Step, Step]]
    moving: Collection[str] = ()  # The paths of anchors that the first step has moved.
    sizes: Mapping[int, Any] = {}  # By leaf, how large the parts of the steps are that have cancelled.


def mean(one: Step, other: Step) -> Step:
    """The mean of two steps."""
    start = {i: (one.start[i] + other.start[i]) / 2 for i in one.start}
    moved = [{i: (a[i] + b[i]) / 2 for i in a} for a, b in zip(one.moved, other.moved, strict=True)]
    return Step(start, moved, None, None)


def run(
    probes: Probes,
    counts: Sequence[int],
    *,
    origin: Any = None,
    nudge: Any = None,
    beside: Any = None,
    at_count: tuple[int, int] | None = None,
) -> Runs:
    """Steps of the optimizer from different weights and states, by name; and counts, with steps at and after each.

    "plus", "minus", "double", "tiny" and "still" start at 1, -1, 2, 1e-6 and 0 times the probe weights, with zero
    gradient; "plus_grad" and "minus_grad" as the first two, with a gradient. "plus_second" starts where "plus" ended,
    and "plus_fresh" there too, with a new state at its count; the same after "minus", and after "still" with a
    gradient. "foreign" starts at the probe weights with the state of "still".

    "plus_back" and "minus_back" start where "still" does, with the states after "plus" and "minus"; "plus_farther"
    starts at 2 times the probe weights with the state after "plus", "plus_grad_farther" with that after "plus_grad";
    the same after "minus" at -2 times.

    With an origin, the optimizer is initialized there and the weights are offsets from it. With a nudge, it replaces
    the zero gradient, and `beside` the other one. With `at_count`, the first step is taken at that count.
    """
    zeros = probes.scaled(probes.weights, 0.0) if nudge is None else nudge
    gradients = probes.gradients if nudge is None else beside or probes.scaled(nudge, 2.0)
    counters: dict[int, tuple[int, int]] = {}

    def to(count: int, after: int) -> Change:
        def value(i: int, leaf: Any) -> Any:
            start, added = counters[i]
            asked = count + after * added
            # What counts calls, several in each step, must be where a step begins.
            return jnp.asarray(asked - (asked - start) % added, leaf.dtype)

        return lambda state: replaced(state, counters, value)

    def step(factor: float, gradients: Arrays = zeros, change: Change | None = None) -> Step:
        return step_from(weights_from(origin, probes.weights, factor), gradients, change)

    def step_from(weights: Arrays, gradients: Arrays, change: Change | None = None) -> Step:
        start = to(*at_count) if at_count and counters else lambda state: state
        return probes.first_step(weights, gradients, origin, change or start, zeros)

    first = step(1.0)  # It shows the counters, so it is not yet at a count.
    counters |= counters_of(first.before, first.after, probes.calls)
    plus, minus, still = first if at_count is None else step(1.0), step(-1.0), step(0.0)
    counts_of_second = jax.tree.leaves(plus.after)

    def to_second(state: Any) -> Any:
        return replaced(state, [*counters, *positions_of_keys(state)], lambda i, _: counts_of_second[i])

    steps = {"plus": plus.bare(), "minus": minus.bare(), "still": still.bare()}
    steps |= {"double": step(2.0).bare(), "tiny": step(1e-6).bare()}
    plus_grad, minus_grad = step(1.0, gradients), step(-1.0, gradients)
    steps |= {"plus_grad": plus_grad.bare(), "minus_grad": minus_grad.bare()}
    for name, one, other in (("plus", plus, plus_grad), ("minus", minus, minus_grad)):
        farther = weights_from(origin, probes.weights, 2.0 if name == "plus" else -2.0)
        steps[f"{name}_farther"] = probes.step(farther, zeros, one.after).bare()
        steps[f"{name}_grad_farther"] = probes.step(farther, zeros, other.after).bare()
    for name, one, given in (("plus", plus, zeros), ("minus", minus, zeros), ("still", still, probes.gradients)):
        steps[f"{name}_second"] = probes.step(one.end(), given, one.after).bare()
        steps[f"{name}_fresh"] = step_from(one.end(), given, to_second).bare()
    for name, one in (("plus", plus), ("minus", minus)):
        steps[f"{name}_back"] = probes.step(still.start, zeros, one.after).bare()
    steps["foreign"] = probes.step(plus.start, zeros, still.after).bare()
    later = []
    for count, after in [(count, after) for count in (counts if counters else ()) for after in (0, 1)]:
        there = to(count, after)
        three = step(1.0, zeros, there), step(-1.0, zeros, there), step(1.0, gradients, there)
        later.append((count, after, three[0].bare(), three[1].bare(), three[2].bare()))
    return Runs(steps, later, () if origin is None else moving_anchors(plus.before, plus.after))
