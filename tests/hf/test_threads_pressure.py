"""Threads whose calls do not fit side by side wait for one another's blocks: all finish, none waits for ever."""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

import torch_paged
from torch_paged import PagedHandle, PoolExhausted, generate_many
from torch_paged.hf import line

from . import many as requests
from .models import assert_same_tokens, batch, generate, tiny, twin
from .raising import Raises
from .test_pressure import small

NEW = 20
OPTIONS: dict[str, Any] = dict(max_new_tokens=NEW, eos_token_id=None)
LIMIT = 120


def at_once(*jobs: Callable[[], Any]) -> list[Any]:
    """What each job returns or raises, all run at once; a job that does not come to its end is an error here."""
    results: list[Any] = [TimeoutError] * len(jobs)

    def run(number: int) -> None:
        try:
            results[number] = jobs[number]()
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert TimeoutError not in results, results
    return results


def assert_nothing_held(handle: PagedHandle) -> None:
    stats = handle.stats()
    assert stats.blocks_used == stats.blocks_cached
    handle.flush()
    assert handle.stats().blocks_used == 0


class _Streamer(BaseStreamer):  # type: ignore[misc]
    def put(self, value: Any) -> None: ...

    def end(self) -> None: ...


class Own:
    """A processor of the caller's own, of which nobody knows what it looks at."""

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        return scores.roll(1, dims=-1)


KINDS: dict[str, Callable[[], dict[str, Any]]] = {
    "greedy": dict,
    "scores": lambda: {"output_scores": True, "return_dict_in_generate": True},
    "beams": lambda: {"num_beams": 2},
    "streamer": lambda: {"streamer": _Streamer()},
    "processor": lambda: {"logits_processor": LogitsProcessorList([Own()])},
    "lookup": lambda: {"prompt_lookup_num_tokens": 2},
}


@pytest.mark.parametrize("how", ["swap", "recompute"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "qwen2-sliding"])
def test_single_rows_wait_for_one_another(name: str, kind: str, how: str) -> None:
    """Four prompts whose answers need 10 blocks each, of 13 there are; twice as many where layers are in two pools."""
    stock = tiny(name)
    model = twin(stock)
    prompts = [batch([21], seed=seed) for seed in range(4)]
    handle = small(model, 26 if kind == "beams" else 13, on_pressure=how)

    def tokens(model: Any, inputs: dict[str, Tensor]) -> Tensor:
        result = generate(model, inputs, **OPTIONS, **KINDS[kind]())
        return result if isinstance(result, Tensor) else result.sequences

    for inputs, result in zip(prompts, at_once(*(functools.partial(tokens, model, p) for p in prompts)), strict=True):
        assert not isinstance(result, Exception), result
        expected = tokens(stock, inputs)
        if kind == "processor":
            assert torch.equal(expected, result)
        else:
            assert_same_tokens(stock, expected, result, inputs)
    assert_nothing_held(handle)


@pytest.mark.parametrize("own", [False, True], ids=["turns", "waves"])
@pytest.mark.parametrize("name", ["llama", "diffllama"])
@pytest.mark.parametrize("how", ["swap", "recompute"])
def test_nobody_tries_the_same_again_and_again(how: str, name: str, own: bool) -> None:
    """Batches of which some rows never fit: calls end, with tokens or with an error."""
    stock = tiny(name)
    model = twin(stock)
    handle = torch_paged.patch(model, block_size=16, max_memory=56_000, on_pressure=how)
    prompts = [batch(lengths, seed=seed) for seed, lengths in enumerate([[31, 27], [36, 9, 28, 13], [5, 14], [60, 60]])]
    extra: dict[str, Any] = {"logits_processor": LogitsProcessorList([Own()])} if own else {}
    jobs = [functools.partial(generate, model, inputs, **OPTIONS, **extra) for inputs in prompts]
    for inputs, result in zip(prompts, at_once(*jobs), strict=True):
        if isinstance(result, PoolExhausted):
            result.__traceback__ = None
            continue
        assert torch.equal(result, generate(stock, inputs, **OPTIONS, **extra))
    assert_nothing_held(handle)


def test_a_row_of_pads_alone_waits_too() -> None:
    """Its first pass runs again, over pads as before."""
    stock = tiny("llama")
    model = twin(stock)
    handle = small(model, 13)
    prompts = [batch([21]), batch([21], seed=1), batch([21], seed=2)]
    for inputs in prompts[1:]:
        inputs["attention_mask"][:] = 0
    actual = at_once(*(functools.partial(generate, model, inputs, **OPTIONS) for inputs in prompts))
    for inputs, result in zip(prompts, actual, strict=True):
        assert torch.equal(result, generate(stock, inputs, **OPTIONS))
    assert_nothing_held(handle)


