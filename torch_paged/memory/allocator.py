"""Who owns which block: reference counts over block ids, the lowest free ids handed out first."""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from torch_paged.memory.budget import MemoryBudget

Ids = NDArray[np.int64]
SomeIds = NDArray[np.integer[Any]]
NO_IDS: Ids = np.empty(0, dtype=np.int64)

# Block ids an allocation looks at beyond the number it wants, before it looks further.
_SCAN = 512


class PoolExhausted(RuntimeError):
    """More blocks were asked for than are free, cached prefixes given up. No block was taken.

    Attributes:
        needed: blocks asked for.
        free: blocks that were free.
        used: blocks in use, of all sequences and caches together.
        max_bytes: bytes that blocks may take, `max_memory`; 0 = no bound but the pool's own.
        device_full: the device has no memory left, less than `max_memory` though blocks take.
        undivided: why fewer sequences at a time could not be tried; empty where they were, or nobody could.
    """

    def __init__(
        self,
        needed: int,
        free: int,
        used: int = 0,
        max_bytes: int = 0,
        device_full: bool = False,
        undivided: str = "",
    ) -> None:
        bound = f" (now {max_bytes:,} bytes)" if max_bytes else ""
        remedy = "free memory on the device, which has none left" if device_full else f"raise max_memory{bound}"
        super().__init__(
            f"out of KV blocks: {needed} needed, {free} free, {used} in use; {remedy}, run fewer or "
            "shorter sequences at once, or delete the past_key_values that earlier calls returned"
            + (undivided and f" (all rows are needed at once: {undivided})")
        )
        self.needed, self.free, self.used, self.max_bytes = needed, free, used, max_bytes
        self.device_full, self.undivided = device_full, undivided

    def because(self, undivided: str) -> "PoolExhausted":
        """The same, which says why fewer sequences at a time were not tried."""
        return type(self)(self.needed, self.free, self.used, self.max_bytes, self.device_full, undivided)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (
            self.needed, self.free, self.used, self.max_bytes, self.device_full, self.undivided,
        )  # fmt: skip


class Backing(Protocol):
    """What puts memory behind blocks, as they come into use."""

    def commit(self, blocks: Ids) -> bool:
        """Put memory behind free blocks, int64 `[n]` ascending; False, and nothing changed, where none is left."""

    def committed(self) -> NDArray[np.bool_]:
        """bool `[num_blocks]`: which blocks have memory."""


