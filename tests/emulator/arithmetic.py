"""Arithmetic: integers, float32 and float64, half precision and its packed pairs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.emulator.formats import DIRECTED, HALVES, decode, directed, encode, flush
from tests.emulator.program import DTYPES, Program, Step, allow, instruction
from tests.emulator.ptx import BYTES, Instruction, Unsupported

WIDE = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}
_MODIFIERS = ("rn", *DIRECTED, "approx", "full", "ftz", "sat", "NaN", "relu")

_BINARY = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}
_UNARY = {
    "abs": np.abs,
    "neg": np.negative,
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": np.reciprocal,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


@instruction("add", "sub", "mul", "div", "min", "max", *_UNARY, "fma", "mad", "copysign", "rem", "sad")
def arithmetic(i: Instruction, p: Program) -> Step:
    if i.type in HALVES or i.type in ("f32", "f64"):
        return _floating(i, p)
    if i.opcode in ("mul", "mad"):
        return _multiply(i, p)
    return _integer(i, p)


def elementwise(function: Callable, target: int, *sources: int) -> Step:
    """Return the step `target = function(*sources)`."""
    if len(sources) == 1:
        (a,) = sources

        def step(run, ix):
            run.v[target][ix] = function(run.v[a][ix])
    elif len(sources) == 2:
        a, b = sources

        def step(run, ix):
            run.v[target][ix] = function(run.v[a][ix], run.v[b][ix])
    else:

        def step(run, ix):
            run.v[target][ix] = function(*(run.v[source][ix] for source in sources))

    return step


def _floating(i: Instruction, p: Program) -> Step:
    allow(i, *_MODIFIERS)
    function = _floating_function(i)
    if toward := [modifier for modifier in i.modifiers if modifier in DIRECTED]:
        if i.type != "f32" or i.opcode not in ("add", "sub", "mul", "fma"):
            raise Unsupported(str(i))
        nearest = _BINARY.get(i.opcode, lambda a, b, c: a * b + c)
        function = lambda *x: directed(nearest(*(n.astype(np.float64) for n in x)), toward[0])  # noqa: E731
    if i.type in HALVES:
        # Exact in float64 up to the one rounding of the result.
        exact, type = function, i.type
        function = lambda *x: encode(exact(*(decode(n, type).astype(np.float64) for n in x)), type)  # noqa: E731
    elif "ftz" in i.modifiers and i.type == "f32":
        exact_ftz = function
        function = lambda *x: flush(exact_ftz(*map(flush, x)))  # noqa: E731
    return elementwise(function, p.target(i.operands[0], i.type), *(p.source(o, i.type) for o in i.operands[1:]))


def _floating_function(i: Instruction) -> Callable:
    if i.opcode in ("min", "max"):
        name = i.opcode.replace("min", "minimum").replace("max", "maximum") if "NaN" in i.modifiers else "f" + i.opcode
        function = getattr(np, name)
    elif i.opcode in ("fma", "mad"):
        function = _fused if i.type == "f32" else _fused_long if i.type == "f64" else lambda a, b, c: a * b + c
    elif i.opcode == "copysign":
        function = lambda a, b: np.copysign(b, a)  # noqa: E731
    elif i.opcode in _BINARY or i.opcode in _UNARY:
        function = _BINARY.get(i.opcode) or _UNARY[i.opcode]
    else:
        raise Unsupported(str(i))
    if "sat" in i.modifiers:
        return lambda *x: np.nan_to_num(np.clip(function(*x), 0, 1), nan=0.0)
    if "relu" in i.modifiers:
        return lambda *x: np.maximum(function(*x), 0)
    return function


def _fused(a, b, c):
    # The product of two float32 is exact in float64; the sum is rounded there and again here, rarely an ulp apart.
    return (a.astype(np.float64) * b + c).astype(np.float32)


def _fused_long(a, b, c):
    return (a.astype(np.longdouble) * b + c).astype(np.float64)


def _integer(i: Instruction, p: Program) -> Step:
    allow(i)
    function = {
        "add": np.add,
        "sub": np.subtract,
        "min": np.minimum,
        "max": np.maximum,
        "abs": np.abs,
        "neg": np.negative,
        "div": _divide,
        "rem": lambda a, b: a - _divide(a, b) * b,
        "sad": lambda a, b, c: c + np.maximum(a, b) - np.minimum(a, b),
    }.get(i.opcode)
    if function is None:
        raise Unsupported(str(i))
    return elementwise(function, p.target(i.operands[0], i.type), *(p.source(o, i.type) for o in i.operands[1:]))


def _divide(a, b):
    """Return quotients rounded toward zero; by 0 all bits are set, as GPUs do it."""
    by_zero = b == 0
    b = np.where(by_zero, b.dtype.type(1), b)
    quotient = a // b
    if a.dtype.kind == "i":
        quotient += ((a - quotient * b) != 0) & ((a < 0) != (b < 0))
    return np.where(by_zero, np.array(-1).astype(a.dtype), quotient)


def _multiply(i: Instruction, p: Program) -> Step:
    allow(i, "lo", "hi", "wide")
    result = WIDE[i.type] if "wide" in i.modifiers else i.type
    dtype = DTYPES[result]
    if "wide" in i.modifiers:
        product = lambda a, b: a.astype(dtype) * b  # noqa: E731
    elif "hi" in i.modifiers:
        product = _high64 if BYTES[i.type] == 8 else _high(i.type)
    else:
        product = np.multiply
    target = p.target(i.operands[0], result)
    a, b = (p.source(o, i.type) for o in i.operands[1:3])
    if i.opcode == "mul":
        return elementwise(product, target, a, b)
    return elementwise(lambda a, b, c: product(a, b) + c, target, a, b, p.source(i.operands[3], result))


def _high(type: str) -> Callable:
    wide, shift = DTYPES[WIDE[type]], 8 * BYTES[type]
    return lambda a, b: (a.astype(wide) * b >> wide.type(shift)).astype(a.dtype)


def _high64(a, b):
    """Return the upper 64 bits of products, from four products of halves."""
    unsigned_a, unsigned_b = a.view(np.uint64), b.view(np.uint64)
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    al, ah, bl, bh = unsigned_a & low, unsigned_a >> half, unsigned_b & low, unsigned_b >> half
    middle = ah * bl + (al * bl >> half)
    carry = (middle & low) + al * bh
    high = ah * bh + (middle >> half) + (carry >> half)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, unsigned_b, np.uint64(0)) - np.where(b < 0, unsigned_a, np.uint64(0))
    return high.view(a.dtype)
