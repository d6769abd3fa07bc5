"""What few callers pass to generate or to the model: no input, own encoder outputs, masks of four dimensions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

import torch_paged

from .counting import count_calls
from .models import assert_same_tokens, batch, generate, tiny, tiny_t5


@pytest.mark.parametrize("name", ["llama", "mistral", "diffllama"])
def test_without_any_input(name: str) -> None:
    model = tiny(name)
    expected = generate(model, {}, max_new_tokens=9)
    with torch_paged.paged(model, block_size=4) as handle:
        assert torch.equal(generate(model, {}, max_new_tokens=9), expected)
        assert handle.stats().blocks_used == 0 < handle.stats().peak_bytes


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_logits_of_all_positions(name: str) -> None:
    model, inputs = tiny(name), batch([9, 4])
    kwargs: dict[str, Any] = dict(logits_to_keep=0) if name == "llama" else {}
    expected = generate(model, inputs, **kwargs)
    with torch_paged.paged(model, block_size=4), count_calls() as calls:
        assert_same_tokens(model, expected, generate(model, inputs, **kwargs), prompt=inputs)
    assert calls["gather"] == 0 < calls["paged.attention"]


def test_embeddings_go_on_from_a_returned_cache() -> None:
    model = tiny("llama")
    first, second = batch([9])["input_ids"], batch([5], seed=1)["input_ids"]

    def turns() -> torch.Tensor:
        embed = model.get_input_embeddings()
        turn = generate(model, {"inputs_embeds": embed(first)}, max_new_tokens=4, return_dict_in_generate=True)
        everything = torch.cat([embed(first), embed(turn.sequences), embed(second)], dim=1)
        return generate(model, {"inputs_embeds": everything}, past_key_values=turn.past_key_values)

    with torch.no_grad():
        expected = turns()
        with torch_paged.paged(model, block_size=4) as handle:
            assert torch.equal(turns(), expected)
            assert handle.stats().blocks_used == 0


def test_embeddings_with_a_static_cache_are_stocks() -> None:
    model = tiny("llama")
    with torch.no_grad():
        inputs = {"inputs_embeds": model.get_input_embeddings()(batch([9])["input_ids"])}
    kwargs: dict[str, Any] = dict(cache_implementation="static", disable_compile=True)
    expected = generate(model, inputs, **kwargs)
    with torch_paged.paged(model) as handle:
        assert torch.equal(generate(model, inputs, **kwargs), expected)
        assert handle.stats().peak_bytes == 0


@pytest.mark.parametrize("num_beams", [1, 3])
def test_encoder_outputs_of_the_callers(num_beams: int) -> None:
    model, inputs = tiny_t5(), batch([9, 5])

    def run() -> torch.Tensor:
        # New ones for each: beams expand them in place.
        with torch.no_grad():
            outputs = model.get_encoder()(**inputs)
        given = {"encoder_outputs": outputs, "attention_mask": inputs["attention_mask"]}
        return generate(model, given, num_beams=num_beams)

    expected = run()
    with torch_paged.paged(model, block_size=4) as handle:
        assert torch.equal(run(), expected)
        assert handle.stats().blocks_used == 0 < handle.stats().peak_bytes


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_continuations_of_one_prefix_in_one_row(name: str) -> None:
    """A mask of four dimensions lets three continuations share a prefix, each blind to the others."""
    model = tiny(name)
    prefix, tails = batch([6])["input_ids"], torch.tensor([[11, 12], [21, 22], [31, 32]])
    packed = torch.cat([prefix, tails.reshape(1, -1)], dim=1)
    positions = torch.tensor([[*range(6), 6, 7, 6, 7, 6, 7]])
    sees = torch.ones(12, 12).tril().bool()
    for start in (6, 8, 10):
        sees[start : start + 2, 6:start] = False
    mask = torch.where(sees, 0.0, torch.finfo(torch.float32).min)[None, None]

    def logits(cache: Any) -> torch.Tensor:
        with torch.no_grad():
            model(input_ids=prefix, past_key_values=cache)
            return model(
                input_ids=packed[:, 6:], attention_mask=mask[:, :, 6:], position_ids=positions[:, 6:],
                past_key_values=cache,
            ).logits  # fmt: skip

    expected = logits(DynamicCache(config=model.config))
    with torch.no_grad():
        apart = model(input_ids=torch.cat([prefix.expand(3, -1), tails], dim=1)).logits[:, 6:]
    torch.testing.assert_close(expected.view(3, 2, -1), apart, rtol=1e-4, atol=1e-4)
    with torch_paged.paged(model, block_size=4):
        actual = logits(torch_paged.PagedCache(model.config, block_size=4))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
