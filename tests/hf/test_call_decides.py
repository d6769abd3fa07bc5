"""Paging belongs to a call, not to a model: calls without a PagedCache are stock's bit for bit while patched."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BertConfig,
    BertModel,
    DynamicCache,
    LlamaForSequenceClassification,
    LogitsProcessorList,
    PreTrainedModel,
    QuantizedCache,
    StaticCache,
)
from transformers.cache_utils import Cache
from transformers.masking_utils import eager_mask

import torch_paged

from .counting import count_calls
from .models import VOCAB, WINDOW, WITH_IMPLEMENTATION, batch, generate, tiny, tiny_t5, twin

MODELS = WITH_IMPLEMENTATION
SOME = [("llama", "sdpa"), ("gpt2", "eager"), ("qwen2-sliding", "sdpa"), *MODELS[-5:]]


def _forward(model: PreTrainedModel, **kwargs: Any) -> list[Any]:
    output = model(**batch([2 * WINDOW, 7]), **kwargs)
    return [output.logits]


def _own_cache(model: PreTrainedModel) -> list[Any]:
    """The cache that the model makes itself, and a second call on it."""
    inputs = batch([2 * WINDOW, 7])
    first = model(**inputs)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 3, dtype=torch.long)], 1)
    second = model(torch.full((2, 3), 5), attention_mask=mask, past_key_values=first.past_key_values)
    return [type(first.past_key_values), first.logits, second.logits, *_contents(second.past_key_values)]


def _contents(cache: Cache) -> list[Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def _users(make: Callable[[PreTrainedModel], Cache]) -> Callable[[PreTrainedModel], list[Any]]:
    def calls(model: PreTrainedModel) -> list[Any]:
        cache = make(model)
        inputs = batch([9, 7])
        results = [model(**inputs, past_key_values=cache).logits]
        for _ in range(2):
            ones = torch.ones(2, WINDOW, dtype=torch.long)
            inputs["attention_mask"] = torch.cat([inputs["attention_mask"], ones], 1)
            inputs["input_ids"] = torch.arange(3, 3 + 2 * WINDOW).view(2, WINDOW)
            results.append(model(**inputs, past_key_values=cache).logits)
        return [*results, *_contents(cache)]

    return calls


def _dynamic(model: PreTrainedModel) -> Cache:
    return DynamicCache(config=model.config)


def _unwindowed(model: PreTrainedModel) -> Cache:
    return DynamicCache()


def _static(model: PreTrainedModel) -> Cache:
    return StaticCache(config=model.config, max_cache_len=64)


CALLS: dict[str, Callable[[PreTrainedModel], list[Any]]] = {
    "without a cache": lambda model: _forward(model, use_cache=False),
    "with gradients": lambda model: _gradient(model),
    "hidden states": lambda model: list(model(**batch([20, 3]), output_hidden_states=True).hidden_states),
    "a cache of the model's": _own_cache,
    "DynamicCache": _users(_dynamic),
    "DynamicCache without windows": _users(_unwindowed),
    "StaticCache": _users(_static),
}


def _gradient(model: PreTrainedModel) -> list[Tensor]:
    with torch.enable_grad():
        logits = model(**batch([2 * WINDOW, 7])).logits
        return [logits, *torch.autograd.grad(logits.square().mean(), list(model.parameters()), allow_unused=True)]


def _assert_same(expected: list[Any], actual: list[Any]) -> None:
    assert len(expected) == len(actual)
    for want, got in zip(expected, actual, strict=True):
        assert torch.equal(want, got) if isinstance(want, Tensor) else want == got


def _outcome(run: Callable[[], list[Any]]) -> list[Any]:
    """What comes out, or stock's refusal: Bloom takes no StaticCache, windows cannot be quantised."""
    try:
        return run()
    except Exception as error:
        return [type(error), str(error)]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("name", "attn_implementation"), MODELS)
