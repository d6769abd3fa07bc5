"""When CUDA graphs are chosen; no GPU is needed for the choice."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from torch_paged.compile import CompileOptions
from torch_paged.compile.cuda_graphs import cuda_graph_settings


def chosen(device: str, *sizes: object, enabled: bool = True) -> bool:
    with FakeTensorMode():
        inputs = [torch.empty(2, device=device), *sizes]
    return bool(cuda_graph_settings(inputs, CompileOptions(cuda_graphs=enabled)).get("triton.cudagraphs"))


@torch.no_grad()
def test_decode_steps_on_a_gpu() -> None:
    assert chosen("cuda")


@torch.no_grad()
@pytest.mark.parametrize(
    ("device", "sizes", "enabled"), [("cpu", (), True), ("cuda", (7,), True), ("cuda", (), False)], ids=str
)
def test_not_elsewhere(device: str, sizes: tuple[object, ...], enabled: bool) -> None:
    """On a CPU, where a size varies, where the option is off."""
    assert not chosen(device, *sizes, enabled=enabled)


def test_not_with_gradients() -> None:
    assert not chosen("cuda")


@torch.no_grad()
def test_what_may_not_be_captured_is_cut_out() -> None:
    with FakeTensorMode():
        settings = cuda_graph_settings([torch.empty(2, device="cuda")], CompileOptions())
    assert settings["graph_partition"] and "paged::swap_blocks" in settings["custom_should_partition_ops"]
    # Each is one that this Inductor has.
    with torch._inductor.config.patch(settings):
        assert torch._inductor.config.triton.cudagraphs
