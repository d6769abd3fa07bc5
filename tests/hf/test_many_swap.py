"""generate_many under pressure with on_pressure="swap": nothing is computed twice, and nothing stays swapped out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import torch_paged
from torch_paged import GenerationRequest, GenerationResult, NewTokens, PagedHandle, PoolExhausted, generate_many
from torch_paged.hf.many.batch import Batch

from .counting import count_tokens
from .many import BLOCK, BLOCK_BYTES, OPTIONS, admitting_all, assert_answer, prompts, results, run
from .models import tiny, twin
from .raising import Raises
from .swaps import count_swapped, no_memory_after

NO_EOS: dict[str, Any] = OPTIONS | {"eos_token_id": None, "max_new_tokens": 24}
LENGTHS = [9, 5, 17, 12, 3, 8, 11, 6, 14]


def small(model: Any, num_blocks: int, **knobs: Any) -> Any:
    return torch_paged.paged(model, block_size=BLOCK, max_memory=num_blocks * BLOCK_BYTES, **knobs)


@pytest.mark.parametrize(("how", "again"), [("swap", 0), ("recompute", 20)])
def test_a_swapped_sequence_is_not_computed_again_and_a_dropped_one_is(how: str, again: int) -> None:
    """Two sequences that end with seven blocks each, in ten: the second gives way once, with 20 tokens."""
    stock = tiny("llama")
    model, asked, new = twin(stock), prompts([17, 17]), 12
    options = NO_EOS | {"max_new_tokens": new}
    with small(model, 10, on_pressure=how) as handle, count_tokens(model) as tokens, count_swapped() as blocks:
        answers, stats = run(model, asked, **options)
        assert handle.stats().blocks_used == 0
    # The pass that found too few blocks had embedded its two tokens.
    assert sum(tokens) == 2 * (17 + new - 1) + 2 + again
    assert stats.tokens_prefilled == 2 * 17 + (again and again + 1)
    assert (stats.preemptions, stats.swaps) == (1, int(how == "swap"))
    assert blocks == ({"out": 5, "in": 5} if how == "swap" else {"out": 0, "in": 0})
    for number, prompt in enumerate(asked):
        assert_answer(stock, prompt, answers[number], **options)


@pytest.mark.parametrize("chunk", [9, 64])
@pytest.mark.parametrize("name", ["qwen2-sliding", "mistral", "gemma2", "gpt2"])
def test_tokens_are_those_of_unlimited_memory(name: str, chunk: int) -> None:
    stock = tiny(name)
    model, asked = twin(stock), prompts(LENGTHS)
    with small(model, 18 * (1 + (name == "gpt2"))) as handle, admitting_all(), count_swapped() as blocks:
        answers, stats = run(model, asked, max_num_batched_tokens=chunk, max_num_seqs=9, **NO_EOS)
        assert handle.stats().blocks_used == 0
    assert stats.preemptions >= stats.swaps > 0 and blocks["out"] == blocks["in"] > 0
    assert stats.tokens_prefilled == sum(LENGTHS)
    for number, prompt in enumerate(asked):
        assert_answer(stock, prompt, answers[number], **NO_EOS)


@pytest.mark.parametrize("options", [{"do_sample": True}, {"prompt_lookup_num_tokens": 4}, {"repetition_penalty": 1.3}])
def test_draws_and_lookups_go_on_where_they_were(options: dict[str, Any]) -> None:
    stock = tiny("llama")
    requests = [GenerationRequest(p, seed=i, options=options) for i, p in enumerate(prompts(LENGTHS))]
    free, _ = run(twin(stock), requests, **NO_EOS)
    model = twin(stock)
    with small(model, 18), admitting_all():
        answers, stats = run(model, requests, **NO_EOS)
    assert stats.swaps > 0 and stats.tokens_prefilled == sum(LENGTHS)
    for number in range(len(requests)):
        assert torch.equal(answers[number].sequences, free[number].sequences)


@pytest.mark.parametrize("how", ["swap", "recompute"])
@pytest.mark.parametrize("assistant_name", ["llama", "mistral"])
def test_what_an_assistant_has_computed_is_swapped_too(assistant_name: str, how: str) -> None:
    stock = tiny("llama")
    model, assistant = twin(stock), tiny(assistant_name)
    assistant.generation_config.num_assistant_tokens = 5
    assistant.generation_config.assistant_confidence_threshold = 0.0
    asked = prompts([30, 25, 28, 33])
    with (
        small(model, 30, on_pressure=how) as handle,
        torch_paged.paged(assistant, block_size=BLOCK, on_pressure=how) as other,
        count_tokens(assistant) as tokens,
        admitting_all(),
    ):
        answers, stats = run(model, asked, assistant_model=assistant, max_num_batched_tokens=64, **NO_EOS)
        assert handle.stats().blocks_used == other.stats().blocks_used == 0
    assert stats.preemptions > 0
    for number, prompt in enumerate(asked):
        assert_answer(stock, prompt, answers[number], **NO_EOS)
    # What it may compute besides prompts: a token and its draft of each sequence.
    prefilled = sum(count for count in tokens if count > 4 * 6)
    assert (prefilled <= sum(map(len, asked)) + 4 * 6) == (how == "swap")


def test_where_cpu_memory_is_used_up_sequences_are_computed_again() -> None:
    stock = tiny("qwen2-sliding")
    model, asked = twin(stock), prompts(LENGTHS)
    with small(model, 18) as handle, admitting_all(), no_memory_after(3):
        answers, stats = run(model, asked, **NO_EOS)
        assert handle.stats().blocks_used == 0
    # The fourth copy is the second group's of the second sequence.
    assert stats.swaps == 1 < stats.preemptions and stats.tokens_prefilled > sum(LENGTHS)
    for number, prompt in enumerate(asked):
        assert_answer(stock, prompt, answers[number], **NO_EOS)


def test_error_ends_nothing_that_can_wait() -> None:
    """Requests wait until all the tokens they may get have room; the one that never has fails alone."""
    stock = tiny("llama")
    model, asked = twin(stock), [*prompts(LENGTHS), prompts([100])[0]]
    with small(model, 18, on_pressure="error") as handle:
        answers, stats = run(model, asked, max_num_batched_tokens=256, **NO_EOS)
        assert handle.stats().blocks_used == 0
    assert (stats.preemptions, stats.finished, stats.failed) == (0, 9, 1)
    assert isinstance(answers[9].error, PoolExhausted)
    for number, prompt in enumerate(asked[:9]):
        assert_answer(stock, prompt, answers[number], **NO_EOS)


def test_error_is_the_result_of_the_youngest_where_blocks_run_out() -> None:
    stock = tiny("llama")
    model, asked = twin(stock), prompts([17, 17])
    with small(model, 10, on_pressure="error") as handle, admitting_all():
        answers, stats = run(model, asked, **(NO_EOS | {"max_new_tokens": 12}))
        assert handle.stats().blocks_used == 0
    assert isinstance(answers[1].error, PoolExhausted) and answers[1].new_tokens.shape == (1, 4)
    assert stats.preemptions == 0
    assert_answer(stock, asked[0], answers[0], **(NO_EOS | {"max_new_tokens": 12}))


SYSTEM = prompts([33], seed=1)[0]


def alike(lengths: list[int], **fields: Any) -> list[GenerationRequest]:
    """Requests that begin with the same 33 tokens."""
    return [GenerationRequest(torch.cat([SYSTEM, prompt]), **fields) for prompt in prompts(lengths)]


@contextmanager
def sharing(num_blocks: int) -> Iterator[tuple[Any, Any, PagedHandle]]:
    """A model whose requests find `SYSTEM` remembered; afterwards only the index holds blocks."""
    stock = tiny("llama")
    model = twin(stock)
    with small(model, num_blocks, prefix_caching=True) as handle, admitting_all():
        run(model, [SYSTEM], **(NO_EOS | {"max_new_tokens": 1}))
        yield stock, model, handle
        stats = handle.stats()
        assert stats.blocks_used == stats.blocks_cached
        handle.flush()
        assert handle.stats().blocks_used == 0


def test_shared_blocks_stay_and_are_not_moved() -> None:
    requests = alike([3, 5, 4])
    with sharing(16) as (stock, model, _), count_swapped() as blocks, count_tokens(model) as tokens:
        answers, stats = run(model, requests, **NO_EOS)
        assert stats.swaps > 0 and stats.tokens_saved == 3 * 32
        # Sequences end with 8 blocks that they share and 8 of their own at most.
        assert blocks["out"] == blocks["in"] <= stats.swaps * 8
        assert stats.tokens_prefilled == sum(len(request.prompt) for request in requests) - 3 * 32
        del tokens
    for number, request in enumerate(requests):
        assert_answer(stock, request, answers[number], **NO_EOS)


def test_what_waits_gives_up_shared_blocks_where_nothing_else_is_left() -> None:
    """Request 0 needs 11 of 13 blocks, of which two swapped requests hold 8 that they shared."""
    requests = [GenerationRequest(prompts([8])[0], options={"max_new_tokens": 36})]
    requests += alike([2, 2], options={"max_new_tokens": 4})
    with sharing(13) as (stock, model, _):
        answers, stats = run(model, requests, **NO_EOS)
    assert stats.finished == 3 and answers[0].num_preemptions == 0
    for number, request in enumerate(requests):
        assert_answer(stock, request, answers[number], **NO_EOS)


def swapped_out(many: Any) -> list[Any]:
    """Numbers of requests that are in CPU memory now."""
    return [s.request_id for s in many._engine._waiting if s.swapped is not None]


def until_swapped(many: Any) -> list[Any]:
    events: list[Any] = []
    while not swapped_out(many):
        events.append(next(many))
    return events


@pytest.mark.parametrize("how", ["cancel", "timeout", "close", "with", "del", "interrupt"])
def test_a_swapped_request_that_ends_leaves_nothing(how: str) -> None:
    requests = alike([3, 5, 4])
    if how == "interrupt":

        def interrupt(ids: Any, scores: Any) -> Any:
            if swapped_out(many):
                raise KeyboardInterrupt
            return scores

        requests[0].logits_processor = [interrupt]
    with sharing(16) as (stock, model, handle):
        many = generate_many(model, requests, stream=True, **NO_EOS)
        if how == "interrupt":
            with pytest.raises(KeyboardInterrupt):
                list(many)
            return
        events = until_swapped(many)
        last = swapped_out(many)[-1]
        if how == "close":
            many.close()
        elif how == "with":
            with pytest.raises(ZeroDivisionError), many:
                raise ZeroDivisionError
        elif how == "del":
            del many
        elif how == "cancel":
            many.cancel(last)
        else:
            next(s for s in many._engine._waiting if s.request_id == last).deadline = 0.0
        if how not in ("cancel", "timeout"):
            stats = handle.stats()
            assert stats.blocks_used == stats.blocks_cached
            return
        answers = results([*events, *many])
        told = [t for e in events if isinstance(e, NewTokens) and e.request_id == last for t in e.tokens]
        assert answers[last].finish_reason == {"cancel": "cancelled", "timeout": "timeout"}[how]
        assert answers[last].new_tokens[0].tolist() == told != []
    for number in {0, 1, 2} - {last}:
        assert_answer(stock, requests[number], answers[number], **NO_EOS)


@pytest.mark.parametrize("at", [1, 5, 9, 13, 20])
def test_a_request_that_raises_while_others_are_swapped_leaves_nothing(at: int) -> None:
    requests = alike([3, 5, 4])
    requests[0].logits_processor = [Raises(at)]
    with sharing(16) as (stock, model, _):
        answers, stats = run(model, requests, **NO_EOS)
    assert isinstance(answers[0].error, ZeroDivisionError) and stats.finished == 2
    for number in (1, 2):
        assert_answer(stock, requests[number], answers[number], **NO_EOS)


def test_the_wait_of_a_preempted_request_counts_as_latency() -> None:
    model = tiny("llama")
    with small(model, 10):
        many = generate_many(model, prompts([17, 17]), **(NO_EOS | {"max_new_tokens": 12}))
        assert all(isinstance(result, GenerationResult) for result in many)
    stats = many.stats()
    assert stats.preemptions == 1
    assert sum(map(len, many._engine.counts.latencies)) == stats.new_tokens - 2


def test_what_was_swapped_out_of_a_released_cache_is_not_counted() -> None:
    """The blocks that the row shared are held for nobody who could have it back."""
    model = tiny("llama")
    with torch_paged.paged(model, block_size=BLOCK) as handle:
        batch = Batch(model, handle, 2)
        sequence: Any = SimpleNamespace(swapped=None, prefixes=None)

        def store() -> None:
            batch.run(np.array([9, 0]), prompts([9])[0], np.array([1, 0]))

        with torch.no_grad():
            store()
            batch.cache.state.copy_rows([(1, 0, 9)])
            sequence.swapped = batch.swap_out(0)
            assert list(batch.held_of(sequence).values()) == [3]
            batch.cache.reset()
            store()
            assert batch.held_of(sequence) == {}
        batch.close()
