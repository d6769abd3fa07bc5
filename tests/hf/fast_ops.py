"""Notes which calls of a model's layers run by an op of ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class _Rows(TorchDispatchMode):
    def __init__(self, op: str) -> None:
        super().__init__()
        self.op = getattr(torch.ops.paged, op).default
        self.rows: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is self.op:
            self.rows.append(args[0].shape[:-1].numel())
        return result


@contextmanager
def rows_of_calls(op: str) -> Iterator[list[int]]:
    """How many rows each call gets that the op does not refuse."""
    with _Rows(op) as mode:
        yield mode.rows
