"""The memory of the emulated device, as the stand-in for the CUDA driver keeps it."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

PAGE = 2 << 20
UNLIMITED = 2**62


def collect_garbage() -> None:
    """Finalizers of what one run finds let go of more, which those may hold that the next one finds."""
    for _ in range(3):
        gc.collect()


class Held(NamedTuple):
    """Bytes of address space, of it with memory, and of memory."""

    reserved: int
    mapped: int
    created: int


class DeviceMemory:
    """The device's virtual memory, in one library; `page` 0 is a device without."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.emulated_driver_misuse.restype = ctypes.c_char_p
        library.emulated_driver_function.restype = ctypes.c_void_p

    @property
    def held(self) -> Held:
        values = [ctypes.c_int64() for _ in Held._fields]
        self._library.emulated_driver_state(*map(ctypes.byref, values))
        return Held(*(value.value for value in values))

    @property
    def misuse(self) -> str:
        """What was first done wrong since this was last asked."""
        return self._library.emulated_driver_misuse().decode()

    def set(self, page: int = PAGE, memory: int = UNLIMITED) -> None:
        """Choose the size of a page and the bytes left on the device; nothing may be reserved when pages change."""
        self._library.emulate_driver(ctypes.c_int64(page), ctypes.c_int64(memory))

    def mapped(self, address: int, size: int) -> list[tuple[int, int]] | None:
        """Runs [first, end) of a reservation's addresses that have memory; None where it is no reservation."""
        if not self._library.is_reservation(ctypes.c_uint64(address)):
            return None
        runs, at, end = [], address, ctypes.c_uint64()
        first = ctypes.c_uint64()
        while at < address + size and self._library.next_mapped(
            ctypes.c_uint64(at), ctypes.byref(first), ctypes.byref(end)
        ):
            if first.value >= address + size:
                break
            runs.append((first.value, min(end.value, address + size)))
            at = end.value
        return runs

    def call(self, name: str, *arguments: object) -> int:
        """Call a function of the driver; return its error, 0 where there is none."""
        function = ctypes.CFUNCTYPE(ctypes.c_int)(self._library.emulated_driver_function(name.encode()))
        return function(*arguments)

    def launch(self) -> None:
        """Put work on a stream that the host does not wait for."""
        self._library.emulate_work()

    def wait(self) -> None:
        """Wait for all work."""
        self._library.emulate_waiting()

    @contextmanager
    def device(self, page: int = PAGE, memory: int = UNLIMITED) -> Iterator[DeviceMemory]:
        """A device of its own: at the end nothing of it may be held, and nothing done wrong."""
        collect_garbage()
        before = self.held
        self.set(page, memory)
        assert self.misuse == ""
        try:
            yield self
            collect_garbage()
            held, misuse = self.held, self.misuse
            assert (held, misuse) == (before, ""), f"{held}, {before} before; {misuse}"
        finally:
            self.set()
