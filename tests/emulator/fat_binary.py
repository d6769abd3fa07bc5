"""Reads fat binaries, which hold a kernel's PTX and its code for several architectures."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PTX, CUBIN = 1, 2
_MAGIC = 0xBA55ED50
# Of an entry's flags.
_COMPRESSED = 0x2000 | 0x8000
_HEADER = struct.Struct("<IHHQ")
_WITHOUT_DATA = 8


@dataclass(frozen=True)
class Entry:
    """One PTX or cubin for an architecture such as 80; compressed data is left as it is."""

    kind: int
    architecture: int
    is_compressed: bool
    data: bytes


@dataclass(frozen=True)
class Section:
    """A named part of an ELF file."""

    name: str
    data: bytes


def ptx_of(address: int) -> str:
    """Return the PTX of the fat binary at an address of this process.

    Raises:
        ValueError: there is none, or it is compressed.
    """
    _, _, header_size, size = _HEADER.unpack(ctypes.string_at(address, _HEADER.size))
    found = [entry for entry in entries(ctypes.string_at(address, header_size + size)) if entry.kind == PTX]
    if len(found) != 1 or found[0].is_compressed:
        raise ValueError("fat binary: must have one PTX; compile with code=compute_80 and --no-compress")
    return found[0].data.decode()


def entries(data: bytes) -> Iterator[Entry]:
    """Yield what the fat binaries hold that lie one after another, as the linker puts those of several objects."""
    begin = 0
    while begin + _HEADER.size <= len(data):
        magic, _, header_size, size = _HEADER.unpack_from(data, begin)
        if magic != _MAGIC:
            # Padding.
            begin += 8
            continue
        position, end = begin + header_size, begin + header_size + size
        while position < end:
            kind, _, header_size, data_size = struct.unpack_from("<HHIQ", data, position)
            (architecture,) = struct.unpack_from("<I", data, position + 28)
            (flags,) = struct.unpack_from("<Q", data, position + 40)
            content = data[position + header_size : position + header_size + data_size]
            is_compressed = bool(flags & _COMPRESSED)
            yield Entry(kind, architecture, is_compressed, content.rstrip(b"\0") if kind == PTX else content)
            position += header_size + data_size
        begin = end


def sections(elf: bytes) -> list[Section]:
    """Return the sections of a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", elf, 40)
    size, count, names_index = struct.unpack_from("<HHH", elf, 58)
    headers = [struct.unpack_from("<IIQQQQIIQQ", elf, table + i * size) for i in range(count)]
    names = elf[headers[names_index][4] :]
    return [
        Section(
            names[name : names.index(b"\0", name)].decode(),
            b"" if kind == _WITHOUT_DATA else elf[offset : offset + length],
        )
        for name, kind, _, _, offset, length, *_ in headers
    ]


def section(path: Path, name: str) -> bytes:
    return b"".join(section.data for section in sections(path.read_bytes()) if section.name == name)
