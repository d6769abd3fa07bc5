"""atom and red: read-modify-write of global and shared memory, one thread after another."""

from __future__ import annotations

import numpy as np

from tests.emulator.formats import HALVES, decode, encode
from tests.emulator.moves import CACHE_HINTS
from tests.emulator.program import DTYPES, Program, Step, allow, instruction
from tests.emulator.ptx import Instruction, Unsupported

_OPERATIONS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, new: new,
    "inc": lambda old, limit: np.where(old >= limit, 0, old + 1).astype(old.dtype),
    "dec": lambda old, limit: np.where((old == 0) | (old > limit), limit, old - 1).astype(old.dtype),
}
_SPACES = ("global", "shared", "shared::cta")


@instruction("atom", "red")
def atomic(i: Instruction, p: Program) -> Step:
    allow(i, *_OPERATIONS, *_SPACES, *CACHE_HINTS, "cas", "noftz", "acq_rel")
    dtype, type = DTYPES[i.type], i.type
    returns = i.opcode == "atom"
    address, *values = i.operands[returns:]
    target = p.target(i.operands[0] if returns else "_", type)
    (base, offset), sources = p.address(address), [p.source(value, type) for value in values]
    space = next((m.partition("::")[0] for m in i.modifiers if m in _SPACES), "generic")
    names = [modifier for modifier in i.modifiers[:-1] if modifier in (*_OPERATIONS, "cas")]
    if len(names) != 1 or (type in HALVES and names != ["add"]):
        raise Unsupported(str(i))

    def updated(old, operands):
        if names[0] == "cas":
            return np.where(old == operands[0], operands[1], old)
        if type in HALVES:
            return encode(decode(old, type).astype(np.float64) + decode(operands[0], type), type)
        return _OPERATIONS[names[0]](old, operands[0])

    def step(run, ix):
        at = run.v[base][ix].astype(np.int64) + offset
        operands = [run.v[source][ix] for source in sources]
        before = np.empty(len(at), dtype)
        for elements, chosen, index in run.space(space).update(ix, at, dtype):
            some = [operand[chosen] for operand in operands]
            old = np.empty(len(index), dtype)
            for turn in _turns(index):
                old[turn] = elements[index[turn]]
                elements[index[turn]] = updated(old[turn], [operand[turn] for operand in some])
            before[chosen] = old
        run.v[target][ix] = before

    return step


def _turns(index):
    """Yield positions, in their order, in sets that hold no index twice."""
    order = np.argsort(index, kind="stable")
    ordered = index[order]
    starts = np.r_[True, ordered[1:] != ordered[:-1]]
    rank = np.arange(len(index)) - np.maximum.accumulate(np.where(starts, np.arange(len(index)), 0))
    for turn in range(int(rank.max(initial=-1)) + 1):
        yield np.sort(order[rank == turn])
