"""generate_many against callers who do what one should not: it says so, and neither stops nor spoils the others."""

from __future__ import annotations

import gc
import time
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

import torch_paged
from torch_paged import GenerationRequest, generate_many

from .many import BLOCK, OPTIONS, assert_answer, prompts, results, run, stock_answer
from .models import tiny, tiny_t5, twin
from .test_threads import in_threads

NO_EOS: dict[str, Any] = OPTIONS | {"eos_token_id": None}


def first(**fields: Any) -> GenerationRequest:
    return GenerationRequest(prompts([6])[0], **fields)


WRONG: dict[str, tuple[Any, type[Exception]]] = {
    "none": (None, TypeError),
    "text": ("hello", TypeError),
    "mapping": ({"input_ids": [3]}, TypeError),
    "options": (first(options=None), TypeError),
    "options of ints": (first(options=[1, 2]), TypeError),
    "timeout": (first(timeout="soon"), TypeError),
    "nan": (first(timeout=float("nan")), ValueError),
    "salt": (first(salt=5), TypeError),
    "id": (first(request_id=[1]), TypeError),
    "seed": (first(seed="x"), Exception),
    "config": (first(generation_config={"max_new_tokens": 3}), Exception),
    "streamer": (first(streamer=3), AttributeError),
    "processors": (first(logits_processor=None), TypeError),
    "processor": (first(logits_processor=[None]), Exception),
    "criteria": (first(stopping_criteria=7), TypeError),
    "criterion": (first(stopping_criteria=[lambda ids: True]), Exception),
    "no tokens wanted": (first(options={"max_new_tokens": 0}), ValueError),
}


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_with_a_request_is_its_own(wrong: str, caching: bool) -> None:
    stock = tiny("llama")
    model = twin(stock)
    request, kind = WRONG[wrong]
    asked = [prompts([9])[0], request, prompts([7])[0]]
    with torch_paged.paged(model, block_size=BLOCK, prefix_caching=caching) as handle:
        answers, _ = run(model, asked)
        handle.flush()
        assert handle.stats().blocks_used == 0
    assert isinstance(answers[1].error, kind) and answers[1].finish_reason == "error"
    for number in (0, 2):
        assert_answer(stock, asked[number], answers[number])


@pytest.mark.parametrize("requests", [None, 5, GenerationRequest([3, 4])])
def test_requests_that_are_none_are_refused_at_once(requests: Any) -> None:
    with pytest.raises(TypeError, match="requests: .*; must be an iterable"):
        generate_many(tiny("llama"), requests)


@pytest.mark.parametrize("timeout", [0, -1, 0.0])
def test_no_time_is_a_timeout(timeout: float) -> None:
    answers, stats = run(tiny("llama"), [first(timeout=timeout), prompts([5])[0]])
    assert answers[0].finish_reason == "timeout" and stats.finished == 1


def test_cancel_ends_all_requests_of_that_name() -> None:
    requests = [GenerationRequest(p, request_id="same") for p in prompts([6, 9, 5])]
    many = generate_many(tiny("llama"), requests, stream=True, **NO_EOS)
    next(many)
    many.cancel("same")
    assert [result.finish_reason for result in many if isinstance(result, torch_paged.GenerationResult)] == [
        "cancelled"
    ] * 3


class Calls(BaseStreamer):  # type: ignore[misc]
    """A streamer that calls back at its n-th token."""

    def __init__(self, call: Any, at: int = 3) -> None:
        self._call, self._left = call, at

    def put(self, value: Tensor) -> None:
        self._left -= 1
        if self._left == 0:
            self._call()

    def end(self) -> None: ...


def test_a_streamer_may_close_what_it_streams_from() -> None:
    model = tiny("llama")
    with torch_paged.paged(model, block_size=BLOCK) as handle:
        many = generate_many(model, [first(streamer=Calls(lambda: many.close())), prompts([9])[0]], **NO_EOS)
        assert list(many) == []
        assert handle.stats().blocks_used == 0 and many.stats().forwards == 2


def test_a_streamer_that_asks_for_the_next_result_is_an_error_of_its_request() -> None:
    stock = tiny("llama")
    model, asked = twin(stock), prompts([9])[0]
    many = generate_many(model, [first(streamer=Calls(lambda: next(many))), asked], **NO_EOS)
    answers = results(many)
    assert isinstance(answers[0].error, RuntimeError) and "next result" in str(answers[0].error)
    assert_answer(stock, asked, answers[1], **NO_EOS)


