"""PagedCache does what DynamicCache does to the same sequence of calls."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from transformers import DynamicCache

import torch_paged

from .counting import count_calls
from .models import batch, generate, tiny


def _update(caches: list[DynamicCache], rows: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for layer in range(3):
        key, value = torch.randn(2, rows, 2, width, 16, generator=generator)
        for cache in caches:
            cache.update(key, value, layer)


def _same(stock: DynamicCache, paged: torch_paged.PagedCache) -> None:
    assert paged.get_seq_length() == stock.get_seq_length()
    for want, got in zip(stock.layers, paged.layers, strict=True):
        assert torch.equal(want.keys, got.keys) and torch.equal(want.values, got.values)


def test_edits_match_dynamic_cache() -> None:
    config = tiny("llama").config
    stock, paged = DynamicCache(config=config), torch_paged.PagedCache(config, block_size=4)
    both = [stock, paged]
    _update(both, rows=2, width=7, seed=0)
    _same(stock, paged)
    for cache in both:
        cache.batch_repeat_interleave(3)
    _same(stock, paged)
    _update(both, rows=6, width=1, seed=1)
    for cache in both:
        cache.reorder_cache(torch.tensor([5, 5, 0, 1, 2, 2]))
    _update(both, rows=6, width=2, seed=2)
    _same(stock, paged)
    for cache in both:
        cache.crop(-4)
        cache.crop(0)
    _same(stock, paged)
    for cache in both:
        cache.batch_select_indices(torch.tensor([True, False, True, False, False, True]))
    _update(both, rows=3, width=5, seed=3)
    _same(stock, paged)
    for cache in both:
        cache.batch_select_indices(torch.tensor([-1, 0, 1]))
        cache.batch_select_indices([2, 0, 1])
    _same(stock, paged)
    assert paged.get_mask_sizes(2, 0) == stock.get_mask_sizes(2, 0)
    for cache in both:
        cache.reset()
    assert paged.get_seq_length() == stock.get_seq_length() == 0
    assert paged.stats().blocks_used == 0
    _update(both, rows=1, width=3, seed=4)
    _same(stock, paged)


def test_crop_and_reorder_move_no_byte() -> None:
    """Table edits: not one op runs, and the blocks behind the crop are free."""
    model = tiny("llama")
    with torch.no_grad(), torch_paged.paged(model, block_size=4):
        cache = torch_paged.PagedCache(model.config, block_size=4)
        model(**batch([21, 9]), past_key_values=cache)
        assert cache.stats().blocks_used == 6 + 3
        with count_calls() as calls:
            cache.crop(-5)
            assert cache.stats().blocks_used == 4 + 1
            cache.crop(0)
            cache.reorder_cache(torch.tensor([0, 0]))
            assert (cache.stats().blocks_used, cache.stats().blocks_shared) == (4, 4)
    assert not any(name.startswith("paged.") for name in calls) and calls["gather"] == 0
    assert not {"aten.copy_", "aten.index_select", "aten.cat"} & set(calls)


def test_bad_edits() -> None:
    config = tiny("llama").config
    cache = torch_paged.PagedCache(config)
    _update([cache], rows=2, width=3, seed=0)
    with pytest.raises(ValueError, match="tokens_to_remove: 1"):
        cache.crop(1)
    with pytest.raises(ValueError, match="batch size: 3; must be 2"):
        _update([cache], rows=3, width=1, seed=0)
    with pytest.raises(NotImplementedError, match="reorder the PagedCache"):
        cache.layers[0].reorder_cache(torch.tensor([1, 0]))
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(cache)
    with pytest.raises(ValueError, match=r"key_states: .* \(2, 24, 24\); must be \(2, 16, 16\)"):
        cache.update(torch.zeros(2, 2, 1, 24), torch.zeros(2, 2, 1, 24), 0)
    assert cache.layers[0].get_seq_length() == 3


def test_dropped_cache_gives_its_blocks_back_without_the_cycle_collector() -> None:
    model = tiny("llama")
    with torch_paged.paged(model) as handle:
        gc.disable()
        try:
            out = generate(model, batch([9, 5]), return_dict_in_generate=True)
            assert handle.stats().blocks_used > 0
            del out
            assert handle.stats().blocks_used == 0
        finally:
            gc.enable()


def test_pool_exhausted_names_the_knob_and_leaves_nothing() -> None:
    model = tiny("llama")
    # 3 layers of K and V, 2 heads of 16 float32, blocks of 4 tokens: 3072 bytes a block; 6 blocks hold 24 tokens.
    with torch_paged.paged(model, block_size=4, max_memory=6 * 3072) as handle:
        with pytest.raises(torch_paged.PoolExhausted, match="max_memory") as raised:
            generate(model, batch([20]), max_new_tokens=30, eos_token_id=None)
        assert (raised.value.needed, raised.value.free) == (1, 0)
        assert handle.stats().blocks_used == 0
        stock_tokens = generate(model, batch([5]), max_new_tokens=10, eos_token_id=None)
    assert torch.equal(generate(model, batch([5]), max_new_tokens=10, eos_token_id=None), stock_tokens)


@pytest.mark.parametrize("name", ["llama", "qwen2-sliding"])
def test_a_call_that_fails_is_taken_back(name: str) -> None:
    model, inputs = tiny(name), batch([20, 6])
    with torch.no_grad(), torch_paged.paged(model):
        cache = torch_paged.PagedCache(model.config, block_size=4)
        model(**inputs, past_key_values=cache)
        before = cache.stats(), [layer.keys for layer in cache.layers]

        def fail(*args: object) -> None:
            raise RuntimeError("in the middle")

        hook = model.model.layers[1].mlp.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            model(torch.tensor([[5], [9]]), past_key_values=cache, attention_mask=_longer(inputs["attention_mask"]))
        hook.remove()
        assert cache.get_seq_length() == 20
        # A sliding layer's blocks that had left the window by then are gone for good.
        for layer, keys in zip(cache.layers, before[1], strict=True):
            seen = 12 if layer.is_sliding else 20
            assert torch.equal(layer.keys[:, :, -seen:], keys[:, :, -seen:])
        if name == "llama":
            assert cache.stats().blocks_used == before[0].blocks_used
        # And the cache goes on as if nothing had happened.
        got = model(torch.tensor([[5], [9]]), past_key_values=cache, attention_mask=_longer(inputs["attention_mask"]))
    stock = DynamicCache(config=model.config)
    with torch.no_grad():
        model(**inputs, past_key_values=stock)
        want = model(torch.tensor([[5], [9]]), past_key_values=stock, attention_mask=_longer(inputs["attention_mask"]))
    torch.testing.assert_close(got.logits, want.logits, atol=1e-4, rtol=1e-4)


def _longer(mask: torch.Tensor) -> torch.Tensor:
    return torch.cat([mask, mask.new_ones(len(mask), 1)], 1)


def test_a_shallow_copy_is_another_face_of_the_same_rows() -> None:
    config = tiny("llama").config
    stock, paged = DynamicCache(config=config), torch_paged.PagedCache(config, block_size=4)
    _update([stock, paged], rows=2, width=7, seed=0)
    twins = [copy.copy(stock), copy.copy(paged)]
    held = paged.stats().blocks_used
    _update(twins, rows=2, width=1, seed=1)
    _same(stock, paged)
    assert paged.get_seq_length() == 8 and paged.stats().blocks_used == held
    del paged, stock
    _same(*twins)
