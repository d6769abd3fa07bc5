"""Finished: which rows of a batch decoding is done with, told on the device and read without waiting for it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


class Finished:
    """Which rows of a batch are finished: told on the device, and read by the host at the next call.

    Attributes:
        sequences: int64 `[num_seqs, columns]`, what the rows were when that was told last.
        before_leaving: called with the rows that are finished, bool `[num_seqs]`, and `sequences`, before they give up
            their blocks.
    """

    def __init__(self, before_leaving: Callable[[np.ndarray, Tensor | None], None]) -> None:
        self.before_leaving = before_leaving
        self.sequences: Tensor | None = None
        self._rows: Tensor | None = None
        self._host: Tensor | None = None
        self._copied: torch.Event | None = None

    def tell(self, rows: Tensor) -> None:
        """`rows`, bool `[num_seqs]`, are finished, beside those that were before."""
        self._rows = rows if self._rows is None else self._rows | rows
        if self._rows.device.type == "cpu":
            self._host = self._rows
            return
        # generate waits for the device once a step anyway, to know whether to go on: the copy is there by then.
        if self._host is None:
            self._host = torch.empty(len(rows), dtype=torch.bool, pin_memory=True)
            self._copied = torch.Event(device=rows.device)
        assert self._copied is not None
        self._host.copy_(self._rows, non_blocking=True)
        self._copied.record()

    def rows(self) -> np.ndarray | None:
        """bool `[num_seqs]`; None where nothing was told yet."""
        if self._host is None:
            return None
        if self._copied is not None:
            self._copied.synchronize()
        return self._host.numpy()
