"""Every saving has its knob: what it saves is computed again where the knob is off, and the tokens stay stock's."""

from __future__ import annotations

from typing import Any

import pytest

import torch_paged
from torch_paged import PagedConfig, generate_many

from .counting import count_tokens
from .models import assert_same_tokens, batch, generate, tiny
from .test_leaving import Wishes
from .test_many import LENGTHS, prompts

NEW = 5
NAMES = ["llama", "qwen2-sliding"]


def alike() -> dict[str, Any]:
    """A row of 21 tokens and one of 9, each twice."""
    inputs = batch([21, 9])
    return {name: value.repeat(2, 1) for name, value in inputs.items()}


OFF: list[tuple[dict[str, Any], dict[str, Any], list[int], list[int]]] = [
    ({"share_prompts": False}, {"num_beams": 3}, [21 + 9, 6], [3 * (21 + 9), 6]),
    ({"share_prompts": False}, {"num_return_sequences": 2, "do_sample": True}, [21 + 9, 4], [2 * (21 + 9), 4]),
    ({"share_prompts": False}, {}, [21 + 9, 4], [2 * (21 + 9), 4]),
    ({"min_shared_prefix": 0}, {}, [21 + 9, 4], [21 + 9, 4]),
    ({"pack_rows": False}, {}, [21 + 9, 4], [4 * 21, 4]),
    ({"pack_rows": False}, {"num_beams": 2}, [21 + 9, 4], [2 * 21, 4]),
    ({"max_prefill_tokens": 16}, {}, [21 + 9, 4], [16, 14, 4]),
    ({"drop_finished_rows": False}, {"stopping_criteria": [Wishes(21, [2, NEW, 2, NEW])]}, [30, 4, 2], [30, 4, 4]),
    ({"pack_rows": False}, {"stopping_criteria": [Wishes(21, [2, NEW, 2, NEW])]}, [30, 4, 2], [84, 4, 4]),
]


@pytest.mark.parametrize(("knobs", "kwargs", "on", "off"), OFF)
@pytest.mark.parametrize("name", NAMES)
def test_a_knob_that_is_off(
    name: str, knobs: dict[str, Any], kwargs: dict[str, Any], on: list[int], off: list[int]
) -> None:
    model = tiny(name)
    expanded = "num_beams" in kwargs or "num_return_sequences" in kwargs
    inputs = batch([21, 9]) if expanded else alike()
    options = {"max_new_tokens": NEW, "eos_token_id": None} | kwargs
    expected = generate(model, inputs, **options)
    settings: dict[str, Any]
    for settings, counts in (({}, on), (knobs, off)):
        with torch_paged.paged(model, block_size=4, **settings) as handle, count_tokens(model) as tokens:
            assert_same_tokens(model, expected, generate(model, inputs, **options), inputs)
            assert handle.stats().blocks_used == 0
        assert tokens[: len(counts)] == counts


def test_rows_that_may_not_be_packed_run_in_waves_when_they_do_not_fit() -> None:
    model, inputs = tiny("llama"), batch([21, 9, 17, 30])
    options: dict[str, Any] = dict(max_new_tokens=NEW, eos_token_id=None)
    expected = generate(model, inputs, **options)
    memory = 14 * 3 * 2 * 4 * 2 * 16 * 4
    with torch_paged.paged(model, block_size=4, pack_rows=False, max_memory=memory) as handle:
        assert_same_tokens(model, expected, generate(model, inputs, **options), inputs)
        assert handle.stats().blocks_used == 0


def test_numbers_of_generate_many_come_from_the_config() -> None:
    model = tiny("llama")
    given: dict[str, Any]
    with torch_paged.paged(model, block_size=4, max_num_seqs=2, max_num_batched_tokens=16, deterministic=True):
        for given, most in (({}, 16), ({"max_num_batched_tokens": 7}, 7)):
            with count_tokens(model) as tokens:
                many = generate_many(model, prompts(LENGTHS), max_new_tokens=3, eos_token_id=None, **given)
                assert many._engine._batch.deterministic and many._engine._batch.num_rows == 2
                list(many)
            assert max(tokens) <= most and sum(tokens) == sum(LENGTHS) + 2 * len(LENGTHS)


@pytest.mark.parametrize(
    ("knobs", "error", "message"),
    [
        ({"max_num_seqs": 0}, ValueError, "max_num_seqs: 0; must be at least 1"),
        ({"max_num_batched_tokens": 63}, ValueError, "max_num_batched_tokens: 63; must be at least 64"),
        ({"share_prompts": 1}, TypeError, "share_prompts: int; must be a bool"),
        ({"pack_rows": None}, TypeError, "pack_rows: NoneType; must be a bool"),
        ({"deterministic": "yes"}, TypeError, "deterministic: str; must be a bool"),
    ],
)
def test_out_of_range(knobs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PagedConfig(**knobs)
