"""What an audit knows about one leaf, and how its decay pauses over the tested counts."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ._rows import Audited

_STOPS, _STARTS, PAUSES = LAPSES = ("stops", "starts late", "not in every step")


class Facts(NamedTuple):
    """What is known about one leaf. The last facts, from the tolerance on, do not come from measurements of it."""

    row: Audited
    moves: bool  # Whether gradients move it.
    is_raw: bool  # Whether its update is its gradient.
    is_finite: bool  # Whether its updates are finite.
    is_touched: bool  # Whether anything moves it, gradients or not.
    grows: bool = False  # Whether the decay makes all weights grow.
    is_repeated: bool = False  # Whether it decays in more than one call of a step.
    rescaled: bool = False  # Whether, beside a gradient, the decay keeps its direction but not its size.
    is_remembered: bool = False  # Whether the next step remembers the decay.
    next_rate: float | None = None  # The rate of the second step, if the strength depends on the weights of the first.
    is_proportional: bool = False  # Whether the first step takes the same fraction of all weights.
    later: tuple["Later", ...] = ()  # Steps at the tested counts, and at those that follow.
    odd_beside: bool = False  # Whether, beside a gradient, a part of the step changes sign with the weights.
    lands: bool = (
        False  # Whether it may move onto a set: far in the first step with zero gradient, and less in the second.
    )
    is_constrained: bool = False  # Whether weights outside a set are put onto it.
    needed_by: str = ""  # "element", "row" or "array": each of these needs a gradient of its own to decay.
    late_rate: float = 0.0  # The rate of the step that makes up for a step without a gradient; 0 if none does.
    is_divided: bool = False  # Whether the decay is divided by the size of the gradients.
    lapse: str = ""  # In which way the decay pauses while gradients still move the leaf; a finding's name.
    strength: float = 0.0  # The factor of L2 in the gradient, where a decay in the update acts too.
    step_size: str = ""  # A number in the state that scales the step of the gradient, but not the decay.
    is_rounded_to_nearest: bool = False  # Whether nothing in the optimizer keeps what rounding loses.
    moves_when_skipped: bool = False  # Whether it moves in a step that is skipped because a gradient is NaN.
    tolerance: float = 0.0  # By how much rates may differ, relatively.
    expected: tuple[float, float] | None = None  # The smallest and the largest expected rate, if one was given.
    expected_later: Mapping[int, float] = {}  # The expected rates by count, if a schedule was given.
    should_decay: bool | None = None  # The mask that was given.
    is_meant: bool = False  # Whether a mask or a table that was given says that it should decay.
    is_frozen: bool = False  # Whether the user says that it is frozen.


class Later(NamedTuple):
    """The decay of one leaf in a step from a new state whose counters were set."""

    at: int  # The count.
    after: int  # 0 for the step at this count, 1 for the next one.
    rate: float
    moved: float  # The size of the gradient's part of the step.


def lapse_of(later: Sequence[Later]) -> str:
    """How the decay pauses in these steps while gradients still move the leaf; "" if it does not."""
    rate, moved = (max((abs(getattr(one, name)) for one in later), default=0.0) for name in ("rate", "moved"))
    acts = [abs(one.rate) / rate > 1e-3 * one.moved / moved for one in later if rate and one.moved > 1e-2 * moved]
    if all(acts) or not any(acts):
        return ""
    if not any(acts[-2:]):
        return _STOPS
    if acts != sorted(acts):
        return PAUSES
    return "" if acts[1] else _STARTS  # A rate that warms up from 0 is 0 in the first step alone.
