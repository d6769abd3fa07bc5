"""Count where the host waits for a device: what it reads from there before it goes on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .test_on_gpu import pretended

# Their result, or how large it is, must be known on the host.
READS = {
    "aten::_local_scalar_dense", "aten::equal", "aten::masked_select", "aten::nonzero", "aten::unique_consecutive",
    "aten::_unique2",
}  # fmt: skip
COPIES = {"aten::_to_copy", "aten::copy_"}


class Waits(TorchDispatchMode):
    """Counts the ops that make the host wait for a device, by name.

    Args:
        device_type: of tensors that are on such a device. What lies on the CPU is there already, so that with "cpu"
            reads are counted and copies are not.
    """

    def __init__(self, waits: Counter[str], device_type: str = "cpu") -> None:
        super().__init__()
        self.waits, self._device_type = waits, device_type
        # Ops that the device was given, and how many of these were done when the host last waited.
        self.given = self.done = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name, kwargs or {}
        there = [each for each in tree_leaves((args, kwargs)) if self._is_there(each)]
        self.given += bool(there)
        # A mask of bool that is indexed with is a nonzero inside.
        masks = args[1] if name in ("aten::index", "aten::index_put_") else []
        reads = name in READS or any(index is not None and index.dtype == torch.bool for index in masks)
        if there and (reads or self._comes_back(name, args, kwargs)):
            self.wait(name)
        return func(*args, **kwargs)

    def wait(self, name: str) -> None:
        self.waits[name] += 1
        self.done = self.given

    def _is_there(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.device.type == self._device_type

    def _comes_back(self, name: str, args: Any, kwargs: dict[str, Any]) -> bool:
        """Whether this copies from the device to the CPU, and not meanwhile."""
        if name not in COPIES or self._device_type == "cpu":
            return False
        target, source = (kwargs.get("device"), args[0]) if name == "aten::_to_copy" else (args[0].device, args[1])
        non_blocking = kwargs.get("non_blocking") or (name == "aten::copy_" and len(args) > 2 and args[2])
        return self._is_there(source) and target is not None and torch.device(target).type == "cpu" and not non_blocking


@contextmanager
def count_waits() -> Iterator[Counter[str]]:
    """On a pretended GPU, the only place where a copy to the host is an op: by names, of events too.

    An event is waited for where the host has not waited for anything since that came after it.
    """
    waits: Counter[str] = Counter()
    mode = Waits(waits, "cuda")

    class Event:
        def __init__(self, device: Any = None, **_: Any) -> None:
            self._at = 0

        def record(self, stream: Any = None) -> None:
            self._at = mode.given

        def synchronize(self) -> None:
            if self._at > mode.done:
                mode.wait("event")

    with mode, mock.patch.object(torch, "Event", Event):
        yield waits


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with pretended(monkeypatch):
        yield
