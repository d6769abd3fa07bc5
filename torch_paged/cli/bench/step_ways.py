"""The ways that `bench steps` compares: one decode step after the other over a cache of random keys and values."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import CompileConfig, DynamicCache, PreTrainedModel, StaticCache

import torch_paged
from torch_paged.cli.bench.host_time import refuse

WAYS = {
    "dynamic": "DynamicCache",
    "static": "StaticCache",
    "static-compiled": "StaticCache, compiled",
    "paged": "torch_paged",
    "paged-compiled": "torch_paged, compile=True",
}


class Steps:
    """Decoding with one way: every call is a step, from the inputs that `generate` prepares to the next token.

    Args:
        model: patched if `cache` is a PagedCache.
        cache: which holds the columns of `attention_mask`.
        attention_mask: int64 `[rows, columns]`, zeros for the padding on the left.
        forward: what a step calls.
    """

    def __init__(self, model: PreTrainedModel, cache: Any, attention_mask: Tensor, forward: Callable[..., Any]) -> None:
        self._model, self._cache, self._mask, self._forward = model, cache, attention_mask, forward
        self._ids = torch.ones_like(attention_mask)

    @torch.no_grad()
    def __call__(self, _: int = 0) -> None:
        rows = len(self._mask)
        self._mask = torch.cat([self._mask, self._mask.new_ones(rows, 1)], dim=1)
        self._ids = torch.cat([self._ids, self._ids.new_ones(rows, 1)], dim=1)
        inputs = self._model.prepare_inputs_for_generation(
            self._ids,
            next_sequence_length=1,
            past_key_values=self._cache,
            attention_mask=self._mask,
            position_ids=(self._mask.cumsum(1) - 1).clamp(min=0),
            use_cache=True,
        )
        self._forward(**inputs, return_dict=True).logits[:, -1].argmax(-1)

    def first(self) -> float:
        """Seconds of a first step, with all that is compiled for it."""
        start = time.perf_counter()
        self()
        return time.perf_counter() - start


@contextmanager
def prepared(way: str, model: PreTrainedModel, lengths: list[int], steps: int, block_size: int) -> Iterator[Steps]:
    """The steps of a way, over rows that hold so many tokens.

    Args:
        model: not patched; patched meanwhile by some ways.
        lengths: tokens of each row, padded on the left to the longest.
        steps: that may follow.
    """
    width = max(lengths)
    mask = torch.tensor([[0] * (width - length) + [1] * length for length in lengths])
    with ExitStack() as stack:
        if way.startswith("paged"):
            options: dict[str, Any] = {"compile": True} if way == "paged-compiled" else {}
            handle = stack.enter_context(torch_paged.paged(model, block_size=block_size, **options))
            cache = handle.replace(model, DynamicCache(config=model.config))
            _announce(cache, mask)
        elif way == "dynamic":
            cache = DynamicCache(config=model.config)
        else:
            cache = StaticCache(config=model.config, max_cache_len=width + steps)
        _fill(cache, model, len(lengths), width)
        forward: Callable[..., Any] = model
        if way == "static-compiled":
            forward = model.get_compiled_call(CompileConfig(mode="default", dynamic=False))
        yield Steps(model, cache, mask, forward)


def row_lengths(rows: int, context: int, padded: bool, seed: int) -> list[int]:
    """Tokens of each row: all `context`, or from half of that on."""
    if not padded:
        return [context] * rows
    rng = np.random.default_rng([seed, rows])
    return [context, *rng.integers(max(1, context // 2), context, size=rows - 1, endpoint=True).tolist()]


def _announce(cache: Any, mask: Tensor) -> None:
    from torch_paged.hf.announce import make_call

    call = make_call(cache, {"input_ids": torch.ones_like(mask), "attention_mask": mask}, native=True, say=refuse)
    assert call is not None
    call.windows.add(0)
    cache.announce(call)


@torch.no_grad()
def _fill(cache: Any, model: PreTrainedModel, rows: int, width: int) -> None:
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = rows, config.num_key_value_heads, width, head_dim
    key, value = (torch.randn(shape, dtype=model.dtype) for _ in range(2))
    for number in range(config.num_hidden_layers):
        cache.update(key, value, number)
