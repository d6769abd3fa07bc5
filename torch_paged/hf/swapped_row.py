"""Swapped: one row of a PagedCache in CPU memory, of all groups of layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch_paged.hf.group import LayerGroup
from torch_paged.memory import PoolExhausted, SwappedRow


class Swapped:
    """Takes the row out of every group, which leaves it there without tokens."""

    def __init__(self, groups: Sequence[LayerGroup], row: int) -> None:
        self._rows: dict[int, SwappedRow] = {}
        self._groups = list(groups)
        for group in self._groups:
            self._take(group, row)

    def num_blocks(self, group: LayerGroup) -> int:
        """Blocks of the group that `restore` needs."""
        return self._rows[id(group)].num_blocks

    def restore(self, row: int) -> None:
        """Make the empty row hold its tokens again.

        Raises:
            PoolExhausted: too few blocks are free; the row is empty, and may be restored later.
        """
        restored: list[LayerGroup] = []
        try:
            for group in self._groups:
                group.swap_in(self._rows[id(group)], row)
                restored.append(group)
        except PoolExhausted:
            for group in restored:
                self._take(group, row)
            raise

    def _take(self, group: LayerGroup, row: int) -> None:
        self._rows[id(group)] = group.swap_out(row)
