"""Finds the PTX in a fat binary, the way a CUDA driver would: by walking its entries in memory."""

from __future__ import annotations

import ctypes
import struct

_MAGIC = 0xBA55ED50
_PTX = 1
# Of an entry's flags: the payload is compressed.
_COMPRESSED = 0x2000 | 0x8000


def ptx_of(address: int) -> str:
    """Return the PTX of the fat binary at an address of this process.

    Raises:
        ValueError: there is none, or it is compressed.
    """
    magic, _, header_size, size = struct.unpack("<IHHQ", ctypes.string_at(address, 16))
    if magic != _MAGIC:
        raise ValueError(f"fat binary: magic {magic:#x}; must be {_MAGIC:#x}")
    entries = ctypes.string_at(address + header_size, size)
    position = 0
    while position < len(entries):
        kind, _, header_size, payload_size = struct.unpack_from("<HHIQ", entries, position)
        (flags,) = struct.unpack_from("<Q", entries, position + 40)
        if kind == _PTX:
            if flags & _COMPRESSED:
                raise ValueError("fat binary: compressed PTX; must be compiled with --no-compress")
            begin = position + header_size
            return entries[begin : begin + payload_size].rstrip(b"\0").decode()
        position += header_size + payload_size
    raise ValueError("fat binary: no PTX; must be compiled with code=compute_80")
