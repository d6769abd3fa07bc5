"""Speculation in generate_many: drafts of many sequences verified in one pass, tokens as without them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import torch_paged
from torch_paged import GenerationRequest, generate_many

from .counting import count_calls
from .many import BLOCK, OPTIONS, assert_answer, prompts, results, run, stock_answer
from .models import tiny, twin

NO_EOS: dict[str, Any] = OPTIONS | {"eos_token_id": None}
LOOKUP: dict[str, Any] = {"prompt_lookup_num_tokens": 4}


def repeating(lengths: list[int]) -> list[torch.Tensor]:
    """Prompts that say the same again and again, so that there is something to look up."""
    return [torch.tensor([5, 9, 17, 33, 8] * length)[: 3 * length] for length in lengths]


@pytest.mark.parametrize("name", ["llama", "qwen2-sliding", "mistral", "gpt2"])
def test_prompt_lookup_beside_requests_without(name: str) -> None:
    stock = tiny(name)
    model = twin(stock)
    asked = repeating([4, 9, 7, 5])
    requests = [GenerationRequest(p, options=LOOKUP if i != 2 else {}) for i, p in enumerate(asked)]
    with torch_paged.paged(model, block_size=BLOCK) as handle, count_calls() as calls:
        answers, stats = run(model, requests, **(NO_EOS | {"max_new_tokens": 30}))
        assert handle.stats().blocks_used == 0
    assert calls["gather"] == stats.alone == 0
    assert stats.tokens_drafted > stats.drafts_accepted
    for number, prompt in enumerate(asked):
        assert_answer(stock, prompt, answers[number], **(NO_EOS | {"max_new_tokens": 30}))


def test_drafts_save_forwards() -> None:
    """A processor that makes the model say its prompt again: all drafts are right."""
    model = tiny("llama")
    cycle = [5, 9, 17, 33, 8]

    def parrot(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -1e9)
        forced[0, cycle[ids.shape[1] % 5]] = 0
        return forced

    def asked() -> list[GenerationRequest]:
        prompt = torch.tensor(cycle * 2)
        return [GenerationRequest(prompt, logits_processor=[parrot], options=LOOKUP) for _ in range(3)]

    answers, stats = run(model, asked(), **(NO_EOS | {"max_new_tokens": 21}))
    expected = (cycle * 7)[:31]
    assert all(answer.sequences[0].tolist() == expected for answer in answers.values())
    # Each pass, the prefill too, gives the 4 of a draft and one more; the 21st token needs none.
    assert stats.forwards == 20 // 5 + 1
    assert stats.drafts_accepted == stats.tokens_drafted == 3 * 16


@pytest.mark.parametrize("name", ["llama", "qwen2-sliding"])
@pytest.mark.parametrize("options", [{"do_sample": True}, {"repetition_penalty": 1.3}, {"do_sample": True, "top_k": 9}])
def test_prompt_lookup_draws_as_stock_does(name: str, options: dict[str, Any]) -> None:
    stock = tiny(name)
    model = twin(stock)
    requests = [
        GenerationRequest(prompt, options=LOOKUP | options, seed=number)
        for number, prompt in enumerate(repeating([4, 9, 5]))
    ]
    answers, _ = run(model, requests, **NO_EOS)
    for number, request in enumerate(requests):
        assert answers[number].error is None, answers[number].error
        assert torch.equal(answers[number].sequences, stock_answer(stock, request, **NO_EOS))


def test_an_eos_token_in_a_draft_ends_the_request_there() -> None:
    stock = tiny("llama")
    model = twin(stock)
    prompt = repeating([5])[0]
    free = stock_answer(stock, prompt, **NO_EOS)
    for eos in free[0, len(prompt) :].unique().tolist():
        request = GenerationRequest(prompt, options=LOOKUP | {"eos_token_id": eos})
        answers, _ = run(model, [request])
        expected = stock_answer(stock, GenerationRequest(prompt, options={"eos_token_id": eos}), **OPTIONS)
        assert torch.equal(answers[0].sequences, expected)
        assert answers[0].finish_reason == "eos"


@pytest.mark.parametrize("assistant_name", ["llama", "mistral", "gpt2"])
def test_an_assistant_drafts_for_all_in_packed_passes(assistant_name: str) -> None:
    """A copy of the model as its own assistant, and others, also one with a window on the way back."""
    stock = tiny("llama")
    model, assistant = twin(stock), tiny(assistant_name)
    assistant.generation_config.num_assistant_tokens = 5
    assistant.generation_config.assistant_confidence_threshold = 0.0
    asked = prompts([9, 31, 5, 14])
    with (
        torch_paged.paged(model, block_size=BLOCK) as handle,
        torch_paged.paged(assistant, block_size=BLOCK) as other,
        count_calls() as calls,
    ):
        answers, stats = run(model, asked, assistant_model=assistant, **(NO_EOS | {"max_new_tokens": 25}))
        assert handle.stats().blocks_used == other.stats().blocks_used == 0 < other.stats().peak_bytes
    assert calls["gather"] == stats.alone == 0
    for number, prompt in enumerate(asked):
        assert_answer(stock, prompt, answers[number], **(NO_EOS | {"max_new_tokens": 25}))
    if assistant_name == "llama":
        # One token from the prefill, then 6 from each pass over a token and its draft of 5.
        assert stats.drafts_accepted == stats.tokens_drafted == 4 * 20
        assert stats.forwards == 1 + 24 // 6


def test_an_assistant_is_left_when_its_rows_are() -> None:
    stock = tiny("llama")
    model, assistant = twin(stock), twin(stock)
    asked = prompts([9, 31, 5, 14, 8])
    with torch_paged.paged(assistant, block_size=BLOCK) as other:
        many = generate_many(model, asked, assistant_model=assistant, max_num_seqs=2, stream=True, **NO_EOS)
        many.cancel(2)
        answers = results(many)
        assert other.stats().blocks_used == 0
    assert answers[2].finish_reason == "cancelled"
    for number in (0, 1, 3, 4):
        assert_answer(stock, asked[number], answers[number], **NO_EOS)


def test_an_assistant_that_cannot_share_passes_is_refused() -> None:
    with pytest.raises(ValueError, match="assistant_model: DiffLlamaForCausalLM; must be"):
        generate_many(tiny("llama"), prompts([6]), assistant_model=tiny("diffllama"))
