"""What somebody has replaced in an attention module, or around it, is what runs."""

from __future__ import annotations

import sys
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import Cache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import torch_paged
from torch_paged.hf.implementation import NAME
from torch_paged.hf.layer import PagedLayer

from .fast_ops import rows_of_calls
from .models import assert_same_tokens, batch, generate, tiny
from .test_self_attention import LAYERS, attentions


def module_of(model: PreTrainedModel) -> Any:
    """The Python module that the classes of `model` are defined in."""
    return sys.modules[type(attentions(model)[0]).__module__]


@pytest.mark.parametrize("function", ["apply_rotary_pos_emb", "rotate_half"])
def test_a_replaced_rotation_is_the_one_that_runs(function: str) -> None:
    """As libraries replace the functions of transformers' modules."""
    model = tiny("llama")
    inputs = batch([5, 9])
    plain = getattr(module_of(model), function)

    def other(*args: Any, **kwargs: Any) -> Any:
        result = plain(*args, **kwargs)
        return -result if function == "rotate_half" else (2 * result[0], result[1])

    with torch_paged.paged(model), mock.patch.object(module_of(model), function, other):
        with rows_of_calls("qkv_linear") as rows:
            actual = generate(model, inputs)
        torch_paged.unpatch(model)
        assert_same_tokens(model, generate(model, inputs), actual, inputs)
    assert rows == []


def test_a_replaced_method_is_the_one_that_runs() -> None:
    model = tiny("llama")
    cls = type(attentions(model)[0])
    inputs = batch([5, 9])
    once = cls.forward

    def twice(self: Any, *args: Any, **kwargs: Any) -> Any:
        out, weights = once(self, *args, **kwargs)
        return 2 * out, weights

    with torch_paged.paged(model), rows_of_calls("qkv_linear") as rows, mock.patch.object(cls, "forward", twice):
        actual = generate(model, inputs)
    assert rows == []
    with mock.patch.object(cls, "forward", twice):
        assert_same_tokens(model, generate(model, inputs), actual, inputs)


def test_a_replaced_attention_function_is_the_one_that_runs() -> None:
    model = tiny("llama")
    inputs = batch([5, 9])
    calls: list[int] = []
    ours = ALL_ATTENTION_FUNCTIONS[NAME]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return ours(*args, **kwargs)

    expected = generate(model, inputs)
    with torch_paged.paged(model), rows_of_calls("qkv_linear") as rows:
        ALL_ATTENTION_FUNCTIONS[NAME] = counted
        try:
            actual = generate(model, inputs)
        finally:
            del ALL_ATTENTION_FUNCTIONS[NAME]
    assert rows == [] and calls
    assert ALL_ATTENTION_FUNCTIONS[NAME] is ours
    assert_same_tokens(model, expected, actual, inputs)


@pytest.mark.parametrize("owner", ["cache", "layer", "class of caches", "class of layers"])
def test_a_replaced_update_is_the_one_that_runs(owner: str) -> None:
    """As of code that records or compresses what is stored."""
    model = tiny("llama")
    torch_paged.patch(model)
    cache = torch_paged.PagedCache(model.config)
    of = {"cache": cache, "layer": cache.layers[1], "class of caches": Cache, "class of layers": PagedLayer}[owner]
    update, calls = of.update, list[int]()

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return update(*args, **kwargs)

    with mock.patch.object(of, "update", counted), rows_of_calls("qkv_linear") as rows, torch.no_grad():
        model(**batch([5]), past_key_values=cache)
    assert len(calls) == (1 if owner == "layer" else LAYERS)
    assert len(rows) == LAYERS - len(calls)
