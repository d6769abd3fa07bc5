"""The oracle: every op in plain PyTorch, written to be read, in float64 unless another dtype is asked for."""

import torch
from torch import Tensor


def attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    sliding_window: int = 0,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Return out `[tokens, heads, v_head_dim]` and lse `[heads, tokens]`, each step computed in `dtype`."""
    num_tokens, num_heads, head_dim = query.shape
    _, block_size, num_kv_heads, v_head_dim = value_cache.shape
    group = num_heads // num_kv_heads
    out = query.new_zeros((num_tokens, num_heads, v_head_dim), dtype=dtype)
    lse = query.new_full((num_heads, num_tokens), -torch.inf, dtype=dtype)
    for s, seq_len in enumerate(seq_lens.tolist()):
        rows = slice(int(cu_seqlens_q[s]), int(cu_seqlens_q[s + 1]))
        num_rows = rows.stop - rows.start
        positions = torch.arange(num_rows, device=query.device)[:, None] + seq_len - num_rows
        keys_at = torch.arange(seq_len, device=query.device)[None, :]
        visible = visible_keys(positions, keys_at, causal, sliding_window)

        # What no row sees may have no block, so it stays zero.
        seen = visible.any(0).nonzero()[:, 0]
        blocks, offsets = block_table[s][seen // block_size].long(), seen % block_size
        key = query.new_zeros((seq_len, num_kv_heads, head_dim), dtype=dtype)
        value = query.new_zeros((seq_len, num_kv_heads, v_head_dim), dtype=dtype)
        key[seen] = scaled(key_cache[blocks, offsets], key_scale, dtype)
        value[seen] = scaled(value_cache[blocks, offsets], value_scale, dtype)
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)

        scores = torch.einsum("ihd,jhd->hij", query[rows].to(dtype), key)
        scores = scores * (head_dim**-0.5 if scale is None else scale)
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        if alibi_slopes is not None:
            scores = scores + alibi_slopes.to(dtype)[:, None, None] * (keys_at - positions).to(dtype)
        scores = scores.masked_fill(~visible, -torch.inf)
        sink = torch.full((num_heads,), -torch.inf, device=query.device) if sinks is None else sinks
        logits = torch.cat([scores, sink.to(dtype)[:, None, None].expand(-1, num_rows, 1)], 2)
        weights = torch.softmax(logits, 2)[:, :, :-1].masked_fill(~visible, 0.0)
        out[rows] = torch.einsum("hij,jhd->ihd", weights, value)
        lse[:, rows] = torch.logsumexp(logits, 2)
    return out, lse


def visible_keys(positions: Tensor, keys_at: Tensor, causal: bool, sliding_window: int) -> Tensor:
    """Return which keys (columns) each query row sees."""
    visible = (positions >= 0) & (keys_at >= 0)
    if causal:
        visible = visible & (keys_at <= positions)
    if sliding_window > 0:
        visible = visible & (positions - keys_at < sliding_window)
        if not causal:
            visible = visible & (keys_at - positions < sliding_window)
    return visible


def scaled(stored: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return `[.., num_kv_heads, head_dim]` times its scale `[1]` or `[num_kv_heads]`."""
    return stored.to(dtype) if scale is None else stored.to(dtype) * scale.to(dtype)[:, None]


def merge_attention_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the merged out in float64 and lse in float64."""
    out = torch.zeros(out_a.shape, dtype=torch.float64, device=out_a.device)
    lse = torch.logaddexp(lse_a.double(), lse_b.double())
    for part, part_lse in ((out_a, lse_a), (out_b, lse_b)):
        weight = torch.exp(part_lse.double() - lse).T[:, :, None]
        out += torch.where(part_lse.T[:, :, None] == -torch.inf, 0.0, weight * part.double())
    return out, lse


def reshape_and_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> None:
    """Write the caches in place, one token after the other."""
    block_size = key_cache.shape[1]
    for rows, cache, scale in ((key, key_cache, key_scale), (value, value_cache, value_scale)):
        for token, slot in enumerate(slot_mapping.tolist()):
            if slot >= 0:
                stored = rows[token] if scale is None else divided(rows[token], scale)
                cache[slot // block_size, slot % block_size] = stored


def divided(rows: Tensor, scale: Tensor) -> Tensor:
    """Return `[num_kv_heads, head_dim]` divided in float32, or float64 for float64, in the dtype of rows."""
    compute = torch.promote_types(rows.dtype, torch.float32)
    return (rows.to(compute) / scale.to(compute)[:, None]).to(rows.dtype)


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
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Return the rotated query in `dtype`, and write the caches in place, each step computed in `dtype`."""
    angles = cos.to(dtype)[:, None], sin.to(dtype)[:, None]
    turned_key = rotated(key.to(dtype), *angles, interleaved)
    reshape_and_cache(turned_key, value, key_cache, value_cache, slot_mapping, key_scale, value_scale)
    return rotated(query.to(dtype), *angles, interleaved)


def rotated(rows: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Return `[.., head_dim]` with the pairs of its first rotary_dim elements turned; `[.., rotary_dim]` angles."""
    half = cos.shape[-1] // 2
    x, y = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(0, half), slice(half, 2 * half))
    turned = rows.clone()
    turned[..., x] = rows[..., x] * cos[..., x] - rows[..., y] * sin[..., x]
    turned[..., y] = rows[..., y] * cos[..., y] + rows[..., x] * sin[..., y]
    return turned


def copy_blocks(key_caches: list[Tensor], value_caches: list[Tensor], block_mapping: Tensor) -> None:
    """Copy blocks in place, one pair after the other."""
    for cache in (*key_caches, *value_caches):
        for source, destination in block_mapping.tolist():
            cache[destination] = cache[source]


def swap_blocks(src: list[Tensor], dst: list[Tensor], block_mapping: Tensor) -> None:
    """Copy blocks from pool to pool, one pair after the other."""
    for from_cache, to_cache in zip(src, dst, strict=True):
        for source, destination in block_mapping.tolist():
            to_cache[destination] = from_cache[source]


def gather_cache(
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    max_seq_len: int,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return key and value `[num_seqs, max_seq_len, num_kv_heads, head_dim]` in the dtype of the caches."""
    block_size = key_cache.shape[1]
    gathered = []
    for cache, scale in ((key_cache, key_scale), (value_cache, value_scale)):
        rows = cache.new_zeros((seq_lens.numel(), max_seq_len, *cache.shape[2:]))
        for s, seq_len in enumerate(seq_lens.tolist()):
            for j in range(seq_len):
                stored = cache[int(block_table[s, j // block_size]), j % block_size]
                if scale is not None:
                    stored = scaled(stored, scale, torch.promote_types(cache.dtype, torch.float32)).to(cache.dtype)
                rows[s, j] = stored
        gathered.append(rows)
    return gathered[0], gathered[1]
