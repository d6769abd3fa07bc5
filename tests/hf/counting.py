"""Count what a test run does: the ops that run, the tokens a model computes, the warnings we gave."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

import torch_paged
from torch_paged import PagedHandle
from torch_paged.hf.layer import PagedLayer

_WRITES = ("paged.reshape_and_cache", "paged.rope_and_cache")


class _Counting(TorchDispatchMode):
    def __init__(self, calls: Counter[str]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = f"{func.namespace}.{func._schema.name.split('::')[1]}"
        self.calls[name] += 1
        self.calls["write"] += name in _WRITES
        return func(*args, **(kwargs or {}))


@contextmanager
def count_calls() -> Iterator[Counter[str]]:
    """Calls of every op, as "namespace.name"; of those that "write" keys and values; and of "gather" of a layer, which
    runs where modes do not see it."""
    calls: Counter[str] = Counter()
    gather = PagedLayer.gather

    def counted(layer: PagedLayer, columns: int, last: int) -> Any:
        calls["gather"] += 1
        return gather(layer, columns, last)

    with _Counting(calls), mock.patch.object(PagedLayer, "gather", counted):
        yield calls


@contextmanager
def watched(*models: PreTrainedModel, native: bool = True, block_size: int = 4) -> Iterator[list[PagedHandle]]:
    """`paged`, and at the end: every model used blocks and holds none, and they were read in place, or all gathered."""
    with ExitStack() as stack:
        handles = [stack.enter_context(torch_paged.paged(model, block_size=block_size)) for model in models]
        calls = stack.enter_context(count_calls())
        yield handles
        for handle in handles:
            assert handle.stats().blocks_used == 0 < handle.stats().peak_bytes
        read, gathered = calls["paged.attention"], calls["gather"]
        assert gathered == 0 < read if native else read == 0 < gathered


@contextmanager
def count_tokens(model: nn.Module) -> Iterator[list[int]]:
    """Positions that each forward pass of the model embeds."""
    tokens: list[int] = []
    embedding = model.get_input_embeddings()
    embed = embedding.forward

    def counted(ids: Tensor) -> Tensor:
        tokens.append(ids.numel())
        return embed(ids)

    # Not a hook, with which a model forgets its prefixes.
    with mock.patch.object(embedding, "forward", counted):
        yield tokens


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What our logger said."""
    return [record.getMessage() for record in caplog.records if record.name == "torch_paged"]
