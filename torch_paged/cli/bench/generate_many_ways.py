"""generate_many as ways of `bench generate`: as many requests at a time as slots, or as blocks, allow."""

import time
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria

import torch_paged
from torch_paged.cli.bench.generate_cases import GenerateCase
from torch_paged.cli.bench.generate_ways import NotPossible, Run, Way


def slots(block_size: int) -> Way:
    """Memory without a bound that matters, and so many sequences at a time as `case.fit`."""

    def run(model: PreTrainedModel, case: GenerateCase, seed: int) -> Run:
        with torch_paged.paged(model, block_size=block_size) as handle:
            return _run(model, handle, case, seed, max_num_seqs=case.fit)

    return run


def blocks(block_size: int) -> Way:
    """Any number of sequences at a time, in memory for `case.fit` requests of the mean size."""

    def run(model: PreTrainedModel, case: GenerateCase, seed: int) -> Run:
        with torch_paged.paged(model, block_size=block_size, max_memory=pool_bytes(model, case, block_size)) as handle:
            return _run(model, handle, case, seed)

    return run


def pool_bytes(model: PreTrainedModel, case: GenerateCase, block_size: int) -> int:
    """Of the blocks that `case.fit` requests of the mean size hold at their end, at least those of the largest."""
    config: Any = model.config.get_text_config(decoder=True)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    # The last token is not stored.
    held = [-(-(len(prompt) + wish - 1) // block_size) for prompt, wish in zip(case.prompts, case.wishes, strict=True)]
    num_blocks = max(-(-case.fit * sum(held) // len(held)), *held)
    token_bytes: int = 2 * config.num_hidden_layers * kv_heads * head_dim * model.dtype.itemsize
    return num_blocks * block_size * token_bytes


class _Ends(StoppingCriteria):  # type: ignore[misc]
    """Ends a request with its wish, as an end-of-sequence token would: nobody knows before."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self._length, device=input_ids.device)


def _run(model: PreTrainedModel, handle: Any, case: GenerateCase, seed: int, **options: Any) -> Run:
    requests = [
        torch_paged.GenerationRequest(prompt, stopping_criteria=[_Ends(len(prompt) + wish)], seed=seed)
        for prompt, wish in zip(case.prompts, case.wishes, strict=True)
    ]
    start = time.perf_counter()
    many = torch_paged.generate_many(model, requests, do_sample=False, max_new_tokens=max(case.wishes), **options)
    tokens: list[list[int]] = [[] for _ in requests]
    first = 0.0
    for result in many:
        assert isinstance(result, torch_paged.GenerationResult) and isinstance(result.request_id, int)
        if result.error is not None:
            raise NotPossible(f"a request did not finish: {' '.join(str(result.error).split())}")
        at = time.perf_counter() - start
        first = max(first, at - result.seconds + (result.time_to_first_token or 0.0))
        tokens[result.request_id] = result.new_tokens[0].tolist()
    seconds = time.perf_counter() - start
    return Run(tokens, [first], seconds, handle.stats().peak_bytes, many.stats().tokens_prefilled)
