"""Memory on a GPU: mapped as blocks come into use, unmapped when they are free, refused with nothing lost."""

import numpy as np
import pytest
import torch

from tests.emulator.device_memory import collect_garbage
from tests.emulator.findings import Finding
from tests.emulator.library import emulated_ops
from tests.memory.small_pool import HEAD_DIM, HEADS, PAGE, small_pool
from torch_paged import ops
from torch_paged.memory import BlockTables, PoolExhausted, PrefixIndex, block_keys, root_key
from torch_paged.memory.block_memory import PlainMemory
from torch_paged.memory.device_reservation import map_pages, unmap_pages

# 2 layers, keys and values: 4 caches of 64 blocks of 1 KiB, 16 pages each.
BLOCKS, BLOCK_SIZE, CACHES = 64, 16, 4
BLOCKS_PER_PAGE = 4


def counts(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def pages(*runs: tuple[int, int]) -> torch.Tensor:
    return torch.tensor(runs, dtype=torch.int64).reshape(-1, 2)


def big_pool(**options):
    return small_pool(BLOCKS, BLOCK_SIZE, **options)


def caches(pool):
    kv = torch.zeros(1, HEADS, 1, HEAD_DIM)
    return [cache for index in range(2) for cache in pool.layer(index, kv, kv)]


def test_pages_are_mapped_as_blocks_come_into_use(gpu):
    pool = big_pool()
    assert gpu.held == (CACHES * 65536, PAGE, PAGE)
    tables = BlockTables(pool, 1)
    for blocks in (1, 4, 5, 8, 9, 64):
        tables.append(counts(blocks * BLOCK_SIZE) - tables.seq_lens)
        assert gpu.held.mapped == gpu.held.created == CACHES * -(-blocks // BLOCKS_PER_PAGE) * PAGE
    for cache in caches(pool):
        cache.fill_(1)


def test_trim_unmaps_what_is_free_and_keeps_the_rest(gpu):
    pool = big_pool()
    first, kept, last = (BlockTables(pool, 1) for _ in range(3))
    for tables, blocks in ((first, 18), (kept, 3), (last, 20)):
        tables.append(counts(blocks * BLOCK_SIZE))
    addresses = [cache.data_ptr() for cache in caches(pool)]
    for cache in caches(pool):
        cache[18:21] = 7
    first.release()
    last.release()
    assert gpu.held.mapped == CACHES * 11 * PAGE
    gpu.launch()  # that nobody waited for, like the last step of `generate`
    pool.trim()
    # Blocks 18 to 20 lie in pages 4 and 5 of each cache; the first page of all stays.
    assert gpu.held.mapped == gpu.held.created == (CACHES * 2 + 1) * PAGE
    assert [cache.data_ptr() for cache in caches(pool)] == addresses
    assert all((cache[18:21] == 7).all() for cache in caches(pool))
    again = BlockTables(pool, 1)
    again.append(counts(18 * BLOCK_SIZE))
    assert again.blocks(0).tolist() == list(range(18))
    for cache in caches(pool):
        cache[:18] = 1
    kept.release(), again.release()
    pool.trim()
    pool.trim()
    assert gpu.held.mapped == PAGE


def test_a_page_of_two_caches_stays_while_one_of_them_is_used(gpu, monkeypatch):
    monkeypatch.setattr("torch_paged.memory.pool._PAGE", 1024)
    pool = small_pool(6, BLOCK_SIZE)  # 4 caches of 6 KiB: page 1 holds the end of the first and of the second a start
    tables = BlockTables(pool, 1)
    tables.append(counts(BLOCK_SIZE))
    assert gpu.held == (6 * PAGE, 4 * PAGE, 4 * PAGE)  # pages 0, 1, 3 and 4
    tables.append(counts(5 * BLOCK_SIZE))
    assert gpu.held.mapped == 6 * PAGE
    tables.crop(counts(5 * BLOCK_SIZE))
    pool.trim()
    assert gpu.held.mapped == 4 * PAGE
    for cache in caches(pool):
        cache[0] = 1


def test_a_device_without_memory_left_is_an_exhausted_pool(gpu):
    pool = big_pool()
    tables = BlockTables(pool, 1)
    tables.append(counts(6 * BLOCK_SIZE))
    held = gpu.held
    gpu.set(PAGE, memory=3 * PAGE)
    before = tables.blocks(0).tolist(), tables.seq_lens.tolist(), pool.stats().blocks_used
    with pytest.raises(PoolExhausted, match=r"3 needed, 2 free, 6 in use; free memory on the device") as caught:
        tables.append(counts(3 * BLOCK_SIZE))
    assert (caught.value.needed, caught.value.free, caught.value.device_full) == (3, 2, True)
    assert (tables.blocks(0).tolist(), tables.seq_lens.tolist(), pool.stats().blocks_used) == before
    assert gpu.held == held
    assert pool.stats().blocks_free == 2
    tables.append(counts(2 * BLOCK_SIZE))  # they have memory
    assert tables.blocks(0).tolist() == list(range(8))
    tables.release()
    pool.trim()
    assert pool.stats().blocks_free == BLOCKS
    gpu.set(PAGE)
    tables.append(counts(BLOCKS * BLOCK_SIZE))


def test_blocks_with_memory_serve_where_lower_ones_have_none(gpu):
    pool = big_pool()
    low, high = BlockTables(pool, 1), BlockTables(pool, 1)
    low.append(counts(8 * BLOCK_SIZE))
    high.append(counts(5 * BLOCK_SIZE))
    low.release()
    pool.trim()
    gpu.set(PAGE, memory=0)
    high.append(counts(3 * BLOCK_SIZE))
    assert high.blocks(0).tolist() == list(range(8, 16))
    gpu.set(PAGE)
    pool.trim()
    high.append(counts(BLOCK_SIZE))
    assert high.blocks(0)[-1] == 0


def test_blocks_are_swapped_by_a_kernel_whatever_lies_before_them(gpu):
    """Whether a kernel may read a cache is asked of a block that has memory."""
    launches = emulated_ops().num_launches
    pool = big_pool()
    low, high = BlockTables(pool, 1), BlockTables(pool, 1)
    low.append(counts(8 * BLOCK_SIZE))
    high.append(counts(2 * BLOCK_SIZE))
    for n, cache in enumerate(caches(pool)):
        cache[8:10] = n + 1
    low.release()
    pool.trim()
    saved = pool.save_blocks(counts(9))
    assert emulated_ops().num_launches == launches + 1
    assert [set(part.flatten().tolist()) for part in saved] == [{1}, {3}, {2}, {4}]  # keys, then values
    pool.load_blocks([part + 4 for part in saved], counts(8))
    assert emulated_ops().num_launches == launches + 2
    assert [set(cache[8].flatten().tolist()) for cache in caches(pool)] == [{5}, {6}, {7}, {8}]


def test_remembered_prefixes_give_way_where_the_device_is_full(gpu):
    pool = big_pool()
    index = PrefixIndex(pool.budget)
    tables = BlockTables(pool, 1)
    tables.append(counts(8 * BLOCK_SIZE))
    tokens = np.arange(8 * BLOCK_SIZE).reshape(8, BLOCK_SIZE)
    index.put(pool.allocator, block_keys(root_key(b""), tokens.ravel(), BLOCK_SIZE), tokens, tables.blocks(0))
    tables.release()
    gpu.set(PAGE, memory=0)
    other = BlockTables(pool, 1)
    other.append(counts(3 * BLOCK_SIZE))
    assert len(index) == 5
    assert set(other.blocks(0)) == {5, 6, 7}
    with pytest.raises(PoolExhausted) as caught:
        other.append(counts(6 * BLOCK_SIZE))
    assert (caught.value.needed, caught.value.free) == (6, 5)


def test_a_device_too_full_for_a_pool_keeps_nothing(gpu):
    gpu.set(PAGE, memory=0)
    with pytest.raises(MemoryError, match=r"max_memory: cpu refuses to reserve 262144 bytes .*no memory is left"):
        big_pool()
    assert gpu.held == (0, 0, 0)


def test_a_driver_without_virtual_memory_gets_a_plain_allocation(gpu):
    gpu.set(page=0)
    pool = big_pool()
    assert isinstance(pool._memory, PlainMemory)
    tables = BlockTables(pool, 1)
    tables.append(counts(BLOCKS * BLOCK_SIZE))
    tables.release()
    pool.trim()
    assert gpu.held == (0, 0, 0)


def test_the_memory_goes_with_the_last_view(gpu):
    pool = big_pool()
    BlockTables(pool, 1).append(counts(30 * BLOCK_SIZE))
    view = caches(pool)[3][:8]
    gpu.launch()
    del pool
    collect_garbage()
    view.fill_(3)
    assert gpu.held.mapped == CACHES * 8 * PAGE
    del view
    assert gpu.held == (0, 0, 0)


def test_a_kernel_that_reads_what_has_no_memory_is_found(gpu):
    pool = big_pool()
    BlockTables(pool, 1).append(counts(4 * BLOCK_SIZE))
    key_cache, value_cache = caches(pool)[:2]
    key_cache[:4], value_cache[:4] = 1, 2
    ops.copy_blocks([key_cache], [value_cache], torch.tensor([[1, 3]]))
    with pytest.raises(Finding, match="copy_blocks.cuh"):
        ops.copy_blocks([key_cache], [value_cache], torch.tensor([[1, 4]]))


@pytest.mark.parametrize(
    "function, runs, message",
    [
        (map_pages, [(2, 3), (0, 1)], r"runs: \[0, 1\); must be ascending, in \[0, 64\] \(pages\) and not mapped yet"),
        (map_pages, [(0, 2)], r"runs: \[0, 2\); must be .* not mapped yet"),
        (map_pages, [(60, 65)], r"runs: \[60, 65\); must be"),
        (map_pages, [(3, 3)], r"runs: \[3, 3\); must be"),
        (unmap_pages, [(0, 1), (5, 6)], r"runs: \[5, 6\); must be .* and mapped"),
        (unmap_pages, [(-1, 1)], r"runs: \[-1, 1\); must be"),
    ],
)
def test_bad_runs_are_refused_and_change_nothing(gpu, function, runs, message):
    pool = big_pool()
    held = gpu.held
    with pytest.raises(RuntimeError, match=message):
        function(pool._memory.storage, pages(*runs))
    assert gpu.held == held


def test_other_tensors_have_no_pages(gpu):
    with pytest.raises(RuntimeError, match="storage: another tensor; must be one of _reserve_on_device"):
        map_pages(torch.zeros(8, dtype=torch.uint8), pages((0, 1)))
