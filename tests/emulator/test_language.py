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
from tests.emulator.ptx import Module, Unsupported

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


def test_registers_of_scopes_in_a_switch(module):
    """nvcc puts a rotation into a scope with registers of its own, %lhs and %rhs, again and again."""
    values = np.random.default_rng(1).integers(0, 2**63, 32).astype(np.uint64)
    chosen, out = np.resize(np.arange(7, dtype=np.int32), 32), np.zeros(32, np.uint64)
    launch(module, "rotations", [values, chosen], [out])

    def rotated(value, by):
        return (value << by | value >> (64 - by)) & (2**64 - 1)

    for value, case, result in zip(values.tolist(), chosen.tolist(), out.tolist(), strict=True):
        nested = {0: rotated(value, 3), 1: rotated(rotated(value, 5), 11)}.get(value % 3, value)
        by_case = [rotated(value, 7), rotated(value, 13) ^ rotated(value, 32), nested, nested + rotated(value, 1)]
        expected = by_case[case] if case < 4 else 0 if case == 4 else value
        assert result == expected % 2**64, case


SCOPES = """
.visible .entry scopes(.param .u64 scopes_param_0)
{
	.reg .pred %p<2>;
	.reg .b32 %r<3>;
	.reg .b64 %rd<3>;
	ld.param.u64 %rd1, [scopes_param_0];
	mov.u32 %r1, 0;
	{
$again:
	{
	.reg .b32 %lhs;
	mov.u32 %lhs, 7;
	add.u32 %r1, %r1, %lhs;
	}
	.reg .b32 %lhs;
	setp.eq.u32 %p1, %r1, 7;
	@%p1 mov.u32 %lhs, 100;
	@%p1 bra $again;
	st.global.u32 [%rd1], %lhs;
	}
	ret;
}
"""


def test_a_name_of_an_outer_scope_is_not_that_of_one_which_ended_within_it():
    out = np.zeros(1, np.uint32)
    emulator = Emulator(Module(SCOPES))
    emulator.memory.add_array("out", out, writable=True)
    emulator.launch("scopes", (1, 1, 1), (32, 1, 1), 0, struct.pack("<Q", out.ctypes.data))
    assert out[0] == 100


@pytest.mark.parametrize(
    "text, message",
    [
        (SCOPES.replace("ret;", "$again: ret;"), r"scopes: label \$again is there twice"),
        (SCOPES.replace(".reg .b64 %rd<3>;", ".reg .b64 %rd<3>; .reg .b32 %rd1;"), "scopes: %rd1 is declared twice"),
        (SCOPES.replace("{\n\t.reg .b32 %lhs", "{ .reg .b16 %lhs; .reg .b32 %lhs"), "scopes: %lhs is declared twice"),
    ],
)
def test_what_ptx_does_not_allow_is_refused(text, message):
    with pytest.raises(Unsupported, match=message):
        Module(text).kernel("scopes")


def test_a_result_that_is_read_as_another_type_is_refused():
    text = """
.func (.param .b64 func_retval0) two_words()
{
	.reg .b32 %r<3>;
	mov.u32 %r1, 1;
	st.param.b32 [func_retval0], %r1;
	st.param.b32 [func_retval0+4], %r1;
	ret;
}
.visible .entry caller(.param .u64 caller_param_0)
{
	.reg .b64 %rd<3>;
	{
	.param .b64 retval0;
	call.uni (retval0), two_words, ();
	ld.param.b64 %rd1, [retval0];
	}
	ret;
}
"""
    with pytest.raises(Unsupported, match=r"caller: .*retval0.* of 4 bytes, and of 8"):
        Module(text).kernel("caller")


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
