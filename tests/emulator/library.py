"""Builds the CUDA library for the emulator, loads it, and runs ops of it on tensors of the CPU."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import torch_paged.memory.device_reservation
import torch_paged.ops
from tests.emulator.device_memory import DeviceMemory
from tests.emulator.fat_binary import PTX, entries, ptx_of, section
from tests.emulator.findings import Finding
from tests.emulator.launch import Emulator
from tests.emulator.memory import GlobalMemory
from tests.emulator.ptx import Module
from tests.emulator.traffic import Traffic

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "emulated"
NAMESPACE = "paged_emulated"
# Of torch_paged.memory: they launch nothing.
MEMORY_OPS = ("_device_page_bytes", "_reserve_on_device", "_map_pages", "_unmap_pages")
NO_NVCC = "nvcc, which compiles the kernels to PTX, is not on PATH; install the CUDA toolkit's nvcc to run this"

_UINT3 = ctypes.POINTER(ctypes.c_uint * 3)
_Launch = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, _UINT3, _UINT3, ctypes.c_size_t, ctypes.POINTER(ctypes.c_void_p)
)
_Allocation = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)


class Launch(NamedTuple):
    """What a launcher asked for; `parameters` holds the kernel's, as they lie in its parameter space."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    parameters: bytes


@dataclass
class Recording:
    """What ops launched, the bytes of each tensor they allocated, and what happened on which stream.

    Attributes:
        launches: in order.
        allocations: in order, results among them.
        streams: lines such as "current kernel" and "own after current", once the recording is over. "current" is
            torch's stream, "own" one that an op made, "default" the one that no op should use.
    """

    launches: list[Launch] = field(default_factory=list)
    allocations: list[int] = field(default_factory=list)
    streams: list[str] = field(default_factory=list)


def has_nvcc() -> bool:
    return shutil.which("nvcc") is not None


def build() -> Path:
    """Compile what changed of csrc/cuda to PTX and host code; return the library.

    Raises:
        RuntimeError: the compiler failed; the text is what it said.
    """
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(BUILD / "package")]
    environment = os.environ | {"TORCH_PAGED_EMULATED": "1", "TORCH_PAGED_CUDA_ARCHS": "80"}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"the emulated library does not build:\n{ran.stdout}\n{ran.stderr}")
    return BUILD / "package" / "torch_paged" / "_cuda.so"


