"""How swap_blocks moves its bytes: big blocks in a batch of the copy engines, small ones by a kernel."""

import ctypes
from collections.abc import Iterator

import pytest
import torch

from tests import reference
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


def swap(block_size: int, pairs: list[tuple[int, int]]) -> None:
    """Blocks of `block_size` KiB."""
    src, dst = ([torch.randn(6, block_size, 4, 64) for _ in range(2)] for _ in range(2))
    expected = [cache.clone() for cache in dst]
    mapping = torch.tensor(pairs)
    reference.swap_blocks(src, expected, mapping)
    ops.swap_blocks(src, dst, mapping)
    assert all(torch.equal(cache, copy) for cache, copy in zip(dst, expected, strict=True))


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
