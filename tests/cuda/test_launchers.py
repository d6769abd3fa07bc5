"""What launchers do beside their kernels: nothing that waits, allocates, or depends on what lies on the device."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tests.assertions import assert_as_exact_as_torch
from tests.emulator.library import BUILD, NO_NVCC, Recording, emulated, emulated_ops, has_nvcc
from tests.ops.test_attention import build, oracle
from tests.paged_batch import paged_batch
from torch_paged import ops

needs_nvcc = pytest.mark.skipif(not has_nvcc(), reason=NO_NVCC)

CACHE = torch.zeros(4, 4, 2, 8)
NEW = torch.ones(3, 2, 8)
SLOTS = torch.tensor([7, -1, 2])
TABLE, LENGTH = torch.tensor([[2, 0]], dtype=torch.int32), torch.tensor([6], dtype=torch.int32)


def attention(rows: list[tuple[int, int]], **options: object) -> Callable[[], object]:
    arguments = paged_batch(rows, head_dim=64, dtype=torch.bfloat16).arguments
    return lambda: ops.attention_with_lse(**arguments, **options)


# Op, a call of it, and how many kernels that launches.
CALLS = {
    "decode": ("attention", attention([(1, 9), (1, 3)], num_splits=1), 1),
    "split decode": ("attention", attention([(1, 200), (1, 90)], num_splits=3), 2),
    "mixture": ("attention", attention([(1, 9), (40, 50)], num_splits=1), 2),
    "deterministic": ("attention", attention([(1, 9), (40, 50)], deterministic=True), 3),
    "merge": (
        "merge_attention_states",
        lambda: ops.merge_attention_states(NEW, torch.zeros(2, 3), NEW, torch.zeros(2, 3)),
        1,
    ),
    "reshape": ("reshape_and_cache", lambda: ops.reshape_and_cache(NEW, NEW, CACHE.clone(), CACHE.clone(), SLOTS), 1),
    "rope": (
        "rope_and_cache",
        lambda: ops.rope_and_cache(NEW, NEW, NEW, NEW[:, 0], NEW[:, 0], CACHE.clone(), CACHE.clone(), SLOTS),
        1,
    ),
    "gather": ("gather_cache", lambda: ops.gather_cache(CACHE, CACHE, TABLE, LENGTH, 7), 1),
    # No open model has more.
    "copy 126 layers": (
        "copy_blocks",
        lambda: ops.copy_blocks([CACHE.clone() for _ in range(126)], [CACHE.clone() for _ in range(126)], PAIRS),
        1,
    ),
}
PAIRS = torch.tensor([[0, 1], [2, 3]])


def recorded(op: str, call: Callable[[], object]) -> Recording:
    with emulated(op), emulated_ops().recording() as recording:
        call()
    return recording


@needs_nvcc
@pytest.mark.parametrize(("op", "call", "count"), CALLS.values(), ids=CALLS)
def test_all_goes_to_the_current_stream_and_nobody_waits(op, call, count):
    assert recorded(op, call).streams == ["current kernel"] * count


@needs_nvcc
def test_memory_comes_from_torch_alone():
    """The stand-in for the runtime has nothing that allocates: the library would have such a symbol undefined."""
    emulated_ops()
    library = BUILD / "package" / "torch_paged" / "_cuda.so"
    names = subprocess.run(["nm", library], capture_output=True, text=True, check=True).stdout.split()
    assert "cudaLaunchKernel" in names
    assert not [name for name in names if name.startswith(("cudaMalloc", "cudaFree", "cudaHostAlloc"))]


@needs_nvcc
@pytest.mark.parametrize(("op", "call", "count"), CALLS.values(), ids=CALLS)
def test_a_refused_launch_is_an_error(op, call, count):
    library = emulated_ops()._library
    library.emulate_refused_launches(1)
    try:
        with pytest.raises(RuntimeError, match="CUDA error 9 "):
            recorded(op, call)
    finally:
        library.emulate_refused_launches(0)
    recorded(op, call)


# Rows of as many tokens in all, the longest query and the widest table the same: what a CUDA graph is captured with.
BATCHES = {
    "decode": ([(1, 300), (1, 40), (1, 7)], [(1, 1), (1, 300), (0, 0), (1, 12)], {}),
    "split decode": ([(1, 300), (1, 40), (0, 7)], [(0, 0), (1, 9), (1, 300)], {"num_splits": 4}),
    "mixture": ([(1, 300), (40, 50), (9, 9)], [(40, 300), (0, 0), (10, 12)], {}),
    "deterministic": ([(1, 300), (40, 50), (9, 9)], [(40, 300), (0, 0), (10, 12)], {"deterministic": True}),
}


@needs_nvcc
@pytest.mark.parametrize(("captured", "replayed", "options"), BATCHES.values(), ids=BATCHES)
def test_a_captured_graph_serves_other_lengths(captured, replayed, options):
    """Launches and allocations are the same, so that a replay needs new values in the same tensors alone."""
    rows = max(len(captured), len(replayed))
    batches = [batch + [(0, 0)] * (rows - len(batch)) for batch in (captured, replayed)]
    first, second = (recorded("attention", attention(batch, **options)) for batch in batches)
    assert [launch[:4] for launch in first.launches] == [launch[:4] for launch in second.launches]
    assert first.allocations == second.allocations


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("captured", "replayed", "options"), BATCHES.values(), ids=BATCHES)
def test_a_cuda_graph_is_replayed_with_other_lengths(captured, replayed, options, dtype):
    rows = max(len(captured), len(replayed))
    sizes = [{"rows": batch + [(0, 0)] * (rows - len(batch)), "head_dim": 64} for batch in (captured, replayed)]
    first, second = (build(each, {}, dtype, "cuda")[0] for each in sizes)
    # Blocks of both batches under one capture: those of the second behind those of the first.
    table = torch.where(second.block_table >= 0, second.block_table + first.key_cache.shape[0], -1).int()
    caches = {name: torch.cat([getattr(b, name) for b in (first, second)]) for name in ("key_cache", "value_cache")}
    first, second = replace(first, **caches), replace(second, **caches, block_table=table)
    changing = ("query", "block_table", "seq_lens", "cu_seqlens_q")
    static = replace(first, **{name: getattr(first, name).clone() for name in changing})
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ops.attention(**static.arguments, **options)  # what is asked of the driver once
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = ops.attention(**static.arguments, **options)
    for batch in (first, second, first):
        for name in changing:
            getattr(static, name).copy_(getattr(batch, name))
        graph.replay()
        torch.cuda.synchronize()
        exact, same_dtype = (oracle(batch, {}, each)[0] for each in (torch.float64, dtype))
        assert_as_exact_as_torch(out, exact, same_dtype)
