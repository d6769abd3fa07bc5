"""Times calls on a GPU by CUDA events, each after the L2 cache was overwritten."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from torch_paged.cli.bench.timing import Timing

COPY_BYTES = 1 << 30
# The GPU waits so many cycles before each call, some 0.2 ms, in which the host launches all of it.
HEAD_START_CYCLES = 400_000


class Event(Protocol):
    """What is used of torch.cuda.Event."""

    def record(self) -> None: ...

    def elapsed_time(self, end: Any) -> float:
        """Milliseconds from this event to `end`."""


@dataclass(frozen=True)
class Clock:
    """Measures on one device.

    Attributes:
        event: makes an event that can be timed.
        before_call: puts the device into the state that every call finds, the L2 cache without its operands.
        synchronize: waits for the device.
    """

    event: Callable[[], Event]
    before_call: Callable[[], object]
    synchronize: Callable[[], object]

    def alternate(self, ways: Mapping[str, Callable[[int], object]], rounds: int, warmup: int = 3) -> dict[str, Timing]:
        """Seconds of one call of each way, A B A B; no call waits for the host.

        Args:
            ways: name to callable; it gets the number of the round.
            rounds: timed rounds.
            warmup: untimed rounds before them.
        """
        pairs: dict[str, list[tuple[Event, Event]]] = {name: [] for name in ways}
        for number in range(-warmup, rounds):
            for name, way in ways.items():
                start, end = self.event(), self.event()
                self.before_call()
                start.record()
                way(number)
                end.record()
                if number >= 0:
                    pairs[name].append((start, end))
            # A queue of launches has an end, at which the host would wait within a call.
            self.synchronize()
        return {
            name: Timing.of([1e-3 * start.elapsed_time(end) for start, end in timed]) for name, timed in pairs.items()
        }


def cuda_clock(device: torch.device) -> Clock:
    """A clock of CUDA events, that overwrites twice the bytes of the L2 cache before each call."""
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    overwritten = torch.empty(2 * l2_bytes, dtype=torch.uint8, device=device)

    def before_call() -> None:
        overwritten.zero_()
        torch.cuda._sleep(HEAD_START_CYCLES)  # type: ignore[no-untyped-call]

    def event() -> Event:
        made: Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        return made

    return Clock(event, before_call, lambda: torch.cuda.synchronize(device))


def copy_bytes_per_s(clock: Clock, rounds: int, nbytes: int = COPY_BYTES) -> float:
    """What a copy within the device reads and writes a second at best: the limit that ops are held against."""
    source = torch.zeros(nbytes, dtype=torch.uint8)
    target = torch.empty_like(source)
    timing = clock.alternate({"copy": lambda number: target.copy_(source)}, rounds)["copy"]
    return 2 * nbytes / timing.fastest
