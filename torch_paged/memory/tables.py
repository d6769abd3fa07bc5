"""Which blocks the sequences of one batch hold, for one group of layers that live alike."""

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torch_paged.memory.allocator import NO_IDS, Ids
from torch_paged.memory.table_rows import Ints, TableRows, cells

if TYPE_CHECKING:
    from torch_paged.memory.pool import Pool


class BlockTables:
    """One row of block ids per sequence; sequences may share blocks, and get their own copy where they write.

    Every method takes the pool's lock; a caller that itself copies what `append` maps holds it until it has. Blocks go
    back to the pool with `release`, or when the object dies.

    Args:
        pool: where the blocks lie.
        num_seqs: rows, each empty at first.

    Attributes:
        seq_lens: int64 `[num_seqs]`, tokens stored per row, those that left the sliding window included. Every edit
            puts a new array here.
        record_past: True keeps the blocks that leave the sliding window until `drop_past`, so that `crop` may go back.

    Raises:
        ValueError: `num_seqs` is negative.
    """

    def __init__(self, pool: "Pool", num_seqs: int) -> None:
        if num_seqs < 0:
            raise ValueError(f"num_seqs: {num_seqs}; must be at least 0")
        self.record_past = False
        self._pool = pool
        self._size = pool.block_size
        self.seq_lens: Ints = np.zeros(num_seqs, dtype=np.int64)
        self._first: Ints = np.zeros(num_seqs, dtype=np.int64)  # per row, the blocks that left the sliding window
        self._rows = TableRows(np.full((num_seqs, 1), -1, dtype=np.int32))
        with pool.lock:
            pool.tables.add(self)
        weakref.finalize(self, pool.budget.abandon, self._rows.give_back).atexit = False

    @property
    def num_seqs(self) -> int:
        """Rows of the batch."""
        return len(self.seq_lens)

    def append(self, num_tokens: Ints, copy_blocks: Callable[[Ints], None] | None = None) -> Ints:
        """Make room for new tokens at the end of each row.

        Allocates blocks, gives a row that writes into a partly filled block it shares a copy of its own, and frees the
        blocks that no later query sees through the sliding window.

        Args:
            num_tokens: int64 `[num_seqs]`, new tokens per row, 0 allowed.
            copy_blocks: called with the block mapping, usually `Pool.copy_blocks`. Where it raises, rows and blocks
                are what they were, but for blocks that left the window. None leaves the copying to the caller.

        Returns:
            block_mapping: int64 `[n, 2]`, rows of (source, destination) to copy before the new tokens are written.

        Raises:
            PoolExhausted: too few blocks are free; nothing has changed.
            ValueError: `num_tokens` has another shape or negative values; nothing has changed.

        Source: PagedAttention's copy-on-write, arXiv 2309.06180, section 4.4.
        """
        num_tokens = self._per_row(num_tokens)
        with self._pool.lock:
            self._pool.budget.settle()
            start, end = self.seq_lens, self.seq_lens + num_tokens
            held, needed = self._num_blocks(start), self._num_blocks(end)
            first = self._first_in_window(start, num_tokens)
            left = cells(self._first, first)
            new = cells(held, needed)
            copied = self._shared_tails(start, num_tokens)

            mapping = np.empty((len(copied), 2), dtype=np.int64)
            if len(new[0]) or len(copied) or len(left[0]):
                table, allocator = self._rows.widened(needed), self._pool.allocator
                ids = allocator.allocate(len(new[0]) + len(copied), releasing=table[left])
                self._rows.allocator = allocator
                table[left] = -1
                self._first = first
                tails = copied, held[copied] - 1
                mapping[:, 0], mapping[:, 1] = table[tails], ids[len(new[0]) :]
                if copy_blocks is not None:
                    try:
                        copy_blocks(mapping)
                    except BaseException:
                        allocator.release(ids)
                        raise
                table[new] = ids[: len(new[0])]
                table[tails] = mapping[:, 1]
                allocator.release(mapping[:, 0])
            self._first, self.seq_lens = first, end
            return mapping

    def slots(self, num_tokens: Ints, valid: NDArray[np.bool_] | None, width: int) -> Ints:
        """Where the tokens of the last `append` are written.

        Args:
            num_tokens: int64 `[num_seqs]`, as given to `append`.
            valid: bool `[num_seqs, width]`, the columns that hold a token, `num_tokens` of them per row. None = all.
            width: columns of the batch.

        Returns:
            slot_mapping: int64 `[num_seqs * width]`, row by row: `block * block_size + offset`, -1 where no token is.

        Raises:
            ValueError: the arguments do not fit one another or the rows.
        """
        num_tokens = self._per_row(num_tokens, at_most=self.seq_lens)
        if valid is None:
            columns, count = np.arange(width), np.full(self.num_seqs, width)
        else:
            valid = np.asarray(valid, dtype=np.bool_)
            if valid.shape != (self.num_seqs, width):
                raise ValueError(f"valid: shape {list(valid.shape)}; must be [{self.num_seqs}, {width}]")
            columns, count = np.where(valid, valid.cumsum(axis=1, dtype=np.int64) - 1, 0), valid.sum(axis=1)
        if (count != num_tokens).any():
            raise ValueError(f"valid: {count.tolist()} tokens per row; must be {num_tokens.tolist()} (num_tokens)")
        position = (self.seq_lens - num_tokens)[:, None] + columns
        # A row that appends nothing may end where no block begins: any of its columns will do, the slot is -1.
        column = np.minimum(position // self._size, self._rows.table.shape[1] - 1)
        block = self._rows.table[np.arange(self.num_seqs)[:, None], column]
        slots: Ints = block * np.int64(self._size) + position % self._size
        if valid is not None:
            slots[~valid] = -1
        return slots.ravel()

    def adopt(self, blocks: Ids, num_tokens: Ints) -> None:
        """Begin empty rows with blocks that hold their first tokens, shared with whoever holds them.

        Args:
            blocks: int64 `[num_seqs, width]`, per row the blocks of its first tokens, -1 where a block lies before what
                the sliding window shows the next token, or behind the row's tokens.
            num_tokens: int64 `[num_seqs]`, tokens in them; 0 leaves a row as it is.

        Raises:
            ValueError: a row is not empty, or `blocks` does not hold `num_tokens` or a free block; nothing has changed.
        """
        num_tokens = self._per_row(num_tokens)
        with self._pool.lock:
            adopting = num_tokens > 0
            if self.seq_lens[adopting].any():
                raise ValueError(f"num_tokens: {num_tokens.tolist()}; must be 0 for rows that hold tokens")
            first = np.where(adopting, self._behind_window(num_tokens), 0)
            held = cells(first, self._num_blocks(num_tokens))
            needed = np.zeros(blocks.shape, dtype=np.bool_)
            if len(blocks) != self.num_seqs or (held[1] >= blocks.shape[1]).any():
                raise ValueError(f"blocks: shape {list(blocks.shape)}; must hold {num_tokens.tolist()} tokens per row")
            needed[held] = True
            if ((blocks >= 0) != needed).any():
                raise ValueError(
                    f"blocks: {blocks.tolist()}; must be those of {num_tokens.tolist()} tokens per row, as far as the "
                    "next token sees them, and -1 elsewhere"
                )
            self._pool.allocator.retain(blocks[held])
            self._rows.allocator = self._pool.allocator
            self._rows.widened(self._num_blocks(num_tokens))[held] = blocks[held]
            self._first = np.where(adopting, first, self._first)
            self.seq_lens = self.seq_lens + num_tokens

    def blocks(self, row: int) -> Ids:
        """The blocks of one row, int64 `[blocks of its tokens]`, -1 where they left the sliding window."""
        ids: Ids = self._rows.table[row, : self._num_blocks(self.seq_lens[row])].astype(np.int64)
        return ids

    def packed_slots(self, num_tokens: Ints) -> Ints:
        """`slots` of rows that stand one after the other, without columns in between.

        Args:
            num_tokens: int64 `[num_seqs]`, as given to `append`.

        Returns:
            slot_mapping: int64 `[num_tokens.sum()]`, row by row.

        Raises:
            ValueError: `num_tokens` has another shape, negative values or more than a row holds.
        """
        num_tokens = self._per_row(num_tokens, at_most=self.seq_lens)
        rows = np.repeat(np.arange(self.num_seqs), num_tokens)
        before = num_tokens.cumsum() - num_tokens
        position = np.arange(len(rows)) + np.repeat(self.seq_lens - num_tokens - before, num_tokens)
        block = self._rows.table[rows, position // self._size].astype(np.int64)
        slots: Ints = block * self._size + position % self._size
        return slots

    def select(self, rows: Ints) -> None:
        """Make old row `rows[i]` the new row `i`: reorder, repeat and drop rows; repeated rows share their blocks.

        Raises:
            ValueError: `rows` is not 1-D or not in `[0, num_seqs)`; nothing has changed.
        """
        rows = np.asarray(rows, dtype=np.int64)
        if rows.ndim != 1 or ((rows < 0) | (rows >= self.num_seqs)).any():
            raise ValueError(f"rows: {rows.tolist()}; must be 1-D and in [0, {self.num_seqs}) (num_seqs)")
        with self._pool.lock:
            old = self._rows.table
            new = old[rows]
            # Beams of one prompt differ in their last blocks only: cells that stay as they are cost nothing.
            both = min(len(old), len(new))
            changed = old[:both] != new[:both]
            gained = np.concatenate([new[:both][changed], new[both:].ravel()])
            lost = np.concatenate([old[:both][changed], old[both:].ravel()])
            self._rows.exchange(gained[gained >= 0], lost[lost >= 0])
            self._rows.table = new
            self._first, self.seq_lens = self._first[rows], self.seq_lens[rows]

    def crop(self, num_tokens: Ints) -> None:
        """Remove that many tokens from the end of each row.

        Args:
            num_tokens: int64 `[num_seqs]`, 0 allowed.

        Raises:
            ValueError: `num_tokens` has another shape, negative values or more than a row holds, or the next query of a
                row that is not empty then would see tokens that are gone from the sliding window; nothing has changed.
        """
        num_tokens = self._per_row(num_tokens, at_most=self.seq_lens)
        with self._pool.lock:
            end = self.seq_lens - num_tokens
            gone = self._first * self._size
            window = self._pool.sliding_window
            if window and ((num_tokens > 0) & (end > 0) & (np.maximum(end - window + 1, 0) < gone)).any():
                raise ValueError(
                    f"num_tokens: {num_tokens.tolist()}; must leave the last {window} tokens (sliding_window) of each "
                    f"row whole, of which the first {gone.tolist()} are gone and {self.seq_lens.tolist()} were stored"
                )
            keep = np.maximum(self._num_blocks(end), self._first)
            dropped = cells(keep, self._num_blocks(self.seq_lens))
            self._rows.exchange(NO_IDS, self._rows.table[dropped])
            self._rows.table[dropped] = -1
            self._first, self.seq_lens = np.where(end > 0, self._first, 0), end

    def empty(self, rows: Ints) -> None:
        """Give the blocks of these rows back, at once; they stay rows of the batch, without tokens.

        Args:
            rows: int64, in `[0, num_seqs)`.
        """
        with self._pool.lock:
            held = self._rows.table[rows]
            self._rows.exchange(NO_IDS, held[held >= 0])
            self._rows.table[rows] = -1
            lengths, first = self.seq_lens.copy(), self._first.copy()
            lengths[rows] = first[rows] = 0
            self.seq_lens, self._first = lengths, first

    def drop_past(self) -> None:
        """Free the blocks that left the sliding window and were kept for `crop`."""
        with self._pool.lock:
            first = self._behind_window(self.seq_lens)
            left = cells(self._first, first)
            self._rows.exchange(NO_IDS, self._rows.table[left])
            self._rows.table[left] = -1
            self._first = first

    def fork(self) -> "BlockTables":
        """A second batch with the same rows, which shares every block."""
        with self._pool.lock:
            other = BlockTables(self._pool, self.num_seqs)
            other.record_past = self.record_past
            other._rows.allocator = self._rows.allocator
            other._rows.exchange(self._rows.ids(), NO_IDS)
            other._rows.table = self._rows.table.copy()
            other._first, other.seq_lens = self._first, self.seq_lens
            return other

    def release(self) -> None:
        """Give every block back; the rows are empty then."""
        with self._pool.lock:
            self._rows.give_back()
            self._first, self.seq_lens = np.zeros_like(self._first), np.zeros_like(self.seq_lens)

    def held(self) -> tuple[NDArray[np.int32], Ints, Ints]:
        """What `hold` makes the same rows of again: block ids `[num_seqs, width]`, blocks gone per row, `seq_lens`."""
        return self._rows.table.copy(), self._first, self.seq_lens

    def hold(self, blocks: NDArray[np.int32], first: Ints, seq_lens: Ints) -> None:
        """Make empty rows those that `held` returned, in these blocks, which get a reference for each row.

        Raises:
            ValueError: a row is not empty, or a block is free; nothing has changed.
        """
        with self._pool.lock:
            if self.seq_lens.any() or len(blocks) != self.num_seqs:
                raise ValueError(f"blocks: {len(blocks)} rows; must be {self.num_seqs}, and those here empty")
            self._pool.allocator.exchange(blocks[blocks >= 0], NO_IDS)
            self._rows.allocator = self._pool.allocator
            self._rows.table = blocks
            self._first, self.seq_lens = first, seq_lens

    def step(self, rows: Ints | None = None) -> tuple[Tensor, Tensor]:
        """What the ops read in one forward, on the pool's device.

        Args:
            rows: int64, the rows that the forward has, in its order. None = all.

        Returns:
            block_table: int32 `[num_seqs, width]`, width = blocks of the longest row, at least 1; -1 = no block.
            seq_lens: int32 `[num_seqs]`.
        """
        lengths = self.seq_lens if rows is None else self.seq_lens[rows]
        width = max(1, int(self._num_blocks(lengths).max(initial=0)))
        # A copy: a later edit must not reach into a forward that still reads this table.
        table = self._rows.table[:, :width].copy() if rows is None else self._rows.table[rows, :width]
        block_table = torch.from_numpy(table)
        seq_lens = torch.from_numpy(lengths.astype(np.int32))
        return block_table.to(self._pool.device), seq_lens.to(self._pool.device)

    def tokens_in_blocks(self) -> tuple[Ids, Ints]:
        """The blocks of all rows, int64 `[n]` with repetitions, and the tokens each row has in them, int64 `[n]`."""
        rows, columns = np.nonzero(self._rows.table >= 0)
        tokens = np.minimum(self.seq_lens[rows] - columns * self._size, self._size)
        return self._rows.table[rows, columns].astype(np.int64), tokens

    def _per_row(self, num_tokens: Ints, at_most: Ints | None = None) -> Ints:
        num_tokens = np.asarray(num_tokens, dtype=np.int64)
        if num_tokens.shape != self.seq_lens.shape:
            raise ValueError(f"num_tokens: shape {list(num_tokens.shape)}; must be [{self.num_seqs}] (num_seqs)")
        if (num_tokens < 0).any():
            raise ValueError(f"num_tokens: {num_tokens.tolist()}; must be at least 0")
        if at_most is not None and (num_tokens > at_most).any():
            raise ValueError(f"num_tokens: {num_tokens.tolist()}; must be at most {at_most.tolist()} (seq_lens)")
        return num_tokens

    def _num_blocks(self, num_tokens: Ints) -> Ints:
        return (num_tokens + (self._size - 1)) // self._size

    def _first_in_window(self, start: Ints, num_tokens: Ints) -> Ints:
        """Per row, the first block that a query at `start` or later sees; a row without new tokens keeps its own."""
        return self._first if self.record_past else np.where(num_tokens > 0, self._behind_window(start), self._first)

    def _behind_window(self, start: Ints) -> Ints:
        """Per row, how many blocks no query at `start` or later sees, at least those that are gone."""
        window = self._pool.sliding_window
        return np.maximum(self._first, (start - window + 1) // self._size) if window else self._first

    def _shared_tails(self, start: Ints, num_tokens: Ints) -> Ints:
        """Rows that must copy the partly filled block they are about to write into.

        Where all owners of a block write, the first of them keeps it; where another owner only reads, all of them copy.
        """
        if not self._pool.num_shared:
            return NO_IDS
        rows = np.flatnonzero((num_tokens > 0) & (start % self._size > 0))
        tails = self._rows.table[rows, start[rows] // self._size]
        owners = self._pool.allocator.ref_counts[tails]
        rows, tails, owners = rows[owners > 1], tails[owners > 1], owners[owners > 1]
        _, first, writers = np.unique(tails, return_index=True, return_counts=True)
        return np.delete(rows, first[writers == owners[first]])
