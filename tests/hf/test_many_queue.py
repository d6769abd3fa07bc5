"""generate_many over a queue that others fill: what runs never waits for it, and what waits for it does nothing."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from typing import Any
from unittest import mock

import pytest

import torch_paged
from torch_paged import GenerationRequest, GenerationResult, NewTokens, generate_many
from torch_paged.hf.many.engine import Engine

from .many import BLOCK, OPTIONS, assert_answer, prompts, results
from .models import tiny, twin
from .raising import Raises

NO_EOS: dict[str, Any] = OPTIONS | {"eos_token_id": None}
LIMIT = 60


@pytest.mark.parametrize("kind", [queue.Queue, queue.SimpleQueue, queue.LifoQueue])
@pytest.mark.parametrize("name", ["llama", "diffllama"])
def test_requests_come_from_a_queue_until_none(name: str, kind: Any) -> None:
    stock = tiny(name)
    model, asked, requests = twin(stock), prompts([9, 21, 5]), kind()
    for request in [None, *reversed(asked)] if kind is queue.LifoQueue else [*asked, None]:
        requests.put(request)
    answers = results(generate_many(model, requests, max_num_seqs=2, **NO_EOS))
    for number, prompt in enumerate(asked):
        assert_answer(stock, prompt, answers[number], **NO_EOS)


def test_what_runs_goes_on_while_the_queue_is_empty() -> None:
    """And a request that comes meanwhile begins beside it, in the next pass."""
    stock = tiny("llama")
    model, (first, second) = twin(stock), prompts([9, 21])
    requests: queue.Queue[Any] = queue.Queue()
    requests.put(first)
    with torch_paged.paged(model, block_size=BLOCK) as handle:
        many = generate_many(model, requests, stream=True, **NO_EOS)
        events = [next(many) for _ in range(5)]
        assert [type(event) for event in events] == [NewTokens] * 5
        requests.put(second)
        requests.put(None)
        events += many
        assert handle.stats().blocks_used == 0
    begun = next(i for i, event in enumerate(events) if event.request_id == 1)
    assert begun <= 5 + 2 and isinstance(events[-1], GenerationResult)
    for number, prompt in enumerate((first, second)):
        assert_answer(stock, prompt, results(events)[number], **NO_EOS)


def test_an_idle_loop_waits_and_takes_what_comes() -> None:
    stock = tiny("llama")
    model, asked = twin(stock), prompts([9, 5])
    requests: queue.Queue[Any] = queue.Queue()
    steps, step = 0, Engine.step

    def counted(self: Engine) -> Any:
        nonlocal steps
        steps += 1
        return step(self)

    def fill() -> None:
        for request in (*asked, None):
            time.sleep(0.5)
            requests.put(request)

    with mock.patch.object(Engine, "step", counted):
        filler = threading.Thread(target=fill)
        filler.start()
        answers = results(generate_many(model, requests, **NO_EOS))
        filler.join()
    # 14 passes for each answer, and a look every tenth of a second.
    assert steps < 2 * 14 + 40
    for number, prompt in enumerate(asked):
        assert_answer(stock, prompt, answers[number], **NO_EOS)


def test_a_loop_that_waits_can_be_closed() -> None:
    model = tiny("llama")
    cls = type(model)
    many = generate_many(model, queue.Queue(), **NO_EOS)
    closing = threading.Timer(0.3, many.close)
    closing.start()
    start = time.monotonic()
    assert list(many) == []
    assert time.monotonic() - start < LIMIT and type(model) is cls


def test_errors_and_cancellations_leave_the_loop_running() -> None:
    stock = tiny("llama")
    model, asked = twin(stock), prompts([9, 5, 12])
    requests: queue.Queue[Any] = queue.Queue(maxsize=4)
    requests.put(GenerationRequest(asked[0], logits_processor=[Raises(3)]))
    requests.put([])
    requests.put(GenerationRequest(asked[1], request_id="gone"))
    many = generate_many(model, requests, max_num_seqs=1, **NO_EOS)
    many.cancel("gone")
    ends = {result.request_id: result.finish_reason for result in [next(many) for _ in range(3)]}  # type: ignore[union-attr]
    assert ends == {0: "error", 1: "error", "gone": "cancelled"}
    requests.put(asked[2])
    assert_answer(stock, asked[2], next(many), **NO_EOS)  # type: ignore[arg-type]
    requests.put(None)
    assert list(many) == []


@pytest.mark.parametrize("requests", [asyncio.Queue(), 3, None], ids=["asyncio", "number", "none"])
def test_what_is_no_queue_is_refused(requests: Any) -> None:
    with pytest.raises(TypeError, match=r"must be an iterable of requests or prompts, or a queue\.Queue"):
        generate_many(tiny("llama"), requests)
