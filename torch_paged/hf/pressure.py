"""Decoding whose batch does not fit: stock's loop as far as blocks last, then rows in turns, or waves of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from torch_paged.hf.beam_waves import beams_in_waves
from torch_paged.hf.cache import PagedCache
from torch_paged.hf.call import NeedsOwnAttention
from torch_paged.hf.packed import Forward
from torch_paged.hf.packing import pack_problem, sees_whole_batch
from torch_paged.hf.progress import Progress
from torch_paged.hf.row_by_row import end_alone, works_row_by_row
from torch_paged.hf.support import Path, implementation_reason, training_reason
from torch_paged.hf.swapped_row import SwappedBatch
from torch_paged.hf.turns import Turns
from torch_paged.hf.waves import in_waves
from torch_paged.memory import PoolExhausted

if TYPE_CHECKING:
    from torch_paged.hf.handle import PagedHandle

_INPUTS = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}


def sample(
    stock: Callable[..., Any],
    handle: PagedHandle,
    forward: Forward,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **kwargs: Any,
) -> Any:
    """`_sample`, which goes on with fewer rows at a time when blocks run out.

    Until then it is stock's loop. Afterwards rows whose processors and criteria work row by row take turns: see
    `Turns`; greedy tokens stay those of stock, samples are drawn from the same distributions by other draws. Where one
    is not known to, the rows that fit run to their end, then the next ones.

    Until others can free blocks too: what runs in other threads over the same pools. A row alone waits for these.

    Args:
        stock: `_sample` of the model's stock class, bound.
        handle: of the patched model.
        forward: of the patched model.

    Raises:
        PoolExhausted: nobody else can free blocks, and not even one row fits, or what the caller asked for (scores, a
            streamer, inputs of another kind) needs all rows at once; or `on_pressure="error"`.
    """
    cache = kwargs.get("past_key_values")
    stock = functools.partial(stock, generation_config=generation_config)
    if not _may_be_divided(cache, forward.model, generation_config, input_ids, logits_processor, kwargs):
        return stock(input_ids, logits_processor, stopping_criteria, **kwargs)
    progress = Progress(stopping_criteria, input_ids)
    mask = kwargs.get("attention_mask")
    # A mask of any dtype, as stock takes it.
    mask = torch.ones_like(input_ids) if mask is None else (mask != 0).long()
    begun = mask.any(dim=1)
    take_turns = (
        _packs(handle, forward, cache)
        and bool(begun.all())
        and works_row_by_row(logits_processor, stopping_criteria)
        and end_alone(stopping_criteria)
    )
    # A single row of which it is not known goes on as it is, once other threads have freed blocks for it.
    cache.state.divides = take_turns or len(input_ids) > 1
    try:
        return stock(input_ids, logits_processor, progress, **kwargs)
    except PoolExhausted as error:
        if not cache.state.divides:
            raise
        exhausted = error.with_traceback(None)
    finally:
        cache.state.divides = False
    kwargs = {name: value for name, value in kwargs.items() if name in _INPUTS}
    kwargs["attention_mask"] = torch.nn.functional.pad(mask, (0, progress.ids.shape[1] - mask.shape[1]), value=1)
    if take_turns:
        try:
            turns = Turns(forward.model, cache, logits_processor, stopping_criteria, generation_config)
            return turns.run(progress.ids, kwargs["attention_mask"], ~progress.done)
        except NeedsOwnAttention:
            raise exhausted from None
    return in_waves(
        stock, cache, logits_processor, stopping_criteria, progress.ids, progress.done, generation_config, kwargs, begun
    )


def beam_search(
    stock: Callable[..., Any],
    model: PreTrainedModel,
    generation_config: GenerationConfig,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    **kwargs: Any,
) -> Any:
    """`_beam_search`, which runs fewer prompts at a time when blocks run out.

    Args:
        stock: `_beam_search` of the model's stock class, bound.
        model: patched.
    """
    cache = kwargs.get("past_key_values")
    if not _may_be_divided(cache, model, generation_config, input_ids, logits_processor, kwargs):
        return stock(input_ids, logits_processor, stopping_criteria, **kwargs)
    kwargs = {name: value for name, value in kwargs.items() if name in _INPUTS}
    return beams_in_waves(stock, cache, input_ids, logits_processor, stopping_criteria, generation_config, kwargs)


def wait_for_others(cache: PagedCache, inputs: dict[str, Any], *, native: bool) -> bool:
    """After a call over `inputs` found too few blocks: wait until calls of other threads have freed as many.

    Args:
        native: the model's calls do not store padding.

    Returns: whether to call again; False where its rows can be divided, or nobody can free anything.
    """
    state = cache.state
    if state.divides or cache.config.on_pressure == "error":
        return False
    if not cache.all_paged and state.num_seqs is not None:
        return False  # layers of other kinds have gone on, and cannot again
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    tokens = inputs["inputs_embeds"] if ids is None else ids
    new = np.full(len(tokens), tokens.shape[1])
    if native and state.refusal is None and isinstance(mask, Tensor) and mask.ndim == 2:
        new = (mask[:, -tokens.shape[1] :] != 0).sum(1).cpu().numpy()
    line, lengths, room = state.pools.line, state.seq_lens, state.pools.have_room
    if not line.has_others:
        return False
    if state.num_seqs is None:
        return line.wait(functools.partial(room, np.zeros_like(new), new), holds=False)
    if line.is_first:
        return line.wait(functools.partial(room, lengths, new), holds=True)
    try:
        swapped = SwappedBatch(list(state.groups.values()))
    except (MemoryError, RuntimeError):
        return line.wait(functools.partial(room, lengths, new), holds=True)
    while line.wait(functools.partial(room, lengths, new, swapped.num_blocks), holds=False):
        with suppress(PoolExhausted):
            swapped.restore()
            return True
    return False


def _packs(handle: PagedHandle, forward: Forward, cache: PagedCache) -> bool:
    """Whether any rows of the cache may share a pass."""
    model = forward.model
    if not cache.config.pack_rows or handle.support(model).path is not Path.NATIVE or implementation_reason(model):
        return False
    return pack_problem(forward, cache) is None


def _may_be_divided(
    cache: Any,
    model: PreTrainedModel,
    config: GenerationConfig,
    input_ids: Tensor,
    processors: LogitsProcessorList,
    kwargs: dict[str, Any],
) -> TypeGuard[PagedCache]:
    """Whether nothing was asked for that needs all rows at once, and the cache is this call's own."""
    if not isinstance(cache, PagedCache) or not cache.all_paged:
        return False
    if cache.config.on_pressure == "error" or not cache.made_by_generate or cache.state.num_seqs is not None:
        return False
    if config.return_dict_in_generate or config.is_assistant or config.prefill_chunk_size:
        return False
    if any(name not in _INPUTS and value is not None and value is not False for name, value in kwargs.items()):
        return False
    if training_reason(model) or sees_whole_batch(model):
        return False
    # It decodes rows of its own beside these, over a cache of its own.
    if any(isinstance(each, UnbatchedClassifierFreeGuidanceLogitsProcessor) for each in processors):
        return False
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if mask is not None:
        if mask.shape != input_ids.shape:
            return False
        mask = (mask != 0).long()
        if bool((mask[:, :-1] > mask[:, 1:]).any()):
            return False
        if positions is not None and bool(((positions != mask.cumsum(1) - 1) & (mask != 0)).any()):
            return False
    return True
