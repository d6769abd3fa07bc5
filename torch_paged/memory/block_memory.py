"""The memory behind a pool's blocks: there when a block comes into use, given back when it is free."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from torch_paged.memory.allocator import BlockAllocator, Ids
from torch_paged.memory.device_reservation import device_page_bytes, map_pages, reserve_on_device, unmap_pages
from torch_paged.memory.reservation import release_pages, reserve
from torch_paged.ops.huge_pages import prefer_huge_pages

_Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class BlockLayout:
    """Where blocks lie in one storage: in several caches, one behind the other.

    Attributes:
        num_blocks: blocks of every cache.
        starts: int64 `[caches]`, first byte of each.
        block_bytes: int64 `[caches]`, bytes of a block.
        nbytes: bytes of the storage.
    """

    num_blocks: int
    starts: Ids
    block_bytes: Ids
    nbytes: int


class HostMemory:
    """On the CPU: the system commits what is written."""

    def __init__(self, layout: BlockLayout) -> None:
        self.storage = reserve(layout.nbytes)
        self._layout = layout
        for start, end in zip(layout.starts.tolist(), [*layout.starts[1:].tolist(), layout.nbytes], strict=True):
            prefer_huge_pages(self.storage, start, end)

    def commit(self, blocks: Ids) -> bool:
        return True

    def committed(self) -> _Mask:
        return np.ones(self._layout.num_blocks, dtype=np.bool_)

    def trim(self, allocator: BlockAllocator) -> None:
        runs = allocator.take_free_runs()
        if len(runs):
            ranges = self._layout.starts[:, None, None] + runs * self._layout.block_bytes[:, None, None]
            release_pages(self.storage, torch.from_numpy(ranges.reshape(-1, 2)))


class DeviceMemory:
    """On CUDA: pages are mapped as the blocks in them come into use, and unmapped once all of these are free.

    Pages (2 MiB on the GPUs of today) know nothing of caches: one may hold the end of one and the beginning of the
    next, so that no more memory is taken than the storage is large. The first page always has memory.
    """

    def __init__(self, layout: BlockLayout, like: torch.Tensor) -> None:
        self.storage = reserve_on_device(like, layout.nbytes)
        self._layout = layout
        self._page = device_page_bytes(like)
        self._mapped: _Mask = np.zeros(-(-layout.nbytes // self._page), dtype=np.bool_)
        self._mapped[0] = True

    def commit(self, blocks: Ids) -> bool:
        """Put memory behind free blocks, int64 `[n]` ascending; False where the device has none left."""
        missing = self._pages_of(blocks) & ~self._mapped
        if not missing.any():
            return True
        runs = torch.from_numpy(_runs(missing))
        if not map_pages(self.storage, runs):
            # torch keeps memory that it does not use.
            if self.storage.is_cuda:
                torch.cuda.empty_cache()
            if not map_pages(self.storage, runs):
                return False
        self._mapped |= missing
        return True

    def committed(self) -> _Mask:
        """bool `[num_blocks]`: which blocks have memory in every cache."""
        before = np.concatenate([[0], np.cumsum(~self._mapped)])
        blocks = np.arange(self._layout.num_blocks + 1)
        whole = np.ones(self._layout.num_blocks, dtype=np.bool_)
        for start, nbytes in zip(self._layout.starts, self._layout.block_bytes, strict=True):
            edges = start + blocks * nbytes
            whole &= before[edges[:-1] // self._page] == before[-(-edges[1:] // self._page)]
        return whole

    def trim(self, allocator: BlockAllocator) -> None:
        needed = self._pages_of(np.flatnonzero(allocator.ref_counts))
        needed[0] = True
        unneeded = self._mapped & ~needed
        if unneeded.any():
            unmap_pages(self.storage, torch.from_numpy(_runs(unneeded)))
            self._mapped &= needed

    def _pages_of(self, blocks: Ids) -> _Mask:
        """bool `[pages]`: which pages these blocks, ascending, lie in."""
        if not len(blocks):
            return np.zeros_like(self._mapped)
        gaps = np.flatnonzero(np.diff(blocks) != 1)
        first, end = blocks[np.append(0, gaps + 1)], blocks[np.append(gaps, len(blocks) - 1)] + 1
        starts, block_bytes = self._layout.starts[:, None], self._layout.block_bytes[:, None]
        count = len(self._mapped) + 1
        begins = np.bincount(((starts + first * block_bytes) // self._page).ravel(), minlength=count)
        ends = np.bincount((-(-(starts + end * block_bytes) // self._page)).ravel(), minlength=count)
        covered: _Mask = np.cumsum(begins - ends)[:-1] > 0
        return covered


class PlainMemory:
    """On other devices, and where the driver has no virtual memory management: all of it from the start."""

    def __init__(self, layout: BlockLayout, device: torch.device) -> None:
        self.storage = torch.empty(layout.nbytes, dtype=torch.uint8, device=device)
        self._layout = layout

    def commit(self, blocks: Ids) -> bool:
        return True

    def committed(self) -> _Mask:
        return np.ones(self._layout.num_blocks, dtype=np.bool_)

    def trim(self, allocator: BlockAllocator) -> None: ...


BlockMemory = HostMemory | DeviceMemory | PlainMemory


def block_memory(layout: BlockLayout, device: torch.device) -> BlockMemory:
    """The memory of a pool's blocks on a device.

    Raises:
        MemoryError: the system or the device refuses.
    """
    if device.type == "cpu":
        return HostMemory(layout)
    return device_memory(layout, torch.empty(0, dtype=torch.uint8, device=device))


def device_memory(layout: BlockLayout, like: torch.Tensor) -> DeviceMemory | PlainMemory:
    """The memory of a pool's blocks on the device of `like`, in pages where that has kernels and a driver for them."""
    key = torch._C._dispatch_key_for_device(like.device.type)
    if torch._C._dispatch_has_kernel_for_dispatch_key("paged::_map_pages", key) and device_page_bytes(like):
        return DeviceMemory(layout, like)
    return PlainMemory(layout, like.device)


def _runs(mask: _Mask) -> Ids:
    """Runs [first, end) of True, int64 `[n, 2]`."""
    edges: Ids = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return edges.reshape(-1, 2)
