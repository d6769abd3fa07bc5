"""A compiled model that is patched: calls over blocks give stock's tokens, all others run in stock's graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

import torch_paged

from .counting import count_calls
from .models import NATIVE, assert_same_tokens, batch, generate, tiny, twin

INPUTS = batch([20, 5])
COMPILE: dict[str, Callable[[PreTrainedModel], nn.Module]] = {
    "torch.compile(model)": lambda model: torch.compile(model, backend="eager"),
    "model.compile()": lambda model: model.compile(backend="eager") or model,
}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("when", ["compiled, then patched", "patched, then compiled"])
@pytest.mark.parametrize("how", COMPILE)
@pytest.mark.parametrize("name", ["llama", "bloom", "diffllama"])
def test_generate(name: str, how: str, when: str) -> None:
    model = tiny(name)
    stock = twin(model)
    expected = generate(model, INPUTS), generate(model, INPUTS, num_beams=3)
    if when == "patched, then compiled":
        handle = torch_paged.patch(model)
    compiled = COMPILE[how](model)
    if when == "compiled, then patched":
        handle = torch_paged.patch(compiled)
    assert torch_paged.patch(compiled) is handle
    with count_calls() as calls:
        assert_same_tokens(stock, expected[0], generate(compiled, INPUTS), prompt=INPUTS)
        assert_same_tokens(stock, expected[1], generate(compiled, INPUTS, num_beams=3), prompt=INPUTS)
    assert calls["paged.attention" if name in NATIVE else "gather"] > 0
    # Graphs and guards keep no cache alive.
    assert handle.stats().blocks_used == 0
    torch_paged.unpatch(compiled)
    assert type(model) is type(stock)


@pytest.mark.parametrize(
    ("name", "how"), [("llama", "torch.compile(model)"), ("llama", "model.compile()"), ("bloom", "model.compile()")]
)
@torch.no_grad()
def test_calls_without_blocks(name: str, how: str) -> None:
    model = tiny(name)
    expected = model(**INPUTS).logits
    compiled = COMPILE[how](model)
    torch_paged.patch(compiled)
    for kwargs in ({"use_cache": False}, {"past_key_values": DynamicCache(config=model.config)}):
        torch.testing.assert_close(compiled(**INPUTS, **kwargs).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["bloom", "diffllama"])
@torch.no_grad()
def test_calls_without_blocks_are_one_graph(name: str) -> None:
    model = tiny(name)
    expected = model(**INPUTS).logits
    torch_paged.patch(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for use_cache in (False, True):
        torch.testing.assert_close(compiled(**INPUTS, use_cache=use_cache).logits, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_cache_of_ones_own_in_a_compiled_call() -> None:
    model = tiny("llama")
    expected = model(**INPUTS).logits[:, -1]
    torch_paged.patch(model, strict=True)
    compiled = torch.compile(model, backend="eager")
    cache = torch_paged.PagedCache(model.config)
    logits = compiled(**INPUTS, past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    # Two blocks and one: the pads of the second row are not stored.
    assert cache.get_seq_length() == 20 and cache.stats().blocks_used == 3
