"""What the tests of generate_many share: requests, stock's answers to them one by one, pools that hold few blocks."""

from __future__ import annotations

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
