"""Every kernel of the library runs in the emulator, and gives what the oracle gives."""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Callable

import pytest
import torch

from tests import reference
from tests.assertions import assert_as_exact_as_torch
from tests.cuda.cubin import short_name
from tests.emulator.library import NO_NVCC, emulated, emulated_ops, has_nvcc
from tests.ops.test_attention import build, oracle
from tests.paged_batch import same_memory
from torch_paged import ops

pytestmark = pytest.mark.skipif(not has_nvcc(), reason=NO_NVCC)

TYPES = {torch.bfloat16: "__nv_bfloat16", torch.float16: "__half", torch.float32: "float", torch.float64: "double"}
# What stands for the bytes of an element that is only moved.
BYTES = {
    torch.int8: "unsigned char",
    torch.bfloat16: "unsigned short",
    torch.float32: "unsigned int",
    torch.float64: "unsigned long",
    torch.complex128: "uint4",
}
TILES = [
    (dim, rows)
    for dim in (64, 80, 96, 112, 128, 160, 192, 256, 512)
    for rows in (16, 32, 64, 128)
    if rows == 16 or (dim <= 256 and rows <= 64) or dim <= 128
]
FMA = [(128, 16), (128, 32), (256, 16), (512, 16)]
GROUP = 2


@functools.cache
def names_of(mangled: frozenset[str]) -> dict[str, str]:
    """Demangled, without parameters, by mangled name."""
    ran = subprocess.run(["c++filt"], input="\n".join(sorted(mangled)), capture_output=True, text=True, check=True)
    return dict(zip(sorted(mangled), map(short_name, ran.stdout.splitlines()), strict=True))


def launched(call: Callable[[], object], op: str) -> tuple[object, list[str]]:
    """What a call returns, and the kernels that it ran."""
    with emulated(op), emulated_ops().recording() as recording:
        result = call()
        names = names_of(frozenset(emulated_ops().kernels))
    return result, [names[launch.kernel] for launch in recording.launches]


def attend(dtype: torch.dtype, dim: int, rows: int, **options: int) -> list[str]:
    """Run attention of `rows` packed rows, of the smallest head that needs `dim`; return the kernels."""
    queries, head_dim = max(1, rows // GROUP), dim - 8 if dim in (64, 512) else dim
    sizes = {"rows": [(queries, queries + 90)], "head_dim": head_dim, "num_heads": GROUP, "num_kv_heads": 1}
    batch, _ = build(sizes, {}, dtype)
    out, kernels = launched(
        lambda: ops.attention(**batch.arguments, num_splits=options.get("num_splits", 1)), "attention"
    )
    assert_as_exact_as_torch(out, oracle(batch, {})[0], oracle(batch, {}, dtype)[0])
    return kernels


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("dim", "rows"), TILES)
def test_tile(dtype, dim, rows):
    assert attend(dtype, dim, rows) == [f"attention_tile_kernel<{TYPES[dtype]}, TileShape<{dim}, {rows}> >"]


