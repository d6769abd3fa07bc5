"""The compiled kernels: no more registers and no fewer blocks than recorded, tensor cores in use."""

from __future__ import annotations

import re

import pytest

from tests.cuda.budgets import LIBRARY, budgets, recorded
from tests.cuda.cubin import compiled_kernels
from tests.emulator.fat_binary import PTX, entries, section
from tests.emulator.library import NO_NVCC, build, has_nvcc

pytestmark = [
    pytest.mark.skipif(not has_nvcc(), reason=NO_NVCC),
    pytest.mark.skipif(not LIBRARY.exists(), reason="installed without CUDA kernels; install again with nvcc on PATH"),
]


@pytest.fixture(scope="module")
def kernels():
    return compiled_kernels(LIBRARY)


@pytest.fixture(scope="module")
def ptx():
    """The PTX of every kernel of the emulated library, by its mangled name."""
    modules = [entry.data.decode() for entry in entries(section(build(), ".nv_fatbin")) if entry.kind == PTX]
    found = [re.findall(r"\.entry (\w+)\((.*?)\n\}\n", module, re.S) for module in modules]
    return {name: body for module in found for name, body in module}


def test_no_kernel_takes_more_than_recorded(kernels):
    """After a change that is worth it, `python -m tests.cuda.budgets` records anew."""
    known, found = recorded(), budgets(kernels)
    assert sorted(set(found) - set(known)) == []
    devices = {device for _, device in found}
    assert sorted(key for key in set(known) - set(found) if key[1] in devices) == []
    more_registers = {key: budget for key, budget in found.items() if budget[0] > known[key][0]}
    fewer_blocks = {key: budget for key, budget in found.items() if budget[1] < known[key][1]}
    assert not more_registers and not fewer_blocks


def test_every_kernel_fits_every_device(kernels):
    found = budgets(kernels)
    if {"80", "90", "100", "120"} <= {kernel.architecture for kernel in kernels}:
        assert {device for _, device in found} == {"80", "86", "90", "100", "120"}
    assert all(blocks >= 1 for _, blocks in found.values())


def test_tensor_cores_and_asynchronous_copies_are_used(kernels):
    tiles = [k for k in kernels if k.name.startswith("attention_tile_kernel")]
    assert tiles
    for kernel in tiles:
        assert kernel.opcodes["HMMA"] and kernel.opcodes["LDGSTS"] and kernel.opcodes["LDSM"], kernel


def test_each_type_has_its_own_mma(ptx):
    tiles = {name: body for name, body in ptx.items() if "attention_tile_kernel" in name}
    assert tiles
    for name, body in tiles.items():
        type, other = (".bf16.bf16.", ".f16.f16.") if "__nv_bfloat16" in name else (".f16.f16.", ".bf16.bf16.")
        products = re.findall(r"\bmma\.sync\.\S+", body)
        assert products and all(type in mma and other not in mma for mma in products), name
