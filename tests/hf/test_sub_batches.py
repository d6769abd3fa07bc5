"""What needs its rows from their beginning runs in sub-batches when it does not fit: stock's output, whole."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
)
from transformers.generation.streamers import BaseStreamer

import torch_paged
from torch_paged import PoolExhausted
from torch_paged.hf import pressure, turns
from torch_paged.hf.call import NeedsOwnAttention
from torch_paged.hf.sub_batches import SubBatches

from .models import VOCAB, assert_same_tokens, batch, generate, tiny, tiny_t5, twin
from .raising import Raises
from .test_pressure import LENGTHS, NEW, Scores
from .test_row_hooks import adapted
from .test_threads import in_threads

BLOCK = 4
ENDS = list(range(190, VOCAB))
DICT: dict[str, Any] = dict(return_dict_in_generate=True, output_scores=True, output_logits=True)


def peak_bytes(model: PreTrainedModel, inputs: dict[str, Any], options: dict[str, Any]) -> int:
    """What the whole batch needs."""
    with torch_paged.paged(model, block_size=BLOCK) as handle:
        generate(model, inputs, **options)
        return handle.stats().peak_bytes


def pressed(
    stock: PreTrainedModel, inputs: dict[str, Any], options: Callable[[], dict[str, Any]], share: float = 0.6
) -> tuple[Any, Any, int]:
    """What stock gives, what a model with memory for a share of the batch gives, and how many attempts that took."""
    expected = generate(stock, inputs, **options())
    peak = peak_bytes(twin(stock), inputs, options())
    model = twin(stock)
    attempts = 0
    of_part, of_beams = SubBatches._sample_part, SubBatches._beam_part

    def counting(run: Any) -> Any:
        def counted(*args: Any) -> Any:
            nonlocal attempts
            attempts += 1
            return run(*args)

        return counted

    with (
        torch_paged.paged(model, block_size=BLOCK, max_memory=int(peak * share)) as handle,
        mock.patch.object(SubBatches, "_sample_part", counting(of_part)),
        mock.patch.object(SubBatches, "_beam_part", counting(of_beams)),
        mock.patch.object(pressure, "in_waves", counting(pressure.in_waves)),
    ):
        actual = generate(model, inputs, **options())
        assert 0 < handle.stats().peak_bytes <= peak * share
        assert handle.stats().blocks_used == 0
    return expected, actual, attempts


def _steer(module: Any, args: Any, output: Any) -> Any:
    hidden = output[0] if isinstance(output, tuple) else output
    return (hidden * 1.1, *output[1:]) if isinstance(output, tuple) else hidden * 1.1


def hooked() -> PreTrainedModel:
    model = tiny("llama")
    model.model.layers[1].register_forward_hook(_steer)
    return model


def right_padded() -> dict[str, Tensor]:
    inputs = batch(LENGTHS)
    for name, value in inputs.items():
        for row, length in enumerate(LENGTHS):
            value[row] = value[row].roll(length, dims=0)
        inputs[name] = value
    return inputs


def embedded() -> dict[str, Tensor]:
    inputs = batch(LENGTHS)
    ids = inputs.pop("input_ids")
    return inputs | {"inputs_embeds": tiny("llama").get_input_embeddings()(ids).detach()}


def wide_mask() -> dict[str, Tensor]:
    inputs = batch(LENGTHS)
    return inputs | {"attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 2), value=1)}


def own_positions() -> dict[str, Tensor]:
    inputs = batch(LENGTHS)
    return inputs | {"position_ids": 3 * (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)}


def long_rope() -> PreTrainedModel:
    """Frequencies that differ behind a length that this test does not reach."""
    model = tiny("llama")
    config = model.config
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    return type(model)(config).eval()


def ends_low(ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
    """Most rows at once, one of the second half after 15 tokens: till then stock goes on with all."""
    return ids[:, -1] < 95


WATERMARK: dict[str, Any] = dict(keys=[5, 9, 2, 7], ngram_len=3, context_history_size=64, sampling_table_size=256)
KINDS: dict[str, tuple[Callable[[], Any], Callable[[], Any], Callable[[], dict[str, Any]]]] = {
    "recurrent": (lambda: tiny("jamba"), lambda: batch(LENGTHS), dict),
    "recurrent, early": (lambda: tiny("jamba"), lambda: batch(LENGTHS), lambda: {"eos_token_id": ENDS}),
    "guidance": (lambda: tiny("llama"), lambda: batch(LENGTHS), lambda: {"guidance_scale": 1.5}),
    "guidance, negative": (
        lambda: tiny("llama"), lambda: batch(LENGTHS),
        lambda: {
            "guidance_scale": 1.5,
            "negative_prompt_ids": batch([5, 3, 7, 2, 4, 6], seed=3)["input_ids"],
            "negative_prompt_attention_mask": batch([5, 3, 7, 2, 4, 6], seed=3)["attention_mask"],
        },
    ),
    "right padding": (lambda: tiny("llama"), right_padded, dict),
    "hooks": (hooked, lambda: batch(LENGTHS), dict),
    "chunks": (lambda: tiny("llama"), lambda: batch(LENGTHS), lambda: {"prefill_chunk_size": 8}),
    "embeddings": (lambda: tiny("llama"), embedded, dict),
    "mask": (lambda: tiny("llama"), wide_mask, dict),
    "positions": (lambda: tiny("llama"), own_positions, dict),
    "rope": (long_rope, lambda: batch(LENGTHS), dict),
    "SynthID": (
        lambda: tiny("llama"),
        lambda: batch(LENGTHS),
        lambda: {"watermarking_config": SynthIDTextWatermarkingConfig(**WATERMARK)},
    ),
    "watermark": (
        lambda: tiny("llama"),
        lambda: batch(LENGTHS),
        lambda: {"watermarking_config": WatermarkingConfig(bias=6.0)},
    ),
    "n-grams of the prompt": (
        lambda: tiny_t5(), lambda: batch(LENGTHS), lambda: {"encoder_no_repeat_ngram_size": 1},
    ),
    "tokens of the prompt": (
        lambda: tiny_t5(), lambda: batch(LENGTHS), lambda: {"encoder_repetition_penalty": 1.5},
    ),
    "encoder-decoder": (lambda: tiny_t5(), lambda: batch(LENGTHS), dict),
    "encoder-decoder, beams": (
        lambda: tiny_t5(), lambda: batch(LENGTHS),
        lambda: {"num_beams": 3, "num_return_sequences": 2, "encoder_no_repeat_ngram_size": 2},
    ),
    "beams, recurrent": (lambda: tiny("jamba"), lambda: batch(LENGTHS), lambda: {"num_beams": 2}),
    "beams, hooks": (hooked, lambda: batch(LENGTHS), lambda: {"num_beams": 2}),
    "criterion": (
        lambda: tiny("llama"), lambda: batch(LENGTHS),
        lambda: {"stopping_criteria": StoppingCriteriaList([ends_low])},
    ),
    "criterion, processor": (
        lambda: tiny("llama"), lambda: batch(LENGTHS),
        lambda: {
            "stopping_criteria": StoppingCriteriaList([ends_low]),
            "logits_processor": LogitsProcessorList([Scores()]),
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_all_rows_come_to_their_end(kind: str) -> None:
    make, inputs, options = KINDS[kind]
    stock, given = make(), inputs()
    defaults = dict(max_new_tokens=NEW, eos_token_id=None)
    expected, actual, attempts = pressed(stock, given, lambda: defaults | options())
    assert attempts > (kind not in ("rope", "watermark")), "the batch was never divided"
    assert torch.equal(expected, actual)
    if options() and "prefill_chunk_size" not in options():
        assert not torch.equal(expected, generate(stock, given, **defaults)), "the option changes nothing"


def test_adapters_of_each_row() -> None:
    """PEFT's hooks know the adapter of each row of the batch."""
    model, inputs = adapted(), batch(LENGTHS)
    names = ["first", "second", "__base__", "second", "first", "__base__"]
    options: dict[str, Any] = dict(max_new_tokens=NEW, eos_token_id=None, adapter_names=names)
    expected = generate(model, inputs, **options)
    with torch_paged.paged(model, block_size=BLOCK) as handle:
        generate(model, inputs, **options)
        peak = handle.stats().peak_bytes
    with torch_paged.paged(model, block_size=BLOCK, max_memory=peak * 6 // 10) as handle:
        actual = generate(model, inputs, **options)
        assert handle.stats().blocks_used == 0
    assert torch.equal(expected, actual)


class _Streamer(BaseStreamer):  # type: ignore[misc]
    def __init__(self) -> None:
        self.got: list[list[int]] = []
        self.ends = 0

    def put(self, value: Tensor) -> None:
        self.got.append(value.flatten().tolist())

    def end(self) -> None:
        self.ends += 1


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"eos_token_id": ENDS}, DICT, {"guidance_scale": 1.5}],
    ids=["turns", "early", "dict", "guidance"],
)
def test_a_streamer_gets_every_token_once(kwargs: dict[str, Any]) -> None:
    stock, inputs = tiny("llama"), batch(LENGTHS)
    streamers: list[_Streamer] = []

    def options() -> dict[str, Any]:
        streamers.append(_Streamer())
        return dict(max_new_tokens=NEW, eos_token_id=None, streamer=streamers[-1]) | kwargs

    pressed(stock, inputs, options)
    expected, _, actual = streamers
    assert actual.got == expected.got and actual.ends == expected.ends == 1


