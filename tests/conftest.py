"""Fixtures that every test folder shares."""

import pytest
import torch


@pytest.fixture(params=["cpu", "cuda"])
def backend(request: pytest.FixtureRequest) -> str:
    """The device to run an op on; the test module names the op in OP."""
    device: str = request.param
    if device == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"paged::{request.module.OP}", "CUDA"):
            pytest.skip(f"paged::{request.module.OP} has no CUDA kernel")
    return device
