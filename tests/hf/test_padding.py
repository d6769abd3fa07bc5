"""A padded batch is never silently wrong, whoever makes the cache and whatever the mask does later."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import torch_paged

from .counting import count_calls, messages
from .models import GATHERED, NATIVE, assert_same_tokens, batch, generate, tiny

LENGTHS = [30, 4, 17]


@pytest.mark.parametrize("name", NATIVE + GATHERED)
def test_explicit_cache_on_an_unpatched_model(name: str) -> None:
    """The regression this file exists for: no mask reaches such a cache, so pads must be stored and masked."""
    model, inputs = tiny(name), batch(LENGTHS)
    expected = generate(model, inputs)
    with count_calls() as calls:
        cache = torch_paged.PagedCache(model.config, block_size=4)
        actual = generate(model, inputs, past_key_values=cache)
    assert_same_tokens(model, expected, actual, prompt=inputs)
    assert calls["paged.attention"] == 0 < calls["gather"]


@pytest.mark.parametrize("name", NATIVE)
def test_explicit_cache_on_a_patched_model_is_read_in_place(name: str) -> None:
    model, inputs = tiny(name), batch(LENGTHS)
    expected = generate(model, inputs)
    with torch_paged.paged(model), count_calls() as calls:
        cache = torch_paged.PagedCache(model.config, block_size=4)
        actual = generate(model, inputs, past_key_values=cache)
    assert_same_tokens(model, expected, actual, prompt=inputs)
    assert calls["gather"] == 0


def test_pads_are_not_stored_when_patched() -> None:
    model, inputs = tiny("llama"), batch(LENGTHS)
    with torch_paged.paged(model, block_size=1):
        cache = torch_paged.PagedCache(model.config, block_size=1)
        model(**inputs, past_key_values=cache)
        assert cache.stats().blocks_used == sum(LENGTHS)
        assert cache.get_seq_length() == max(LENGTHS)
        stock = DynamicCache(config=model.config)
    model(**inputs, past_key_values=stock)
    real = inputs["attention_mask"].bool()[:, None, :, None]
    for layer, stock_layer in zip(cache.layers, stock.layers, strict=True):
        for got, want in ((layer.keys, stock_layer.keys), (layer.values, stock_layer.values)):
            torch.testing.assert_close(got, want * real)


def test_patched_model_without_a_paged_cache_keeps_its_mask() -> None:
    """An attention implementation without a mask function drops left padding silently; ours has one."""
    model, inputs = tiny("llama"), batch(LENGTHS)
    with torch.no_grad():
        expected = model(**inputs).logits
        with torch_paged.paged(model):
            assert torch.equal(model(**inputs).logits, expected)
            assert torch.equal(model(**inputs, use_cache=False).logits, expected)


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("holes", ["middle", "right"])
def test_masks_with_holes(name: str, holes: str, caplog: pytest.LogCaptureFixture) -> None:
    """Full attention skips hidden columns natively. Gathered: a window, which counts them; the last, which is read."""
    model = tiny(name)
    ids = batch([20, 20])["input_ids"]
    mask = torch.ones(2, 20, dtype=torch.long)
    if holes == "middle":
        mask[0, 7:11] = 0
    else:
        mask[0, 15:] = 0
    token = torch.tensor([[5], [9]])
    longer = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)

    def logits(cache: DynamicCache) -> list[torch.Tensor]:
        with torch.no_grad():
            first = model(ids, attention_mask=mask, past_key_values=cache).logits[mask.bool()]
            return [first, model(token, attention_mask=longer, past_key_values=cache).logits]

    expected = logits(DynamicCache(config=model.config))
    with caplog.at_level(logging.WARNING, "torch_paged"), torch_paged.paged(model), count_calls() as calls:
        actual = logits(torch_paged.PagedCache(model.config, block_size=4))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    assert (calls["gather"] > 0) == (name == "mistral" or holes == "right")
    assert ("has holes" in caplog.text) == (name == "mistral" and holes == "middle")
    assert ("hides the last column" in caplog.text) == (holes == "right")


def test_a_mask_that_hides_stored_tokens_gathers_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("llama")
    ids, token = batch([12, 12])["input_ids"], torch.tensor([[5], [9]])
    hiding = torch.ones(2, 13, dtype=torch.long)
    hiding[:, 2:6] = 0

    def logits(cache: DynamicCache) -> torch.Tensor:
        with torch.no_grad():
            model(ids, past_key_values=cache)
            return model(token, attention_mask=hiding, past_key_values=cache).logits

    expected = logits(DynamicCache(config=model.config))
    with caplog.at_level(logging.WARNING, "torch_paged"), torch_paged.paged(model):
        actual = logits(torch_paged.PagedCache(model.config))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    assert "hides tokens that are stored" in caplog.text


@pytest.mark.parametrize("mask", ["none", "ones"])
def test_a_mask_that_shows_pads_of_earlier_calls_is_an_error(mask: str) -> None:
    model, inputs = tiny("llama"), batch([9, 4])
    with torch.no_grad(), torch_paged.paged(model):
        cache = torch_paged.PagedCache(model.config)
        model(**inputs, past_key_values=cache)
        before = cache.get_seq_length(), cache.stats()
        with pytest.raises(ValueError, match="attention_mask"):
            model(
                torch.tensor([[5], [9]]),
                attention_mask=None if mask == "none" else torch.ones(2, 10, dtype=torch.long),
                past_key_values=cache,
            )
        assert (cache.get_seq_length(), cache.stats()) == before


def test_a_four_dimensional_mask_is_obeyed() -> None:
    model = tiny("llama")
    ids = batch([8])["input_ids"]
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
    mask[..., 3:, 1] = False
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, past_key_values=DynamicCache(config=model.config)).logits
        with torch_paged.paged(model):
            cache = torch_paged.PagedCache(model.config)
            actual = model(ids, attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("num_beams", [1, 2])
def test_right_padding_goes_on_from_what_stock_goes_on_from(name: str, num_beams: int) -> None:
    model, inputs = tiny(name), batch([12, 12])
    inputs["attention_mask"][0, -4:] = 0
    expected = generate(model, inputs, num_beams=num_beams)
    with torch_paged.paged(model):
        actual = generate(model, inputs, num_beams=num_beams)
    assert_same_tokens(model, expected, actual, prompt=inputs)


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"num_beams": 2}, {"prefill_chunk_size": 4}, {"do_sample": True}],
    ids=["", "beams", "chunks", "draws"],
)
@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        ("llama", "sdpa"),
        ("gpt2", "eager"),
        ("opt", "sdpa"),
        ("qwen2-sliding", "sdpa"),
        ("gemma2", "eager"),
        ("jamba", None),
    ],
)
def test_a_row_of_pads_alone_begins_as_in_stock(
    name: str, implementation: str | None, kwargs: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Beside a row with tokens, and one that is as long as it."""
    model, inputs = tiny(name, attn_implementation=implementation), batch([9, 5, 9])
    inputs["attention_mask"][2] = 0
    expected = generate(model, inputs, max_new_tokens=6, eos_token_id=None, **kwargs)
    with caplog.at_level(logging.WARNING, "torch_paged"), torch_paged.paged(model) as handle:
        assert torch.equal(generate(model, inputs, max_new_tokens=6, eos_token_id=None, **kwargs), expected)
        assert handle.stats().blocks_used == 0
    assert [text for text in messages(caplog) if "hides all of a row" in text] == messages(caplog) != []


