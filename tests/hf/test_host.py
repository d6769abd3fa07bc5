"""The host is left as it was found: patching twice, nested, with other knobs, in mid-generate, and unpatching."""

from __future__ import annotations

import contextlib
import gc
import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LogitsProcessorList,
    PreTrainedModel,
)

import torch_paged
from torch_paged.hf.family import Family

from .host_state import host_state
from .models import SMALL, batch, generate, tiny, tiny_t5


def _llava() -> PreTrainedModel:
    """A config of configs: text and vision name implementations of their own."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = LlavaConfig(text_config=LlamaConfig(**SMALL), vision_config=vision, image_token_index=0)
    config._attn_implementation = {"": "sdpa", "text_config": "eager", "vision_config": "sdpa"}
    return LlavaForConditionalGeneration(config).eval()


MODELS: dict[str, Callable[[], PreTrainedModel]] = {"t5": tiny_t5, "llava": _llava}
NAMES = ["llama", "gpt2", "qwen2-sliding", "gemma2", "gpt_oss", "bloom", "jamba", "mamba", "diffllama", "t5", "llava"]


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_unpatch_restores_everything(name: str, attn_implementation: str) -> None:
    model, inputs = (MODELS[name]() if name in MODELS else tiny(name)), batch([9, 9])
    if name != "llava" and attn_implementation == "eager":
        model.set_attn_implementation("eager")
    stock_class, before, expected = type(model), host_state(model), generate(model, inputs, max_new_tokens=6)
    handle = torch_paged.patch(model)
    assert isinstance(model, stock_class) and type(model).__name__ == stock_class.__name__
    generate(model, inputs, max_new_tokens=6)
    torch_paged.unpatch(model)
    handle.unpatch()
    assert host_state(model) == before
    assert torch.equal(generate(model, inputs, max_new_tokens=6), expected)


def test_patching_twice_is_one_patch() -> None:
    model = tiny("llama")
    before = host_state(model)
    handle = torch_paged.patch(model)
    patched_class = type(model)
    assert torch_paged.patch(model) is handle and type(model) is patched_class
    torch_paged.unpatch(model)
    torch_paged.unpatch(model)
    assert host_state(model) == before


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
    before = host_state(model)
    with torch_paged.paged(model, block_size=4) as outer:
        with torch_paged.paged(model, block_size=32) as inner:
            assert inner is outer and inner.config.block_size == 32
            generate(model, batch([9]))
        assert outer.config.block_size == 4 and outer.patched
    assert not outer.patched and host_state(model) == before


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
def test_models_that_share_a_config_are_unpatched_in_any_order(order: tuple[int, ...]) -> None:
    first, inputs = tiny("llama"), batch([9, 5])
    # A model of another class, which cannot be patched, lives on the same config.
    models = [first, LlamaForCausalLM(first.config).eval(), LlamaForCausalLM(first.config).eval()]
    classifier = LlamaForSequenceClassification(first.config).eval()
    states = [host_state(model) for model in [*models, classifier]]
    expected = [generate(model, inputs, max_new_tokens=4) for model in models]
    scores = classifier(**inputs).logits
    handles = [torch_paged.patch(model, strict=True) for model in models]
    for number in order:
        handles[number].unpatch()
        for model, tokens, handle in zip(models, expected, handles, strict=True):
            handle.reset_peak()
            assert torch.equal(generate(model, inputs, max_new_tokens=4), tokens)
            assert (handle.stats().peak_bytes > 0) == handle.patched
        assert torch.equal(classifier(**inputs).logits, scores)
    assert [host_state(model) for model in [*models, classifier]] == states


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
    before, expected = host_state(model), generate(model, inputs, eos_token_id=None)
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
    assert host_state(model) == before


@pytest.mark.parametrize("name", ["llama", "bloom", "diffllama"])
def test_patching_while_stock_generate_runs(name: str) -> None:
    """The call keeps stock's cache, the next one is paged."""
    model, inputs = tiny(name), batch([20, 5])
    expected = generate(model, inputs, eos_token_id=None)

    def patch(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        torch_paged.patch(model, block_size=4)
        return scores

    kwargs = dict(eos_token_id=None, logits_processor=LogitsProcessorList([patch]))
    assert torch.equal(generate(model, inputs, **kwargs), expected)
    handle = torch_paged.patch(model, block_size=4)
    assert handle.stats().peak_bytes == 0
    assert torch.equal(generate(model, inputs, eos_token_id=None), expected)
    assert handle.stats().peak_bytes > 0


def test_a_callback_that_asks_for_other_knobs_is_refused() -> None:
    model, inputs = tiny("llama"), batch([9])
    handle = torch_paged.patch(model, block_size=4)

    def patch(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        torch_paged.patch(model, block_size=8)
        return scores

    with pytest.raises(RuntimeError, match="1 of its caches hold blocks"):
        generate(model, inputs, logits_processor=LogitsProcessorList([patch]))
    assert handle.config.block_size == 4 and handle.stats().blocks_used == 0


def test_an_implementation_chosen_while_patched_stays() -> None:
    model, inputs = tiny("llama"), batch([9, 5])
    expected = generate(model, inputs)
    torch_paged.patch(model)
    model.set_attn_implementation("eager")
    torch_paged.unpatch(model)
    assert type(model.config._attn_implementation) is str and model.config._attn_implementation == "eager"
    assert torch.equal(generate(model, inputs), expected)


def test_hooks_that_come_and_go_while_patched_are_the_callers() -> None:
    model, inputs = tiny("llama"), batch([9])
    before, seen = host_state(model), []
    with torch_paged.paged(model):
        first = model.model.layers[0].register_forward_hook(lambda *args: seen.append("first"))
        second = model.register_forward_pre_hook(lambda *args: seen.append("second"))
        generate(model, inputs, max_new_tokens=2)
    assert seen == ["second", "first"] * 2
    generate(model, inputs, max_new_tokens=1)
    assert len(seen) == 6
    first.remove()
    second.remove()
    assert host_state(model) == before


def test_strict_is_asked_again_when_patching_again() -> None:
    model = tiny("diffllama")
    handle = torch_paged.patch(model)
    with pytest.raises(ValueError, match="DiffLlamaForCausalLM: it computes with K or V"):
        torch_paged.patch(model, strict=True)
    assert handle.config == torch_paged.PagedConfig()


@pytest.mark.parametrize("make", [lambda: tiny("diffllama"), tiny_t5])
def test_strict_raises_instead_of_falling_back(make: Any) -> None:
    model = make()
    before = host_state(model)
    with pytest.raises(ValueError, match=type(model).__name__):
        torch_paged.patch(model, strict=True)
    assert host_state(model) == before


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
    before = host_state(model)
    for take in (torch_paged.patch, lambda model, **knobs: torch_paged.PagedCache(model.config, **knobs)):
        with pytest.raises(error, match=message):
            take(model, **knobs)
    assert host_state(model) == before


def test_what_cannot_be_patched() -> None:
    with pytest.raises(TypeError, match="model: Linear; must be a transformers model"):
        torch_paged.patch(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="LlamaModel has no generate"):
        torch_paged.patch(tiny("llama").model)


def test_a_patched_model_that_goes_leaves_a_shared_config_as_it_was() -> None:
    config = tiny("llama").config
    before = config._attn_implementation_internal
    model = LlamaForCausalLM(config)
    torch_paged.patch(model)
    assert config._attn_implementation_internal is not before
    del model
    gc.collect()
    assert config._attn_implementation_internal is before


def test_two_threads_unpatch_one_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both get past the question whether it is patched, were it not for the lock."""
    config = tiny("llama").config
    first, second = LlamaForCausalLM(config), LlamaForCausalLM(config)
    handle, other = torch_paged.patch(first), torch_paged.patch(second)
    both, errors = threading.Barrier(2), []

    def wait(self: Family, model: nn.Module) -> None:
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(timeout=0.3)

    monkeypatch.setattr(Family, "uninstall", wait)

    def unpatch() -> None:
        try:
            handle.unpatch()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=unpatch) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert repr(other) == "PagedHandle(LlamaForCausalLM, native)" and other.patched
    assert config._attn_implementation_internal.models == 1
