"""Kernels of language.cu against the same computation in Python."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from tests.emulator.compile import compile_ptx
from tests.emulator.findings import Finding
from tests.emulator.launch import THREADS_AT_ONCE, Emulator
from tests.emulator.library import NO_NVCC, has_nvcc

pytestmark = pytest.mark.skipif(not has_nvcc(), reason=NO_NVCC)
NUMBERS = np.random.default_rng(0).integers(0, 1000, 32).astype(np.int32)


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    return compile_ptx(Path(__file__).parent / "language.cu", tmp_path_factory.mktemp("language"))


def launch(module, kernel, inputs, outputs, *, grid=1, block=32, shared=0):
    emulator = Emulator(module)
    for n, array in enumerate((*inputs, *outputs)):
        emulator.memory.add_array(f"argument {n}", array, writable=n >= len(inputs))
    pointers = [array.ctypes.data for array in (*inputs, *outputs)]
    emulator.launch(kernel, (grid, 1, 1), (block, 1, 1), shared, struct.pack(f"<{len(pointers)}Q", *pointers))


def test_calls(module):
    values, out, numbers = NUMBERS.astype(np.float32), np.zeros(32, np.float32), np.zeros(32, np.int64)
    launch(module, "calls", [values], [out, numbers])
    assert (out == np.where(np.arange(32) == 3, 0, 4 * values)).all()
    second = [-1 if i == 3 else i // 7 for i in range(32)]
    assert numbers.tolist() == [i * 1000000007 // 7 * 1000 + second[i] for i in range(32)]


def test_local_array(module):
    out = np.zeros(32, np.int32)
    launch(module, "local_array", [NUMBERS], [out])
    for i, number in enumerate(NUMBERS.tolist()):
        values = [int(NUMBERS[(i + k) % 32]) * k for k in range(8)]
        values[number % 8] += 100
        assert out[i] == sum(values[(k + number) % 8] << k for k in range(8))


def test_generic_pointers(module):
    out = np.zeros(32, np.int32)
    launch(module, "generic_pointers", [NUMBERS], [out], shared=128)
    assert out.tolist() == [int(NUMBERS[i ^ 1]) + (1, 2, 0)[i % 3] for i in range(32)]
    with pytest.raises(
        Finding, match=r"language.cu:\d+, block 0 thread 31, byte 252 of shared: outside of its 252 bytes"
    ):
        launch(module, "generic_pointers", [NUMBERS], [out], shared=124)


def test_switches_and_traps(module):
    chosen, out = np.resize(np.array([0, 1, 3, 4, 5, 6], np.int32), 32), np.zeros(32, np.int32)
    launch(module, "switches", [chosen], [out])
    thirty_first, by_case = int(chosen[31]), {0: 5, 6: -1}
    by_case |= {1: thirty_first * 3, 3: 32 - int(chosen[30]).bit_length()}
    by_case |= {4: int(chosen[29]).bit_count() + 7, 5: int(chosen[28]) % 5}
    assert out.tolist() == [by_case[case] for case in chosen.tolist()]
    chosen[7] = 2
    with pytest.raises(Finding, match=r"trap at language.cu:\d+, block 0 thread 7"):
        launch(module, "switches", [chosen], [out])


def test_blocks_of_several_chunks(module):
    grid, block = 3 * THREADS_AT_ONCE // 256 + 1, 256
    count, out = np.zeros(1, np.int32), np.zeros(grid * block, np.int32)
    launch(module, "counts_blocks", [], [count, out], grid=grid, block=block)
    assert count[0] == grid and (out == np.arange(grid * block) // block).all()
    with pytest.raises(Finding, match=rf"block {grid - 1} thread 0, byte 0 .*: race with a write by block 0 thread 0"):
        launch(module, "last_block_races", [], [np.zeros(1, np.int32)], grid=grid, block=block)


def test_bytes_that_nothing_was_written_to_are_counted(module):
    emulator = Emulator(module)
    out = np.zeros(40, np.int32)
    emulator.memory.add_array("in", NUMBERS)
    buffer = emulator.memory.add_array("out", out, writable=True, initialised=False)
    assert buffer.never_written == 160
    pointers = struct.pack("<2Q", NUMBERS.ctypes.data, out.ctypes.data)
    emulator.launch("local_array", (1, 1, 1), (32, 1, 1), 0, pointers)
    assert buffer.never_written == 32
