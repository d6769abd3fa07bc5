"""Random paged batches: shuffled blocks, NaN in every slot that no sequence owns, -1 in unused table entries."""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from torch_paged.ops import empty_cache

LAYOUTS = ("hnd", "nhd", "pool_view", "k_transposed", "unaligned")


@dataclass
class PagedBatch:
    """The tensors of one call of `attention`, under the op's argument names."""

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    block_table: Tensor
    seq_lens: Tensor
    cu_seqlens_q: Tensor
    max_query_len: int

    @property
    def arguments(self) -> dict[str, Tensor | int]:
        return dict(vars(self))


def paged_batch(
    rows: list[tuple[int, int]],
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    v_head_dim: int | None = None,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    layout: str = "hnd",
    freed_before: list[int] | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> PagedBatch:
    """Build a batch of sequences given as (query rows, cached tokens).

    `freed_before[s]` is a key of sequence `s`; the blocks that end before it are given back, as a sliding window does.
    """
    generator = torch.Generator().manual_seed(seed)
    v_head_dim = head_dim if v_head_dim is None else v_head_dim
    blocks_of = [-(-seq_len // block_size) for _, seq_len in rows]
    num_blocks = sum(blocks_of) + 3
    shuffled = iter(torch.randperm(num_blocks, generator=generator).tolist())
    table = torch.full((len(rows), max(blocks_of, default=0) + 2), -1, dtype=torch.int32)
    key_cache = nan_cache(layout, num_blocks, block_size, num_kv_heads, head_dim, dtype, is_key=True)
    value_cache = nan_cache(layout, num_blocks, block_size, num_kv_heads, v_head_dim, dtype)
    for s, (_, seq_len) in enumerate(rows):
        first_kept = freed_before[s] // block_size if freed_before else 0
        for column in range(first_kept, blocks_of[s]):
            block = next(shuffled)
            table[s, column] = block
            filled = min(block_size, seq_len - column * block_size)
            for cache in (key_cache, value_cache):
                shape = (filled, *cache.shape[2:])
                cache[block, :filled] = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    query_lens = [query_len for query_len, _ in rows]
    num_tokens = sum(query_lens)
    # One side of a wider tensor, as the slices of a fused projection are.
    offset = int(layout == "unaligned")
    wide = (num_tokens, 2 * num_heads, head_dim + offset)
    fused = torch.randn(wide, generator=generator, dtype=torch.float64).to(dtype)
    return PagedBatch(
        query=fused.to(device)[:, :num_heads, offset:],
        key_cache=to_device(key_cache, device),
        value_cache=to_device(value_cache, device),
        block_table=to_device(table, device)[:, :-1],
        seq_lens=torch.tensor([seq_len for _, seq_len in rows], dtype=torch.int32, device=device),
        cu_seqlens_q=torch.tensor([0, *accumulate(query_lens)], dtype=torch.int32, device=device),
        max_query_len=max(query_lens, default=0),
    )


def nan_cache(
    layout: str,
    num_blocks: int,
    block_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    is_key: bool = False,
) -> Tensor:
    """Return a cache `[num_blocks, block_size, num_kv_heads, head_dim]` full of NaN, or of -1 for integers."""
    sizes = (num_blocks, block_size, num_kv_heads, head_dim)
    if layout == "nhd":
        cache = torch.empty(sizes, dtype=dtype)
    elif layout == "pool_view":
        cache = torch.empty(num_blocks, 3, num_kv_heads, block_size, head_dim + 8, dtype=dtype)
    elif layout == "unaligned":
        # No row begins at a multiple of what a vector loads at once.
        cache = torch.empty(num_blocks, num_kv_heads, block_size, head_dim + 1, dtype=dtype).transpose(1, 2)
    elif layout == "k_transposed" and is_key:
        cache = torch.empty(num_blocks, num_kv_heads, head_dim, block_size, dtype=dtype).permute(0, 3, 1, 2)
    else:
        cache = empty_cache(*sizes, dtype=dtype, device="cpu")[0]
    cache.fill_(torch.nan if dtype.is_floating_point else -1)
    if layout == "pool_view":
        return cache[:, 1, :, :, :head_dim].transpose(1, 2)
    return cache[..., 1:] if layout == "unaligned" else cache


def to_device(tensor: Tensor, device: str) -> Tensor:
    """Move a tensor with its strides and whatever lies between its elements."""
    storage = memory_of(tensor).clone().to(device)
    return storage.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def memory_of(tensor: Tensor) -> Tensor:
    """Return all bytes of the memory that a tensor is a view of."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def same_memory(tensor: Tensor, expected: Tensor) -> bool:
    """Tell whether two views of like memory hold the same bytes, between their elements too."""
    return tensor.stride() == expected.stride() and torch.equal(memory_of(tensor), memory_of(expected))
