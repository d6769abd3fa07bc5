"""PrefixIndex: what it finds, what it keeps from being freed, and in which order it gives blocks up."""

import gc
import hashlib

import numpy as np
import pytest
import torch

from tests.memory.small_pool import small_pool
from torch_paged.memory import (
    BlockAllocator,
    BlockTables,
    MemoryBudget,
    PoolExhausted,
    PrefixIndex,
    block_keys,
    full_blocks,
    hit_length,
    root_key,
)

ROOT = root_key(b"salt", b"model")


def ints(*values):
    return np.array(values, dtype=np.int64)


def chain(*tokens, size=2):
    return block_keys(ROOT, ints(*tokens), size), full_blocks(ints(*tokens), size)


@pytest.fixture
def pool():
    """(allocator of 6 blocks, index)"""
    budget = MemoryBudget(600, torch.device("cpu"))
    return BlockAllocator(6, budget, 100), PrefixIndex(budget)


def remember(pool, *tokens):
    """Put a sequence that is gone at once; its blocks."""
    allocator, index = pool
    keys, blocks_of_tokens = chain(*tokens)
    blocks = allocator.allocate(len(keys))
    index.put(allocator, keys, blocks_of_tokens, blocks)
    allocator.release(blocks)
    return blocks.tolist()


def find(pool, *tokens):
    return pool[1].find(pool[0], *chain(*tokens)).tolist()


def test_keys_are_a_chain_of_sha256_over_fields_with_their_lengths():
    def field(value):
        return len(value).to_bytes(8, "little") + value

    def tokens(*values):
        return b"".join(value.to_bytes(8, "little") for value in values)

    first = hashlib.sha256(field(ROOT) + field(tokens(5, 6))).digest()
    second = hashlib.sha256(field(first) + field(tokens(7, 300))).digest()
    assert block_keys(ROOT, ints(5, 6, 7, 300, 9), 2) == [first, second]
    assert hashlib.sha256(field(b"salt") + field(b"model")).digest() == ROOT


def test_fields_do_not_run_into_one_another():
    assert len({root_key(b"ab", b"c"), root_key(b"a", b"bc"), root_key(b"abc"), root_key(b"abc", b"")}) == 4


def test_what_was_put_is_found_and_nothing_else(pool):
    blocks = remember(pool, 1, 2, 3, 4, 5)
    assert find(pool, 1, 2, 3, 4, 9, 9) == [*blocks, -1]
    assert find(pool, 3, 4, 1, 2) == [-1, -1], "the same block after other tokens"
    assert find(pool, 1, 2, 3, 5) == [blocks[0], -1]
    assert find(pool) == []
    assert pool[1].find(BlockAllocator(6), *chain(1, 2)).tolist() == [-1], "another pool"


def test_another_root_shares_nothing(pool):
    remember(pool, 1, 2, 3, 4)
    keys = block_keys(root_key(b"other salt", b"model"), ints(1, 2, 3, 4), 2)
    assert pool[1].find(pool[0], keys, full_blocks(ints(1, 2, 3, 4), 2)).tolist() == [-1, -1]


def test_tokens_are_compared_on_a_hit(pool):
    remember(pool, 1, 2, 3, 4)
    keys, _ = chain(1, 2, 3, 4)
    assert pool[1].find(pool[0], keys, full_blocks(ints(1, 2, 3, 9), 2)).tolist() == [0, -1]
    # A second sequence under the key of the first is not taken for it either.
    block = pool[0].allocate(1)
    pool[1].put(pool[0], keys[:1], full_blocks(ints(8, 8), 2), block)
    assert pool[0].ref_counts[block].tolist() == [1]


def test_blocks_stay_used_until_the_flush(pool):
    allocator, index = pool
    remember(pool, 1, 2, 3, 4)
    assert (allocator.num_used, index.num_unheld(allocator), len(index)) == (2, 2, 2)
    allocator.retain(ints(1))
    assert (index.num_unheld(allocator), index.blocks(allocator).tolist()) == (1, [0, 1])
    index.flush()
    assert (allocator.ref_counts.tolist(), len(index), index.num_unheld(allocator)) == ([0, 1, 0, 0, 0, 0], 0, 0)
    assert find(pool, 1, 2, 3, 4) == [-1, -1]


