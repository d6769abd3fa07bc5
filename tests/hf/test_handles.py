"""The handles that layers give a model serve again in the next layer, unless somebody still has them."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import torch_paged
from torch_paged.hf.layer import PagedLayer
from torch_paged.hf.paged_kv import PagedKV

from .models import assert_same_tokens, batch, generate, tiny, twin

# Attention that our ops run from the projections on needs no handles.
BY_UPDATE: dict[str, Any] = dict(fast_layers=False)


@pytest.mark.parametrize("name", ["llama", "qwen2-sliding"])
def test_one_pair_for_each_group_in_each_pass(name: str) -> None:
    model, inputs, made = tiny(name), batch([20, 5]), []
    new = PagedKV.__new__

    def counted(*args: Any) -> PagedKV:
        made.append(args)
        return new(*args)

    with torch_paged.paged(model, **BY_UPDATE), mock.patch.object(PagedKV, "__new__", staticmethod(counted)):
        generate(model, inputs, eos_token_id=None, max_new_tokens=6)
    groups = 1 if name == "llama" else 2
    assert len(made) == 6 * 2 * groups


@pytest.mark.parametrize("kept", [0, 1])
def test_what_somebody_keeps_stays_what_it_was(kept: int) -> None:
    """Here K or V of every layer, read after the pass as the tensors that they stand for."""
    stock = tiny("llama")
    model = twin(stock)
    inputs = batch([9, 9])
    update, held = PagedLayer.update, list[Tensor]()

    def keeping(self: PagedLayer, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        pair = update(self, *args, **kwargs)
        held.append(pair[kept])
        return pair

    with torch.no_grad():
        expected = stock(**inputs, use_cache=True)
        with torch_paged.paged(model, **BY_UPDATE), mock.patch.object(PagedLayer, "update", keeping):
            cache = torch_paged.PagedCache(model.config, **BY_UPDATE)
            actual = model(**inputs, past_key_values=cache)
        torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-4, atol=1e-4)
        assert len({id(each) for each in held}) == len(held) == 3
        for layer, each in zip(expected.past_key_values.layers, held, strict=True):
            torch.testing.assert_close(each + 0, (layer.keys, layer.values)[kept], rtol=1e-4, atol=1e-4)


def test_another_shape_in_a_later_layer_is_checked() -> None:
    """The first layer of a group is checked in each pass, the others where they differ from it."""
    cache = torch_paged.PagedCache(tiny("llama").config)
    key = torch.zeros(2, 2, 1, 16)
    cache.update(key, key, 0)
    cache.update(key, key, 1)
    cache.update(key, key, 2)
    cache.update(key, key, 0)
    with pytest.raises(ValueError, match="heads and head sizes of K and V"):
        cache.update(key, key.repeat(1, 2, 1, 1)[..., :8], 1)


def test_tokens_stay_stocks_where_everything_is_kept() -> None:
    stock = tiny("qwen2-sliding")
    model = twin(stock)
    inputs = batch([20, 5])
    expected = generate(stock, inputs)
    update, held = PagedLayer.update, list[Any]()

    def keeping(self: PagedLayer, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        held.append(update(self, *args, **kwargs))
        return held[-1]

    with torch_paged.paged(model, **BY_UPDATE), mock.patch.object(PagedLayer, "update", keeping):
        actual = generate(model, inputs)
    assert_same_tokens(stock, expected, actual, inputs)
