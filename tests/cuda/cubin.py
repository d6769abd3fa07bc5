"""Reads what a CUDA library holds for each architecture: registers, stack and opcodes, kernel by kernel."""

from __future__ import annotations

import re
import struct
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from tests.emulator.fat_binary import CUBIN, Section, entries, section, sections

# From compute capability 7.0 on an instruction is 16 bytes, its opcode the lowest 12 bits. Compared with nvdisasm.
OPCODES = {
    0x23C: "HMMA",
    0xFAE: "LDGSTS",
    0x83B: "LDSM",
    0x387: "STL",
    0x983: "LDL",
    0x981: "LDG",
    0x986: "STG",
    0x984: "LDS",
    0x388: "STS",
    0xB1D: "BAR",
    0xF89: "SHFL",
}
# Attributes of a function in .nv.info, and the format of records that carry their size.
_REGISTERS, _FRAME_SIZE, _SIZED = 0x2F, 0x11, 4
# In .nv.info of the function itself, with the sizes that __launch_bounds__ gives it.
_MAX_THREADS = 0x05
_SYMBOL_BYTES = 24


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel for one architecture; `name` is demangled, without its parameters."""

    architecture: str
    name: str
    registers: int
    # Bytes of local memory a thread: what is spilled, and arrays that registers cannot hold.
    stack: int
    opcodes: Counter[str]
    # Of a block, as __launch_bounds__ says; 0 without.
    threads: int = 0


def compiled_kernels(library: Path) -> list[CompiledKernel]:
    """Return the kernels of a shared library or object that nvcc made, of every architecture in it."""
    cubins = [entry for entry in entries(section(library, ".nv_fatbin")) if entry.kind == CUBIN]
    if any(entry.is_compressed for entry in cubins):
        raise ValueError(f"{library}: compressed cubins; must be stored as they are")
    found = [kernel for entry in cubins for kernel in _cubin(str(entry.architecture), entry.data)]
    names = subprocess.run(
        ["c++filt"], input="\n".join(k.name for k in found), capture_output=True, text=True, check=True
    )
    return [replace(k, name=short_name(name)) for k, name in zip(found, names.stdout.splitlines(), strict=True)]


def _cubin(architecture: str, elf: bytes) -> Iterator[CompiledKernel]:
    by_name = {section.name: section for section in sections(elf)}
    if ".nv.info" not in by_name:
        # A source without a kernel.
        return
    registers = _attribute(by_name, _REGISTERS)
    stack = _attribute(by_name, _FRAME_SIZE)
    for name, count in registers.items():
        if f".text.{name}" in by_name:
            code = by_name[f".text.{name}"].data
            words = (struct.unpack_from("<H", code, position)[0] & 0xFFF for position in range(0, len(code), 16))
            opcodes = Counter(OPCODES[word] for word in words if word in OPCODES)
            threads = _max_threads(by_name[f".nv.info.{name}"].data)
            yield CompiledKernel(architecture, name, count, stack[name], opcodes, threads)


def _attribute(by_name: dict[str, Section], wanted: int) -> dict[str, int]:
    """Return what `.nv.info` says of each function: records of format, attribute, size, symbol and value."""
    symbols, names = by_name[".symtab"].data, by_name[".strtab"].data
    found = {}
    for attribute, value in _sized_records(by_name[".nv.info"].data):
        if attribute == wanted:
            symbol, number = struct.unpack("<II", value)
            (name,) = struct.unpack_from("<I", symbols, symbol * _SYMBOL_BYTES)
            found[names[name : names.index(b"\0", name)].decode()] = number
    return found


def _max_threads(info: bytes) -> int:
    sizes = [struct.unpack("<III", value) for attribute, value in _sized_records(info) if attribute == _MAX_THREADS]
    return prod(sizes[0]) if sizes else 0


def _sized_records(info: bytes) -> Iterator[tuple[int, bytes]]:
    position = 0
    while position < len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, position)
        if form == _SIZED:
            yield attribute, info[position + 4 : position + 4 + size]
        position += 4 + (size if form == _SIZED else 0)


def short_name(name: str) -> str:
    """Return a demangled kernel without its return type, namespaces and parameters."""
    name = re.sub(r"\(anonymous namespace\)::|\bpaged::|\bcuda::", "", name.removeprefix("void "))
    depth = 0
    for position, char in enumerate(name):
        depth += (char == "<") - (char == ">")
        if char == "(" and depth == 0:
            return name[:position]
    return name
