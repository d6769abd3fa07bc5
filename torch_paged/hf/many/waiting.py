"""Waiting: the requests that are not running yet or not any more, the one that has waited longest first."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator

from torch_paged.hf.many.request import GenerationRequest
from torch_paged.hf.many.sequence import Sequence


class Waiting:
    """Sequences by their number, and the requests behind them, taken one by one as there is room for them."""

    def __init__(self, requests: Iterator[GenerationRequest], take: Callable[[GenerationRequest], Sequence]) -> None:
        self._requests = requests
        self._take = take
        self._heap: list[tuple[int, Sequence]] = []
        self._exhausted = False

    def __iter__(self) -> Iterator[Sequence]:
        """Those that were taken."""
        return (sequence for _, sequence in self._heap)

    def put_back(self, sequence: Sequence) -> None:
        heapq.heappush(self._heap, (sequence.number, sequence))

    def first(self) -> Sequence | None:
        """The one that has waited longest, which stays; a request is taken if none waits. None = there are no more."""
        if not self._heap and not self._exhausted:
            try:
                request = next(self._requests)
            except StopIteration:
                self._exhausted = True
            else:
                self.put_back(self._take(request))
        return self._heap[0][1] if self._heap else None

    def remove(self, sequence: Sequence) -> None:
        self._heap = [entry for entry in self._heap if entry[1] is not sequence]
        heapq.heapify(self._heap)
