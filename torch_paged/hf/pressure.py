"""Decoding whose batch does not fit: stock's loop as far as blocks last, then rows in turns, or waves of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from torch_paged.hf.cache import PagedCache
from torch_paged.hf.call import NeedsOwnAttention
from torch_paged.hf.fresh_cache import paged_part
from torch_paged.hf.joined import sequences_of
from torch_paged.hf.packed import Forward
from torch_paged.hf.packing import pack_problem, rope_problem
from torch_paged.hf.progress import Progress
from torch_paged.hf.row_by_row import end_alone, keep_state, works_row_by_row
from torch_paged.hf.row_hooks import has_row_hooks
from torch_paged.hf.row_inputs import unknown_inputs
from torch_paged.hf.streamed import Streamed
from torch_paged.hf.sub_batches import SubBatches
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
    is not known to, the rows that fit run to their end, then the next ones. Where more is asked for than tokens, or
    something has a state that does not go back, they do so from the beginning. A streamer gets what is left at the end.

    Until others can free blocks too: what runs in other threads over the same pools. A row alone waits for these.

    Args:
        stock: `_sample` of the model's stock class, bound.
        handle: of the patched model.
        forward: of the patched model.

    Raises:
        PoolExhausted: nobody else can free blocks, and not even one row fits, or all rows are needed at once, which it
            says then; or `on_pressure="error"`.
    """
    stock = functools.partial(stock, generation_config=generation_config)
    cache, model = paged_part(kwargs.get("past_key_values")), forward.model
    if cache is None or cache.config.on_pressure == "error":
        return stock(input_ids, logits_processor, stopping_criteria, **kwargs)
    inputs = {name: value for name, value in kwargs.items() if name != "streamer"}
    if (reason := _undivided(cache, model, inputs, generation_config)) is not None:
        with _saying(reason, len(input_ids)):
            return stock(input_ids, logits_processor, stopping_criteria, **kwargs)
    streamer = Streamed(kwargs["streamer"]) if kwargs.get("streamer") is not None else None
    sub_batches = SubBatches(
        stock, model, input_ids, logits_processor, stopping_criteria, inputs, _teller(handle, model, generation_config)
    )
    if _goes_on(cache, model, generation_config, input_ids, logits_processor, stopping_criteria, inputs):
        result = _in_turns_or_waves(
            stock, handle, forward, input_ids, logits_processor, stopping_criteria, generation_config, streamer, inputs,
            sub_batches,
        )  # fmt: skip
    else:
        result = sub_batches.sample(generation_config, streamer=streamer)
    if streamer is not None:
        streamer.finish(sequences_of(result)[:, input_ids.shape[1] :])
    return result


def _in_turns_or_waves(
    stock: Callable[..., Any],
    handle: PagedHandle,
    forward: Forward,
    input_ids: Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    streamer: Any,
    kwargs: dict[str, Any],
    sub_batches: SubBatches,
) -> Any:
    """`sample`, of rows that can go on from the tokens they have."""
    cache: PagedCache = kwargs["past_key_values"]
    progress = Progress(criteria, input_ids)
    mask = kwargs.get("attention_mask")
    # A mask of any dtype, as stock takes it.
    mask = torch.ones_like(input_ids) if mask is None else (mask != 0).long()
    begun = mask.any(dim=1)
    take_turns = _packs(handle, forward, cache) and bool(begun.all()) and works_row_by_row(processors, criteria)
    # A single row of which it is not known goes on as it is, once other threads have freed blocks for it.
    cache.state.divides = take_turns or len(input_ids) > 1
    try:
        return stock(input_ids, processors, progress, **kwargs, **({} if streamer is None else {"streamer": streamer}))
    except PoolExhausted:
        if not cache.state.divides:
            raise
    finally:
        cache.state.divides = False
    kwargs = kwargs | {"attention_mask": pad(mask, (0, progress.ids.shape[1] - mask.shape[1]), value=1)}
    if take_turns:
        try:
            turns = Turns(forward.model, cache, processors, criteria, config)
            return turns.run(progress.ids, kwargs["attention_mask"], ~progress.done)
        except NeedsOwnAttention:
            return sub_batches.sample(config, progress.ids)
    return in_waves(stock, cache, processors, criteria, progress.ids, progress.done, config, kwargs, begun)


def beam_search(
    stock: Callable[..., Any],
    handle: PagedHandle,
    model: PreTrainedModel,
    generation_config: GenerationConfig,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    **kwargs: Any,
) -> Any:
    """`_beam_search`, which runs fewer prompts at a time, from the beginning, when blocks run out.

    Args:
        stock: `_beam_search` of the model's stock class, bound.
        handle: of the patched model.
        model: patched.

    Raises:
        PoolExhausted: as in `sample`; the beams of one prompt are never divided.
    """
    cache = paged_part(kwargs.get("past_key_values"))
    if cache is None or cache.config.on_pressure == "error":
        return stock(input_ids, logits_processor, stopping_criteria, **kwargs)
    if (reason := _undivided(cache, model, kwargs, generation_config)) is not None:
        with _saying(reason, len(input_ids) // generation_config.num_beams):
            return stock(input_ids, logits_processor, stopping_criteria, **kwargs)
    tell = _teller(handle, model, generation_config)
    sub_batches = SubBatches(stock, model, input_ids, logits_processor, stopping_criteria, kwargs, tell)
    return sub_batches.beam_search(generation_config)


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


def _undivided(
    cache: PagedCache, model: PreTrainedModel, kwargs: dict[str, Any], config: GenerationConfig
) -> str | None:
    """Why all rows are needed at once, or None."""
    if not cache.made_by_generate or cache.state.num_seqs is not None:
        return "the cache that was passed is to hold all of them"
    if config.is_assistant:
        return "another model goes on with them"
    if kwargs.get("synced_gpus"):
        return "devices run in step"
    if names := unknown_inputs(kwargs):
        return f"{', '.join(names)} may belong to several of them"
    return rope_problem(model, config.max_length)


@contextmanager
def _saying(reason: str, num_rows: int) -> Iterator[None]:
    """Let errors say why rows were not divided, where there are several."""
    try:
        yield
    except PoolExhausted as error:
        if num_rows == 1:
            raise
        raise error.because(reason) from None


def _teller(handle: PagedHandle, model: PreTrainedModel, config: GenerationConfig) -> Callable[[], None]:
    """What tells the user that rows are divided where he may notice."""

    def tell() -> None:
        reason = "a batch did not fit max_memory and runs as several"
        if config.return_dict_in_generate:
            handle.tell(f"{reason}, with return_dict_in_generate", "past_key_values is None, steps after an end are 0")
        if has_row_hooks(model):
            handle.tell(f"{reason}, with forward hooks", "hooks see fewer rows, in other places than in the batch")

    return tell


def _goes_on(
    cache: PagedCache,
    model: PreTrainedModel,
    config: GenerationConfig,
    input_ids: Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    kwargs: dict[str, Any],
) -> bool:
    """Whether a row that loses its blocks can go on from the tokens it has; else it begins anew."""
    if not cache.all_paged or not isinstance(kwargs["past_key_values"], PagedCache):
        return False
    if config.return_dict_in_generate or config.prefill_chunk_size:
        return False
    if keep_state(processors) or not end_alone(criteria):
        return False
    if any(name not in _INPUTS and value is not None and value is not False for name, value in kwargs.items()):
        return False
    if training_reason(model) or has_row_hooks(model):
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
