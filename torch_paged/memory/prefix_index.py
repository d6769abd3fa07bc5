"""PrefixIndex: full blocks that stay cached after their sequences went, found again by the tokens that led to them."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from torch_paged.memory.allocator import BlockAllocator, Ids
from torch_paged.memory.budget import MemoryBudget

Ints = NDArray[np.int64]


class PrefixIndex:
    """Keeps one reference to each block it knows, and gives up those that nobody else holds when blocks run out.

    One index serves all pools of a budget: an entry is one block's worth of tokens, with the block that holds them in
    each pool that has one. The entries used longest ago go first, of one sequence the last block first.

    Args:
        budget: of the pools. Its lock is to be held around every method.
    """

    def __init__(self, budget: MemoryBudget) -> None:
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()  # the one used longest ago first
        self._cached: dict[BlockAllocator, NDArray[np.bool_]] = {}  # per pool, the blocks that entries point at
        budget.prefix_index = self

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, allocator: BlockAllocator, keys: Sequence[bytes], tokens: Ints) -> Ids:
        """The blocks that hold these tokens in the pool of `allocator`.

        Args:
            allocator: of the pool.
            keys: of the blocks of one sequence, from `block_keys`.
            tokens: int64 `[len(keys), block_size]`, compared with those of each entry.

        Returns:
            int64 `[len(keys)]`, -1 where there is none. No reference is taken.
        """
        blocks = np.full(len(keys), -1, dtype=np.int64)
        for i, key in enumerate(keys):
            entry = self._entries.get(key)
            if entry is not None and entry.tokens == tokens[i].tobytes():
                blocks[i] = entry.blocks.get(allocator, -1)
        return blocks

    def touch(self, keys: Sequence[bytes]) -> None:
        """Make the entries of one sequence those used last."""
        for key in reversed(keys):
            if key in self._entries:
                self._entries.move_to_end(key)

    def put(self, allocator: BlockAllocator, keys: Sequence[bytes], tokens: Ints, blocks: Ids) -> None:
        """Remember the blocks of one sequence; a block that another one with the same tokens is known for is not kept.

        Args:
            allocator, keys, tokens: as for `find`.
            blocks: int64 `[len(keys)]`, in use, full and never written again while the index holds them; -1 = none.

        Raises:
            ValueError: a block is out of range or free; nothing has changed.
        """
        cached = self._cached.get(allocator)
        if cached is None:
            cached = self._cached[allocator] = np.zeros(allocator.num_blocks, dtype=np.bool_)
        new = []
        for i in np.flatnonzero(np.asarray(blocks) >= 0).tolist():
            entry = self._entries.get(keys[i])
            if entry is None or (allocator not in entry.blocks and entry.tokens == tokens[i].tobytes()):
                new.append(i)
        allocator.retain(blocks[new])
        cached[blocks[new]] = True
        for i in new:
            entry = self._entries.setdefault(keys[i], _Entry(tokens[i].tobytes()))
            entry.blocks[allocator] = int(blocks[i])
        self.touch(keys)

    def num_unheld(self, allocator: BlockAllocator) -> int:
        """Blocks of this pool that the index alone holds: what eviction can free."""
        cached = self._cached.get(allocator)
        return 0 if cached is None else int(np.count_nonzero(cached & (allocator.ref_counts == 1)))

    def blocks(self, allocator: BlockAllocator) -> Ids:
        """The blocks of this pool that are cached, held by others or not, ascending."""
        cached = self._cached.get(allocator)
        return np.empty(0, dtype=np.int64) if cached is None else np.flatnonzero(cached)

    def flush(self) -> None:
        """Forget everything; blocks that nobody else holds are free."""
        for allocator, cached in self._cached.items():
            allocator.release(np.flatnonzero(cached))
        self._entries.clear()
        self._cached.clear()

    def evict(self, allocator: BlockAllocator, num_blocks: int) -> None:
        """Give up unheld blocks until `num_blocks` are free in this pool, or none is left."""
        if not any(map(self.num_unheld, self._cached)):
            return
        for _ in range(len(self._entries)):
            if allocator.num_free >= num_blocks:
                return
            key, entry = next(iter(self._entries.items()))
            for pool, block in list(entry.blocks.items()):
                if pool.ref_counts[block] == 1:
                    del entry.blocks[pool]
                    self._cached[pool][block] = False
                    pool.release(np.array([block]))
            if entry.blocks:
                # Somebody holds it, so it is in use now: the next eviction need not come past it first.
                self._entries.move_to_end(key)
            else:
                del self._entries[key]


@dataclass
class _Entry:
    tokens: bytes  # little-endian int64
    blocks: dict[BlockAllocator, int] = field(default_factory=dict)


def hit_length(found: Sequence[tuple[int, Ids]], block_size: int) -> int:
    """How many blocks of a sequence can be adopted in every pool at once.

    A sliding pool needs only the blocks that the next token sees through the window, and no more than that need be
    cached; a pool with full attention needs all from the first on.

    Args:
        found: for each pool its sliding window (0 = none) and the blocks `find` returned, int64 `[num_blocks]`.
        block_size: tokens of a block, the same in all pools.
    """
    num_blocks = min((len(blocks) for _, blocks in found), default=0)
    lengths = np.arange(num_blocks + 1)
    whole = np.ones(num_blocks + 1, dtype=np.bool_)
    for window, blocks in found:
        missing = np.concatenate([[0], np.cumsum(blocks[:num_blocks] < 0)])
        first = np.clip((lengths * block_size - window + 1) // block_size, 0, lengths) if window else 0
        whole &= missing[lengths] == missing[first]
    return int(np.flatnonzero(whole)[-1])
