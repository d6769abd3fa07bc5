"""Who gives way under pressure: the rows that come last, and what waiting rows share before a row that runs."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from transformers import PreTrainedModel

import torch_paged
from torch_paged import PagedHandle, PoolExhausted
from torch_paged.hf.turns import Turns

from .models import assert_same_tokens, batch, generate, tiny, twin
from .swaps import count_swapped
from .test_pressure import BLOCK, BLOCK_BYTES, counted, small

NEW = 20
OPTIONS: dict[str, Any] = dict(max_new_tokens=NEW, eos_token_id=None)


@pytest.mark.parametrize("how", ["swap", "recompute"])
def test_no_row_runs_while_one_before_it_waits(how: str) -> None:
    """Three of five rows run, then fewer; those put back go on before the ones that have not begun."""
    model, seen = tiny("llama"), list[tuple[list[int], list[int]]]()
    step = Turns._step

    def noted(self: Turns) -> None:
        seen.append((sorted(row for each in self._running.values() for row in each.rows), sorted(self._waiting)))
        step(self)

    small(model, 19, on_pressure=how)
    with mock.patch.object(Turns, "_step", noted), counted() as counts:
        generate(model, batch([17] * 5), **OPTIONS)
    assert counts["preempted"] > 1
    assert all(max(running) < min(waiting) for running, waiting in seen if waiting)
    assert max(len(running) for running, _ in seen) == 3


def alike(shared: int) -> dict[str, torch.Tensor]:
    """A row of 20 tokens and two of 35, of which the first `shared` are the same."""
    inputs = batch([20, 35, 35])
    inputs["input_ids"][2, :shared] = inputs["input_ids"][1, :shared]
    return inputs


def least(stock: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> int:
    """Blocks that every row has enough of when it is alone."""
    model, num_blocks = twin(stock), 4
    row = {name: tensor[-1:] for name, tensor in inputs.items()}
    while True:
        with torch_paged.paged(model, block_size=BLOCK, max_memory=num_blocks * BLOCK_BYTES):
            try:
                generate(model, row, **OPTIONS)
                return num_blocks
            except PoolExhausted:
                num_blocks += 1


def assert_nothing_held(handle: PagedHandle) -> None:
    stats = handle.stats()
    assert stats.blocks_used == stats.blocks_cached
    handle.flush()
    assert handle.stats().blocks_used == 0


@pytest.mark.parametrize("caching", [False, True], ids=["", "remembered"])
@pytest.mark.parametrize("shared", [33, 35], ids=["prefix", "equal"])
@pytest.mark.parametrize("name", ["llama", "qwen2-sliding"])
def test_what_waits_gives_up_shared_blocks_where_nothing_else_is_left(name: str, shared: int, caching: bool) -> None:
    """The rows that share are put back one after the other, each while the other still holds what they share."""
    stock, inputs = tiny(name), alike(shared)
    expected = generate(stock, inputs, **OPTIONS)
    enough, preempted = least(stock, inputs), 0
    for num_blocks in range(enough, enough + 8, 2):
        model = twin(stock)
        handle = small(model, num_blocks, min_shared_prefix=8, prefix_caching=caching)
        if caching:
            generate(model, {"input_ids": inputs["input_ids"][1:2, :33]}, **OPTIONS | {"max_new_tokens": 1})
        with counted() as counts:
            actual = generate(model, inputs, **OPTIONS)
        assert_same_tokens(stock, expected, actual, inputs)
        preempted += counts["preempted"]
        assert_nothing_held(handle)
    assert preempted > 0


def test_a_row_that_never_fits_is_an_error_still() -> None:
    stock, inputs = tiny("llama"), {name: tensor[1:] for name, tensor in alike(35).items()}
    model = twin(stock)
    handle = small(model, least(stock, inputs) - 1)
    with pytest.raises(PoolExhausted, match="raise max_memory"), count_swapped() as counts:
        generate(model, inputs, **OPTIONS)
    assert counts["out"] > 0
    assert_nothing_held(handle)


def test_what_was_swapped_out_of_a_released_cache_is_computed_again() -> None:
    """A row that waits alone for other threads leaves the cache empty, which gives its groups up."""
    stock, inputs = tiny("llama"), batch([17, 17])
    model = twin(stock)
    handle = small(model, 10)
    step, released = Turns._step, 0

    def releases(self: Turns) -> None:
        nonlocal released
        if self._swapped and not released:
            released += 1
            for row in [row for each in self._running.values() for row in each.rows]:
                self._preempt(row)
                self._swapped.pop(row, None)
            self._cache.reset()
            self._cache.state.num_seqs = len(self._pads)
            self._admit()
        step(self)

    with mock.patch.object(Turns, "_step", releases), counted() as counts:
        actual = generate(model, inputs, **OPTIONS)
    assert_same_tokens(stock, generate(stock, inputs, **OPTIONS), actual, inputs)
    assert released == 1 and counts["preempted"] > 1
    assert_nothing_held(handle)
