"""Attention of native passes run by qkv_linear and rope_and_cache where nobody looks inside, all others by PyTorch."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GlmConfig, PreTrainedModel

import torch_paged
from torch_paged.hf.announce import announced
from torch_paged.hf.call import Call

from .counting import count_calls
from .fast_ops import rows_of_calls
from .models import SMALL, assert_same_tokens, batch, generate, sharpen, tiny, twin

LAYERS = 3  # of the tiny models


def attentions(model: PreTrainedModel) -> list[Any]:
    return [layer.self_attn for layer in model.model.layers]


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen2-sliding", "qwen3", "mistral", "mistral-full", "mixtral"])
def test_tokens_are_those_of_stock(name: str) -> None:
    """Also of a prefill of more rows than few; nothing is rotated or stored in another way."""
    model = tiny(name)
    inputs = batch([5, 9, 40])
    expected = generate(model, inputs, max_new_tokens=12, eos_token_id=None)
    other = twin(model)
    with torch_paged.paged(other), rows_of_calls("qkv_linear") as rows, count_calls() as calls:
        actual = generate(other, inputs, max_new_tokens=12, eos_token_id=None)
    assert rows == [54] * LAYERS + 11 * [3] * LAYERS
    assert calls["paged.rope_and_cache"] == calls["paged.attention"] == len(rows)
    assert calls["paged.reshape_and_cache"] == calls["aten.neg"] == calls["gather"] == 0
    assert_same_tokens(model, expected, actual, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_of_columns_that_are_not_packed(dtype: torch.dtype) -> None:
    """Several new columns of several rows, and of a batch whose positions stand there once for all rows."""
    model = tiny("qwen3", dtype)
    ids = batch([9, 9])["input_ids"]
    with torch.no_grad():
        expected = model(ids).logits
        torch_paged.patch(model)
        cache = torch_paged.PagedCache(model.config)
        with rows_of_calls("qkv_linear") as rows:
            parts = [
                model(ids[:, first:last], past_key_values=cache).logits for first, last in ((0, 4), (4, 8), (8, 9))
            ]
    assert rows == [8] * LAYERS + [8] * LAYERS + [2] * LAYERS
    tolerance = dict(rtol=1e-4, atol=1e-4) if dtype == torch.float32 else dict(rtol=0.1, atol=0.3)
    torch.testing.assert_close(torch.cat(parts, 1), expected, **tolerance)


def test_biases_are_added() -> None:
    model = tiny("qwen2")
    for attention in attentions(model):
        for name in ("q_proj", "k_proj", "v_proj"):
            nn.init.normal_(getattr(attention, name).bias)
    inputs = batch([5, 9])
    expected = generate(model, inputs)
    with torch_paged.paged(model), rows_of_calls("qkv_linear") as rows:
        actual = generate(model, inputs)
    assert rows
    assert_same_tokens(model, expected, actual, inputs)


@pytest.mark.parametrize("name", ["gpt2", "phi", "gemma2", "gpt_neox"])
def test_models_with_attention_of_another_kind(name: str) -> None:
    model = tiny(name)
    inputs = batch([5, 9])
    expected = generate(model, inputs)
    with torch_paged.paged(model), rows_of_calls("qkv_linear") as rows:
        actual = generate(model, inputs)
    assert rows == []
    assert_same_tokens(model, expected, actual, inputs)


def test_a_model_that_rotates_in_another_way() -> None:
    """GLM's module is Llama's word by word, but the function that it calls rotates neighbours, and half of a head."""
    torch.manual_seed(0)
    model = sharpen(AutoModelForCausalLM.from_config(GlmConfig(**SMALL, head_dim=16)).eval())
    inputs = batch([5, 9])
    expected = generate(model, inputs)
    with torch_paged.paged(model), rows_of_calls("qkv_linear") as rows:
        actual = generate(model, inputs)
    assert rows == []
    assert_same_tokens(model, expected, actual, inputs)


def _knob(model: PreTrainedModel) -> dict[str, Any]:
    return {"fast_layers": False}


def _own_forward(model: PreTrainedModel) -> dict[str, Any]:
    for attention in attentions(model):
        plain = attention.k_proj.forward
        attention.k_proj.forward = lambda x, plain=plain: 0.5 * plain(x)
    return {}


def _compiled(model: PreTrainedModel) -> dict[str, Any]:
    for attention in attentions(model):
        attention.v_proj.compile(backend="eager")
    return {}


def _own_linear(model: PreTrainedModel) -> dict[str, Any]:
    class Own(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 0.5 * super().forward(input)

    for attention in attentions(model):
        attention.q_proj.__class__ = Own
    return {}


def _own_attention(model: PreTrainedModel) -> dict[str, Any]:
    class Own(type(attentions(model)[0])):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return super().forward(0.5 * hidden_states, *args, **kwargs)

    for attention in attentions(model):
        attention.__class__ = Own
    return {}


def _own_norm(model: PreTrainedModel) -> dict[str, Any]:
    """It sees rows, columns, heads and their elements, as in stock."""

    class Own(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows, columns, heads, size = x.shape
            return x / (1 + x.abs().mean((2, 3), keepdim=True))

    for attention in attentions(model):
        attention.q_norm = Own()
    return {}


@pytest.mark.parametrize("change", [_knob, _own_forward, _compiled, _own_linear, _own_attention, _own_norm])
def test_others_run_by_pytorch(change: Callable[[PreTrainedModel], dict[str, Any]]) -> None:
    model = tiny("qwen3" if change is _own_norm else "llama")
    knobs = change(model)
    inputs = batch([5, 9, 2])
    expected = generate(model, inputs)
    with torch_paged.paged(model, **knobs), rows_of_calls("qkv_linear") as rows:
        actual = generate(model, inputs)
    assert rows == []
    assert_same_tokens(model, expected, actual, inputs)


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "q_norm", "k_norm"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_see_what_they_see_in_stock(kind: str, name: str) -> None:
    """And the layers that nobody looks into run by the op, the hooked one too when the hook is gone."""
    model = tiny("qwen3")
    inputs = batch([5])
    seen: list[Any] = []

    def look(module: nn.Module, *given: Any) -> None:
        seen.append(given[-1][0] if isinstance(given[-1], tuple) else given[-1])

    handle = getattr(getattr(attentions(model)[1], name), kind)(look)
    generate(model, inputs, max_new_tokens=1)
    with torch_paged.paged(model):
        with rows_of_calls("qkv_linear") as rows:
            generate(model, inputs, max_new_tokens=1)
        stock, ours = seen
        assert len(rows) == LAYERS - 1
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)
        handle.remove()
        with rows_of_calls("qkv_linear") as rows:
            generate(model, inputs, max_new_tokens=1)
        assert len(seen) == 2 and len(rows) == LAYERS


def test_global_hooks_see_every_module() -> None:
    model = tiny("llama")
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *given: seen.append(module))
    try:
        with torch_paged.paged(model), rows_of_calls("qkv_linear") as rows:
            generate(model, batch([5]), max_new_tokens=1)
            assert {attention.q_proj for attention in attentions(model)} <= set(seen)
    finally:
        handle.remove()
    assert rows == []


def test_the_result_of_the_whole_reaches_its_hooks_and_the_last_projection() -> None:
    model = tiny("llama")
    seen: list[tuple[Any, Any, Any]] = []
    attention = attentions(model)[1]
    inside: list[Any] = []
    handles = [
        attention.o_proj.register_forward_hook(lambda module, given, result: inside.append((given[0], result))),
        attention.register_forward_hook(
            lambda module, given, kwargs, result: seen.append((given, kwargs, result)), with_kwargs=True
        ),
    ]
    generate(model, batch([5]), max_new_tokens=1)
    with torch_paged.paged(model), rows_of_calls("qkv_linear") as rows:
        generate(model, batch([5]), max_new_tokens=1)
    for handle in handles:
        handle.remove()
    assert len(rows) == LAYERS
    (given, kwargs, (stock, _)), (our_given, our_kwargs, (ours, weights)) = seen
    assert given == our_given == () and kwargs.keys() == our_kwargs.keys() and weights is None
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)
    for expected, actual in zip(*inside, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_under_autocast_and_with_gradients_by_pytorch() -> None:
    model = tiny("llama")
    inputs = batch([5, 9])
    with torch_paged.paged(model), rows_of_calls("qkv_linear") as rows:
        with torch.autocast("cpu", torch.bfloat16):
            generate(model, inputs)
        model(**inputs, past_key_values=torch_paged.PagedCache(model.config))
    assert rows == []


def test_modules_are_stock_again() -> None:
    model = tiny("llama")
    (stock,) = {type(attention) for attention in attentions(model)}
    torch_paged.patch(model)
    assert stock not in {type(attention) for attention in attentions(model)}
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert {type(attention) for attention in attentions(other)} == {stock}
    torch_paged.unpatch(model)
    assert {type(attention) for attention in attentions(model)} == {stock}


def test_other_caches_are_filled_by_pytorch() -> None:
    """Also by a patched model, within a call that is paged itself."""
    model = tiny("llama")
    inputs = batch([5, 9])
    inner: list[torch.Tensor] = []

    def ask_another(*arguments: Any) -> None:
        if not inner:
            inner.append(torch.empty(0))
            inner[0] = model(**inputs, use_cache=False).logits

    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits
    with torch_paged.paged(model), rows_of_calls("qkv_linear") as rows:
        handle = model.lm_head.register_forward_hook(ask_another)
        generate(model, inputs, max_new_tokens=2)
        handle.remove()
    assert rows == [18] * LAYERS + [2] * LAYERS
    visible = inputs["attention_mask"].bool()
    torch.testing.assert_close(inner[0][visible], expected[visible], rtol=1e-4, atol=1e-5)


def test_angles_that_are_not_contiguous() -> None:
    model = tiny("llama")
    inputs = batch([5, 9])
    expected = generate(model, inputs)
    rotary = model.model.rotary_emb
    plain = rotary.forward

    def strided(*args: Any, **kwargs: Any) -> Any:
        return tuple(angle.mT.contiguous().mT for angle in plain(*args, **kwargs))

    rotary.forward = strided
    with torch_paged.paged(model), rows_of_calls("qkv_linear") as rows:
        actual = generate(model, inputs)
    assert rows
    assert_same_tokens(model, expected, actual, inputs)


@pytest.mark.parametrize("name", ["sliding_window", "module", "how", "rows", "layer", "step", "width"])
def test_arguments_of_any_name_reach_the_attention_function(name: str) -> None:
    model = tiny("llama")
    ids = batch([9])["input_ids"]
    with torch.no_grad():
        expected = model(ids).logits
        torch_paged.patch(model)
        actual = model(ids, past_key_values=torch_paged.PagedCache(model.config), **{name: None}).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_module_in_two_layers_ends_as_without_the_ops() -> None:
    """Which store in one layer of the cache, twice in a pass."""
    model = tiny("llama")
    model.model.layers[2].self_attn = model.model.layers[0].self_attn
    ids = batch([9])["input_ids"]
    ends = []
    for fast in (False, True):
        with torch_paged.paged(model, fast_layers=fast), torch.no_grad():
            try:
                ends.append(model(ids, past_key_values=torch_paged.PagedCache(model.config, fast_layers=fast)).logits)
            except Exception as error:
                ends.append(type(error))
    without, with_ops = ends
    if isinstance(without, torch.Tensor):
        torch.testing.assert_close(with_ops, without, rtol=1e-4, atol=1e-5)
    else:
        assert with_ops is without


def test_a_cache_of_another_dtype_is_for_update() -> None:
    """Which an earlier call under autocast has filled."""
    cache = torch_paged.PagedCache(tiny("llama").config)
    key = torch.zeros(1, 2, 3, 16, dtype=torch.bfloat16)
    cache.update(key, key, 0)
    call = Call(1, 2, native=True)
    rows, angles = torch.zeros(2, 2, 16), torch.zeros(2, 16)
    with announced(cache, call):
        layer = cache.layers[0]
        assert layer.rotate_and_update(rows, rows, rows, angles, angles, 2) is None
        assert layer.columns == 3
        layer.update(*[rows.view(1, 2, 2, 16).transpose(1, 2)] * 2)
    assert layer.columns == cache.get_seq_length() == 5
