"""ldmatrix, stmatrix and mma: which lane and register holds which element of a matrix.

Source: PTX ISA, sections "Matrix Fragments for mma.m16n8k16" (and .m16n8k8) and "ldmatrix".
"""

from __future__ import annotations

import numpy as np

from tests.emulator.formats import decode
from tests.emulator.program import Program, Step, allow, instruction
from tests.emulator.ptx import Instruction, Unsupported
from tests.emulator.warp import LANES

_ROWS = 8
# Bytes of a row of an 8 x 8 matrix of 16-bit elements.
_ROW_BYTES = 16


@instruction("ldmatrix")
def ldmatrix(i: Instruction, p: Program) -> Step:
    allow(i, "sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "shared::cta")
    targets = p.targets(i.operands[0], "b32")
    base, offset = p.address(i.operands[1])
    count, transposed = len(targets), "trans" in i.modifiers
    _check_count(i, count)

    def step(run, ix):
        threads, address = _row_addresses(run, ix, base, offset, count)
        rows = run.space("shared").load(threads, address, np.dtype(np.uint32), _ROW_BYTES // 4)
        # [warps, matrices, rows, columns] of 16 bits; a lane gets two neighbours of a row.
        matrices = rows.view(np.uint16).reshape(-1, count, _ROWS, 8)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        words = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, count, LANES)
        for n, target in enumerate(targets):
            run.v[target][ix] = words[:, n].reshape(-1)

    return step


@instruction("stmatrix")
def stmatrix(i: Instruction, p: Program) -> Step:
    allow(i, "sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "shared::cta")
    sources = p.sources(i.operands[1], "b32")
    base, offset = p.address(i.operands[0])
    count, transposed = len(sources), "trans" in i.modifiers
    _check_count(i, count)

    def step(run, ix):
        threads, address = _row_addresses(run, ix, base, offset, count)
        words = np.stack([run.v[source][ix].reshape(-1, LANES) for source in sources], axis=1)
        matrices = np.ascontiguousarray(words).view(np.uint16).reshape(-1, count, _ROWS, 8)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        rows = np.ascontiguousarray(matrices).view(np.uint32).reshape(len(threads), _ROW_BYTES // 4)
        run.space("shared").store(threads, address, rows)

    return step


def _check_count(i: Instruction, count: int) -> None:
    if i.type != "b16" or f"x{count}" not in i.modifiers:
        raise Unsupported(str(i))


def _row_addresses(run, ix, base: int, offset: int, count: int):
    """Return the threads whose addresses count, eight for each matrix, and the addresses."""
    run.check_whole_warps(ix)
    address = (run.v[base][ix].astype(np.int64) + offset).reshape(-1, LANES)[:, : _ROWS * count]
    threads = run.threads[ix].reshape(-1, LANES)[:, : _ROWS * count]
    return threads.reshape(-1), address.reshape(-1)


@instruction("mma")
def mma(i: Instruction, p: Program) -> Step:
    shape = i.modifiers[2] if len(i.modifiers) > 2 else ""
    depth = {"m16n8k16": 16, "m16n8k8": 8}.get(shape)
    result, a_type, b_type, c_type = i.modifiers[-4:]
    if depth is None or i.modifiers[3:5] != ("row", "col") or a_type != b_type or a_type not in ("f16", "bf16"):
        raise Unsupported(str(i))
    if (result, c_type) != ("f32", "f32"):
        raise Unsupported(str(i))
    a, b, c = p.sources(i.operands[1], "b32"), p.sources(i.operands[2], "b32"), p.sources(i.operands[3], "f32")
    d = p.targets(i.operands[0], "f32")
    halves = depth // 8

    def fragments(run, ix, slots):
        words = np.stack([run.v[slot][ix] for slot in slots], axis=1)
        return decode(words.view(np.uint16), a_type).reshape(-1, 8, 4, len(slots), 2)

    def step(run, ix):
        run.check_whole_warps(ix)
        # Lane = 4 * group + t. Register r of A: row group + 8 * (r & 1), columns 2 * t, 2 * t + 1, + 8 * (r >> 1).
        left = fragments(run, ix, a).reshape(-1, 8, 4, halves, 2, 2)
        left = left.transpose(0, 4, 1, 3, 2, 5).reshape(-1, 16, depth)
        # Register r of B: rows 2 * t, 2 * t + 1, + 8 * r, column group; here transposed.
        right = fragments(run, ix, b).transpose(0, 1, 3, 2, 4).reshape(-1, 8, depth)
        # Register r of C and D: row group + 8 * (r >> 1), column 2 * t + (r & 1).
        sums = np.stack([run.v[slot][ix] for slot in c], axis=1).reshape(-1, 8, 4, 2, 2)
        sums = sums.transpose(0, 3, 1, 2, 4).reshape(-1, 16, 8)
        product = np.matmul(left.astype(np.float64), right.astype(np.float64).swapaxes(1, 2))
        total = (product + sums).astype(np.float32).reshape(-1, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4).reshape(-1, 4)
        for n, slot in enumerate(d):
            run.v[slot][ix] = total[:, n]

    return step
