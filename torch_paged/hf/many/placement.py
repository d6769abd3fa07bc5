"""Placement: sequences get rows of the cache and give them up, with what the rows hold."""

from __future__ import annotations

import numpy as np

from torch_paged.hf.many.batch import Batch
from torch_paged.hf.many.drafts import Drafts
from torch_paged.hf.many.rows import Rows
from torch_paged.hf.many.sequence import Sequence
from torch_paged.hf.many.stats import Counts
from torch_paged.hf.many.waiting import Waiting
from torch_paged.hf.passes import common_prefix


class Placement:
    """Moves sequences between the rows and those that wait.

    Args:
        waiting: where sequences go that lose their row.
        swaps: the tokens of a preempted sequence go to CPU memory, as far as it holds them, and come back with it;
            else they are dropped, and computed again.
    """

    def __init__(
        self, batch: Batch, rows: Rows, waiting: Waiting, drafts: Drafts, counts: Counts, *, swaps: bool
    ) -> None:
        self._batch, self._rows, self._waiting, self._drafts = batch, rows, waiting, drafts
        self._counts, self._swaps = counts, swaps

    def place(self, sequence: Sequence) -> int:
        """Give the sequence a row; tokens that it begins with already.

        Raises:
            PoolExhausted: too few blocks are free for what is in CPU memory; the sequence has no row.
        """
        row = self._rows.place(sequence)
        if sequence.swapped is not None:
            try:
                is_back = self._batch.swap_in(sequence.swapped, row)
            except BaseException:
                self._rows.take(row)
                raise
            if is_back:
                begun = self._rows.computed[row] = sequence.swapped.num_tokens
                self._rows.prefill[row] = sequence.num_prompt_tokens
                if sequence.swapped_drafts is not None:
                    self._drafts.swap_in(sequence.swapped_drafts, row)
                sequence.forget_swapped()
                return begun
            sequence.forget_swapped()
        if sequence.prefixes is None:
            return 0
        cached = self._batch.adopt(row, sequence.tokens, sequence.prefixes)
        self._rows.computed[row] = cached
        self._counts.tokens_saved += cached
        if not sequence.num_preemptions:
            sequence.num_cached_tokens = cached
        return cached

    def begins_with_what_is_being_computed(self, sequence: Sequence) -> bool:
        """Whether a row that runs is about to compute, and remember, a long beginning of this sequence's tokens."""
        at_least, most = self._batch.handle.config.min_shared_prefix, len(sequence.tokens) - 1
        if sequence.prefixes is None or sequence.swapped is not None or not 0 < at_least <= most:
            return False
        rows = self._rows
        for row in rows.used[rows.computed[rows.used] < rows.prefill[rows.used]].tolist():
            other = rows.sequence(row)
            if other.prefixes is None or other.prefixes.salt != sequence.prefixes.salt:
                continue
            common = common_prefix(rows.of_row(row)[: rows.prefill[row]], sequence.tokens[:most])
            if common >= at_least and common > self._batch.num_remembered(sequence):
                return True
        return False

    def leave(self, row: int) -> Sequence:
        """Take a sequence out of its row; what the row holds is remembered where it shall be, and free."""
        self.remember(row)
        self._batch.empty(np.array([row]))
        self._drafts.empty(row)
        return self._rows.take(row)

    def put_back(self, row: int) -> None:
        """Let a sequence wait, to be computed from the beginning."""
        self._waiting.put_back(self.leave(row))

    def preempt(self, row: int) -> None:
        """Let a sequence wait, with what its row holds in CPU memory if it can be there."""
        sequence, computed = self._rows.sequence(row), int(self._rows.computed[row])
        sequence.num_preemptions += 1
        self._counts.preemptions += 1
        if self._swaps and computed:
            self.remember(row)
            sequence.swapped = self._batch.swap_out(row)
            if sequence.swapped is not None:
                self._counts.swaps += 1
                sequence.swapped_drafts = self._drafts.swap_out(row, computed)
        self.put_back(row)

    def forget_kept(self, besides: Sequence | None = None) -> bool:
        """Drop what waiting sequences have swapped out and hold shared blocks of; whether there were any."""
        keeping = [
            sequence
            for sequence in self._waiting
            if sequence is not besides and sequence.swapped is not None and sequence.swapped.keeps_blocks
        ]
        for sequence in keeping:
            sequence.forget_swapped()
        return bool(keeping)

    def remember(self, row: int) -> None:
        """Remember the full blocks of a row as prefixes."""
        sequence = self._rows.sequence(row)
        if sequence.prefixes is not None and self._rows.computed[row]:
            self._batch.remember(row, self._rows.of_row(row), sequence.prefixes)

    def close(self) -> None:
        """Drop what is in CPU memory."""
        for sequence in self._waiting:
            sequence.forget_swapped()
