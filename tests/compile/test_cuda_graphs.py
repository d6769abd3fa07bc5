"""When CUDA graphs are chosen; no GPU is needed for the choice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import torch_paged
from tests.paged_batch import paged_batch
from torch_paged.compile import CompileOptions
from torch_paged.compile.cuda_graphs import cuda_graph_settings


def chosen(device: str, *sizes: object, enabled: bool = True, decodes: bool = False) -> bool:
    with FakeTensorMode():
        inputs = [torch.empty(2, device=device), *sizes]
    settings = cuda_graph_settings(inputs, CompileOptions(cuda_graphs=enabled), decodes=decodes)
    # Inductor skips graphs with sizes that vary, where it is told to.
    skips = bool(sizes) and settings.get("triton.cudagraph_skip_dynamic_graphs", False)
    return bool(settings.get("triton.cudagraphs")) and not skips


@torch.no_grad()
def test_decode_steps_on_a_gpu() -> None:
    assert chosen("cuda")
    # One for each combination of sizes.
    assert chosen("cuda", 7, decodes=True)


@torch.no_grad()
@pytest.mark.parametrize(
    ("device", "sizes", "enabled"), [("cpu", (), True), ("cuda", (7,), True), ("cuda", (), False)], ids=str
)
def test_not_elsewhere(device: str, sizes: tuple[object, ...], enabled: bool) -> None:
    """On a CPU, where a size varies, where the option is off."""
    assert not chosen(device, *sizes, enabled=enabled)


@pytest.mark.parametrize(("queries", "decodes"), [(1, True), (3, False)])
@torch.no_grad()
def test_which_graphs_are_decode_steps(queries: int, decodes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[bool] = []

    def settings(inputs: object, options: object, *, decodes: bool) -> dict[str, Any]:
        given.append(decodes)
        return {}

    monkeypatch.setattr("torch_paged.compile.backend.cuda_graph_settings", settings)
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda graph, inputs, config_patches: graph)
    batch = paged_batch([(queries, 5), (queries, 9)], block_size=8)
    arguments = [batch.query, batch.key_cache, batch.value_cache, batch.block_table, batch.seq_lens, batch.cu_seqlens_q]
    for run in (
        lambda *arguments: torch.ops.paged.attention(*arguments, queries),
        lambda *arguments: torch.ops.paged.attention_with_lse.default(*arguments, max_query_len=queries),
        lambda *arguments: torch_paged.ops.attention(*arguments, queries),
        # No attention at all.
        lambda query, *others: query + 1,
    ):
        torch.compile(run, backend="torch_paged", fullgraph=True)(*arguments)
    assert given == [decodes] * 3 + [False]


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
