"""GPUs that are none: tensors that say they are on `cuda:0` or `cuda:1` and lie on the CPU.

What mixes them with tensors of another device, or reads them as if they were the CPU's, fails as on a GPU. Kernels are
the CPU's.
"""

from __future__ import annotations

import functools
import os
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

HERE = Path(__file__).parent
BUILD = HERE.parent / "build"
# Take tensors of both devices.
COPIES = {"aten::_to_copy", "aten::copy_", "paged::swap_blocks"}
# Their indices, behind the tensor, may be on the CPU, from where a GPU fetches them.
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}


class GpuTensor(Tensor):
    """A tensor that says it is on the GPU; `host` has what is in it."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor, device: torch.device) -> GpuTensor:
        made = Tensor._make_wrapper_subclass(
            cls, host.shape, strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype,
            device=device, requires_grad=host.requires_grad,
        )  # fmt: skip
        made.host = host
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(op, args, kwargs or {})

    def __repr__(self) -> str:
        return f"GpuTensor({self.host})"

    def tolist(self) -> Any:
        return self.cpu().tolist()


class _PretendGpu(TorchDispatchMode):
    """Makes `device="cuda"` a place where tensors can be made."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(op, args, kwargs or {})


class _Event:
    """Of work that is done as soon as it is asked for."""

    def __init__(self, device: Any = None) -> None: ...
    def record(self) -> None: ...
    def synchronize(self) -> None: ...


class _Generator(torch.Generator):
    """Of the CPU, whatever device is named: the draws are made there."""

    def __new__(cls, device: Any = None) -> _Generator:
        return super().__new__(cls, "cpu")


@contextmanager
def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let `cuda` be two such devices, without virtual memory management."""
    _let_torch_enter_it()
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 << 20, 16 << 20))
    monkeypatch.setattr(torch, "Event", _Event)
    monkeypatch.setattr(torch, "Generator", _Generator)
    # A module that moves gets other parameters: none of the CPU becomes one of the GPU in its place.
    monkeypatch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
    # What Python has values for is made on the CPU and moved, which the mode sees.
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with _PretendGpu():
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


def _run(op: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An op on what the tensors have on the CPU; its results are where it would have put them."""
    name = op._schema.name
    if name == "paged::_device_page_bytes":
        return 0
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    place = next((tensor.device for tensor in tensors if isinstance(tensor, GpuTensor)), torch.device("cpu"))
    if place.type == "cuda" and name not in COPIES:
        _refuse_others(place, name, args[:1] + args[2:] if name in INDEXING else args, kwargs)
    if (device := kwargs.get("device")) is not None:
        place = torch.device(device)
        kwargs = kwargs | {"device": torch.device("cpu"), **({"pin_memory": False} if "pin_memory" in kwargs else {})}
    given = {id(tensor.host): tensor for tensor in tensors if isinstance(tensor, GpuTensor)}
    given |= {id(tensor): tensor for tensor in tensors if not isinstance(tensor, GpuTensor)}
    result = op(*tree_map(_host, args), **tree_map(_host, kwargs))

    def placed(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        # What an op writes in place it returns as it was given.
        return given[id(value)] if id(value) in given else at(value, place)

    return tree_map(placed, result)


def at(host: Tensor, device: torch.device) -> Tensor:
    return GpuTensor(host, torch.device("cuda", device.index or 0)) if device.type == "cuda" else host


def _refuse_others(place: torch.device, name: str, args: Any, kwargs: dict[str, Any]) -> None:
    for value in tree_leaves((args, kwargs)):
        # Numbers of the CPU go everywhere.
        if isinstance(value, Tensor) and value.device != place and (value.dim() > 0 or value.is_cuda):
            raise RuntimeError(f"{name}: tensors on {place} and {value.device}, {list(value.shape)}; must be on one")


def _host(value: Any) -> Any:
    return value.host if isinstance(value, GpuTensor) else value


@functools.cache
def _let_torch_enter_it() -> None:
    if torch.version.cuda is not None:
        torch._C._ensureCUDADeviceGuardSet()
        return
    library, source, package = BUILD / "pretend_gpu.so", HERE / "pretend_gpu.cpp", Path(torch.__file__).parent
    BUILD.mkdir(exist_ok=True)
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    flags = ["-std=c++20", "-shared", "-fPIC", "-isystem", package / "include", "-L", package / "lib", "-lc10"]
    # To a name of its own: other tests may be loading the library.
    made = library.with_name(f"pretend_gpu.{os.getpid()}.so")
    subprocess.run([*compiler, source, "-o", made, *flags], check=True)
    os.replace(made, library)
    torch.ops.load_library(str(library))
