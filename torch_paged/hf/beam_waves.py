"""Beam search whose batch does not fit: prompts run in waves, the beams of each to their end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from torch_paged.hf.cache import PagedCache
from torch_paged.hf.row_by_row import for_rows
from torch_paged.memory import PoolExhausted


def beams_in_waves(
    run: Callable[..., Tensor],
    cache: PagedCache,
    input_ids: Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    kwargs: dict[str, Any],
) -> Tensor:
    """`_beam_search` of all prompts, or of halves of them from the beginning where blocks run out.

    Beams of one prompt do not look at those of others, so that greedy ones are those of the whole batch.

    Args:
        run: `_beam_search` of the model's stock class, bound.
        input_ids: int64 `[prompts * num_beams, columns]`.
        kwargs: of `run`, among them the mask and positions of these columns.

    Returns: int64 `[prompts * num_return_sequences, columns]`, as stock pads them.

    Raises:
        PoolExhausted: the beams of one prompt do not fit, and no other thread can free blocks.
    """
    num_beams = config.num_beams
    named = {name: kwargs.get(name) for name in ("attention_mask", "position_ids")}
    per_row = {name: value for name, value in named.items() if isinstance(value, Tensor) and len(value) > 1}
    rows = torch.arange(len(input_ids))
    waves, done = [rows], []
    while waves:
        part = waves.pop(0)
        cache.state.divides = len(part) > num_beams
        ids = input_ids[part.to(input_ids.device)]
        given = kwargs | {name: value[part.to(value.device)] for name, value in per_row.items()}
        try:
            done.append(run(ids, for_rows(processors, part.tolist()), criteria, **given))
        except PoolExhausted:
            prompts = len(part) // num_beams
            if prompts == 1:
                raise
            half = prompts // 2 * num_beams
            waves[:0] = part[:half], part[half:]
        finally:
            cache.state.divides = False
        cache.reset()
    if len(done) == 1:
        return done[0]
    width = max(result.shape[1] for result in done)
    fill = _fill(config)
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1]), value=fill) for part in done])


def _fill(config: GenerationConfig) -> int:
    """What stock has behind the end of a sequence."""
    pad: Any = config._pad_token_tensor
    eos: Any = config._eos_token_tensor
    return -1 if eos is None else int(pad or eos[0])