def test_a_second_block_of_the_same_tokens_is_not_kept(pool):
    allocator, _ = pool
    first = remember(pool, 1, 2, 3, 4)
    remember(pool, 1, 2, 3, 4)
    assert find(pool, 1, 2, 3, 4) == first
    assert allocator.num_used == 2


def test_the_last_block_of_the_sequence_used_longest_ago_goes_first(pool):
    allocator, _ = pool
    remember(pool, 1, 1, 2, 2, 3, 3)
    remember(pool, 7, 7, 8, 8)
    allocator.allocate(2)
    assert (find(pool, 1, 1, 2, 2, 3, 3), find(pool, 7, 7, 8, 8)) == ([0, 1, -1], [3, 4])
    allocator.allocate(2)
    assert (find(pool, 1, 1, 2, 2), find(pool, 7, 7, 8, 8)) == ([-1, -1], [3, 4])


def test_touched_sequences_go_last(pool):
    allocator, index = pool
    remember(pool, 1, 1, 2, 2, 3, 3)
    remember(pool, 7, 7, 8, 8, 9, 9)
    index.touch(chain(1, 1, 2, 2, 3, 3)[0])
    allocator.allocate(3)
    assert (find(pool, 1, 1, 2, 2, 3, 3), find(pool, 7, 7, 8, 8, 9, 9)) == ([0, 1, 2], [-1, -1, -1])


def test_held_blocks_are_not_given_up(pool):
    allocator, index = pool
    remember(pool, 1, 1, 2, 2, 3, 3)
    allocator.retain(ints(0, 2))
    with pytest.raises(PoolExhausted, match="5 needed, 4 free, 2 in use"):
        allocator.allocate(5)
    assert find(pool, 1, 1, 2, 2, 3, 3) == [0, -1, 2]
    allocator.release(ints(0, 2))
    assert allocator.allocate(6).tolist() == [0, 1, 2, 3, 4, 5]
    assert len(index) == 0


def test_nothing_is_given_up_while_blocks_are_free(pool):
    remember(pool, 1, 1, 2, 2, 3, 3)
    pool[0].allocate(3)
    assert find(pool, 1, 1, 2, 2, 3, 3) == [0, 1, 2]


def test_pools_of_one_budget_make_room_for_one_another():
    budget = MemoryBudget(1000, torch.device("cpu"))
    full, sliding, index = BlockAllocator(10, budget, 100), BlockAllocator(10, budget, 50), PrefixIndex(budget)
    keys, tokens = chain(1, 1, 2, 2, 3, 3, 4, 4)
    for allocator in (full, sliding):
        blocks = allocator.allocate(4)
        index.put(allocator, keys, tokens, blocks)
        allocator.release(blocks)
    assert budget.used_bytes == 600
    full.allocate(6)  # 200 bytes are missing: the last two blocks go, in both pools
    assert index.find(full, keys, tokens).tolist() == index.find(sliding, keys, tokens).tolist() == [0, 1, -1, -1]
    assert budget.used_bytes == 900


@pytest.mark.parametrize("block", [-2, 6, 3])
def test_put_refuses_a_block_that_is_not_used(pool, block):
    allocator, index = pool
    keys, tokens = chain(1, 2, 3, 4)
    blocks = ints(*allocator.allocate(1), block)
    if block == -2:
        index.put(allocator, keys, tokens, blocks)  # any negative number means no block
        assert len(index) == 1
        return
    with pytest.raises(ValueError, match="ids: "):
        index.put(allocator, keys, tokens, blocks)
    assert (len(index), len(index.blocks(allocator)), allocator.ref_counts.tolist()) == (0, 0, [1, 0, 0, 0, 0, 0])