@pytest.mark.parametrize("num_blocks", [10, 16, 22])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma2"])
def test_a_row_of_pads_alone_that_does_not_fit(name: str, num_blocks: int) -> None:
    """Stock counts the positions of what it gets from one, as if there were a single pad."""
    model, inputs = tiny(name), batch([21, 12, 21])
    inputs["attention_mask"][1] = 0
    expected = generate(model, inputs, max_new_tokens=14, eos_token_id=None)
    # gpt2 and opt have twice as many heads of keys and values.
    memory = num_blocks * (1 + (name in ("gpt2", "opt"))) * 3 * 2 * 4 * 2 * 16 * 4
    with torch_paged.paged(model, block_size=4, max_memory=memory, min_shared_prefix=0) as handle:
        assert torch.equal(generate(model, inputs, max_new_tokens=14, eos_token_id=None), expected)
        assert handle.stats().blocks_used == 0 < handle.stats().peak_bytes


def test_gathered_copies_are_of_the_callers_own() -> None:
    model, inputs = tiny("llama"), batch([9, 4])
    cache = torch_paged.PagedCache(model.config)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        keys = cache.layers[0].keys
        keys.zero_()
        assert cache.layers[0].keys.abs().sum() > 0
        copied = copy.deepcopy(cache)
        assert torch.equal(copied.layers[0].keys, cache.layers[0].keys)
