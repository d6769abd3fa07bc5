"""What the tests of generate_many share: requests, stock's answers to them one by one, pools that hold few blocks."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from torch_paged import GenerationRequest, GenerationResult, NewTokens, generate_many
from torch_paged.hf.many.room import Room

from .models import EOS, PAD, assert_same_tokens, batch

BLOCK = 4
# Of keys and values in float32 of the models of `models.SMALL`, 3 layers of 2 heads of 16.
BLOCK_BYTES = 3 * 2 * BLOCK * 2 * 16 * 4
OPTIONS: dict[str, Any] = dict(max_new_tokens=14, do_sample=False, pad_token_id=PAD, eos_token_id=EOS)


def prompts(lengths: Sequence[int], seed: int = 0) -> list[Tensor]:
    return [batch([length], seed=1000 * seed + length)["input_ids"][0] for length in lengths]


def stock_answer(model: PreTrainedModel, request: GenerationRequest | Tensor, **options: Any) -> Any:
    """Of stock `generate` for this request alone; the model is not patched."""
    if isinstance(request, Tensor):
        request = GenerationRequest(request)
    prompt = torch.as_tensor(request.prompt)[None]
    if request.seed is not None:
        torch.manual_seed(request.seed)
    named: dict[str, Any] = {}
    if request.prefix_allowed_tokens_fn is not None:
        named["prefix_allowed_tokens_fn"] = request.prefix_allowed_tokens_fn
    if request.tokenizer is not None:
        named["tokenizer"] = request.tokenizer
    if request.generation_config is not None:
        options = {"generation_config": request.generation_config}
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        logits_processor=LogitsProcessorList(request.logits_processor),
        stopping_criteria=StoppingCriteriaList(request.stopping_criteria),
        **named,
        **(options | dict(request.options)),
    )


@contextmanager
def admitting_all() -> Iterator[None]:
    """Whoever waits is let in at once, so that blocks run out."""
    with mock.patch.object(Room, "is_enough", lambda *_: True):
        yield


def results(events: Iterable[GenerationResult | NewTokens]) -> dict[Any, GenerationResult]:
    """The results by request."""
    return {event.request_id: event for event in events if isinstance(event, GenerationResult)}


def run(model: PreTrainedModel, requests: Iterable[Any], **kwargs: Any) -> tuple[dict[Any, GenerationResult], Any]:
    """Results by request, and the statistics."""
    many = generate_many(model, requests, **(OPTIONS | kwargs))
    return results(many), many.stats()


def assert_answer(model: PreTrainedModel, request: Any, result: GenerationResult, **options: Any) -> None:
    """Greedy tokens are those of stock; where two tokens are as good as equal, either will do."""
    assert result.error is None, result.error
    expected = stock_answer(model, request, **(OPTIONS | options))
    prompt = torch.as_tensor(request if isinstance(request, Tensor) else request.prompt)[None]
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    if not torch.equal(expected, result.sequences):
        assert_same_tokens(model, expected, result.sequences, inputs)


def assert_answer_or_tie(model: PreTrainedModel, request: GenerationRequest, result: GenerationResult) -> None:
    """Tokens are those of stock, whatever the request asks for, or those of stock with its weights rounded otherwise.

    Processors, draws and beams have near-ties of their own, of which raw logits say nothing.
    """
    expected = stock_answer(model, request, **OPTIONS)
    plain = not set(request.options) & {"do_sample", "repetition_penalty", "num_beams"}
    if torch.equal(expected, result.sequences):
        return
    if plain and expected.shape == result.sequences.shape:
        assert_answer(model, request, result)
        return
    generator = torch.Generator().manual_seed(0)
    for rounding in (1e-7, 1e-6, 1e-5) * 8:
        other = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1 + rounding * torch.randn(parameter.shape, generator=generator))
        if torch.equal(stock_answer(other, request, **OPTIONS), result.sequences):
            return
    raise AssertionError(f"{result.sequences.tolist()}; must be {expected.tolist()}")
