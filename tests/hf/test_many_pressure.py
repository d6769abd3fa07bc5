"""generate_many with too little memory, errors, cancellations and time limits: nothing is lost, nothing is left."""

from __future__ import annotations

import threading
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import torch_paged
from torch_paged import GenerationRequest, GenerationResult, NewTokens, PoolExhausted, generate_many
from torch_paged.hf.many.room import Room

from .counting import count_tokens
from .many import BLOCK, BLOCK_BYTES, OPTIONS, admitting_all, assert_answer, prompts, results, run, stock_answer
from .models import tiny, twin
from .raising import Raises
from .test_threads import in_threads

NO_EOS: dict[str, Any] = OPTIONS | {"eos_token_id": None}


@pytest.mark.parametrize("name", ["llama", "qwen2-sliding"])
def test_more_requests_than_blocks_all_finish(name: str) -> None:
    """Room for the last tokens of about 2 of 9 requests."""
    stock = tiny(name)
    model = twin(stock)
    asked = prompts([9, 5, 17, 12, 3, 8, 11, 6, 14])
    knobs: dict[str, Any] = dict(block_size=BLOCK, max_memory=18 * BLOCK_BYTES, on_pressure="recompute")
    with torch_paged.paged(model, **knobs) as handle, admitting_all():
        options = NO_EOS | {"max_new_tokens": 24}
        answers, stats = run(model, asked, **options)
        assert handle.stats().blocks_used == 0
    assert stats.finished == 9 and stats.failed == 0
    assert stats.preemptions == sum(answer.num_preemptions for answer in answers.values()) > 0
    assert stats.tokens_prefilled > sum(map(len, asked))
    for number, prompt in enumerate(asked):
        assert_answer(stock, prompt, answers[number], **options)
    assert answers[0].num_preemptions == 0, "the request that has waited longest keeps its blocks"


def test_what_ends_first_makes_room_for_what_others_still_get() -> None:
    """Ends of 11, 6 and 6 blocks in 20: never all at once, so that the third need not wait for the second."""
    model = tiny("llama")
    wishes = [1, 40, 20, 20]  # The first one shows how large blocks are.
    requests = [
        GenerationRequest(prompt, options={"max_new_tokens": wish})
        for prompt, wish in zip(prompts([4] * 4), wishes, strict=True)
    ]
    with (
        torch_paged.paged(model, block_size=BLOCK, max_memory=20 * BLOCK_BYTES),
        mock.patch.object(Room, "share", 1.0),
    ):
        many = generate_many(
            model,
            requests,
            stream=True,
            max_num_seqs=4,
            max_num_batched_tokens=4,
            **(NO_EOS | {"max_new_tokens": None}),
        )
        events = list(many)
    began = next(i for i, e in enumerate(events) if isinstance(e, NewTokens) and e.request_id == 3)
    ended = next(i for i, e in enumerate(events) if isinstance(e, GenerationResult) and e.request_id == 2)
    assert began < ended and many.stats().preemptions == 0 and many.stats().finished == 4


def test_sampled_tokens_survive_a_preemption() -> None:
    stock = tiny("llama")
    model = twin(stock)
    options = NO_EOS | {"max_new_tokens": 24, "do_sample": True}
    requests = [GenerationRequest(prompt, seed=number) for number, prompt in enumerate(prompts([9, 5, 12, 7]))]
    with torch_paged.paged(model, block_size=BLOCK, max_memory=18 * BLOCK_BYTES):
        answers, stats = run(model, requests, **options)
    assert stats.preemptions > 0
    for number, request in enumerate(requests):
        assert torch.equal(answers[number].sequences, stock_answer(stock, request, **options))


def test_a_request_that_never_fits_fails_alone() -> None:
    stock = tiny("llama")
    model = twin(stock)
    asked = prompts([9, 61, 7])
    with torch_paged.paged(model, block_size=BLOCK, max_memory=12 * BLOCK_BYTES) as handle:
        answers, _ = run(model, asked, **NO_EOS)
        assert handle.stats().blocks_used == 0
    error = answers[1].error
    assert isinstance(error, PoolExhausted) and error.needed > error.free
    assert answers[1].finish_reason == "error"
    for number in (0, 2):
        assert_answer(stock, asked[number], answers[number], **NO_EOS)


def test_prompts_that_fit_one_by_one_where_prefixes_are_remembered() -> None:
    """The first pass finds too few blocks before there is anything to remember."""
    stock = tiny("llama")
    model = twin(stock)
    asked = prompts([21, 25, 17])
    knobs: dict[str, Any] = dict(block_size=BLOCK, max_memory=12 * BLOCK_BYTES, prefix_caching=True)
    with torch_paged.paged(model, **knobs) as handle:
        answers, _ = run(model, asked, **NO_EOS)
        assert handle.stats().blocks_used == handle.stats().blocks_cached
    for number, prompt in enumerate(asked):
        assert_answer(stock, prompt, answers[number], **NO_EOS)


