"""What does not take turns row by row runs in waves when it does not fit: beams, and models that gather."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList, PreTrainedModel

from torch_paged import PoolExhausted

from .counting import count_tokens
from .models import VOCAB, assert_same_tokens, batch, generate, tiny, twin
from .raising import Raises
from .test_pressure import BLOCK_BYTES, LENGTHS, NEW, Scores, small

ENDS = list(range(190, VOCAB))
BEAMS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "several": {"num_beams": 3, "num_return_sequences": 2},
    "early": {"num_beams": 3, "eos_token_id": ENDS, "early_stopping": True},
    "never": {"num_beams": 2, "eos_token_id": ENDS, "early_stopping": "never"},
    "processors": {"num_beams": 2, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "allowed": {"num_beams": 2, "prefix_allowed_tokens_fn": lambda row, ids: list(range(20 * row + 3, 20 * row + 20))},
}


def peak_bytes(model: PreTrainedModel, inputs: dict[str, Any], options: dict[str, Any]) -> int:
    """With memory for all."""
    handle = small(model, 1000)
    generate(model, inputs, **options)
    return handle.stats().peak_bytes


@pytest.mark.parametrize("how", ["swap", "recompute"])
@pytest.mark.parametrize("kind", BEAMS)
@pytest.mark.parametrize("name", ["llama", "qwen2-sliding", "diffllama"])
def test_beams_of_prompts_that_do_not_fit_together(name: str, kind: str, how: str) -> None:
    stock = tiny(name)
    inputs, options = batch(LENGTHS), {"max_new_tokens": NEW, "eos_token_id": None} | BEAMS[kind]
    expected = generate(stock, inputs, **options)
    peak = peak_bytes(twin(stock), inputs, options)
    for share in (0.5, 0.75):
        model = twin(stock)
        handle = small(model, int(peak * share) // BLOCK_BYTES, on_pressure=how)
        with count_tokens(model) as tokens:
            assert_same_tokens(stock, expected, generate(model, inputs, **options), inputs)
        assert len(tokens) > NEW and handle.stats().blocks_used == 0
        if name != "qwen2-sliding":  # whose two pools have peaks at different times
            assert 0 < handle.stats().peak_bytes <= share * peak


def test_prompts_without_a_mask() -> None:
    stock, inputs = tiny("llama"), {"input_ids": batch([17, 17, 17])["input_ids"]}
    model, options = twin(stock), {"max_new_tokens": NEW, "eos_token_id": None, "num_beams": 2}
    handle = small(model, 30)
    assert_same_tokens(stock, generate(stock, inputs, **options), generate(model, inputs, **options), inputs)
    assert handle.stats().blocks_used == 0


def test_beams_of_one_prompt_that_do_not_fit() -> None:
    model = tiny("llama")
    handle = small(model, 14)
    with pytest.raises(PoolExhausted, match="raise max_memory"):
        generate(model, batch([30, 9]), num_beams=4, max_new_tokens=NEW, eos_token_id=None)
    with pytest.raises(PoolExhausted):
        small(model, 40, on_pressure="error")
        generate(model, batch(LENGTHS), num_beams=3, max_new_tokens=NEW, eos_token_id=None)
    assert handle.stats().blocks_used == 0


@pytest.mark.parametrize(
    "kwargs", [{}, {"do_sample": True, "top_k": 1}, {"eos_token_id": ENDS}], ids=["", "draws", "early"]
)
@pytest.mark.parametrize("name", ["diffllama", "xglm"])
def test_models_that_gather(name: str, kwargs: dict[str, Any]) -> None:
    stock = tiny(name)
    model, inputs = twin(stock), batch(LENGTHS)
    options = {"max_new_tokens": NEW, "eos_token_id": None} | kwargs
    expected = generate(stock, inputs, **options)
    peak = peak_bytes(twin(stock), inputs, options)
    handle = small(model, peak * 6 // 10 // BLOCK_BYTES)
    with count_tokens(model) as tokens:
        actual = generate(model, inputs, **options)
    assert_same_tokens(stock, expected, actual, inputs)
    assert handle.stats().peak_bytes < peak and len(tokens) > NEW
    assert handle.stats().blocks_used == 0


@pytest.mark.parametrize("kwargs", [{"num_beams": 3}, {}], ids=["beams", "rows"])
def test_an_exception_in_a_wave_leaks_nothing(kwargs: dict[str, Any]) -> None:
    stock = tiny("diffllama")
    model, inputs = twin(stock), batch(LENGTHS)
    options = {"max_new_tokens": NEW, "eos_token_id": None} | kwargs
    handle = small(model, peak_bytes(twin(stock), inputs, options) * 6 // 10 // BLOCK_BYTES)
    for at in (3, 12, 25):
        with pytest.raises(ZeroDivisionError):
            generate(model, inputs, logits_processor=LogitsProcessorList([Raises(at)]), **options)
        assert handle.stats().blocks_used == 0
    scores = Scores()
    actual = generate(model, inputs, logits_processor=LogitsProcessorList([scores]), **options)
    expected = generate(stock, inputs, logits_processor=LogitsProcessorList([Scores()]), **options)
    assert torch.equal(actual, expected) and min(scores.rows) < len(expected) * kwargs.get("num_beams", 1)
