"""Counts what accesses cost the memory system: sectors of global memory, wavefronts of shared memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LANES = 32
# Bytes that global memory moves at once.
SECTOR = 32
BANK_BYTES, NUM_BANKS = 4, 32


@dataclass
class Cost:
    """Of all executions of one instruction: what it moved, and the least that so many bytes need."""

    space: str
    where: str
    opcode: str
    bytes: int = 0
    # Sectors of global memory, or wavefronts of shared memory: cycles in which each bank serves one word.
    units: int = 0
    least: int = 0

    @property
    def excess(self) -> float:
        """How many times the least; of shared memory, an n-way bank conflict is n."""
        return self.units / self.least


class Traffic:
    """Costs by kernel and instruction; hand one to an Emulator."""

    def __init__(self) -> None:
        self.costs: dict[tuple[str, int], Cost] = {}

    def of(self, space: str, opcode: str = "") -> list[Cost]:
        """Return the costs of the instructions that access a space."""
        return [c for c in self.costs.values() if c.space == space and c.opcode.startswith(opcode)]

    def add(self, run: Any, space: str, threads: NDArray[np.int64], address: NDArray[np.int64], size: int) -> None:
        if space not in ("global", "shared"):
            return
        key = (f"{run.program.kernel.name} {space}", run.position)
        if key not in self.costs:
            opcode = str(run.program.kernel.instructions[run.position])
            self.costs[key] = Cost(space, run.program.where(run.position), opcode)
        cost = self.costs[key]
        units, least = (_sectors if space == "global" else _wavefronts)(threads, address, size)
        cost.bytes += size * len(threads)
        cost.units += units
        cost.least += least


def _sectors(threads: NDArray[np.int64], address: NDArray[np.int64], size: int) -> tuple[int, int]:
    """Return the sectors that each warp touches, and what they would be if its bytes lay side by side."""
    warps = threads // LANES
    touched = np.unique(np.stack([warps, address // SECTOR], axis=1), axis=0)
    # Lanes that read the same bytes share them.
    places = np.unique(np.stack([warps, address // size], axis=1), axis=0)
    _, distinct = np.unique(places[:, 0], return_counts=True)
    return len(touched), int((-(-distinct * size // SECTOR)).sum())


def _wavefronts(threads: NDArray[np.int64], address: NDArray[np.int64], size: int) -> tuple[int, int]:
    """Return cycles, and the least that are needed: as many lanes at once as 32 banks serve with 4 bytes each.

    Measured by others on sm_70 and later: of 8-byte accesses half a warp goes at once, of 16-byte accesses a quarter;
    lanes that want the same word get it together.
    """
    at_once = LANES * BANK_BYTES // max(size, BANK_BYTES)
    groups = threads // at_once
    words = np.arange(max(size // BANK_BYTES, 1))
    word = (address // BANK_BYTES)[:, None] + words
    accesses = np.stack([np.broadcast_to(groups[:, None], word.shape).reshape(-1), word.reshape(-1)], axis=1)
    distinct = np.unique(accesses, axis=0)
    # Words of each bank in each group: the fullest bank sets the cycles.
    _, per_bank = np.unique(distinct[:, 0] * NUM_BANKS + distinct[:, 1] % NUM_BANKS, return_counts=True)
    bank_of = np.unique(distinct[:, 0] * NUM_BANKS + distinct[:, 1] % NUM_BANKS) // NUM_BANKS
    group_ids, first = np.unique(bank_of, return_index=True)
    cycles = np.maximum.reduceat(per_bank, first)
    return int(cycles.sum()), len(group_ids)
