"""CacheState: what the layers of one PagedCache share, their groups, the stored columns, the current call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from torch_paged.hf.call import Call, Columns, NeedsOwnAttention
from torch_paged.hf.finished import Finished
from torch_paged.hf.group import LayerGroup
from torch_paged.hf.pools import GroupKey, Pools
from torch_paged.hf.seen_mask import SeenMask
from torch_paged.hf.support import Path, Support
from torch_paged.hf.voice import Voice

if TYPE_CHECKING:
    from torch_paged.hf.prefixes import RowPrefixes


class CacheState:
    """Layers point here and this points at no layer: a dropped cache is freed at once, without the cycle collector."""

    def __init__(self, pools: Pools, layers_per_window: dict[int, int], voice: Voice | None = None) -> None:
        self.pools = pools
        self.layers_per_window = layers_per_window
        self.voice = voice
        self.groups: dict[GroupKey, LayerGroup] = {}
        self.columns = Columns()
        self.call: Call | None = None
        self.num_seqs: int | None = None
        self.recording_past = False
        # What is remembered of these rows, and whether they began with what was remembered of others.
        self.prefixes: RowPrefixes | None = None
        self.adopted = False
        # What the decoding that runs says of its rows, if it does.
        self.finished: Finished | None = None
        self.seen_mask = SeenMask()
        # The model, by its id, and the newest hook there was when it was found to run packed calls over this cache.
        self.packs: tuple[int, int] | None = None
        # Why calls over this cache must gather, once one was found to.
        self.refusal: str | None = None
        # Its rows are put aside one by one when blocks run out; else the call waits as a whole for those of others.
        self.divides = False
        # Columns that the mask hides are stored as others are.
        self.keeps_pads = False
        # Who decodes reads the order of the rows from their device beside what else it waits for, and settles it.
        self.order_is_read_late = False
        self.order: Tensor | None = None

    def announce(self, call: Call) -> Call:
        """Make `call` the forward pass that the layers' next updates belong to."""
        self.check_rows(call.num_seqs)
        self.num_seqs = call.num_seqs
        self.call = call
        self.columns.append(call)
        return call

    def check_rows(self, num_seqs: int) -> None:
        """Raises: ValueError, if the cache holds another number of rows."""
        self.settle_order()
        if self.num_seqs not in (None, num_seqs):
            raise ValueError(f"batch size: {num_seqs}; must be {self.num_seqs}, the rows this PagedCache holds")

    def forget_handles(self) -> None:
        """Let go of what layers gave the model in the pass that is over, and with it of the layers."""
        for group in self.groups.values():
            group.seen = None

    def keep_pads(self, reason: str) -> None:
        """Gather all calls of an empty cache, pads too, as the reason says."""
        self.refusal, self.keeps_pads = reason, True

    def let_finished_leave(self) -> None:
        """Free the blocks of the rows that are finished by now; later calls do not compute them."""
        rows = None if self.finished is None else self.finished.rows()
        gone = self.columns.gone
        if rows is None or not (rows if gone is None else rows & ~gone).any():
            return
        assert self.finished is not None
        self.finished.before_leaving(rows, self.finished.sequences)
        for group in self.groups.values():
            group.empty(np.flatnonzero(rows))
        self.columns.leave(rows.copy())
        self.call = None

    def say_unannounced(self) -> None:
        """Tell of a forward pass that no patched model announced; raise ValueError if strict."""
        if self.voice is not None:
            reason = "a cache is used past the call of a patched model: torch_paged.patch(model), then model(...)"
            self.voice.say(Support(Path.GATHER, reason), strict=self.pools.config.strict)

    @property
    def seq_lens(self) -> np.ndarray:
        """int64 `[num_seqs]`, tokens stored of each row, those behind a sliding window included."""
        for group in self.groups.values():
            return group.tables.seq_lens
        return np.zeros(self.num_seqs or 0, dtype=np.int64)

    def group(self, key: GroupKey) -> LayerGroup:
        group = self.groups.get(key)
        if group is None:
            assert self.num_seqs is not None
            if self.adopted:
                raise NeedsOwnAttention("its layers store other keys and values than in the calls before")
            pool = self.pools.get(key, self.layers_per_window[key.sliding_window])
            group = self.groups[key] = LayerGroup(pool, key, self.num_seqs)
            if self.recording_past:
                group.record_past()
        return group

    def adopt(self, lengths: np.ndarray, blocks: dict[GroupKey, list[np.ndarray]]) -> None:
        """Let the rows of an empty cache begin with blocks that hold their first tokens already.

        Args:
            lengths: int64 `[num_seqs]`, tokens per row, multiples of the block size.
            blocks: for each group, and each row, the blocks of these tokens.
        """
        self.num_seqs = len(lengths)
        try:
            for key, rows in blocks.items():
                self.group(key).adopt(lengths, rows)
        except BaseException:
            self.release()
            raise
        self.adopted = True

    def rollback(self, call: Call) -> None:
        """Undo `announce(call)` and what the groups planned for it."""
        for group in self.groups.values():
            group.rollback(call)
        if self.call is call:
            self.columns.crop(call.width)
            self.call = None
            if self.columns.count == 0 and not self.seq_lens.any():
                self.release()

    def go_back(self, columns: int, seq_lens: np.ndarray) -> None:
        """Drop the columns and tokens that came after these."""
        self.columns.crop(self.columns.count - columns)
        for group in self.groups.values():
            group.crop(group.tables.seq_lens - seq_lens)
        self.call = None

    def copy_rows(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """Make rows share all that other rows hold.

        Args:
            copies: (row, source, ...), no source among the rows.
        """
        assert self.num_seqs is not None
        rows = np.arange(self.num_seqs)
        for row, source, *_ in copies:
            rows[row] = source
        for group in self.groups.values():
            group.select(rows)

    @contextmanager
    def past_kept(self) -> Iterator[None]:
        """Keep the blocks that leave a sliding window meanwhile, so that `go_back` can."""
        if self.recording_past or not self.columns.count:
            yield
            return
        self.record_past()
        try:
            yield
        finally:
            self.recording_past = False
            for group in self.groups.values():
                group.tables.record_past = False
                group.drop_past()

    def crop(self, width: int) -> None:
        self.settle_order()
        dropped = self.columns.crop(min(width, self.columns.count))
        self.seen_mask.forget()
        assert self.num_seqs is not None
        for group in self.groups.values():
            group.crop(np.broadcast_to(np.asarray(dropped, dtype=np.int64), (self.num_seqs,)))
            if self.recording_past:
                group.drop_past()
        self.call = None

    def crop_rows(self, num_tokens: np.ndarray) -> None:
        """Drop the last tokens of each row, int64 `[num_seqs]`, of a cache that packed calls alone have filled."""
        for group in self.groups.values():
            group.crop(num_tokens)
            if self.recording_past:
                group.drop_past()
        self.call = None

    def empty(self, rows: np.ndarray) -> None:
        """Give the blocks of these rows back; they stay rows of the batch, without tokens."""
        for group in self.groups.values():
            group.empty(rows)
        self.call = None

    def select(self, rows: Tensor | Sequence[int]) -> None:
        """Row i becomes what row `rows[i]` was: reorder, repeat and drop are all this, and move no KV byte.

        Args:
            rows: what indexes a tensor's rows: ints, negative ones from the end, or bool `[num_seqs]`.
        """
        self.settle_order()
        if self.num_seqs is None:
            return
        indices = np.arange(self.num_seqs)[torch.as_tensor(rows).cpu().numpy()]
        for group in self.groups.values():
            group.select(indices)
        if not self.columns.same_after(indices):
            self.seen_mask.forget()
        self.columns.select(indices)
        self.num_seqs = len(indices)
        self.call = None

    def reorder(self, rows: Tensor) -> None:
        """`select` of int64 `[num_seqs]`, or later where these would have to be waited for."""
        if self.order_is_read_late and rows.device.type != "cpu":
            self.order = rows
        else:
            self.select(rows)

    def settle_order(self, rows: Tensor | None = None) -> None:
        """`select` what is to be; `rows` are it, on the CPU."""
        if self.order is not None:
            rows, self.order = self.order if rows is None else rows, None
            self.select(rows)

    def record_past(self) -> None:
        self.recording_past = True
        for group in self.groups.values():
            group.record_past()

    def fork(self) -> CacheState:
        """A state of its own over the same blocks; whoever writes a shared block first gets a copy of it."""
        self.settle_order()
        twin = CacheState(self.pools, self.layers_per_window, self.voice)
        twin.groups = {key: group.fork() for key, group in self.groups.items()}
        twin.columns = self.columns.copy()
        twin.num_seqs = self.num_seqs
        twin.recording_past = self.recording_past
        twin.adopted = self.adopted
        twin.refusal, twin.keeps_pads = self.refusal, self.keeps_pads
        return twin

    def release(self) -> None:
        for group in self.groups.values():
            group.release()
        self.groups.clear()
        self.columns = Columns()
        self.seen_mask.forget()
        self.refusal, self.keeps_pads = None, False
        self.adopted, self.order = False, None
        self.call = None
        self.num_seqs = None
