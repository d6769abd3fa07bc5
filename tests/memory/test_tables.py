"""BlockTables: exact tables, slots and copies of single edits."""

import numpy as np
import pytest
import torch

from torch_paged.memory import BlockTables, MemoryBudget, Pool, PoolExhausted


def counts(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def rows_of(tables: BlockTables) -> list[list[int]]:
    return tables.step()[0].tolist()


def test_append_allocates_row_by_row(make_pool):
    tables = BlockTables(make_pool(), 3)
    assert tables.append(counts(5, 0, 4)).shape == (0, 2)
    assert rows_of(tables) == [[0, 1], [-1, -1], [2, -1]]
    tables.append(counts(3, 1, 1))
    assert rows_of(tables) == [[0, 1], [3, -1], [2, 4]]
    assert tables.seq_lens.tolist() == [8, 1, 5]


def test_step_is_a_copy_in_the_types_of_the_ops(make_pool):
    tables = BlockTables(make_pool(), 2)
    block_table, seq_lens = tables.step()
    assert (block_table.dtype, block_table.shape) == (torch.int32, (2, 1))
    assert (seq_lens.dtype, seq_lens.tolist()) == (torch.int32, [0, 0])
    tables.append(counts(9, 2))
    assert block_table.tolist() == [[-1], [-1]] and seq_lens.tolist() == [0, 0]
    block_table, seq_lens = tables.step()
    before = tables.seq_lens
    tables.release()
    assert block_table.tolist() == [[0, 1, 2], [3, -1, -1]]
    assert seq_lens.tolist() == before.tolist() == [9, 2]


def test_a_batch_without_rows(make_pool):
    tables = BlockTables(make_pool(), 0)
    assert tables.append(counts()).shape == (0, 2)
    assert tables.slots(counts(), None, 3).shape == (0,)
    assert tables.step()[0].shape == (0, 1)
    tables.select(counts())
    tables.crop(counts())
    assert tables.num_seqs == 0


def test_a_copy_that_fails_leaves_the_rows_as_they_were(make_pool):
    pool = make_pool()
    tables = BlockTables(pool, 1)
    tables.append(counts(6))
    twin = tables.fork()
    mappings = []

    def fail(block_mapping):
        mappings.append(block_mapping.tolist())
        raise MemoryError("planted")

    with pytest.raises(MemoryError, match="planted"):
        twin.append(counts(5), fail)
    ((mapping,),) = mappings
    assert mapping[0] == 1 and mapping[1] in (2, 3)
    assert rows_of(twin) == rows_of(tables) == [[0, 1]]
    assert twin.seq_lens.tolist() == [6]
    assert (pool.allocator.num_used, pool.allocator.num_shared) == (2, 2)
    twin.append(counts(5))
    assert rows_of(twin)[0][0] == 0 and 1 not in rows_of(twin)[0]


def test_slots_of_a_left_padded_batch(make_pool):
    tables = BlockTables(make_pool(), 2)
    valid = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], dtype=bool)
    tables.append(counts(3, 5))
    assert tables.slots(counts(3, 5), valid, 5).tolist() == [-1, -1, 0, 1, 2, 4, 5, 6, 7, 8]
    tables.append(counts(2, 2))
    assert tables.slots(counts(2, 2), None, 2).tolist() == [3, 12, 9, 10]


def test_slots_of_rows_that_append_nothing(make_pool):
    tables = BlockTables(make_pool(), 2)
    tables.append(counts(4, 2))
    tables.append(counts(0, 1))
    assert tables.slots(counts(0, 1), np.array([[False], [True]]), 1).tolist() == [-1, 6]


def test_slots_of_a_mask_with_holes(make_pool):
    tables = BlockTables(make_pool(), 1)
    tables.append(counts(3))
    assert tables.slots(counts(3), np.array([[1, 0, 1, 0, 1]], dtype=bool), 5).tolist() == [0, -1, 1, -1, 2]


