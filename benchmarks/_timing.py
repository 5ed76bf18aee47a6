"""Fair times on a shared machine: competitors take turns, and only times of the same round are compared."""

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

# Runs this many calls and returns the seconds per call.
Run = Callable[[int], float]


class Ratio(NamedTuple):
    """A quotient of times: the median over rounds, the quartiles, the extremes, and the number of rounds."""

    median: float
    lower: float
    upper: float
    least: float
    most: float
    rounds: int

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.lower:.2f}–{self.upper:.2f})"

    @classmethod
    def of(cls, values: list[float]) -> "Ratio":
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, lower, upper, min(values), max(values), len(values))


class Times(NamedTuple):
    """The seconds of one call in each round, by competitor."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, to: str, factor: float = 1.0) -> Ratio:
        """How many times as long one competitor takes as another."""
        pairs = zip(self.seconds[name], self.seconds[to], strict=True)
        return Ratio.of([factor * a / b for a, b in pairs])


def interleaved(runs: Mapping[str, Run], rounds: int, block: float = 0.1) -> Times:
    """Times the competitors in turns, in a new random order each round.

    Args:
        runs: the competitors by name. The first two calls of each are a warm-up and are not counted.
        rounds: how many turns each gets.
        block: roughly how many seconds a turn takes. It determines the number of calls in a turn.
    """
    for run in runs.values():
        run(1)
    # All have the same number of calls, because the first calls after a pause are slower and must weigh the same.
    calls = max(1, round(block / statistics.median(run(1) for run in runs.values())))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for name in _turns(list(runs), rounds):
        seconds[name].append(runs[name](calls))
    return Times(seconds)


def staged(runs: Mapping[str, Callable[[], Mapping[str, float]]], rounds: int) -> dict[str, Times]:
    """As `interleaved`, for work in several stages that is done once per turn: the times of each stage.

    Each run returns the seconds of its stages by name. There is no warm-up.
    """
    stages: dict[str, Times] = {}
    for name in _turns(list(runs), rounds):
        for stage, seconds in runs[name]().items():
            stages.setdefault(stage, Times({each: [] for each in runs})).seconds[name].append(seconds)
    return stages


def _turns(names: list[str], rounds: int) -> Iterator[str]:
    rng = random.Random(0)
    gc.collect()
    gc.freeze()  # So existing objects are not searched for garbage at every turn.
    try:
        for _ in range(rounds):
            rng.shuffle(names)
            for name in names:
                gc.collect()
                time.sleep(0.01)  # Lets the threads of the previous competitor go to sleep.
                yield name
    finally:
        gc.unfreeze()


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """The result of a function, and the seconds that it takes."""
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start
