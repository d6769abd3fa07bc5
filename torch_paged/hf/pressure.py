"""Decoding whose batch does not fit: stock's loop as far as blocks last, then rows in turns, or waves of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.logits_process import WhisperNoSpeechDetection

from torch_paged.hf.cache import PagedCache
from torch_paged.hf.call import NeedsOwnAttention
from torch_paged.hf.fresh_cache import paged_part
from torch_paged.hf.joined import sequences_of
from torch_paged.hf.loop import Loop
from torch_paged.hf.packed import Forward
from torch_paged.hf.packing import pack_problem, rope_problem
from torch_paged.hf.progress import Progress
from torch_paged.hf.row_by_row import end_alone, keep_state, works_row_by_row
from torch_paged.hf.row_hooks import has_row_hooks
from torch_paged.hf.row_inputs import is_unset, unknown_inputs
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
    inputs = {name: value for name, value in kwargs.items() if name != "streamer"}
    loop = Loop(
        functools.partial(stock, generation_config=generation_config), forward.model, input_ids, logits_processor,
        stopping_criteria, generation_config, inputs,
    )  # fmt: skip
    if (given := kwargs.get("streamer")) is None:
        return _sample(loop, handle, forward, None)
    streamer = Streamed(given)
    result = _sample(loop, handle, forward, streamer)
    streamer.finish(sequences_of(result)[:, input_ids.shape[1] :])
    return result


def _sample(loop: Loop, handle: PagedHandle, forward: Forward, streamer: Streamed | None) -> Any:
    """`sample`; a streamer has got what rows could do beside one another."""
    streaming = {} if streamer is None else {"streamer": streamer}
    if (cache := _dividable(loop)) is None:
        return loop(**streaming)
    if (reason := _undivided(cache, loop)) is not None:
        with _saying(reason, len(loop.input_ids)):
            return loop(**streaming)
    sub_batches = SubBatches(loop, _teller(handle, loop))
    if not _goes_on(cache, loop):
        return sub_batches.sample(streaming)
    progress = Progress(loop.criteria, loop.input_ids)
    mask = loop.inputs.get("attention_mask")
    # A mask of any dtype, as stock takes it.
    mask = torch.ones_like(loop.input_ids) if mask is None else (mask != 0).long()
    begun = mask.any(dim=1)
    known = works_row_by_row(loop.processors, loop.criteria)
    take_turns = _packs(handle, forward, cache) and bool(begun.all()) and known
    # A single row of which it is not known goes on as it is, once other threads have freed blocks for it.
    cache.state.divides = take_turns or len(loop.input_ids) > 1
    try:
        return replace(loop, criteria=progress)(**streaming)
    except PoolExhausted:
        if not cache.state.divides:
            raise
    finally:
        cache.state.divides = False
    mask = pad(mask, (0, progress.ids.shape[1] - mask.shape[1]), value=1)
    if not take_turns:
        return in_waves(loop, cache, progress, mask, begun)
    try:
        return Turns(loop, cache).run(progress.ids, mask, ~progress.done)
    except NeedsOwnAttention:
        return sub_batches.sample({}, progress.ids)


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
    loop = Loop(stock, model, input_ids, logits_processor, stopping_criteria, generation_config, kwargs)
    if (cache := _dividable(loop)) is None:
        return loop()
    if (reason := _undivided(cache, loop)) is not None:
        with _saying(reason, len(input_ids) // generation_config.num_beams):
            return loop()
    return SubBatches(loop, _teller(handle, loop)).beam_search()


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


def _dividable(loop: Loop) -> PagedCache | None:
    """The paged cache of a loop, where blocks that run out are not an error at once."""
    cache = paged_part(loop.inputs.get("past_key_values"))
    return None if cache is None or cache.config.on_pressure == "error" else cache


def _undivided(cache: PagedCache, loop: Loop) -> str | None:
    """Why all rows are needed at once, or None."""
    if not cache.made_by_generate or cache.state.num_seqs is not None:
        return "the cache that was passed is to hold all of them"
    if loop.config.is_assistant:
        return "another model goes on with them"
    if loop.inputs.get("synced_gpus"):
        return "devices run in step"
    if names := unknown_inputs(loop.inputs):
        return f"{', '.join(names)} may belong to several of them"
    if any(isinstance(each, WhisperNoSpeechDetection) for each in loop.processors):
        return "WhisperNoSpeechDetection remembers all of them"
    # Embeddings are columns that stock's max_length does not count.
    embeds = loop.inputs.get("inputs_embeds")
    more = 0 if embeds is None else max(0, embeds.shape[1] - loop.input_ids.shape[1])
    return rope_problem(loop.model, loop.config.max_length + more)


@contextmanager
def _saying(reason: str, num_rows: int) -> Iterator[None]:
    """Let errors say why rows were not divided, where there are several."""
    try:
        yield
    except PoolExhausted as error:
        if num_rows == 1:
            raise
        raise error.because(reason) from None


def _teller(handle: PagedHandle, loop: Loop) -> Callable[[], None]:
    """What tells the user that rows are divided where he may notice."""

    def tell() -> None:
        reason = "a batch did not fit max_memory and runs as several"
        if loop.config.return_dict_in_generate:
            handle.tell(f"{reason}, with return_dict_in_generate", "past_key_values is None, steps after an end are 0")
        if has_row_hooks(loop.model):
            handle.tell(f"{reason}, with forward hooks", "hooks see fewer rows, in other places than in the batch")

    return tell


def _goes_on(cache: PagedCache, loop: Loop) -> bool:
    """Whether a row that loses its blocks can go on from the tokens it has; else it begins anew."""
    if not cache.all_paged or not isinstance(loop.inputs["past_key_values"], PagedCache):
        return False
    if loop.config.return_dict_in_generate or loop.config.prefill_chunk_size:
        return False
    if keep_state(loop.processors) or not end_alone(loop.criteria):
        return False
    if any(name not in _INPUTS and not is_unset(value) for name, value in loop.inputs.items()):
        return False
    if training_reason(loop.model) or has_row_hooks(loop.model):
        return False
    mask, positions = loop.inputs.get("attention_mask"), loop.inputs.get("position_ids")
    if mask is not None:
        if mask.shape != loop.input_ids.shape:
            return False
        mask = (mask != 0).long()
        if bool((mask[:, :-1] > mask[:, 1:]).any()):
            return False
        if positions is not None and bool(((positions != mask.cumsum(1) - 1) & (mask != 0)).any()):
            return False
    return True
