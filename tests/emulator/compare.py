"""Comparisons and selections: setp, set, selp, slct."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.emulator.arithmetic import elementwise
from tests.emulator.formats import HALVES, PACKED, decode
from tests.emulator.program import Program, Step, allow, instruction
from tests.emulator.ptx import Instruction, Unsupported

_COMPARISONS = {
    "eq": np.equal,
    "ne": lambda a, b: (a < b) | (a > b) if a.dtype.kind == "f" else a != b,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
    # True where either side is NaN.
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}
_COMBINATIONS = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


@instruction("setp")
def setp(i: Instruction, p: Program) -> Step:
    comparison, combination = _comparison(i)
    if i.type in PACKED:
        return _setp_packed(i, p, comparison, combination)
    targets = [p.target(name.strip(), "pred") for name in i.operands[0].split("|")]
    a, b = (p.source(o, i.type) for o in i.operands[1:3])
    if not combination and len(targets) == 1:
        return elementwise(comparison, targets[0], a, b)
    other, negated = _predicate(i.operands[3], p) if combination else (0, False)

    def step(run, ix):
        result = comparison(run.v[a][ix], run.v[b][ix])
        results = (result, ~result)
        if combination:
            with_this = run.v[other][ix] ^ negated
            results = tuple(combination(result, with_this) for result in results)
        for target, result in zip(targets, results, strict=False):
            run.v[target][ix] = result

    return step


def _setp_packed(i: Instruction, p: Program, comparison: Callable, combination: Callable | None) -> Step:
    if combination:
        raise Unsupported(str(i))
    targets = [p.target(name.strip(), "pred") for name in i.operands[0].split("|")]
    a, b = (p.source(o, i.type) for o in i.operands[1:3])

    def step(run, ix):
        result = comparison(run.v[a][ix], run.v[b][ix])
        for half, target in enumerate(targets):
            run.v[target][ix] = result[:, half]

    return step


@instruction("set")
def set_(i: Instruction, p: Program) -> Step:
    comparison, combination = _comparison(i, results=("f32", "u32", "s32", "f16", "bf16", *PACKED))
    result = i.modifiers[-2]
    if combination or i.type in PACKED or result not in ("f32", "u32", "s32"):
        raise Unsupported(str(i))
    yes = np.float32(1) if result == "f32" else np.uint32(0xFFFFFFFF).astype("i4" if result == "s32" else "u4")
    function = lambda a, b: np.where(comparison(a, b), yes, yes.dtype.type(0))  # noqa: E731
    return elementwise(function, p.target(i.operands[0], result), *(p.source(o, i.type) for o in i.operands[1:3]))


@instruction("selp")
def selp(i: Instruction, p: Program) -> Step:
    allow(i)
    chosen, negated = _predicate(i.operands[3], p)
    a, b = (p.source(o, i.type) for o in i.operands[1:3])
    a, b = (b, a) if negated else (a, b)
    target = p.target(i.operands[0], i.type)

    def step(run, ix):
        run.v[target][ix] = np.where(run.v[chosen][ix], run.v[a][ix], run.v[b][ix])

    return step


@instruction("slct")
def slct(i: Instruction, p: Program) -> Step:
    allow(i, "ftz", i.modifiers[-2])
    result = i.modifiers[-2]
    a, b, c = (p.source(o, t) for o, t in zip(i.operands[1:], (result, result, i.type), strict=True))
    return elementwise(lambda a, b, c: np.where(c >= 0, a, b), p.target(i.operands[0], result), a, b, c)


def _comparison(i: Instruction, results: tuple[str, ...] = ()) -> tuple[Callable, Callable | None]:
    allow(i, *_COMPARISONS, *_COMBINATIONS, "ftz", *results)
    names = [modifier for modifier in i.modifiers[:-1] if modifier in _COMPARISONS]
    combinations = [_COMBINATIONS[modifier] for modifier in i.modifiers[:-1] if modifier in _COMBINATIONS]
    compare, type = _COMPARISONS[names[0]], i.type
    if type in HALVES:
        return lambda a, b: compare(decode(a, type), decode(b, type)), combinations[0] if combinations else None
    return compare, combinations[0] if combinations else None


def _predicate(operand: str, p: Program) -> tuple[int, bool]:
    return p.source(operand.lstrip("!"), "pred"), operand.startswith("!")
