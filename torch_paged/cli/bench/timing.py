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

    def scaled(self, factor: float) -> "Timing":
        return Timing(self.median * factor, self.fastest * factor, self.slowest * factor)

    def as_json(self) -> dict[str, float]:
        return {"median_s": self.median, "min_s": self.fastest, "max_s": self.slowest}

    def as_text(self) -> str:
        digits = 1 if self.median >= 0.1 else 3
        median, fastest, slowest = (f"{1e3 * s:.{digits}f}" for s in (self.median, self.fastest, self.slowest))
        return f"{median} ({fastest}–{slowest})"


# A machine that has just read little memory, or multiplied much, reads more slowly for some milliseconds (2 cores of a
# 4th generation Xeon: a decode call of 0.77 ms takes 1.05 after 20 ms of anything else, and the next 0.93).
SETTLING_S = 0.02


def alternate(
    ways: Mapping[str, Callable[[int], object]], rounds: int, warmup: int = 1, settling_s: float = 0.0
) -> dict[str, Timing]:
    """Time each way once a round, A B A B.

    Args:
        ways: name to callable; it gets the number of its call, by which it can rotate over its data.
        rounds: timed rounds.
        warmup: untimed rounds before them.
        settling_s: a turn of a way begins with untimed calls for that long, and goes on with timed calls for as long
            again; 0: a turn is one call.

    Returns:
        Per name the seconds of one call.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    calls = dict.fromkeys(ways, 0)

    def call_for(name: str, at_least_s: float) -> list[float]:
        times: list[float] = []
        while not times or sum(times) < at_least_s:
            start = time.perf_counter()
            ways[name](calls[name])
            times.append(time.perf_counter() - start)
            calls[name] += 1
        return times

    for number in range(-warmup, rounds):
        for name in ways:
            if settling_s and number >= 0:
                call_for(name, settling_s)
            times = call_for(name, settling_s)
            if number >= 0:
                seconds[name] += times
    return {name: Timing.of(times) for name, times in seconds.items()}
