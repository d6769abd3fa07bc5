"""The latencies and the throughput that generate_many tells, to the second of a clock that passes alone move."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

import torch_paged
from torch_paged import GenerationRequest, GenerationResult, generate_many
from torch_paged.hf.many import stats
from torch_paged.hf.many.batch import Batch
from torch_paged.hf.many.stats import Percentiles

from .many import BLOCK, OPTIONS, prompts
from .models import tiny


def test_known_times() -> None:
    """A and B begin together, C when B is done; passes take 1, 2, 5 and 3 seconds, the caller 7 with B's result."""
    model, clock, passes = tiny("llama"), 100.0, iter([1.0, 2.0, 5.0, 3.0])
    run = Batch.run

    def timed(*args: Any) -> Any:
        nonlocal clock
        passed = run(*args)
        clock += next(passes)
        return passed

    asked = zip(prompts([6, 9, 4]), "ABC", [3, 2, 2], strict=True)
    requests = [GenerationRequest(p, request_id=name, options={"max_new_tokens": new}) for p, name, new in asked]
    got: dict[Any, GenerationResult] = {}
    with (
        torch_paged.paged(model, block_size=BLOCK),
        mock.patch.object(stats, "time", SimpleNamespace(perf_counter=lambda: clock)),
        mock.patch.object(Batch, "run", timed),
    ):
        many = generate_many(model, requests, **(OPTIONS | {"eos_token_id": None, "max_num_seqs": 2}))
        for result in many:
            got[result.request_id] = result
            clock += 7.0 * (result.request_id == "B")
    told = many.stats()
    assert list(got) == ["B", "A", "C"] and next(passes, None) is None
    assert {name: result.time_to_first_token for name, result in got.items()} == {"A": 1.0, "B": 1.0, "C": 5.0}
    assert {name: result.seconds for name, result in got.items()} == {"A": 15.0, "B": 3.0, "C": 8.0}
    # Of 1, 1, 5: the last two, 0.9 and 0.98 of the way between them.
    assert told.time_to_first_token == Percentiles(*map(pytest.approx, (1.0, 1.0 + 0.9 * 4.0, 1.0 + 0.98 * 4.0)))
    # B's 2, A's 2 and 7 + 5, C's 3.
    assert told.inter_token_latency == Percentiles(*map(pytest.approx, (2.5, 3.0 + 0.85 * 9.0, 3.0 + 0.97 * 9.0)))
    assert (told.seconds, told.new_tokens, told.forwards, told.finished) == (11.0, 7, 4, 3)
    assert told.tokens_per_second == pytest.approx(7 / 11)


def test_nothing_was_measured() -> None:
    many = generate_many(tiny("llama"), [])
    assert list(many) == []
    told = many.stats()
    every = [*vars(told.time_to_first_token).values(), *vars(told.inter_token_latency).values()]
    assert len(every) == 6 and bool(torch.tensor(every).isnan().all())
    assert told.tokens_per_second == 0.0 == told.new_tokens


def test_tokens_that_come_together_have_no_time_between_them() -> None:
    """Drafts: several tokens of one pass are one moment, and the time to it counts once."""
    model, clock = tiny("llama"), 0.0
    run = Batch.run

    def timed(*args: Any) -> Any:
        nonlocal clock
        passed = run(*args)
        clock += 2.0
        return passed

    def same(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -1e9)
        forced[:, 9] = 0
        return forced

    request = GenerationRequest([9] * 12, logits_processor=[same], options={"prompt_lookup_num_tokens": 3})
    with (
        torch_paged.paged(model, block_size=BLOCK),
        mock.patch.object(stats, "time", SimpleNamespace(perf_counter=lambda: clock)),
        mock.patch.object(Batch, "run", timed),
    ):
        many = generate_many(model, [request], **(OPTIONS | {"eos_token_id": None, "max_new_tokens": 12}))
        assert [event.finish_reason for event in many] == ["length"]
    told = many.stats()
    assert told.drafts_accepted > 0 and told.seconds == 2.0 * told.forwards
    assert told.inter_token_latency == Percentiles(2.0, 2.0, 2.0)
    assert told.tokens_per_second == 12 / told.seconds
