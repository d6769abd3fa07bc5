"""generate_many waits for the device once a step, whatever its requests ask for."""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

import torch_paged
from torch_paged import GenerationRequest
from torch_paged.hf.many import drafts

from .many import BLOCK, OPTIONS, prompts, run
from .test_on_gpu import both
from .waits import count_waits, pretended_gpu

__all__ = ["pretended_gpu"]

NO_EOS: dict[str, Any] = OPTIONS | {"eos_token_id": None}


def never(ids: Tensor, scores: Any, **_: Any) -> Tensor:
    return ids[:, -1] < 0


MIXES: dict[str, list[dict[str, Any]]] = {
    "greedy": [{}],
    "samples": [{"options": {"do_sample": True, "top_k": 20}}],
    "settings": [{"options": {"do_sample": True, "temperature": t}} for t in (0.5, 0.8, 1.1)],
    "processors": [{"options": {"repetition_penalty": 1.3}}, {"options": {"do_sample": True, "min_length": 9}}],
    "criteria": [{"stopping_criteria": [never]}],
    "scores": [{"options": {"return_dict_in_generate": True, "output_scores": True}}],
    "all": [
        {},
        {"options": {"do_sample": True}},
        {"options": {"repetition_penalty": 1.3}, "stopping_criteria": [never]},
        {"options": {"do_sample": True, "top_p": 0.8}, "stopping_criteria": [never]},
    ],
}


def per_step(model: Any, mix: list[dict[str, Any]], **kwargs: Any) -> Counter[str]:
    """Waits that each of 8 more steps adds."""
    counts = []
    for steps in (4, 12):
        requests = [
            GenerationRequest(p.to("cuda"), seed=i, **mix[i % len(mix)]) for i, p in enumerate(prompts([9, 17, 4, 12]))
        ]
        with count_waits() as waits:
            answers, _ = run(model, requests, **(NO_EOS | {"max_new_tokens": steps} | kwargs))
        assert all(answer.error is None for answer in answers.values())
        counts.append(Counter(waits))
    assert all((counts[1][name] - counts[0][name]) % 8 == 0 for name in counts[1])
    return Counter({name: (counts[1][name] - counts[0][name]) // 8 for name in counts[1]})


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("name", ["llama", "qwen2-sliding", "mistral", "gpt2"])
def test_a_step_waits_once(pretended_gpu: None, name: str, mix: str) -> None:
    _, model = both(name)
    with torch_paged.paged(model, block_size=BLOCK, prefix_caching=True):
        assert per_step(model, MIXES[mix], stream=True).total() == 1


def parrot(ids: Tensor, scores: Tensor) -> Tensor:
    """The same token for ever: every draft is right."""
    forced = torch.full_like(scores, -1e9)
    forced[:, 9] = 0
    return forced


@pytest.mark.parametrize("name", ["llama", "qwen2-sliding"])
def test_all_criteria_of_drafts_are_one_more_wait(pretended_gpu: None, name: str) -> None:
    """Drafts of 4 tokens and one more of the model's: passes and criteria alike, however many requests there are."""
    _, model = both(name)
    mix = {"options": {"prompt_lookup_num_tokens": 4}, "stopping_criteria": [never], "logits_processor": [parrot]}
    waits, forwards = [], []
    for new in (20, 40):
        requests = [GenerationRequest([9] * 12, **mix) for _ in range(5)]
        with (
            torch_paged.paged(model, block_size=BLOCK),
            mock.patch.object(drafts, "_looked_up", lambda *_: _NINES),
            count_waits() as counted,
        ):
            _, stats = run(model, requests, **(NO_EOS | {"max_new_tokens": new}))
        assert stats.drafts_accepted == 5 * new * 4 // 5
        forwards.append(stats.forwards)
        waits.append(counted.total())
    assert forwards == [4, 8] and waits[1] - waits[0] == 2 * 4


_NINES = np.full(4, 9)
