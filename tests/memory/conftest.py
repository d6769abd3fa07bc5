"""Fixtures of the memory tests."""

from collections.abc import Callable, Iterator

import pytest
import torch

from tests.memory.small_pool import PAGE, small_pool
from torch_paged.memory import Pool, block_memory, pool


@pytest.fixture(params=["cpu", "cuda-emulated"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where pools have their memory: from the system, or from the emulated GPU's driver, in pages of 4 KiB."""
    if request.param == "cpu":
        yield "cpu"
    else:
        request.getfixturevalue("gpu")
        yield "cuda-emulated"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """The memory of the emulated GPU, where pools of the test lie; their tensors are the CPU's."""
    from tests.emulator import library

    if not library.has_nvcc():
        pytest.skip(library.NO_NVCC)
    with library.emulated("copy_blocks") as ops, ops.device_memory.device(PAGE) as device:
        like = torch.empty(0, dtype=torch.uint8)
        monkeypatch.setattr(pool, "block_memory", lambda layout, _: block_memory.device_memory(layout, like))
        yield device


@pytest.fixture
def make_pool() -> Callable[..., Pool]:
    return small_pool