def test_a_model_stays_patched_for_all_that_run() -> None:
    stock = tiny("llama")
    model, asked = twin(stock), prompts([9, 21, 5])
    cls = type(model)
    one = generate_many(model, asked, max_num_seqs=1, **NO_EOS)
    next(one)
    other = generate_many(model, asked, max_num_seqs=2, **NO_EOS)
    answers = [next(other)]
    list(one)
    assert type(model) is not cls
    for number, result in results([*answers, *other]).items():
        assert_answer(stock, asked[number], result, **NO_EOS)
    assert type(model) is cls


def test_a_patch_in_between_stays() -> None:
    model = tiny("llama")
    many = generate_many(model, prompts([9, 21]), max_num_seqs=1, **NO_EOS)
    next(many)
    handle = torch_paged.patch(model)
    list(many)
    assert handle.patched
    torch_paged.unpatch(model)


@pytest.mark.parametrize("patched", [False, True])
def test_threads_share_one_model(patched: bool) -> None:
    stock = tiny("qwen2-sliding")
    model, asked = twin(stock), prompts([9, 21, 5, 14, 30])
    if patched:
        torch_paged.patch(model, block_size=BLOCK)
    work = [lambda: run(model, asked, max_num_seqs=2, max_num_batched_tokens=16)[0] for _ in range(3)]
    for answers in in_threads(work):
        assert not isinstance(answers, Exception), answers
        for number, prompt in enumerate(asked):
            assert_answer(stock, prompt, answers[number])


def test_a_consumer_that_stops_frees_the_blocks() -> None:
    model = tiny("llama")
    with torch_paged.paged(model, block_size=BLOCK) as handle:
        for _ in generate_many(model, prompts([9, 21, 5]), stream=True, **NO_EOS):
            break
        assert handle.stats().blocks_used == 0


def test_the_cycle_collector_in_the_middle_of_an_edit() -> None:
    """It finds an iterator that nobody has any more: what this thread edits stays as it is, and all is free soon."""
    model = tiny("llama")
    cls = type(model)
    many: Any = generate_many(model, prompts([9, 21, 5]), stream=True, **NO_EOS)
    next(many)
    pools = many._engine._batch.handle._pools
    ring = [many]
    ring.append(ring)
    gone = weakref.ref(many)
    del many, ring
    (pool,) = pools._snapshot()
    with pools.lock:
        used = pool.allocator.num_used
        gc.collect()
        assert gone() is None and pool.allocator.num_used == used > 0
    until = time.monotonic() + 20
    while type(model) is not cls and time.monotonic() < until:
        time.sleep(0.01)
    assert type(model) is cls and pools.stats().blocks_used == 0


def test_tokens_of_an_encoder_decoder_are_the_decoders() -> None:
    stock = tiny_t5()
    model, asked = twin(stock), prompts([9, 4])
    options = OPTIONS | {"eos_token_id": None, "max_new_tokens": 6}
    answers, stats = run(model, asked, **options)
    for number, prompt in enumerate(asked):
        expected = stock_answer(stock, prompt, **options)
        assert torch.equal(answers[number].sequences, expected)
        assert torch.equal(answers[number].new_tokens, expected[:, 1:]) and answers[number].finish_reason == "length"
    assert stats.new_tokens == 12


def test_a_model_in_training_mode_runs_as_in_stock() -> None:
    stock = tiny("gpt2").train()
    model = twin(stock)
    requests = [GenerationRequest(p, seed=number) for number, p in enumerate(prompts([9, 4]))]
    answers, stats = run(model, requests, **NO_EOS)
    assert stats.alone == 2 and model.training
    for number, request in enumerate(requests):
        assert torch.equal(answers[number].sequences, stock_answer(stock, request, **NO_EOS))


def test_an_error_keeps_no_logits() -> None:
    """Its traceback begins where the caller's own code does."""

    def processor(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] == 8:
            raise ZeroDivisionError("planted")
        return scores

    answers, _ = run(tiny("llama"), [first(logits_processor=[processor]), prompts([5])[0]], **NO_EOS)
    error = answers[0].error
    assert isinstance(error, ZeroDivisionError) and error.__traceback__ is not None
    frames = []
    trace = error.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    assert frames[-1].f_code is processor.__code__
    assert not any("torch_paged/hf/" in frame.f_code.co_filename for frame in frames)
