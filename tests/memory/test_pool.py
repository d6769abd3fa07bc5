"""Pool: where the bytes lie, copies in every layer, memory given back, exact figures."""

import re

import numpy as np
import pytest
import torch
from test_reservation import resident_bytes

from tests.memory.small_pool import HEAD_DIM, HEADS
from torch_paged import ops
from torch_paged.memory import BlockTables, MemoryBudget, Pool, PoolStats

CPU = torch.device("cpu")
# Of the pools that make_pool makes: 2 layers, keys and values, 4 tokens, 2 heads of 8 float32.
BLOCK_BYTES = 2 * 2 * 4 * HEADS * HEAD_DIM * 4


def counts(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def kv(heads: int = HEADS, dim: int = HEAD_DIM, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(3, heads, 5, dim, dtype=dtype)


def test_layers_are_separate_contiguous_ranges_in_the_layout_of_the_ops():
    pool = Pool(num_layers=3, block_size=4, budget=MemoryBudget("1MiB", CPU), device=CPU)
    layers = [pool.layer(index, kv(dim=16), kv(dim=8)) for index in range(3)]
    like = ops.empty_cache(pool.allocator.num_blocks, 4, HEADS, 16, 8, dtype=torch.float32, device="cpu")
    ends = [0]
    for pair in layers:
        for cache, expected in zip(pair, like, strict=True):
            assert (cache.shape, cache.stride(), cache.dtype) == (expected.shape, expected.stride(), expected.dtype)
            assert cache.data_ptr() >= ends[-1]
            ends.append(cache.data_ptr() + cache.numel() * 4)
    assert pool.allocator.num_blocks == 2**20 // (3 * 4 * HEADS * (16 + 8) * 4)


def test_layer_returns_the_same_caches_for_the_same_shapes(backend, make_pool):
    pool = make_pool()
    key_cache, value_cache = pool.layer(1, kv(), kv())
    again = pool.layer(1, torch.ones(7, HEADS, 1, HEAD_DIM), torch.ones(7, HEADS, 1, HEAD_DIM))
    assert again[0] is key_cache and again[1] is value_cache
    assert pool.layer(0, kv(), kv())[0].data_ptr() != key_cache.data_ptr()


@pytest.mark.parametrize(
    "key, value", [(kv(heads=1), kv(heads=1)), (kv(dim=16), kv()), (kv(), kv(dim=16)), (kv().half(), kv().half())]
)
def test_a_layer_of_another_shape_is_refused(backend, make_pool, key, value):
    pool = make_pool()
    with pytest.raises(ValueError, match="key, value: .*; must be .* like the layers before"):
        pool.layer(1, key, value)


@pytest.mark.parametrize("value", [kv(heads=1), kv(dtype=torch.float16), kv()[0]])
def test_key_and_value_that_do_not_fit_are_refused(value):
    pool = Pool(num_layers=1, block_size=4, budget=MemoryBudget("1MiB", CPU), device=CPU)
    with pytest.raises(
        ValueError, match=r"value: .*; must be torch.float32 and \[batch, num_kv_heads, tokens, v_head_dim\]"
    ):
        pool.layer(0, kv(), value)
    assert pool.stats() == PoolStats()


def test_a_budget_below_one_block_is_refused():
    pool = Pool(num_layers=2, block_size=4, budget=MemoryBudget(BLOCK_BYTES - 1, CPU), device=CPU)
    expected = f"max_memory: {BLOCK_BYTES - 1} bytes; must be at least {BLOCK_BYTES}, one block of 4 tokens in 2 layers"
    with pytest.raises(ValueError, match=re.escape(expected)):
        pool.layer(0, kv(), kv())


def test_a_budget_beyond_any_address_space_is_refused():
    pool = Pool(num_layers=2, block_size=4, budget=MemoryBudget(2**70, CPU), device=CPU)
    with pytest.raises(MemoryError, match="max_memory: the system refuses"):
        pool.layer(0, kv(dim=65536), kv(dim=65536))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_layers": 0}, "num_layers: 0; must be at least 1"),
        ({"block_size": 3}, "block_size: 3; must be a power of two from 1 to 256"),
        ({"block_size": 512}, "block_size: 512; must be a power of two from 1 to 256"),
        ({"sliding_window": -1}, "sliding_window: -1; must be at least 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    options = {"num_layers": 1, "block_size": 4} | options
    with pytest.raises(ValueError, match=re.escape(message)):
        Pool(**options, budget=MemoryBudget("1MiB", CPU), device=CPU)


def test_copy_blocks_copies_every_layer_and_nothing_else(backend, make_pool):
    pool = make_pool()
    caches = [cache for index in range(2) for cache in pool.layer(index, kv(), kv())]
    pool.allocator.allocate(8)
    for cache in caches:
        cache.copy_(torch.randn(cache.shape))
    expected = [cache.clone() for cache in caches]
    for cache in expected:
        cache[[2, 5]] = cache[[0, 7]]
    pool.copy_blocks(np.array([[0, 2], [7, 5]]))
    pool.copy_blocks(np.empty((0, 2), dtype=np.int64))
    assert all(torch.equal(cache, want) for cache, want in zip(caches, expected, strict=True))


def test_caches_made_in_inference_mode_are_written_outside_of_it():
    with torch.inference_mode():
        pool = Pool(num_layers=1, block_size=4, budget=MemoryBudget("1MiB", CPU), device=CPU)
        key_cache, value_cache = pool.layer(0, kv(), kv())
    key_cache[0, 3] = 1
    value_cache[0, 3] = 1
    factor = torch.ones((), requires_grad=True)
    (key_cache[0] * value_cache[0] * factor).sum().backward()
    assert factor.grad == HEADS * HEAD_DIM


def test_trim_gives_memory_back_and_keeps_live_blocks():
    block_bytes = 2 * 2 * 16 * 8 * 64 * 4
    pool = Pool(num_layers=2, block_size=16, budget=MemoryBudget(512 * block_bytes, CPU), device=CPU)
    big = torch.zeros(1, 8, 1, 64)
    caches = [cache for index in range(2) for cache in pool.layer(index, big, big)]
    addresses = [cache.data_ptr() for cache in caches]
    empty = resident_bytes()

    first, kept, last = (BlockTables(pool, 1) for _ in range(3))
    for tables, blocks in ((first, 200), (kept, 8), (last, 200)):
        tables.append(counts(16 * blocks))
    for cache in caches:
        cache[:408] = 3
    assert resident_bytes() - empty >= 408 * block_bytes
    first.release()
    last.release()
    pool.trim()
    assert resident_bytes() - empty < 16 * block_bytes
    assert [cache.data_ptr() for cache in caches] == addresses
    assert all((cache[200:208] == 3).all() for cache in caches)
    assert all((cache[:200] == 0).all() and (cache[208:408] == 0).all() for cache in caches)
    assert pool.stats().blocks_used == 8


def test_trim_takes_back_what_dead_batches_held(backend, make_pool):
    pool = make_pool()
    BlockTables(pool, 1).append(counts(30))
    pool.trim()
    assert pool.allocator.num_used == pool.budget.used_bytes == 0


def test_nothing_to_trim_before_the_first_layer():
    pool = Pool(num_layers=1, block_size=4, budget=MemoryBudget("1MiB", CPU), device=CPU)
    pool.trim()
    pool.reset_peak()
    assert pool.stats() == PoolStats(0, 0, 0, 0, 0, 0, 0, 0)


def test_stats_are_exact(backend, make_pool):
    pool = make_pool(num_blocks=10)
    tables = BlockTables(pool, 2)
    tables.append(counts(6, 3))  # blocks 0 and 1 hold 4 + 2 tokens, block 2 holds 3
    fork = tables.fork()
    fork.append(counts(1, 0))  # copies block 1, for 3 tokens
    stats = pool.stats()
    assert stats == PoolStats(
        blocks_total=10,
        blocks_used=4,
        blocks_shared=2,
        blocks_free=6,
        bytes_held=4 * BLOCK_BYTES,
        bytes_useful=(4 + 2 + 3 + 3) * BLOCK_BYTES // 4,
        peak_bytes=4 * BLOCK_BYTES,
        peak_blocks_shared=3,
    )
    assert stats.waste == 1 - 12 / 16


def test_a_block_counts_as_its_fullest_row_sees_it(backend, make_pool):
    pool = make_pool()
    tables = BlockTables(pool, 1)
    tables.append(counts(4))
    tables.select(counts(0, 0))
    tables.crop(counts(0, 3))
    assert (pool.stats().bytes_useful, pool.stats().waste) == (BLOCK_BYTES, 0.0)
    tables.select(counts(1))
    assert (pool.stats().bytes_useful, pool.stats().waste) == (BLOCK_BYTES // 4, 0.75)


def test_peaks_start_again_after_reset(backend, make_pool):
    pool = make_pool()
    tables = BlockTables(pool, 1)
    tables.append(counts(20))
    tables.fork().release()
    tables.crop(counts(12))
    assert (pool.stats().peak_bytes, pool.stats().peak_blocks_shared) == (5 * BLOCK_BYTES, 5)
    pool.reset_peak()
    assert (pool.stats().peak_bytes, pool.stats().peak_blocks_shared) == (2 * BLOCK_BYTES, 0)


def test_pools_share_a_budget_and_add_up(backend, make_pool):
    one = make_pool(num_blocks=8)
    other = make_pool(num_blocks=8, block_size=8, budget=one.budget)
    assert (one.lock is other.lock, other.allocator.num_blocks) == (True, 4)
    first, second = BlockTables(one, 1), BlockTables(other, 1)
    first.append(counts(9))
    second.append(counts(9))
    assert (one.stats().blocks_free, other.stats().blocks_free) == (1, 0)
    total = PoolStats.total([one.stats(), other.stats()])
    assert (total.blocks_total, total.blocks_used, total.bytes_held) == (12, 5, 7 * BLOCK_BYTES)
    assert total.bytes_useful == 2 * 9 * BLOCK_BYTES // 4
    assert total.waste == 1 - 18 / 28
    assert PoolStats.total([]) == PoolStats()
    del first
    second.append(counts(15))  # the other pool's dead batch makes room
    assert (one.stats().blocks_used, other.stats().blocks_used) == (0, 3)


def test_other_devices_get_plain_storage():
    meta = torch.device("meta")
    pool = Pool(num_layers=2, block_size=4, budget=MemoryBudget(8 * BLOCK_BYTES, meta), device=meta)
    key_cache, _ = pool.layer(0, kv().to(meta), kv().to(meta))
    assert (key_cache.device, key_cache.shape) == (meta, (8, 4, HEADS, HEAD_DIM))
    pool.trim()
