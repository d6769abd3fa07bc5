"""reshape_and_cache: write new keys and values into their slots of a paged cache."""

import torch
from torch import Tensor

from torch_paged.ops._library import check_same_device, define, fake, value_errors

define(
    "reshape_and_cache(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor slot_mapping, "
    "Tensor? key_scale=None, Tensor? value_scale=None) -> ()"
)


def reshape_and_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> None:
    """Store token `t` of key and value in slot `slot_mapping[t] = block * block_size + offset`.

    Args:
        key: `[tokens, num_kv_heads, head_dim]`, any dtype, last dimension contiguous.
        value: `[tokens, num_kv_heads, v_head_dim]`, likewise.
        key_cache: `[num_blocks, block_size, num_kv_heads, head_dim]`, dtype of key, written in place; head_dim or
            block_size contiguous; block_size a power of two up to 256.
        value_cache: `[num_blocks, block_size, num_kv_heads, v_head_dim]`, dtype of value, written in place.
        slot_mapping: int64 `[tokens]`, -1 skips the token; no slot twice.
        key_scale: float32 `[1]` or `[num_kv_heads]`, what is stored is the key divided by this; needs float32,
            bfloat16, float16 or float64.
        value_scale: likewise for the value.

    Raises:
        ValueError: dtype, shape, strides or device of an argument is wrong, or a slot is outside
            `[-1, num_blocks * block_size)` or there twice.

    Source: PagedAttention, arXiv 2309.06180, section 5.1.
    """
    with value_errors():
        torch.ops.paged.reshape_and_cache(key, value, key_cache, value_cache, slot_mapping, key_scale, value_scale)


@fake("reshape_and_cache")
def _(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> None:
    check_same_device(
        key_cache,
        key=key,
        value=value,
        value_cache=value_cache,
        slot_mapping=slot_mapping,
        key_scale=key_scale,
        value_scale=value_scale,
    )
