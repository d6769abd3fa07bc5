"""The block ids behind a batch of sequences, as one array that grows, and that knows whom to give them back to."""

import numpy as np
from numpy.typing import NDArray

from torch_paged.memory.allocator import NO_IDS, BlockAllocator

Ints = NDArray[np.int64]


class TableRows:
    """The blocks a batch holds: what is left of a dead BlockTables until it is given back.

    It knows the allocator, not the pool, whose memory is not to wait for that.
    """

    def __init__(self, table: NDArray[np.int32]) -> None:
        self.table = table  # [num_seqs, at least the blocks of the longest row], -1 = no block
        self.allocator: BlockAllocator | None = None  # known with the first block

    def widened(self, num_blocks: Ints) -> NDArray[np.int32]:
        """The table with columns for that many blocks per row; it grows by doubling."""
        width, (num_seqs, capacity) = int(num_blocks.max(initial=0)), self.table.shape
        if width > capacity:
            table = np.full((num_seqs, max(width, 2 * capacity)), -1, dtype=np.int32)
            table[:, :capacity] = self.table
            self.table = table
        return self.table

    def ids(self) -> NDArray[np.int32]:
        return self.table[self.table >= 0]

    def exchange(self, gained: NDArray[np.integer], lost: NDArray[np.integer]) -> None:
        if self.allocator is not None:
            self.allocator.exchange(gained, lost)

    def give_back(self) -> None:
        self.exchange(NO_IDS, self.ids())
        self.table[:] = -1


def cells(first: Ints, end: Ints) -> tuple[Ints, Ints]:
    """(rows, columns) of the table cells `first[row] <= column < end[row]`, row by row."""
    count = np.maximum(end - first, 0)
    if not count.any():
        return NO_IDS, NO_IDS
    rows = np.repeat(np.arange(len(count)), count)
    return rows, np.arange(len(rows)) - np.repeat(count.cumsum() - count - first, count)
