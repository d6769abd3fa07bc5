"""gather_cache: read a paged cache into dense, padded tensors."""

import torch
from torch import Tensor

from torch_paged.ops._library import check_same_device, define, fake, value_errors

define(
    "gather_cache(Tensor key_cache, Tensor value_cache, Tensor block_table, Tensor seq_lens, SymInt max_seq_len, "
    "Tensor? key_scale=None, Tensor? value_scale=None) -> (Tensor key, Tensor value)"
)


def gather_cache(
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    max_seq_len: int,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Collect each sequence's tokens in order, zeros past `seq_lens`.

    Args:
        key_cache: `[num_blocks, block_size, num_kv_heads, head_dim]`, any dtype; head_dim or block_size contiguous;
            block_size a power of two up to 256.
        value_cache: `[num_blocks, block_size, num_kv_heads, v_head_dim]`, same dtype, last dimension contiguous.
        block_table: int32 `[num_seqs, max_blocks]`, last dimension contiguous; entries past `seq_lens` may be -1.
        seq_lens: int32 `[num_seqs]`, tokens of each sequence.
        max_seq_len: length of the result, at least the longest of `seq_lens`.
        key_scale: float32 `[1]` or `[num_kv_heads]`, the key is what is stored times this; needs float32, bfloat16,
            float16 or float64.
        value_scale: likewise for the value.

    Returns:
        key: `[num_seqs, max_seq_len, num_kv_heads, head_dim]`, contiguous, dtype of key_cache.
        value: `[num_seqs, max_seq_len, num_kv_heads, v_head_dim]`, likewise.

    Raises:
        ValueError: dtype, shape, strides, device or value of an argument is wrong; the text names it.

    Source: the inverse of the paged layout of arXiv 2309.06180, section 4.1.
    """
    with value_errors():
        key, value = torch.ops.paged.gather_cache(
            key_cache, value_cache, block_table, seq_lens, max_seq_len, key_scale, value_scale
        )
    return key, value


@fake("gather_cache")
def _(
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    max_seq_len: int,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    check_same_device(
        key_cache,
        value_cache=value_cache,
        block_table=block_table,
        seq_lens=seq_lens,
        key_scale=key_scale,
        value_scale=value_scale,
    )
    rows = (block_table.shape[0], max_seq_len)
    return key_cache.new_empty((*rows, *key_cache.shape[2:])), value_cache.new_empty((*rows, *value_cache.shape[2:]))