@pytest.mark.parametrize(
    "num_tokens, valid, width, message",
    [
        (counts(2, 2), None, 3, r"valid: \[3, 3\] tokens per row; must be \[2, 2\]"),
        (counts(1, 2), np.ones((2, 2), bool), 2, r"valid: \[2, 2\] tokens per row; must be \[1, 2\]"),
        (counts(2, 2), np.ones((2, 3), bool), 2, r"valid: shape \[2, 3\]; must be \[2, 2\]"),
        (counts(2), None, 2, r"num_tokens: shape \[1\]; must be \[2\]"),
        (counts(5, 2), None, 5, r"num_tokens: \[5, 2\]; must be at most \[4, 4\]"),
    ],
)
def test_slots_refuses(make_pool, num_tokens, valid, width, message):
    tables = BlockTables(make_pool(), 2)
    tables.append(counts(4, 4))
    with pytest.raises(ValueError, match=message):
        tables.slots(num_tokens, valid, width)


def test_a_fork_copies_only_the_partly_filled_tail_it_writes(make_pool):
    pool = make_pool()
    prompt = BlockTables(pool, 1)
    prompt.append(counts(6))
    other = prompt.fork()
    assert pool.allocator.ref_counts[:3].tolist() == [2, 2, 0]
    assert other.append(counts(1)).tolist() == [[1, 2]]
    assert (rows_of(prompt), rows_of(other)) == ([[0, 1]], [[0, 2]])
    assert prompt.append(counts(1)).tolist() == []
    assert pool.allocator.ref_counts[:3].tolist() == [2, 1, 1]


def test_rows_that_share_a_full_tail_copy_nothing(make_pool):
    tables = BlockTables(make_pool(), 1)
    tables.append(counts(4))
    tables.select(counts(0, 0))
    assert tables.append(counts(1, 1)).tolist() == []
    assert rows_of(tables) == [[0, 1], [0, 2]]


def test_where_all_owners_write_one_keeps_the_block(make_pool):
    tables = BlockTables(make_pool(), 2)
    tables.append(counts(2, 3))
    tables.select(counts(0, 0, 0, 1))
    assert tables.append(counts(1, 1, 1, 1)).tolist() == [[0, 2], [0, 3]]
    assert rows_of(tables) == [[0], [2], [3], [1]]


def test_where_one_owner_only_reads_all_writers_copy(make_pool):
    tables = BlockTables(make_pool(), 1)
    tables.append(counts(2))
    tables.select(counts(0, 0, 0))
    assert tables.append(counts(1, 0, 1)).tolist() == [[0, 1], [0, 2]]
    assert rows_of(tables) == [[1], [0], [2]]


def test_a_cropped_row_does_not_write_into_a_block_another_row_has_filled(make_pool):
    tables = BlockTables(make_pool(), 1)
    tables.append(counts(4))
    tables.select(counts(0, 0))
    tables.crop(counts(2, 0))
    assert tables.append(counts(1, 0)).tolist() == [[0, 1]]
    assert rows_of(tables) == [[1], [0]]


def test_select_reorders_repeats_and_drops(make_pool):
    pool = make_pool()
    tables = BlockTables(pool, 3)
    tables.append(counts(4, 8, 1))
    tables.select(counts(2, 0, 0, 2))
    assert rows_of(tables) == [[3], [0], [0], [3]]
    assert tables.seq_lens.tolist() == [1, 4, 4, 1]
    assert pool.allocator.ref_counts[:4].tolist() == [2, 0, 0, 2]
    tables.select(counts(3))
    assert pool.allocator.ref_counts[:4].tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("rows", [counts(0, 2), counts(-1), np.zeros((1, 1), np.int64)])
def test_select_refuses(make_pool, rows):
    pool = make_pool()
    tables = BlockTables(pool, 2)
    tables.append(counts(4, 4))
    with pytest.raises(ValueError, match=r"rows: .*; must be 1-D and in \[0, 2\)"):
        tables.select(rows)
    assert (rows_of(tables), pool.allocator.num_used) == ([[0], [1]], 2)


def test_crop_gives_whole_blocks_back(make_pool):
    pool = make_pool()
    tables = BlockTables(pool, 3)
    tables.append(counts(9, 4, 3))
    tables.crop(counts(5, 0, 3))
    assert rows_of(tables) == [[0], [3], [-1]]
    assert (tables.seq_lens.tolist(), pool.allocator.num_used) == ([4, 4, 0], 2)


