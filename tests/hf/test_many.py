"""generate_many: every request gets what stock's `generate` gives for it alone, from shared forward passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import torch_paged
from torch_paged import GenerationRequest, GenerationResult, NewTokens, generate_many

from .counting import count_calls, count_tokens
from .many import BLOCK, OPTIONS, assert_answer, prompts, results, run, stock_answer
from .models import EOS, PAD, generate, tiny, tiny_t5, tiny_tokenizer, twin

LENGTHS = [31, 6, 18, 3, 45, 1]


@pytest.mark.parametrize("name", ["llama", "qwen2-sliding", "mistral", "gpt2", "opt", "bloom", "gemma2", "gpt_oss"])
def test_greedy_tokens_are_those_of_stock(name: str) -> None:
    stock = tiny(name)
    model = twin(stock)
    asked = prompts(LENGTHS)
    with torch_paged.paged(model, block_size=BLOCK) as handle, count_calls() as calls:
        answers, stats = run(model, asked, max_num_seqs=4, max_num_batched_tokens=16)
        assert handle.stats().blocks_used == 0 < handle.stats().peak_bytes
    assert calls["gather"] == stats.alone == 0 < calls["paged.attention"]
    assert stats.mixed_forwards > 0
    for number, prompt in enumerate(asked):
        assert_answer(stock, prompt, answers[number])


def test_tokens_are_computed_once_in_passes_of_bounded_size() -> None:
    """Prompts of 1 to 45 tokens in chunks, beside decode steps: the fewest passes that so many tokens allow."""
    model, asked = tiny("llama"), prompts(LENGTHS)
    with torch_paged.paged(model, block_size=BLOCK), count_tokens(model) as tokens:
        answers, stats = run(model, asked, eos_token_id=None, max_num_batched_tokens=64, max_num_seqs=6)
    new = OPTIONS["max_new_tokens"]
    assert sum(tokens) == sum(LENGTHS) + len(LENGTHS) * (new - 1)
    assert tokens[0] == 64 == max(tokens)
    # 104 prompt tokens take 2 passes; requests that were complete in the first one end one pass earlier.
    assert len(tokens) == stats.forwards == new + 1
    assert stats.mixed_forwards == 1
    assert stats.tokens_prefilled == sum(LENGTHS)
    assert stats.new_tokens == len(LENGTHS) * new == sum(answer.new_tokens.numel() for answer in answers.values())


def test_rows_that_end_make_room_for_requests_that_wait() -> None:
    model = tiny("llama")
    wishes = [3, 9, 5, 7, 4]
    requests = [
        GenerationRequest(p, options={"max_new_tokens": n}) for p, n in zip(prompts([5] * 5), wishes, strict=True)
    ]
    with torch_paged.paged(model, block_size=BLOCK) as handle:
        many = generate_many(model, requests, max_num_seqs=2, **(OPTIONS | {"eos_token_id": None}))
        assert [result.request_id for result in many if isinstance(result, GenerationResult)] == [0, 2, 1, 4, 3]
        # Prompts of 5 tokens and answers of 9, 2 at once.
        assert handle.stats().peak_bytes <= 2 * 4 * BLOCK * 3 * 2 * 2 * 16 * 4
    assert many.stats().forwards == max(3 + 5 + 7, 9 + 4)


def test_requests_are_taken_as_there_is_room() -> None:
    model, taken = tiny("llama"), []

    def endless() -> Any:
        number = 0
        while True:
            taken.append(number)
            yield GenerationRequest([number % 200 + 3] * 4, options={"max_new_tokens": 3})
            number += 1

    with torch_paged.paged(model, block_size=BLOCK) as handle:
        many = generate_many(model, endless(), max_num_seqs=2, eos_token_id=None, pad_token_id=PAD)
        assert taken == []
        for seen in range(1, 9):
            next(many)
            assert len(taken) <= seen + 3
        many.close()
        assert handle.stats().blocks_used == 0
    with pytest.raises(StopIteration):
        next(many)


SAMPLING: list[dict[str, Any]] = [
    {"do_sample": True},
    {"do_sample": True, "temperature": 0.6, "top_k": 30, "top_p": 0.9},
    {"do_sample": True, "temperature": 0.6, "top_k": 30, "top_p": 0.9},
    {"do_sample": True, "min_p": 0.02, "typical_p": 0.95},
    {"do_sample": True, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    {"repetition_penalty": 1.3, "min_new_tokens": 4, "bad_words_ids": [[7], [8, 9]]},
    {"do_sample": True, "guidance_scale": 1.5},
    {"forced_eos_token_id": EOS, "max_new_tokens": 5},
    {},
]


@pytest.mark.parametrize("name", ["llama", "qwen2-sliding"])
def test_every_request_has_its_own_config_and_seed(name: str) -> None:
    stock = tiny(name)
    model = twin(stock)
    requests = [
        GenerationRequest(prompt, options=options, seed=11 + number)
        for number, (prompt, options) in enumerate(zip(prompts([9, 4, 17, 6, 12, 8, 5, 7, 10]), SAMPLING, strict=True))
    ]
    before = torch.get_rng_state()
    with torch_paged.paged(model, block_size=BLOCK):
        answers, stats = run(model, requests)
        assert torch.equal(torch.get_rng_state(), before), "other draws of the process are what they were"
    assert stats.alone == 0
    for number, request in enumerate(requests):
        assert answers[number].error is None, answers[number].error
        assert torch.equal(answers[number].sequences, stock_answer(stock, request, **OPTIONS)), SAMPLING[number]


def test_requests_without_a_seed_draw_one_from_torch() -> None:
    model, asked = tiny("llama"), prompts([9, 4])

    def once() -> list[list[int]]:
        torch.manual_seed(3)
        answers, _ = run(model, asked, do_sample=True)
        return [answers[number].sequences.tolist() for number in range(2)]

    assert once() == once()


def test_configs_merge_as_in_generate() -> None:
    stock = tiny("llama")
    stock.generation_config = GenerationConfig(
        max_new_tokens=5, pad_token_id=PAD, eos_token_id=None, repetition_penalty=1.2
    )
    model = twin(stock)
    requests = [
        GenerationRequest(prompts([8])[0]),
        GenerationRequest(prompts([9])[0], generation_config=GenerationConfig(max_new_tokens=3)),
        GenerationRequest(
            prompts([7])[0], generation_config=GenerationConfig(max_length=11), options={"min_length": 9}
        ),
    ]
    answers = results(generate_many(model, requests))
    for number, request in enumerate(requests):
        assert torch.equal(answers[number].sequences, stock_answer(stock, request))
        assert answers[number].request is request
        assert answers[number].finish_reason == "length"
    assert len(answers[1].new_tokens[0]) == 3


class StopAt(StoppingCriteria):  # type: ignore[misc]
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        assert input_ids.shape[0] == 1
        return torch.full((1,), input_ids.shape[1] >= self.length)


def test_criteria_and_stop_strings_end_their_own_request() -> None:
    stock = tiny("llama")
    model, tokenizer = twin(stock), tiny_tokenizer()
    first = stock_answer(stock, prompts([6])[0], **OPTIONS)
    text = tokenizer.decode(first[0, 9:11])
    requests = [
        GenerationRequest(prompts([6])[0], options={"stop_strings": [text]}, tokenizer=tokenizer),
        GenerationRequest(prompts([8])[0], stopping_criteria=[StopAt(13)]),
        GenerationRequest(prompts([7])[0]),
        GenerationRequest(prompts([6])[0], options={"eos_token_id": [int(first[0, 8]), 5]}),
        GenerationRequest(prompts([5])[0], prefix_allowed_tokens_fn=lambda row, ids: [3 + len(ids) % 5, 9]),
    ]
    answers, _ = run(model, requests)
    for number, request in enumerate(requests):
        assert torch.equal(answers[number].sequences, stock_answer(stock, request, **OPTIONS))
    assert [answers[number].finish_reason for number in range(5)] == ["stop", "stop", "length", "eos", "length"]


def test_scores_and_logits_where_they_are_asked_for() -> None:
    stock = tiny("llama")
    model = twin(stock)
    options = dict(return_dict_in_generate=True, output_scores=True, output_logits=True, repetition_penalty=1.5)
    requests = [GenerationRequest(prompts([6])[0], options=options), GenerationRequest(prompts([9])[0])]
    answers, _ = run(model, requests)
    expected = stock_answer(stock, requests[0], **OPTIONS)
    assert torch.equal(answers[0].sequences, expected.sequences)
    for ours, stocks in ((answers[0].scores, expected.scores), (answers[0].logits, expected.logits)):
        assert ours is not None and len(ours) == len(stocks)
        for actual, wanted in zip(ours, stocks, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)
    assert answers[1].scores is answers[1].logits is None


class Streamer(BaseStreamer):  # type: ignore[misc]
    def __init__(self) -> None:
        self.put_values: list[list[Any]] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.put_values.append(value.tolist())

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("name", ["llama", "diffllama"])
def test_tokens_stream_as_they_come(name: str) -> None:
    stock = tiny(name)
    model, streamer, stocks = twin(stock), Streamer(), Streamer()
    asked = prompts([6, 9])
    requests = [GenerationRequest(asked[0], streamer=streamer), GenerationRequest(asked[1])]
    events = list(generate_many(model, requests, stream=True, **OPTIONS))
    for number, prompt in enumerate(asked):
        mine = [event for event in events if event.request_id == number]
        assert isinstance(mine[-1], GenerationResult)
        told = [token for event in mine[:-1] if isinstance(event, NewTokens) for token in event.tokens]
        assert (
            told == mine[-1].new_tokens[0].tolist() == stock_answer(stock, prompt, **OPTIONS)[0, len(prompt) :].tolist()
        )
    if name == "llama":
        assert [event.request_id for event in events[:4]] == [0, 1, 0, 1]
    stock_answer(stock, asked[0], streamer=stocks, **OPTIONS)
    assert streamer.put_values == stocks.put_values and streamer.ended == 1


ALONE: list[dict[str, Any]] = [
    {"num_beams": 3},
    {"do_sample": True, "num_return_sequences": 3},
    {"use_cache": False},
    {"return_dict_in_generate": True, "output_hidden_states": True},
]


def test_requests_that_are_batches_of_their_own_run_alone() -> None:
    stock = tiny("llama")
    model = twin(stock)
    asked = prompts([6, 9, 12, 5, 8])
    requests = [GenerationRequest(p, options=o, seed=4) for p, o in zip(asked, [*ALONE, {}], strict=True)]
    with torch_paged.paged(model, block_size=BLOCK) as handle:
        answers, stats = run(model, requests)
        assert handle.stats().blocks_used == 0
    assert stats.alone == 4
    for number, request in enumerate(requests):
        expected = stock_answer(stock, request, **OPTIONS)
        expected = expected if isinstance(expected, Tensor) else expected.sequences
        assert torch.equal(answers[number].sequences, expected)


@pytest.mark.parametrize("name", ["diffllama", "mamba", "jamba", "xglm", "t5"])
def test_models_whose_rows_cannot_share_passes_run_one_by_one(name: str, caplog: pytest.LogCaptureFixture) -> None:
    stock = tiny_t5() if name == "t5" else tiny(name)
    model, asked = twin(stock), prompts([6, 9])
    options = OPTIONS | {"eos_token_id": None, "max_new_tokens": 6}
    answers, stats = run(model, asked, **options)
    assert stats.alone == 2
    for number, prompt in enumerate(asked):
        assert torch.equal(answers[number].sequences, stock_answer(stock, prompt, **options))
    assert any(type(stock).__name__ in text and "one by one" in text for text in caplog.messages)


def test_a_model_is_patched_for_as_long_as_it_runs() -> None:
    model = tiny("llama")
    cls = type(model)
    many = generate_many(model, prompts([6]), **OPTIONS)
    next(many)
    assert type(model) is cls, "the last result is there"
    many = generate_many(model, prompts([6, 5]), max_num_seqs=1, **OPTIONS)
    next(many)
    assert type(model) is not cls
    del many
    assert type(model) is cls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2-sliding", "gemma2"])
def test_deterministic_logits_do_not_depend_on_the_batch(name: str, dtype: torch.dtype) -> None:
    model = tiny(name, dtype)
    options = OPTIONS | dict(return_dict_in_generate=True, output_logits=True, eos_token_id=None)
    asked = prompts([40, 7, 23, 61, 3])
    with torch_paged.paged(model, block_size=BLOCK):
        options |= dict(deterministic=True, max_num_batched_tokens=32, max_num_seqs=5)
        together, stats = run(model, asked, **options)
        assert stats.mixed_forwards > 0
        for number, prompt in enumerate(asked):
            alone = run(model, [prompt], **options)[0][0]
            assert torch.equal(together[number].sequences, alone.sequences)
            ours, others = together[number].logits, alone.logits
            assert ours is not None and others is not None
            assert all(torch.equal(a, b) for a, b in zip(ours, others, strict=True))


@pytest.mark.parametrize("name", ["llama", "qwen2-sliding"])
def test_deterministic_logits_do_not_depend_on_what_was_remembered(name: str) -> None:
    """The next turn of a chat whose answer was decoded, and a prompt of which another call has computed all but one."""
    model, asked = tiny(name), prompts([65])[0]
    options = OPTIONS | dict(return_dict_in_generate=True, output_logits=True, eos_token_id=None, deterministic=True)
    options |= dict(max_num_batched_tokens=32, max_num_seqs=5, max_new_tokens=40)
    with torch_paged.paged(model, block_size=BLOCK, prefix_caching=True) as handle:
        alone = run(model, [asked], **options)[0][0]
        turn = torch.cat([alone.sequences[0], asked[:7]])
        cold = run(model, [turn], **options)[0][0]
        generate(model, {"input_ids": asked[None]}, max_new_tokens=2)
        generate(model, {"input_ids": turn[None]}, max_new_tokens=2)
        assert handle.stats().blocks_cached > 0
        for prompt, before in ((asked, alone), (turn, cold)):
            after = run(model, [prompt], **options)[0][0]
            assert before.logits is not None and after.logits is not None
            assert all(torch.equal(a, b) for a, b in zip(before.logits, after.logits, strict=True))


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs: 0; must be an int, at least 1"),
        ({"max_num_batched_tokens": 63}, "max_num_batched_tokens: 63; must be an int, at least 64"),
        ({"timeout": 0}, "timeout: 0; must be more than 0"),
    ],
)
def test_rejects(kwargs: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        generate_many(tiny("llama"), [], **kwargs)


def test_no_requests() -> None:
    assert list(generate_many(tiny("llama"), [])) == []


def test_progress_is_shown_where_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny("llama")
    run(model, prompts([6, 9]), progress=True)
    assert "2/2" in capsys.readouterr().err
    run(model, prompts([6, 9]))
    assert capsys.readouterr().err == ""
