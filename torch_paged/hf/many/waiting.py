"""Waiting: the requests that are not running yet or not any more, the one that has waited longest first."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator

from torch_paged.hf.many.request import GenerationRequest
from torch_paged.hf.many.sequence import Sequence
from torch_paged.hf.many.source import Source


class Waiting:
    """Sequences by their number, and the requests behind them, taken one by one as there is room for them.

    Attributes:
        is_over: there are no more requests to take.
    """

    def __init__(self, requests: Source, take: Callable[[GenerationRequest], Sequence]) -> None:
        self._requests = requests
        self._take = take
        self._heap: list[tuple[int, Sequence]] = []
        self.is_over = False

    def __iter__(self) -> Iterator[Sequence]:
        """Those that were taken."""
        return (sequence for _, sequence in self._heap)

    def put_back(self, sequence: Sequence) -> None:
        heapq.heappush(self._heap, (sequence.number, sequence))

    def first(self) -> Sequence | None:
        """The one that has waited longest, which stays; a request is taken if none waits. None = there is none now."""
        if not self._heap and not self.is_over:
            try:
                request = self._requests.take()
            except StopIteration:
                self.is_over = True
            else:
                if request is not None:
                    self.put_back(self._take(request))
        return self._heap[0][1] if self._heap else None

    def remove(self, sequence: Sequence) -> None:
        self._heap = [entry for entry in self._heap if entry[1] is not sequence]
        heapq.heapify(self._heap)
