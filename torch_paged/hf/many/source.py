"""Source: where requests come from, an iterable or a queue that others fill while sequences run."""

from __future__ import annotations

import inspect
import queue
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from torch_paged.hf.many.request import GenerationRequest

# Seconds for which an empty queue is waited on before it is looked whether to go on waiting.
_LOOK = 0.1
_SHUT_DOWN: tuple[type[Exception], ...] = tuple(filter(None, [getattr(queue, "ShutDown", None)]))


class Source(Protocol):
    """Requests one after the other."""

    def take(self) -> GenerationRequest | None:
        """The next one, or None where there is none yet.

        Raises:
            StopIteration: there are no more.
        """

    def wait(self) -> None:
        """Return when there may be one, or after a short while."""


def source_of(requests: Any) -> Source:
    """The requests of an iterable, or of a queue.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(requests, Iterable):
        return _Iterated(iter(requests))
    get = getattr(requests, "get", None)
    if callable(get) and callable(getattr(requests, "get_nowait", None)) and not inspect.iscoroutinefunction(get):
        return _Queued(requests)
    raise TypeError(
        f"requests: {type(requests).__name__}; must be an iterable of requests or prompts, or a queue.Queue"
    )


class _Iterated:
    def __init__(self, requests: Iterator[Any]) -> None:
        self._requests = requests

    def take(self) -> GenerationRequest:
        return _request(next(self._requests))

    def wait(self) -> None:
        """`take` waits itself."""


class _Queued:
    def __init__(self, requests: Any) -> None:
        self._requests = requests
        self._taken: deque[Any] = deque()

    def take(self) -> GenerationRequest | None:
        try:
            request = self._taken.popleft() if self._taken else self._requests.get_nowait()
        except queue.Empty:
            return None
        except _SHUT_DOWN:
            request = None
        if request is None:
            raise StopIteration
        return _request(request)

    def wait(self) -> None:
        try:
            self._taken.append(self._requests.get(timeout=_LOOK))
        except queue.Empty:
            pass
        except _SHUT_DOWN:
            self._taken.append(None)


def _request(given: Any) -> GenerationRequest:
    return given if isinstance(given, GenerationRequest) else GenerationRequest(given)
