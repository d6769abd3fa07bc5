"""Swapped and SwappedBatch: a row of a PagedCache, or all of them, in CPU memory, of all groups of layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from torch_paged.hf.group import LayerGroup
from torch_paged.memory import Pool, PoolExhausted, SwappedRow


def swap_out(groups: Sequence[LayerGroup], row: int) -> Swapped | None:
    """The row in CPU memory; None where the system has none for it, and its tokens are dropped. It is empty then."""
    try:
        return Swapped(groups, row)
    except (MemoryError, RuntimeError):
        for group in groups:
            group.empty(np.array([row]))
        return None


class Swapped:
    """Takes the row out of every group, which leaves it there without tokens."""

    def __init__(self, groups: Sequence[LayerGroup], row: int) -> None:
        self._rows: dict[int, SwappedRow] = {}
        self._groups = list(groups)
        for group in self._groups:
            self._rows[id(group)] = group.swap_out(row)

    @property
    def num_tokens(self) -> int:
        return self._rows[id(self._groups[0])].num_tokens

    @property
    def keeps_blocks(self) -> bool:
        """Whether blocks that the row shared are held for it, in the pool."""
        return any(row.num_kept for row in self._rows.values())

    def is_of(self, groups: Iterable[LayerGroup]) -> bool:
        """Whether it was taken out of these groups."""
        return self._groups == list(groups)

    def num_blocks(self, group: LayerGroup) -> int:
        """Blocks of the group that `restore` needs."""
        return self._rows[id(group)].num_blocks

    def num_kept(self, group: LayerGroup) -> int:
        """Blocks of the group that others hold too, and that are held for the row."""
        return self._rows[id(group)].num_kept

    def restore(self, row: int) -> None:
        """Make the empty row hold its tokens again.

        Raises:
            PoolExhausted: too few blocks are free; the row is empty, and may be restored later.
        """
        # The pools of a model have one lock.
        with self._groups[0].pool.lock:
            taken = _allocated({group.pool: self.num_blocks(group) for group in self._groups})
            for group in self._groups:
                group.swap_in(self._rows[id(group)], row, taken[group.pool])


class SwappedBatch:
    """Takes all rows out of every group, which leaves them there without tokens.

    Raises:
        MemoryError, RuntimeError: the system has no memory for them; nothing has changed.
    """

    def __init__(self, groups: Sequence[LayerGroup]) -> None:
        self._groups = list(groups)
        with self._groups[0].pool.lock:
            self._tables = [group.swap_out_all() for group in self._groups]
            for tables in self._tables:
                tables.leave()

    @property
    def num_blocks(self) -> dict[Pool, int]:
        """Blocks that `restore` needs."""
        return {group.pool: tables.num_blocks for group, tables in zip(self._groups, self._tables, strict=True)}

    def restore(self) -> None:
        """Make the rows hold their tokens again.

        Raises:
            PoolExhausted: too few blocks are free; the rows are empty, and may be restored later.
        """
        with self._groups[0].pool.lock:
            taken = _allocated(self.num_blocks)
            for group, tables in zip(self._groups, self._tables, strict=True):
                tables.restore(taken[group.pool])


def _allocated(num_blocks: dict[Pool, int]) -> dict[Pool, np.ndarray]:
    """So many blocks of each pool, all or none; with the lock."""
    taken: dict[Pool, np.ndarray] = {}
    try:
        for pool, wanted in num_blocks.items():
            pool.budget.settle()
            taken[pool] = pool.allocator.allocate(wanted)
    except PoolExhausted:
        for pool, blocks in taken.items():
            pool.allocator.release(blocks)
        raise
    return taken
