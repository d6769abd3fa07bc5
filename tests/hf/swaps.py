"""Count the blocks that go to CPU memory and come back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch_paged.memory import Pool


@contextmanager
def count_swapped() -> Iterator[dict[str, int]]:
    """Blocks that went "out" and "in"."""
    counts = {"out": 0, "in": 0}
    save, load = Pool.save_blocks, Pool.load_blocks

    def saved(self: Pool, blocks: Any) -> Any:
        counts["out"] += len(blocks)
        return save(self, blocks)

    def loaded(self: Pool, tensors: Any, blocks: Any) -> None:
        counts["in"] += len(blocks)
        load(self, tensors, blocks)

    with mock.patch.object(Pool, "save_blocks", saved), mock.patch.object(Pool, "load_blocks", loaded):
        yield counts


@contextmanager
def no_memory_after(times: int) -> Iterator[None]:
    """The system has CPU memory for so many copies of blocks."""
    save, left = Pool.save_blocks, times

    def saved(self: Pool, blocks: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise RuntimeError("DefaultCPUAllocator: not enough memory")
        return save(self, blocks)

    with mock.patch.object(Pool, "save_blocks", saved):
        yield
