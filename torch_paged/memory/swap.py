"""SwappedRow and SwappedTables: one row of a batch, or all of them, in CPU memory while the blocks serve others."""

import functools
import weakref

import numpy as np

from torch_paged.memory.allocator import Ids
from torch_paged.memory.pool import Pool
from torch_paged.memory.tables import BlockTables


class SwappedRow:
    """Takes a row out of its tables, which leaves it there without tokens.

    Blocks that the row alone holds are copied to CPU memory, which is not counted by `max_memory`, and are free then.
    Those that other rows hold too would not become free: they stay, held for this row. Dropping the object gives them
    back.

    Args:
        pool: of the tables.
        tables: the row's batch.
        row: which row of it.

    Attributes:
        num_tokens: tokens of the row.
        num_blocks: blocks that `restore` needs.
        num_kept: blocks that stay, held for this row.

    Source: swapping in PagedAttention, arXiv 2309.06180, section 4.5.
    """

    def __init__(self, pool: Pool, tables: BlockTables, row: int) -> None:
        self._pool = pool
        with pool.lock:
            self.num_tokens = int(tables.seq_lens[row])
            blocks = tables.blocks(row)
            # A row without new tokens keeps blocks that its next one will not see.
            window = pool.sliding_window
            blocks[: max(0, (self.num_tokens - window + 1) // pool.block_size) if window else 0] = -1
            self._kept = np.where(_held_by_others(pool, blocks), blocks, -1)
            kept = self._kept[self._kept >= 0]
            alone = blocks[(blocks >= 0) & (self._kept < 0)]
            self._columns = np.flatnonzero((blocks >= 0) & (self._kept < 0))
            self._saved = pool.save_blocks(alone) if len(alone) else []
            if len(kept):
                pool.allocator.retain(kept)
            tables.empty(np.array([row]))
        self.num_blocks, self.num_kept = len(alone), len(kept)
        release = functools.partial(pool.allocator.release, kept) if len(kept) else _nothing
        self._finalizer = weakref.finalize(self, pool.budget.abandon, release)
        self._finalizer.atexit = False

    def restore(self, tables: BlockTables, row: int, new: Ids | None = None) -> None:
        """Make an empty row of `tables` hold the tokens again. Once.

        Args:
            new: `num_blocks` blocks to restore into, the row's from now on; None = they are allocated.

        Raises:
            PoolExhausted: fewer than `num_blocks` are free; nothing has changed.
            ValueError: the row is not empty, or this was restored before; nothing has changed.
        """
        if not self._finalizer.alive:
            raise ValueError("this row was restored before; must be swapped out again")
        pool = self._pool
        with pool.lock:
            pool.budget.settle()
            blocks = self._kept.copy()
            new = pool.allocator.allocate(self.num_blocks) if new is None else new
            blocks[self._columns] = new
            every = np.full((tables.num_seqs, len(blocks)), -1, dtype=np.int64)
            lengths = np.zeros(tables.num_seqs, dtype=np.int64)
            every[row], lengths[row] = blocks, self.num_tokens
            try:
                if len(new):
                    pool.load_blocks(self._saved, new)
                tables.adopt(every, lengths)
            except BaseException:
                pool.allocator.release(new)
                raise
            # The row has its own references by now.
            pool.allocator.release(blocks[blocks >= 0])
            self._finalizer.detach()
            self._saved = []


class SwappedTables:
    """Takes all rows of a batch out of its tables once `leave` is called.

    Blocks that the batch alone holds, whichever of its rows share them, are in CPU memory once, and free then. Those
    that others hold too stay, held for it. Dropping the object gives them back.

    Args:
        pool: of the tables.
        tables: the batch.

    Attributes:
        num_blocks: blocks that `restore` needs.

    Raises:
        MemoryError, RuntimeError: the system has no memory for them; nothing has changed.
    """

    def __init__(self, pool: Pool, tables: BlockTables) -> None:
        self._pool, self._tables = pool, tables
        self._blocks, self._first, self._seq_lens = tables.held()
        distinct, counts = np.unique(self._blocks[self._blocks >= 0], return_counts=True)
        owners = _owners(pool, distinct)
        self._alone, self._kept = distinct[owners <= counts].astype(np.int64), distinct[owners > counts]
        self._saved = pool.save_blocks(self._alone) if len(self._alone) else []
        self.num_blocks = len(self._alone)
        self._finalizer: weakref.finalize[..., SwappedTables] | None = None

    def leave(self) -> None:
        """Give the blocks up; with the lock of the pool since this was made."""
        self._pool.allocator.retain(self._kept)
        self._tables.release()
        release = functools.partial(self._pool.allocator.release, self._kept)
        self._finalizer = weakref.finalize(self, self._pool.budget.abandon, release)
        self._finalizer.atexit = False

    def restore(self, new: Ids) -> None:
        """Make the batch hold its rows again, in these blocks, int64 `[num_blocks]`. Once; with the lock."""
        place = np.arange(int(self._blocks.max(initial=0)) + 2, dtype=np.int32)
        place[-1] = -1  # where -1 points at
        place[self._alone] = new
        try:
            if len(new):
                self._pool.load_blocks(self._saved, new)
            self._tables.hold(place[self._blocks], self._first, self._seq_lens)
        except BaseException:
            self._pool.allocator.release(new)
            raise
        # The rows have their own references by now.
        self._pool.allocator.release(new)
        self._pool.allocator.release(self._kept)
        assert self._finalizer is not None
        self._finalizer.detach()


def _owners(pool: Pool, blocks: np.ndarray) -> np.ndarray:
    """int `[len(blocks)]`: references to each block, but for that of the prefix index."""
    owners: np.ndarray = pool.allocator.ref_counts[blocks]
    if pool.budget.prefix_index is not None:
        owners = owners - np.isin(blocks, pool.budget.prefix_index.blocks(pool.allocator))
    return owners


def _held_by_others(pool: Pool, blocks: np.ndarray) -> np.ndarray:
    """bool `[len(blocks)]`: whether another row than one holds the block; the prefix index is none."""
    held: np.ndarray = (blocks >= 0) & (_owners(pool, blocks) > 1)
    return held


def _nothing() -> None: ...
