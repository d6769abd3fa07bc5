"""A graph that would copy a paged cache is refused, or told of."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from .decoder import BLOCK_SIZE, HEAD_DIM, KV_HEADS, Decoder, Step

KEYS = torch.ones(2, KV_HEADS, HEAD_DIM)
SLOTS = torch.tensor([1, 6])
CACHE = (3, BLOCK_SIZE, KV_HEADS, HEAD_DIM)


def write(key_cache: Tensor) -> Tensor:
    """Into a cache and a copy of it: a tensor that is written through two names."""
    value_cache = key_cache.clone()
    torch.ops.paged.reshape_and_cache(KEYS, -KEYS, key_cache, value_cache, SLOTS)
    return value_cache


@torch.no_grad()
def copies(action: str) -> None:
    cache = torch.zeros(CACHE)
    copy = torch.compile(write, backend="torch_paged", options={"cache_copies": action})(cache)
    assert torch.equal(cache.flatten(0, 1)[SLOTS], KEYS) and torch.equal(copy.flatten(0, 1)[SLOTS], -KEYS)


def test_raises() -> None:
    with pytest.raises(Exception, match=r"CacheCopied: .*reshape_and_cache.* would copy the cache .* bytes"):
        copies("raise")


def test_warns() -> None:
    with pytest.warns(UserWarning, match="would copy the cache"):
        copies("warn")


def test_allows() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        copies("allow")


@torch.no_grad()
def test_nothing_is_wrong_with_a_decode_step() -> None:
    model = Decoder()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        step = torch.compile(model, backend="torch_paged", options={"cache_copies": "warn"})
        step(torch.tensor([[1]]), model.new_caches(), Step([1]))
