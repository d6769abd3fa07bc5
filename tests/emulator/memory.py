"""The state spaces: global buffers, shared and local memory, and generic addresses into any of them."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.emulator.findings import Finding
from tests.emulator.program import WINDOWS, Active
from tests.emulator.shadow import ATOMIC, IN_FLIGHT, PLAIN, Shadow

Array = NDArray[Any]
# No access is wider, and none crosses a multiple of it.
LINE = 64


class Buffer:
    """One allocation of global memory, which the process owns; `initialised` tells the bytes that hold something."""

    def __init__(self, name: str, address: int, size: int, writable: bool, initialised: bool) -> None:
        self.name, self.address, self.size, self.writable = name, address, size, writable
        # From a whole line on, so that an aligned access is an element of a view.
        self.first = address // LINE * LINE
        length = -(-(address + size - self.first) // LINE) * LINE
        self.bytes = np.ctypeslib.as_array((ctypes.c_uint8 * length).from_address(self.first))
        self.initialised = None if initialised else np.zeros(length, np.bool_)
        self.shadow: Shadow | None = None

    def begin_launch(self, granule: int) -> None:
        """Forget who accessed the buffer: launches on a stream are ordered."""
        self.shadow = Shadow(len(self.bytes) // granule, granule, self.name, False) if self.writable else None

    @property
    def never_written(self) -> int:
        """The bytes that nothing was ever written to."""
        if self.initialised is None:
            return 0
        begin = self.address - self.first
        return int((~self.initialised[begin : begin + self.size]).sum())


class GlobalMemory:
    """Every access lies inside one buffer, aligned to its size."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self._firsts = np.zeros(0, np.int64)

    def add(self, name: str, address: int, size: int, *, writable: bool, initialised: bool = True) -> Buffer | None:
        """Add a buffer in the place of those whose memory it takes; two views of one memory are one buffer."""
        for known in [b for b in self.buffers if b.address < address + size and address < b.address + b.size]:
            if (known.address, known.size) == (address, size) and initialised:
                known.initialised = None
                known.writable |= writable
                return known
            self.buffers.remove(known)
        if size == 0:
            return None
        buffer = Buffer(name, address, size, writable, initialised)
        self.buffers = sorted([*self.buffers, buffer], key=lambda buffer: buffer.address)
        self._firsts = np.array([buffer.address for buffer in self.buffers], np.int64)
        return buffer

    def add_array(self, name: str, array: Array, *, writable: bool = False, initialised: bool = True) -> Buffer | None:
        return self.add(name, array.ctypes.data, array.nbytes, writable=writable, initialised=initialised)

    def clear(self) -> None:
        self.buffers = []
        self._firsts = np.zeros(0, np.int64)

    def begin_launch(self, granule: int) -> None:
        for buffer in self.buffers:
            buffer.begin_launch(granule)

    def accessed(self, run: Any, kind: str, ix: Active, address: Array, size: int, align: int = 0) -> Iterator[tuple]:
        """Yield each buffer with which of the accesses go there, and their offsets from its first line."""
        align = align or size
        if (address % align).any():
            self._refuse(run, kind, ix, address, address % align != 0, f"misaligned for {align} bytes")
        which = np.searchsorted(self._firsts, address, side="right") - 1
        if (which < 0).any():
            self._refuse(run, kind, ix, address, which < 0, "in no buffer")
        first = int(which.flat[0])
        if (which == first).all():
            yield self._inside(run, kind, ix, address, size, first), slice(None), address - self.buffers[first].first
            return
        for index in np.unique(which):
            chosen = which == index
            threads = run.threads[ix][chosen]
            buffer = self._inside(run, kind, threads, address[chosen], size, int(index))
            yield buffer, chosen, address[chosen] - buffer.first

    def _inside(self, run: Any, kind: str, ix: Active, address: Array, size: int, index: int) -> Buffer:
        buffer = self.buffers[index]
        outside = address + size > buffer.address + buffer.size
        if outside.any():
            self._refuse(
                run, kind, ix, address, outside, f"past the end of {buffer.name} ({buffer.size} bytes)", buffer
            )
        return buffer

    def _refuse(self, run: Any, kind: str, ix: Active, address: Array, bad: Array, what: str, after=None) -> None:
        n = int(np.flatnonzero(bad)[0])
        place = f"byte {int(address[n]) - after.address}" if after else f"address {int(address[n]):#x}"
        raise Finding(f"{run.access(kind, run.stamps(ix)[n])}, {place}: {what}")