def _too_long() -> GenerationRequest:
    return GenerationRequest(prompts([20])[0], options={"max_length": 20, "max_new_tokens": None})


BAD: dict[str, tuple[Any, type[Exception]]] = {
    "processor": (lambda: GenerationRequest(prompts([6])[0], logits_processor=[Raises()]), ZeroDivisionError),
    "later": (lambda: GenerationRequest(prompts([6])[0], logits_processor=[Raises(4)]), ZeroDivisionError),
    "criterion": (
        lambda: GenerationRequest(prompts([6])[0], stopping_criteria=[lambda ids, scores: 1 / 0]),
        ZeroDivisionError,
    ),
    "too long": (_too_long, ValueError),
    "vocabulary": (lambda: [5, 100000], ValueError),
    "empty": (list, ValueError),
    "shape": (lambda: torch.zeros(2, 3, dtype=torch.long), ValueError),
    "floats": (lambda: torch.zeros(3), TypeError),
    "config": (lambda: GenerationRequest(prompts([6])[0], options={"no_such_option": 3}), ValueError),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_an_error_is_the_result_of_its_request_alone(name: str, bad: str) -> None:
    stock = tiny(name)
    model = twin(stock)
    make, kind = BAD[bad]
    asked = [prompts([9])[0], make(), prompts([7])[0]]
    with torch_paged.paged(model, block_size=BLOCK) as handle:
        answers, stats = run(model, asked, max_num_seqs=2)
        assert handle.stats().blocks_used == 0
    assert isinstance(answers[1].error, kind) and answers[1].finish_reason == "error"
    assert (stats.finished, stats.failed) == (2, 1)
    for number in (0, 2):
        assert_answer(stock, asked[number], answers[number])
    if bad == "later":
        assert answers[1].new_tokens.shape == (1, 3)


def test_what_one_row_does_to_a_pass_is_its_own() -> None:
    """More positions than a model with learned ones has: the pass fails, and is run row by row."""
    stock = tiny("gpt2")
    model = twin(stock)
    asked = prompts([9, 505, 7])
    with torch_paged.paged(model, block_size=BLOCK) as handle:
        answers, _ = run(model, asked, **NO_EOS)
        assert handle.stats().blocks_used == 0
    assert isinstance(answers[1].error, IndexError)
    assert answers[1].sequences.shape[1] > 505
    for number in (0, 2):
        assert_answer(stock, asked[number], answers[number], **NO_EOS)


def test_requests_that_raise_stop_everything() -> None:
    model = tiny("llama")

    def broken() -> Any:
        yield prompts([6])[0]
        raise ZeroDivisionError("planted")

    with torch_paged.paged(model, block_size=BLOCK) as handle:
        with pytest.raises(ZeroDivisionError):
            list(generate_many(model, broken(), **NO_EOS))
        assert handle.stats().blocks_used == 0


def test_an_interrupt_leaves_nothing() -> None:
    model = tiny("llama")

    def interrupt(ids: Tensor, scores: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with torch_paged.paged(model, block_size=BLOCK) as handle:
        requests = [prompts([6])[0], GenerationRequest(prompts([9])[0], logits_processor=[interrupt])]
        with pytest.raises(KeyboardInterrupt):
            list(generate_many(model, requests, **NO_EOS))
        assert handle.stats().blocks_used == 0
        assert len(run(model, prompts([6]))[0]) == 1


def test_cancelled_requests_end_with_what_they_have() -> None:
    stock = tiny("llama")
    model = twin(stock)
    requests = [GenerationRequest(p, request_id=f"r{i}") for i, p in enumerate(prompts([9, 6, 12, 5]))]
    with torch_paged.paged(model, block_size=BLOCK) as handle:
        many = generate_many(model, requests, stream=True, max_num_seqs=2, **NO_EOS)
        many.cancel("r3")
        events: list[Any] = []
        for event in many:
            events.append(event)
            if sum(isinstance(e, NewTokens) and e.request_id == "r0" for e in events) == 3:
                many.cancel("r0")
        assert handle.stats().blocks_used == 0
    ends = results(events)
    assert [ends[f"r{i}"].finish_reason for i in range(4)] == ["cancelled", "length", "length", "cancelled"]
    assert ends["r0"].new_tokens.shape[1] in (3, 4)
    assert ends["r3"].new_tokens.shape[1] == 0
    expected = stock_answer(stock, requests[0], **NO_EOS)
    assert torch.equal(ends["r0"].sequences, expected[:, : ends["r0"].sequences.shape[1]])
    for number in (1, 2):
        assert_answer(stock, requests[number], ends[f"r{number}"], **NO_EOS)
    assert many.stats().cancelled == 2


@pytest.mark.parametrize("name", ["llama", "diffllama"])
def test_time_runs_out_for_one_request(name: str) -> None:
    model = tiny(name)
    requests = [
        GenerationRequest(prompts([6])[0], timeout=0.15, options={"max_new_tokens": 400}),
        GenerationRequest(prompts([7])[0], options={"max_new_tokens": 3}),
        GenerationRequest(prompts([8])[0], timeout=1e-9),
    ]
    with torch_paged.paged(model, block_size=BLOCK) as handle:
        answers, stats = run(model, requests, **NO_EOS)
        assert handle.stats().blocks_used == 0
    assert [answers[number].finish_reason for number in range(3)] == ["timeout", "length", "timeout"]
    assert 0 < answers[0].new_tokens.shape[1] < 400
    assert stats.timed_out == 2


def test_closing_gives_every_block_back() -> None:
    model = tiny("qwen2-sliding")
    with torch_paged.paged(model, block_size=BLOCK) as handle:
        for end in ("close", "with", "del"):
            many = generate_many(model, prompts([30, 20, 25]), stream=True, **NO_EOS)
            for _ in range(4):
                next(many)
            assert handle.stats().blocks_used > 0
            if end == "close":
                many.close()
            elif end == "with":
                with many:
                    next(many)
            else:
                del many
            assert handle.stats().blocks_used == 0


def test_a_model_that_is_unpatched_meanwhile_says_so() -> None:
    model = tiny("llama")
    torch_paged.patch(model, block_size=BLOCK)
    many = generate_many(model, prompts([6, 9]), stream=True, **NO_EOS)
    next(many)
    torch_paged.unpatch(model)
    with pytest.raises(RuntimeError, match="was unpatched"):
        list(many)


def test_two_threads_with_two_models() -> None:
    stocks = [tiny("llama"), tiny("qwen2-sliding")]
    models = [twin(stock) for stock in stocks]
    asked = prompts([9, 21, 5, 14])

    def work(model: PreTrainedModel) -> dict[Any, GenerationResult]:
        return run(model, asked, max_num_seqs=2)[0]

    for model in models:
        torch_paged.patch(model, block_size=BLOCK)
    for stock, answers in zip(stocks, in_threads([lambda m=m: work(m) for m in models]), strict=True):
        for number, prompt in enumerate(asked):
            assert_answer(stock, prompt, answers[number])


def test_generate_runs_beside_it() -> None:
    """The same model and pool: another thread's `generate`, and one between two results."""
    stock = tiny("llama")
    model = twin(stock)
    asked = prompts([9, 21, 5, 14])
    torch_paged.patch(model, block_size=BLOCK)
    beside: list[Tensor] = []
    thread = threading.Thread(target=lambda: beside.append(stock_answer(model, asked[1], **OPTIONS)))
    thread.start()
    answers = {}
    for result in generate_many(model, asked, max_num_seqs=2, **OPTIONS):
        assert isinstance(result, GenerationResult)
        answers[result.request_id] = result
        beside.append(stock_answer(model, asked[1], **OPTIONS))
    thread.join()
    for number, prompt in enumerate(asked):
        assert_answer(stock, prompt, answers[number])
    assert all(torch.equal(other, beside[0]) for other in beside)


@pytest.mark.parametrize("name", ["llama", "qwen2-sliding"])
def test_prefixes_are_shared_by_requests_of_the_same_salt(name: str) -> None:
    stock = tiny(name)
    model = twin(stock)
    system = prompts([33])[0]
    asked = [torch.cat([system, prompt]) for prompt in prompts([5, 8, 6])]
    with torch_paged.paged(model, block_size=BLOCK, prefix_caching=True) as handle:
        requests = [*asked, GenerationRequest(asked[0], salt="another")]
        with count_tokens(model) as tokens:
            answers, stats = run(model, requests, max_num_seqs=1, **NO_EOS)
        assert stats.tokens_saved == 2 * 32
        assert [answers[number].num_cached_tokens for number in range(4)] == [0, 32, 32, 0]
        prefilled = sum(map(len, asked)) + len(asked[0]) - stats.tokens_saved
        assert stats.tokens_prefilled == prefilled == sum(tokens) - 4 * 13
        used = handle.stats()
        assert used.blocks_used == used.blocks_cached > 0, "nobody but the index holds a block"
    for number, prompt in enumerate([*asked, asked[0]]):
        assert_answer(stock, prompt, answers[number], **NO_EOS)


@pytest.mark.parametrize("name", ["llama", "qwen2-sliding", "mistral"])
def test_a_long_prefix_is_remembered_whole_behind_a_window(name: str) -> None:
    """A question behind the same 60 tokens, which a window of 13 has left when the first prompt is computed."""
    stock = tiny(name)
    model = twin(stock)
    asked = [torch.cat([prompts([60])[0], question]) for question in prompts([40, 41])]
    with torch_paged.paged(model, block_size=BLOCK, prefix_caching=True, min_shared_prefix=0):
        answers, stats = run(model, asked, max_num_seqs=1, max_num_batched_tokens=16, **NO_EOS)
    assert answers[1].num_cached_tokens == stats.tokens_saved == 60
    for number, prompt in enumerate(asked):
        assert_answer(stock, prompt, answers[number], **NO_EOS)
