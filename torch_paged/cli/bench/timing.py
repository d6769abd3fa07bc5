"""Times several ways of doing one thing in alternation, so that a noisy machine disturbs all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Seconds of one way: the median and its spread."""

    median: float
    fastest: float
    slowest: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Timing":
        return cls(statistics.median(seconds), min(seconds), max(seconds))

    def as_json(self) -> dict[str, float]:
        return {"median_s": self.median, "min_s": self.fastest, "max_s": self.slowest}

    def as_text(self) -> str:
        digits = 1 if self.median >= 0.1 else 3
        median, fastest, slowest = (f"{1e3 * s:.{digits}f}" for s in (self.median, self.fastest, self.slowest))
        return f"{median} ({fastest}–{slowest})"


def alternate(ways: Mapping[str, Callable[[int], object]], rounds: int, warmup: int = 1) -> dict[str, Timing]:
    """Time each way once a round, A B A B.

    Args:
        ways: name to callable; it gets the number of the round, by which it can rotate over its data.
        rounds: timed rounds.
        warmup: untimed rounds before them.

    Returns:
        Per name the seconds of one call.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(-warmup, rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way(number)
            elapsed = time.perf_counter() - start
            if number >= 0:
                seconds[name].append(elapsed)
    return {name: Timing.of(times) for name, times in seconds.items()}
