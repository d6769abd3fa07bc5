"""Settings and fixtures that every test folder shares."""

import os

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


@pytest.fixture(params=["cpu", "cuda"])
def backend(request: pytest.FixtureRequest) -> str:
    """The device to run an op on; the test module names the op in OP."""
    import torch

    device: str = request.param
    if device == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"paged::{request.module.OP}", "CUDA"):
            pytest.skip(f"paged::{request.module.OP} has no CUDA kernel")
    return device
