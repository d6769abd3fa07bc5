"""gather_in_huge_pages: the kernel's own count of large pages, and that nothing else changes."""

import mmap
import re
from pathlib import Path

import pytest
import torch

from torch_paged.ops import huge_pages
from torch_paged.ops.huge_pages import gather_in_huge_pages

HUGE = 2 << 20
STATE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def in_huge_pages(tensor: torch.Tensor) -> int:
    """Bytes of large pages in the mappings that hold the tensor, as the kernel tells."""
    first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    inside, nbytes = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) < last and first < int(bounds[2], 16)
        elif inside and (size := re.match(r"AnonHugePages: +(\d+) kB", line)):
            nbytes += int(size[1]) << 10
    return nbytes


def small_pages(nbytes: int) -> torch.Tensor:
    """Random bytes in a mapping of their own."""
    area = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_NOHUGEPAGE)
    tensor = torch.frombuffer(area, dtype=torch.uint8)
    return tensor.random_(generator=torch.Generator().manual_seed(0))


def kernel_can() -> bool:
    return STATE.exists() and "[never]" not in STATE.read_text() and gather_in_huge_pages([small_pages(8 * HUGE)]) > 0


needs_collapse = pytest.mark.skipif(not kernel_can(), reason="needs Linux 6.1 with transparent huge pages")


@needs_collapse
def test_values_and_addresses_stay():
    tensor = small_pages(8 * HUGE)
    before, address = tensor.clone(), tensor.data_ptr()
    assert in_huge_pages(tensor) == 0
    moved = gather_in_huge_pages([tensor])
    assert moved in (7 * HUGE, 8 * HUGE) and in_huge_pages(tensor) >= moved
    assert torch.equal(tensor, before) and tensor.data_ptr() == address
    assert gather_in_huge_pages([tensor]) == moved


@needs_collapse
def test_neighbours_share_a_page():
    area = small_pages(8 * HUGE)
    pieces = list(area.split(HUGE // 2))
    assert gather_in_huge_pages(pieces[::-1]) >= 7 * HUGE
    alone = small_pages(8 * HUGE)
    assert gather_in_huge_pages(list(alone.split(HUGE // 2))[::2]) == 0
    assert in_huge_pages(alone) == 0


def test_nothing_to_move():
    assert gather_in_huge_pages([]) == 0
    assert gather_in_huge_pages([torch.empty(0), torch.ones(3)]) == 0


def test_a_system_set_to_never_use_them_is_left_alone(tmp_path, monkeypatch):
    state = tmp_path / "enabled"
    state.write_text("always madvise [never]\n")
    monkeypatch.setattr(huge_pages, "_STATE", state)
    tensor = small_pages(8 * HUGE)
    assert gather_in_huge_pages([tensor]) == 0 and in_huge_pages(tensor) == 0
    monkeypatch.setattr(huge_pages, "_STATE", tmp_path / "missing")
    assert gather_in_huge_pages([tensor]) == 0 and in_huge_pages(tensor) == 0


def test_opcheck():
    torch.library.opcheck(torch.ops.paged._gather_in_huge_pages, ([torch.ones(4), torch.ones(2)],))
