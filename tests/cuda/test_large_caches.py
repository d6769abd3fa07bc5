"""Caches of more than 2^31 elements: the kernels count offsets in 64 bits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests import reference
from tests.assertions import assert_as_exact_as_torch
from tests.emulator.device_memory import PAGE
from tests.emulator.library import NO_NVCC, emulated, has_nvcc
from torch_paged import ops
from torch_paged.memory.device_reservation import map_pages, reserve_on_device

pytestmark = pytest.mark.skipif(not has_nvcc(), reason=NO_NVCC)

BLOCK_SIZE, KV_HEADS, HEAD_DIM = 16, 8, 128
BLOCK = BLOCK_SIZE * KV_HEADS * HEAD_DIM
LAST = 2**31 // BLOCK + 1
SLOTS = torch.tensor([LAST * BLOCK_SIZE, -1, LAST * BLOCK_SIZE + 1])
TABLES = torch.tensor([[LAST]], dtype=torch.int32), torch.tensor([2], dtype=torch.int32)


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=str)
def caches(request: pytest.FixtureRequest) -> Iterator[list[torch.Tensor]]:
    """Two caches that have memory in their last two blocks alone, on the emulated GPU."""
    dtype, num_bytes = request.param, (LAST + 1) * BLOCK * request.param.itemsize
    with emulated("attention") as cuda, cuda.device_memory.device(PAGE):
        storages = [reserve_on_device(torch.empty(0, dtype=torch.uint8), num_bytes) for _ in range(2)]
        first, end = (LAST - 1) * BLOCK * dtype.itemsize // PAGE, -(-num_bytes // PAGE)
        assert all(map_pages(storage, torch.tensor([[first, end]])) for storage in storages)
        made = [ops.cache_view(each, LAST + 1, BLOCK_SIZE, KV_HEADS, HEAD_DIM, dtype) for each in storages]
        del storages
        yield made
        made.clear()


def new_rows(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(3, KV_HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_reshape_and_gather(caches):
    key = new_rows(caches[0].dtype)
    ops.reshape_and_cache(key, -key, *caches, SLOTS)
    assert torch.equal(caches[0][LAST, :2], key[::2]) and torch.equal(caches[1][LAST, :2], -key[::2])
    gathered = ops.gather_cache(*caches, *TABLES, 2)
    assert torch.equal(gathered[0][0], key[::2]) and torch.equal(gathered[1][0], -key[::2])


def test_rope(caches):
    key, angles = new_rows(caches[0].dtype), torch.ones(3, HEAD_DIM)
    ops.rope_and_cache(key, key, key, angles, 0 * angles, *caches, SLOTS)
    assert torch.equal(caches[0][LAST, :2], key[::2]) and torch.equal(caches[1][LAST, :2], key[::2])


def test_copies(caches):
    for cache in caches:
        cache[LAST] = 3
    ops.copy_blocks(caches[:1], caches[1:], torch.tensor([[LAST, LAST - 1]]))
    saved = [torch.zeros(1, *cache.shape[1:], dtype=cache.dtype) for cache in caches]
    ops.swap_blocks(caches, saved, torch.tensor([[LAST - 1, 0]]))
    assert all((cache == 3).all() for cache in saved)


@pytest.mark.parametrize("num_queries", [1, 2])
def test_attention(caches, num_queries):
    key = new_rows(caches[0].dtype)
    for cache in caches:
        cache[LAST] = torch.nan
        cache[LAST, :2] = key[::2]
    query, starts = key[:num_queries], torch.tensor([0, num_queries], dtype=torch.int32)
    out = ops.attention(query, *caches, *TABLES, starts, num_queries)
    small = [cache[LAST:].contiguous() for cache in caches]
    tables = torch.zeros_like(TABLES[0]), TABLES[1], starts
    exact, same_dtype = (
        reference.attention(query, *small, *tables, dtype=dtype)[0] for dtype in (torch.float64, query.dtype)
    )
    assert_as_exact_as_torch(out, exact, same_dtype)
