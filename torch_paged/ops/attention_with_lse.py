"""attention_with_lse: paged attention that also returns the log-sum-exp, so that parts can be merged."""

from typing import Any

import torch
from torch import Tensor

from torch_paged.ops._library import define, fake, value_errors
from torch_paged.ops.attention import fake_attention

define(
    "attention_with_lse(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table, Tensor seq_lens, "
    "Tensor cu_seqlens_q, SymInt max_query_len, *, float? scale=None, bool causal=True, SymInt sliding_window=0, "
    "float softcap=0.0, Tensor? alibi_slopes=None, Tensor? sinks=None, Tensor? key_scale=None, "
    "Tensor? value_scale=None, SymInt max_seq_len=0, int num_splits=0, bool deterministic=False) "
    "-> (Tensor out, Tensor lse)"
)


def attention_with_lse(
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
) -> tuple[Tensor, Tensor]:
    """Attend as `attention` does, and return the softmax's normaliser too.

    Args and errors: those of `attention`.

    Returns:
        out: `[tokens, num_heads, v_head_dim]`, dtype of query.
        lse: float32 `[num_heads, tokens]`, natural logarithm of the sum of the exponentiated scores, the sink
            included; -inf for a row that sees neither key nor sink.

    Source: PagedAttention, arXiv 2309.06180; log-sum-exp as in FlashAttention-2, arXiv 2307.08691.
    """
    with value_errors():
        out, lse = torch.ops.paged.attention_with_lse(
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
    return out, lse


@fake("attention_with_lse")
def _(query: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    out = fake_attention(query, *args, **options)
    return out, query.new_empty((query.shape[1], query.shape[0]), dtype=torch.float32)
