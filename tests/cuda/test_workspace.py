"""The memory that attention takes beside its result: parts of the rows that are split, and of no others."""

from __future__ import annotations

from math import prod

import pytest
import torch

from tests.emulator.library import NO_NVCC, emulated, emulated_ops, has_nvcc
from tests.paged_batch import paged_batch
from torch_paged import ops

pytestmark = pytest.mark.skipif(not has_nvcc(), reason=NO_NVCC)
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8


def recorded(rows, **options):
    """The launches of one call, and the bytes it allocated beside its result."""
    batch = paged_batch(rows, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype=torch.bfloat16)
    with emulated("attention"), emulated_ops().recording() as recording:
        out = ops.attention(**batch.arguments, **options)
    assert recording.allocations.pop(0) == out.nbytes
    attention = [launch for launch in recording.launches if "merge" not in launch.kernel]
    assert len(recording.launches) - len(attention) == sum(launch.grid[2] > 1 for launch in attention)
    return attention, recording.allocations


def part_bytes(num_rows):
    """Of rows of one split: the output and its log-sum-exp."""
    return num_rows * (HEAD_DIM + 1) * 4


def test_decode_that_is_split_keeps_its_rows_alone():
    (launch,), allocations = recorded([(1, 900), (1, 300)])
    splits = launch.grid[2]
    assert splits > 1 and allocations == [part_bytes(splits * 2 * HEADS)]


def test_a_prompt_beside_a_decode_is_not_split_with_it():
    """In a batch of both, the prompt's many tokens have no place among the parts of the single queries."""
    (decode, prefill), allocations = recorded([(1, 900), (150, 150)])
    assert decode.grid[2] > 1
    # The launches follow one another, in one memory; in the first a tile is a sequence and has 16 rows.
    parts = [prod(launch.grid) * rows for launch, rows in ((decode, 16), (prefill, 128))]
    assert decode.grid[0] == 2 and allocations == [part_bytes(max(parts))]


def test_a_deterministic_prompt_is_not_split():
    """Otherwise 32 parts of each of its tokens, 17 GB of a prompt of 32K tokens and 32 heads of 128."""
    attention, allocations = recorded([(150, 700)], deterministic=True)
    assert [launch.grid[2] for launch in attention] == [2, 1, 1]
    # Of the launch for single queries, which finds nothing to do.
    assert allocations == [part_bytes(2 * KV_HEADS * 16)]


@pytest.mark.parametrize(("heads", "tile_rows"), [(24, 24), (80, 80)])
def test_single_queries_of_many_heads_are_split_in_any_batch(heads, tile_rows):
    """One KV head's rows are more than the smallest tile has: they take a larger one, in a launch of their own."""
    for rows in ([(1, 900), (1, 700)], [(1, 900), (30, 30)]):
        for options in ({}, {"deterministic": True}):
            batch = paged_batch(rows, num_heads=heads, num_kv_heads=1, head_dim=HEAD_DIM, dtype=torch.bfloat16)
            with emulated("attention"), emulated_ops().recording() as recording:
                ops.attention(**batch.arguments, **options)
            splits = recording.launches[0].grid[2]
            assert splits > 1 and recording.allocations[1] >= part_bytes(splits * 2 * tile_rows)


def test_asked_for_splits_take_the_rows_of_whole_tiles():
    (launch,), allocations = recorded([(150, 150)], num_splits=3)
    assert launch.grid[2] == 3 and allocations == [part_bytes(3 * launch.grid[0] * KV_HEADS * 128)]
