"""Swapped: one row of a PagedCache in CPU memory, of all groups of layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from torch_paged.hf.group import LayerGroup
from torch_paged.memory import PoolExhausted, SwappedRow


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
        return any(row.keeps_blocks for row in self._rows.values())

    def is_of(self, groups: Iterable[LayerGroup]) -> bool:
        """Whether it was taken out of these groups."""
        return self._groups == list(groups)

    def num_blocks(self, group: LayerGroup) -> int:
        """Blocks of the group that `restore` needs."""
        return self._rows[id(group)].num_blocks

    def restore(self, row: int) -> None:
        """Make the empty row hold its tokens again.

        Raises:
            PoolExhausted: too few blocks are free; the row is empty, and may be restored later.
        """
        # The pools of a model have one lock.
        with self._groups[0].pool.lock:
            blocks: list[np.ndarray] = []
            try:
                for group in self._groups:
                    group.pool.budget.settle()
                    blocks.append(group.pool.allocator.allocate(self.num_blocks(group)))
            except PoolExhausted:
                for group, taken in zip(self._groups, blocks, strict=False):
                    group.pool.allocator.release(taken)
                raise
            for group, taken in zip(self._groups, blocks, strict=True):
                group.swap_in(self._rows[id(group)], row, taken)
