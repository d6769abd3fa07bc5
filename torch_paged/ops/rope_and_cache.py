"""rope_and_cache: rotate new queries and keys to their positions, and write keys and values into their slots."""

import torch
from torch import Tensor

from torch_paged.ops._library import check_same_device, define, fake, value_errors

define(
    "rope_and_cache(Tensor query, Tensor key, Tensor value, Tensor cos, Tensor sin, Tensor(a!) key_cache, "
    "Tensor(b!) value_cache, Tensor slot_mapping, *, bool interleaved=False, Tensor? key_scale=None, "
    "Tensor? value_scale=None) -> Tensor query_rotated"
)


def rope_and_cache(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    interleaved: bool = False,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> Tensor:
    """Do `reshape_and_cache` with the key rotated to its position, and rotate the query, in one pass.

    The first `rotary_dim` elements of a head are pairs `(x, y)`, turned in float32 (float64 for float64) into
    `x * cos - y * sin` and `y * cos + x * sin`, where cos and sin stand at the element's own place, and rounded once,
    after the scale. The other elements are kept as they are.

    Args:
        query: `[tokens, num_heads, head_dim]`, float32, bfloat16, float16 or (CPU) float64, last dimension contiguous.
        key: `[tokens, num_kv_heads, head_dim]`, dtype of query, likewise.
        value: `[tokens, num_kv_heads, v_head_dim]`, dtype of query, likewise.
        cos: `[tokens, rotary_dim]`, float32 or dtype of query, rotary_dim even and at most head_dim, last dimension
            contiguous.
        sin: likewise, dtype and shape of cos.
        key_cache: `[num_blocks, block_size, num_kv_heads, head_dim]`, dtype of query, written in place; head_dim or
            block_size contiguous; block_size a power of two up to 256.
        value_cache: `[num_blocks, block_size, num_kv_heads, v_head_dim]`, dtype of query, written in place.
        slot_mapping: int64 `[tokens]`, -1 writes neither key nor value; no slot twice.
        interleaved: pairs are elements `2i` and `2i + 1` (GPT-J); else `i` and `i + rotary_dim / 2` (Llama, GPT-NeoX).
        key_scale: float32 `[1]` or `[num_kv_heads]`, what is stored is the rotated key divided by this.
        value_scale: likewise for the value.

    Returns:
        query_rotated: `[tokens, num_heads, head_dim]`, contiguous, dtype of query, also for tokens without a slot.

    Raises:
        ValueError: dtype, shape, strides or device of an argument is wrong, or a slot is outside
            `[-1, num_blocks * block_size)` or there twice.

    Source: RoFormer, arXiv 2104.09864, section 3.4.2.
    """
    with value_errors():
        query_rotated: Tensor = torch.ops.paged.rope_and_cache(
            query,
            key,
            value,
            cos,
            sin,
            key_cache,
            value_cache,
            slot_mapping,
            interleaved=interleaved,
            key_scale=key_scale,
            value_scale=value_scale,
        )
    return query_rotated


@fake("rope_and_cache")
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    interleaved: bool = False,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> Tensor:
    check_same_device(
        key_cache,
        query=query,
        key=key,
        value=value,
        cos=cos,
        sin=sin,
        value_cache=value_cache,
        slot_mapping=slot_mapping,
        key_scale=key_scale,
        value_scale=value_scale,
    )
    return query.new_empty(query.shape)
