"""Prefill of expanded prompts: every prompt is computed once, and its rows share the blocks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from torch_paged.hf.cache import PagedCache


def prefill_once(
    stock_prefill: Callable[..., Any],
    input_ids: Tensor,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    **kw: Any,
) -> Any:
    """`_prefill` for beams and samples: the unique prompts, then a fork of their tables.

    `generate` repeats each prompt `expand` times before the prefill. Stock prefills all copies; here one of them runs,
    and `batch_repeat_interleave` makes the others by table edits (parallel sampling and beam search in PagedAttention,
    arXiv 2309.06180, section 4.4). Stock's prefill runs where an input is not repeated so, or the cache is not empty.
    """
    expand = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
    cache = model_kwargs.get("past_key_values")
    rows = input_ids.shape[0]
    if (
        expand == 1
        or rows % expand
        or not isinstance(cache, PagedCache)
        or not cache.config.share_prompts
        or not cache.all_paged
        or cache.get_seq_length() > 0
        or _positions_of_several_kinds(model_kwargs)
        or not _repeated(input_ids, model_kwargs, rows, expand)
    ):
        return stock_prefill(input_ids, generation_config, model_kwargs, **kw)
    unique = {name: value[::expand] if _per_row(value, rows) else value for name, value in model_kwargs.items()}
    outputs = stock_prefill(input_ids[::expand], generation_config, unique, **kw)
    # A model may bring a cache of its own to the call, as PEFT's prefix tuning does.
    filled = outputs.get("past_key_values")
    filled.batch_repeat_interleave(expand)
    for name, value in outputs.items():
        if value is not filled:
            outputs[name] = tree_map(functools.partial(_repeat_rows, rows=rows // expand, expand=expand), value)
    return outputs


def keep_pads_of_empty_rows(model_kwargs: dict[str, Any]) -> None:
    """Let the cache of a new batch store all columns, and gather them, where a row is nothing but padding.

    Stock begins such a row with what the model says of the hidden columns, by rules of each attention implementation.
    """
    cache, mask = model_kwargs.get("past_key_values"), model_kwargs.get("attention_mask")
    if not isinstance(cache, PagedCache) or cache.get_seq_length() > 0:
        return
    if isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask.any(dim=1).all()):
        cache.state.keep_pads("attention_mask hides all of a row")


def _repeat_rows(value: Any, rows: int, expand: int) -> Any:
    return value.repeat_interleave(expand, dim=0) if _per_row(value, rows) else value


def _positions_of_several_kinds(model_kwargs: dict[str, Any]) -> bool:
    """Multimodal rotary positions, `[kinds, rows, columns]`: their rows are not in the first dimension."""
    positions = model_kwargs.get("position_ids")
    return isinstance(positions, Tensor) and positions.ndim > 2


def _per_row(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == rows


def _repeated(input_ids: Tensor, model_kwargs: dict[str, Any], rows: int, expand: int) -> bool:
    """Whether every input stands `expand` times in a row: a caller's own custom loop may have changed that."""
    tensors = [input_ids, *(value for value in model_kwargs.values() if isinstance(value, Tensor))]
    return all(
        _per_row(tensor, rows) and torch.equal(tensor, tensor[::expand].repeat_interleave(expand, dim=0))
        for tensor in tensors
        if tensor.ndim > 0
    )
