"""Every way of decoding gives stock's tokens, whatever the batch: ragged rows of 1 to 64, prompts of one token."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import SynthIDTextWatermarkingConfig, WatermarkingConfig
from transformers.generation import stopping_criteria

import torch_paged

from .counting import watched
from .models import FAMILIES, NATIVE, PAD, assert_same_tokens, batch, generate, tiny, tiny_tokenizer

RAGGED = [40, 1, 23, 31]
ENDS = list(range(150, 211))
# What reaches the cache runs on every family; what only changes the scores, on one.
EVERYWHERE: dict[str, dict[str, Any]] = {
    "chunked prefill": {"prefill_chunk_size": 7},
    "chunked prefill of beams": {"prefill_chunk_size": 16, "num_beams": 3, "num_return_sequences": 3},
    "chunked prefill of samples": {"prefill_chunk_size": 7, "do_sample": True, "num_return_sequences": 2},
    "rows that end early": {"eos_token_id": ENDS},
    "samples that end early": {"do_sample": True, "num_return_sequences": 3, "eos_token_id": ENDS},
    "beams that stop early": {"num_beams": 3, "eos_token_id": list(range(190, 211)), "early_stopping": True},
    "beams that go on": {"num_beams": 3, "eos_token_id": list(range(200, 211)), "early_stopping": "never"},
    "short beams": {"num_beams": 2, "eos_token_id": list(range(200, 211)), "length_penalty": -1.0},
    "sampled beams": {"do_sample": True, "num_beams": 3, "num_return_sequences": 2, "top_k": 30},
    "guidance": {"guidance_scale": 1.5},
    "guided beams": {"guidance_scale": 0.7, "num_beams": 2},
}
SCORES: dict[str, dict[str, Any]] = {
    "repetition penalty": {"repetition_penalty": 1.6},
    "no repeated n-grams": {"no_repeat_ngram_size": 2, "num_beams": 2},
    "sequence bias": {"sequence_bias": [[[17], 8.0], [[17, 30], 8.0]]},
    "bad words": {"bad_words_ids": [[token] for token in range(5, 60)]},
    "suppressed tokens": {"suppress_tokens": list(range(60, 120)), "begin_suppress_tokens": list(range(120, 160))},
    "forced ends": {"forced_bos_token_id": 9, "forced_eos_token_id": 10},
    "at least": {"min_new_tokens": 6, "eos_token_id": list(range(50, 211))},
    "decaying length": {"exponential_decay_length_penalty": (2, 1.5), "eos_token_id": ENDS},
    "watermark": {"watermarking_config": WatermarkingConfig(bias=4.0)},
    "watermarked samples": {"do_sample": True, "watermarking_config": WatermarkingConfig(bias=2.0)},
    "synthid": {
        "do_sample": True,
        "watermarking_config": SynthIDTextWatermarkingConfig(ngram_len=3, keys=[654, 400, 836], context_history_size=8),
    },
    "top_k": {"do_sample": True, "top_k": 5},
    "top_p": {"do_sample": True, "top_p": 0.7},
    "top_h": {"do_sample": True, "top_h": 0.5},
    "min_p": {"do_sample": True, "min_p": 0.3},
    "typical": {"do_sample": True, "typical_p": 0.6},
    "epsilon": {"do_sample": True, "epsilon_cutoff": 0.05},
    "eta": {"do_sample": True, "eta_cutoff": 0.9},
    "renormalized": {"do_sample": True, "renormalize_logits": True, "top_k": 20},
    "guided samples": {"do_sample": True, "guidance_scale": 1.5},
}


@pytest.mark.parametrize(
    ("name", "mode"), [*itertools.product(FAMILIES, EVERYWHERE), *(("llama", mode) for mode in SCORES)]
)
def test_modes(name: str, mode: str) -> None:
    kwargs = {"max_new_tokens": 10} | (EVERYWHERE | SCORES)[mode]
    # A rounding must not decide a draw.
    model, inputs = tiny(name, torch.float64 if "do_sample" in kwargs else torch.float32), batch(RAGGED)
    expected = generate(model, inputs, **kwargs)
    with watched(model, native=name in NATIVE):
        actual = generate(model, inputs, **kwargs)
    assert torch.equal(actual, expected)
    assert "end early" not in mode or (expected[:, 40:] == PAD).any(), "no row ends before the others"
    assert mode not in SCORES or not torch.equal(expected, generate(model, inputs, **_plain(kwargs))), "changes nothing"


def _plain(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name in ("do_sample", "num_beams", "max_new_tokens")}


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("rows", [1, 2, 3, 17, 64])
@pytest.mark.parametrize("name", FAMILIES)
def test_batches(name: str, rows: int, num_beams: int) -> None:
    """The prompts have 1 to 40 tokens, the window 13."""
    model, inputs = tiny(name), batch([1 + 13 * row % 40 for row in range(rows)])
    kwargs = dict(num_beams=num_beams, max_new_tokens=8, eos_token_id=list(range(200, 211)))
    expected = generate(model, inputs, **kwargs)
    with watched(model, native=name in NATIVE):
        actual = generate(model, inputs, **kwargs)
    assert_same_tokens(model, expected, actual, prompt=inputs)


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_without_a_mask(name: str) -> None:
    model, inputs = tiny(name), {"input_ids": batch([20, 20])["input_ids"]}
    expected = generate(model, inputs)
    with watched(model, native=name in NATIVE):
        actual = generate(model, inputs)
    assert_same_tokens(model, expected, actual, prompt=inputs)


@pytest.mark.parametrize(
    ("max_time", "kwargs"),
    [(0.0, {}), (4.5, {}), (4.5, {"num_beams": 3}), (4.5, {"prompt_lookup_num_tokens": 3})],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_time_runs_out(name: str, max_time: float, kwargs: dict[str, Any]) -> None:
    """By a clock that goes on by a second whenever stock reads it: at the start and after every step."""
    model, inputs = tiny(name), batch([20] if "prompt_lookup_num_tokens" in kwargs else RAGGED)

    def run() -> torch.Tensor:
        clock = SimpleNamespace(time=itertools.count().__next__)
        with mock.patch.object(stopping_criteria, "time", clock):
            return generate(model, inputs, max_time=max_time, eos_token_id=None, **kwargs)

    expected = run()
    with watched(model, native=name in NATIVE):
        actual = run()
    assert_same_tokens(model, expected, actual, prompt=inputs)
    new, steps = expected.shape[1] - inputs["input_ids"].shape[1], 5 if max_time else 1
    # Of 24; a step of prompt lookup may give several.
    assert new == steps or ("prompt_lookup_num_tokens" in kwargs and steps < new < 24)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_stop_strings(num_beams: int) -> None:
    model, inputs, tokenizer = tiny("llama"), batch([20, 7]), tiny_tokenizer()
    ends = tokenizer.convert_tokens_to_string(tokenizer.convert_ids_to_tokens(generate(model, inputs)[0, 23:25]))
    kwargs = dict(stop_strings=[ends], tokenizer=tokenizer, num_beams=num_beams)
    expected = generate(model, inputs, **kwargs)
    assert num_beams > 1 or expected[0, 25] == PAD
    with watched(model):
        assert torch.equal(generate(model, inputs, **kwargs), expected)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "low"},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        {"num_beams": 2, "force_words_ids": [[5]]},
        {"max_new_tokens": 4, "prefill_chunk_size": 4, "use_cache": False},
        {"num_return_sequences": 2},
    ],
)
def test_what_stock_refuses_is_refused_in_its_words(kwargs: dict[str, Any]) -> None:
    model, inputs = tiny("llama"), batch([9])
    with pytest.raises(Exception) as stock:
        generate(model, inputs, **kwargs)
    with torch_paged.paged(model) as handle:
        with pytest.raises(type(stock.value)) as paged:
            generate(model, inputs, **kwargs)
        assert str(paged.value) == str(stock.value)
        assert handle.stats().blocks_used == 0
