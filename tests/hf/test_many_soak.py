"""Random requests, cancellations, pressure and prefix hits for a while: stock's tokens, and no block left behind."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import torch_paged
from tests.commit_sample import head
from torch_paged import GenerationRequest, GenerationResult, NewTokens, PoolExhausted, generate_many

from .many import BLOCK, BLOCK_BYTES, OPTIONS, assert_answer, stock_answer
from .models import EOS, tiny, twin
from .raising import Raises

LONGEST = 90
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
    """Until time is up; prompts begin like one another more often than not."""
    systems = [[draw.randrange(3, EOS) for _ in range(draw.randrange(8, 30))] for _ in range(3)]
    number = 0
    while time.monotonic() < ends:
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


@pytest.mark.parametrize("name", ["llama"])
def test_soak(name: str, request: pytest.FixtureRequest) -> None:
    seed = f"{head()} {name}"
    draw = random.Random(seed)
    stock = tiny(name)
    model = twin(stock)
    seconds = request.config.getoption("--soak") / 2
    # Room for the longest request and a few others.
    max_memory = int(2.5 * LONGEST / BLOCK) * BLOCK_BYTES
    done: dict[Any, GenerationResult] = {}
    streamed: dict[Any, list[int]] = {}
    with torch_paged.paged(model, block_size=BLOCK, max_memory=max_memory, prefix_caching=True) as handle:
        many = generate_many(
            model,
            random_requests(draw, time.monotonic() + seconds * 0.6),
            stream=True,
            max_num_seqs=9,
            max_num_batched_tokens=24,
            **OPTIONS,
        )
        newest = 0
        beside: list[Any] = []
        for count, event in enumerate(many):
            # A call of generate beside it, whose blocks are kept for a while.
            if count % 40 == 20:
                with suppress(PoolExhausted):
                    beside.append(hold(model, draw))
            elif count % 40 == 0:
                beside.clear()
            newest = max(newest, event.request_id)
            if draw.random() < 0.01:
                many.cancel(draw.randrange(newest + 2))
            if isinstance(event, NewTokens):
                streamed.setdefault(event.request_id, []).extend(event.tokens)
            else:
                assert event.request_id not in done
                done[event.request_id] = event
        beside.clear()
        stats, held = many.stats(), handle.stats()
        assert held.blocks_used == held.blocks_cached > 0, f"seed {seed!r}: a block that only the index should hold"
        handle.flush()
        assert handle.stats().blocks_used == 0
    assert sorted(done) == list(range(len(done))), "every request has its result"
    assert stats.preemptions > 0 and stats.tokens_saved > 0 and stats.mixed_forwards > 0
    compared, until = 0, time.monotonic() + seconds
    for number, result in done.items():
        if streamed.get(number):
            assert streamed[number] == result.new_tokens[0].tolist()
        if result.finish_reason == "error":
            assert isinstance(result.error, ZeroDivisionError | ValueError | PoolExhausted), f"seed {seed!r}"
        elif result.finish_reason in ("eos", "length", "stop") and time.monotonic() < until:
            # A processor that has counted its calls down would raise now.
            asked = replace(result.request, logits_processor=())
            if asked.options.get("do_sample") or "num_beams" in asked.options:
                assert torch.equal(result.sequences, stock_answer(stock, asked, **OPTIONS)), f"seed {seed!r}, {number}"
            else:
                assert_answer(stock, asked, result)
            compared += 1
    assert compared > 10
