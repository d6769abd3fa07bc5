"""More rows than memory: all finish with stock's tokens, waiting rows begin as blocks come free, nothing leaks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

import torch_paged
from torch_paged import PagedHandle, PoolExhausted
from torch_paged.hf import turns
from torch_paged.memory import Pool

from .counting import count_tokens
from .models import VOCAB, assert_same_tokens, batch, generate, tiny, twin
from .raising import Raises
from .swaps import no_memory_after
from .test_threads import in_threads

BLOCK = 4
LENGTHS = [21, 9, 17, 30, 5, 12]
NEW = 20
# Of the three layers of the tiny models: K and V, 2 heads of 16, float32.
BLOCK_BYTES = 3 * 2 * BLOCK * 2 * 16 * 4
# Tokens that end a row: enough of them that rows end at different steps.
ENDS = list(range(190, VOCAB))


def small(model: PreTrainedModel, num_blocks: int, **knobs: Any) -> PagedHandle:
    return torch_paged.patch(model, block_size=BLOCK, max_memory=num_blocks * BLOCK_BYTES, **knobs)


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Rows that were put back to wait, and blocks that went to CPU memory and back."""
    counts = {"preempted": 0, "out": 0, "in": 0}
    preempt, save, load = turns.Turns._preempt, Pool.save_blocks, Pool.load_blocks

    def preempted(self: Any, row: int) -> None:
        counts["preempted"] += 1
        preempt(self, row)

    def saved(self: Pool, blocks: Any) -> Any:
        counts["out"] += len(blocks)
        return save(self, blocks)

    def loaded(self: Pool, tensors: Any, blocks: Any) -> None:
        counts["in"] += len(blocks)
        load(self, tensors, blocks)

    with (
        mock.patch.object(turns.Turns, "_preempt", preempted),
        mock.patch.object(Pool, "save_blocks", saved),
        mock.patch.object(Pool, "load_blocks", loaded),
    ):
        yield counts


@pytest.mark.parametrize("how", ["swap", "recompute"])
@pytest.mark.parametrize("name", ["llama", "qwen2-sliding", "mistral", "gpt2"])
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"eos_token_id": ENDS}, {"eos_token_id": None}, {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}],
    ids=["eos", "early", "no eos", "processors"],
)
def test_greedy_tokens_are_those_of_unlimited_memory(name: str, how: str, kwargs: dict[str, Any]) -> None:
    """Blocks for the longest row and a half, for two rows, and for all prompts but not for their answers."""
    stock = tiny(name)
    inputs = batch(LENGTHS)
    expected = generate(stock, inputs, max_new_tokens=NEW, **kwargs)
    for num_blocks in (15, 24, 30):
        model = twin(stock)
        # gpt2 has twice as many heads of keys and values.
        num_blocks *= 1 + (name == "gpt2")
        handle = small(model, num_blocks, on_pressure=how)
        with counted() as counts:
            actual = generate(model, inputs, max_new_tokens=NEW, **kwargs)
        assert_same_tokens(stock, expected, actual, inputs)
        stats = handle.stats()
        assert stats.blocks_used == 0
        if name != "qwen2-sliding":  # whose two pools have peaks at different times
            assert 0 < stats.peak_bytes <= num_blocks * BLOCK_BYTES
        if how == "recompute":
            assert counts["out"] == counts["in"] == 0
        else:
            assert counts["out"] == counts["in"] and (counts["out"] > 0) == (counts["preempted"] > 0)


def test_swapped_rows_are_not_computed_again_and_dropped_ones_are() -> None:
    """Two rows that end with seven blocks each, in ten: the second gives way once, at 21 tokens."""
    stock = tiny("llama")
    inputs, new = batch([17, 17]), 12
    expected = generate(stock, inputs, max_new_tokens=new, eos_token_id=None)
    for how, again in (("swap", 0), ("recompute", 20)):
        model = twin(stock)
        small(model, 10, on_pressure=how)
        with count_tokens(model) as tokens, counted() as counts:
            actual = generate(model, inputs, max_new_tokens=new, eos_token_id=None)
        assert torch.equal(actual, expected)
        assert counts["preempted"] == 1
        # Twice a pass had embedded its tokens when blocks ran out: stock's, and the one before the second row went.
        assert sum(tokens) == 2 * (17 + new - 1) + 2 + 2 + again
        assert (counts["out"], counts["in"]) == ((5, 5) if how == "swap" else (0, 0))


