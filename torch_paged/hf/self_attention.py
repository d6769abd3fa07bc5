"""Attention of a patched model: on a CPU, native passes project, rotate, store and attend by four ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from torch_paged.hf.attention import attend_rows, paged_attention
from torch_paged.hf.cache import PagedCache
from torch_paged.hf.call import current
from torch_paged.hf.disguise import disguise
from torch_paged.hf.fast_class import attempt, is_watched, kept_with, own_forward
from torch_paged.hf.implementation import NAME
from torch_paged.hf.known_attention import Known, known, rotation
from torch_paged.hf.layer import PagedLayer
from torch_paged.hf.linear import is_fast, is_faster
from torch_paged.hf.rms_norm import is_fast as is_fast_norm

_qkv_linear = torch.ops.paged.qkv_linear.default


def fast_class(stock: Any) -> Any:
    """Return the subclass of `stock` that knows our ops, None if it computes something else than is known."""
    how = known(own_forward(stock))
    return kept_with(stock, lambda cls: _fast_attention(cls, how)) if how is not None else None


def _fast_attention(stock: Any, how: Known) -> Any:
    method = stock.forward
    functions = rotation(method)

    class Attention(stock):  # type: ignore[misc]
        is_fast_layer = True

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            may = current.fast_layers and not args and not torch.compiler.is_compiling()
            # Somebody may have replaced the method or its functions meanwhile.
            if may and stock.forward is method and rotation(method) == functions:
                out = _attention(self, how, **kwargs)
                if out is not None:
                    return self.o_proj(out), None
            return stock.forward(self, *args, **kwargs)

    disguise(Attention, stock)
    return Attention


def _attention(
    module: Any,
    how: Known,
    /,
    hidden_states: Any = None,
    position_embeddings: Any = None,
    attention_mask: Any = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """Return what goes into `o_proj`, `[batch, width, heads * head_dim]`; None where PyTorch is to run the module."""
    layer = _layer(module, past_key_values)
    if layer is None or not _is_faster(module, how, hidden_states):
        return None
    batch, width, _ = hidden_states.shape
    angles = _angles(position_embeddings, hidden_states, module.head_dim)
    if angles is None:
        return None
    query, key, value = module.q_proj, module.k_proj, module.v_proj
    rows = hidden_states.view(batch * width, -1)
    weights = (query.weight, key.weight, value.weight, query.bias, key.bias, value.bias)
    projected = attempt(_qkv_linear, rows, *weights, module.head_dim)
    if projected is None:
        return None
    queries, keys, values = projected
    if how.norms:
        queries, keys = module.q_norm(queries), module.k_norm(keys)
        if not queries.dtype == keys.dtype == values.dtype:
            return None
    rotated = layer.rotate_and_update(queries, keys, values, *angles, width)
    if rotated is None:
        return None
    assert layer.group is not None and layer.group.step is not None
    dropout = module.attention_dropout if module.training else 0.0
    given = (module, rotated, layer, layer.group.step, attention_mask, module.scaling, dropout)
    if how.window is None:
        out = attend_rows(*given, **kwargs)
    else:
        out = attend_rows(*given, sliding_window=how.window(module), **kwargs)
    return out.view(batch, width, -1)


def _layer(module: Any, cache: Any) -> PagedLayer | None:
    """Return where a native call stores keys and values of this module, if it does, and attends by our function."""
    if type(cache) is not PagedCache or current.call is None or not current.call.native:
        return None
    if cache.state.call is not current.call:
        return None
    if module.config._attn_implementation != NAME or ALL_ATTENTION_FUNCTIONS.get(NAME) is not paged_attention:
        return None
    layers, at = cache.layers, module.layer_idx
    layer = layers[at] if isinstance(at, int) and 0 <= at < len(layers) else None
    # Somebody may have replaced the method that sees keys and values.
    if type(layer) is not PagedLayer or (PagedCache.update, PagedLayer.update) != _UPDATES:
        return None
    return None if "update" in vars(cache) or "update" in vars(layer) else layer


def _is_faster(module: Any, how: Known, hidden_states: Any) -> bool:
    """Whether the ops are faster than what PyTorch would run, and nobody looks at what is between them."""
    inner: list[nn.Module] = [module.q_proj, module.k_proj, module.v_proj]
    norms: list[nn.Module] = [module.q_norm, module.k_norm] if how.norms else []
    return (
        all(is_fast(each) and type(each.weight) is nn.Parameter for each in inner)
        and all(is_fast_norm(each) for each in norms)
        and not any(is_watched(each) for each in (*inner, *norms))
        and not nn_module._global_forward_hooks
        and not nn_module._global_forward_pre_hooks
        and is_faster(inner[0], hidden_states)
        and hidden_states.dim() == 3
        and hidden_states.is_contiguous()
    )


def _angles(embeddings: Any, hidden_states: Tensor, head_dim: int) -> tuple[Tensor, Tensor] | None:
    """Return cos and sin as rows, `[batch * width, head_dim]`, if there are some for each token or column."""
    if type(embeddings) is not tuple or len(embeddings) != 2:
        return None
    batch, width, _ = hidden_states.shape
    rows = []
    for angle in embeddings:
        if type(angle) is not Tensor or angle.dtype is not hidden_states.dtype:
            return None
        if angle.shape == (1, width, head_dim):
            angle = angle.expand(batch, width, head_dim)
        if angle.shape != (batch, width, head_dim):
            return None
        angle = angle.reshape(batch * width, head_dim)
        rows.append(angle if angle.stride(1) == 1 else angle.contiguous())
    return rows[0], rows[1]


_UPDATES = PagedCache.update, PagedLayer.update
