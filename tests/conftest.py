"""Settings and fixtures that every test folder shares."""

import os
from collections.abc import Iterator

import pytest

# Idle threads that spin would take a busy machine's cores from each other: the same tests took 52 s instead of 8.
# libgomp reads this as torch loads it, so nothing here may import torch before.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--outside",
        default="",
        metavar="FAMILIES",
        help="of tests/outside: these families, with commas between, or all (default: a handful and some by commit)",
    )
    parser.addoption(
        "--soak", type=float, default=120, metavar="SECONDS", help="how long random requests run, in all (default: 120)"
    )
    parser.addoption(
        "--soak-seed", default="", metavar="SEED", help="of the random requests, as a failure names it (default: HEAD)"
    )


@pytest.fixture(params=["cpu", "cuda-emulated", pytest.param("cuda", marks=pytest.mark.cuda)])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device to run an op on; the test module names the op in OP.

    `cuda-emulated` runs the CUDA library's own host code and PTX on tensors of the CPU.
    """
    import torch

    op = request.module.OP
    if request.param == "cuda-emulated":
        from tests.emulator import library

        if not library.has_nvcc():
            pytest.skip(library.NO_NVCC)
        with library.emulated(op) as ops:
            if op not in ops.names:
                pytest.skip(f"paged::{op} has no CUDA kernel")
            yield "cpu"
        return
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"paged::{op}", "CUDA"):
            pytest.skip(f"paged::{op} has no CUDA kernel")
    yield request.param


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what a backend has no kernel for, or takes too long for."""
    out = [item for item in items if not _runs(item)]
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in set(out)]


def _runs(item: pytest.Item) -> bool:
    parameters = getattr(item, "callspec", None)
    backend = parameters.params.get("backend", "cpu") if parameters else "cpu"
    if backend == "cpu" or "dtype" not in parameters.params:
        return True
    import torch

    # Other dtypes are the CPU's alone.
    on_cuda = getattr(item.module, "CUDA_DTYPES", (torch.float32, torch.bfloat16, torch.float16))
    return parameters.params["dtype"] in on_cuda