@pytest.mark.parametrize(
    "edit, num_tokens, message",
    [
        ("append", counts(1), r"num_tokens: shape \[1\]; must be \[2\]"),
        ("append", counts(1, -1), r"num_tokens: \[1, -1\]; must be at least 0"),
        ("crop", counts(0, -1), r"num_tokens: \[0, -1\]; must be at least 0"),
        ("crop", counts(0, 3), r"num_tokens: \[0, 3\]; must be at most \[4, 2\] \(seq_lens\)"),
    ],
)
def test_append_and_crop_refuse(make_pool, edit, num_tokens, message):
    tables = BlockTables(make_pool(), 2)
    tables.append(counts(4, 2))
    with pytest.raises(ValueError, match=message):
        getattr(tables, edit)(num_tokens)
    assert (rows_of(tables), tables.seq_lens.tolist()) == ([[0], [1]], [4, 2])


def test_negative_number_of_rows_is_refused(make_pool):
    with pytest.raises(ValueError, match="num_seqs: -1; must be at least 0"):
        BlockTables(make_pool(), -1)


def test_exhaustion_changes_nothing(make_pool):
    pool = make_pool(num_blocks=4, sliding_window=2)
    tables = BlockTables(pool, 2)
    tables.append(counts(6, 2))
    tables.select(counts(0, 1, 1))
    before = rows_of(tables), tables.seq_lens.tolist(), pool.allocator.ref_counts.tolist(), pool.stats()
    with pytest.raises(PoolExhausted) as caught:
        tables.append(counts(11, 1, 1))
    # 17 tokens are three more blocks, and one of two sharers needs a copy; one block is free, the window frees another.
    assert (caught.value.needed, caught.value.free) == (4, 2)
    assert (rows_of(tables), tables.seq_lens.tolist(), pool.allocator.ref_counts.tolist(), pool.stats()) == before


def test_release_is_idempotent_and_leaves_an_empty_batch(make_pool):
    pool = make_pool()
    tables = BlockTables(pool, 2)
    tables.append(counts(4, 5))
    tables.release()
    tables.release()
    assert (pool.stats().blocks_used, rows_of(tables), tables.seq_lens.tolist()) == (0, [[-1], [-1]], [0, 0])
    tables.append(counts(1, 1))
    assert rows_of(tables) == [[0], [1]]


def test_a_dead_batch_gives_its_blocks_back_and_a_shared_one_stays(make_pool):
    pool = make_pool(num_blocks=3)
    tables = BlockTables(pool, 1)
    tables.append(counts(8))
    other = tables.fork()
    other.append(counts(1))
    del tables
    assert pool.stats().blocks_used == 3
    del other
    assert BlockTables(pool, 1).append(counts(12)).shape == (0, 2)
    assert pool.stats().blocks_used == 0


def test_a_batch_may_die_in_the_middle_of_an_edit(make_pool, monkeypatch):
    """The collector runs finalizers wherever memory is allocated, also between two lines of the allocator."""
    pool = make_pool()
    dying = [BlockTables(pool, 1)]
    dying[0].append(counts(8))
    lowest_free = pool.allocator._lowest_free

    def lowest_free_while_a_batch_dies(n):
        ids = lowest_free(n)
        dying.clear()
        return ids

    monkeypatch.setattr(pool.allocator, "_lowest_free", lowest_free_while_a_batch_dies)
    tables = BlockTables(pool, 1)
    tables.append(counts(8))
    tables.append(counts(8))
    assert rows_of(tables) == [[2, 3, 0, 1]]


def test_a_batch_is_edited_before_the_pool_has_blocks():
    pool = Pool(num_layers=1, block_size=4, budget=MemoryBudget(2**20, torch.device("cpu")), device=torch.device("cpu"))
    tables = BlockTables(pool, 2)
    tables.append(counts(0, 0))
    tables.select(counts(1, 0, 0))
    tables.crop(counts(0, 0, 0))
    other = tables.fork()
    tables.release()
    assert other.num_seqs == 3 and rows_of(other) == [[-1]] * 3
    with pytest.raises(RuntimeError, match=r"no blocks before the first call of layer\(\)"):
        other.append(counts(1, 0, 0))
    assert other.seq_lens.tolist() == [0, 0, 0]


def test_blocks_that_left_the_window_are_freed(make_pool):
    pool = make_pool(sliding_window=5)
    tables = BlockTables(pool, 2)
    tables.append(counts(8, 2))
    assert rows_of(tables) == [[0, 1], [2, -1]]
    # The query at position 8 sees keys 4..8: block 0 goes, and is the lowest free one when position 8 needs a block.
    tables.append(counts(1, 0))
    assert rows_of(tables) == [[-1, 1, 0], [2, -1, -1]]
    tables.append(counts(3, 1))
    assert rows_of(tables) == [[-1, 1, 0], [2, -1, -1]]
    tables.append(counts(1, 1))
    assert rows_of(tables)[0] == [-1, -1, 0, 1]