class BlockAllocator:
    """Hands out block ids `0..num_blocks-1` and counts the references to each.

    Args:
        num_blocks: how many ids there are.
        budget: where the bytes of used blocks are charged, shared with other allocators; None = unlimited.
        block_bytes: bytes of one block, charged per used block.
        memory: puts memory behind blocks before they are handed out; None = they always have it.

    Attributes:
        num_blocks: as given.
        ref_counts: int32 `[num_blocks]`, 0 = free. Read only for callers.
        num_used: blocks with at least one reference.
        num_shared: blocks with more than one.
        peak_used, peak_shared: the highest these two were since the start or `reset_peak`.

    Methods are not synchronised: callers hold the pool's lock.
    """

    def __init__(
        self,
        num_blocks: int,
        budget: MemoryBudget | None = None,
        block_bytes: int = 0,
        memory: Backing | None = None,
    ) -> None:
        self.num_blocks = num_blocks
        self.ref_counts: NDArray[np.int32] = np.zeros(num_blocks, dtype=np.int32)
        self.num_used = self.num_shared = self.peak_used = self.peak_shared = 0
        self._budget = budget
        self._block_bytes = block_bytes
        self._memory = memory
        self._lowest = 0  # no id below is free
        self._touched = 0  # no id from here on was handed out since the last take_free_runs
        self._last_index: Ids = np.empty(num_blocks, dtype=np.int64)  # scratch of _distinct

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now: unused ids, as far as the budget has bytes for them."""
        free = self.num_blocks - self.num_used
        if self._budget is not None and self._block_bytes:
            free = min(free, self._budget.free_bytes // self._block_bytes)
        return free

    def allocate(self, n: int, releasing: SomeIds = NO_IDS) -> Ids:
        """Take the `n` lowest free blocks, each with one reference, after `release(releasing)`.

        Where no memory is left for them, the lowest of those that have some.

        Returns:
            int64 `[n]`, ascending.

        Raises:
            PoolExhausted: fewer than `n` are free, cached prefixes given up; nothing was taken or released.
            ValueError: `n` is negative, or `releasing` is not to be released; nothing has changed.
        """
        if n < 0:
            raise ValueError(f"n: {n}; must be at least 0")
        self.release(releasing)
        try:
            self._require_free(n)
            if n == 0:
                return NO_IDS
            ids = self._lowest_free(n)
            if self._memory is None or self._memory.commit(ids):
                self._lowest = int(ids[-1]) + 1
            else:
                ids = self._lowest_with_memory(n, self._memory)
        except BaseException:
            self._count(*self._shift(releasing, NO_IDS)[1:])  # undo
            raise
        before = self.ref_counts[ids]
        self.ref_counts[ids] = 1
        self._count(before, self.ref_counts[ids])
        self._touched = max(self._touched, int(ids[-1]) + 1)
        return ids

    def retain(self, ids: SomeIds) -> None:
        """Add one reference per entry of `ids`; an id that stands there twice gets two.

        Raises:
            ValueError: an id is out of range or its block is free; nothing has changed.
        """
        self.exchange(ids, NO_IDS)

    def release(self, ids: SomeIds) -> None:
        """Take away one reference per entry of `ids`; blocks left without any are free again.

        Raises:
            ValueError: an id is out of range or has fewer references than entries; nothing has changed.
        """
        self.exchange(NO_IDS, ids)

    def exchange(self, gained: SomeIds, lost: SomeIds) -> None:
        """`retain(gained)` and `release(lost)` in one: no block is free, and no peak counted, in between.

        Raises:
            ValueError: an id is out of range, free, or would have fewer than no references; nothing has changed.
        """
        if not len(gained) and not len(lost):
            return
        distinct, before, after = self._shift(self._checked(gained), self._checked(lost))
        bad = (before <= 0) | (after < 0)
        if bad.any():
            self._shift(lost, gained)  # undo
            block = int(distinct[bad][0])
            raise ValueError(
                f"ids: block {block} with {self.ref_counts[block]} references; must be used, and released no more often"
            )
        self._count(before, after)
        freed = distinct[after == 0]
        if len(freed):
            self._lowest = min(self._lowest, int(freed.min()))

    def take_free_runs(self) -> Ids:
        """Runs `[first, end)` of free blocks, int64 `[n, 2]`, that were used since the last call.

        The last run goes on to `num_blocks` when nothing above it is used.
        """
        used = np.flatnonzero(self.ref_counts[: self._touched])
        runs = np.stack([np.append(0, used + 1), np.append(used, self.num_blocks)], axis=1)
        runs = runs[(runs[:, 0] < runs[:, 1]) & (runs[:, 0] < self._touched)]
        self._touched = int(used[-1]) + 1 if len(used) else 0
        return runs

    def reset_peak(self) -> None:
        """Let the peaks start again from what is used and shared now."""
        self.peak_used, self.peak_shared = self.num_used, self.num_shared

    def _require_free(self, n: int) -> None:
        if n > self.num_free and self._budget is not None and self._budget.prefix_index is not None:
            self._budget.prefix_index.evict(self, n)
        if n > self.num_free:
            raise self._exhausted(n, self.num_free)

    def _exhausted(self, needed: int, free: int) -> PoolExhausted:
        budget = self._budget
        if budget is None:
            return PoolExhausted(needed, free, self.num_used)
        return PoolExhausted(needed, free, self.num_used, budget.max_bytes, budget.device_full)

    def _lowest_with_memory(self, n: int, memory: Backing) -> Ids:
        """Free blocks, once the device has no memory for more of them."""
        free = (self.ref_counts == 0) & memory.committed()
        if self._budget is not None:
            self._budget.limit_to(self._budget.used_bytes + int(np.count_nonzero(free)) * self._block_bytes)
            self._require_free(n)  # what prefixes held has memory
            free = (self.ref_counts == 0) & memory.committed()
        ids: Ids = np.flatnonzero(free)[:n]
        if len(ids) < n:
            raise self._exhausted(n, len(ids))
        return ids

    def _lowest_free(self, n: int) -> Ids:
        found, missing, start, span = [], n, self._lowest, n + _SCAN
        while missing:
            ids = np.flatnonzero(self.ref_counts[start : start + span] == 0)[:missing] + start
            found.append(ids)
            missing -= len(ids)
            start += span
            span *= 2
        return found[0] if len(found) == 1 else np.concatenate(found)

    def _shift(self, gained: SomeIds, lost: SomeIds) -> tuple[Ids, NDArray[np.int32], NDArray[np.int32]]:
        """Apply both to the reference counts; the ids concerned, once each, with their counts before and after."""
        distinct = self._distinct(np.concatenate([gained, lost], dtype=np.int64))
        before = self.ref_counts[distinct]
        np.add.at(self.ref_counts, gained, 1)
        np.subtract.at(self.ref_counts, lost, 1)
        return distinct, before, self.ref_counts[distinct]

    def _distinct(self, ids: Ids) -> Ids:
        """Each id once, in linear time: of equal ids, the one whose index was stored last finds it there."""
        index = np.arange(len(ids))
        self._last_index[ids] = index
        distinct: Ids = ids[self._last_index[ids] == index]
        return distinct

    def _count(self, before: NDArray[np.int32], after: NDArray[np.int32]) -> None:
        used = int(np.count_nonzero(after) - np.count_nonzero(before))
        self.num_used += used
        self.num_shared += int(np.count_nonzero(after > 1) - np.count_nonzero(before > 1))
        self.peak_used = max(self.peak_used, self.num_used)
        self.peak_shared = max(self.peak_shared, self.num_shared)
        if self._budget is not None:
            self._budget.charge(used * self._block_bytes)

    def _checked(self, ids: SomeIds) -> Ids:
        checked: Ids = np.asarray(ids, dtype=np.int64)
        if ((checked < 0) | (checked >= self.num_blocks)).any():
            raise ValueError(f"ids: from {ids.min()} to {ids.max()}; must be in [0, {self.num_blocks}) (num_blocks)")
        return checked
