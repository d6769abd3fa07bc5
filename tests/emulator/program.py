"""Turns a kernel into steps: functions over the registers of all threads at once."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.emulator.liveness import physical_registers
from tests.emulator.ptx import BYTES, NAME, Instruction, Kernel, Unsupported, split

# The active threads: a slice where they are neighbours, else their indices.
Active = Any
# A step takes the running blocks and the active threads.
Step = Callable[[Any, Active], None]

DTYPES = {
    "pred": np.dtype(np.bool_),
    **{f"{kind}{bits}": np.dtype(f"u{bits // 8}") for kind in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{"f32": np.dtype(np.float32), "f64": np.dtype(np.float64)},
    # Half precision has no arithmetic here: formats.py decodes the bits.
    **dict.fromkeys(["f16", "bf16"], np.dtype(np.uint16)),
    **dict.fromkeys(["f16x2", "bf16x2", "tf32"], np.dtype(np.uint32)),
}
# Where the spaces lie among generic addresses; no CPU address, of global memory, is as large.
WINDOWS = {"global": 0, "param": 1 << 60, "shared": 1 << 61, "local": 1 << 62}
_NUMBER = re.compile(r"-?(0[xX][0-9a-fA-F]+|\d+)U?")

_COMPILERS: dict[str, Callable[[Instruction, Program], Step]] = {}


def instruction(*opcodes: str):
    """Register the decorated function as what compiles these opcodes."""

    def register(compiler: Callable[[Instruction, Program], Step]):
        _COMPILERS.update(dict.fromkeys(opcodes, compiler))
        return compiler

    return register


def allow(i: Instruction, *known: str) -> None:
    """Refuse a modifier that the caller does not know: an instruction is modelled whole or not at all."""
    for modifier in i.modifiers[:-1] if i.type in BYTES else i.modifiers:
        if modifier not in known:
            raise Unsupported(f"{i} ({modifier})")


class Program:
    """A kernel's steps, and what each slot of the register file holds.

    A slot is one view of a physical register as some type, a constant, or a special register.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.physical = physical_registers(kernel) if kernel.instructions else {}
        self.banks = {n: DTYPES[kernel.registers[name]].itemsize for name, n in self.physical.items()}
        self.slots: dict[tuple, int] = {}
        self.shared_offsets, self.static_shared, self.dynamic_align = self._shared_variables()
        self.local_offsets, self.local_bytes = self._local_variables()
        self.granules = {space: self._granule(space) for space in ("shared", "global")}
        self._steps: dict[int, Step] = {}

    def step(self, position: int) -> Step:
        """Return the step of an instruction; compiled when first reached, so that code nobody runs may be anything."""
        if position not in self._steps:
            i = self.kernel.instructions[position]
            if i.opcode not in _COMPILERS:
                raise Unsupported(f"{i}{self.where(position, ' at ')}")
            try:
                self._steps[position] = _COMPILERS[i.opcode](i, self)
            except Unsupported as error:
                raise Unsupported(f"{error}{self.where(position, ' at ')}") from None
        return self._steps[position]

    def where(self, position: int, before: str = "") -> str:
        """Return `file:line` of an instruction: of the kernel's own source, not of a header of wrappers."""
        locations = self.kernel.instructions[position].locations
        for file, line in locations:
            if line and not re.search(r"^ptx\.cuh$|\.hpp$|^cuda_", file):
                return f"{before}{file}:{line}"
        return f"{before}{locations[0][0]}:{locations[0][1]}" if locations else f"{before}instruction {position}"

    def source(self, operand: str, type: str) -> int:
        """Return the slot to read an operand from, as `type`."""
        dtype = DTYPES[type]
        if operand in self.kernel.registers:
            return self._slot("register", self._number(operand), self._register_dtype(operand), dtype)
        if operand.startswith("%"):
            return self._slot("special", operand, dtype)
        return self._slot("constant", self.constant(operand, dtype).tobytes(), dtype)

    def target(self, operand: str, type: str) -> int:
        """Return the slot to write a result of `type` to; a wider register is extended as the type's sign says."""
        dtype = DTYPES[type]
        if operand == "_":
            return self._slot("sink", dtype)
        if operand not in self.kernel.registers:
            raise Unsupported(f"result {operand}")
        size = self._register_dtype(operand).itemsize
        if size != dtype.itemsize:
            dtype = np.dtype(f"{'i' if dtype.kind == 'i' else 'u'}{size}")
        return self._slot("register", self._number(operand), self._register_dtype(operand), dtype)

    def sources(self, operand: str, type: str) -> list[int]:
        """Return the slots of a vector operand `{a, b, ...}` or of a scalar."""
        return [self.source(part, type) for part in vector(operand)]

    def targets(self, operand: str, type: str) -> list[int]:
        return [self.target(part, type) for part in vector(operand)]

    def address(self, operand: str) -> tuple[int, int]:
        """Return the slot and the constant offset of `[base + offset]`."""
        match = re.fullmatch(r"\[\s*([%\w$.@#]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand)
        if match is None:
            raise Unsupported(f"address {operand}")
        base, offset = match[1], int(match[2] or "0", 0)
        size = self._register_dtype(base).itemsize if base in self.kernel.registers else 8
        return self.source(base, f"u{8 * size}"), offset

    def constant(self, operand: str, dtype: np.dtype) -> np.ndarray:
        """Return a literal, or the address of a variable, as an array of one element."""
        if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", operand):
            return (
                np.array([struct.unpack("<f", struct.pack("<I", int(match[1], 16)))[0]], np.float32).astype(dtype)
                if dtype.kind == "f"
                else np.array([int(match[1], 16)], np.uint32).astype(dtype)
            )
        if match := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", operand):
            value = np.array([int(match[1], 16)], np.uint64)
            return value.view(np.float64).astype(dtype) if dtype.kind == "f" else value.astype(dtype)
        if _NUMBER.fullmatch(operand):
            value = int(operand.rstrip("U"), 0)
            if dtype.kind == "f":
                return np.array([value], dtype)
            if dtype.kind == "b":
                return np.array([bool(value)])
            return np.array([value & ((1 << 8 * dtype.itemsize) - 1)], f"u{dtype.itemsize}").view(dtype)
        if operand == "WARP_SZ":
            return np.array([32], dtype)
        for offsets in (self.shared_offsets, self.local_offsets, self.kernel.parameter_offsets):
            if operand in offsets:
                return np.array([offsets[operand]], dtype)
        raise Unsupported(f"operand {operand}")

    def _slot(self, *key: Any) -> int:
        return self.slots.setdefault(key, len(self.slots))

    def _number(self, register: str) -> int:
        # A register that no instruction reaches has no number; the code that names it never runs.
        return self.physical[register]

    def _register_dtype(self, register: str) -> np.dtype:
        return DTYPES[self.kernel.registers[register]]

    def _shared_variables(self) -> tuple[dict[str, int], int, int]:
        text = " ".join(operand for i in self.kernel.instructions for operand in i.operands)
        used = set(NAME.findall(text))
        shared = [v for v in self.kernel.variables.values() if v.space == "shared" and v.name in used]
        offsets, end = {}, 0
        for variable in (v for v in shared if v.size):
            end = -(-end // variable.align) * variable.align
            offsets[variable.name] = end
            end += variable.size
        align = max([v.align for v in shared if not v.size], default=1)
        end = -(-end // align) * align
        return offsets | {v.name: end for v in shared if not v.size}, end, align

    def _local_variables(self) -> tuple[dict[str, int], int]:
        offsets, end = {}, 0
        for variable in (v for v in self.kernel.variables.values() if v.space == "local"):
            end = -(-end // variable.align) * variable.align
            offsets[variable.name] = end
            end += variable.size
        return offsets, -(-end // 16) * 16

    def _granule(self, space: str) -> int:
        """Return the size of the smallest access to a space: no two accesses meet within so many bytes."""
        sizes = [16]
        for i in self.kernel.instructions:
            spaces = {modifier.partition("::")[0] for modifier in i.modifiers}
            if i.opcode in ("ld", "st", "ldu", "atom", "red") and not {"param", "local", "const"} & spaces:
                # A generic address may be of any space.
                if space in spaces or not {"shared", "global"} & spaces:
                    sizes.append(BYTES[i.type])
            elif i.opcode == "cp" and "async" in spaces and len(i.operands) >= 3:
                sizes.append(int(i.operands[2], 0))
        return min(sizes)


def vector(operand: str) -> tuple[str, ...]:
    return split(operand[1:-1]) if operand.startswith("{") else (operand,)
