"""cvt: conversions between the integer and floating-point types."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.emulator.arithmetic import elementwise
from tests.emulator.formats import HALVES, PACKED, decode, encode, flush
from tests.emulator.program import DTYPES, Program, Step, allow, instruction
from tests.emulator.ptx import Instruction, Unsupported

_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_FLOATS = ("f32", "f64", "tf32", *HALVES)


@instruction("cvt")
def cvt(i: Instruction, p: Program) -> Step:
    result, type = i.modifiers[-2:]
    allow(i, "rn", "rz", "rna", "sat", "relu", "ftz", "satfinite", *_TO_INTEGER, result)
    if result in PACKED:
        return _pack(i, p)
    target, source = p.target(i.operands[0], result), p.source(i.operands[1], type)
    if result in _FLOATS and type in _FLOATS:
        function = _float_to_float(i)
    elif result in _FLOATS:
        function = lambda a: encode(_exact(a), result, "rz" in i.modifiers)  # noqa: E731
    elif type in _FLOATS:
        function = _float_to_integer(i)
    else:
        function = _saturated(result) if "sat" in i.modifiers else lambda a: a.astype(DTYPES[result])  # noqa: E731
    return elementwise(function, target, source)


def _pack(i: Instruction, p: Program) -> Step:
    """cvt.f16x2.f32 d, a, b: a goes to the upper half, b to the lower."""
    result, type = i.modifiers[-2:]
    if type != "f32" or "sat" in i.modifiers or "satfinite" in i.modifiers:
        raise Unsupported(str(i))
    toward_zero, relu = "rz" in i.modifiers, "relu" in i.modifiers

    def packed(high, low):
        numbers = np.stack((low, high), axis=-1)
        return encode(np.maximum(numbers, 0) if relu else numbers, result, toward_zero)

    return elementwise(packed, p.target(i.operands[0], result), *(p.source(o, "f32") for o in i.operands[1:]))


def _float_to_float(i: Instruction) -> Callable:
    result, type = i.modifiers[-2:]
    steps: list[Callable] = [lambda a: decode(a, type)]
    if rounded := [_TO_INTEGER[m] for m in i.modifiers if m in _TO_INTEGER]:
        steps.append(rounded[0])
    if "ftz" in i.modifiers and type == "f32":
        steps.append(flush)
    if "relu" in i.modifiers:
        steps.append(lambda a: np.maximum(a, 0))
    if "sat" in i.modifiers:
        steps.append(lambda a: np.nan_to_num(np.clip(a, 0, 1), nan=0.0))
    if "satfinite" in i.modifiers:
        raise Unsupported(str(i))
    toward_zero = "rz" in i.modifiers

    def converted(a):
        for step in steps:
            a = step(a)
        return encode(a, result, toward_zero)

    return converted


def _exact(integers):
    """Return float64; of 64-bit integers, the nearest float64 that a second rounding does not notice."""
    if integers.dtype.itemsize < 8:
        return integers.astype(np.float64)
    # 11 bits below what float64 holds: or-ed into the lowest bit that stays, so that they break ties.
    magnitude = np.where(integers < 0, -integers, integers).astype(np.uint64)
    large = magnitude >> np.uint64(53) != 0
    sticky = (magnitude >> np.uint64(11) << np.uint64(11)) | np.where(
        magnitude & np.uint64(0x7FF), np.uint64(0x800), np.uint64(0)
    )
    numbers = np.where(large, sticky, magnitude).astype(np.float64)
    return np.where(integers < 0, -numbers, numbers)


def _float_to_integer(i: Instruction) -> Callable:
    result, type = i.modifiers[-2:]
    (rounded,) = (_TO_INTEGER[m] for m in i.modifiers if m in _TO_INTEGER)
    dtype = DTYPES[result]
    limits = np.iinfo(dtype)

    def converted(a):
        numbers = rounded(decode(a, type).astype(np.float64))
        # Out of range is the nearest end, NaN is 0; float64 has no 2^63 - 1, so that the end is set, not clipped to.
        inside = np.where((numbers > limits.min) & (numbers < limits.max), numbers, 0).astype(dtype)
        inside = np.where(numbers >= limits.max, dtype.type(limits.max), inside)
        return np.where(numbers <= limits.min, dtype.type(limits.min), inside)

    return converted


def _saturated(result: str) -> Callable:
    dtype = DTYPES[result]
    limits = np.iinfo(dtype)

    def converted(a):
        low = max(limits.min, np.iinfo(a.dtype).min)
        high = min(limits.max, np.iinfo(a.dtype).max)
        return np.clip(a, low, high).astype(dtype)

    return converted
