"""Whose window counts: a cache that slides under a mask that does not, and the other way round."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch

import torch_paged

from .causal_types import WINDOW, tiny_causal
from .counting import count_calls, messages
from .models import assert_same_tokens, batch, generate

# What transformers takes as a field of any config, and makes sliding cache layers of, though the type has no window.
UNUSED: dict[str, dict[str, Any]] = {
    "window": {"sliding_window": WINDOW},
    "chunks": {"attention_chunk_size": WINDOW},
    "layer types": {"layer_types": ["sliding_attention"] * 3, "sliding_window": WINDOW},
}


@pytest.mark.parametrize("unused", UNUSED)
@pytest.mark.parametrize("name", ["llama", "gpt2", "olmo2", "gptj", "mpt"])
def test_a_window_that_only_the_cache_has_gathers(name: str, unused: str, caplog: pytest.LogCaptureFixture) -> None:
    """Stock's prefill sees the whole prompt, and later steps what the sliding cache has kept of it."""
    model, inputs = tiny_causal(name, **UNUSED[unused]), batch([3 * WINDOW, 5])
    expected = generate(model, inputs, eos_token_id=None)
    with (
        caplog.at_level(logging.WARNING, "torch_paged"),
        torch_paged.paged(model, block_size=4),
        count_calls() as calls,
    ):
        actual = generate(model, inputs, eos_token_id=None)
    assert_same_tokens(model, expected, actual, inputs)
    assert calls["paged.attention"] == 0 < calls["gather"]
    (message,) = messages(caplog)
    assert "window" in message


def test_a_window_that_only_the_mask_has_gathers() -> None:
    model, inputs = tiny_causal("mistral"), batch([3 * WINDOW, 5])
    expected = generate(model, inputs, max_new_tokens=1, eos_token_id=None)
    full = torch_paged.PagedCache(tiny_causal("mistral", sliding_window=None).config, block_size=4)
    for layer in model.model.layers:
        # Where the module tells its attention function the window.
        layer.self_attn.config = copy.deepcopy(model.config)
        layer.self_attn.config.sliding_window = None
    with torch_paged.paged(model), count_calls() as calls:
        actual = generate(model, inputs, past_key_values=full, max_new_tokens=1, eos_token_id=None)
    assert torch.equal(actual, expected)
    assert calls["paged.attention"] == 0 < calls["gather"]


@pytest.mark.parametrize("window", [3, 4])
@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt_neo"])
def test_right_padding_wider_than_the_window(name: str, window: int) -> None:
    """Stock's last column, a pad, then sees pads alone: what it computes depends on their K and V."""
    size = {"window_size" if name == "gpt_neo" else "sliding_window": window}
    model, inputs = tiny_causal(name, attn_implementation="eager", **size), batch([5, 20])
    for row, length in enumerate([5, 20]):
        for tensor in inputs.values():
            tensor[row] = tensor[row].roll(length - 20)
    kwargs = dict(max_new_tokens=6, return_dict_in_generate=True, output_logits=True, eos_token_id=None)
    expected = generate(model, inputs, **kwargs)
    with torch_paged.paged(model, block_size=4):
        actual = generate(model, inputs, **kwargs)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-3, atol=1e-3)
    assert torch.equal(actual.sequences, expected.sequences)