class Meets:
    """A processor that does nothing until its n-th call, where it sets one event and waits for another."""

    def __init__(self, at: int, reached: threading.Event, go: threading.Event) -> None:
        self.left, self.reached, self.go = at, reached, go

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.left -= 1
        if self.left == 0:
            self.reached.set()
            assert self.go.wait(LIMIT)
        return scores


def waits(handle: PagedHandle) -> int:
    """Calls that wait for blocks."""
    return sum(place.enough is not None for place in handle.settings[1].line._places)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_who_has_waited_longest_goes_first() -> None:
    """Behind a call that holds 8 of 12 blocks: one that needs 10, then one that would find its 3 at once."""
    stock = tiny("llama")
    model = twin(stock)
    handle = small(model, 12)
    reached, go = threading.Event(), threading.Event()
    inputs, ended = [batch([n], seed=n) for n in (29, 33, 5)], list[int]()

    def call(number: int, new: int, **kwargs: Any) -> Tensor:
        result = generate(model, inputs[number], max_new_tokens=new, eos_token_id=None, **kwargs)
        ended.append(number)
        return result

    def holds() -> Tensor:
        return call(0, 4, logits_processor=LogitsProcessorList([Meets(2, reached, go)]))

    def then() -> list[Any]:
        assert reached.wait(LIMIT)
        second = threading.Thread(target=lambda: results.append(call(1, 6)))
        second.start()
        until(lambda: waits(handle) == 1)
        third = threading.Thread(target=lambda: results.append(call(2, 4)))
        third.start()
        until(lambda: waits(handle) == 2)
        go.set()
        second.join(LIMIT)
        third.join(LIMIT)
        return results

    results: list[Tensor] = []
    first, _ = at_once(holds, then)
    # The third may run beside the second's last steps, and never before its prompt.
    assert ended[0] == 0 and len(results) == 2
    for number, new in ((1, 6), (2, 4)):
        expected = generate(stock, inputs[number], max_new_tokens=new, eos_token_id=None)
        assert any(torch.equal(expected, each) for each in results)
    assert_nothing_held(handle)


@pytest.mark.parametrize("how", ["swap", "recompute"])
def test_batches_of_many_kinds_press_one_another(how: str) -> None:
    """Rows, beams, speculation and requests, over remembered prefixes, one of which raises."""
    stock = tiny("llama")
    model = twin(stock)
    handle = small(model, 30, on_pressure=how, prefix_caching=True)
    inputs = [batch([21, 9, 30]), batch([13, 8]), batch([30]), batch([17, 17])]
    kinds: list[dict[str, Any]] = [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}, {"min_new_tokens": 3}]
    asked = requests.prompts([9, 21, 5, 33])
    options = requests.OPTIONS | {"eos_token_id": None}

    def fails() -> None:
        generate(model, inputs[0], **OPTIONS, logits_processor=LogitsProcessorList([Raises(7)]))

    jobs = [
        functools.partial(generate, model, each, **OPTIONS, **kind) for each, kind in zip(inputs, kinds, strict=True)
    ]
    *actual, error, answers = at_once(*jobs, fails, lambda: requests.run(model, asked, max_num_seqs=3, **options)[0])
    assert isinstance(error, ZeroDivisionError)
    error.__traceback__ = None
    assert not isinstance(answers, Exception), answers
    for number, prompt in enumerate(asked):
        requests.assert_answer(stock, prompt, answers[number], **options)
    for each, kind, result in zip(inputs, kinds, actual, strict=True):
        assert not isinstance(result, Exception), result
        assert_same_tokens(stock, generate(stock, each, **OPTIONS, **kind), result, each)
    assert_nothing_held(handle)


def test_an_error_only_where_nobody_can_free_anything() -> None:
    """A prompt that never fits fails once the others are done, who get their answers."""
    stock = tiny("llama")
    model = twin(stock)
    handle = small(model, 12)
    prompts = [batch([21]), batch([60]), batch([21], seed=1)]
    actual = at_once(*(functools.partial(generate, model, inputs, **OPTIONS) for inputs in prompts))
    assert isinstance(actual[1], PoolExhausted)
    for number in (0, 2):
        assert_same_tokens(stock, generate(stock, prompts[number], **OPTIONS), actual[number], prompts[number])
    actual[1].__traceback__ = None
    assert_nothing_held(handle)


