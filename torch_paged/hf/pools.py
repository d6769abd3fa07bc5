"""Pools: the KV pools of one model, one for each device and group of layers that live alike."""

from __future__ import annotations

import threading
from collections import defaultdict
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from torch_paged.hf.config import PagedConfig
from torch_paged.hf.line import Line
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
    """Created on demand from the shapes that the model's layers show; the pools of a device share one budget.

    Attributes:
        lock: of all budgets: what is remembered of a prefix must be there on every device.
        line: the calls that use them.
        tokens_computed: of all forward passes so far that came to their end.
    """

    def __init__(self, config: PagedConfig) -> None:
        self.config = config
        self.lock = threading.RLock()
        self._lock = threading.Lock()
        self._budgets: dict[torch.device, MemoryBudget] = {}
        self._pools: dict[tuple[GroupKey, int], Pool] = {}
        self.line = Line(self.lock, self.free_bytes)
        self.tokens_computed = 0

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

    def free_bytes(self) -> int:
        """Bytes that can be had on all devices, what only the prefix indexes hold included; with the lock."""
        pools = self._with_blocks()
        budgets = {id(pool.budget): pool.budget for pool in pools}
        for budget in budgets.values():
            budget.settle()
        return sum(budget.free_bytes for budget in budgets.values()) + sum(
            pool.num_cached * pool.block_bytes for pool in pools
        )

    def largest_block(self) -> int:
        """Bytes of the largest block that rows are in."""
        return max((pool.block_bytes for pool in self._with_blocks()), default=0)

    def have_room(self, seq_lens: np.ndarray, num_tokens: np.ndarray, besides: dict[Pool, int] | None = None) -> bool:
        """Whether rows of these lengths, int64 `[rows]`, can grow by so many tokens that share nothing; with the lock.

        Of sliding layers, which hold less than that, as many as a window may touch.

        Args:
            besides: more blocks that are needed.
        """
        needed: defaultdict[int, int] = defaultdict(int)
        for pool, num_blocks in (besides or {}).items():
            needed[id(pool.budget)] += num_blocks * pool.block_bytes
        available: dict[int, int] = {}
        for pool in self._with_blocks():
            size, most = pool.block_size, pool.sliding_window + 2 * pool.block_size
            before, after = seq_lens, seq_lens + num_tokens
            if pool.sliding_window:
                before, after = np.minimum(before, most), np.minimum(after, most)
            needed[id(pool.budget)] += int((-(-after // size) - -(-before // size)).sum()) * pool.block_bytes
            available.setdefault(id(pool.budget), pool.budget.free_bytes)
            available[id(pool.budget)] += pool.num_cached * pool.block_bytes
        return all(needed[budget] <= nbytes for budget, nbytes in available.items())

    def stats(self) -> PoolStats:
        return replace(
            PoolStats.total([pool.stats() for pool in self._snapshot()]), tokens_computed=self.tokens_computed
        )

    def count(self, num_tokens: int) -> None:
        """A forward pass has computed so many tokens."""
        with self._lock:
            self.tokens_computed += num_tokens

    def reset_peak(self) -> None:
        for pool in self._snapshot():
            pool.reset_peak()

    def trim(self) -> None:
        """Give the pages of free blocks back to the system."""
        for pool in self._snapshot():
            pool.trim()

    def _with_blocks(self) -> list[Pool]:
        return [pool for pool in self._snapshot() if pool.has_blocks]

    def _snapshot(self) -> list[Pool]:
        with self._lock:
            return list(self._pools.values())
