"""What callers bring along when rows are divided: processors of their own, embeddings, inputs that say nothing."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SynthIDTextWatermarkLogitsProcessor,
)

import torch_paged
from torch_paged import PoolExhausted
from torch_paged.hf.chosen import Chosen

from .models import VOCAB, assert_same_tokens, batch, generate, sharpen, tiny, tiny_t5, twin
from .test_families import _whisper
from .test_pressure import LENGTHS, NEW
from .test_sub_batches import BLOCK, DICT, ENDS, WATERMARK, embedded, hooked, peak_bytes, pressed


def watermark() -> LogitsProcessorList:
    return LogitsProcessorList([SynthIDTextWatermarkLogitsProcessor(**WATERMARK, sampling_table_seed=0, device="cpu")])


def test_a_processor_of_the_caller_sees_one_call_after_the_other() -> None:
    stock, inputs = tiny("llama"), batch(LENGTHS)
    model, theirs, ours = twin(stock), watermark(), watermark()
    options: dict[str, Any] = dict(max_new_tokens=NEW, eos_token_id=None)
    with torch_paged.paged(model, block_size=BLOCK):
        for _ in range(2):
            expected = generate(stock, inputs, logits_processor=theirs, **options)
            actual = generate(model, inputs, logits_processor=ours, **options)
            assert_same_tokens(stock, expected, actual, prompt=inputs)
    assert torch.equal(ours[0].state.context, theirs[0].state.context)


def test_a_processor_that_has_seen_rows_is_divided() -> None:
    stock, inputs = tiny("llama"), batch(LENGTHS)

    def options() -> dict[str, Any]:
        used = watermark()
        generate(stock, inputs, logits_processor=used, max_new_tokens=3)
        return dict(max_new_tokens=NEW, eos_token_id=None, logits_processor=used)

    expected, actual, attempts = pressed(stock, inputs, options)
    assert attempts > 2
    assert_same_tokens(stock, expected, actual, prompt=inputs)


def test_scores_that_nobody_wants_are_not_kept() -> None:
    kept: list[int] = []
    choose = Chosen.__call__

    def counting(chosen: Chosen, input_ids: Tensor, scores: Tensor) -> Tensor:
        out = choose(chosen, input_ids, scores)
        kept.append(len(chosen._scores))
        return out

    with mock.patch.object(Chosen, "__call__", counting):
        pressed(hooked(), batch(LENGTHS), lambda: dict(max_new_tokens=NEW, eos_token_id=None))
    assert kept and set(kept) == {0}


def test_embeddings_count_as_columns_of_rotary_frequencies() -> None:
    config = tiny("llama").config
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    config.max_position_embeddings = max(LENGTHS) + NEW - 1
    rotary, options = type(tiny("llama"))(config).eval(), dict(max_new_tokens=NEW, eos_token_id=None)
    peak = peak_bytes(rotary, embedded(), options)
    little = torch_paged.paged(rotary, block_size=BLOCK, max_memory=peak * 6 // 10)
    with little, pytest.raises(PoolExhausted, match="the longest row"):
        generate(rotary, embedded(), **options)


def test_whisper_is_not_divided_where_it_looks_for_speech() -> None:
    model, _ = _whisper()
    settings = model.generation_config
    settings.no_timestamps_token_id, settings.is_multilingual, settings.max_initial_timestamp_index = 150, False, None
    features = {"input_features": torch.randn(4, 8, 40, generator=torch.Generator().manual_seed(0))}
    options: dict[str, Any] = dict(
        no_speech_threshold=0.6, logprob_threshold=100.0, max_new_tokens=30, return_timestamps=True, temperature=0.0
    )
    with torch_paged.paged(model, block_size=BLOCK) as handle:
        model.generate(**features, **options)
        peak = handle.stats().peak_bytes
    with torch_paged.paged(model, block_size=BLOCK, max_memory=peak * 6 // 10) as handle:
        with pytest.raises(PoolExhausted, match="WhisperNoSpeechDetection remembers all of them"):
            model.generate(**features, **options)
        assert handle.stats().blocks_used == 0


@pytest.mark.parametrize("kwargs", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_states_of_an_encoder_are_those_of_the_prompts(kwargs: dict[str, Any]) -> None:
    options = DICT | kwargs | dict(output_hidden_states=True, output_attentions=True, max_new_tokens=NEW)
    expected, actual, attempts = pressed(tiny_t5(), batch(LENGTHS), lambda: options)
    assert attempts > 2
    for theirs, ours in zip(expected.encoder_hidden_states, actual.encoder_hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kwargs", [{"eos_token_id": ENDS}, DICT | {"eos_token_id": None}, {"num_beams": 2}], ids=str)
def test_text_for_a_model_of_images(kwargs: dict[str, Any]) -> None:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    text = dict(vocab_size=VOCAB, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(0)
    config = Qwen2VLConfig(
        text_config=text | dict(num_key_value_heads=2, max_position_embeddings=512, rope_parameters=rope),
        vision_config=dict(depth=1, embed_dim=32, hidden_size=64, num_heads=2),
        image_token_id=3, video_token_id=4, vision_start_token_id=5, vision_end_token_id=6,
    )  # fmt: skip
    stock = sharpen(Qwen2VLForConditionalGeneration(config).eval())
    inputs = batch(LENGTHS)
    expected, actual, attempts = pressed(stock, inputs, lambda: dict(max_new_tokens=NEW) | kwargs)
    assert attempts > 0
    expected, actual = (getattr(each, "sequences", each) for each in (expected, actual))
    assert_same_tokens(stock, expected, actual, prompt=inputs)
