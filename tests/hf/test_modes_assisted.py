"""Assisted decoding: candidates of another model, of the model's first layers or of the prompt, with stock's tokens.

In float64, but for a few: a rounding must not decide a draw, nor whether an assistant is confident enough to go on.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import PreTrainedModel
from transformers.generation.candidate_generator import AssistantVocabTranslatorCache

import torch_paged
from torch_paged import PagedCache

from .counting import watched
from .models import FAMILIES, NATIVE, WINDOW, assert_same_tokens, batch, generate, tiny, tiny_tokenizer

NEW = 16
MODES: dict[str, dict[str, Any]] = {"greedy": {}, "sampling": {"do_sample": True, "temperature": 0.7}}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("prompt", [1, 40])
@pytest.mark.parametrize("name", FAMILIES)
def test_both_models_paged(name: str, prompt: int, mode: str) -> None:
    """Blocks of one token: what leaves the window is gone at once, unless it is kept for a rejection."""
    model, assistant, inputs = tiny(name, torch.float64), _assistant(name), batch([prompt])
    kwargs = _kwargs(assistant) | MODES[mode]
    expected = generate(model, inputs, **kwargs)
    with watched(model, assistant, native=name in NATIVE, block_size=1), _crops() as crops:
        actual = generate(model, inputs, **kwargs)
    assert torch.equal(actual, expected)
    assert max(crops) == 0 > min(crops), "no candidate was right, or none wrong"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("patched", ["model", "assistant", "both"])
def test_any_of_two_families_paged(patched: str, mode: str) -> None:
    model, assistant, inputs = tiny("qwen2-sliding", torch.float64), _assistant("gpt2"), batch([20])
    kwargs = _kwargs(assistant) | MODES[mode]
    expected = generate(model, inputs, **kwargs)
    with watched(*{"model": [model], "assistant": [assistant], "both": [model, assistant]}[patched]):
        actual = generate(model, inputs, **kwargs)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "options",
    [
        {"num_assistant_tokens_schedule": "heuristic"},
        {"num_assistant_tokens_schedule": "heuristic_transient", "num_assistant_tokens": 1},
        {"num_assistant_tokens": 20, "assistant_confidence_threshold": 0.4},
    ],
)
def test_schedules_of_candidates(options: dict[str, Any], mode: str) -> None:
    model, inputs = tiny("llama", torch.float64), batch([20])

    def run(assistant: PreTrainedModel) -> tuple[torch.Tensor, int]:
        assistant.generation_config.update(**options)
        tokens = generate(model, inputs, **(_kwargs(assistant) | MODES[mode]))
        return tokens, assistant.generation_config.num_assistant_tokens

    # A schedule goes on where the last call left it: each run has an assistant of its own.
    expected, candidates = run(_assistant("llama"))
    assistant = _assistant("llama")
    with watched(model, assistant):
        actual, paged_candidates = run(assistant)
    assert torch.equal(actual, expected) and paged_candidates == candidates


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "options",
    [
        {"prompt_lookup_num_tokens": 4},
        {"prompt_lookup_num_tokens": 6, "max_matching_ngram_size": 1},
        {"assistant_early_exit": 1},
    ],
)
@pytest.mark.parametrize("name", ["llama", "qwen2-sliding"])
def test_candidates_without_an_assistant(name: str, options: dict[str, Any], mode: str) -> None:
    model, inputs = tiny(name, torch.float64), batch([8])
    inputs = {name: torch.cat([tensor] * 4, 1) for name, tensor in inputs.items()}
    kwargs = dict(max_new_tokens=NEW, eos_token_id=None, repetition_penalty=0.5) | options | MODES[mode]
    expected = generate(model, inputs, **kwargs)
    with watched(model, block_size=1), _crops() as crops:
        actual = generate(model, inputs, **kwargs)
    assert torch.equal(actual, expected)
    assert min(crops) < 0


@pytest.mark.parametrize("candidates", ["a model's", "another family's", "the prompt's"])
@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_in_float32(name: str, candidates: str) -> None:
    """Whichever candidates there are, greedy tokens are those of the model alone."""
    model, inputs = tiny(name), batch([30])
    if candidates == "the prompt's":
        inputs = {key: torch.cat([tensor[:, :10]] * 4, 1) for key, tensor in inputs.items()}
        kwargs = dict(max_new_tokens=NEW, eos_token_id=None, prompt_lookup_num_tokens=4)
    else:
        kwargs = _kwargs(_assistant(name if candidates == "a model's" else "qwen2", torch.float32))
    expected = generate(model, inputs, **kwargs)
    with watched(model, native=name in NATIVE), _crops() as crops:
        actual = generate(model, inputs, **kwargs)
    assert_same_tokens(model, expected, actual, prompt=inputs)
    assert_same_tokens(model, generate(model, inputs, max_new_tokens=NEW, eos_token_id=None), actual, prompt=inputs)
    assert min(crops) < 0


@pytest.mark.parametrize("mode", MODES)
def test_an_assistant_with_a_tokenizer_of_its_own(mode: str) -> None:
    model, inputs = tiny("llama", torch.float64), batch([20])
    # Some of its letters are not among the model's.
    tokenizers = dict(tokenizer=tiny_tokenizer(), assistant_tokenizer=tiny_tokenizer(first=80, size=150))
    # Stock prunes the assistant's head, once for each pair of tokenizers: each run has an assistant of its own.
    stock, assistant = _assistant("llama"), _assistant("llama")
    for one in (stock, assistant):
        one.resize_token_embeddings(150)

    def run(assistant: PreTrainedModel) -> torch.Tensor:
        with mock.patch.object(AssistantVocabTranslatorCache, "_cache", weakref.WeakKeyDictionary()):
            return generate(model, inputs, **(_kwargs(assistant) | MODES[mode] | tokenizers))

    expected = run(stock)
    with watched(model, assistant):
        assert torch.equal(run(assistant), expected)


@pytest.mark.parametrize("mode", MODES)
def test_everything_that_is_returned(mode: str) -> None:
    model, assistant, inputs = tiny("llama", torch.float64), _assistant("llama"), batch([20])
    kwargs = _kwargs(assistant) | MODES[mode] | dict(
        return_dict_in_generate=True, output_scores=True, output_logits=True, output_hidden_states=True
    )  # fmt: skip
    expected = dict(generate(model, inputs, **kwargs))
    with watched(model, assistant):
        actual = dict(generate(model, inputs, **kwargs))
        # The cache holds all tokens but the last, and the assistant's is gone.
        assert actual.pop("past_key_values").get_seq_length() == 20 + NEW - 1
    assert torch.equal(actual.pop("sequences"), expected.pop("sequences"))
    for kind, values in actual.items():
        torch.testing.assert_close(values, expected[kind])


def test_assistants_hold_the_window_and_their_candidates() -> None:
    """Both caches keep what left the window until the candidates are judged, and no longer."""
    model, inputs = tiny("mistral"), batch([60])
    assistant = _assistant("mistral", torch.float32)
    most = 0

    def held(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        nonlocal most
        if ids.shape[1] > 60 + NEW:
            most = max(most, *(handle.stats().blocks_used for handle in handles))
        return scores

    with watched(model, assistant, block_size=1) as handles:
        generate(model, inputs, **(_kwargs(assistant) | {"max_new_tokens": 3 * NEW, "logits_processor": [held]}))
    assert 0 < most <= WINDOW + 2 * 5


def test_batches_are_refused_in_stocks_words() -> None:
    model, inputs = tiny("llama"), batch([9, 4])
    with torch_paged.paged(model) as handle:
        with pytest.raises(ValueError, match="only supported for batch_size = 1"):
            generate(model, inputs, prompt_lookup_num_tokens=3)
        assert handle.stats().blocks_used == 0


def _assistant(name: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """The same weights with some noise: right often and wrong often."""
    assistant = tiny(name, dtype)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in assistant.parameters():
            if parameter.ndim > 1:
                parameter.add_(torch.randn_like(parameter) * 0.3 * parameter.std())
    assistant.generation_config.num_assistant_tokens = 5
    assistant.generation_config.assistant_confidence_threshold = 0.05
    return assistant


def _kwargs(assistant: PreTrainedModel) -> dict[str, Any]:
    return dict(assistant_model=assistant, max_new_tokens=NEW, eos_token_id=None)


@contextmanager
def _crops() -> Iterator[list[int]]:
    """What paged caches are asked to crop."""
    asked: list[int] = []
    crop = PagedCache.crop

    def recorded(cache: PagedCache, tokens_to_remove: int) -> None:
        asked.append(tokens_to_remove)
        crop(cache, tokens_to_remove)

    with mock.patch.object(PagedCache, "crop", recorded):
        yield asked
