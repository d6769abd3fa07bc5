"""Assigns a kernel's virtual registers, thousands of them, to as few physical ones as are alive at once."""

from __future__ import annotations

import heapq
from collections import defaultdict

from tests.emulator.ptx import BYTES, NAME, Instruction, Kernel

# Their first operand is read, not written.
_WITHOUT_RESULT = {
    "st",
    "red",
    "bra",
    "brx",
    "ret",
    "exit",
    "trap",
    "bar",
    "barrier",
    "cp",
    "membar",
    "fence",
    "prefetch",
}


def physical_registers(kernel: Kernel) -> dict[str, int]:
    """Return a number for each register; registers of one number have the same size and are never alive together.

    Every thread has its own copy of a physical register, so that only the flow of a single thread counts.
    """
    numbers = {name: i for i, name in enumerate(kernel.registers)}
    reads, writes, kills = zip(*(_accesses(i, numbers) for i in kernel.instructions), strict=True)
    live_after = _live_after(kernel, reads, kills)
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for position, (read, written, alive) in enumerate(zip(reads, writes, live_after, strict=True)):
        for register in _bits(read | written | alive):
            first.setdefault(register, position)
            last[register] = position
    return _linear_scan(kernel, first, last)


def _accesses(instruction: Instruction, numbers: dict[str, int]) -> tuple[int, int, int]:
    """Return bit sets of the registers that are read, written, and surely overwritten."""
    operands = list(instruction.operands)
    written = 0
    if operands and instruction.opcode not in _WITHOUT_RESULT:
        for name in NAME.findall(operands.pop(0)):
            if name in numbers:
                written |= 1 << numbers[name]
    read = 0
    for name in NAME.findall(" ".join((*operands, instruction.guard))):
        if name in numbers:
            read |= 1 << numbers[name]
    if instruction.guard:
        # Where the predicate fails, the old value lives on.
        return read | written, written, 0
    return read, written, written


def _live_after(kernel: Kernel, reads, kills) -> list[int]:
    successors = _successors(kernel)
    count = len(kernel.instructions)
    live_before = [0] * (count + 1)
    live_after = [0] * count
    changed = True
    while changed:
        changed = False
        for position in range(count - 1, -1, -1):
            after = 0
            for successor in successors[position]:
                after |= live_before[successor]
            before = reads[position] | (after & ~kills[position])
            live_after[position] = after
            if before != live_before[position]:
                live_before[position] = before
                changed = True
    return live_after


def _successors(kernel: Kernel) -> list[tuple[int, ...]]:
    result = []
    for position, instruction in enumerate(kernel.instructions):
        following: tuple[int, ...] = (position + 1,)
        if instruction.opcode == "bra":
            target = kernel.labels[instruction.operands[0]]
            following = (target, position + 1) if instruction.guard else (target,)
        elif instruction.opcode in ("ret", "exit") and not instruction.guard:
            following = (len(kernel.instructions),)
        result.append(following)
    return result


def _linear_scan(kernel: Kernel, first: dict[int, int], last: dict[int, int]) -> dict[str, int]:
    names = list(kernel.registers)
    free: dict[str, list[int]] = defaultdict(list)
    busy: list[tuple[int, int, str]] = []
    physical: dict[str, int] = {}
    count = 0
    for register in sorted(first, key=first.__getitem__):
        type = kernel.registers[names[register]]
        bank = "pred" if type == "pred" else str(BYTES[type])
        # An instruction may write its result before it has read all: a register is free only after its last use.
        while busy and busy[0][0] < first[register]:
            _, number, released = heapq.heappop(busy)
            heapq.heappush(free[released], number)
        if free[bank]:
            number = heapq.heappop(free[bank])
        else:
            number, count = count, count + 1
        physical[names[register]] = number
        heapq.heappush(busy, (last[register], number, bank))
    return physical


def _bits(bits: int):
    while bits:
        lowest = bits & -bits
        yield lowest.bit_length() - 1
        bits ^= lowest
