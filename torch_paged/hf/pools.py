"""Pools: the KV pools of one model, one for each device and group of layers that live alike."""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch

from torch_paged.hf.config import PagedConfig
from torch_paged.memory import MemoryBudget, Pool, PoolStats, PrefixIndex


class GroupKey(NamedTuple):
    """What makes layers live alike: their blocks come from one pool and follow one table."""

    device: torch.device
    dtype: torch.dtype
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    sliding_window: int


class Pools:
    """Created on demand from the shapes that the model's layers show; the pools of a device share one budget."""

    def __init__(self, config: PagedConfig) -> None:
        self.config = config
        # Of all budgets: what is remembered of a prefix must be there on every device.
        self.lock = threading.RLock()
        self._lock = threading.Lock()
        self._budgets: dict[torch.device, MemoryBudget] = {}
        self._pools: dict[tuple[GroupKey, int], Pool] = {}

    def get(self, key: GroupKey, num_layers: int) -> Pool:
        """The pool of a group; `num_layers` is how many layers at most will share its blocks."""
        with self._lock:
            pool = self._pools.get((key, num_layers))
            if pool is None:
                if key.device not in self._budgets:
                    budget = MemoryBudget(self.config.max_memory, key.device, self.lock)
                    if self.config.prefix_caching:
                        PrefixIndex(budget)
                    self._budgets[key.device] = budget
                pool = self._pools[key, num_layers] = Pool(
                    num_layers=num_layers,
                    block_size=self.config.block_size,
                    sliding_window=key.sliding_window,
                    budget=self._budgets[key.device],
                    device=key.device,
                )
            return pool

    def prefix_indexes(self) -> list[PrefixIndex]:
        """The prefix indexes of all devices; none without `prefix_caching`."""
        with self._lock:
            return [b.prefix_index for b in self._budgets.values() if b.prefix_index is not None]

    def stats(self) -> PoolStats:
        return PoolStats.total([pool.stats() for pool in self._snapshot()])

    def reset_peak(self) -> None:
        for pool in self._snapshot():
            pool.reset_peak()

    def trim(self) -> None:
        """Give the pages of free blocks back to the system."""
        for pool in self._snapshot():
            pool.trim()

    def _snapshot(self) -> list[Pool]:
        with self._lock:
            return list(self._pools.values())
