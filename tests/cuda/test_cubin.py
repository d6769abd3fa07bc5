"""Registers, stack and spills of compiled kernels, read from the library itself."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import torch_paged
from tests.cuda.cubin import compiled_kernels
from tests.emulator.library import NO_NVCC, has_nvcc

LIBRARY = Path(torch_paged.__file__).parent / "_cuda.so"
pytestmark = pytest.mark.skipif(not has_nvcc(), reason=NO_NVCC)


@pytest.mark.skipif(not LIBRARY.exists(), reason="installed without CUDA kernels; install again with nvcc on PATH")
def test_no_kernel_spills():
    kernels = compiled_kernels(LIBRARY)
    spilling = {(k.name, k.architecture): k.stack for k in kernels if k.stack or k.opcodes["STL"] or k.opcodes["LDL"]}
    assert kernels and spilling == {}


def test_reads_what_ptxas_reports(tmp_path):
    """A kernel with more values than it may have registers, and one that has enough."""
    source = tmp_path / "kernels.cu"
    source.write_text(
        """
        template <int kValues> __device__ void work(float* data) {
          float values[kValues];
          for (int i = 0; i < kValues; ++i) values[i] = data[i * 32 + threadIdx.x];
          for (int i = 0; i < kValues; ++i)
            for (int j = 0; j < kValues; ++j) values[i] += values[j] * data[j];
          for (int i = 0; i < kValues; ++i) data[i * 32 + threadIdx.x] = values[i];
        }
        extern "C" __global__ void __launch_bounds__(1024, 2) spills(float* data) { work<48>(data); }
        extern "C" __global__ void fits(float* data) { work<8>(data); }
        """
    )
    command = ["nvcc", "-gencode", "arch=compute_80,code=sm_80", "-Xptxas", "-v", "-c", source, "-o", tmp_path / "k.o"]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    said = re.findall(
        r"function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill.*?Used (\d+) registers", report, re.S
    )
    found = {k.name: k for k in compiled_kernels(tmp_path / "k.o")}
    assert {name for name, *_ in said} == set(found) == {"spills", "fits"}
    for name, stack, spilled, registers in said:
        assert found[name].registers == int(registers) and found[name].stack == int(stack)
        assert bool(found[name].opcodes["STL"]) == (int(spilled) > 0) == (name == "spills")
