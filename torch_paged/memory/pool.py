"""The bytes of the KV blocks of one group of layers that live alike, on one device."""

import weakref

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torch_paged.memory.allocator import BlockAllocator, Ids
from torch_paged.memory.block_memory import BlockLayout, block_memory
from torch_paged.memory.budget import MemoryBudget
from torch_paged.memory.stats import PoolStats
from torch_paged.memory.tables import BlockTables
from torch_paged.ops import cache_view, copy_blocks, swap_blocks
from torch_paged.ops.cache_layout import check_block_size

# Each layer's keys and values begin on a boundary of this many bytes: the largest page of the common systems.
_PAGE = 65536
# Block tables are int32.
_MAX_BLOCKS = 2**31 - 1


class Pool:
    """Key and value caches of `num_layers` layers, layer-major, and the allocator of their blocks.

    A block id means the same block in every layer of the group. The addresses are reserved with the first layer and
    never change. Memory comes to them as blocks are written on the CPU, as blocks come into use on CUDA, and is given
    back by `trim`. On other devices, and where the CUDA driver has no virtual memory management, all of it is there
    from the first layer on.

    Args:
        num_layers: layers of the group.
        block_size: tokens of a block, a power of two from 1 to 256.
        sliding_window: tokens a query sees, itself included; 0 = all.
        budget: bounds the bytes, over all pools that share it.
        device: where the blocks lie.

    Attributes:
        lock: the budget's; held around every edit.
        tables: the live batches in this pool.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        block_size: int,
        sliding_window: int = 0,
        budget: MemoryBudget,
        device: torch.device,
    ) -> None:
        if num_layers < 1:
            raise ValueError(f"num_layers: {num_layers}; must be at least 1")
        check_block_size(block_size)
        if sliding_window < 0:
            raise ValueError(f"sliding_window: {sliding_window}; must be at least 0")
        self.num_layers = num_layers
        self.block_size = block_size
        self.sliding_window = sliding_window
        self.budget = budget
        self.device = device
        self.lock = budget.lock
        self.tables: weakref.WeakSet[BlockTables] = weakref.WeakSet()
        self._allocator: BlockAllocator | None = None
        self._layout: tuple[object, ...] | None = None

    @property
    def allocator(self) -> BlockAllocator:
        """The owner of the block ids.

        Raises:
            RuntimeError: before the first call of `layer`, when the size of a block is not known.
        """
        if self._allocator is None:
            raise RuntimeError("this pool has no blocks before the first call of layer(), which tells their shape")
        return self._allocator

    @property
    def has_blocks(self) -> bool:
        """Whether `layer` was called, so that the size of a block is known."""
        return self._allocator is not None

    @property
    def num_shared(self) -> int:
        """Blocks with more than one owner."""
        return self._allocator.num_shared if self._allocator else 0

    @property
    def num_cached(self) -> int:
        """Blocks that the prefix index alone holds: given up when blocks run out."""
        index = self.budget.prefix_index
        return index.num_unheld(self.allocator) if index is not None and self._allocator else 0

    def layer(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The caches of one layer; the first call of all fixes the shape of a block and reserves the memory.

        Args:
            index: which layer of the group.
            key: `[batch, num_kv_heads, tokens, head_dim]`, read for its shape, dtype and device.
            value: `[batch, num_kv_heads, tokens, v_head_dim]`, likewise.

        Returns:
            key_cache: `[num_blocks, block_size, num_kv_heads, head_dim]`, laid out as by `ops.empty_cache`.
            value_cache: likewise with v_head_dim.

        Raises:
            ValueError: key and value do not fit one another or the layers before, or `max_memory` holds no block.
            MemoryError: the system refuses to reserve the memory.
        """
        layout = (*key.shape[1::2], *value.shape[1::2], key.dtype, value.dtype, key.device)
        if layout != self._layout:
            with self.lock:
                if self._layout is None:
                    self._create(key, value)
                    self._layout = layout
                elif layout != self._layout:
                    raise ValueError(
                        f"key, value: {_words(layout)}; must be {_words(self._layout)}, like the layers before"
                    )
        return self._key_caches[index], self._value_caches[index]

    def copy_blocks(self, block_mapping: NDArray[np.int64]) -> None:
        """Copy whole blocks in every layer: int64 `[n, 2]`, rows of (source, destination) from `BlockTables.append`."""
        if len(block_mapping):
            copy_blocks(self._key_caches, self._value_caches, torch.from_numpy(block_mapping).to(self.device))

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all layers."""
        return self._bytes

    @property
    def available_bytes(self) -> int:
        """Bytes that can be had in this pool's budget, blocks that only the prefix index holds included."""
        return self.budget.free_bytes + self.num_cached * self.block_bytes

    def save_blocks(self, blocks: Ids) -> list[Tensor]:
        """Whole blocks copied to CPU memory, int64 `[n]` of them.

        Returns:
            Per layer K, then per layer V: `[n, block_size, num_kv_heads, head_dim]`.
        """
        caches = [*self._key_caches, *self._value_caches]
        pinned = self.device.type == "cuda"
        saved = [torch.empty((len(blocks), *cache.shape[1:]), dtype=cache.dtype, pin_memory=pinned) for cache in caches]
        swap_blocks(caches, saved, torch.from_numpy(np.stack([blocks, np.arange(len(blocks))], axis=1)))
        return saved

    def load_blocks(self, saved: list[Tensor], blocks: Ids) -> None:
        """Copy what `save_blocks` returned into these blocks, int64 `[n]`."""
        mapping = torch.from_numpy(np.stack([np.arange(len(blocks)), blocks], axis=1))
        swap_blocks(saved, [*self._key_caches, *self._value_caches], mapping)

    def trim(self) -> None:
        """Give the memory of free blocks back to the system or the device; nothing moves.

        On CUDA this waits for the device where there is something to give back.
        """
        with self.lock:
            self.budget.settle()
            if self._allocator is not None:
                self._memory.trim(self._allocator)
                self.budget.limit_to(None)

    def stats(self) -> PoolStats:
        """What the pool holds now."""
        with self.lock:
            self.budget.settle()
            if self._allocator is None:
                return PoolStats()
            blocks = self._allocator
            return PoolStats(
                blocks_total=blocks.num_blocks,
                blocks_used=blocks.num_used,
                blocks_shared=blocks.num_shared,
                blocks_free=blocks.num_free,
                bytes_held=blocks.num_used * self._bytes,
                bytes_useful=self._num_tokens() * self._bytes // self.block_size,
                peak_bytes=blocks.peak_used * self._bytes,
                peak_blocks_shared=blocks.peak_shared,
                blocks_cached=self.num_cached,
            )

    def reset_peak(self) -> None:
        """Let the peaks in `stats` start again from what is held now."""
        with self.lock:
            self.budget.settle()
            if self._allocator:
                self._allocator.reset_peak()

    def _num_tokens(self) -> int:
        """Tokens in the blocks in use, each block counted once, as the owner that has most in it sees it."""
        held = [table.tokens_in_blocks() for table in list(self.tables)]
        if self.budget.prefix_index is not None:
            cached = self.budget.prefix_index.blocks(self.allocator)
            held.append((cached, np.full(len(cached), self.block_size)))
        if not held:
            return 0
        ids, tokens = (np.concatenate(parts) for parts in zip(*held, strict=True))
        distinct, index = np.unique(ids, return_inverse=True)
        most = np.zeros(len(distinct), dtype=np.int64)
        np.maximum.at(most, index, tokens)
        return int(most.sum())

    def _create(self, key: Tensor, value: Tensor) -> None:
        if key.dim() != 4 or value.dim() != 4 or value.shape[1] != key.shape[1] or value.dtype != key.dtype:
            raise ValueError(
                f"value: {value.dtype} of shape {list(value.shape)}; must be {key.dtype} and "
                f"[batch, num_kv_heads, tokens, v_head_dim], like key of shape {list(key.shape)}"
            )
        heads, dims = key.shape[1], (key.shape[3], value.shape[3])
        block_bytes = [self.block_size * heads * dim * key.dtype.itemsize for dim in dims]
        total = self.num_layers * sum(block_bytes)
        num_blocks = min(self.budget.max_bytes // total, _MAX_BLOCKS)
        if num_blocks < 1:
            raise ValueError(
                f"max_memory: {self.budget.max_bytes} bytes; must be at least {total}, "
                f"one block of {self.block_size} tokens in {self.num_layers} layers"
            )

        cache_bytes = [-(-num_blocks * n // _PAGE) * _PAGE for n in block_bytes]
        starts = np.cumsum([0] + cache_bytes * self.num_layers)
        layout = BlockLayout(num_blocks, starts[:-1], np.array(block_bytes * self.num_layers), int(starts[-1]))
        # Outside of inference mode, so that the caches may be written in it and out of it.
        with torch.inference_mode(False):
            self._memory = block_memory(layout, self.device)
            caches = [
                cache_view(self._memory.storage[start:], num_blocks, self.block_size, heads, dim, key.dtype)
                for start, dim in zip(layout.starts.tolist(), dims * self.num_layers, strict=True)
            ]
        self._key_caches, self._value_caches = caches[::2], caches[1::2]
        self._bytes = total
        self._allocator = BlockAllocator(num_blocks, self.budget, total, self._memory)


def _words(layout: tuple[object, ...]) -> str:
    return "heads and head_dim of both, dtypes, device: " + ", ".join(str(part) for part in layout)
