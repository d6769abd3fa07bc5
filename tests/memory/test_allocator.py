"""BlockAllocator: which ids it hands out, how it counts references, what it refuses."""

import pickle

import numpy as np
import pytest
import torch

from torch_paged.memory import BlockAllocator, MemoryBudget, PoolExhausted


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def snapshot(allocator: BlockAllocator) -> tuple:
    a = allocator
    return a.ref_counts.tolist(), a.num_used, a.num_shared, a.num_free, a.peak_used, a.peak_shared


def test_lowest_free_ids_first():
    allocator = BlockAllocator(10)
    assert allocator.allocate(3).tolist() == [0, 1, 2]
    assert allocator.allocate(4).tolist() == [3, 4, 5, 6]
    allocator.release(ids(5, 1, 3))
    assert allocator.allocate(2).tolist() == [1, 3]
    assert allocator.allocate(3).tolist() == [5, 7, 8]
    assert allocator.allocate(0).tolist() == []


def test_lowest_free_ids_across_a_long_used_stretch():
    allocator = BlockAllocator(10_000)
    allocator.allocate(9_000)
    allocator.release(ids(3, 4_000))
    assert allocator.allocate(3).tolist() == [3, 4_000, 9_000]


def test_references_are_counted_per_occurrence():
    allocator = BlockAllocator(4)
    allocator.allocate(3)
    allocator.retain(ids(1, 1, 2))
    assert allocator.ref_counts.tolist() == [1, 3, 2, 0]
    assert (allocator.num_used, allocator.num_shared, allocator.num_free) == (3, 2, 1)
    allocator.release(ids(1, 2, 2, 1))
    assert allocator.ref_counts.tolist() == [1, 1, 0, 0]
    assert (allocator.num_used, allocator.num_shared, allocator.num_free) == (2, 0, 2)


def test_exchange_counts_no_peak_in_between():
    allocator = BlockAllocator(4)
    allocator.allocate(2)
    allocator.retain(ids(0))
    allocator.exchange(ids(1), ids(0))
    assert allocator.ref_counts.tolist() == [1, 2, 0, 0]
    assert (allocator.num_shared, allocator.peak_shared) == (1, 1)


def test_exchange_of_a_block_for_itself_keeps_it():
    allocator = BlockAllocator(4)
    allocator.allocate(1)
    allocator.exchange(ids(0), ids(0))
    assert (allocator.ref_counts[0], allocator.num_used) == (1, 1)


def test_peaks_last_until_reset():
    allocator = BlockAllocator(8)
    allocator.allocate(5)
    allocator.retain(ids(0, 1, 2))
    allocator.release(ids(0, 1, 2, 2, 3, 4))
    assert (allocator.num_used, allocator.peak_used, allocator.num_shared, allocator.peak_shared) == (2, 5, 0, 3)
    allocator.reset_peak()
    assert (allocator.peak_used, allocator.peak_shared) == (2, 0)


def test_allocate_may_use_what_it_releases():
    allocator = BlockAllocator(4)
    allocator.allocate(4)
    assert allocator.allocate(2, releasing=ids(1, 3)).tolist() == [1, 3]
    assert allocator.peak_used == 4


def test_exhaustion_changes_nothing():
    allocator = BlockAllocator(6)
    allocator.allocate(5)
    allocator.retain(ids(2))
    before = snapshot(allocator)
    with pytest.raises(PoolExhausted, match=r"4 needed, 3 free, 3 in use; raise max_memory") as caught:
        allocator.allocate(4, releasing=ids(0, 1, 2))
    assert (caught.value.needed, caught.value.free) == (4, 3)
    assert snapshot(allocator) == before
    assert allocator.allocate(1).tolist() == [5]


def test_exhaustion_survives_pickling():
    error = pickle.loads(pickle.dumps(PoolExhausted(4, 3, 5, 4096)))
    assert (error.needed, error.free, error.used, error.max_bytes) == (4, 3, 5, 4096)
    assert "4 needed, 3 free, 5 in use; raise max_memory (now 4,096 bytes)" in str(error)


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda a: a.release(ids(0, 0)), "block 0 with 1 references"),
        (lambda a: a.release(ids(0, 1, 1, 1)), "block 1 with 2 references"),
        (lambda a: a.release(ids(3)), "block 3 with 0 references"),
        (lambda a: a.retain(ids(0, 3)), "block 3 with 0 references"),
        (lambda a: a.exchange(ids(3), ids(3)), "block 3 with 0 references"),
        (lambda a: a.release(ids(-1)), r"from -1 to -1; must be in \[0, 5\)"),
        (lambda a: a.retain(ids(0, 5)), r"from 0 to 5; must be in \[0, 5\)"),
        (lambda a: a.allocate(1, releasing=ids(4)), "block 4 with 0 references"),
        (lambda a: a.allocate(-1), "n: -1; must be at least 0"),
    ],
)
def test_wrong_edits_are_refused_and_change_nothing(edit, message):
    allocator = BlockAllocator(5)
    allocator.allocate(3)
    allocator.retain(ids(1))
    before = snapshot(allocator)
    with pytest.raises(ValueError, match=message):
        edit(allocator)
    assert snapshot(allocator) == before


def test_allocators_draw_from_one_budget():
    budget = MemoryBudget(1000, torch.device("cpu"))
    small, large = BlockAllocator(10, budget, 100), BlockAllocator(4, budget, 250)
    large.allocate(3)
    assert (budget.used_bytes, small.num_free, large.num_free) == (750, 2, 1)
    with pytest.raises(PoolExhausted, match="3 needed, 2 free"):
        small.allocate(3)
    small.allocate(2)
    assert (budget.free_bytes, large.num_free) == (50, 0)
    large.release(ids(0, 1, 2))
    assert (budget.used_bytes, small.num_free) == (200, 8)


def test_free_runs_are_told_once():
    allocator = BlockAllocator(10)
    allocator.allocate(7)
    allocator.release(ids(1, 2, 4, 6))
    assert allocator.take_free_runs().tolist() == [[1, 3], [4, 5], [6, 10]]
    allocator.release(ids(5))
    assert allocator.take_free_runs().tolist() == [[1, 3], [4, 10]]
    allocator.release(ids(0, 3))
    assert allocator.take_free_runs().tolist() == [[0, 10]]
    assert allocator.take_free_runs().tolist() == []
