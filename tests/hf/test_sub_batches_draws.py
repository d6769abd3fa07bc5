"""What a loop has chosen when its batch runs out of blocks stays chosen in the sub-batches that begin anew."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import stopping_criteria

import torch_paged
from torch_paged import PoolExhausted
from torch_paged.hf.sub_batches import Part, SubBatches

from .models import EOS, VOCAB, batch, generate, tiny, twin
from .test_pressure import LENGTHS, NEW
from .test_sub_batches import BLOCK, DICT, peak_bytes, pressed


def test_samples_that_ran_out_are_not_drawn_anew() -> None:
    """Two rows that end at once or stay, each with its probability: both at once fit, and are not preferred for it."""
    stock = tiny("llama")
    model, rows, rounds = twin(stock), 2, 300
    inputs = {"input_ids": batch([9])["input_ids"].expand(rows, -1)}

    def ends_or_stays(ids: Tensor, scores: Tensor) -> Tensor:
        chosen = torch.full_like(scores, -torch.inf)
        chosen[:, 5] = 0.0
        if ids.shape[1] == 9:
            chosen[:, EOS] = 0.0
        return chosen

    def sees_them(ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        assert len(scores) == ids.shape[1] - 9 and scores[0][:, [5, EOS]].eq(0).all()
        return torch.zeros(len(ids), dtype=torch.bool)

    options: dict[str, Any] = dict(max_new_tokens=8, do_sample=True, top_k=0, **DICT)
    options["stopping_criteria"] = StoppingCriteriaList([sees_them])
    # The shared prompt, and one more block for each row; two for one that stays.
    block_bytes = 3 * 2 * BLOCK * 2 * 16 * 4
    ended = 0
    with torch_paged.paged(model, block_size=BLOCK, max_memory=6 * block_bytes) as handle:
        for seed in range(rounds):
            processors = LogitsProcessorList([ends_or_stays])
            result = generate(model, inputs, seed=seed, logits_processor=processors, **options)
            assert all(torch.isneginf(scores).sum() >= VOCAB - 2 for scores in result.scores)
            assert result.scores[0][:, [5, EOS]].eq(0).all(), "scores are those before the choice"
            ended += int((result.sequences[:, 9] == EOS).sum())
            del result  # which holds blocks, where both rows fit
        assert handle.stats().blocks_used == 0
    share = ended / (rows * rounds)
    assert abs(share - 0.5) < 4 * (0.25 / (rows * rounds)) ** 0.5


def test_time_that_is_over_takes_no_tokens_away() -> None:
    """Over when the batch is divided: rows keep what they had, and get the one token after which time is looked at."""
    stock, inputs, now, reached = tiny("jamba"), batch(LENGTHS), 0.0, list[int]()
    expected = generate(stock, inputs, max_new_tokens=NEW, eos_token_id=None)
    model, part = twin(stock), SubBatches._sample_part
    options: dict[str, Any] = dict(max_new_tokens=NEW, eos_token_id=None, max_time=60.0)

    def noted(self: SubBatches, part_of: Part) -> Any:
        nonlocal now
        try:
            return part(self, part_of)
        except PoolExhausted:
            assert part_of.chosen is not None
            reached.append(part_of.chosen.shape[1])
            now += 1000.0
            raise

    peak = peak_bytes(twin(stock), inputs, options)
    with (
        torch_paged.paged(model, block_size=BLOCK, max_memory=peak * 6 // 10),
        mock.patch.object(stopping_criteria, "time", SimpleNamespace(time=lambda: now)),
        mock.patch.object(SubBatches, "_sample_part", noted),
    ):
        actual = generate(model, inputs, **options)
    width = reached[0] + 1
    assert len(reached) == 1 and max(LENGTHS) < width < expected.shape[1]
    assert torch.equal(actual, expected[:, :width])


def test_beams_that_ran_out_are_not_drawn_anew() -> None:
    """Sub-batches begin with what the whole batch had drawn, and go on from there."""
    stock, inputs, options = tiny("llama"), batch(LENGTHS), dict(max_new_tokens=12, eos_token_id=None, num_beams=3)
    tries: list[tuple[range, list[Tensor]]] = []
    of_part = SubBatches._beam_part

    def noted(self: SubBatches, part: Part) -> Any:
        try:
            return of_part(self, part)
        finally:
            assert part.beams is not None
            tries.append((part.rows, part.beams.steps))

    with mock.patch.object(SubBatches, "_beam_part", noted):
        expected, actual, attempts = pressed(stock, inputs, lambda: options | DICT | {"do_sample": True})
    assert attempts > 2 and actual.sequences.shape == expected.sequences.shape
    (_, whole), *parts = tries[1:]  # the first had memory for all
    assert 0 < len(whole) < 12 == len(parts[-1][1])
    for rows, steps in parts:
        for before, after in zip(whole, steps, strict=False):
            assert torch.equal(before[rows.start // 3 : rows.stop // 3], after)
    # The scores of a step are those of the beams that were drawn: they add up to that of the sequence.
    scores = stock.compute_transition_scores(actual.sequences, actual.scores, actual.beam_indices)
    length = (actual.beam_indices >= 0).sum(1)
    torch.testing.assert_close(scores.sum(1) / length, actual.sequences_scores, rtol=1e-4, atol=1e-4)
