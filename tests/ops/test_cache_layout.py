"""empty_cache and cache_view: one layout, from fresh memory or from given bytes."""

import re

import pytest
import torch

from torch_paged import ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_a_block_is_one_run_of_bytes_with_heads_outermost(dtype):
    key_cache, value_cache = ops.empty_cache(3, 4, 2, 16, 8, dtype=dtype, device="cpu")
    assert key_cache.shape == (3, 4, 2, 16) and value_cache.shape == (3, 4, 2, 8)
    assert key_cache.stride() == (128, 16, 64, 1) and value_cache.stride() == (64, 8, 32, 1)
    assert key_cache.dtype == value_cache.dtype == dtype


def test_head_dims_are_equal_by_default():
    key_cache, value_cache = ops.empty_cache(3, 4, 2, 16, dtype=torch.float32, device="meta")
    assert value_cache.shape == key_cache.shape and value_cache.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_view_shares_the_bytes_and_has_the_layout_of_empty_cache(dtype):
    storage = torch.zeros(8 * 3 * 4 * 2 * 16 + 64, dtype=torch.uint8)
    view = ops.cache_view(storage[16:], 3, 4, 2, 16, dtype)
    like = ops.empty_cache(3, 4, 2, 16, dtype=dtype, device="cpu")[0]
    assert view.shape == like.shape and view.stride() == like.stride() and view.dtype == dtype
    view.fill_(1)
    num_bytes = view.numel() * dtype.itemsize
    assert view.data_ptr() == storage.data_ptr() + 16
    assert storage[16 : 16 + num_bytes].view(dtype).eq(1).all()
    assert not storage[:16].any() and not storage[16 + num_bytes :].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_blocks": -1}, "num_blocks: -1; must be at least 0"),
        ({"block_size": 0}, "block_size: 0; must be a power of two from 1 to 256"),
        ({"block_size": 24}, "block_size: 24; must be a power of two from 1 to 256"),
        ({"block_size": 512}, "block_size: 512; must be a power of two from 1 to 256"),
        ({"num_kv_heads": 0}, "num_kv_heads: 0; must be at least 1"),
        ({"head_dim": 0}, "head_dim: 0; must be at least 1"),
    ],
)
def test_rejects_sizes(changes, message):
    sizes = {"num_blocks": 1, "block_size": 4, "num_kv_heads": 2, "head_dim": 8} | changes
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.empty_cache(**sizes, dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.cache_view(torch.zeros(9999, dtype=torch.uint8), **sizes, dtype=torch.float32)


def test_rejects_v_head_dim():
    with pytest.raises(ValueError, match="v_head_dim: 0; must be at least 1"):
        ops.empty_cache(1, 4, 2, 8, 0, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        (torch.zeros(256), "storage: torch.float32 of shape [256] and strides [1]; must be torch.uint8, 1-D and"),
        (torch.zeros(16, 16, dtype=torch.uint8), "storage: torch.uint8 of shape [16, 16]"),
        (torch.zeros(512, dtype=torch.uint8)[::2], "storage: torch.uint8 of shape [256] and strides [2]"),
        (
            torch.zeros(300, dtype=torch.uint8)[2:],
            "storage: begins at byte 2 of its memory; must be at a multiple of 4",
        ),
        (torch.zeros(255, dtype=torch.uint8), "storage: 255 bytes; must be at least 256"),
    ],
)
def test_rejects_storage(storage, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.cache_view(storage, 1, 4, 2, 8, torch.float32)