@torch.no_grad()
def test_calls_without_a_paged_cache_are_stocks(name: str, attn_implementation: str | None, call: str) -> None:
    model = tiny(name, attn_implementation=attn_implementation)
    expected = _outcome(lambda: CALLS[call](model))
    with torch_paged.paged(model, block_size=4) as handle, count_calls() as counts:
        actual = _outcome(lambda: CALLS[call](model))
        assert handle.stats().peak_bytes == 0
    _assert_same(expected, actual)
    assert not [op for op in counts if op.startswith("paged.")]


def _generated(model: PreTrainedModel, **kwargs: Any) -> list[Any]:
    kwargs |= dict(return_dict_in_generate=True, output_logits=True, max_new_tokens=6)
    output = generate(model, batch([WINDOW, 5]), **kwargs)
    return [output.sequences, *output.logits, type(output.past_key_values)]


GENERATES: dict[str, Callable[[PreTrainedModel], dict[str, Any]]] = {
    "use_cache=False": lambda model: {"use_cache": False},
    "dynamic": lambda model: {"cache_implementation": "dynamic"},
    "static": lambda model: {"cache_implementation": "static"},
    # Offloading needs an accelerator; without one stock refuses.
    "offloaded": lambda model: {"cache_implementation": "offloaded"},
    "offloaded_static": lambda model: {"cache_implementation": "offloaded_static"},
    "quantized": lambda model: {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}},
    "a DynamicCache": lambda model: {"past_key_values": _dynamic(model)},
    "a StaticCache": lambda model: {"past_key_values": _static(model)},
    "beams, dynamic": lambda model: {"cache_implementation": "dynamic", "num_beams": 3},
    "beams, static": lambda model: {"cache_implementation": "static", "num_beams": 3},
    "beams, a DynamicCache": lambda model: {"past_key_values": _dynamic(model), "num_beams": 3},
    "samples, a DynamicCache": lambda model: {
        "past_key_values": _dynamic(model), "do_sample": True, "num_return_sequences": 3,
    },
}  # fmt: skip


@pytest.mark.parametrize("how", GENERATES)
@pytest.mark.parametrize(("name", "attn_implementation"), SOME)
def test_the_callers_cache_wins(name: str, attn_implementation: str | None, how: str) -> None:
    model = tiny(name, attn_implementation=attn_implementation)
    expected = _outcome(lambda: _generated(model, **GENERATES[how](model)))
    with torch_paged.paged(model) as handle, count_calls() as counts:
        actual = _outcome(lambda: _generated(model, **GENERATES[how](model)))
        assert handle.stats().peak_bytes == 0
    _assert_same(expected, actual)
    assert not [op for op in counts if op.startswith("paged.")]


@pytest.mark.parametrize("how", ["dynamic", "static", "quantized"])
def test_a_cache_that_the_generation_config_names_wins(how: str) -> None:
    model = tiny("llama")
    for name, value in GENERATES[how](model).items():
        setattr(model.generation_config, name, value)
    expected = _generated(model)
    assert expected[-1] is {"dynamic": DynamicCache, "static": StaticCache, "quantized": QuantizedCache}[how]
    with torch_paged.paged(model) as handle:
        _assert_same(expected, _generated(model))
        assert handle.stats().peak_bytes == 0


