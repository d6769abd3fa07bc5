"""Which blocks the sequences of one batch hold, for one group of layers that live alike."""

import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torch_paged.memory.allocator import NO_IDS, Ids

if TYPE_CHECKING:
    from torch_paged.memory.pool import Pool

Ints = NDArray[np.int64]


class BlockTables:
    """One row of block ids per sequence; sequences may share blocks, and get their own copy where they write.

    Every method takes the pool's lock. A caller that goes on to write what `append` made room for holds it from `append` until
    `Pool.copy_blocks` has copied the mapping. Blocks go back to the pool with `release`, or when the object dies.

    Args:
        pool: where the blocks lie.
        num_seqs: rows, each empty at first.

    Attributes:
        seq_lens: int64 `[num_seqs]`, tokens stored per row, those that left the sliding window included. A new array after each edit.
    """

    def __init__(self, pool: "Pool", num_seqs: int) -> None:
        if num_seqs < 0:
            raise ValueError(f"num_seqs: {num_seqs}; must be at least 0")
        self._pool = pool
        self._size = pool.block_size
        self.seq_lens: Ints = np.zeros(num_seqs, dtype=np.int64)
        self._first: Ints = np.zeros(num_seqs, dtype=np.int64)  # per row, the blocks that left the sliding window
        self._rows = _Rows(num_seqs)
        with pool.lock:
            pool.tables.add(self)
        weakref.finalize(self, pool.budget.abandon, partial(_give_back, pool, self._rows)).atexit = False

    @property
    def num_seqs(self) -> int:
        """Rows of the batch."""
        return len(self.seq_lens)

    def append(self, num_tokens: Ints) -> Ints:
        """Make room for new tokens at the end of each row.

        Allocates blocks, gives a row that writes into a partly filled block it shares a copy of its own, and frees blocks that no later
        query sees through the sliding window.

        Args:
            num_tokens: int64 `[num_seqs]`, new tokens per row, 0 allowed.

        Returns:
            block_mapping: int64 `[n, 2]`, rows of (source, destination) to copy before the new tokens are written.

        Raises:
            PoolExhausted: too few blocks are free; nothing has changed.
            ValueError: `num_tokens` has another shape or negative values.

        Source: PagedAttention's copy-on-write, arXiv 2309.06180, section 4.4.
        """
        num_tokens = self._per_row("num_tokens", num_tokens)
        with self._pool.lock:
            self._pool.budget.settle()
            start, end = self.seq_lens, self.seq_lens + num_tokens
            held, needed = self._blocks(start), self._blocks(end)
            copied = self._shared_tails(start, num_tokens)
            first = self._first_in_window(start, num_tokens)
            left = _cells(self._first, first) if first is not self._first else None
            new = _cells(held, needed) if (needed > held).any() else None
            num_new = len(new[0]) if new else 0

            mapping = np.empty((len(copied), 2), dtype=np.int64)
            if num_new or len(copied):
                allocator, table = self._pool.allocator, self._rows.widened(int(needed.max()))
                ids = allocator.allocate(num_new + len(copied), releasing=table[left] if left else NO_IDS)
                if new:
                    table[new] = ids[: num_new]
                if len(copied):
                    tails = copied, held[copied] - 1
                    mapping[:, 0], mapping[:, 1] = table[tails], ids[num_new:]
                    table[tails] = mapping[:, 1]
                    allocator.release(mapping[:, 0])
            elif left:
                self._pool.allocator.release(self._rows.table[left])
            if left:
                self._rows.table[left] = -1
            self._first, self.seq_lens = first, end
            return mapping

    def slots(self, num_tokens: Ints, valid: NDArray[np.bool_] | None, width: int) -> Ints:
        """Where the tokens of the last `append` are written.

        Args:
            num_tokens: int64 `[num_seqs]`, as given to `append`.
            valid: bool `[num_seqs, width]`, the columns that hold a token; each row's number of them is its `num_tokens`. None = all.
            width: columns of the batch.

        Returns:
            slot_mapping: int64 `[num_seqs * width]`, row by row: `block * block_size + offset`, -1 where there is no token.

        Raises:
            ValueError: the arguments do not fit one another or the rows.
        """
        num_tokens = self._per_row("num_tokens", num_tokens)
        if valid is None:
            if (num_tokens != width).any():
                raise ValueError(f"num_tokens: {num_tokens.tolist()}; must be {width} (width) in each row, as valid is None")
            position = (self.seq_lens - width)[:, None] + np.arange(width)
        else:
            valid = np.asarray(valid, dtype=np.bool_)
            if valid.shape != (self.num_seqs, width):
                raise ValueError(f"valid: shape {list(valid.shape)}; must be [{self.num_seqs}, {width}] (num_seqs, width)")
            count = valid.cumsum(axis=1)
            if width and (count[:, -1] != num_tokens).any() or not width and num_tokens.any():
                raise ValueError(f"valid: rows with {valid.sum(axis=1).tolist()} tokens; must be {num_tokens.tolist()} (num_tokens)")
            position = np.where(valid, (self.seq_lens - num_tokens - 1)[:, None] + count, 0)
        if position.size and (position < 0).any():
            raise ValueError(f"num_tokens: {num_tokens.tolist()}; must be at most seq_lens {self.seq_lens.tolist()}")
        if not position.size:
            return NO_IDS
        blocks = np.take_along_axis(self._rows.table, position // self._size, axis=1)
        slots = blocks * np.int64(self._size) + position % self._size
        if valid is not None:
            slots[~valid] = -1
        return slots.ravel()

    def select(self, rows: Ints) -> None:
        """Make old row `rows[i]` the new row `i`: reorder, repeat and drop rows; repeated rows share their blocks.

        Raises:
            ValueError: `rows` is not 1-D or not in `[0, num_seqs)`.
        """
        rows = np.asarray(rows, dtype=np.int64)
        if rows.ndim != 1 or len(rows) and not (0 <= rows.min() and rows.max() < self.num_seqs):
            raise ValueError(f"rows: {rows.tolist()}; must be 1-D in [0, {self.num_seqs}) (num_seqs)")
        with self._pool.lock:
            table = self._rows.table
            more = np.bincount(rows, minlength=self.num_seqs) - 1
            gained = _ids(np.repeat(table, np.maximum(more, 0), axis=0))
            lost = _ids(table[more < 0])
            if len(gained) or len(lost):
                self._pool.allocator.exchange(gained, lost)
            self._rows.table = table[rows]
            self._first, self.seq_lens = self._first[rows], self.seq_lens[rows]

    def crop(self, num_tokens: Ints) -> None:
        """Remove that many tokens from the end of each row.

        Args:
            num_tokens: int64 `[num_seqs]`, 0 allowed.

        Raises:
            ValueError: `num_tokens` has another shape, negative values or more than a row holds, or the row's next query would see
                tokens that have left the sliding window; nothing has changed.
        """
        num_tokens = self._per_row("num_tokens", num_tokens)
        if (num_tokens > self.seq_lens).any():
            raise ValueError(f"num_tokens: {num_tokens.tolist()}; must be at most seq_lens {self.seq_lens.tolist()}")
        with self._pool.lock:
            end = self.seq_lens - num_tokens
            first = np.where(end > 0, self._first, 0)
            window = self._pool.sliding_window
            if window and ((num_tokens > 0) & (np.maximum(end - window + 1, 0) < first * self._size)).any():
                raise ValueError(
                    f"num_tokens: {num_tokens.tolist()}; must leave the window of {window} tokens whole, "
                    f"but each row's first {(self._first * self._size).tolist()} tokens are gone"
                )
            keep = self._blocks(end)
            dropped = _cells(np.maximum(keep, self._first), self._blocks(self.seq_lens))
            if len(dropped[0]):
                self._pool.allocator.release(self._rows.table[dropped])
                self._rows.table[dropped] = -1
            self._first, self.seq_lens = first, end

    def fork(self) -> "BlockTables":
        """A second batch with the same rows, which shares every block."""
        with self._pool.lock:
            other = BlockTables(self._pool, self.num_seqs)
            ids = _ids(self._rows.table)
            if len(ids):
                self._pool.allocator.retain(ids)
            other._rows.table = self._rows.table.copy()
            other._first, other.seq_lens = self._first, self.seq_lens
            return other

    def release(self) -> None:
        """Give every block back; the rows are empty then."""
        with self._pool.lock:
            _give_back(self._pool, self._rows)
            self._first, self.seq_lens = np.zeros_like(self._first), np.zeros_like(self.seq_lens)

    def step(self) -> tuple[Tensor, Tensor]:
        """What the ops read in one forward, on the pool's device.

        Returns:
            block_table: int32 `[num_seqs, width]`, width = blocks of the longest row, at least 1; -1 = no block.
            seq_lens: int32 `[num_seqs]`.
        """
        width = max(1, int(self._blocks(self.seq_lens.max(initial=0))))
        table = torch.from_numpy(self._rows.widened(width)[:, :width].copy())
        seq_lens = torch.from_numpy(self.seq_lens.astype(np.int32))
        return table.to(self._pool.device), seq_lens.to(self._pool.device)

    def fill(self) -> tuple[Ids, Ints]:
        """The blocks the rows hold, int64 `[n]` with repetitions, and how many tokens each row has in them, int64 `[n]`."""
        rows, columns = np.nonzero(self._rows.table >= 0)
        tokens = np.minimum(self.seq_lens[rows] - columns * self._size, self._size)
        return self._rows.table[rows, columns].astype(np.int64), tokens

    def _per_row(self, name: str, values: Ints) -> Ints:
        values = np.asarray(values, dtype=np.int64)
        if values.shape != self.seq_lens.shape:
            raise ValueError(f"{name}: shape {list(values.shape)}; must be [{self.num_seqs}] (num_seqs)")
        if len(values) and values.min() < 0:
            raise ValueError(f"{name}: {values.tolist()}; must be at least 0")
        return values

    def _blocks(self, num_tokens: Any) -> Any:
        return (num_tokens + self._size - 1) // self._size

    def _first_in_window(self, start: Ints, num_tokens: Ints) -> Ints:
        """Per row, the first block that a query at position `start` or later still sees; rows without new tokens keep theirs."""
        window = self._pool.sliding_window
        if not window:
            return self._first
        first = np.where(num_tokens > 0, (start - window + 1) // self._size, 0)
        return np.maximum(first, self._first) if (first > self._first).any() else self._first

    def _shared_tails(self, start: Ints, num_tokens: Ints) -> Ints:
        """Rows that must copy the partly filled block they are about to write into.

        Where all owners of a block write, the first of them keeps it; where another owner only reads, all of them copy.
        """
        if not self._pool.num_shared:
            return NO_IDS
        rows = np.flatnonzero((num_tokens > 0) & (start % self._size > 0))
        tails = self._rows.table[rows, start[rows] // self._size]
        refs = self._pool.allocator.ref_counts[tails]
        rows, tails, refs = rows[refs > 1], tails[refs > 1], refs[refs > 1]
        if not len(rows):
            return NO_IDS
        _, first, writers = np.unique(tails, return_index=True, return_counts=True)
        return np.delete(rows, first[writers == refs[first]])


class _Rows:
    """The block ids of a batch, int32 `[num_seqs, capacity]`, -1 = none: what outlives a BlockTables until it is given back."""

    def __init__(self, num_seqs: int) -> None:
        self.table: NDArray[np.int32] = np.full((num_seqs, 1), -1, dtype=np.int32)

    def widened(self, width: int) -> NDArray[np.int32]:
        """The table with at least `width` columns."""
        num_seqs, capacity = self.table.shape
        if width > capacity:
            table = np.full((num_seqs, max(width, 2 * capacity)), -1, dtype=np.int32)
            table[:, :capacity] = self.table
            self.table = table
        return self.table


def _give_back(pool: "Pool", rows: _Rows) -> None:
    ids = _ids(rows.table)
    if len(ids):
        pool.allocator.release(ids)
    rows.table[:] = -1


def _ids(table: NDArray[np.int32]) -> NDArray[Any]:
    return table[table >= 0]


def _cells(first: Ints, end: Ints) -> tuple[Ints, Ints]:
    """(rows, columns) of the table cells `first[row] <= column < end[row]`, row by row."""
    count = np.maximum(end - first, 0)
    rows = np.repeat(np.arange(len(count)), count)
    return rows, np.arange(len(rows)) - np.repeat(count.cumsum() - count - first, count)
