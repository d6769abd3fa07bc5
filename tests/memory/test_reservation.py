"""Reserved address space: committed as it is written, given back in whole pages, refused with a clear error."""

import mmap
from pathlib import Path

import pytest
import torch

from torch_paged.memory.reservation import release_pages, reserve

PAGE = mmap.PAGESIZE


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def mapped_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * PAGE


def ranges(*pairs: tuple[int, int]) -> torch.Tensor:
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)


def test_only_what_is_written_is_committed():
    before = resident_bytes()
    storage = reserve(2**36)
    assert (storage.dtype, storage.shape, storage.data_ptr() % PAGE) == (torch.uint8, (2**36,), 0)
    storage[2**35 : 2**35 + 2**25] = 1
    assert 2**25 <= resident_bytes() - before < 2**25 + 2**23


def test_the_address_space_goes_with_the_last_view():
    before = mapped_bytes()
    storage = reserve(2**36)
    view = storage[5:9]
    del storage
    view[0] = 1
    assert mapped_bytes() - before >= 2**36
    del view
    assert mapped_bytes() - before < 2**30


def test_whole_pages_inside_the_ranges_are_given_back():
    storage = reserve(8 * PAGE)
    storage.fill_(7)
    release_pages(storage, ranges((1, 3 * PAGE - 1), (5 * PAGE, 6 * PAGE), (7 * PAGE + 1, 8 * PAGE), (3, 3)))
    pages = storage.view(8, PAGE)
    assert [int(page.min()) for page in pages] == [7, 0, 7, 7, 7, 0, 7, 7]
    assert [int(page.max()) for page in pages] == [7, 0, 7, 7, 7, 0, 7, 7]


def test_released_pages_are_no_longer_resident():
    storage = reserve(2**26)
    storage.fill_(1)
    full, address = resident_bytes(), storage.data_ptr()
    release_pages(storage, ranges((0, 2**25)))
    assert full - resident_bytes() >= 2**25 - 2**22
    assert storage.data_ptr() == address
    storage[:PAGE] = 3
    assert int(storage[:PAGE].sum()) == 3 * PAGE


@pytest.mark.parametrize(
    "break_it, message",
    [
        (lambda s, r: (s, ranges((0, 2 * PAGE + 1))), r"ranges: \[0, \d+\) at \[0\]; must be ascending and in"),
        (lambda s, r: (s, ranges((0, 1), (-1, 4))), r"ranges: \[-1, 4\) at \[1\]; must be ascending"),
        (lambda s, r: (s, ranges((4, 2))), r"ranges: \[4, 2\) at \[0\]; must be ascending"),
        (lambda s, r: (s, r.int()), "ranges: int32; must be int64"),
        (lambda s, r: (s, r.flatten()), r"ranges: shape \[2\]; must be 2-D"),
        (lambda s, r: (s, torch.zeros(2, 3, dtype=torch.int64)), "ranges: size 3 in dimension 1; must be 2"),
        (lambda s, r: (s, ranges((0, 1), (0, 1)).t()), "ranges: strides .*; must be contiguous"),
        (lambda s, r: (s.view(torch.int8), r), "storage: int8; must be uint8"),
        (lambda s, r: (s.view(2, PAGE), r), "storage: shape .*; must be 1-D"),
        (lambda s, r: (s[::2], r), "storage: strides .*; must be contiguous"),
    ],
)
def test_release_pages_refuses(break_it, message):
    storage = reserve(2 * PAGE)
    storage.fill_(7)
    with pytest.raises(RuntimeError, match=message):
        release_pages(*break_it(storage, ranges((0, PAGE))))
    assert int(storage.min()) == 7


@pytest.mark.parametrize(
    "op, sample", [("_reserve", (PAGE,)), ("_release_pages", (reserve(4 * PAGE), ranges((PAGE, 3 * PAGE))))]
)
def test_opcheck(op, sample):
    torch.library.opcheck(getattr(torch.ops.paged, op).default, sample)


@pytest.mark.parametrize("nbytes", [0, -1])
def test_reserve_refuses_no_bytes(nbytes):
    with pytest.raises(MemoryError, match=rf"max_memory: .*{nbytes} bytes .*must be greater than 0"):
        reserve(nbytes)


def test_the_system_s_refusal_names_the_knob():
    with pytest.raises(MemoryError) as caught:
        reserve(2**62)
    expected = f"max_memory: the system refuses to reserve {2**62} bytes of address space (Cannot allocate memory)"
    assert str(caught.value) == expected + "; choose less"