def test_error_waits_for_nobody() -> None:
    model = tiny("llama")
    handle = small(model, 12, on_pressure="error")
    reached, go = threading.Event(), threading.Event()

    def holds() -> Any:
        return generate(model, batch([29]), **OPTIONS, logits_processor=LogitsProcessorList([Meets(2, reached, go)]))

    def asks() -> Any:
        assert reached.wait(LIMIT)
        try:
            return generate(model, batch([33]), **OPTIONS)
        finally:
            go.set()

    assert isinstance(at_once(holds, asks)[1], PoolExhausted)
    assert handle.stats().blocks_used == 0


def test_a_call_that_waits_for_its_caller_is_not_waited_for() -> None:
    """A consumer of tokens that generates itself, while the producer waits until it has taken one."""
    model = tiny("llama")
    handle = small(model, 12)
    tokens: queue.Queue[Any] = queue.Queue(maxsize=1)

    class Bounded(BaseStreamer):  # type: ignore[misc]
        def put(self, value: Any) -> None:
            tokens.put(value, timeout=LIMIT)

        def end(self) -> None:
            tokens.put(None, timeout=LIMIT)

    def consumes() -> Any:
        tokens.get(timeout=LIMIT)
        tokens.get(timeout=LIMIT)
        try:
            return generate(model, batch([33]), **OPTIONS)
        finally:
            while tokens.get(timeout=LIMIT) is not None:
                pass

    with mock.patch.object(line, "_PATIENCE", 0.5):
        produced, error = at_once(lambda: generate(model, batch([25]), **OPTIONS, streamer=Bounded()), consumes)
    assert isinstance(error, PoolExhausted) and isinstance(produced, Tensor)
    error.__traceback__ = None
    assert handle.stats().blocks_used == 0


def test_what_this_thread_keeps_is_not_waited_for() -> None:
    """An iterator that is asked for nothing meanwhile, and a returned cache."""
    model = tiny("llama")
    handle = small(model, 12)
    options = requests.OPTIONS | {"eos_token_id": None}
    many = generate_many(model, requests.prompts([25]), stream=True, **options)
    next(many)
    with pytest.raises(PoolExhausted):
        generate(model, batch([33]), **OPTIONS)
    many.close()
    result = generate(model, batch([25]), **OPTIONS, return_dict_in_generate=True)
    (error,) = at_once(lambda: generate(model, batch([33]), **OPTIONS))
    assert isinstance(error, PoolExhausted)
    error.__traceback__ = None
    del result
    assert handle.stats().blocks_used == 0


def test_requests_wait_for_a_call_beside_them() -> None:
    """The only sequence that runs needs what `generate` holds, and no request ends with an error."""
    stock = tiny("llama")
    model = twin(stock)
    handle = small(model, 12)
    reached, go = threading.Event(), threading.Event()
    asked = requests.prompts([25, 30, 9])
    options = requests.OPTIONS | {"eos_token_id": None}

    def holds() -> Any:
        return generate(model, batch([29]), **OPTIONS, logits_processor=LogitsProcessorList([Meets(2, reached, go)]))

    def asks() -> Any:
        assert reached.wait(LIMIT)
        return requests.run(model, asked, **options)

    def lets_go() -> None:
        until(lambda: waits(handle) == 1)
        go.set()

    _, answers, _ = at_once(holds, asks, lets_go)
    assert not isinstance(answers, Exception), answers
    for number, prompt in enumerate(asked):
        requests.assert_answer(stock, prompt, answers[0][number], **options)
    assert handle.stats().blocks_used == 0


def test_a_request_that_waited_in_vain_ends_with_its_error() -> None:
    """The other call is over, and somebody keeps what it returned."""
    stock = tiny("llama")
    model = twin(stock)
    handle = small(model, 12)
    asked = requests.prompts([25, 9])
    options = requests.OPTIONS | {"eos_token_id": None}
    with (
        mock.patch.object(line.Line, "has_others", True),
        mock.patch.object(line.Line, "is_first", False),
        mock.patch.object(line.Line, "wait", lambda *_, **__: False),
    ):
        kept = generate(model, batch([21]), max_new_tokens=2, return_dict_in_generate=True)
        answers, _ = requests.run(model, asked, max_num_seqs=1, **options)
    assert isinstance(answers[0].error, PoolExhausted)
    requests.assert_answer(stock, asked[1], answers[1], **options)
    del kept
    assert handle.stats().blocks_used == 0
