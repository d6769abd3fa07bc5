"""The blocks that run side by side: their registers, memories, clocks, and who waits where."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.emulator.async_copy import Copy
from tests.emulator.findings import Finding
from tests.emulator.memory import BlockMemory, GenericAccess, GlobalAccess, GlobalMemory, ParameterAccess
from tests.emulator.program import Active, Program
from tests.emulator.ptx import Unsupported
from tests.emulator.shadow import (
    BLOCK_BITS,
    BLOCK_SHIFT,
    CLOCK,
    POSITION_BITS,
    POSITION_SHIFT,
    THREAD_SHIFT,
    block_of,
    thread_of,
)
from tests.emulator.warp import LANES

Dim = tuple[int, int, int]


class Blocks:
    """State of `num_blocks` blocks of a grid, from the block `first_block` on; one array element per thread."""

    def __init__(
        self,
        program: Program,
        memory: GlobalMemory,
        grid: Dim,
        block: Dim,
        dynamic_shared: int,
        parameters: NDArray[np.uint8],
        first_block: int,
        num_blocks: int,
        traffic: Any = None,
    ) -> None:
        self.program, self.memory, self.grid, self.block = program, memory, grid, block
        self.parameters, self.first_block, self.num_blocks, self.traffic = parameters, first_block, num_blocks, traffic
        self.threads_per_block = int(np.prod(block))
        if self.threads_per_block % LANES:
            raise Unsupported(
                f"{program.kernel.name}: block of {self.threads_per_block} threads, no multiple of {LANES}"
            )
        if first_block + num_blocks >= 1 << BLOCK_BITS or len(program.kernel.instructions) >= 1 << POSITION_BITS:
            raise Unsupported(f"{program.kernel.name}: more blocks or instructions than a stamp has bits for")
        self.threads = np.arange(num_blocks * self.threads_per_block)
        self.local_block = self.threads // self.threads_per_block
        self.warps_per_block = self.threads_per_block // LANES
        self.position = 0
        self.steps = 0
        self.v = self._registers()
        self.copies: list[Copy] = []
        self.commits = np.zeros(len(self.threads), np.int64)
        self._begin_clocks()
        size = program.static_shared + dynamic_shared
        shared = BlockMemory(self, "shared", self.local_block, num_blocks, size, program.granules["shared"])
        local = BlockMemory(self, "local", self.threads, len(self.threads), program.local_bytes, 0)
        self._spaces = {
            "global": GlobalAccess(self, memory),
            "param": ParameterAccess(self),
            "shared": shared,
            "local": local,
            "generic": GenericAccess(self),
        }

    def space(self, name: str) -> Any:
        return self._spaces[name]

    # Clocks: an access of a warp is ordered before what another warp does once that one has seen a later clock.

    def _begin_clocks(self) -> None:
        shape = (self.num_blocks, self.warps_per_block)
        self.clocks = np.ones(shape, np.int64)
        # known[block, warp, other]: accesses of `other` before this clock happened before what `warp` does now.
        self.known = np.zeros((*shape, self.warps_per_block), np.int64)
        self.known[:, range(shape[1]), range(shape[1])] = 1
        block = (self.local_block + self.first_block) << BLOCK_SHIFT
        self._owner = block | (self.threads % self.threads_per_block) << THREAD_SHIFT
        self._stamps = self._owner | 1
        # By thread: what happened in its block before this clock, every warp of the block has seen.
        self._settled = np.zeros(len(self.threads), np.int64)

    def stamps(self, ix: Active) -> NDArray[np.int64]:
        return self._stamps[ix] | self.position << POSITION_SHIFT

    def settled(self, ix: Active) -> NDArray[np.int64]:
        return self._settled[ix]

    def known_clock(self, block: Any, warp: Any, other: Any) -> NDArray[np.int64]:
        return self.known[block - self.first_block, warp, other]

    def join(self, block: int, warps: NDArray[np.int64]) -> None:
        """These warps of a block have met: each sees all that the others did."""
        met = self.known[block, warps].max(0)
        self.clocks[block, warps] += 1
        met[warps] = self.clocks[block, warps]
        self.known[block, warps] = met
        self._restamp()

    def join_lanes(self, warps: NDArray[np.int64]) -> None:
        """The lanes of each of these warps, counted through all blocks, have met."""
        block, warp = warps // self.warps_per_block, warps % self.warps_per_block
        self.clocks[block, warp] += 1
        self.known[block, warp, warp] = self.clocks[block, warp]
        self._restamp()

    def _restamp(self) -> None:
        if self.clocks.max() > CLOCK:
            raise Unsupported(f"{self.program.kernel.name}: more barriers than a stamp has bits for")
        self._settled = np.repeat(self.known.min((1, 2)), self.threads_per_block)
        self._stamps = self._owner | np.repeat(self.clocks.reshape(-1), LANES)

    # Warps.

    def warp_rows(self, ix: Active) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the warps of these threads, and for each thread the place of its warp among them."""
        return np.unique(self.threads[ix] // LANES, return_inverse=True)

    def check_whole_warps(self, ix: Active) -> None:
        threads = self.threads[ix]
        if (
            len(threads) % LANES
            or (threads[::LANES] % LANES).any()
            or (threads[LANES - 1 :: LANES] % LANES != 31).any()
        ):
            raise self.finding("warp instruction", "executed by part of a warp", ix)

    def check_takes_part(self, ix: Active, sources: NDArray[np.int64]) -> None:
        if isinstance(ix, slice):
            return
        takes_part = np.zeros(len(self.threads), np.bool_)
        takes_part[ix] = True
        if not takes_part[sources].all():
            raise self.finding("shuffle", "reads a lane that does not take part", ix)

    # Reports.

    def access(self, kind: str, stamp: np.int64) -> str:
        """Say who does what where: `write at file:line, block 0 thread 1`."""
        who = f"block {int(block_of(stamp))} thread {int(thread_of(stamp))}"
        return f"{kind} at {self.program.where(self.position)}, {who}"

    def finding(self, kind: str, what: str, ix: Active) -> Finding:
        return Finding(f"{self.access(kind, self.stamps(ix)[0])}: {what}")

    def byte_of(self, shadow: Any, byte: int) -> int:
        """Return the address inside one block's memory, or inside the buffer, that a shadow's byte stands for."""
        for memory in (self._spaces["shared"], self._spaces["local"]):
            if memory.shadow is shadow:
                return byte % memory.stride
        (buffer,) = (b for b in self.memory.buffers if b.shadow is shadow)
        return byte + buffer.first - buffer.address

    def count(self, space: str, ix: Active, address: NDArray[np.int64], size: int) -> None:
        if self.traffic is not None:
            self.traffic.add(self, space, self.threads[ix], address, size)

    # Registers.

    def _registers(self) -> list[NDArray[Any]]:
        """Return what each slot of the program stands for; registers hold ones in all bits until written."""
        n = len(self.threads)
        banks = {number: np.full(n * size, 0xFF, np.uint8) for number, size in self.program.banks.items()}
        self._special = self._special_registers()
        self._banks = banks
        views: list[NDArray[Any]] = []
        self.v = views
        self.extend_registers()
        return views

    def extend_registers(self) -> None:
        """Make the views of slots that steps compiled in the meantime use."""
        for key in list(self.program.slots)[len(self.v) :]:
            self.v.append(self._view(*key))

    def _view(self, kind: str, *what: Any) -> NDArray[Any]:
        n = len(self.threads)
        if kind == "register":
            number, own, dtype = what
            view = self._banks[number].view(np.bool_ if own == np.bool_ else dtype)
            # Of a wider register, the low part.
            return view if own == np.bool_ else view[:: own.itemsize // dtype.itemsize]
        if kind == "special":
            name, dtype = what
            if name not in self._special:
                raise Unsupported(f"special register {name}")
            return np.broadcast_to(self._special[name], n).astype(dtype)
        if kind == "sink":
            return np.empty(n, what[0])
        value, dtype = what
        return np.broadcast_to(np.frombuffer(value, dtype), n)

    def _special_registers(self) -> dict[str, Any]:
        thread = self.threads % self.threads_per_block
        block = self.threads // self.threads_per_block + self.first_block
        special: dict[str, Any] = {
            "%laneid": thread % LANES,
            "%warpid": thread // LANES,
            "%nwarpid": self.warps_per_block,
        }
        lane = (thread % LANES).astype(np.uint32)
        bit = np.uint32(1) << lane
        special |= {"%lanemask_eq": bit, "%lanemask_lt": bit - np.uint32(1), "%lanemask_le": bit | (bit - np.uint32(1))}
        special |= {"%lanemask_ge": ~(bit - np.uint32(1)), "%lanemask_gt": ~(bit | (bit - np.uint32(1)))}
        for axis, name in enumerate("xyz"):
            below_threads, below_blocks = int(np.prod(self.block[:axis])), int(np.prod(self.grid[:axis]))
            special[f"%tid.{name}"] = thread // below_threads % self.block[axis]
            special[f"%ctaid.{name}"] = block // below_blocks % self.grid[axis]
            special[f"%ntid.{name}"] = self.block[axis]
            special[f"%nctaid.{name}"] = self.grid[axis]
        return special