@pytest.mark.parametrize(("dim", "rows"), FMA)
def test_fma(dim, rows):
    assert attend(torch.float32, dim, rows) == [f"attention_fma_kernel<FmaShape<{dim}, {rows}> >"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_merge_of_splits(dtype):
    assert attend(dtype, 64, 16, num_splits=2)[1:] == [f"attention_merge_kernel<{TYPES[dtype]}>"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_merge_attention_states(dtype):
    states = [torch.randn(3, 2, 24).to(dtype), torch.randn(2, 3)] * 2
    (out, _), kernels = launched(lambda: ops.merge_attention_states(*states), "merge_attention_states")
    assert_as_exact_as_torch(out, reference.merge_attention_states(*states)[0], states[0])
    assert kernels == [f"merge_attention_states_kernel<{TYPES[dtype]}>"]


def cache_of(dtype: torch.dtype, num_blocks: int = 3) -> torch.Tensor:
    return (torch.randn(num_blocks, 4, 2, 8, dtype=torch.float64) * 50).to(dtype)


@pytest.mark.parametrize(("dtype", "type"), BYTES.items(), ids=str)
def test_bytes_are_moved(dtype, type):
    key_cache, value_cache, expected = cache_of(dtype), cache_of(dtype), {}
    new = cache_of(dtype)[0, :3]
    slots, table = torch.tensor([7, -1, 2]), torch.tensor([[2, 0]], dtype=torch.int32)
    for run in (reference, ops):
        caches = key_cache.clone(), value_cache.clone()
        call = functools.partial(run.reshape_and_cache, new, new, *caches, slots)
        kernels = launched(call, "reshape_and_cache")[1]
        gathered = functools.partial(run.gather_cache, *caches, table, torch.tensor([6], dtype=torch.int32), 7)
        rows, gather_kernels = launched(gathered, "gather_cache")
        expected[run] = [*caches, *rows]
    assert all(torch.equal(one, other) for one, other in zip(*expected.values(), strict=True))
    assert kernels == [f"reshape_and_cache_kernel<{type}>"]
    assert gather_kernels == [f"gather_cache_kernel<{type}>"]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_numbers_are_scaled(dtype):
    caches, new, scale = (cache_of(dtype), cache_of(dtype)), cache_of(dtype)[0, :3], torch.tensor([0.5, 3.0])
    copies = [cache.clone() for cache in caches]
    slots, table = torch.tensor([7, -1, 2]), torch.tensor([[2, 0]], dtype=torch.int32)
    reference.reshape_and_cache(new, new, *copies, slots, scale, scale)
    _, kernels = launched(lambda: ops.reshape_and_cache(new, new, *caches, slots, scale, scale), "reshape_and_cache")
    assert all(same_memory(cache, copy) for cache, copy in zip(caches, copies, strict=True))
    assert kernels == [f"reshape_and_cache_kernel<{TYPES[dtype]}>"]
    arguments = (*caches, table, torch.tensor([6], dtype=torch.int32), 7, scale, scale)
    rows, kernels = launched(lambda: ops.gather_cache(*arguments), "gather_cache")
    assert all(torch.equal(one, other) for one, other in zip(rows, reference.gather_cache(*arguments), strict=True))
    assert kernels == [f"gather_cache_kernel<{TYPES[dtype]}>"]


@pytest.mark.parametrize("angle_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rope_and_cache(dtype, angle_dtype):
    rows, caches = torch.randn(3, 2, 8).to(dtype), [cache_of(dtype), cache_of(dtype)]
    angles = torch.randn(3, 8).to(angle_dtype or dtype)
    copies, slots = [cache.clone() for cache in caches], torch.tensor([7, -1, 2])
    expected = reference.rope_and_cache(rows, rows, rows, angles, angles, *copies, slots, dtype=torch.float32)
    call = functools.partial(ops.rope_and_cache, rows, rows, rows, angles, angles, *caches, slots)
    out, kernels = launched(call, "rope_and_cache")
    assert torch.equal(out, expected.to(dtype))
    assert all(same_memory(cache, copy) for cache, copy in zip(caches, copies, strict=True))
    assert kernels == [f"rope_and_cache_kernel<{TYPES[dtype]}, {TYPES[angles.dtype]}>"]


@pytest.mark.parametrize(("type", "head_dim"), list(zip(BYTES.values(), (1, 2, 4, 8, 16), strict=True)))
def test_copy_blocks(type, head_dim):
    """By the largest pieces that strides and addresses allow: of bytes, so many to a row and so far apart."""
    wide = torch.randint(-100, 100, (3, 4, 2, 3 * head_dim), dtype=torch.int8)
    key_cache, value_cache = wide[..., :head_dim], wide.clone()[..., :head_dim]
    copies, mapping = [key_cache.clone(), value_cache.clone()], torch.tensor([[0, 2]])
    reference.copy_blocks(copies[:1], copies[1:], mapping)
    _, kernels = launched(lambda: ops.copy_blocks([key_cache], [value_cache], mapping), "copy_blocks")
    assert torch.equal(key_cache, copies[0]) and torch.equal(value_cache, copies[1])
    assert kernels == [f"copy_blocks_kernel<{type}>"]


def test_no_kernel_is_left_out():
    """Those of TORCH_PAGED_CHECK run in tests/ops/test_value_checks.py."""
    tiles = {f"attention_tile_kernel<{type}, TileShape<{dim}, {rows}> >"
             for type in ("__nv_bfloat16", "__half") for dim, rows in TILES}  # fmt: skip
    fma = {f"attention_fma_kernel<FmaShape<{dim}, {rows}> >" for dim, rows in FMA}
    numbers = ("__nv_bfloat16", "__half", "float")
    merges = {f"{name}_kernel<{type}>" for name in ("attention_merge", "merge_attention_states") for type in numbers}
    moved = {*BYTES.values(), *TYPES.values()}
    moves = {f"{name}_kernel<{type}>" for name in ("reshape_and_cache", "gather_cache") for type in moved}
    rope = {f"rope_and_cache_kernel<{type}, {angle}>" for type in numbers for angle in {type, "float"}}
    copies = {f"copy_blocks_kernel<{type}>" for type in BYTES.values()}
    checks = {f"check_{name}_kernel" for name in ("attention", "gather", "slots", "pairs")}
    names = names_of(frozenset(emulated_ops().kernels)).values()
    assert sorted(names) == sorted({*tiles, *fma, *merges, *moves, *rope, *copies, *checks})