@pytest.mark.parametrize("stored, first", [(7, 0), (8, 1), (11, 1), (12, 2)])
def test_a_block_stays_until_its_last_token_left_the_window(make_pool, stored, first):
    """The query at position p sees keys above p - 5; blocks hold 4."""
    tables = BlockTables(make_pool(sliding_window=5), 1)
    tables.append(counts(stored))
    tables.append(counts(1))
    held = [block >= 0 for block in rows_of(tables)[0]]
    assert held == [column >= first for column in range(len(held))]


def test_a_window_block_that_another_row_sees_stays(make_pool):
    pool = make_pool(sliding_window=2)
    tables = BlockTables(pool, 1)
    tables.append(counts(5))
    other = tables.fork()
    tables.append(counts(1))
    assert (rows_of(tables), rows_of(other)) == ([[-1, 2]], [[0, 1]])
    assert pool.allocator.ref_counts[:3].tolist() == [1, 1, 1]


def test_a_chunk_longer_than_the_window_is_stored_whole(make_pool):
    tables = BlockTables(make_pool(sliding_window=3), 1)
    tables.append(counts(12))
    assert rows_of(tables) == [[0, 1, 2]]
    assert tables.slots(counts(12), None, 12).tolist() == list(range(12))
    tables.append(counts(1))
    assert rows_of(tables) == [[-1, -1, 2, 0]]


def test_crop_undoes_the_last_append_in_a_window(make_pool):
    tables = BlockTables(make_pool(sliding_window=5), 1)
    tables.append(counts(8))
    tables.append(counts(7))
    tables.crop(counts(7))
    assert (rows_of(tables), tables.seq_lens.tolist()) == ([[-1, 1]], [8])


def test_crop_over_freed_blocks_is_refused(make_pool):
    pool = make_pool(sliding_window=5)
    tables = BlockTables(pool, 2)
    tables.append(counts(8, 8))
    tables.append(counts(1, 0))
    before = rows_of(tables), pool.allocator.ref_counts.tolist()
    with pytest.raises(ValueError, match=r"must leave the last 5 tokens \(sliding_window\)"):
        tables.crop(counts(2, 0))
    assert (rows_of(tables), pool.allocator.ref_counts.tolist()) == before
    tables.crop(counts(9, 8))
    assert (rows_of(tables), tables.seq_lens.tolist(), pool.stats().blocks_used) == ([[-1], [-1]], [0, 0], 0)
    tables.append(counts(1, 1))
    assert rows_of(tables) == [[0], [1]]
    tables.crop(counts(1, 1))
    assert pool.stats().blocks_used == 0


def test_rows_without_new_tokens_keep_their_window(make_pool):
    tables = BlockTables(make_pool(sliding_window=2), 2)
    tables.append(counts(8, 8))
    tables.append(counts(0, 1))
    assert rows_of(tables) == [[0, 1, -1], [-1, 3, 2]]


def test_recorded_past_is_kept_for_crop(make_pool):
    tables = BlockTables(make_pool(sliding_window=2), 1)
    tables.record_past = True
    tables.append(counts(8))
    tables.append(counts(1))
    assert rows_of(tables) == [[0, 1, 2]]
    fork = tables.fork()
    fork.crop(counts(6))
    assert (rows_of(fork), fork.record_past) == ([[0]], True)


def test_recorded_past_is_dropped_up_to_what_the_window_sees(make_pool):
    pool = make_pool(sliding_window=2)
    tables = BlockTables(pool, 3)
    tables.record_past = True
    tables.append(counts(8, 1, 0))
    tables.append(counts(5, 1, 0))
    tables.crop(counts(4, 0, 0))
    tables.drop_past()
    # Row 0 goes on at 9, whose query sees 8 and 9.
    assert rows_of(tables) == [[-1, -1, 3], [2, -1, -1], [-1, -1, -1]]
    assert pool.stats().blocks_used == 2
    tables.drop_past()
    assert pool.stats().blocks_used == 2
    tables.append(counts(1, 1, 1))
    with pytest.raises(ValueError, match="must leave the last 2 tokens"):
        tables.crop(counts(5, 0, 0))
