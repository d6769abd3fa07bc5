"""Kernels that Triton compiled, in the emulator: PTX of another compiler, whose fragment layouts run on real GPUs."""

from __future__ import annotations

import os
import struct

import numpy as np
import pytest
import torch

from tests.emulator.launch import Emulator
from tests.emulator.ptx import Module

# Of the `dev` extra, where Triton has a wheel; a torch for CPUs comes without it.
triton = pytest.importorskip("triton", reason="no triton; `pip install -e '.[dev]'` on x86-64 Linux brings it")
tl = pytest.importorskip("triton.language")

M, N, K = 64, 48, 96
NUM_WARPS, NUM_STAGES = 4, 3


def matmul(a, b, c, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        left = tl.load(a + rows[:, None] * K + (k + depth)[None, :], mask=rows[:, None] < M, other=0.0)
        right = tl.load(b + (k + depth)[:, None] * N + columns[None, :], mask=columns[None, :] < N, other=0.0)
        total = tl.dot(left, right, total)
    tl.store(c + rows[:, None] * N + columns[None, :], total, mask=(rows[:, None] < M) & (columns[None, :] < N))


def softmax(x, out, n, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    row = tl.load(x + tl.program_id(0) * n + columns, mask=columns < n, other=-float("inf")).to(tl.float32)
    weights = tl.exp2((row - tl.max(row, 0)) * 1.4426950408889634)
    tl.store(out + tl.program_id(0) * n + columns, weights / tl.sum(weights, 0), mask=columns < n)


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """Compile a Triton function for compute capability 8.0; no GPU takes part."""
    monkeypatch.setitem(os.environ, "TRITON_CACHE_DIR", str(tmp_path))

    def compile(function, signature, constants):
        source = triton.compiler.ASTSource(triton.jit(function), signature, constants, attributes(signature))
        target = triton.backends.compiler.GPUTarget("cuda", 80, 32)
        return triton.compile(source, target, {"num_warps": NUM_WARPS, "num_stages": NUM_STAGES})

    return compile


def attributes(signature):
    """Tell Triton that pointers and sizes are multiples of 16, as it would see at a launch."""
    names = [name for name, type in signature.items() if type != "constexpr"]
    return {(list(signature).index(name),): [["tt.divisibility", 16]] for name in names}


def launch(kernel, grid, tensors, numbers):
    """Run a compiled kernel over tensors, the last of which it writes."""
    module = Module(kernel.asm["ptx"])
    (name,) = module.kernels
    emulator = Emulator(module)
    for n, tensor in enumerate(tensors):
        writable = n == len(tensors) - 1
        emulator.memory.add(f"argument {n}", tensor.data_ptr(), tensor.nbytes, writable=writable)
    parameters = b"".join(struct.pack("<Q", tensor.data_ptr()) for tensor in tensors)
    parameters += struct.pack(f"<{len(numbers)}i", *numbers)
    # Pointers to scratch memory that these kernels do not use.
    last = max(emulator.program(name).kernel.parameter_offsets.values()) + 8
    parameters += bytes(last - len(parameters))
    emulator.launch(name, grid, (32 * NUM_WARPS, 1, 1), kernel.metadata.shared, parameters)
    return module.texts[name]["body"]


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16")], ids=str)
def test_matmul(compiled, dtype, name):
    pointers = {"a": f"*{name}", "b": f"*{name}", "c": "*fp32", "M": "i32", "N": "i32", "K": "i32"}
    blocks = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32}
    kernel = compiled(matmul, pointers | dict.fromkeys(blocks, "constexpr"), blocks)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator).to(dtype) for shape in ((M, K), (K, N)))
    c = torch.full((M, N), torch.nan)
    body = launch(kernel, (M // 32, -(-N // 32), 1), [a, b, c], [M, N, K])
    for instruction in ("mma.sync.aligned.m16n8k16", "ldmatrix.sync.aligned", ".trans", "cp.async.cg.shared.global"):
        assert instruction in body
    assert (c.double() - a.double() @ b.double()).abs().max() < 2e-5


def test_softmax(compiled):
    kernel = compiled(softmax, {"x": "*bf16", "out": "*fp32", "n": "i32", "BLOCK": "constexpr"}, {"BLOCK": 1024})
    x = torch.randn(3, 800, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = torch.full(x.shape, torch.nan)
    body = launch(kernel, (3, 1, 1), [x, out], [800])
    assert "shfl.sync.bfly" in body and "bar.sync" in body
    np.testing.assert_allclose(out, x.double().softmax(1), rtol=2e-6)
