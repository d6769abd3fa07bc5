"""cp.async: copies from global to shared memory that land, as late as they may, at the wait for their group."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tests.emulator.moves import CACHE_HINTS
from tests.emulator.program import Program, Step, allow, instruction
from tests.emulator.ptx import Instruction, Unsupported


@dataclass
class Copy:
    """What one instruction set under way, a row a thread: `group` is the number of commits before it."""

    threads: NDArray[np.int64]
    group: NDArray[np.int64]
    target: NDArray[np.int64]
    source: NDArray[np.int64]
    # Of the source; the rest of the `size` bytes is filled with zeros.
    num_bytes: NDArray[np.int64]
    size: int

    def part(self, chosen: NDArray[np.bool_]) -> Copy:
        rows = (self.threads, self.group, self.target, self.source, self.num_bytes)
        return Copy(*(row[chosen] for row in rows), self.size)


@instruction("cp")
def cp_async(i: Instruction, p: Program) -> Step:
    if i.modifiers[0] != "async" or "bulk" in i.modifiers:
        raise Unsupported(str(i))
    if i.modifiers == ("async", "commit_group"):
        return _commit
    if i.modifiers == ("async", "wait_group"):
        pending = int(i.operands[0], 0)
        return lambda run, ix: wait(run, ix, run.commits[ix] - pending)
    if i.modifiers == ("async", "wait_all"):
        # Committed or not.
        return lambda run, ix: wait(run, ix, run.commits[ix] + 1)
    return _issue(i, p)


def _issue(i: Instruction, p: Program) -> Step:
    allow(i, "async", "shared", "shared::cta", "global", *CACHE_HINTS)
    (target, target_offset), (source, source_offset) = (p.address(o) for o in i.operands[:2])
    size = int(i.operands[2], 0)
    if size not in (4, 8, 16) or ("cg" in i.modifiers and size != 16) or "L2::cache_hint" in i.modifiers:
        raise Unsupported(f"{i} of {size} bytes")
    # A fourth operand is the bytes of the source, or a predicate that ignores it.
    ignores = len(i.operands) > 3 and p.kernel.registers.get(i.operands[3].lstrip("!")) == "pred"
    if ignores and i.operands[3].startswith("!"):
        raise Unsupported(f"{i} {i.operands[3]}")
    count = p.source(i.operands[3], "pred" if ignores else "u32") if len(i.operands) > 3 else p.source(str(size), "u32")

    def step(run, ix):
        to = run.v[target][ix].astype(np.int64) + target_offset
        from_ = run.v[source][ix].astype(np.int64) + source_offset
        num_bytes = run.v[count][ix].astype(np.int64)
        if ignores:
            num_bytes = np.where(num_bytes, 0, size)
        if (num_bytes > size).any():
            raise run.finding("cp.async", f"src-size {int(num_bytes.max())} of {size} bytes", ix)
        run.space("shared").issue(ix, to, size)
        copies = Copy(run.threads[ix].copy(), run.commits[ix].copy(), to, from_, num_bytes, size)
        # The source is checked where the copy is issued, so that the report names that line.
        for length, chosen in _lengths(copies):
            run.space("global").check_copy(copies.threads[chosen], from_[chosen], length, size)
        run.copies.append(copies)

    return step


def _commit(run, ix) -> None:
    run.commits[ix] += 1


def wait(run, ix, before) -> None:
    """Let the copies of these threads land whose group is one of the first `before`."""
    limit = np.full(len(run.threads), -1, np.int64)
    limit[ix] = before
    remaining = []
    for copies in run.copies:
        lands = copies.group < limit[copies.threads]
        if lands.any():
            _land(run, copies if lands.all() else copies.part(lands))
        if not lands.all():
            remaining.append(copies.part(~lands) if lands.any() else copies)
    run.copies = remaining


def _land(run, copies: Copy) -> None:
    values = np.zeros((len(copies.threads), copies.size), np.uint8)
    for length, chosen in _lengths(copies):
        values[chosen, :length] = run.space("global").copied(
            copies.threads[chosen], copies.source[chosen], length, copies.size
        )
    # Whole words, so that the copy is one element of a view.
    run.space("shared").land(copies.threads, copies.target, values.view(np.uint32))


def _lengths(copies: Copy):
    """Yield each number of bytes that is copied, with the rows that copy so many."""
    if (copies.num_bytes == copies.size).all():
        yield copies.size, slice(None)
        return
    for length in np.unique(copies.num_bytes[copies.num_bytes > 0]):
        yield int(length), copies.num_bytes == length
