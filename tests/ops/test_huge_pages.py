"""Caches on the CPU ask for large pages, but for their first 2 MiB."""

import re
from pathlib import Path

import pytest
import torch

from torch_paged import ops
from torch_paged.memory import MemoryBudget, Pool
from torch_paged.memory.reservation import reserve
from torch_paged.ops.huge_pages import SMALL_PAGES, prefer_huge_pages

HAVE_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled").exists()
needs_huge_pages = pytest.mark.skipif(not HAVE_HUGE_PAGES, reason="needs a kernel with transparent huge pages")
HUGE = 2 << 20


def wants_huge_pages(address: int) -> bool:
    """Whether the mapping with `address` was advised to use large pages, as the kernel tells."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError(f"no mapping holds {address:#x}")


@needs_huge_pages
def test_all_but_the_first_bytes_of_a_cache():
    storage = reserve(64 << 20)
    prefer_huge_pages(storage, 16 << 20, 48 << 20)
    start = storage.data_ptr()
    wanted = {offset: wants_huge_pages(start + (offset << 20)) for offset in (0, 15, 17, 23, 40, 45, 49)}
    assert wanted == {0: False, 15: False, 17: False, 23: True, 40: True, 45: True, 49: False}


@needs_huge_pages
def test_a_pool_and_an_empty_cache_ask():
    pool = Pool(
        num_layers=2, block_size=16, budget=MemoryBudget(256 << 20, torch.device("cpu")), device=torch.device("cpu")
    )
    rows = torch.empty(1, 8, 1, 128)
    caches = [
        *pool.layer(0, rows, rows),
        *pool.layer(1, rows, rows),
        *ops.empty_cache(512, 16, 8, 128, dtype=torch.float32, device="cpu"),
    ]
    for cache in caches:
        assert wants_huge_pages(cache.data_ptr() + SMALL_PAGES + HUGE)


def test_opcheck():
    torch.library.opcheck(torch.ops.paged._prefer_huge_pages, (reserve(8 << 20), 0, 8 << 20))


@pytest.mark.parametrize(
    "break_it, message",
    [
        (lambda s: (s, -1, 4), r"begin, end: \[-1, 4\); must be ascending and in"),
        (lambda s: (s, 8, 4), r"begin, end: \[8, 4\); must be ascending"),
        (lambda s: (s, 0, s.numel() + 1), r"begin, end: .*; must be ascending and in"),
        (lambda s: (s.view(torch.int8), 0, 4), "storage: int8; must be uint8"),
        (lambda s: (s.view(2, -1), 0, 4), "storage: shape .*; must be 1-D"),
        (lambda s: (s[::2], 0, 4), "storage: strides .*; must be contiguous"),
    ],
)
def test_rejects(break_it, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.paged._prefer_huge_pages(*break_it(reserve(8192)))