@pytest.mark.parametrize("how", ["use_cache=False", "a DynamicCache"])
def test_encoder_decoders_too(how: str) -> None:
    from transformers import EncoderDecoderCache

    model, inputs = tiny_t5(), batch([9, 5])

    def run() -> Tensor:
        kwargs: dict[str, Any] = {"use_cache": False}
        if how == "a DynamicCache":
            kwargs = {"past_key_values": EncoderDecoderCache(DynamicCache(), DynamicCache())}
        return generate(model, inputs, **kwargs)

    expected = run()
    with torch_paged.paged(model) as handle:
        assert torch.equal(run(), expected)
        assert handle.stats().peak_bytes == 0


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
@torch.no_grad()
def test_softcap_and_sinks_are_in_the_calls_without_a_paged_cache(name: str) -> None:
    """Take them away from patched and stock alike: both move, and to the same place."""
    model, inputs = tiny(name), batch([20, 7])
    stock = twin(model)
    torch_paged.patch(model)
    before = stock(**inputs).logits
    assert torch.equal(model(**inputs).logits, before)
    for which in (stock, model):
        for module in which.modules():
            if isinstance(getattr(module, "sinks", None), nn.Parameter):
                module.sinks.add_(2.0)
            if hasattr(module, "attn_logit_softcapping"):
                module.attn_logit_softcapping = None
    after = stock(**inputs).logits
    assert float((after - before).abs().max()) > 0.01
    assert torch.equal(model(**inputs).logits, after)


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("gpt_oss", {"s_aux", "sliding_window"}),
        ("gemma2", {"softcap", "sliding_window"}),
        ("mistral", {"sliding_window"}),
    ],
)
@torch.no_grad()
def test_the_models_own_attention_gets_what_it_got(name: str, given: set[str], use_cache: bool) -> None:
    """An attention function of the user's own sees the calls that it sees without the patch."""
    seen: list[dict[str, Any]] = []

    def recording(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        seen.append(dict(module=module, query=query, key=key, value=value, mask=mask, **kwargs))
        return sys.modules[type(module).__module__].eager_attention_forward(module, query, key, value, mask, **kwargs)

    with (
        mock.patch.dict(AttentionInterface._global_mapping, {"recording": recording}),
        mock.patch.dict(AttentionMaskInterface._global_mapping, {"recording": eager_mask}),
    ):
        model = tiny(name, attn_implementation="recording")
        model(**batch([2 * WINDOW, 7]), use_cache=use_cache)
        expected = seen.copy()
        seen.clear()
        with torch_paged.paged(model):
            model(**batch([2 * WINDOW, 7]), use_cache=use_cache)
    assert len(expected) == len(seen) == model.config.num_hidden_layers
    assert given <= {argument for call in expected for argument in call}
    for want, got in zip(expected, seen, strict=True):
        assert want.keys() == got.keys()
        _assert_same(list(want.values()), [got[argument] for argument in want])


def _bert() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    return BertModel(BertConfig(**sizes)).eval()


@torch.no_grad()
def test_other_models_are_none_of_our_business() -> None:
    """An encoder, a second model of the class and a classifier on the same config, before, between and within calls."""
    model, inputs = tiny("llama"), batch([12, 7])
    bert, same, classifier = _bert(), twin(model), LlamaForSequenceClassification(model.config).eval()
    others: list[Callable[[], Tensor]] = [
        lambda: bert(**inputs).last_hidden_state,
        lambda: same(**inputs).logits,
        lambda: classifier(**inputs).logits,
    ]
    expected = [other() for other in others]
    tokens = generate(model, inputs)
    seen: list[list[Tensor]] = []

    def use_the_others(*args: Any) -> Any:
        seen.append([other() for other in others])
        return args[1] if isinstance(args[1], Tensor) else None

    with torch_paged.paged(model) as handle:
        use_the_others(None, None)
        actual = generate(model, inputs, logits_processor=LogitsProcessorList([use_the_others]))
        assert torch.equal(actual, tokens) and handle.stats().peak_bytes > 0
    assert len(seen) == 1 + actual.shape[1] - 12
    for results in seen:
        _assert_same(expected, results)


@torch.no_grad()
def test_an_encoder_inside_a_native_forward_pass() -> None:
    """Called from a hook of a layer: the pass around it has no mask, the encoder keeps its own."""
    model, bert, inputs = tiny("llama"), _bert(), batch([12, 7])
    expected, tokens = bert(**inputs).last_hidden_state, generate(model, inputs)
    seen: list[Tensor] = []

    def hook(*args: Any) -> None:
        seen.append(bert(**inputs).last_hidden_state)

    with torch_paged.paged(model, strict=True), count_calls() as counts:
        model.model.layers[1].register_forward_hook(hook)
        assert torch.equal(generate(model, inputs), tokens)
    assert counts["paged.attention"] > 0
    assert len(seen) > 1 and all(torch.equal(result, expected) for result in seen)
