"""Runs blocks to their end: the threads that are furthest behind go first, so that branches meet again."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.emulator.blocks import Blocks
from tests.emulator.findings import Finding
from tests.emulator.program import Active
from tests.emulator.ptx import Instruction, Unsupported
from tests.emulator.warp import LANES

# Instructions that the lanes named in their last operand, or all of a warp, execute together.
_OF_LANES = {"shfl", "vote", "match", "redux"}
_OF_WARPS = {"ldmatrix", "stmatrix", "mma"}


class Scheduler:
    """The program counters of the threads of some blocks."""

    def __init__(self, blocks: Blocks) -> None:
        self.blocks, self.program = blocks, blocks.program
        self.instructions = self.program.kernel.instructions
        self.labels = self.program.kernel.labels
        self.end = len(self.instructions)
        count = len(blocks.threads)
        self.position = np.zeros(count, np.int64)
        # At an instruction that waits for others; tried again when one of them gets there.
        self.parked = np.zeros(count, np.bool_)

    def run(self) -> None:
        """Run every thread to its end.

        Raises:
            Finding: something is wrong with the kernel.
            Unsupported: it needs what the emulator does not model.
        """
        while True:
            waiting = np.where(self.parked, self.end, self.position)
            current = int(waiting.min())
            if current >= self.end:
                if self.parked.any():
                    self._report_stuck()
                return
            # All that stand at this instruction, those who wait there included.
            active = np.flatnonzero(self.position == current)
            self.parked[active] = False
            later = self.position[self.position > current]
            self._run_from(current, _compact(active, len(self.position)), int(later.min()) if len(later) else self.end)

    def _run_from(self, current: int, ix: Active, stop: int) -> None:
        """Run these threads up to a branch, the end, or a place where others stand."""
        blocks, program = self.blocks, self.program
        while True:
            i = self.instructions[current]
            blocks.position = current
            blocks.steps += 1
            if i.opcode in _CONTROL:
                _CONTROL[i.opcode](self, i, current, ix)
                return
            chosen = self._guarded(i, ix) if i.guard else ix
            if chosen is not None:
                if i.opcode in _OF_LANES or i.opcode in _OF_WARPS:
                    if i.guard and len(blocks.threads[chosen]) < len(blocks.threads[ix]):
                        raise blocks.finding(str(i), "predicated off for a part of the threads", ix)
                    ix = chosen = self._complete(i, current, ix)
                    if ix is None:
                        return
                step = program.step(current)
                if len(blocks.v) < len(program.slots):
                    blocks.extend_registers()
                step(blocks, chosen)
            current += 1
            if current == stop or current == self.end:
                self.position[ix] = current
                return

    def _guarded(self, i: Instruction, ix: Active) -> Active | None:
        """Return the threads whose predicate lets them execute, or None."""
        holds = self._predicate(i, ix)
        if holds.all():
            return ix
        chosen = self.blocks.threads[ix][holds]
        return chosen if len(chosen) else None

    def _predicate(self, i: Instruction, ix: Active) -> NDArray[np.bool_]:
        slot = self.program.source(i.guard, "pred")
        self.blocks.extend_registers()
        return self.blocks.v[slot][ix] ^ i.negated

    def _branch(self, i: Instruction, current: int, ix: Active) -> None:
        target = self.labels[i.operands[0]]
        if i.guard:
            self.position[ix] = np.where(self._predicate(i, ix), target, current + 1)
        else:
            self.position[ix] = target

    def _return(self, i: Instruction, current: int, ix: Active) -> None:
        self.position[ix] = np.where(self._predicate(i, ix), self.end, current + 1) if i.guard else self.end
        # Who waits for the rest of a block or warp may have waited for these.
        self.parked &= ~np.isin(self.blocks.local_block, self.blocks.local_block[ix])

    def _trap(self, i: Instruction, current: int, ix: Active) -> None:
        chosen = self._guarded(i, ix) if i.guard else ix
        if chosen is not None:
            raise self.blocks.finding("trap", f"reached: {i} {', '.join(i.operands)}", chosen)
        self.position[ix] = current + 1

    def _complete(self, i: Instruction, current: int, ix: Active) -> Active | None:
        """Return those whose warp is complete here, and park the others until it is."""
        threads = self.blocks.threads[ix]
        present = np.zeros(len(self.position), np.bool_)
        present[ix] = True
        expected = self.position < self.end
        if i.opcode in _OF_LANES:
            expected &= self._named_lanes(i, ix)
        missing = (expected & ~present).reshape(-1, LANES).any(1)
        ready = threads[~missing[threads // LANES]]
        if len(ready) < len(threads):
            late = threads[missing[threads // LANES]]
            self.parked[late] = True
            self.position[late] = current
        return _compact(ready, len(self.position)) if len(ready) else None

    def _named_lanes(self, i: Instruction, ix: Active) -> NDArray[np.bool_]:
        """Return the threads that the masks of the threads at this instruction name."""
        slot = self.program.source(i.operands[-1], "b32")
        self.blocks.extend_registers()
        masks, threads = self.blocks.v[slot][ix], self.blocks.threads[ix]
        if ((masks >> (threads % LANES).astype(np.uint32) & np.uint32(1)) == 0).any():
            raise self.blocks.finding(str(i), "a lane that its own mask does not name", ix)
        all_masks = np.zeros(len(self.position) // LANES, np.uint32)
        np.bitwise_or.at(all_masks, threads // LANES, masks)
        lanes = np.arange(LANES, dtype=np.uint32)
        return (all_masks[:, None] >> lanes & np.uint32(1)).astype(np.bool_).reshape(-1)

    def _barrier(self, i: Instruction, current: int, ix: Active) -> None:
        if i.guard:
            raise Unsupported(f"predicated {i}{self.program.where(current, ' at ')}")
        self.position[ix] = current
        if i.modifiers[0] == "warp":
            self._warp_barrier(i, current, ix)
        else:
            self._block_barrier(i, current, ix)

    def _warp_barrier(self, i: Instruction, current: int, ix: Active) -> None:
        mask = self.program.source(i.operands[0], "b32")
        self.blocks.extend_registers()
        if (self.blocks.v[mask][ix] != np.uint32(0xFFFFFFFF)).any():
            raise Unsupported(f"{i} of a part of a warp{self.program.where(current, ' at ')}")
        ready = self._complete(i, current, ix)
        if ready is not None:
            self.blocks.join_lanes(np.unique(self.blocks.threads[ready] // LANES))
            self.position[ready] = current + 1

    def _block_barrier(self, i: Instruction, current: int, ix: Active) -> None:
        modifiers = tuple(m for m in i.modifiers if m not in ("cta", "aligned"))
        if modifiers != ("sync",) or len(i.operands) > 2:
            raise Unsupported(f"{i}{self.program.where(current, ' at ')}")
        blocks = self.blocks
        threads = blocks.threads[ix]
        present = np.bincount(blocks.local_block[threads], minlength=blocks.num_blocks)
        if len(i.operands) == 2:
            expected = np.zeros(blocks.num_blocks, np.int64)
            slot = self.program.source(i.operands[1], "u32")
            blocks.extend_registers()
            expected[blocks.local_block[threads]] = blocks.v[slot][ix]
        else:
            expected = np.bincount(blocks.local_block[self.position < self.end], minlength=blocks.num_blocks)
        full = (present == expected) & (present > 0)
        passes = full[blocks.local_block[threads]]
        self.parked[threads[~passes]] = True
        self.position[threads[passes]] = current + 1
        for block in np.flatnonzero(full):
            warps = np.unique(threads[blocks.local_block[threads] == block] // LANES) % blocks.warps_per_block
            blocks.join(int(block), warps)

    def _report_stuck(self) -> None:
        places = []
        for position in np.unique(self.position[self.parked]):
            stuck = np.flatnonzero(self.parked & (self.position == position))
            block, thread = divmod(int(stuck[0]), self.blocks.threads_per_block)
            places.append(
                f"{self.instructions[position]} at {self.program.where(int(position))} ({len(stuck)} threads, "
                f"the first: block {block + self.blocks.first_block} thread {thread})"
            )
        raise Finding(f"divergence, never completed: {'; '.join(places)}")


def _compact(threads: NDArray[np.int64], count: int) -> Active:
    """Return a slice where the threads are neighbours: of it numpy makes views, not copies."""
    if len(threads) and threads[-1] - threads[0] + 1 == len(threads):
        return slice(int(threads[0]), int(threads[-1]) + 1)
    return threads


_CONTROL: dict[str, Any] = {
    "bra": Scheduler._branch,
    "ret": Scheduler._return,
    "exit": Scheduler._return,
    "trap": Scheduler._trap,
    "call": Scheduler._trap,
    "bar": Scheduler._barrier,
    "barrier": Scheduler._barrier,
}