class EmulatedOps:
    """The ops of one emulated library, as `call(op, *arguments)`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        torch.ops.load_library(str(path))
        self._library = ctypes.CDLL(str(path))
        self._library.emulated_streams.restype = ctypes.c_char_p
        # Kept: C++ holds no reference to them.
        self._callbacks = _Launch(self._launch), _Allocation(self._allocated)
        self._library.emulate_launches(self._callbacks[0])
        self._library.emulate_allocations(self._callbacks[1])
        self.device_memory = DeviceMemory(self._library)
        self._definitions = torch.library.Library(NAMESPACE, "DEF")
        self.names = self._define_ops()
        self._emulators: dict[int, Emulator] = {}
        # The arguments of the call that is running, and what it has allocated.
        self.memory = GlobalMemory()
        self._error: Exception | None = None
        self.num_launches = 0
        self.traffic: Traffic | None = None
        self._recording: Recording | None = None

    def _define_ops(self) -> list[str]:
        """Define the ops of `torch.ops.paged` in the emulator's namespace; return those that the library has."""
        names = [name for name in torch_paged.ops.__all__ if hasattr(torch.ops.paged, name)]
        for name in (*names, *MEMORY_OPS):
            schema = str(getattr(torch.ops.paged, name).default._schema)
            self._definitions.define(schema.replace("paged::", "", 1))
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
        return [name for name in names if has_kernel(f"{NAMESPACE}::{name}", "CPU")]

    @contextmanager
    def counting(self) -> Iterator[Traffic]:
        """Count what the accesses of the ops cost."""
        self.traffic = Traffic()
        try:
            yield self.traffic
        finally:
            self.traffic = None

    @contextmanager
    def recording(self) -> Iterator[Recording]:
        """Write down what the ops do."""
        recording = self._recording = Recording()
        self._library.emulated_streams()
        try:
            yield recording
        finally:
            self._recording = None
            recording.streams += self._library.emulated_streams().decode().splitlines()

    @property
    def kernels(self) -> set[str]:
        """The mangled names of all kernels of the library."""
        modules = [entry.data.decode() for entry in entries(section(self._path, ".nv_fatbin")) if entry.kind == PTX]
        return {name for module in modules for name in Module(module).kernels}

    def call(self, op: str, *arguments: Any, **options: Any) -> Any:
        """Run an op of `torch.ops.paged` by its CUDA kernels.

        Raises:
            Finding: a kernel does something wrong, whatever numbers come out.
            RuntimeError: the op refuses its arguments.
        """
        schema = getattr(torch.ops.paged, op).default._schema
        with self._tensors(schema, arguments, options):
            try:
                result = getattr(getattr(torch.ops, NAMESPACE), op)(*arguments, **options)
            except RuntimeError:
                if self._error is not None:
                    # Not kept: its traceback holds the tensors of the call.
                    error, self._error = self._error, None
                    raise error from None
                raise
            self._check_written(op, result)
            return result

    @contextmanager
    def _tensors(self, schema: Any, arguments: tuple, options: dict[str, Any]) -> Iterator[None]:
        """Make the memory of the op's tensors the global memory of its kernels."""
        names = [argument.name for argument in schema.arguments]
        values = dict(zip(names, arguments, strict=False)) | options
        self._error = None
        for argument in schema.arguments:
            written = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in _tensors_in(values.get(argument.name)):
                storage = tensor.untyped_storage()
                first, size = storage.data_ptr(), storage.nbytes()
                runs = self.device_memory.mapped(first, size)
                for begin, end in [(first, first + size)] if runs is None else runs:
                    self.memory.add(argument.name, begin, end - begin, writable=written)
        try:
            yield
        finally:
            self.memory.clear()

    def _check_written(self, op: str, result: Any) -> None:
        """What an op returns must have been written, every byte."""
        results = {tensor.untyped_storage().data_ptr() for tensor in _tensors_in(result)}
        for buffer in self.memory.buffers:
            if buffer.address in results and buffer.never_written:
                raise Finding(
                    f"{op}: returns {buffer.never_written} of {buffer.size} bytes that nothing was written to"
                )

    def _allocated(self, address: int, size: int, initialised: int) -> None:
        if size == 0:
            return
        if self._recording is not None:
            self._recording.allocations.append(size)
        self.memory.add("a new tensor", address, size, writable=True, initialised=bool(initialised))
        if not initialised:
            # NaN in every floating-point format.
            ctypes.memset(address, 0xFF, size)

    def _launch(self, fat_binary: int, kernel: bytes, grid: Any, block: Any, shared: int, arguments: Any) -> int:
        try:
            emulator = self._emulator(fat_binary)
            emulator.traffic = self.traffic
            program = emulator.program(kernel.decode())
            parameters = bytearray()
            for n, variable in enumerate(program.kernel.parameters):
                parameters += bytes(-len(parameters) % variable.align)
                parameters += ctypes.string_at(arguments[n], variable.size)
            launch = Launch(program.kernel.name, tuple(grid[0]), tuple(block[0]), shared, bytes(parameters))
            if self._recording is not None:
                self._recording.launches.append(launch)
            emulator.launch(*launch)
            self.num_launches += 1
            return 0
        except Exception as error:
            # An exception does not pass through C++: the runtime reports a failed launch, `call` raises this.
            self._error = error
            return 1

    def _emulator(self, fat_binary: int) -> Emulator:
        if fat_binary not in self._emulators:
            self._emulators[fat_binary] = Emulator(Module(ptx_of(fat_binary)), self.memory)
        return self._emulators[fat_binary]


@functools.cache
def emulated_ops() -> EmulatedOps:
    """Build and load the library, once in a process."""
    return EmulatedOps(build())


@contextmanager
def emulated(op: str) -> Iterator[EmulatedOps]:
    """Let `torch.ops.paged.<op>`, and what the tests of an op call beside it, run on the CUDA kernels emulated.

    Ops without a CUDA kernel keep running on the CPU's.
    """
    ops = emulated_ops()
    library = torch.library.Library("paged", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
            for name in ops.names:
                library.impl(name, functools.partial(ops.call, name), "CPU", allow_override=True)
            for name in MEMORY_OPS:
                library.impl(name, getattr(getattr(torch.ops, NAMESPACE), name).default, "CPU")
        yield ops
    finally:
        library._destroy()


def _tensors_in(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value) if isinstance(value, (list, tuple)) else []
