"""Beginning: what a row that waits for its turn takes over of others, instead of computing and storing it again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedModel

from torch_paged.hf.group import LayerGroup
from torch_paged.hf.passes import common_prefix
from torch_paged.hf.state import CacheState
from torch_paged.memory import Pool

Ints = np.ndarray


@dataclass(frozen=True)
class Beginning:
    """The first tokens of a row.

    Attributes:
        length: how many, whole blocks.
        source: the row that holds them too; -1 = the prefix index.
        unheld: of each pool the blocks among them that nobody holds so far.
        is_being_computed: a row that runs is about to hold more of them.
    """

    length: int = 0
    source: int = -1
    unheld: dict[Pool, int] = field(default_factory=dict)
    is_being_computed: bool = False

    def num_blocks(self, group: LayerGroup, num_tokens: int) -> int:
        """Blocks of the group that a row with so many tokens takes from those that are free, if it begins so."""
        size = group.pool.block_size
        return -(-num_tokens // size) - self.length // size + self.unheld.get(group.pool, 0)


class Beginnings:
    """What rows of a batch, not all of which run, have in common with those that run, and with what is remembered.

    Args:
        model: patched.
        state: of the batch's cache.
        tokens: int64 `[tokens]` for each row, those it has for certain.
    """

    def __init__(self, model: PreTrainedModel, state: CacheState, tokens: list[Ints]) -> None:
        self._model, self._state, self._tokens = model, state, tokens
        self._shares, self._at_least = state.pools.config.share_prompts, state.pools.config.min_shared_prefix
        self._size = state.pools.config.block_size
        self._common: dict[tuple[int, int], int] = {}

    def of(self, row: int, running: Iterable[int]) -> Beginning:
        """Of an empty row."""
        best = Beginning()
        if self._state.prefixes is not None:
            length, of_pools = self._state.prefixes.find(self._model, self._state, self._tokens[row])
            best = Beginning(length, unheld={pool: unheld for pool, (_, unheld) in of_pools.items()})
        most = len(self._tokens[row]) - 1
        computed, coming = 0, 0
        for other in running if self._shares else ():
            common = min(self._in_common(row, other), most)
            if not (0 < self._at_least <= common or 0 < common == most):
                continue
            length, fed = common // self._size * self._size, int(self._state.seq_lens[other])
            if length > fed:
                coming = max(coming, length)
            elif length > max(computed, best.length) and self._holds(other, length):
                computed, best = length, Beginning(length, other)
        return best if coming <= best.length else Beginning(is_being_computed=True)

    def take(self, row: int, beginning: Beginning) -> None:
        """Let the row, which is empty, begin so."""
        if not beginning.length:
            return
        state, rows = self._state, [np.empty(0, dtype=np.int64)] * len(self._tokens)
        if beginning.source < 0:
            assert state.prefixes is not None
            rows[row] = self._tokens[row]
            state.prefixes.adopt(self._model, state, rows)
            return
        lengths = np.zeros(len(rows), dtype=np.int64)
        lengths[row] = beginning.length
        for group in state.groups.values():
            rows[row] = group.tables.blocks(beginning.source)[: beginning.length // self._size]
            group.adopt(lengths, rows)

    def _in_common(self, row: int, other: int) -> int:
        pair = min(row, other), max(row, other)
        if pair not in self._common:
            self._common[pair] = common_prefix(self._tokens[row], self._tokens[other])
        return self._common[pair]

    def _holds(self, row: int, length: int) -> bool:
        """Whether a row still has the blocks of its first tokens that whoever goes on from there sees."""
        for group in self._state.groups.values():
            window = group.pool.sliding_window
            first = max(0, length - window + 1) // self._size if window else 0
            if (group.tables.blocks(row)[first : length // self._size] < 0).any():
                return False
        return True
