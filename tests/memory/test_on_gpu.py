"""A pool on a GPU, or on the emulated one: memory comes and goes in pages of 2 MiB, and what blocks hold stays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import pytest
import torch

from tests.emulator.device_memory import PAGE, collect_garbage
from torch_paged.memory import BlockTables, MemoryBudget, Pool, block_memory, pool
from torch_paged.memory.block_memory import DeviceMemory

# 2 layers, keys and values: 4 caches of 24 blocks of 1 MiB.
BLOCKS, BLOCK_SIZE, HEADS, HEAD_DIM, LAYERS = 24, 256, 8, 128, 2
BLOCK_BYTES = BLOCK_SIZE * HEADS * HEAD_DIM * 4
CACHES = 2 * LAYERS


class Device(NamedTuple):
    """Where pools lie, the bytes that are in use there, and how many of them may be others': of torch, and of code."""

    device: torch.device
    in_use: Callable[[], int]
    others: int = 0


@pytest.fixture(params=["emulated", pytest.param("hardware", marks=pytest.mark.cuda)])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    if request.param == "hardware":
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        yield Device(torch.device("cuda"), lambda: free - torch.cuda.mem_get_info()[0], 24 << 20)
        return
    from tests.emulator import library

    if not library.has_nvcc():
        pytest.skip(library.NO_NVCC)
    with library.emulated("copy_blocks") as ops, ops.device_memory.device(PAGE) as memory:
        like = torch.empty(0, dtype=torch.uint8)
        monkeypatch.setattr(pool, "block_memory", lambda layout, _: block_memory.device_memory(layout, like))
        yield Device(torch.device("cpu"), lambda: memory.held.mapped)


def make_pool(gpu: Device) -> Pool:
    budget = MemoryBudget(BLOCKS * CACHES * BLOCK_BYTES, gpu.device)
    made = Pool(num_layers=LAYERS, block_size=BLOCK_SIZE, budget=budget, device=gpu.device)
    made.layer(0, *[torch.zeros(1, HEADS, 1, HEAD_DIM, device=gpu.device)] * 2)
    assert isinstance(made._memory, DeviceMemory)
    return made


def caches(pool: Pool) -> list[torch.Tensor]:
    like = torch.zeros(1, HEADS, 1, HEAD_DIM, device=pool.device)
    return [cache for index in range(LAYERS) for cache in pool.layer(index, like, like)]


def grown(pool: Pool, blocks: int) -> BlockTables:
    tables = BlockTables(pool, 1)
    tables.append(np.array([blocks * BLOCK_SIZE]))
    return tables


def fill(pool: Pool, tables: BlockTables, value: int) -> None:
    """Each block of a row in each cache with a number of its own."""
    for number, cache in enumerate(caches(pool)):
        for block in tables.blocks(0).tolist():
            cache[block] = 1000 * value + 100 * number + block


def holds(pool: Pool, tables: BlockTables, value: int) -> bool:
    return all(
        bool((cache[block] == 1000 * value + 100 * number + block).all())
        for number, cache in enumerate(caches(pool))
        for block in tables.blocks(0).tolist()
    )


def test_pages_come_and_go_and_content_stays(gpu):
    made = make_pool(gpu)
    before = gpu.in_use()
    first, kept, last = grown(made, 7), grown(made, 2), grown(made, 9)
    assert gpu.in_use() - before >= (18 * CACHES - 1) * BLOCK_BYTES - PAGE
    fill(made, kept, 3)
    first.release()
    last.release()
    made.trim()
    # The pages of two blocks, which may begin and end in the middle of them, and the first.
    assert gpu.in_use() - before <= CACHES * 2 * PAGE + gpu.others
    assert holds(made, kept, 3)
    again = grown(made, 20)
    fill(made, again, 4)
    assert holds(made, kept, 3) and holds(made, again, 4)


def test_copies_within_the_pool_and_to_the_host(gpu):
    made = make_pool(gpu)
    tables = grown(made, 3)
    fill(made, tables, 5)
    target = grown(made, 1)
    made.copy_blocks(np.array([[tables.blocks(0)[1], target.blocks(0)[0]]]))
    for number, cache in enumerate(caches(made)):
        assert (cache[target.blocks(0)[0]] == 5000 + 100 * number + tables.blocks(0)[1]).all()
    saved = made.save_blocks(tables.blocks(0))
    fill(made, tables, 6)
    made.load_blocks(saved, tables.blocks(0))
    assert holds(made, tables, 5)


def test_all_is_given_back_with_the_last_view(gpu):
    before = gpu.in_use()
    made = make_pool(gpu)
    tables = grown(made, BLOCKS)
    view = caches(made)[3][BLOCKS - 1]
    view.fill_(7)
    del made, tables
    collect_garbage()
    assert (view == 7).all() and gpu.in_use() - before >= (BLOCKS * CACHES - 1) * BLOCK_BYTES
    del view
    collect_garbage()
    if gpu.device.type == "cuda":
        torch.cuda.empty_cache()
    assert gpu.in_use() - before <= gpu.others