def test_rows_are_dropped_where_cpu_memory_is_used_up() -> None:
    """The copy of one of two groups finds room."""
    stock = tiny("qwen2-sliding")
    model, inputs = twin(stock), batch(LENGTHS)
    handle = small(model, 24)
    with counted() as counts, no_memory_after(1):
        actual = generate(model, inputs, max_new_tokens=NEW, eos_token_id=None)
    assert_same_tokens(stock, generate(stock, inputs, max_new_tokens=NEW, eos_token_id=None), actual, inputs)
    assert counts["preempted"] > 0 == counts["in"] < counts["out"] and handle.stats().blocks_used == 0


def test_rows_are_admitted_as_blocks_come_free_and_the_longest_waiting_first() -> None:
    model = tiny("llama")
    small(model, 16, on_pressure="recompute")
    inputs = batch([17] * 6)
    first: list[int] = []
    packed_call = turns.packed_call

    def noted(model: Any, cache: Any, num_tokens: Any, *args: Any) -> Any:
        outputs = packed_call(model, cache, num_tokens, *args)
        first.extend(row for row, count in enumerate(num_tokens.tolist()) if count > 1 and row not in first)
        running.append(int((num_tokens > 0).sum()))
        return outputs

    running: list[int] = []
    with mock.patch.object(turns, "packed_call", noted):
        generate(model, inputs, max_new_tokens=4, eos_token_id=None)
    # Five blocks each and one to spare for each that runs: two at a time, and one more once there is room.
    assert first == list(range(6))
    assert max(running) >= 2 and len(running) < 6 * 4, "rows ran beside one another"


def test_error_is_what_was_asked_for() -> None:
    model = tiny("llama")
    handle = small(model, 15, on_pressure="error")
    with pytest.raises(PoolExhausted):
        generate(model, batch(LENGTHS), max_new_tokens=NEW)
    assert handle.stats().blocks_used == 0


@pytest.mark.parametrize("lengths", [[40], [9, 40], [40, 9]])
def test_a_row_that_never_fits_is_an_error(lengths: list[int]) -> None:
    model = tiny("llama")
    handle = small(model, 8)
    with pytest.raises(PoolExhausted, match="raise max_memory"):
        generate(model, batch(lengths), max_new_tokens=NEW, eos_token_id=None)
    assert handle.stats().blocks_used == 0
    generate(model, batch([9]), max_new_tokens=4)


class Scores:
    """A processor of the caller's own, of which nobody knows what it looks at."""

    def __init__(self, roll: int = 1) -> None:
        self.rows: list[int] = []
        self.roll = roll

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.rows.append(len(ids))
        return scores.roll(self.roll, dims=-1)


