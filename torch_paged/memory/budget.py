"""How many bytes of KV blocks may be in use at once, over all pools of one handle."""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Callable
from functools import cached_property
from numbers import Integral, Real
from typing import TYPE_CHECKING

import torch

from torch_paged.memory.device_memory import device_memory

if TYPE_CHECKING:
    from torch_paged.memory.prefix_index import PrefixIndex

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_MUST_BE = 'must be bytes (int > 0), a part of the memory (0 < float <= 1), a text like "2GiB" or "500MB", or None'


class MemoryBudget:
    """Bytes that pools draw from, and the lock that guards them and their tables.

    Args:
        max_memory: bytes; a fraction of the memory of `device` (of the machine, on the CPU); a text such as `"2GiB"`;
            None = half of what is free there when it is first asked for.
        device: where the pools live.
        lock: one that guards other budgets too; None = one of its own.

    Attributes:
        lock: held around every edit of a table, an allocator or this budget.
        used_bytes: bytes of the blocks in use.
        device_full: the device has no memory for as much as `max_bytes`.
        prefix_index: of the pools; gives up cached blocks before one of them is exhausted. None = nothing is cached.

    Raises:
        ValueError: `max_memory` is out of range or cannot be read.
        TypeError: `max_memory` is of another type.
    """

    def __init__(
        self, max_memory: int | float | str | None, device: torch.device, lock: threading.RLock | None = None
    ) -> None:
        self.lock = lock or threading.RLock()
        self.used_bytes = 0
        self._device_bytes: int | None = None
        self.prefix_index: PrefixIndex | None = None
        self._device = device
        self._limit = parse_max_memory(max_memory)
        self._abandoned: deque[Callable[[], None]] = deque()

    @cached_property
    def max_bytes(self) -> int:
        """The bound in bytes, found out at first use and fixed from then on."""
        if isinstance(self._limit, int):
            return self._limit
        free, total = device_memory(self._device)
        return free // 2 if self._limit is None else int(total * self._limit)

    @property
    def free_bytes(self) -> int:
        """Bytes that are still to be had."""
        most = self.max_bytes if self._device_bytes is None else min(self.max_bytes, self._device_bytes)
        return most - self.used_bytes

    @property
    def device_full(self) -> bool:
        return self._device_bytes is not None

    def limit_to(self, nbytes: int | None) -> None:
        """Have `nbytes` in use at most, as the device has no memory left for more; None = `max_bytes` again."""
        self._device_bytes = nbytes

    def charge(self, nbytes: int) -> None:
        """Take `nbytes`; negative = give them back."""
        self.used_bytes += nbytes

    def abandon(self, release: Callable[[], None]) -> None:
        """Have `release` called at the next `settle`.

        For finalizers: the garbage collector may run one in the middle of an edit by the thread that holds the lock.
        """
        self._abandoned.append(release)

    def settle(self) -> None:
        """Give back what dead tables held."""
        while self._abandoned:
            with self.lock:
                if self._abandoned:
                    self._abandoned.popleft()()


def parse_max_memory(max_memory: int | float | str | None) -> int | float | None:
    """Bytes as int, a part of the memory as float, None as it is.

    Raises:
        ValueError: `max_memory` is out of range or cannot be read.
        TypeError: `max_memory` is of another type.
    """
    if max_memory is None:
        return None
    if isinstance(max_memory, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?\s*", max_memory.upper())
        nbytes = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
        if nbytes > 0:
            return nbytes
    elif isinstance(max_memory, bool) or not isinstance(max_memory, Real):
        raise TypeError(f"max_memory: {type(max_memory).__name__}; {_MUST_BE}")
    elif isinstance(max_memory, Integral):
        if max_memory > 0:
            return int(max_memory)
    elif 0 < max_memory <= 1:
        return float(max_memory)
    raise ValueError(f"max_memory: {max_memory!r}; {_MUST_BE}")
