"""SwappedRow and SwappedTables: what leaves the pool, what comes back, and what stays because others hold it."""

import gc

import numpy as np
import pytest
import torch

from tests.memory.small_pool import HEAD_DIM, HEADS, small_pool
from torch_paged.memory import (
    BlockTables,
    PoolExhausted,
    PrefixIndex,
    SwappedRow,
    SwappedTables,
    block_keys,
    full_blocks,
    root_key,
)

pytestmark = pytest.mark.usefixtures("backend")


def ints(*values):
    return np.array(values, dtype=np.int64)


def write(pool, tables, *num_tokens, start=0):
    """Append tokens to each row; token t of row i is 100 i + t in every cache."""
    num_tokens = ints(*num_tokens)
    before = tables.seq_lens
    tables.append(num_tokens, pool.copy_blocks)
    for row, count in enumerate(num_tokens):
        for t in range(before[row], before[row] + count):
            block = tables.blocks(row)[t // pool.block_size]
            for cache in caches(pool):
                cache[block, t % pool.block_size] = 100 * row + t + start


def caches(pool):
    kv = torch.zeros(1, HEADS, 1, HEAD_DIM)
    return [cache for index in range(pool.num_layers) for cache in pool.layer(index, kv, kv)]


def content(pool, tables, row, begin=0):
    """What each cache holds of a row's tokens, which must be the same in all elements of one token."""
    blocks = tables.blocks(row)
    contents = []
    for cache in caches(pool):
        tokens = [cache[blocks[t // pool.block_size], t % pool.block_size] for t in range(begin, tables.seq_lens[row])]
        assert all((token == token.flatten()[0]).all() for token in tokens)
        contents.append([int(token.flatten()[0]) for token in tokens])
    assert all(each == contents[0] for each in contents)
    return contents[0]


def test_a_row_goes_and_comes_back_with_its_content():
    pool = small_pool(8, 4)
    tables = BlockTables(pool, 2)
    write(pool, tables, 10, 5)
    swapped = SwappedRow(pool, tables, 0)
    assert (tables.seq_lens.tolist(), swapped.num_tokens, swapped.num_blocks) == ([0, 5], 10, 3)
    assert pool.stats().blocks_used == 2
    other = BlockTables(pool, 1)
    write(pool, other, 16, start=7000)  # blocks of the row serve others meanwhile
    assert content(pool, tables, 1) == list(range(100, 105))
    other.release()
    swapped.restore(tables, 0)
    assert tables.seq_lens.tolist() == [10, 5]
    assert content(pool, tables, 0) == list(range(10))
    write(pool, tables, 3, 0)
    assert content(pool, tables, 0) == list(range(13))
    assert pool.allocator.ref_counts.sum() == 6


def test_only_what_the_window_shows_is_kept():
    pool = small_pool(8, 4, sliding_window=6)
    tables = BlockTables(pool, 1)
    write(pool, tables, 15)  # one call keeps all of its tokens
    assert pool.stats().blocks_used == 4
    swapped = SwappedRow(pool, tables, 0)
    assert swapped.num_blocks == 2  # the token at 15 sees 10 to 15
    swapped.restore(tables, 0)
    assert pool.stats().blocks_used == 2
    assert content(pool, tables, 0, begin=8) == list(range(8, 15))
    write(pool, tables, 1)


def test_blocks_of_other_rows_stay_shared():
    pool = small_pool(8, 4)
    tables = BlockTables(pool, 1)
    write(pool, tables, 8)
    tables.select(ints(0, 0))
    write(pool, tables, 3, 2)
    assert pool.stats().blocks_used == 4
    swapped = SwappedRow(pool, tables, 0)
    assert (swapped.num_blocks, pool.stats().blocks_used, pool.stats().blocks_shared) == (1, 3, 2)
    tables.empty(ints(1))
    assert pool.stats().blocks_used == 2, "held for the swapped row alone"
    swapped.restore(tables, 0)
    assert content(pool, tables, 0) == list(range(11))
    assert (pool.stats().blocks_used, pool.stats().blocks_shared) == (3, 0)


def test_cached_blocks_may_be_given_up_while_the_row_is_away():
    pool = small_pool(8, 4)
    index = PrefixIndex(pool.budget)
    tables = BlockTables(pool, 1)
    write(pool, tables, 9)
    tokens = np.arange(9)
    keys, cached = block_keys(root_key(), tokens, 4), full_blocks(tokens, 4)
    index.put(pool.allocator, keys, cached, tables.blocks(0)[:2])
    swapped = SwappedRow(pool, tables, 0)
    assert (swapped.num_blocks, pool.stats().blocks_used, pool.stats().blocks_cached) == (3, 2, 2)
    other = BlockTables(pool, 1)
    write(pool, other, 32, start=7000)
    assert len(index) == 0
    other.release()
    swapped.restore(tables, 0)
    assert content(pool, tables, 0) == list(range(9))


def test_a_row_that_finds_no_room_stays_swapped():
    pool = small_pool(8, 4)
    tables = BlockTables(pool, 2)
    write(pool, tables, 10, 3)
    swapped = SwappedRow(pool, tables, 0)
    write(pool, tables, 0, 21)  # 24 tokens: 6 of 8 blocks
    before = pool.allocator.ref_counts.tolist()
    with pytest.raises(PoolExhausted, match="3 needed, 2 free"):
        swapped.restore(tables, 0)
    assert (pool.allocator.ref_counts.tolist(), tables.seq_lens.tolist()) == (before, [0, 24])
    tables.empty(ints(1))
    swapped.restore(tables, 0)
    assert content(pool, tables, 0) == list(range(10))
    with pytest.raises(ValueError, match="restored before"):
        swapped.restore(tables, 1)


def test_a_row_that_holds_tokens_is_not_written_over():
    pool = small_pool(8, 4)
    tables = BlockTables(pool, 2)
    write(pool, tables, 6, 6)
    swapped = SwappedRow(pool, tables, 0)
    before = pool.allocator.ref_counts.tolist()
    with pytest.raises(ValueError, match="must be 0 for rows that hold tokens"):
        swapped.restore(tables, 1)
    assert pool.allocator.ref_counts.tolist() == before
    swapped.restore(tables, 0)
    assert content(pool, tables, 0) == list(range(6))


def test_a_dropped_swapped_row_gives_back_what_it_held():
    pool = small_pool(8, 4)
    tables = BlockTables(pool, 1)
    write(pool, tables, 8)
    tables.select(ints(0, 0))
    swapped = SwappedRow(pool, tables, 0)
    assert swapped.num_blocks == 0
    tables.release()
    assert pool.stats().blocks_used == 2
    del swapped
    gc.collect()
    assert pool.stats().blocks_used == 0


def swapped_out(pool, tables):
    with pool.lock:
        swapped = SwappedTables(pool, tables)
        swapped.leave()
    return swapped


def test_a_batch_goes_and_comes_back_with_what_its_rows_share():
    pool = small_pool(8, 4)
    tables = BlockTables(pool, 1)
    write(pool, tables, 10)
    tables.select(ints(0, 0, 0))
    write(pool, tables, 1, 2, 0)
    refs, held = sorted(pool.allocator.ref_counts.tolist()), [content(pool, tables, row) for row in range(3)]
    swapped = swapped_out(pool, tables)
    # Two full blocks that all share, and a third of each row's own.
    assert (swapped.num_blocks, pool.stats().blocks_used, tables.seq_lens.tolist()) == (5, 0, [0, 0, 0])
    other = BlockTables(pool, 1)
    write(pool, other, 32, start=7000)
    other.release()
    swapped.restore(pool.allocator.allocate(swapped.num_blocks))
    assert sorted(pool.allocator.ref_counts.tolist()) == refs
    assert [content(pool, tables, row) for row in range(3)] == held
    write(pool, tables, 4, 4, 4)
    assert tables.seq_lens.tolist() == [15, 16, 14]
    tables.release()
    assert pool.stats().blocks_used == 0


def test_a_batch_comes_back_with_the_past_it_was_to_go_back_to():
    pool = small_pool(8, 4, sliding_window=6)
    tables = BlockTables(pool, 1)
    write(pool, tables, 9)
    tables.record_past = True
    write(pool, tables, 8)
    swapped = swapped_out(pool, tables)
    swapped.restore(pool.allocator.allocate(swapped.num_blocks))
    tables.crop(ints(8))
    assert content(pool, tables, 0, begin=4) == list(range(4, 9))


def test_a_batch_leaves_what_others_hold():
    pool = small_pool(8, 4)
    index = PrefixIndex(pool.budget)
    tables = BlockTables(pool, 1)
    write(pool, tables, 17)
    tokens = np.arange(8)
    keys, cached = block_keys(root_key(), tokens, 4), full_blocks(tokens, 4)
    index.put(pool.allocator, keys, cached, tables.blocks(0)[:2])
    other = tables.fork()
    other.crop(ints(5))
    swapped = swapped_out(pool, tables)
    assert (swapped.num_blocks, pool.stats().blocks_used) == (2, 3), "the other batch holds three"
    other.release()
    assert pool.stats().blocks_used == 3
    swapped.restore(pool.allocator.allocate(2))
    assert content(pool, tables, 0) == list(range(17))
    swapped = swapped_out(pool, tables)
    assert pool.stats().blocks_used == pool.stats().blocks_cached == 2, "the index alone holds these"
    index.flush()
    tables.release()
    del swapped
    gc.collect()
    assert pool.stats().blocks_used == 0


def test_a_batch_is_put_back_where_no_row_is():
    pool = small_pool(8, 4)
    tables = BlockTables(pool, 1)
    write(pool, tables, 6)
    swapped = swapped_out(pool, tables)
    write(pool, tables, 3)
    before = pool.allocator.ref_counts.tolist()
    with pytest.raises(ValueError, match="those here empty"):
        swapped.restore(pool.allocator.allocate(2))
    assert pool.allocator.ref_counts.tolist() == before