def _ends(ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
    return ids[:, -1] % 7 == 0


@pytest.mark.parametrize("known", [True, False], ids=["turns", "waves"])
def test_allowed_tokens_of_each_row(known: bool) -> None:
    """What a row may get depends on its place in the batch."""
    stock = tiny("llama")
    model, inputs = twin(stock), batch(LENGTHS)
    own = {} if known else {"logits_processor": LogitsProcessorList([Scores(0)])}

    def allowed(row: int, ids: Tensor) -> list[int]:
        return [10 * row + 3 + len(ids) % 5, 10 * row + 9]

    options: dict[str, Any] = dict(max_new_tokens=NEW, prefix_allowed_tokens_fn=allowed, **own)
    handle = small(model, 15)
    with counted() as counts:
        actual = generate(model, inputs, **options)
    assert torch.equal(actual, generate(stock, inputs, **options))
    assert (counts["preempted"] > 0) == known
    assert handle.stats().blocks_used == 0


@pytest.mark.parametrize("num_blocks", [15, 24, 30])
@pytest.mark.parametrize("kwargs", [{}, {"eos_token_id": ENDS}], ids=["eos", "early"])
def test_a_processor_of_unknown_kind_sees_waves(num_blocks: int, kwargs: dict[str, Any]) -> None:
    stock = tiny("llama")
    model = twin(stock)
    inputs = batch(LENGTHS)
    expected = generate(stock, inputs, max_new_tokens=NEW, logits_processor=LogitsProcessorList([Scores()]), **kwargs)
    handle, scores = small(model, num_blocks), Scores()
    with counted() as counts, count_tokens(model) as tokens:
        actual = generate(model, inputs, max_new_tokens=NEW, logits_processor=LogitsProcessorList([scores]), **kwargs)
    if num_blocks == 15:
        # The whole batch, then half of it: without padding.
        assert tokens[:2] == [sum(LENGTHS), sum(LENGTHS[:3])]
    assert torch.equal(actual, expected)
    assert counts["preempted"] == 0
    assert min(scores.rows) < len(LENGTHS)
    assert handle.stats().blocks_used == 0


def test_a_criterion_of_unknown_kind_sees_waves() -> None:
    stock = tiny("llama")
    model = twin(stock)
    inputs = batch(LENGTHS)
    options: dict[str, Any] = dict(max_new_tokens=NEW, stopping_criteria=StoppingCriteriaList([_ends]))
    handle = small(model, 15)
    assert torch.equal(generate(model, inputs, **options), generate(stock, inputs, **options))
    assert handle.stats().blocks_used == 0


def test_samples_keep_their_distribution() -> None:
    """The second token of many rows, one of two that the first allows, is drawn as often as its probability says."""
    stock = tiny("llama")
    model = twin(stock)
    rows = 300
    inputs = {"input_ids": batch([9])["input_ids"].expand(rows, -1)}
    options: dict[str, Any] = dict(do_sample=True, top_k=2, temperature=3.0, max_new_tokens=3, eos_token_id=None)
    small(model, 60)
    drawn = generate(model, inputs, **options)[:, -3:]
    once = generate(stock, {"input_ids": inputs["input_ids"][:1]}, max_new_tokens=1, eos_token_id=None,
                    return_dict_in_generate=True, output_logits=True, do_sample=False)  # fmt: skip
    likely, tokens = (once.logits[0][0] / 3).topk(2)
    share = float((drawn[:, 0] == tokens[0]).float().mean())
    expected = float(likely.softmax(0)[0])
    assert set(drawn[:, 0].tolist()) <= set(tokens.tolist())
    assert abs(share - expected) < 4 * (expected * (1 - expected) / rows) ** 0.5 + 1e-6


@pytest.mark.parametrize("at", [1, 4, 15, 30])
@pytest.mark.parametrize("known", [True, False], ids=["turns", "waves"])
def test_an_exception_in_mid_run_leaks_nothing(at: int, known: bool) -> None:
    stock = tiny("llama")
    model = twin(stock)
    handle = small(model, 15, prefix_caching=True)
    options: dict[str, Any] = dict(max_new_tokens=NEW, eos_token_id=None)
    known_as_row_by_row = mock.patch("torch_paged.hf.pressure.works_row_by_row", lambda *_: known)
    with known_as_row_by_row, pytest.raises(ZeroDivisionError) as caught:
        generate(model, batch(LENGTHS), logits_processor=LogitsProcessorList([Raises(at)]), **options)
    stats = handle.stats()
    assert stats.blocks_used == stats.blocks_cached
    del caught
    assert torch.equal(generate(model, batch(LENGTHS), **options), generate(stock, batch(LENGTHS), **options))
    handle.flush()
    assert handle.stats().blocks_used == 0


def test_threads_that_press_one_another_all_finish() -> None:
    stock = tiny("llama")
    model = twin(stock)
    handle = small(model, 40)
    prompts = [batch(LENGTHS[:4], seed=seed) for seed in range(2)]
    options: dict[str, Any] = dict(max_new_tokens=NEW, eos_token_id=None)
    results = in_threads([lambda inputs=inputs: generate(model, inputs, **options) for inputs in prompts])
    for inputs, actual in zip(prompts, results, strict=True):
        assert not isinstance(actual, Exception), actual
        assert_same_tokens(stock, generate(stock, inputs, **options), actual, inputs)
    assert handle.stats().blocks_used == 0


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int32], ids=str)
def test_masks_of_any_dtype(dtype: torch.dtype) -> None:
    stock = tiny("llama")
    model = twin(stock)
    inputs = batch(LENGTHS)
    expected = generate(stock, inputs, max_new_tokens=NEW, eos_token_id=None)
    mask = inputs["attention_mask"]
    handle = small(model, 15)
    with counted() as counts:
        actual = generate(model, inputs | {"attention_mask": mask.to(dtype)}, max_new_tokens=NEW, eos_token_id=None)
    assert_same_tokens(stock, expected, actual, inputs)
    assert counts["preempted"] > 0 == handle.stats().blocks_used
