"""What rows share is counted once when it is decided who runs: the more they have in common, the more run at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import torch_paged
from torch_paged import GenerationRequest
from torch_paged.hf import turns
from torch_paged.hf.many.engine import Engine

from .counting import count_tokens
from .many import BLOCK_BYTES, assert_answer, prompts, run
from .models import assert_same_tokens, batch, generate, tiny, twin
from .test_circumstances import through
from .test_pressure import BLOCK, counted, small
from .test_pressure_shared import assert_nothing_held

NEW = 6
OPTIONS: dict[str, Any] = dict(max_new_tokens=NEW, eos_token_id=None)
SHARED, OWN, ROWS = 40, 5, 6
NAMES = ["llama", "qwen2-sliding"]


def alike(rows: int = ROWS, pads: int = 0) -> dict[str, Tensor]:
    """Rows of 45 tokens, the first 40 the same; one that is shorter by some."""
    ids = batch([SHARED + OWN] * rows)["input_ids"]
    ids[:, :SHARED] = ids[0, :SHARED]
    mask = torch.ones_like(ids)
    if pads:
        ids[-1] = torch.cat([torch.zeros(pads, dtype=ids.dtype), ids[-1, :-pads]])
        mask[-1, :pads] = 0
    return {"input_ids": ids, "attention_mask": mask}


@contextmanager
def running() -> Iterator[list[int]]:
    """Rows in each packed pass of a batch that takes turns."""
    packed_call, rows = turns.packed_call, list[int]()

    def noted(model: Any, cache: Any, num_tokens: Any, *args: Any) -> Any:
        outputs = packed_call(model, cache, num_tokens, *args)
        rows.append(int((num_tokens > 0).sum()))
        return outputs

    with mock.patch.object(turns, "packed_call", noted):
        yield rows


@pytest.mark.parametrize("how", ["swap", "recompute"])
@pytest.mark.parametrize("pads", [0, 3])
@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_batch_share_with_those_that_run(name: str, pads: int, how: str) -> None:
    """Rows of 13 blocks, 10 of them shared, in 22: four at once, and what they share is computed once."""
    stock, inputs = tiny(name), alike(8, pads)
    expected = generate(stock, inputs, **OPTIONS)
    model = twin(stock)
    handle = small(model, 22, min_shared_prefix=8, on_pressure=how)
    with running() as rows, through(model) as tokens, counted() as counts:
        actual = generate(model, inputs, **OPTIONS)
    assert_same_tokens(stock, expected, actual, inputs)
    # Stock's attempt got through the shared part, and so did the first row, and the fifth after four that ended as one.
    # The others had what is their own computed.
    computed = 3 * SHARED + 8 * (OWN + NEW - 1) - pads
    if name == "llama":
        assert max(rows) == 4 and counts["preempted"] == 0 and sum(tokens) == computed
    else:
        # Of a row whose window has gone past it nobody can have the shared part.
        assert max(rows) >= 4 and sum(tokens) <= computed + 2 * SHARED
    assert_nothing_held(handle)


def test_equal_rows_share_all_but_their_last_block() -> None:
    """Samples of a prompt that stands there six times, of which only two would fit by themselves."""
    stock, inputs = tiny("llama"), {"input_ids": batch([33])["input_ids"].repeat(6, 1)}
    model = twin(stock)
    handle = small(model, 20, min_shared_prefix=0)
    options: dict[str, Any] = dict(max_new_tokens=12, eos_token_id=None)
    with running() as rows:
        actual = generate(model, inputs, **options)
    assert_same_tokens(stock, generate(stock, inputs, **options), actual, inputs)
    assert max(rows) > 2
    assert_nothing_held(handle)


def test_short_beginnings_are_computed_again() -> None:
    model, inputs = tiny("llama"), alike()
    small(model, 22, min_shared_prefix=SHARED + 1)
    with running() as rows:
        generate(model, inputs, **OPTIONS)
    assert max(rows) == 1


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_batch_begin_with_what_is_remembered(name: str) -> None:
    stock, inputs = tiny(name), alike()
    model = twin(stock)
    handle = small(model, 20, prefix_caching=True, min_shared_prefix=0)
    generate(model, {"input_ids": inputs["input_ids"][:1, : SHARED + 1]}, **OPTIONS | {"max_new_tokens": 1})
    with running() as rows, count_tokens(model) as tokens:
        actual = generate(model, inputs, **OPTIONS)
    assert_same_tokens(stock, generate(stock, inputs, **OPTIONS), actual, inputs)
    assert len(rows) > 0 and max(rows) > 1
    assert max(tokens) < SHARED
    assert_nothing_held(handle)


def requests(system: Tensor, count: int, salts: int = 1) -> list[GenerationRequest]:
    return [
        GenerationRequest(torch.cat([system, own]), salt=str(number % salts))
        for number, (own,) in enumerate(prompts([OWN], seed=seed) for seed in range(count))
    ]


@contextmanager
def used() -> Iterator[list[int]]:
    """Sequences that run in each pass of generate_many."""
    passed, rows = Engine._pass, list[int]()

    def noted(self: Engine, *args: Any) -> Any:
        rows.append(len(self._rows.used))
        return passed(self, *args)

    with mock.patch.object(Engine, "_pass", noted):
        yield rows


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["swap", "error"])
def test_requests_share_with_those_that_run(how: str, name: str) -> None:
    """Requests of 13 blocks, 10 of them remembered, in 28: six at once, none of which is preempted."""
    stock = tiny(name)
    model = twin(stock)
    system = prompts([SHARED])[0]
    memory = (28 if name == "llama" else 60) * BLOCK_BYTES
    options: dict[str, Any] = dict(max_new_tokens=NEW, eos_token_id=None)
    with torch_paged.paged(model, block_size=BLOCK, max_memory=memory, prefix_caching=True, on_pressure=how) as handle:
        run(model, [torch.cat([system, system[:1]])], **options)
        handle_tokens = handle.stats().blocks_cached
        asked = requests(system, ROWS, salts=1)
        for request in asked:
            request.salt = None
        with used() as rows:
            answers, stats = run(model, asked, **options)
        assert stats.tokens_saved == ROWS * SHARED and handle_tokens > 0
    assert stats.preemptions == stats.failed == 0
    if name == "llama":
        assert max(rows) == ROWS
    for number, request in enumerate(asked):
        assert_answer(stock, request, answers[number], **options)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("max_num_batched_tokens", [16, 256])
def test_requests_wait_for_what_others_are_about_to_remember(name: str, max_num_batched_tokens: int) -> None:
    """All come at once, of two tenants: each of these has its system prompt computed once."""
    stock = tiny(name)
    model = twin(stock)
    asked = requests(prompts([SHARED])[0], ROWS, salts=2)
    options: dict[str, Any] = dict(max_new_tokens=NEW, eos_token_id=None)
    knobs: dict[str, Any] = dict(block_size=BLOCK, prefix_caching=True, min_shared_prefix=SHARED)
    with torch_paged.paged(model, **knobs), count_tokens(model) as tokens:
        answers, stats = run(model, asked, max_num_seqs=6, max_num_batched_tokens=max_num_batched_tokens, **options)
    assert stats.tokens_saved == (ROWS - 2) * SHARED
    assert sum(tokens) == 2 * SHARED + ROWS * (OWN + NEW - 1)
    for number, request in enumerate(asked):
        assert_answer(stock, request, answers[number], **options)
