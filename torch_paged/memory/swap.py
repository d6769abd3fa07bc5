"""SwappedRow: the tokens of one row in CPU memory while its blocks serve others."""

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
        keeps_blocks: whether some stay, held for this row.

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
        self.num_blocks, self.keeps_blocks = len(alone), bool(len(kept))
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


def _held_by_others(pool: Pool, blocks: np.ndarray) -> np.ndarray:
    """bool `[len(blocks)]`: whether another row than one holds the block; the prefix index is none."""
    owners = np.where(blocks >= 0, pool.allocator.ref_counts[blocks], 0)
    if pool.budget.prefix_index is not None:
        owners = owners - np.isin(blocks, pool.budget.prefix_index.blocks(pool.allocator))
    held: np.ndarray = owners > 1
    return held


def _nothing() -> None: ...
