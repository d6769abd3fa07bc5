"""Instructions on bits: logic, shifts, fields, permutations, counts."""

from __future__ import annotations

import numpy as np

from tests.emulator.arithmetic import elementwise
from tests.emulator.program import DTYPES, Program, Step, allow, instruction
from tests.emulator.ptx import BYTES, Instruction, Unsupported

_LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}


@instruction(*_LOGIC)
def logic(i: Instruction, p: Program) -> Step:
    allow(i)
    return elementwise(
        _LOGIC[i.opcode], p.target(i.operands[0], i.type), *(p.source(o, i.type) for o in i.operands[1:])
    )


@instruction("cnot")
def cnot(i: Instruction, p: Program) -> Step:
    allow(i)
    return elementwise(lambda a: a == 0, p.target(i.operands[0], i.type), p.source(i.operands[1], i.type))


@instruction("shl", "shr")
def shift(i: Instruction, p: Program) -> Step:
    allow(i)
    width = 8 * BYTES[i.type]

    def left(a, b):
        return np.where(b < width, a << np.minimum(b, width - 1).astype(a.dtype), a.dtype.type(0))

    def right(a, b):
        shifted = a >> np.minimum(b, width - 1).astype(a.dtype)
        return shifted if a.dtype.kind == "i" else np.where(b < width, shifted, a.dtype.type(0))

    a, b = p.source(i.operands[1], i.type), p.source(i.operands[2], "u32")
    return elementwise(left if i.opcode == "shl" else right, p.target(i.operands[0], i.type), a, b)


@instruction("shf")
def funnel_shift(i: Instruction, p: Program) -> Step:
    allow(i, "l", "r", "wrap", "clamp")
    left, wrap = "l" in i.modifiers, "wrap" in i.modifiers

    def shifted(low, high, by):
        by = (by & np.uint32(31) if wrap else np.minimum(by, np.uint32(32))).astype(np.uint64)
        both = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
        # A shift of 64 bits by 32 keeps what a shift of 32 bits by 32 has to give.
        result = (both << by) >> np.uint64(32) if left else both >> by
        return result.astype(np.uint32)

    return elementwise(shifted, p.target(i.operands[0], "b32"), *(p.source(o, "b32") for o in i.operands[1:]))


@instruction("lop3")
def lookup(i: Instruction, p: Program) -> Step:
    allow(i)
    table = int(i.operands[4], 0)

    def looked_up(a, b, c):
        result = np.zeros_like(a)
        for row in range(8):
            if table >> row & 1:
                result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        return result

    return elementwise(looked_up, p.target(i.operands[0], "b32"), *(p.source(o, "b32") for o in i.operands[1:4]))


@instruction("prmt")
def permute(i: Instruction, p: Program) -> Step:
    allow(i)

    def permuted(a, b, selector):
        source = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
        result = np.zeros_like(a)
        for byte in range(4):
            pick = selector >> np.uint32(4 * byte) & np.uint32(15)
            value = (source >> ((pick & np.uint32(7)) * np.uint32(8)).astype(np.uint64) & np.uint64(255)).astype(
                np.uint32
            )
            # The fourth bit of a selector replicates the sign of the byte.
            sign = np.where(value & np.uint32(128), np.uint32(255), np.uint32(0))
            result |= np.where(pick & np.uint32(8), sign, value) << np.uint32(8 * byte)
        return result

    return elementwise(permuted, p.target(i.operands[0], "b32"), *(p.source(o, "b32") for o in i.operands[1:]))


@instruction("bfe")
def extract(i: Instruction, p: Program) -> Step:
    allow(i)
    dtype, width = DTYPES[i.type], 8 * BYTES[i.type]

    def extracted(a, position, length):
        position, length = position & np.uint32(255), np.minimum(length & np.uint32(255), width)
        wide = a.astype(np.int64 if dtype.kind == "i" else np.uint64)
        shifted = np.where(position < width, wide >> np.minimum(position, 63).astype(wide.dtype), 0).astype(np.uint64)
        if dtype.kind == "i":
            shifted = (wide >> np.minimum(position, 63).astype(np.int64)).view(np.uint64)
        # Up to the left end of 64 bits and back: the sign comes along where there is one.
        up = (64 - np.maximum(length, 1)).astype(np.uint64)
        field = (shifted << up).view(wide.dtype) >> up.astype(wide.dtype)
        return np.where(length == 0, 0, field).astype(dtype)

    a = p.source(i.operands[1], i.type)
    return elementwise(extracted, p.target(i.operands[0], i.type), a, *(p.source(o, "u32") for o in i.operands[2:]))


@instruction("bfi")
def insert(i: Instruction, p: Program) -> Step:
    allow(i)
    dtype, width = DTYPES[i.type], 8 * BYTES[i.type]

    def inserted(a, b, position, length):
        position, length = position & np.uint32(255), np.minimum(length & np.uint32(255), width)
        ones = np.where(length >= 64, ~np.uint64(0), (np.uint64(1) << (length % 64).astype(np.uint64)) - np.uint64(1))
        shift = np.minimum(position, 63).astype(np.uint64)
        mask = np.where(position < width, ones << shift, np.uint64(0)).astype(dtype)
        return (b & ~mask) | ((a.astype(np.uint64) << shift).astype(dtype) & mask)

    sources = [p.source(o, i.type) for o in i.operands[1:3]] + [p.source(o, "u32") for o in i.operands[3:]]
    return elementwise(inserted, p.target(i.operands[0], i.type), *sources)


@instruction("popc", "clz", "brev", "bfind")
def count(i: Instruction, p: Program) -> Step:
    allow(i, "shiftamt")
    if i.opcode == "bfind" and i.type[0] == "s":
        raise Unsupported(str(i))
    # How far to shift the highest bit to the left end, in the place of where it is.
    shift_amount = "shiftamt" in i.modifiers
    dtype, width = DTYPES[i.type], 8 * BYTES[i.type]

    def bits(a):
        # [..., width], the lowest bit first.
        return np.unpackbits(np.ascontiguousarray(a).view(np.uint8).reshape(-1, width // 8), axis=1, bitorder="little")

    function = {
        "popc": lambda a: bits(a).sum(1),
        "clz": lambda a: np.where(a == 0, width, bits(a)[:, ::-1].argmax(1)),
        "bfind": lambda a: np.where(
            a == 0, 0xFFFFFFFF, bits(a)[:, ::-1].argmax(1) if shift_amount else width - 1 - bits(a)[:, ::-1].argmax(1)
        ),
        "brev": lambda a: np.packbits(bits(a)[:, ::-1], axis=1, bitorder="little").view(dtype)[:, 0],
    }[i.opcode]
    result = i.type if i.opcode == "brev" else "u32"
    return elementwise(function, p.target(i.operands[0], result), p.source(i.operands[1], i.type))
