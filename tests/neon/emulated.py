"""The ops as another machine's kernels compute them, in a process that qemu runs: bytes of tensors there and back."""

from __future__ import annotations

import struct
import subprocess
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

NONE, INTEGER, REAL, TENSOR, TENSORS, STRING = range(6)
# c10::ScalarType's numbers.
DTYPES = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64]
DTYPES = dict(enumerate(DTYPES)) | {10: torch.complex128, 11: torch.bool, 15: torch.bfloat16}
NUMBERS = {dtype: number for number, dtype in DTYPES.items()}


class Emulated:
    """Runs ops of the `paged` library in a process that speaks serve.cpp's protocol."""

    def __init__(self, command: Sequence[str]) -> None:
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.num_calls = 0

    def replace_kernels(self) -> torch.library.Library:
        """Serve each op in place of its CPU kernel, as long as what is returned lives."""
        library = torch.library.Library("paged", "IMPL")
        for name in torch._C._dispatch_get_all_op_names():
            namespace, _, op = name.partition("::")
            if namespace != "paged" or op.startswith("_"):
                continue
            schema = getattr(torch.ops.paged, op).default._schema
            key = "CPU" if schema.arguments else "CompositeExplicitAutograd"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that a kernel is replaced
                library.impl(op, partial(self.call, schema), key)
        return library

    def call(self, schema: Any, *given: Any, **named: Any) -> Any:
        """Run one op, leaving in the arguments' memory what its kernel leaves there.

        Raises:
            RuntimeError: the kernel's own error.
        """
        self.num_calls += 1
        rest = schema.arguments[len(given) :]
        values = [*given, *(named.get(argument.name, argument.default_value) for argument in rest)]
        memories = list(_memories(values))
        index_of = {memory.data_ptr(): index for index, memory in enumerate(memories)}
        outputs = [STRING if str(returned.type) == "str" else TENSOR for returned in schema.returns]
        message = [
            _blob(schema.name.removeprefix("paged::").encode()),
            _numbers(torch.get_num_threads(), len(memories)),
        ]
        message += [_blob(memory.numpy().tobytes()) for memory in memories]
        message.append(_numbers(len(values)))
        for value, argument in zip(values, schema.arguments, strict=True):
            message.append(_argument(value, str(argument.type).startswith("Optional"), index_of))
        message.append(_numbers(len(outputs), *outputs))
        self.process.stdin.write(b"".join(message))
        self.process.stdin.flush()
        if not self._number():
            raise RuntimeError(self._blob().decode())
        for memory in memories:
            memory.copy_(torch.frombuffer(self._blob() or bytearray(1), dtype=torch.uint8)[: len(memory)])
        results = [self._blob().decode() if kind == STRING else self._tensor() for kind in outputs]
        return results[0] if len(results) == 1 else tuple(results) or None

    def _tensor(self) -> Tensor:
        dtype, sizes, data = DTYPES[self._number()], self._blob(), self._blob()
        shape = struct.unpack(f"<{len(sizes) // 8}q", sizes)
        return torch.frombuffer(data, dtype=dtype).view(shape) if data else torch.empty(shape, dtype=dtype)

    def _blob(self) -> bytearray:
        return bytearray(self._read(self._number()))

    def _number(self) -> int:
        return int(struct.unpack("<q", self._read(8))[0])

    def _read(self, count: int) -> bytes:
        data = self.process.stdout.read(count)
        if len(data) < count:
            raise ConnectionError(f"the emulated process ended with status {self.process.wait()}")
        return bytes(data)


def _tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else value if isinstance(value, list) else []


def _memories(values: list[Any]) -> Iterator[Tensor]:
    """Yield the whole memory, as bytes, that the tensors view: once where several view it."""
    seen = set()
    for tensor in (tensor for value in values for tensor in _tensors(value)):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            yield torch.empty(0, dtype=torch.uint8).set_(storage)


def _argument(value: Any, is_optional: bool, index_of: dict[int, int]) -> bytes:
    if value is None:
        return _numbers(is_optional, NONE)
    if isinstance(value, Tensor):
        return _numbers(is_optional, TENSOR) + _tensor(value, index_of)
    if isinstance(value, list):
        items = b"".join(_tensor(tensor, index_of) for tensor in value)
        return _numbers(is_optional, TENSORS, len(value)) + items
    if isinstance(value, str):
        return _numbers(is_optional, STRING) + _blob(value.encode())
    if isinstance(value, float):
        return _numbers(is_optional, REAL) + struct.pack("<d", value)
    return _numbers(is_optional, INTEGER, int(value))


def _tensor(tensor: Tensor, index_of: dict[int, int]) -> bytes:
    index = index_of[tensor.untyped_storage().data_ptr()]
    offset, dim = tensor.storage_offset(), tensor.dim()
    return _numbers(NUMBERS[tensor.dtype], index, offset, dim, *tensor.shape, *tensor.stride())


def _blob(data: bytes) -> bytes:
    return _numbers(len(data)) + data


def _numbers(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}q", *numbers)
