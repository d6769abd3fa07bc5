"""Remembered prefixes: what is not computed again, for whom, and that the tokens stay stock's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel

import torch_paged
from torch_paged import PagedHandle

from .counting import count_tokens
from .models import assert_same_tokens, batch, generate, tiny, twin
from .raising import Raises
from .test_threads import in_threads

BLOCK = 4


def remembering(model: PreTrainedModel, **knobs: Any) -> PagedHandle:
    return torch_paged.patch(model, block_size=BLOCK, prefix_caching=True, **knobs)


def computed(model: PreTrainedModel, inputs: dict[str, Any], **kwargs: Any) -> tuple[int, Any]:
    """Tokens that the first forward pass of a `generate` computes, and what it returns."""
    with count_tokens(model) as tokens:
        result = generate(model, inputs, **({"eos_token_id": None, "max_new_tokens": 6} | kwargs))
    return tokens[0], result


def assert_as_stock(stock: PreTrainedModel, inputs: dict[str, Any], actual: Tensor, **kwargs: Any) -> None:
    expected = generate(stock, inputs, **({"eos_token_id": None, "max_new_tokens": 6} | kwargs))
    assert_same_tokens(stock, expected, actual, inputs)


def more(inputs: dict[str, Tensor], sequences: Tensor, width: int, seed: int) -> dict[str, Tensor]:
    """The next turn of a chat: all that was said, and `width` new tokens."""
    new = batch([width] * len(sequences), seed=seed)["input_ids"]
    ids = torch.cat([sequences, new], 1)
    seen = ids.shape[1] - inputs["attention_mask"].shape[1]
    return {"input_ids": ids, "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, seen), value=1)}


def full(tokens: int) -> int:
    return tokens // BLOCK * BLOCK


@pytest.mark.parametrize("name", ["llama", "qwen2-sliding", "mistral", "gpt2", "bloom"])
def test_a_chat_prefills_only_the_new_turn(name: str) -> None:
    """The caller passes the whole history each turn. Windows of 13 tokens are long gone past by the last turn."""
    stock = tiny(name)
    model = twin(stock)
    handle = remembering(model)
    inputs, lengths = batch([21, 9]), [21, 9]
    held, saved = [0, 0], 0
    for turn in range(4):
        count, actual = computed(model, inputs)
        assert_as_stock(stock, inputs, actual)
        assert count == sum(lengths) - sum(map(full, held))
        saved += sum(map(full, held))
        stats = handle.stats()
        assert (stats.prefix_hits, stats.prefix_tokens_saved) == (2 * turn, saved)
        # All blocks in use are remembered ones, and nobody else holds them.
        assert stats.blocks_used == stats.blocks_cached > 0
        held = [length + 5 for length in lengths]  # the last of 6 new tokens was never fed
        inputs = more(inputs, actual, 7, seed=turn)
        lengths = [length + 13 for length in lengths]
    handle.flush()
    assert handle.stats().blocks_used == 0


@pytest.mark.parametrize("name", ["llama", "qwen2-sliding", "mistral", "gemma2"])
def test_prompts_that_take_several_passes_are_remembered_whole(name: str) -> None:
    """A chat prefills its new turn, and a question behind the same system prompt itself, far behind the window."""
    stock = tiny(name)
    model = twin(stock)
    remembering(model, max_prefill_tokens=16)
    inputs, lengths, held = batch([60, 44]), [60, 44], [0, 0]
    for turn in range(3):
        with count_tokens(model) as tokens:
            actual = generate(model, inputs, eos_token_id=None, max_new_tokens=6)
        assert_as_stock(stock, inputs, actual)
        assert max(tokens) <= 16
        assert sum(tokens[:-5]) == sum(lengths) - sum(map(full, held))
        held = [length + 5 for length in lengths]
        inputs, lengths = more(inputs, actual, 7, seed=turn), [length + 13 for length in lengths]
    system = batch([50], seed=9)["input_ids"]
    for seed, saved in ((1, 0), (2, full(50))):
        ids = torch.cat([system, batch([40], seed=seed)["input_ids"]], 1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with count_tokens(model) as tokens:
            actual = generate(model, inputs, eos_token_id=None, max_new_tokens=6)
        assert_as_stock(stock, inputs, actual)
        assert sum(tokens[:-5]) == 90 - saved


def test_a_pass_that_fails_leaves_what_was_remembered_of_those_before_it() -> None:
    stock = tiny("qwen2-sliding")
    model = twin(stock)
    handle = remembering(model, max_prefill_tokens=16)
    inputs = batch([60])
    embedding, passes = model.get_input_embeddings(), []
    embed = embedding.forward

    def fail(ids: Tensor) -> Tensor:
        passes.append(ids.numel())
        if len(passes) == 3:
            raise KeyError("third pass")
        return embed(ids)

    with mock.patch.object(embedding, "forward", fail), pytest.raises(KeyError, match="third pass"):
        generate(model, inputs)
    stats = handle.stats()
    assert stats.blocks_used == stats.blocks_cached
    with count_tokens(model) as tokens:
        actual = generate(model, inputs, eos_token_id=None, max_new_tokens=6)
    assert sum(tokens[:-5]) == 60 - 2 * 16
    assert_as_stock(stock, inputs, actual)


@pytest.mark.parametrize("length", [16, 17, 19, 20])
def test_the_last_token_of_a_prompt_is_always_computed(length: int) -> None:
    stock = tiny("llama")
    model = twin(stock)
    remembering(model)
    inputs = batch([length])
    assert computed(model, inputs)[0] == length
    count, actual = computed(model, inputs)
    assert count == length - full(length - 1)
    assert_as_stock(stock, inputs, actual)


def test_rows_match_one_by_one() -> None:
    """Of three rows one begins like an earlier prompt, one like an earlier answer, one like nothing."""
    stock = tiny("llama")
    model = twin(stock)
    remembering(model)
    first = batch([14])
    _, answer = computed(model, first)
    ids, mask = batch([30, 19, 11], seed=4).values()
    ids[0, -30:-16] = first["input_ids"][0]
    ids[1, -19:] = answer[0, :19]
    count, actual = computed(model, {"input_ids": ids, "attention_mask": mask})
    assert count == (30 - full(14)) + (19 - full(18)) + 11
    assert_as_stock(stock, {"input_ids": ids, "attention_mask": mask}, actual)


@pytest.mark.parametrize("kwargs", [{"num_beams": 3}, {"num_return_sequences": 3, "do_sample": True}])
def test_beams_and_samples_begin_with_prefixes(kwargs: dict[str, Any]) -> None:
    stock = tiny("llama")
    model = twin(stock)
    handle = remembering(model)
    inputs = batch([21, 9])
    computed(model, inputs, **kwargs)
    stats = handle.stats()
    assert stats.blocks_used == stats.blocks_cached
    count, actual = computed(model, inputs, **kwargs)
    assert count == (21 - 20) + (9 - 8)
    assert_as_stock(stock, inputs, actual, **kwargs)


def test_samples_are_remembered_with_their_own_continuations() -> None:
    stock = tiny("llama")
    model = twin(stock)
    remembering(model)
    inputs = batch([14])
    samples = generate(model, inputs, do_sample=True, num_return_sequences=3, eos_token_id=None, max_new_tokens=9)
    assert len({tuple(row) for row in samples.tolist()}) == 3
    again = {"input_ids": samples, "attention_mask": torch.ones_like(samples)}
    count, actual = computed(model, again)
    assert count == 3 * (23 - full(22))
    assert_as_stock(stock, again, actual)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_prompt_of_pads_alone_is_stocks(rows: int) -> None:
    stock = tiny("llama")
    model = twin(stock)
    handle = remembering(model)
    inputs = batch([9] * rows)
    inputs["attention_mask"] = torch.zeros_like(inputs["attention_mask"])
    _, actual = computed(model, inputs)
    assert torch.equal(actual, generate(stock, inputs, eos_token_id=None, max_new_tokens=6))
    assert handle.stats().blocks_used == handle.stats().blocks_cached


def test_nothing_is_remembered_unasked() -> None:
    model = tiny("llama")
    handle = torch_paged.patch(model, block_size=BLOCK)
    for _ in range(2):
        assert computed(model, batch([21, 9]))[0] == 30
        assert handle.stats().blocks_used == handle.stats().blocks_cached == handle.stats().prefix_hits == 0


def test_salts_share_nothing() -> None:
    stock = tiny("llama")
    model = twin(stock)
    handle = remembering(model, salt="tenant 1")
    inputs = batch([21])
    assert computed(model, inputs)[0] == 21
    for _ in range(2):
        with torch_paged.paged(model, block_size=BLOCK, prefix_caching=True, salt="tenant 2"):
            count, actual = computed(model, inputs)
            # Remembered from one block to the next, although the tenants take turns.
            assert count == (21 if handle.stats().prefix_hits == 0 else 1)
            assert_as_stock(stock, inputs, actual)
        assert computed(model, inputs)[0] == 1
    handle.flush()
    assert computed(model, inputs)[0] == 21


def test_prefixes_make_room_before_blocks_run_out() -> None:
    stock = tiny("llama")
    model = twin(stock)
    block_bytes = 3 * 2 * BLOCK * 2 * 16 * 4
    handle = remembering(model, max_memory=12 * block_bytes)
    for seed in range(4):
        inputs = batch([30], seed=seed)
        count, actual = computed(model, inputs)
        assert count == 30
        assert_as_stock(stock, inputs, actual)
        assert handle.stats().blocks_used <= 12
    assert computed(model, batch([30], seed=3))[0] == 30 - full(29), "the prompt used last is still there"


def test_threads_share_prefixes() -> None:
    stock = tiny("llama")
    model = twin(stock)
    handle = remembering(model)
    prompts = [batch([21, 13], seed=seed % 2) for seed in range(4)]
    for _ in range(2):
        results = in_threads([lambda inputs=inputs: computed(model, inputs)[1] for inputs in prompts])
        for inputs, actual in zip(prompts, results, strict=True):
            assert_as_stock(stock, inputs, actual)
    stats = handle.stats()
    assert stats.prefix_hits >= 8
    assert stats.blocks_used == stats.blocks_cached


@pytest.mark.parametrize("name", ["llama", "qwen2-sliding"])
def test_an_exception_in_mid_run_leaks_nothing(name: str) -> None:
    stock = tiny(name)
    model = twin(stock)
    handle = remembering(model)
    inputs = batch([21, 9])
    for at in (1, 4):
        with pytest.raises(ZeroDivisionError):
            computed(model, inputs, logits_processor=LogitsProcessorList([Raises(at)]))
        stats = handle.stats()
        assert stats.blocks_used == stats.blocks_cached
    count, actual = computed(model, inputs)
    assert count == (21 - 20) + (9 - 8), "the prompts were computed before it"
    assert_as_stock(stock, inputs, actual)


def _positions(inputs: dict[str, Tensor]) -> dict[str, Any]:
    return inputs | {"position_ids": (inputs["attention_mask"].cumsum(1) + 2) * inputs["attention_mask"]}


@pytest.mark.parametrize(
    "change",
    [
        _positions,
        lambda inputs: inputs | {"output_hidden_states": True, "return_dict_in_generate": True},
        lambda inputs: inputs | {"output_attentions": True, "return_dict_in_generate": True},
        lambda inputs: inputs | {"use_cache": False},
        lambda inputs: inputs | {"cache_implementation": "dynamic"},
        lambda inputs: inputs | {"past_key_values": torch_paged.PagedCache(tiny("llama").config)},
    ],
    ids=["positions", "hidden states", "attentions", "no cache", "stock cache", "own cache"],
)
def test_what_depends_on_more_than_tokens_is_computed(change: Callable[..., dict[str, Any]]) -> None:
    stock = tiny("llama", attn_implementation="eager")
    model = twin(stock)
    handle = remembering(model)
    computed(model, batch([21, 9]))
    count, _ = computed(model, change(batch([21, 9])))
    assert count >= 30
    assert handle.stats().prefix_hits == 0
    # transformers puts hooks into a model to hand out its states, with which the model forgets.
    for _ in range(2):
        count, actual = computed(model, batch([21, 9]))
        assert_as_stock(stock, batch([21, 9]), actual)
    assert count == (21 - 20) + (9 - 8)


def test_autocast_has_prefixes_of_its_own() -> None:
    stock = tiny("llama")
    model = twin(stock)
    remembering(model)
    inputs = batch([21])
    assert computed(model, inputs)[0] == 21
    for count in (21, 1):
        with torch.autocast("cpu", torch.bfloat16):
            assert computed(model, inputs)[0] == count
    count, actual = computed(model, inputs)
    assert count == 1
    assert_as_stock(stock, inputs, actual)


def test_a_returned_cache_keeps_its_blocks_through_a_flush() -> None:
    stock = tiny("llama")
    model = twin(stock)
    handle = remembering(model)
    inputs = batch([21])
    computed(model, inputs)
    result = generate(model, inputs, eos_token_id=None, max_new_tokens=6, return_dict_in_generate=True)
    handle.flush()
    assert handle.stats().blocks_used == 7 > handle.stats().blocks_cached == 0
    again = more(inputs, result.sequences, 3, seed=1)
    actual = generate(model, again | {"past_key_values": result.past_key_values}, eos_token_id=None, max_new_tokens=6)
    assert_as_stock(stock, again, actual)
    del result
    assert handle.stats().blocks_used == 0


def test_unpatching_forgets() -> None:
    model = tiny("llama")
    handle = remembering(model)
    computed(model, batch([21]))
    assert handle.stats().blocks_used > 0
    handle.unpatch()
    assert handle.stats().blocks_used == 0
