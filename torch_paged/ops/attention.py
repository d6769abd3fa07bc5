"""attention: causal or bidirectional attention of ragged queries over a paged KV cache."""

import torch
from torch import Tensor

from torch_paged.ops._library import check_same_device, define, fake, value_errors

define(
    "attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table, Tensor seq_lens, "
    "Tensor cu_seqlens_q, SymInt max_query_len, *, float? scale=None, bool causal=True, SymInt sliding_window=0, "
    "float softcap=0.0, Tensor? alibi_slopes=None, Tensor? sinks=None, Tensor? key_scale=None, "
    "Tensor? value_scale=None, SymInt max_seq_len=0, int num_splits=0, bool deterministic=False) -> Tensor"
)


def attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    max_query_len: int,
    *,
    scale: float | None = None,
    causal: bool = True,
    sliding_window: int = 0,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    max_seq_len: int = 0,
    num_splits: int = 0,
    deterministic: bool = False,
) -> Tensor:
    """Attend from ragged queries to the cached keys and values: decode, prefill and mixtures in one call.

    Sequence `s` has the query rows `cu_seqlens_q[s]:cu_seqlens_q[s + 1]` and `L = seq_lens[s]` cached tokens, its new
    ones included. Its `i`-th row of `q_len` stands at position `p = L - q_len + i`; a row with `p < 0` sees no key.
    Key `j` scores `softcap * tanh(scale * q.k / softcap) + alibi_slope * (j - p)`. A row that sees no key gives zeros.
    float64 accumulates in float64, the other dtypes in float32.

    Args:
        query: `[tokens, num_heads, head_dim]`, float32, bfloat16, float16 or (CPU) float64, last dimension contiguous;
            head_dim a multiple of 8 up to 512, num_heads a multiple of num_kv_heads.
        key_cache: `[num_blocks, block_size, num_kv_heads, head_dim]`, dtype of query; head_dim contiguous, or
            block_size contiguous (transposed blocks); block_size a power of two up to 256.
        value_cache: `[num_blocks, block_size, num_kv_heads, v_head_dim]`, dtype of query, last dimension contiguous.
        block_table: int32 `[num_seqs, max_blocks]`, last dimension contiguous; entries that no row sees may be -1.
        seq_lens: int32 `[num_seqs]`, cached tokens of each sequence.
        cu_seqlens_q: int32 `[num_seqs + 1]`, where each sequence's query rows begin.
        max_query_len: no sequence has more query rows than this.
        scale: factor on `q.k`; None is `head_dim ** -0.5`.
        causal: hide keys after the row's own position.
        sliding_window: tokens that a row sees, its own included (on either side when not causal); 0 is all.
        softcap: bound on the scores; 0 is none.
        alibi_slopes: float32 `[num_heads]`.
        sinks: float32 `[num_heads]`, one more logit per head in the denominator, without a value.
        key_scale: float32 `[1]` or `[num_kv_heads]`, the real key is the stored one times this.
        value_scale: likewise for the value.
        max_seq_len: bound on `seq_lens` for the choice of `num_splits` where lengths lie on a device; 0 is the width of
            the table. The CPU reads the lengths and does not need it.
        num_splits: parts in which to walk a sequence's keys side by side; 0 chooses.
        deterministic: make a row's result independent of its batch and of the number of threads.

    Returns:
        `[tokens, num_heads, v_head_dim]`, dtype of query.

    Raises:
        ValueError: dtype, shape, strides, device or value of an argument is wrong; the text names it.

    Source: PagedAttention, arXiv 2309.06180, with the online softmax of FlashAttention-2, arXiv 2307.08691, and the
    split over keys of Flash-Decoding; ALiBi, arXiv 2108.12409; attention sinks as learned logits, arXiv 2508.10925.
    """
    with value_errors():
        out: Tensor = torch.ops.paged.attention(
            query,
            key_cache,
            value_cache,
            block_table,
            seq_lens,
            cu_seqlens_q,
            max_query_len,
            scale=scale,
            causal=causal,
            sliding_window=sliding_window,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            key_scale=key_scale,
            value_scale=value_scale,
            max_seq_len=max_seq_len,
            num_splits=num_splits,
            deterministic=deterministic,
        )
    return out


@fake("attention")
def fake_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    max_query_len: int,
    *,
    scale: float | None = None,
    causal: bool = True,
    sliding_window: int = 0,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    max_seq_len: int = 0,
    num_splits: int = 0,
    deterministic: bool = False,
) -> Tensor:
    check_same_device(
        query,
        key_cache=key_cache,
        value_cache=value_cache,
        block_table=block_table,
        seq_lens=seq_lens,
        cu_seqlens_q=cu_seqlens_q,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        key_scale=key_scale,
        value_scale=value_scale,
    )
    return query.new_empty((query.shape[0], query.shape[1], value_cache.shape[3]))
