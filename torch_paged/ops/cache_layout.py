"""The physical layout of a paged cache that the kernels like best: each block one run of bytes, heads outermost."""

import torch
from torch import Tensor

from torch_paged.ops.huge_pages import prefer_huge_pages

MAX_BLOCK_SIZE = 256

# Keys lie in rows, as values do. With keys of a block transposed a core scores cached bfloat16 keys faster where
# several query heads share them (AVX-512, 4 heads of 128: 7.6 ns a key instead of 9.6, of some 21 for key and value;
# 7 heads of 64: 6.0 instead of 8.5; one head of 128: 6.1 instead of 4.3), which memory mostly hides; but a step of 32
# sequences and 8 heads stores its keys in 29 us instead of 3.7 (float32 69 instead of 7), and blocks under 16 tokens
# leave lanes empty. Prefill packs keys before it multiplies: 64 of them in 0.28 us from rows, in 0.30 transposed.


def empty_cache(
    num_blocks: int,
    block_size: int,
    num_kv_heads: int,
    head_dim: int,
    v_head_dim: int | None = None,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
) -> tuple[Tensor, Tensor]:
    """Allocate one layer's uninitialised key and value cache.

    Args:
        num_blocks: blocks of the cache.
        block_size: tokens of a block, a power of two up to 256.
        num_kv_heads: heads of key and value.
        head_dim: elements of a key head.
        v_head_dim: elements of a value head; None is head_dim.
        dtype: dtype of both.
        device: where both live.

    Returns:
        key_cache: `[num_blocks, block_size, num_kv_heads, head_dim]`, in memory `[num_blocks, num_kv_heads,
            block_size, head_dim]`.
        value_cache: likewise with v_head_dim.

    Raises:
        ValueError: a size is out of range; the text names it.
    """
    value_dim = head_dim if v_head_dim is None else v_head_dim
    _check_sizes(num_blocks, block_size, num_kv_heads, head_dim=head_dim, v_head_dim=value_dim)

    def allocate(dim: int) -> Tensor:
        cache = torch.empty(num_blocks, num_kv_heads, block_size, dim, dtype=dtype, device=device)
        prefer_huge_pages(cache.view(-1).view(torch.uint8), 0, cache.nbytes)
        return cache.transpose(1, 2)

    return allocate(head_dim), allocate(value_dim)


def cache_view(
    storage: Tensor, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> Tensor:
    """View given bytes as one cache in the layout of `empty_cache`.

    Args:
        storage: uint8, 1-D, contiguous, its start aligned to the dtype; bytes past the cache's end are left alone.
        num_blocks, block_size, num_kv_heads, head_dim, dtype: as for `empty_cache`.

    Returns:
        `[num_blocks, block_size, num_kv_heads, head_dim]`, sharing the memory of `storage`.

    Raises:
        ValueError: a size is out of range, or storage is of another dtype or shape, misaligned or too short.
    """
    _check_sizes(num_blocks, block_size, num_kv_heads, head_dim=head_dim)
    if storage.dtype != torch.uint8 or storage.dim() != 1 or not storage.is_contiguous():
        raise ValueError(
            f"storage: {storage.dtype} of shape {list(storage.shape)} and strides {list(storage.stride())}; "
            "must be torch.uint8, 1-D and contiguous"
        )
    if storage.storage_offset() % dtype.itemsize:
        raise ValueError(
            f"storage: begins at byte {storage.storage_offset()} of its memory; must be at a multiple of "
            f"{dtype.itemsize} for {dtype}"
        )
    num_bytes = num_blocks * block_size * num_kv_heads * head_dim * dtype.itemsize
    if storage.numel() < num_bytes:
        raise ValueError(f"storage: {storage.numel()} bytes; must be at least {num_bytes}")
    return storage[:num_bytes].view(dtype).view(num_blocks, num_kv_heads, block_size, head_dim).transpose(1, 2)


def check_block_size(block_size: int) -> None:
    """Refuse what no cache can have.

    Raises:
        ValueError: `block_size` is no power of two from 1 to 256.
    """
    if not 1 <= block_size <= MAX_BLOCK_SIZE or block_size & (block_size - 1):
        raise ValueError(f"block_size: {block_size}; must be a power of two from 1 to {MAX_BLOCK_SIZE}")


def _check_sizes(num_blocks: int, block_size: int, num_kv_heads: int, **head_dims: int) -> None:
    if num_blocks < 0:
        raise ValueError(f"num_blocks: {num_blocks}; must be at least 0")
    check_block_size(block_size)
    for name, size in {"num_kv_heads": num_kv_heads, **head_dims}.items():
        if size < 1:
            raise ValueError(f"{name}: {size}; must be at least 1")
