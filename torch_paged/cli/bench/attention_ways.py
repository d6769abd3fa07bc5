"""The same attention in several ways: the paged op, and gather_cache with each form of PyTorch's SDPA."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from torch_paged import ops
from torch_paged.cli.bench.cases import Case, Group


@dataclass
class Inputs:
    """Random inputs of one case: a paged cache per layer, and one query and table for all of them."""

    case: Case
    query: Tensor
    caches: list[tuple[Tensor, Tensor]]
    block_table: Tensor
    seq_lens: Tensor
    cu_seqlens_q: Tensor

    @classmethod
    def random(cls, case: Case, dtype: torch.dtype, block_size: int, num_layers: int) -> "Inputs":
        block_table, num_blocks = _block_table(case.contexts, block_size, torch.randperm)
        caches = [_empty(case, num_blocks, block_size, dtype) for _ in range(num_layers)]
        for key_cache, value_cache in caches:
            key_cache.normal_(), value_cache.normal_()
        return cls(
            case=case,
            query=torch.randn(sum(case.query_lens), case.num_heads, case.head_dim).to(dtype),
            caches=caches,
            block_table=block_table,
            seq_lens=torch.tensor(case.contexts, dtype=torch.int32),
            cu_seqlens_q=torch.tensor([0, *accumulate(case.query_lens)], dtype=torch.int32),
        )

    def repaged(self, block_size: int, in_order: bool) -> "Inputs":
        """The same keys and values in other blocks, which follow one another in memory or lie at random."""
        order = torch.arange if in_order else torch.randperm
        block_table, num_blocks = _block_table(self.case.contexts, block_size, order)
        longest = max(self.case.contexts)
        position = torch.arange(longest)
        slots = block_table[:, position // block_size].long() * block_size + position % block_size
        slots[position >= self.seq_lens[:, None]] = -1
        caches = []
        for key_cache, value_cache in self.caches:
            key, value = ops.gather_cache(key_cache, value_cache, self.block_table, self.seq_lens, longest)
            cache = _empty(self.case, num_blocks, block_size, key_cache.dtype)
            ops.reshape_and_cache(key.flatten(0, 1), value.flatten(0, 1), *cache, slots.flatten())
            caches.append(cache)
        return replace(self, caches=caches, block_table=block_table)

    def layer(self, number: int) -> tuple[Tensor, Tensor]:
        return self.caches[number % len(self.caches)]


def _block_table(contexts: list[int], block_size: int, order: Callable[..., Tensor]) -> tuple[Tensor, int]:
    """A table int32 `[sequences, blocks of the longest]`, -1 = no block, over as many blocks as the contexts need."""
    blocks = [-(-context // block_size) for context in contexts]
    block_table = torch.full((len(contexts), max(blocks)), -1, dtype=torch.int32)
    ids = torch.split(order(sum(blocks), dtype=torch.int32), blocks)
    for row, row_ids in zip(block_table, ids, strict=True):
        row[: len(row_ids)] = row_ids
    return block_table, sum(blocks)


def _empty(case: Case, num_blocks: int, block_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    device = torch.get_default_device()
    return ops.empty_cache(num_blocks, block_size, case.num_kv_heads, case.head_dim, dtype=dtype, device=device)


Attention = Callable[[int], Tensor]
Form = Callable[[Tensor, Tensor, Tensor, Group], Tensor]


def paged(inputs: Inputs) -> Attention:
    max_query_len, max_seq_len = max(inputs.case.query_lens), max(inputs.case.contexts)

    def attend(number: int) -> Tensor:
        key_cache, value_cache = inputs.layer(number)
        return ops.attention(
            inputs.query,
            key_cache,
            value_cache,
            inputs.block_table,
            inputs.seq_lens,
            inputs.cu_seqlens_q,
            max_query_len,
            max_seq_len=max_seq_len,
        )

    return attend


def sdpa_forms(inputs: Inputs) -> dict[str, Form]:
    """The forms in which SDPA computes the case: none is the fastest on every shape."""
    forms: dict[str, Form] = {"enable_gqa": _enable_gqa}
    if inputs.case.num_heads > inputs.case.num_kv_heads:
        forms["heads repeated"] = _heads_repeated
    if any(group.query_len == 1 for group in inputs.case.groups):
        forms["query packed"] = _query_packed
    return forms


def gathered(inputs: Inputs, form: Form) -> Attention:
    """gather_cache and SDPA, once per group of like sequences: no padding is computed."""
    parts = _parts(inputs)

    def attend(number: int) -> Tensor:
        key_cache, value_cache = inputs.layer(number)
        outs = []
        for group, query, table, seq_lens in parts:
            key, value = ops.gather_cache(key_cache, value_cache, table, seq_lens, group.context)
            outs.append(_tokens_first(form(query, key.transpose(1, 2), value.transpose(1, 2), group)))
        return torch.cat(outs)

    return attend


Contiguous = list[list[tuple[Tensor, Tensor]]]


def contiguous_layers(inputs: Inputs) -> Contiguous:
    """Per layer and group the keys and values, as a DynamicCache holds them."""
    parts = _parts(inputs)
    layers = []
    for key_cache, value_cache in inputs.caches:
        gathered = [
            ops.gather_cache(key_cache, value_cache, table, seq_lens, group.context)
            for group, _, table, seq_lens in parts
        ]
        layers.append([(_heads_first(key), _heads_first(value)) for key, value in gathered])
    return layers


def contiguous(inputs: Inputs, layers: Contiguous, form: Form) -> Attention:
    """A form of attention on keys and values that were gathered before the clock starts."""
    parts = _parts(inputs)

    def attend(number: int) -> Tensor:
        layer = layers[number % len(layers)]
        outs = [
            _tokens_first(form(query, key, value, group))
            for (group, query, _, _), (key, value) in zip(parts, layer, strict=True)
        ]
        return torch.cat(outs)

    return attend


def _heads_first(gathered: Tensor) -> Tensor:
    return gathered.transpose(1, 2).contiguous()


def _parts(inputs: Inputs) -> list[tuple[Group, Tensor, Tensor, Tensor]]:
    """Per group its query `[count, num_heads, query_len, head_dim]`, its rows of the table and its lengths."""
    parts, sequence, token = [], 0, 0
    for group in inputs.case.groups:
        tokens = inputs.query[token : token + group.count * group.query_len]
        rows = slice(sequence, sequence + group.count)
        query = tokens.reshape(group.count, group.query_len, *tokens.shape[1:]).transpose(1, 2)
        parts.append((group, query, inputs.block_table[rows], inputs.seq_lens[rows]))
        sequence, token = sequence + group.count, token + len(tokens)
    return parts


def _tokens_first(out: Tensor) -> Tensor:
    return out.transpose(1, 2).flatten(0, 1)


@cache
def _mask(group: Group) -> dict[str, Any]:
    if group.query_len == 1:
        return {}
    if group.query_len == group.context:
        return {"is_causal": True}
    ones = torch.ones(group.query_len, group.context, dtype=torch.bool)
    return {"attn_mask": ones.tril(group.context - group.query_len)}


def _enable_gqa(query: Tensor, key: Tensor, value: Tensor, group: Group) -> Tensor:
    return scaled_dot_product_attention(query, key, value, enable_gqa=True, **_mask(group))


def _heads_repeated(query: Tensor, key: Tensor, value: Tensor, group: Group) -> Tensor:
    times = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(times, dim=1) for x in (key, value))
    return scaled_dot_product_attention(query, key, value, **_mask(group))


def _query_packed(query: Tensor, key: Tensor, value: Tensor, group: Group) -> Tensor:
    if group.query_len > 1:
        return _enable_gqa(query, key, value, group)
    packed = query.reshape(group.count, key.shape[1], -1, query.shape[3])
    return scaled_dot_product_attention(packed, key, value).view(query.shape)
