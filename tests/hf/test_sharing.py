"""What is shared is stored once and computed once: exact counts of tokens and blocks."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import DynamicCache

import torch_paged
from torch_paged.memory import Pool

from .counting import count_tokens
from .models import assert_same_tokens, batch, generate, tiny

NEW = 5


@pytest.mark.parametrize("kwargs", [{"num_beams": 4}, {"do_sample": True, "num_return_sequences": 4}])
@pytest.mark.parametrize("lengths", [[32], [32, 9]])
def test_expanded_prompts_are_prefilled_once(kwargs: dict[str, int], lengths: list[int]) -> None:
    model, inputs = tiny("llama"), batch(lengths)
    expected = generate(model, inputs, max_new_tokens=NEW, eos_token_id=None, **kwargs)
    with torch_paged.paged(model), count_tokens(model) as tokens:
        actual = generate(model, inputs, max_new_tokens=NEW, eos_token_id=None, **kwargs)
    assert_same_tokens(model, expected, actual, prompt=inputs)
    rows = 4 * len(lengths)
    assert tokens == [sum(lengths)] + [rows] * (NEW - 1)


def test_samples_hold_the_prompts_blocks_once() -> None:
    model, inputs = tiny("llama"), batch([34])
    with torch_paged.paged(model, block_size=8) as handle:
        out = generate(
            model, inputs, num_return_sequences=8, do_sample=True, max_new_tokens=NEW, eos_token_id=None,
            return_dict_in_generate=True,
        )  # fmt: skip
        stats = handle.stats()
        # 34 prompt tokens: 4 full blocks shared by all; 2 + 4 tokens in a block of each row's own.
        assert stats.blocks_shared == 4
        assert stats.blocks_used == 4 + 8
        per_token = stats.bytes_held // (stats.blocks_used * 8)
        assert stats.bytes_useful == (4 * 8 + 8 * (34 - 32 + NEW - 1)) * per_token
        assert stats.waste == pytest.approx(1 - (32 + 48) / 96)
        del out
        assert handle.stats().blocks_used == 0


@pytest.mark.parametrize("name", ["llama", "qwen2-sliding"])
@pytest.mark.parametrize(("length", "copies"), [(32, 0), (34, 3)])
def test_a_partly_filled_tail_is_copied_when_its_rows_diverge(name: str, length: int, copies: int) -> None:
    """Once for all rows but one, which keeps it, in each group of layers; a full block is never copied."""
    model, copied = tiny(name), 0
    copy_blocks = Pool.copy_blocks

    def counted(self: Pool, block_mapping: Any) -> None:
        nonlocal copied
        copied += len(block_mapping)
        copy_blocks(self, block_mapping)

    with torch_paged.paged(model, block_size=8), mock.patch.object(Pool, "copy_blocks", counted):
        generate(model, batch([length]), num_return_sequences=4, do_sample=True, max_new_tokens=1, eos_token_id=None)
        assert copied == 0, "nothing is written behind the prompt"
        generate(model, batch([length]), num_return_sequences=4, do_sample=True, max_new_tokens=NEW, eos_token_id=None)
    assert copied == copies * (1 + (name == "qwen2-sliding"))


def test_beams_copy_only_partly_filled_tails() -> None:
    model, inputs = tiny("llama"), batch([32])
    with torch_paged.paged(model, block_size=8) as handle:
        out = generate(
            model, inputs, num_beams=4, num_return_sequences=4, max_new_tokens=NEW, eos_token_id=None,
            return_dict_in_generate=True,
        )  # fmt: skip
        stats = handle.stats()
        assert stats.blocks_shared >= 4
        assert 4 + 1 <= stats.blocks_used <= 4 + 4
        del out


def test_deepcopied_cache_shares_every_block_until_written() -> None:
    """Prompt reuse as transformers documents it: one cache of the prompt, a deep copy for each continuation."""
    model = tiny("mistral")
    prompt, turns = batch([20])["input_ids"], [batch([n], seed=n)["input_ids"] for n in (3, 6)]

    def continuations(cache: DynamicCache) -> list[torch.Tensor]:
        with torch.no_grad():
            model(prompt, past_key_values=cache)
        outs = []
        for turn in turns:
            inputs = {"input_ids": torch.cat([prompt, turn], 1), "past_key_values": copy.deepcopy(cache)}
            outs.append(generate(model, inputs, max_new_tokens=6))
        return outs

    expected = continuations(DynamicCache(config=model.config))
    with torch_paged.paged(model):
        cache = torch_paged.PagedCache(model.config, block_size=8)
        actual = continuations(cache)
        assert [torch.equal(a, b) for a, b in zip(actual, expected, strict=True)] == [True, True]
        held = cache.stats().blocks_used
        copies = [copy.deepcopy(cache) for _ in range(3)]
        assert cache.stats().blocks_used == held == cache.stats().blocks_shared
        del copies
        assert cache.stats().blocks_shared == 0


def test_blocks_behind_the_window_are_freed() -> None:
    model, inputs = tiny("mistral"), batch([64, 40])
    with torch_paged.paged(model, block_size=4) as handle:
        out = generate(model, inputs, max_new_tokens=30, eos_token_id=None, return_dict_in_generate=True)
        # A window of 13 tokens touches at most 4 blocks of 4, and a row may hold one more that it has just left.
        assert handle.stats().blocks_used <= 2 * 5
        del out


def test_full_and_sliding_layers_have_tables_of_their_own() -> None:
    model, inputs = tiny("qwen2-sliding"), batch([64])
    with torch_paged.paged(model, block_size=4) as handle:
        out = generate(model, inputs, max_new_tokens=20, eos_token_id=None, return_dict_in_generate=True)
        full = (64 + 19 + 3) // 4
        assert full < handle.stats().blocks_used <= full + 5
        del out
