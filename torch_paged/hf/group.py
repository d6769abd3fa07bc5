"""LayerGroup: the block tables of the cache layers that live alike, and the plan of the current forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from torch_paged.hf.call import Call
from torch_paged.hf.pools import GroupKey
from torch_paged.memory import BlockTables, Pool, SwappedRow, SwappedTables

if TYPE_CHECKING:
    from torch_paged.hf.paged_kv import PagedKV


@dataclass(frozen=True)
class Step:
    """The tensors that every layer of a group shares in one forward pass, made once.

    Attributes:
        block_table: int32 `[num_seqs, blocks]`, -1 = no block; in a packed call the rows that have tokens in it.
        seq_lens: int32 `[num_seqs]`, the new tokens included.
        cu_seqlens_q: int32 `[num_seqs + 1]` into the query rows.
        slot_mapping: int64 `[num_seqs * width]`, -1 where a column is not stored; packed `[tokens]`.
        query_rows: int64, the rows of the flattened query to attend with; None: all, pads lie before position 0.
    """

    block_table: Tensor
    seq_lens: Tensor
    cu_seqlens_q: Tensor
    slot_mapping: Tensor
    query_rows: Tensor | None
    max_query_len: int


class LayerGroup:
    """One batch's tables in one pool. Every table edit happens here, once for all layers of the group."""

    def __init__(self, pool: Pool, key: GroupKey, num_seqs: int) -> None:
        self.pool = pool
        self.key = key
        with pool.lock:
            self.tables = BlockTables(pool, num_seqs)
        self.num_layers = 0
        self.call: Call | None = None
        self.step: Step | None = None
        # In the forward pass `call`: the shapes of K and V that were checked, and what the last layer gave the model,
        # which refers to that layer and must not outlive the pass.
        self.written: tuple[torch.Size, torch.Size] | None = None
        self.seen: tuple[PagedKV, PagedKV] | None = None

    @property
    def num_bytes(self) -> int:
        """Of the blocks that its rows hold, shared ones once."""
        return len(np.unique(self.tables.tokens_in_blocks()[0])) * self.pool.block_bytes

    def plan(self, call: Call) -> Step:
        """Blocks, slots and tensors for `call`; the first layer that asks does the work."""
        if self.call is call and self.step is not None:
            return self.step
        with self.pool.lock:
            self.tables.append(call.num_tokens, self.pool.copy_blocks)
            # From here on a rollback has something to undo.
            self.call, self.step = call, None
            self.written = self.seen = None
            if call.packed is None:
                slots = self.tables.slots(call.num_tokens, call.valid, call.width)
                block_table, seq_lens = self.tables.step()
            else:
                slots = self.tables.packed_slots(call.num_tokens)
                block_table, seq_lens = self.tables.step(np.flatnonzero(call.num_tokens))
        device = self.key.device
        rows, max_query_len = None, call.width
        if call.left_padded:
            starts = np.arange(call.num_seqs + 1, dtype=np.int32) * np.int32(call.width)
        else:
            lengths = call.num_tokens if call.packed is None else call.num_tokens[call.num_tokens > 0]
            starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
            max_query_len = int(lengths.max(initial=0))
            if call.valid is not None and call.packed is None:
                rows = torch.from_numpy(np.flatnonzero(call.valid)).to(device)
        self.step = Step(
            block_table=block_table,
            seq_lens=seq_lens,
            cu_seqlens_q=torch.from_numpy(starts).to(device),
            slot_mapping=torch.from_numpy(slots).to(device),
            query_rows=rows,
            max_query_len=max_query_len,
        )
        return self.step

    def adopt(self, lengths: np.ndarray, blocks: list[np.ndarray]) -> None:
        """Begin each row with `lengths[row]` tokens in `blocks[row]`, of which a sliding group holds the last ones."""
        table = np.full((len(lengths), max(map(len, blocks))), -1, dtype=np.int64)
        window = self.pool.sliding_window
        for row, (length, ids) in enumerate(zip(lengths.tolist(), blocks, strict=True)):
            first = max(0, (length - window + 1) // self.pool.block_size) if window else 0
            table[row, first : len(ids)] = ids[first:]
        with self.pool.lock:
            self.tables.adopt(table, lengths)

    def select(self, rows: np.ndarray) -> None:
        with self.pool.lock:
            self.tables.select(rows)
        self.call = self.step = None

    def crop(self, num_tokens: np.ndarray) -> None:
        with self.pool.lock:
            self.tables.crop(num_tokens)
        self.call = self.step = None

    def rollback(self, call: Call) -> None:
        """Undo `plan(call)`, for a forward pass that did not finish."""
        if self.call is call:
            self.crop(call.num_tokens)

    def empty(self, rows: np.ndarray) -> None:
        with self.pool.lock:
            self.tables.empty(rows)
        self.call = self.step = None

    def record_past(self) -> None:
        self.tables.record_past = True

    def drop_past(self) -> None:
        """Free what left the window and was recorded for a crop."""
        with self.pool.lock:
            self.tables.drop_past()

    def fork(self) -> LayerGroup:
        """The same rows once more, every block shared."""
        twin = object.__new__(LayerGroup)
        twin.pool, twin.key, twin.num_layers = self.pool, self.key, self.num_layers
        twin.call = twin.step = twin.written = twin.seen = None
        with self.pool.lock:
            twin.tables = self.tables.fork()
        return twin

    def swap_out(self, row: int) -> SwappedRow:
        """The tokens of a row in CPU memory; the row is empty then."""
        self.call = self.step = None
        return SwappedRow(self.pool, self.tables, row)

    def swap_out_all(self) -> SwappedTables:
        """The tokens of all rows in CPU memory; they are here still until it leaves."""
        self.call = self.step = None
        return SwappedTables(self.pool, self.tables)

    def swap_in(self, swapped: SwappedRow, row: int, blocks: np.ndarray) -> None:
        """Make an empty row hold its tokens again, in these blocks, int64 `[swapped.num_blocks]`."""
        self.call = self.step = None
        swapped.restore(self.tables, row, blocks)

    def release(self) -> None:
        with self.pool.lock:
            self.tables.release()
        self.call = self.step = None
