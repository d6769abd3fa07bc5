"""Launches kernels of a module on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.emulator import arithmetic, async_copy, atomics, bits, compare, convert, moves, tensor_core, warp
from tests.emulator.blocks import Blocks, Dim
from tests.emulator.memory import GlobalMemory
from tests.emulator.program import Program
from tests.emulator.ptx import Module
from tests.emulator.scheduler import Scheduler

# Importing them registers the instructions.
INSTRUCTIONS = (arithmetic, async_copy, atomics, bits, compare, convert, moves, tensor_core, warp)
# Threads that run side by side: more of them are faster, and take more memory.
THREADS_AT_ONCE = 4096


class Emulator:
    """Compiled kernels and the global memory they work on."""

    def __init__(self, module: Module, memory: GlobalMemory | None = None, traffic: Any = None) -> None:
        self.module, self.traffic = module, traffic
        self.memory = memory or GlobalMemory()
        self._programs: dict[str, Program] = {}

    def program(self, name: str) -> Program:
        if name not in self._programs:
            self._programs[name] = Program(self.module.kernel(name))
        return self._programs[name]

    def launch(self, name: str, grid: Dim, block: Dim, dynamic_shared: int, parameters: bytes) -> int:
        """Run a grid to its end; return the number of steps.

        Raises:
            Finding: something is wrong with the kernel.
            Unsupported: it needs what the emulator does not model.
        """
        program = self.program(name)
        self.memory.begin_launch(program.granules["global"])
        num_blocks, threads_per_block = int(np.prod(grid)), int(np.prod(block))
        at_once = max(1, THREADS_AT_ONCE // threads_per_block)
        arguments = np.frombuffer(parameters, np.uint8)
        steps = 0
        with np.errstate(all="ignore"):
            for first in range(0, num_blocks, at_once):
                count = min(at_once, num_blocks - first)
                blocks = Blocks(
                    program, self.memory, grid, block, dynamic_shared, arguments, first, count, self.traffic
                )
                Scheduler(blocks).run()
                steps += blocks.steps
        return steps
