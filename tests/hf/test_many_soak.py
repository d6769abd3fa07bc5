"""Random requests, cancellations, pressure and prefix hits for a while: stock's tokens, and no block left behind."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import torch_paged
from tests.commit_sample import head
from torch_paged import GenerationRequest, GenerationResult, NewTokens, PoolExhausted, generate_many

from .many import BLOCK, BLOCK_BYTES, OPTIONS, admitting_all, assert_answer_or_tie
from .models import EOS, tiny, twin
from .raising import Raises

LONGEST = 90
# Requests, and answers compared, on a machine that is too busy for more in the time.
LEAST, LEAST_COMPARED = 100, 30
SETTINGS: list[dict[str, Any]] = [
    {},
    {},
    {"do_sample": True, "top_k": 20},
    {"do_sample": True, "repetition_penalty": 1.2},
    {"repetition_penalty": 1.3},
    {"prompt_lookup_num_tokens": 4},
    {"num_beams": 2},
]


def random_requests(draw: random.Random, ends: float) -> Iterator[GenerationRequest]:
    """Until time is up, `LEAST` at least; prompts begin like one another more often than not."""
    systems = [[draw.randrange(3, EOS) for _ in range(draw.randrange(8, 30))] for _ in range(3)]
    number = 0
    while number < LEAST or time.monotonic() < ends:
        prompt = draw.choice([[], *systems]) + [draw.randrange(3, EOS) for _ in range(draw.randrange(1, 40))]
        options = draw.choice(SETTINGS) | {"max_new_tokens": draw.randrange(1, 24)}
        request = GenerationRequest(prompt, options=options, seed=number, request_id=number)
        kind = draw.random()
        if kind < 0.05:
            request.logits_processor = [Raises(draw.randrange(1, 6))]
        elif kind < 0.08:
            request.prompt = [5, 10**6]
        elif kind < 0.11:
            # More blocks than there are.
            request.prompt = [draw.randrange(3, EOS) for _ in range(LONGEST * 3)]
        elif kind < 0.14:
            request.timeout = draw.random() / 50
        elif kind < 0.3:
            request.salt = draw.choice(["a", "b"])
        yield request
        number += 1


def hold(model: PreTrainedModel, draw: random.Random) -> Any:
    """The keys and values of a long prompt of its own."""
    ids = torch.tensor([[draw.randrange(3, EOS) for _ in range(LONGEST)]])
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=2, return_dict_in_generate=True).past_key_values


# With memory in multiples of what the longest request would hold in a model like Llama: sliding layers need less, gpt2
# has twice as many heads of keys and values.
CASES: list[tuple[str, str, bool, float]] = [
    ("llama", "swap", True, 2.5),
    ("qwen2-sliding", "swap", True, 1.5),
    ("mistral", "recompute", False, 1),
    ("gemma2", "recompute", True, 1.5),
    ("gpt2", "swap", False, 5),
    ("llama", "error", True, 2.5),
]


@pytest.mark.parametrize(("name", "how", "caching", "memory"), CASES)
def test_soak(name: str, how: str, caching: bool, memory: float, request: pytest.FixtureRequest) -> None:
    """Half of the time requests run, the other half is for stock's answers to as many of them."""
    seed = request.config.getoption("--soak-seed") or head()
    told = f"seed {seed!r}: replay with --soak-seed {seed}"
    print(told)
    # One for the requests and one for what happens beside them, whose order depends on the machine.
    draw, beside = random.Random(f"{seed} {name} requests"), random.Random(f"{seed} {name} beside")
    stock = tiny(name)
    model = twin(stock)
    seconds = request.config.getoption("--soak") / len(CASES) / 2
    max_memory = int(memory * LONGEST / BLOCK) * BLOCK_BYTES
    knobs: dict[str, Any] = dict(on_pressure=how, prefix_caching=caching)
    done: dict[Any, GenerationResult] = {}
    streamed: dict[Any, list[int]] = {}
    with (
        torch_paged.paged(model, block_size=BLOCK, max_memory=max_memory, **knobs) as handle,
        nullcontext() if how == "error" else admitting_all(),
    ):
        many = generate_many(
            model,
            random_requests(draw, time.monotonic() + seconds),
            stream=True,
            max_num_seqs=9,
            max_num_batched_tokens=24,
            **OPTIONS,
        )
        newest = 0
        held: list[Any] = []
        for count, event in enumerate(many):
            # A call of generate beside it, whose blocks are kept for a while.
            if count % 40 == 20:
                with suppress(PoolExhausted):
                    held.append(hold(model, beside))
            elif count % 40 == 0:
                held.clear()
            newest = max(newest, event.request_id)
            if beside.random() < 0.01:
                many.cancel(beside.randrange(newest + 2))
            if isinstance(event, NewTokens):
                streamed.setdefault(event.request_id, []).extend(event.tokens)
            else:
                assert event.request_id not in done, told
                done[event.request_id] = event
        held.clear()
        stats, left = many.stats(), handle.stats()
        assert left.blocks_used == left.blocks_cached, f"{told}: a block that only the index should hold"
        assert (left.blocks_cached > 0) == (stats.tokens_saved > 0) == caching, told
        handle.flush()
        assert handle.stats().blocks_used == 0, told
    assert sorted(done) == list(range(len(done))), f"{told}: every request has its result"
    assert stats.mixed_forwards > 0 and (stats.preemptions > 0) == (how != "error"), told
    assert (stats.swaps > 0) == (how == "swap"), told
    compare(stock, done, streamed, time.monotonic() + seconds, told)


def compare(
    stock: PreTrainedModel, done: dict[Any, GenerationResult], streamed: dict[Any, list[int]], until: float, told: str
) -> None:
    """Streamed tokens with results, and results with stock's, of as many requests as there is time for."""
    compared = 0
    for number in random.Random(0).sample(sorted(done), len(done)):
        result = done[number]
        if streamed.get(number):
            assert streamed[number] == result.new_tokens[0].tolist(), f"{told}, {number}"
        if result.finish_reason == "error":
            assert isinstance(result.error, ZeroDivisionError | ValueError | PoolExhausted), f"{told}, {number}"
        elif result.finish_reason in ("eos", "length", "stop") and (
            compared < LEAST_COMPARED or time.monotonic() < until
        ):
            # A processor that has counted its calls down would raise now.
            try:
                assert_answer_or_tie(stock, replace(result.request, logits_processor=()), result)
            except AssertionError as error:
                raise AssertionError(f"{told}, {number}") from error
            compared += 1
    assert compared >= LEAST_COMPARED, told
