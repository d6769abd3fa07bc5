"""Several threads on one model or on several, and patches that come and go while generate runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel

import torch_paged

from .host_state import host_state
from .models import assert_same_tokens, batch, generate, tiny

# No sampling: threads draw from one random generator.
CALLS: list[tuple[list[int], dict[str, Any]]] = [
    ([21, 5], {}),
    ([9], {"num_beams": 3}),
    ([13, 13, 2], {"num_beams": 2, "num_return_sequences": 2}),
    ([30], {"prompt_lookup_num_tokens": 2}),
    ([17, 4], {"prefill_chunk_size": 6}),
]


def _generate(model: PreTrainedModel, number: int, **kwargs: Any) -> Tensor:
    lengths, mode = CALLS[number]
    return generate(model, batch(lengths, seed=number), eos_token_id=None, max_new_tokens=16, **mode, **kwargs)


def _logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(**batch([20, 5]), use_cache=False).logits


def in_threads(jobs: list[Callable[[], Any]]) -> list[Any]:
    """What each job returns or raises, all run at once."""
    results: list[Any] = [None] * len(jobs)
    start = threading.Barrier(len(jobs))

    def run(number: int) -> None:
        start.wait()
        try:
            results[number] = jobs[number]()
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("name", ["llama", "mistral", "bloom", "diffllama"])
def test_one_model_in_many_threads(name: str) -> None:
    """Other prompts and modes in each, one that raises, and one that calls the model without a cache."""
    model = tiny(name)
    expected = [_generate(model, number) for number in range(len(CALLS))]
    plain = _logits(model)

    def fail(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] > 25:
            raise KeyError("planted")
        return scores

    with torch_paged.paged(model, block_size=2) as handle:
        jobs: list[Callable[[], Any]] = [lambda number=n: _generate(model, number) for n in range(len(CALLS))]
        jobs.append(lambda: _generate(model, 0, logits_processor=LogitsProcessorList([fail])))
        jobs.append(lambda: [_logits(model) for _ in range(20)])
        *actual, error, without_cache = in_threads(jobs)
        assert handle.stats().peak_bytes > 0
        assert isinstance(error, KeyError)
        error.__traceback__ = None
        assert handle.stats().blocks_used == 0
    assert isinstance(without_cache, list) and all(torch.equal(logits, plain) for logits in without_cache)
    for number, (lengths, _) in enumerate(CALLS):
        assert_same_tokens(model, expected[number], actual[number], prompt=batch(lengths, seed=number))


def test_many_models_each_in_a_thread() -> None:
    models = [tiny(name) for name in ("llama", "mistral", "bloom", "diffllama", "gpt2")]
    before = [host_state(model) for model in models]
    expected = [_generate(model, number) for number, model in enumerate(models)]

    def patched(number: int) -> Tensor:
        with torch_paged.paged(models[number], block_size=2) as handle:
            tokens = _generate(models[number], number)
            assert handle.stats().peak_bytes > 0 == handle.stats().blocks_used
            return tokens

    actual = in_threads([lambda number=n: patched(number) for n in range(len(models))])
    for want, got in zip(expected, actual, strict=True):
        assert isinstance(got, Tensor) and torch.equal(want, got), got
    assert [host_state(model) for model in models] == before


@pytest.mark.parametrize("name", ["llama", "bloom", "diffllama"])
def test_patches_that_come_and_go_while_another_thread_generates(name: str) -> None:
    model = tiny(name)
    before = host_state(model)
    numbers = [0, 1, 4]
    expected = [_generate(model, number) for number in numbers]
    done = threading.Event()
    toggles = 0

    def toggle() -> None:
        nonlocal toggles
        # With a breath between: the other thread would run only in the interpreter's own turns.
        while not done.wait(0.002):
            toggles += 1
            torch_paged.patch(model, block_size=4)
            torch_paged.unpatch(model)

    def generates() -> list[Tensor]:
        try:
            return [_generate(model, number) for number in numbers]
        finally:
            done.set()

    actual, error = in_threads([generates, toggle])
    assert error is None and toggles > 10
    assert isinstance(actual, list), actual
    for number, want, got in zip(numbers, expected, actual, strict=True):
        assert_same_tokens(model, want, got, prompt=batch(CALLS[number][0], seed=number))
    assert host_state(model) == before


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "diffllama"])
def test_unpatching_in_the_middle_of_a_forward_pass(name: str, again: bool) -> None:
    """The pass goes on as it began, without a mask where it reads blocks; what it needs goes when it is over."""
    model, inputs = tiny(name), batch([20, 5])
    before, kwargs = host_state(model), dict(eos_token_id=None, max_new_tokens=6)
    expected = generate(model, inputs, **kwargs)
    layer = [module for module in model.modules() if type(module).__name__.endswith(("Layer", "Block"))][1]
    reached, gone = threading.Event(), threading.Event()
    passes = 0

    def hook(*args: Any) -> None:
        nonlocal passes
        passes += 1
        if passes in (1, 4):
            reached.set()
            assert gone.wait(20)
            gone.clear()

    def unpatch_twice() -> None:
        for _ in range(2):
            assert reached.wait(20)
            reached.clear()
            torch_paged.unpatch(model)
            if again:
                torch_paged.patch(model, block_size=2)
            gone.set()

    registered = layer.register_forward_pre_hook(hook)
    torch_paged.patch(model, block_size=4)
    actual, error = in_threads([lambda: generate(model, inputs, **kwargs), unpatch_twice])
    assert error is None and isinstance(actual, Tensor), (error, actual)
    assert_same_tokens(model, expected, actual, prompt=inputs)
    registered.remove()
    if again:
        # The patch that is there now works.
        with torch_paged.paged(model) as handle:
            assert torch.equal(generate(model, inputs, **kwargs), expected)
            assert handle.stats().peak_bytes > 0
    torch_paged.unpatch(model)
    assert host_state(model) == before


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_unpatching_from_a_hook(name: str) -> None:
    model, inputs = tiny(name), batch([20, 5])
    before, kwargs = host_state(model), dict(eos_token_id=None, max_new_tokens=6)
    expected = generate(model, inputs, **kwargs)
    layer = [module for module in model.modules() if type(module).__name__.endswith(("Layer", "Block"))][1]
    torch_paged.patch(model, block_size=4)
    hook = layer.register_forward_pre_hook(lambda module, args: torch_paged.unpatch(model))
    actual = generate(model, inputs, **kwargs)
    hook.remove()
    assert_same_tokens(model, expected, actual, prompt=inputs)
    assert host_state(model) == before
