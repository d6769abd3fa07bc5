"""What needs its rows from their beginning runs in sub-batches when it does not fit: stock's output, whole."""

from __future__ import annotations

import logging
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
)
from transformers.generation.streamers import BaseStreamer

import torch_paged
from torch_paged import PoolExhausted
from torch_paged.hf import pressure, turns
from torch_paged.hf.call import NeedsOwnAttention
from torch_paged.hf.sub_batches import Part, SubBatches

from .counting import messages
from .models import EOS, VOCAB, assert_same_tokens, batch, generate, tiny, tiny_t5, twin
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


def assert_close(expected: Any, actual: Any) -> None:
    """Tensors at every place of the same tuples."""
    if isinstance(expected, tuple):
        assert len(expected) == len(actual)
        for one, other in zip(expected, actual, strict=True):
            assert_close(one, other)
    else:
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kwargs", [{}, {"do_sample": True, "top_k": 1}], ids=["greedy", "draws"])
@pytest.mark.parametrize("name", ["llama", "qwen2-sliding", "gpt2", "diffllama", "jamba"])
def test_scores_and_logits_of_all_rows(name: str, kwargs: dict[str, Any]) -> None:
    stock, inputs = tiny(name), batch(LENGTHS)
    expected, actual, attempts = pressed(
        stock, inputs, lambda: DICT | dict(max_new_tokens=NEW, eos_token_id=None) | kwargs
    )
    assert attempts > 2
    assert torch.equal(expected.sequences, actual.sequences)
    assert type(actual) is type(expected) and actual.past_key_values is None
    assert_close(expected.scores, actual.scores)
    assert_close(expected.logits, actual.logits)


def test_steps_after_the_end_of_a_sub_batch_are_zeros() -> None:
    stock, inputs = tiny("llama"), batch(LENGTHS, seed=3)
    options = DICT | dict(max_new_tokens=NEW, eos_token_id=ENDS)
    expected, actual, _ = pressed(stock, inputs, lambda: options)
    assert torch.equal(expected.sequences, actual.sequences)
    zeros = 0
    for step, (one, other) in enumerate(zip(expected.logits, actual.logits, strict=True)):
        for row in range(len(LENGTHS)):
            tokens = expected.sequences[row, max(LENGTHS) : max(LENGTHS) + step]
            if not other[row].any():
                zeros += 1
                assert torch.isin(tokens, torch.tensor(ENDS)).any()
            else:
                torch.testing.assert_close(other[row], one[row], rtol=1e-4, atol=1e-4)
    assert zeros > 0


@pytest.mark.parametrize("what", ["output_hidden_states", "output_attentions"])
def test_hidden_states_and_attentions_of_all_rows(what: str) -> None:
    stock, inputs = tiny("llama", attn_implementation="eager"), batch([12] * 5)
    options = {"return_dict_in_generate": True, what: True, "max_new_tokens": NEW, "eos_token_id": None}
    expected, actual, attempts = pressed(stock, inputs, lambda: options)
    assert attempts > 1
    assert torch.equal(expected.sequences, actual.sequences)
    field = what.removeprefix("output_")
    assert_close(expected[field], actual[field])


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"num_return_sequences": 2},
        {"eos_token_id": ENDS, "early_stopping": True},
        {"eos_token_id": ENDS, "length_penalty": -1.0},
    ],
    ids=["", "several", "early", "short"],
)
def test_beams_with_their_scores_and_indices(kwargs: dict[str, Any]) -> None:
    stock, inputs = tiny("llama"), batch(LENGTHS)
    options = DICT | dict(num_beams=3, max_new_tokens=12, eos_token_id=None) | kwargs
    expected, actual, attempts = pressed(stock, inputs, lambda: options)
    assert attempts > 1
    assert torch.equal(expected.sequences, actual.sequences)
    assert torch.equal(expected.beam_indices, actual.beam_indices)
    torch.testing.assert_close(actual.sequences_scores, expected.sequences_scores)
    assert [each.shape for each in actual.scores] == [each.shape for each in expected.scores]
    scores = [
        stock.compute_transition_scores(result.sequences, result.scores, result.beam_indices)
        for result in (expected, actual)
    ]
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-4)


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


