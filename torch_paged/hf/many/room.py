"""Room: whether one more sequence is likely to find blocks until its end."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from torch_paged.hf.group import LayerGroup
from torch_paged.hf.many.batch import Batch
from torch_paged.hf.many.rows import Rows
from torch_paged.hf.many.sequence import Sequence

# Before anything is known: most sequences end by an EOS token before their length.
_FIRST_SHARE = 0.7
# How many sequences that first guess counts for.
_WEIGHT = 4
# A preemption shows that the guess was too low.
_RAISE = 0.1


class Room:
    """Guesses how much of the tokens that a sequence may still get it will get, from those that have ended.

    Admission by the expected remainder of the sequences that run, with a guess that preemptions raise, is SGLang's
    `new_token_ratio` (arXiv 2312.07104 and its scheduler). Sequences that end before others make room for what these
    still get: what counts is the peak over the steps to come (past-future scheduling, arXiv 2507.10150). Where the
    guess is wrong sequences are preempted.

    Args:
        sure: count on all the tokens that a sequence may get, and on all of them at once.
    """

    def __init__(self, sure: bool = False) -> None:
        self._sure = sure
        self._sum = _FIRST_SHARE * _WEIGHT
        self._weight = float(_WEIGHT)

    @property
    def share(self) -> float:
        """Of the tokens that a sequence may still get."""
        return 1.0 if self._sure else min(1.0, self._sum / self._weight)

    def ended(self, sequence: Sequence, max_length: int) -> None:
        """Learn from a sequence that came to its end."""
        most = max_length - sequence.num_prompt_tokens
        if most > 0:
            self._sum += (len(sequence.tokens) - sequence.num_prompt_tokens) / most
            self._weight += 1

    def preempted(self) -> None:
        self._sum = min(self._weight, self._sum + _RAISE * self._weight)

    def is_enough(self, batch: Batch, rows: Rows, sequence: Sequence) -> bool:
        """Whether `sequence` fits beside the rows that run, each with its expected tokens."""
        assert sequence.prepared is not None
        used = rows.used
        if not len(used):
            return True
        lengths = np.append(rows.lengths[used], len(sequence.tokens))
        ends = self._expected(lengths, np.append(rows.max_lengths[used], sequence.prepared.max_length))
        # Pools of one device share its bytes.
        needed: defaultdict[int, int] = defaultdict(int)
        available: dict[int, int] = {}
        for group in batch.cache.state.groups.values():
            budget = group.pool.budget
            with budget.lock:
                budget.settle()
                available.setdefault(id(budget), budget.free_bytes)
                available[id(budget)] += _reclaimable(group) * group.pool.block_bytes
            blocks = _num_blocks(group, ends).sum() if self._sure else _peak(group, lengths, ends)
            needed[id(budget)] += int(blocks) * group.pool.block_bytes
        if all(needed[budget] <= nbytes for budget, nbytes in available.items()):
            return True
        for pool, num_blocks in batch.held_of(sequence).items():
            needed[id(pool.budget)] -= num_blocks * pool.block_bytes
        return all(needed[budget] <= nbytes for budget, nbytes in available.items())

    def num_fitting(self, rows: Rows, num_blocks: int, block_size: int) -> int:
        """How many of the rows that run, the first ones, fit into so many blocks, each with its expected tokens."""
        used = rows.used
        expected = self._expected(rows.lengths[used], rows.max_lengths[used])
        fitting = np.cumsum(-(-expected // block_size)) <= num_blocks
        return min(max(1, int(fitting.sum())), len(used) - 1)

    def _expected(self, lengths: np.ndarray, most: np.ndarray) -> np.ndarray:
        expected: np.ndarray = lengths + np.ceil(self.share * np.maximum(most - lengths, 0)).astype(np.int64)
        return expected


def _peak(group: LayerGroup, lengths: np.ndarray, ends: np.ndarray) -> int:
    """Blocks that sequences of these lengths hold at most, if each gets a token a step up to its end."""
    left = np.sort(ends - lengths)
    # After so many steps, those that have not ended before.
    lengths = np.where(ends - lengths >= left[:, None], lengths + left[:, None], 0)
    return int(_num_blocks(group, lengths).sum(axis=1).max())


def _num_blocks(group: LayerGroup, lengths: np.ndarray) -> np.ndarray:
    size, window = group.pool.block_size, group.pool.sliding_window
    if window:
        # The window begins and ends within blocks.
        lengths = np.minimum(lengths, window + 2 * size)
    blocks: np.ndarray = -(-lengths // size)
    return blocks


def _reclaimable(group: LayerGroup) -> int:
    """Blocks that would be free if prefixes were forgotten and all rows were empty."""
    return group.pool.num_cached + len(group.tables.tokens_in_blocks()[0])
