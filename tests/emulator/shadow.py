"""Shadow memory: who last wrote and read each granule of a memory, and whether that is ordered before an access.

Happens-before by vector clocks, one per warp: Flanagan, Freund: FastTrack, PLDI 2009, section 3.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.emulator.findings import Finding

# A stamp says who accessed a granule, when, and by which instruction, from the lowest bit on.
CLOCK_BITS, THREAD_BITS, BLOCK_BITS, POSITION_BITS = 14, 10, 20, 18
THREAD_SHIFT = CLOCK_BITS
BLOCK_SHIFT = THREAD_SHIFT + THREAD_BITS
POSITION_SHIFT = BLOCK_SHIFT + BLOCK_BITS
ATOMIC = np.int64(1 << (POSITION_SHIFT + POSITION_BITS))
PLAIN = np.int64(0)
# The sign: a cp.async that has not landed.
IN_FLIGHT = np.int64(-(1 << 63))
CLOCK = np.int64((1 << CLOCK_BITS) - 1)
OWNER = np.int64(((1 << (THREAD_BITS + BLOCK_BITS)) - 1) << THREAD_SHIFT)
WARP = np.int64(OWNER & ~(31 << THREAD_SHIFT))


def thread_of(stamps: NDArray[np.int64]) -> NDArray[np.int64]:
    return stamps >> THREAD_SHIFT & ((1 << THREAD_BITS) - 1)


def block_of(stamps: NDArray[np.int64]) -> NDArray[np.int64]:
    return stamps >> BLOCK_SHIFT & ((1 << BLOCK_BITS) - 1)


class Shadow:
    """Stamps of one memory; `granules [n, per access]` are indices into it."""

    def __init__(self, num_granules: int, granule: int, name: str, of_one_block: bool) -> None:
        self.granule, self.name, self.of_one_block = granule, name, of_one_block
        self.written = np.zeros(num_granules, np.int64)
        self.read = np.zeros(num_granules, np.int64)
        # A reader other than the last one: of another warp where there is one, else another lane.
        self.other_read = np.zeros(num_granules, np.int64)

    def on_read(self, run: Any, ix: Any, granules: NDArray[np.int64]) -> None:
        stamps = run.stamps(ix)[:, None]
        written = self.written[granules]
        if self.of_one_block and not written.all():
            self._report(run, "read", granules, stamps, written == 0, "uninitialised")
        self._check_written(run, ix, "read", granules, stamps, written)
        last = self.read[granules]
        others = ((last ^ stamps) & OWNER != 0) & (last != 0)
        if others.any():
            self._remember_other(run, granules, stamps, last, others)
        self.read[granules] = stamps

    def on_write(self, run: Any, ix: Any, granules: NDArray[np.int64], flag: np.int64 = PLAIN) -> bool:
        """Return whether two threads wrote one granule by this very instruction."""
        stamps = run.stamps(ix)[:, None] | flag
        self._check_written(run, ix, "write", granules, stamps, self.written[granules])
        for readers in (self.read[granules], self.other_read[granules]):
            if not flag & ATOMIC:
                self._check_ordered(run, ix, "write", granules, stamps, readers, "race with a read")
        self.written[granules] = stamps
        self.read[granules] = 0
        self.other_read[granules] = 0
        return bool((self.written[granules] != stamps).any())

    def on_landing(self, run: Any, ix: Any, granules: NDArray[np.int64]) -> None:
        """A cp.async of these threads has landed: from now on they see it, others after the next barrier."""
        self.written[granules] = run.stamps(ix)[:, None]

    def _check_written(self, run: Any, ix: Any, kind: str, granules, stamps, written) -> None:
        if (written < 0).any():
            self._report(run, kind, granules, stamps, written < 0, "touches a cp.async still in flight", written)
        if (stamps.flat[0] & ATOMIC) and (written & ATOMIC).all():
            return
        self._check_ordered(run, ix, kind, granules, stamps, written, "race with a write")

    def _check_ordered(self, run: Any, ix: Any, kind: str, granules, stamps, before, what: str) -> None:
        if self.of_one_block and ((before & CLOCK) < run.settled(ix)[:, None]).all():
            return
        others = ((before ^ stamps) & OWNER != 0) & (before != 0)
        if others.any():
            unordered = others & ~self._is_ordered(run, stamps, before)
            if unordered.any():
                self._report(run, kind, granules, stamps, unordered, what, before)

    @staticmethod
    def _is_ordered(run: Any, stamps, before):
        """True where the access `before`, of whatever thread, happens before one that is stamped now."""
        known = run.known_clock(block_of(stamps), thread_of(stamps) >> 5, thread_of(before) >> 5)
        return (block_of(stamps) == block_of(before)) & ((before & CLOCK) < known)

    def _remember_other(self, run: Any, granules, stamps, last, others) -> None:
        other = self.other_read[granules]
        same_warp = (last ^ stamps) & WARP == 0
        keeps = same_warp & (other != 0) & ((other ^ stamps) & WARP != 0) & ~self._is_ordered(run, stamps, other)
        self.other_read[granules] = np.where(others & ~keeps, last, other)

    def _report(self, run: Any, kind: str, granules, stamps, bad, what: str, before=None) -> None:
        row, column = np.argwhere(np.broadcast_to(bad, granules.shape))[0]
        byte = int(granules[row, column]) * self.granule
        message = f"{run.access(kind, stamps[row, 0])}, byte {run.byte_of(self, byte)} of {self.name}: {what}"
        if before is not None:
            stamp = before[row, column]
            position = int(stamp >> POSITION_SHIFT & ((1 << POSITION_BITS) - 1))
            by = f"block {int(block_of(stamp))} thread {int(thread_of(stamp))}"
            message += f" by {by} at {run.program.where(position)}"
        raise Finding(message)
