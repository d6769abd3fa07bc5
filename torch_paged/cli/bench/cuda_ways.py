"""The attention of one case on a GPU by others: PyTorch's SDPA back ends, FlexAttention, FlashInfer, flash-attn."""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from torch_paged.cli.bench import attention_ways
from torch_paged.cli.bench.attention_ways import Attention, Form, Inputs
from torch_paged.cli.bench.cases import Group

FLASHINFER_WORKSPACE_BYTES = 128 << 20


def others(inputs: Inputs) -> dict[str, Callable[[], Attention]]:
    """By name, what makes each way; making or calling it raises where this machine does not have it."""
    layers = attention_ways.contiguous_layers(inputs)
    ways: dict[str, Callable[[], Attention]] = {
        name: lambda backend=backend: attention_ways.contiguous(inputs, layers, _sdpa_form(backend))  # type: ignore[misc]
        for name, backend in (("SDPA flash", SDPBackend.FLASH_ATTENTION), ("SDPA cuDNN", SDPBackend.CUDNN_ATTENTION))
    }

    def flex() -> Attention:
        from torch_paged.cli.bench.flex import fresh_form

        return attention_ways.contiguous(inputs, layers, fresh_form())

    ways["FlexAttention"] = flex
    if find_spec("flashinfer"):
        ways["FlashInfer"] = lambda: _flashinfer(inputs)
    if find_spec("flash_attn"):
        ways["flash-attn"] = lambda: attention_ways.contiguous(inputs, layers, _flash_attn)
    return ways


def _sdpa_form(backend: SDPBackend) -> Form:
    def form(query: Tensor, key: Tensor, value: Tensor, group: Group) -> Tensor:
        mask: dict[str, Any] = {}
        if group.query_len == group.context:
            mask = {"is_causal": True}
        elif group.query_len > 1:
            mask = {"attn_mask": causal_lower_right(group.query_len, group.context)}
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(query, key, value, enable_gqa=True, **mask)

    return form


def _flash_attn(query: Tensor, key: Tensor, value: Tensor, group: Group) -> Tensor:
    tokens_first = (x.transpose(1, 2) for x in (query, key, value))
    out: Tensor = import_module("flash_attn").flash_attn_with_kvcache(*tokens_first, causal=True)
    return out.transpose(1, 2)


def _flashinfer(inputs: Inputs) -> Attention:
    """FlashInfer on our blocks: its prefill kernels on tensor cores, which take decode too."""
    case, (key_cache, _) = inputs.case, inputs.caches[0]
    block_size, device = key_cache.shape[1], key_cache.device
    blocks = [-(-context // block_size) for context in case.contexts]
    last = [context - (count - 1) * block_size for context, count in zip(case.contexts, blocks, strict=True)]
    ids = torch.cat([row[:count] for row, count in zip(inputs.block_table, blocks, strict=True)])
    workspace = torch.empty(FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    wrapper = import_module("flashinfer").BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
    wrapper.plan(
        inputs.cu_seqlens_q,
        torch.tensor([0, *accumulate(blocks)], dtype=torch.int32, device=device),
        ids,
        torch.tensor(last, dtype=torch.int32, device=device),
        case.num_heads,
        case.num_kv_heads,
        case.head_dim,
        block_size,
        causal=True,
        q_data_type=inputs.query.dtype,
    )

    def attend(number: int) -> Tensor:
        key, value = (cache.transpose(1, 2) for cache in inputs.layer(number))
        out: Tensor = wrapper.run(inputs.query, (key, value))
        return out

    return attend
