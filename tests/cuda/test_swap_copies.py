"""How swap_blocks moves its bytes: big blocks in a batch of the copy engines, small ones by a kernel."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from tests import reference
from tests.emulator.findings import Finding
from tests.emulator.library import NO_NVCC, EmulatedOps, emulated, has_nvcc
from torch_paged import ops

pytestmark = pytest.mark.skipif(not has_nvcc(), reason=NO_NVCC)


@pytest.fixture
def cuda() -> Iterator[EmulatedOps]:
    with emulated("swap_blocks") as emulated_ops:
        yield emulated_ops
        emulated_ops._library.emulate_batched_copies(1)


def copies(cuda: EmulatedOps) -> tuple[int, int]:
    """One by one and in batches, since the last call."""
    counts = ctypes.c_int64(), ctypes.c_int64()
    cuda._library.emulated_copies(*map(ctypes.byref, counts))
    return counts[0].value, counts[1].value


def pools(block_size: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Two layers on either side, of blocks of `block_size` KiB."""
    src, dst = ([torch.randn(6, block_size, 4, 64) for _ in range(2)] for _ in range(2))
    return src, dst


def swap(block_size: int, pairs: list[tuple[int, int]]) -> None:
    swap_between(*pools(block_size), pairs)


def swap_between(src: list[torch.Tensor], dst: list[torch.Tensor], pairs: list[tuple[int, int]]) -> None:
    expected = [cache.clone() for cache in dst]
    mapping = torch.tensor(pairs)
    reference.swap_blocks(src, expected, mapping)
    ops.swap_blocks(src, dst, mapping)
    assert all(torch.equal(cache, copy) for cache, copy in zip(dst, expected, strict=True))


# Of cudaMemoryType.
PAGEABLE, DEVICE = 0, 2


@contextmanager
def memory(cuda: EmulatedOps, caches: list[torch.Tensor], kind: int, device: int = 0) -> Iterator[None]:
    """Let caches be in memory of another kind than pinned memory of the host."""

    def say(kind: int) -> None:
        for cache in caches:
            size = ctypes.c_uint64(cache.nbytes)
            cuda._library.emulate_memory(ctypes.c_uint64(cache.data_ptr()), size, kind, device)

    say(kind)
    yield
    say(-1)


@pytest.mark.parametrize("supported", [True, False])
def test_big_blocks_are_copied_in_a_batch_where_the_driver_has_it(cuda, supported):
    cuda._library.emulate_batched_copies(int(supported))
    launches, _ = cuda.num_launches, copies(cuda)
    swap(256, [(0, 3), (4, 1), (2, 5)])
    assert cuda.num_launches == launches
    assert copies(cuda) == ((0, 6) if supported else (6, 0))


def test_neighbouring_blocks_are_one_copy(cuda):
    copies(cuda)
    swap(64, [(1, 3), (0, 2), (2, 4)])
    assert copies(cuda) == (0, 2)


def test_small_blocks_are_copied_by_a_kernel(cuda):
    launches, _ = cuda.num_launches, copies(cuda)
    swap(16, [(0, 3), (4, 1), (2, 5)])
    assert (cuda.num_launches - launches, *copies(cuda)) == (1, 0, 0)


def test_pageable_memory_is_copied_one_by_one(cuda):
    """A batch does not stage it, and no kernel may read it."""
    copies(cuda)
    for block_size in (16, 256):
        src, dst = pools(block_size)
        launches = cuda.num_launches
        with memory(cuda, dst, PAGEABLE):
            swap_between(src, dst, [(0, 3), (4, 1), (2, 5)])
        assert cuda.num_launches == launches and copies(cuda) == (6, 0)


def test_no_kernel_reads_another_gpu(cuda):
    """Peer access is nobody's to have: the copy engines do without."""
    copies(cuda)
    src, dst = pools(16)
    launches = cuda.num_launches
    with memory(cuda, src, DEVICE, device=1), memory(cuda, dst, DEVICE, device=0):
        swap_between(src, dst, [(0, 3), (4, 1), (2, 5)])
    assert cuda.num_launches == launches and copies(cuda) == (6, 0)


@pytest.mark.parametrize(("block_size", "work"), [(256, "own copies"), (16, "own kernel")])
def test_copies_have_a_stream_of_their_own_between_the_current_one_s_work(cuda, block_size, work):
    with cuda.recording() as recording:
        swap(block_size, [(0, 3), (4, 1), (2, 5)])
    # The other side is the host's, which reads or frees it once the op has returned.
    assert recording.streams == ["own after current", work, "current after own", "host after own"]


def test_after_an_error_the_current_stream_waits_for_what_was_started(cuda, monkeypatch):
    src, dst = pools(16)
    # Past the end of what the kernels know.
    monkeypatch.setattr(cuda.memory, "add", lambda *args, **kwargs: None)
    with cuda.recording() as recording, pytest.raises(Finding):
        ops.swap_blocks(src, dst, torch.tensor([(0, 3)]))
    assert recording.streams[-2:] == ["current after own", "host after own"]
