"""The host is left as it was found: patching, unpatching, copies, wrappers, exceptions, training, threads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, LogitsProcessorList, PreTrainedModel

import torch_paged

from .models import batch, generate, tiny, tiny_t5


def _snapshot(model: PreTrainedModel) -> tuple[Any, ...]:
    names = {
        name: module.config._attn_implementation for name, module in model.named_modules() if hasattr(module, "config")
    }
    return type(model), names, model.config.to_dict(), sorted(model.__dict__), type(model.config._attn_implementation)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "diffllama"])
def test_unpatch_restores_everything(name: str) -> None:
    model, inputs = tiny(name), batch([9, 5])
    before, expected = _snapshot(model), generate(model, inputs)
    handle = torch_paged.patch(model)
    assert isinstance(model, before[0]) and type(model).__name__ == before[0].__name__
    generate(model, inputs)
    torch_paged.unpatch(model)
    handle.unpatch()
    assert _snapshot(model) == before
    assert torch.equal(generate(model, inputs), expected)


def test_patching_twice_is_one_patch() -> None:
    model = tiny("llama")
    before = _snapshot(model)
    handle = torch_paged.patch(model)
    patched_class = type(model)
    assert torch_paged.patch(model) is handle and type(model) is patched_class
    torch_paged.unpatch(model)
    torch_paged.unpatch(model)
    assert _snapshot(model) == before


def test_other_knobs_need_an_idle_model() -> None:
    model, inputs = tiny("llama"), batch([9])
    handle = torch_paged.patch(model, block_size=4)
    out = generate(model, inputs, return_dict_in_generate=True)
    with pytest.raises(RuntimeError, match="1 of its caches hold blocks"):
        torch_paged.patch(model, block_size=8)
    assert handle.config.block_size == 4
    del out
    assert torch_paged.patch(model, block_size=8) is handle
    assert handle.config == torch_paged.PagedConfig(block_size=8)


def test_nested_paged_restores_the_outer_knobs() -> None:
    model = tiny("llama")
    before = _snapshot(model)
    with torch_paged.paged(model, block_size=4) as outer:
        with torch_paged.paged(model, block_size=32) as inner:
            assert inner is outer and inner.config.block_size == 32
            generate(model, batch([9]))
        assert outer.config.block_size == 4 and outer.patched
    assert not outer.patched and _snapshot(model) == before


def test_two_models_that_share_a_config() -> None:
    first, inputs = tiny("llama"), batch([9, 5])
    second = LlamaForCausalLM(first.config).eval()
    expected = generate(second, inputs)
    with torch_paged.paged(first):
        assert torch.equal(generate(second, inputs), expected)
        with torch_paged.paged(second):
            torch_paged.unpatch(first)
            assert torch.equal(generate(second, inputs), expected)
            assert second.config._attn_implementation == "torch_paged"
    assert second.config._attn_implementation == "sdpa" and type(second.config._attn_implementation) is str


class _Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_wrappers_are_looked_through() -> None:
    model, inputs = tiny("llama"), batch([9])
    expected = generate(model, inputs)
    wrapped = torch.compile(_Wrapper(model), backend="eager")
    handle = torch_paged.patch(wrapped)
    assert torch.equal(generate(model, inputs), expected)
    assert handle.stats().peak_bytes > 0
    torch_paged.unpatch(wrapped)
    assert not handle.patched


def test_a_held_cache_does_not_hinder_the_end_of_a_nested_block() -> None:
    model = tiny("llama")
    outer = torch_paged.patch(model, block_size=4)
    with torch_paged.paged(model, block_size=8):
        held = generate(model, batch([9]), return_dict_in_generate=True)
    assert outer.config.block_size == 4 and outer.stats().blocks_used == 0
    assert held.past_key_values.stats().blocks_used > 0
    del held
    with pytest.raises(KeyError, match="mine"), torch_paged.paged(model, block_size=8):
        held = generate(model, batch([9]), return_dict_in_generate=True)
        assert held.past_key_values.stats().blocks_used > 0
        raise KeyError("mine")
    assert outer.config.block_size == 4


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral", "diffllama"])
def test_unpatching_while_generate_runs(name: str, again: bool) -> None:
    model, inputs = tiny(name), batch([20, 5])
    before, expected = _snapshot(model), generate(model, inputs, eos_token_id=None)
    steps = 0

    def unpatch(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps == 5:
            torch_paged.unpatch(model)
            if again:
                torch_paged.patch(model, block_size=2)
        return scores

    torch_paged.patch(model, block_size=4)
    actual = generate(model, inputs, eos_token_id=None, logits_processor=LogitsProcessorList([unpatch]))
    assert torch.equal(actual, expected)
    torch_paged.unpatch(model)
    assert _snapshot(model) == before


def test_strict_is_asked_again_when_patching_again() -> None:
    model = tiny("diffllama")
    handle = torch_paged.patch(model)
    with pytest.raises(ValueError, match="DiffLlamaForCausalLM: it computes with K or V"):
        torch_paged.patch(model, strict=True)
    assert handle.config == torch_paged.PagedConfig()


@pytest.mark.parametrize("make", [lambda: tiny("diffllama"), tiny_t5])
def test_strict_raises_instead_of_falling_back(make: Any) -> None:
    model = make()
    before = _snapshot(model)
    with pytest.raises(ValueError, match=type(model).__name__):
        torch_paged.patch(model, strict=True)
    assert _snapshot(model) == before


@pytest.mark.parametrize(
    ("knobs", "error", "message"),
    [
        ({"block_size": 12}, ValueError, "block_size: 12; must be a power of two"),
        ({"block_size": 512}, ValueError, "block_size: 512"),
        ({"block_size": 16.0}, TypeError, "block_size: float; must be an int"),
        ({"strict": 1}, TypeError, "strict: int; must be a bool"),
        ({"max_memory": "many"}, ValueError, "max_memory"),
        ({"max_memory": -1}, ValueError, "max_memory"),
        ({"pages": 3}, TypeError, "pages"),
    ],
)
def test_bad_knobs_leave_the_model_alone(knobs: dict[str, Any], error: type[Exception], message: str) -> None:
    model = tiny("llama")
    before = _snapshot(model)
    for take in (torch_paged.patch, lambda model, **knobs: torch_paged.PagedCache(model.config, **knobs)):
        with pytest.raises(error, match=message):
            take(model, **knobs)
    assert _snapshot(model) == before


def test_what_cannot_be_patched() -> None:
    with pytest.raises(TypeError, match="model: Linear; must be a transformers model"):
        torch_paged.patch(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="LlamaModel has no generate"):
        torch_paged.patch(tiny("llama").model)