def ends_with_seven(ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
    return ids[:, -1] % 7 == 0


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
        lambda: tiny("llama"), lambda: batch(LENGTHS),
        lambda: {
            "watermarking_config": SynthIDTextWatermarkingConfig(**WATERMARK), "do_sample": True, "top_k": 1,
        },
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
        lambda: {"stopping_criteria": StoppingCriteriaList([ends_with_seven])},
    ),
    "criterion, processor": (
        lambda: tiny("llama"), lambda: batch(LENGTHS),
        lambda: {
            "stopping_criteria": StoppingCriteriaList([ends_with_seven]),
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
    assert attempts > (kind != "rope"), "the batch was never divided"
    assert torch.equal(expected, actual)


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


def test_samples_that_ran_out_are_not_drawn_anew() -> None:
    """Two rows that end at once or stay, each with its probability: both at once fit, and are not preferred for it."""
    stock = tiny("llama")
    model, rows, rounds = twin(stock), 2, 300
    inputs = {"input_ids": batch([9])["input_ids"].expand(rows, -1)}

    def ends_or_stays(ids: Tensor, scores: Tensor) -> Tensor:
        chosen = torch.full_like(scores, -torch.inf)
        chosen[:, 5] = 0.0
        if ids.shape[1] == 9:
            chosen[:, EOS] = 0.0
        return chosen

    options: dict[str, Any] = dict(max_new_tokens=8, do_sample=True, top_k=0, **DICT)
    # The shared prompt, and one more block for each row; two for one that stays.
    block_bytes = 3 * 2 * BLOCK * 2 * 16 * 4
    ended = 0
    with torch_paged.paged(model, block_size=BLOCK, max_memory=6 * block_bytes) as handle:
        for seed in range(rounds):
            processors = LogitsProcessorList([ends_or_stays])
            result = generate(model, inputs, seed=seed, logits_processor=processors, **options)
            assert all(torch.isneginf(scores).sum() >= VOCAB - 2 for scores in result.scores)
            assert result.scores[0][:, [5, EOS]].eq(0).all(), "scores are those before the choice"
            ended += int((result.sequences[:, 9] == EOS).sum())
            del result  # which holds blocks, where both rows fit
        assert handle.stats().blocks_used == 0
    share = ended / (rows * rounds)
    assert abs(share - 0.5) < 4 * (0.25 / (rows * rounds)) ** 0.5


def test_beams_that_ran_out_are_not_drawn_anew() -> None:
    """Sub-batches begin with what the whole batch had drawn, and go on from there."""
    stock, inputs, options = tiny("llama"), batch(LENGTHS), dict(max_new_tokens=12, eos_token_id=None, num_beams=3)
    tries: list[tuple[range, list[Tensor]]] = []
    of_part = SubBatches._beam_part

    def noted(self: SubBatches, part: Part) -> Any:
        try:
            return of_part(self, part)
        finally:
            assert part.beams is not None
            tries.append((part.rows, part.beams.steps))

    with mock.patch.object(SubBatches, "_beam_part", noted):
        expected, actual, attempts = pressed(stock, inputs, lambda: options | DICT | {"do_sample": True})
    assert attempts > 2 and actual.sequences.shape == expected.sequences.shape
    (_, whole), *parts = tries[1:]  # the first had memory for all
    assert 0 < len(whole) < 12 == len(parts[-1][1])
    for rows, steps in parts:
        for before, after in zip(whole, steps, strict=False):
            assert torch.equal(before[rows.start // 3 : rows.stop // 3], after)
    # The scores of a step are those of the beams that were drawn: they add up to that of the sequence.
    scores = stock.compute_transition_scores(actual.sequences, actual.scores, actual.beam_indices)
    length = (actual.beam_indices >= 0).sum(1)
    torch.testing.assert_close(scores.sum(1) / length, actual.sequences_scores, rtol=1e-4, atol=1e-4)


def test_the_user_hears_of_what_is_missing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "torch_paged"):
        pressed(hooked(), batch(LENGTHS), lambda: DICT | dict(max_new_tokens=NEW, eos_token_id=None))
    said = "\n".join(messages(caplog))
    assert "past_key_values is None" in said and "hooks see fewer rows" in said


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