class GlobalAccess:
    """Global memory as one group of running blocks sees it."""

    def __init__(self, run: Any, memory: GlobalMemory) -> None:
        self.run, self.memory = run, memory

    def load(self, ix: Active, address: Array, dtype: np.dtype, count: int) -> Array:
        size = dtype.itemsize * count
        self.run.count("global", ix, address, size)
        result = np.empty((len(address), count), dtype)
        for buffer, chosen, offset in self.memory.accessed(self.run, "read", ix, address, size):
            self._check_read(buffer, ix, chosen, offset, size)
            result[chosen] = buffer.bytes.view(dtype).reshape(-1, count)[offset // size]
        return result

    def check_copy(self, ix: Active, address: Array, num_bytes: int, size: int) -> None:
        """An asynchronous copy of so many bytes, aligned to `size`, begins to read here."""
        self.run.count("global", ix, address, num_bytes)
        for buffer, chosen, offset in self.memory.accessed(self.run, "read", ix, address, num_bytes, size):
            self._check_read(buffer, ix, chosen, offset, num_bytes)

    def copied(self, ix: Active, address: Array, num_bytes: int, size: int) -> Array:
        """Return the bytes that an asynchronous copy has read, once it has landed."""
        result = np.empty((len(address), num_bytes), np.uint8)
        for buffer, chosen, offset in self.memory.accessed(self.run, "read", ix, address, num_bytes, size):
            if num_bytes == size:
                result[chosen] = buffer.bytes.reshape(-1, size)[offset // size]
            else:
                result[chosen] = buffer.bytes[offset[:, None] + np.arange(num_bytes)]
        return result

    def store(self, ix: Active, address: Array, values: Array) -> None:
        count = values.shape[1]
        size = values.dtype.itemsize * count
        self.run.count("global", ix, address, size)
        for buffer, chosen, offset in self.memory.accessed(self.run, "write", ix, address, size):
            several = self._check_write(buffer, ix, chosen, offset, size)
            rows = buffer.bytes.view(values.dtype).reshape(-1, count)
            rows[offset // size] = values[chosen]
            if several:
                _check_same(self.run, _some(self.run, ix, chosen), rows[offset // size], values[chosen], buffer.name)

    def update(self, ix: Active, address: Array, dtype: np.dtype) -> Iterator[tuple]:
        """Yield, for an atomic operation, views of the memory as elements with the accesses that go there."""
        for buffer, chosen, offset in self.memory.accessed(self.run, "atomic", ix, address, dtype.itemsize):
            self._check_write(buffer, ix, chosen, offset, dtype.itemsize, atomic=True)
            yield buffer.bytes.view(dtype), chosen, offset // dtype.itemsize

    def _check_read(self, buffer: Buffer, ix: Active, chosen: Active, offset: Array, size: int) -> None:
        if buffer.initialised is not None:
            read = buffer.initialised[offset[:, None] + np.arange(size)]
            if not read.all():
                n = int(np.argwhere(~read)[0][0])
                byte = int(offset[n]) + buffer.first - buffer.address
                who = self.run.access("read", self.run.stamps(ix)[chosen][n])
                raise Finding(f"{who}, byte {byte} of {buffer.name}: uninitialised")
        if buffer.shadow is not None:
            buffer.shadow.on_read(self.run, _some(self.run, ix, chosen), _granules(buffer.shadow, offset, size))

    def _check_write(self, buffer: Buffer, ix: Active, chosen: Active, offset: Array, size: int, atomic=False) -> bool:
        if buffer.shadow is None:
            raise self.run.finding("write", f"{buffer.name} is read-only", ix)
        if buffer.initialised is not None:
            buffer.initialised.reshape(-1, size)[offset // size] = True
        granules, threads = _granules(buffer.shadow, offset, size), _some(self.run, ix, chosen)
        return buffer.shadow.on_write(self.run, threads, granules, ATOMIC if atomic else PLAIN)


class BlockMemory:
    """Memory that each block (shared) or each thread (local) has for itself, addressed from 0."""

    def __init__(self, run: Any, name: str, owners: Array, num_owners: int, size: int, granule: int) -> None:
        self.run, self.name, self.owners, self.size = run, name, owners, size
        # NaN, in every floating-point format, until written.
        self.stride = -(-max(size, 1) // LINE) * LINE
        self.bytes = np.full(num_owners * self.stride, 0xFF, np.uint8)
        self.shadow = Shadow(len(self.bytes) // granule, granule, name, True) if granule else None

    def load(self, ix: Active, address: Array, dtype: np.dtype, count: int) -> Array:
        size = dtype.itemsize * count
        self.run.count(self.name, ix, address, size)
        offset = self._offsets("read", ix, address, size)
        if self.shadow:
            self.shadow.on_read(self.run, ix, _granules(self.shadow, offset, size))
        return self.bytes.view(dtype).reshape(-1, count)[offset // size]

    def store(self, ix: Active, address: Array, values: Array) -> None:
        count = values.shape[1]
        size = values.dtype.itemsize * count
        self.run.count(self.name, ix, address, size)
        offset = self._offsets("write", ix, address, size)
        several = bool(self.shadow) and self.shadow.on_write(self.run, ix, _granules(self.shadow, offset, size))
        rows = self.bytes.view(values.dtype).reshape(-1, count)
        rows[offset // size] = values
        if several:
            _check_same(self.run, ix, rows[offset // size], values, self.name)

    def update(self, ix: Active, address: Array, dtype: np.dtype) -> Iterator[tuple]:
        """Yield, for an atomic operation, a view of the memory as elements with the accesses."""
        offset = self._offsets("atomic", ix, address, dtype.itemsize)
        if self.shadow:
            self.shadow.on_write(self.run, ix, _granules(self.shadow, offset, dtype.itemsize), ATOMIC)
        yield self.bytes.view(dtype), slice(None), offset // dtype.itemsize

    def issue(self, ix: Active, address: Array, size: int) -> None:
        """An asynchronous copy to here begins: nobody may touch its destination until it has landed."""
        self.run.count(self.name, ix, address, size)
        offset = self._offsets("write", ix, address, size)
        if self.shadow.on_write(self.run, ix, _granules(self.shadow, offset, size), IN_FLIGHT):
            raise self.run.finding("write", f"{self.name}: two threads copy to one place at once", ix)

    def land(self, ix: Active, address: Array, values: Array) -> None:
        size = values.shape[1] * values.dtype.itemsize
        offset = self._offsets("write", ix, address, size)
        self.shadow.on_landing(self.run, ix, _granules(self.shadow, offset, size))
        self.bytes.view(values.dtype).reshape(-1, values.shape[1])[offset // size] = values

    def _offsets(self, kind: str, ix: Active, address: Array, size: int) -> Array:
        bad = (address % size != 0) | (address < 0) | (address + size > self.size)
        if bad.any():
            n = int(np.flatnonzero(bad)[0])
            what = f"outside of its {self.size} bytes" if address[n] % size == 0 else f"misaligned for {size} bytes"
            who = self.run.access(kind, self.run.stamps(ix)[n])
            raise Finding(f"{who}, byte {int(address[n])} of {self.name}: {what}")
        return self.owners[ix] * self.stride + address


class ParameterAccess:
    """The arguments of the launch, which every thread may read."""

    def __init__(self, run: Any) -> None:
        self.run = run

    def load(self, ix: Active, address: Array, dtype: np.dtype, count: int) -> Array:
        size = dtype.itemsize * count
        bad = (address < 0) | (address + size > len(self.run.parameters))
        if bad.any():
            raise self.run.finding("read", "past the parameters", ix)
        if (address[0] == address).all():
            return self.run.parameters[address[0] : address[0] + size].view(dtype)[None]
        return self.run.parameters[address[:, None] + np.arange(size)].view(dtype)


class GenericAccess:
    """Addresses of any space, told apart by the window they lie in."""

    def __init__(self, run: Any) -> None:
        self.run = run

    def load(self, ix: Active, address: Array, dtype: np.dtype, count: int) -> Array:
        result = np.empty((len(address), count), dtype)
        for memory, threads, chosen, inside in self._spaces(ix, address):
            result[chosen] = memory.load(threads, inside, dtype, count)
        return result

    def store(self, ix: Active, address: Array, values: Array) -> None:
        for memory, threads, chosen, inside in self._spaces(ix, address):
            memory.store(threads, inside, values[chosen])

    def update(self, ix: Active, address: Array, dtype: np.dtype) -> Iterator[tuple]:
        for memory, threads, chosen, inside in self._spaces(ix, address):
            for elements, some, index in memory.update(threads, inside, dtype):
                yield elements, np.arange(len(address))[chosen][some], index

    def _spaces(self, ix: Active, address: Array) -> Iterator[tuple]:
        for space, low, high in zip(WINDOWS, WINDOWS.values(), [*WINDOWS.values()][1:] + [None], strict=True):
            chosen = address >= low if high is None else (address >= low) & (address < high)
            if chosen.all():
                yield self.run.space(space), ix, slice(None), address - low
            elif chosen.any():
                yield self.run.space(space), self.run.threads[ix][chosen], chosen, address[chosen] - low


def _check_same(run: Any, ix: Active, stored: Array, values: Array, name: str) -> None:
    """Several threads wrote one place by one instruction: no harm where they wrote the same."""
    overwritten = (stored != values).any(1)
    if overwritten.any():
        who = run.access("write", run.stamps(ix)[overwritten][0])
        raise Finding(f"{who} of {name}: another thread writes another value at once")


def _some(run: Any, ix: Active, chosen: Active) -> Active:
    return ix if isinstance(chosen, slice) else run.threads[ix][chosen]


def _granules(shadow: Shadow, offset: Array, size: int) -> Array:
    return (offset // shadow.granule)[:, None] + np.arange(-(-size // shadow.granule))
