"""gather_in_huge_pages: the kernel's own count of large pages, and that nothing else changes."""

import ctypes
import mmap
import os
import re
from pathlib import Path

import pytest
import torch

from torch_paged.ops import gather_in_huge_pages as module
from torch_paged.ops.gather_in_huge_pages import gather_in_huge_pages

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


def mapping(nbytes: int, count: int = 1) -> list[torch.Tensor]:
    """Storages side by side, between pages of another kind, so that the kernel counts them apart from the rest."""
    area = mmap.mmap(-1, nbytes + 2 * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    size = nbytes // count
    tensors = [
        torch.frombuffer(area, dtype=torch.uint8, offset=mmap.PAGESIZE + i * size, count=size) for i in range(count)
    ]
    for edge in (tensors[0].data_ptr() - mmap.PAGESIZE, tensors[0].data_ptr() + nbytes):
        protect(edge)
    return tensors


def protect(address: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(mmap.PAGESIZE), mmap.PROT_READ) == 0


def small_pages(nbytes: int) -> torch.Tensor:
    """Random bytes in pages of 4 KiB, which may become large ones."""
    (tensor,) = mapping(nbytes)
    libc = ctypes.CDLL(None)
    for advice in (mmap.MADV_NOHUGEPAGE, mmap.MADV_HUGEPAGE):
        libc.madvise(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(nbytes), advice)
        if advice == mmap.MADV_NOHUGEPAGE:
            tensor.random_(generator=torch.Generator().manual_seed(0))
    return tensor


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
    neighbours, apart = mapping(8 * HUGE, 16), mapping(8 * HUGE, 16)[::2]
    for i, piece in enumerate(neighbours + apart):
        piece.fill_(i)
    assert gather_in_huge_pages(neighbours[::-1]) >= 7 * HUGE
    assert gather_in_huge_pages(apart) == 0 and in_huge_pages(apart[0]) == 0
    assert all((piece == i).all() for i, piece in enumerate(neighbours))


@needs_collapse
def test_a_hole_keeps_nothing_else_back():
    (tensor,) = mapping(16 * HUGE)
    tensor.fill_(1)
    protect(tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE + 8 * HUGE)
    assert gather_in_huge_pages([tensor]) >= 13 * HUGE


@needs_collapse
@pytest.mark.parametrize("flags", [mmap.MAP_SHARED | mmap.MAP_ANONYMOUS, "file"])
def test_shared_memory_and_files_are_left_alone(flags, tmp_path):
    if flags == "file":
        path = tmp_path / "weights"
        path.write_bytes(bytes(8 * HUGE))
        tensor = torch.from_file(str(path), shared=False, size=8 * HUGE, dtype=torch.uint8)
    else:
        tensor = torch.frombuffer(mmap.mmap(-1, 8 * HUGE, flags=flags), dtype=torch.uint8)
    tensor.fill_(1)
    assert gather_in_huge_pages([tensor]) == 0


@needs_collapse
@pytest.mark.parametrize("written", [0, 5000])
def test_what_a_fork_shares_is_left_alone(written):
    tensor = small_pages(8 * HUGE)
    child = os.fork()
    if child == 0:
        tensor.view(-1, HUGE)[:, written] = 1
        os._exit(int(gather_in_huge_pages([tensor]) != 0))
    assert os.waitpid(child, 0)[1] == 0


def test_nothing_to_move():
    assert gather_in_huge_pages([]) == 0
    others = [torch.ones(3, 3).to_sparse(), torch.empty(3, device="meta")]
    assert gather_in_huge_pages([torch.empty(0), torch.ones(3), torch.zeros(1).expand(10**9), *others]) == 0


def test_a_system_set_to_never_use_them_is_left_alone(tmp_path, monkeypatch):
    state = tmp_path / "enabled"
    state.write_text("always madvise [never]\n")
    monkeypatch.setattr(module, "_STATE", state)
    tensor = small_pages(8 * HUGE)
    assert gather_in_huge_pages([tensor]) == 0 and in_huge_pages(tensor) == 0
    monkeypatch.setattr(module, "_STATE", tmp_path / "missing")
    assert gather_in_huge_pages([tensor]) == 0 and in_huge_pages(tensor) == 0


def test_opcheck():
    storages = [torch.ones(size, dtype=torch.uint8) for size in (4, 2)]
    torch.library.opcheck(torch.ops.paged._gather_in_huge_pages, (storages,))


@pytest.mark.parametrize(
    "storage, message",
    [(torch.ones(4), "storages: float32; must be uint8"), (torch.ones(2, 2).byte(), "storages: shape .*; must be 1-D")],
)
def test_rejects(storage, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.paged._gather_in_huge_pages([storage])
