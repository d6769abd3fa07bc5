"""Streamed: a streamer that gets what is left at the end, when rows could not run beside one another."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.generation.streamers import BaseStreamer


class Streamed(BaseStreamer):  # type: ignore[misc]
    """Passes on to the caller's streamer what stock's loop puts, and counts it."""

    def __init__(self, streamer: Any) -> None:
        self._streamer = streamer
        self._steps, self._ended = 0, False

    def put(self, value: Tensor) -> None:
        self._streamer.put(value)
        self._steps += 1

    def end(self) -> None:
        self._streamer.end()
        self._ended = True

    def finish(self, tokens: Tensor) -> None:
        """Put the steps that were not, and end, unless stock's loop has.

        Args:
            tokens: int64 `[rows, steps]`, of all steps.
        """
        if self._ended:
            return
        for step in tokens[:, self._steps :].cpu().unbind(1):
            self.put(step)
        self.end()