@pytest.mark.parametrize(
    "found, expected",
    [
        ([(0, ints(5, 6, -1, 8))], 2),
        ([(0, ints(5, 6, 7, 8))], 4),
        # The token at 16 sees positions from 16 - window + 1: block 3 alone up to a window of 5.
        ([(5, ints(-1, -1, -1, 8))], 4),
        ([(6, ints(-1, -1, -1, 8))], 0),
        ([(6, ints(-1, -1, 7, 8))], 4),
        ([(1, ints(-1, -1, -1, -1))], 4),
        ([(3, ints(-1, 6, -1, -1))], 2),
        ([(0, ints(5, 6, 7, 8)), (5, ints(-1, 6, 7, -1))], 3),
        ([(0, ints(5, 6, -1, 8)), (5, ints(-1, -1, -1, 8))], 0),
        ([(0, ints(5, 6, 7, 8)), (4, ints(5, -1, 7, 8)), (9, ints(5, 6, 7, -1))], 3),
        ([(0, ints(5, 6, 7, 8)), (4, ints(5, -1, -1, -1)), (9, ints(5, 6, 7, -1))], 1),
        ([(0, ints())], 0),
        ([], 0),
    ],
)
def test_hit_length_is_the_longest_all_pools_agree_on(found, expected):
    assert hit_length(found, 4) == expected


@pytest.mark.parametrize("window", [0, 6])
def test_adopted_rows_share_blocks_and_go_on_behind_them(window):
    pool = small_pool(8, 4, sliding_window=window)
    before = BlockTables(pool, 1)
    before.append(ints(12))
    blocks = np.stack([before.blocks(0), before.blocks(0)])
    gone = 1 if window else 0  # the token at 12 sees 7 to 12 through a window of 6
    blocks[:, :gone] = -1
    rows = BlockTables(pool, 3)
    rows.adopt(np.concatenate([np.full((1, 3), -1), blocks]), ints(0, 12, 12))
    assert rows.seq_lens.tolist() == [0, 12, 12]
    assert pool.allocator.ref_counts.tolist() == [1] * gone + [3] * (3 - gone) + [0] * 5
    assert len(rows.append(ints(1, 2, 1))) == 0, "full blocks are not copied"
    assert rows.blocks(1).tolist()[gone:3] == before.blocks(0).tolist()[gone:]
    assert rows.slots(ints(1, 2, 1), np.array([[1, 0], [1, 1], [1, 0]]), 2).tolist() == [12, -1, 16, 17, 20, -1]
    del rows
    gc.collect()
    pool.trim()
    assert pool.allocator.ref_counts.tolist() == [1, 1, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    "blocks, num_tokens, message",
    [
        ([[0, -1], [-1, -1]], [8, 0], "must be those of"),
        ([[0, 1], [-1, -1]], [4, 0], "must be those of"),
        ([[0, 1], [0, -1]], [8, 0], "must be those of"),
        ([[0, 1]], [8, 0], r"shape \[1, 2\]"),
        ([[0], [-1]], [8, 0], r"shape \[2, 1\]"),
        ([[0, 5], [-1, -1]], [8, 0], "block 5 with 0 references"),
        ([[-1, -1], [0, 1]], [0, 8], "must be 0 for rows that hold tokens"),
        ([[0, 1], [-1, -1]], [8], "num_tokens: shape"),
    ],
)
def test_adopt_refuses_what_does_not_fit_and_changes_nothing(make_pool, blocks, num_tokens, message):
    pool = make_pool(8, 4)
    tables = BlockTables(pool, 2)
    tables.append(ints(0, 8))
    before = pool.allocator.ref_counts.tolist()
    with pytest.raises(ValueError, match=message):
        tables.adopt(np.array(blocks, dtype=np.int64), np.array(num_tokens, dtype=np.int64))
    assert (pool.allocator.ref_counts.tolist(), tables.seq_lens.tolist()) == (before, [0, 8])