def test_rows_begin_anew_where_turns_turn_out_to_need_the_models_own_attention() -> None:
    stock, inputs = tiny("llama"), batch(LENGTHS)
    left = 5
    packed_call = turns.packed_call

    def refuses(*args: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            raise NeedsOwnAttention("planted")
        return packed_call(*args)

    with mock.patch.object(turns, "packed_call", refuses):
        expected, actual, attempts = pressed(stock, inputs, lambda: dict(max_new_tokens=NEW, eos_token_id=None))
    assert attempts > 1 and left == 0
    assert torch.equal(expected, actual)


def test_a_recurrent_row_alone_waits_for_other_threads() -> None:
    stock = tiny("jamba")
    options: dict[str, Any] = dict(max_new_tokens=NEW, eos_token_id=None)
    prompts = [batch([12], seed=seed) for seed in range(3)]
    peak = peak_bytes(twin(stock), prompts[0], options)
    model = twin(stock)
    with torch_paged.paged(model, block_size=BLOCK, max_memory=peak * 3 // 2) as handle:
        results = in_threads([lambda inputs=inputs: generate(model, inputs, **options) for inputs in prompts])
        assert handle.stats().blocks_used == 0
    for inputs, actual in zip(prompts, results, strict=True):
        assert not isinstance(actual, Exception), actual
        assert_same_tokens(stock, generate(stock, inputs, **options), actual, inputs)


@pytest.mark.parametrize("at", [2, 9, 21, 40])
def test_an_exception_in_a_sub_batch_leaks_nothing(at: int) -> None:
    stock, inputs = tiny("jamba"), batch(LENGTHS)
    options: dict[str, Any] = dict(max_new_tokens=NEW, eos_token_id=None)
    peak = peak_bytes(twin(stock), inputs, options)
    model = twin(stock)
    with torch_paged.paged(model, block_size=BLOCK, max_memory=peak * 6 // 10) as handle:
        with pytest.raises(ZeroDivisionError):
            generate(model, inputs, logits_processor=LogitsProcessorList([Raises(at)]), **options)
        assert handle.stats().blocks_used == 0
        assert torch.equal(generate(model, inputs, **options), generate(stock, inputs, **options))


def test_what_is_not_divided_says_why() -> None:
    stock, inputs = tiny("llama"), batch(LENGTHS)
    options: dict[str, Any] = dict(max_new_tokens=NEW, eos_token_id=None)
    config = twin(stock).config
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    config.max_position_embeddings = 32
    rotary = type(stock)(config).eval()
    peak = peak_bytes(rotary, inputs, options)
    with torch_paged.paged(rotary, block_size=BLOCK, max_memory=peak * 6 // 10) as handle:
        with pytest.raises(PoolExhausted, match="raise max_memory.*the longest row") as caught:
            generate(rotary, inputs, **options)
        assert handle.stats().blocks_used == 0
    assert "longest row" in caught.value.undivided and caught.value.needed > caught.value.free
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    with torch_paged.paged(rotary, block_size=BLOCK, max_memory=peak // 10), pytest.raises(PoolExhausted) as caught:
        generate(rotary, batch([30]), **options)
    assert not caught.value.undivided


def test_the_cache_of_the_caller_holds_all_rows() -> None:
    model, inputs = tiny("llama"), batch(LENGTHS)
    cache = torch_paged.PagedCache(model.config, block_size=BLOCK, max_memory=20_000)
    with torch_paged.paged(model), pytest.raises(PoolExhausted, match="the cache that was passed"):
        generate(model, inputs, past_key_values=cache)
