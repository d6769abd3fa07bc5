"""The attention function "torch_paged": reads the pool in place, or hands over to the model's own attention."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from torch_paged.hf.call import NeedsOwnAttention, in_native_call
from torch_paged.hf.group import Step
from torch_paged.hf.implementation import NAME, previous
from torch_paged.hf.layer import PagedLayer, token_rows
from torch_paged.hf.no_gradient import without_gradient
from torch_paged.hf.paged_kv import PagedKV, materialize
from torch_paged.hf.step_cache import step_layer


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface over a paged cache.

    Args:
        query: `[batch, heads, width, head_dim]`.
        key, value: what `PagedLayer.update` returned; plain tensors where the call has no PagedCache.
        **kwargs: `sliding_window`, `softcap` and `s_aux` (sinks) count in a native call; all go to the model's own.

    Returns: `[batch, width, heads, v_head_dim]`, and the attention weights where the model's own attention gives them.

    Raises:
        NeedsOwnAttention: in a native call, for what only the model's own attention and mask can do.
    """
    if not isinstance(key, PagedKV) or (step := _native_step(key)) is None:
        return _delegated(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    layer = key.pair.layer
    rows = attend_rows(module, token_rows(query), layer, step, attention_mask, scaling, dropout, **kwargs)
    return _as_columns(rows, query), None


def attend_rows(
    module: nn.Module,
    rows: Tensor,
    layer: PagedLayer,
    step: Step,
    attention_mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    /,
    **kwargs: Any,
) -> Tensor:
    """`paged_attention` in a native call, of queries as rows over what `layer` has stored in the pass of `step`.

    Args:
        rows: `[batch * width, heads, head_dim]`.

    Returns: `[batch * width, heads, v_head_dim]`.
    """
    _require_plain_causal(module, attention_mask, dropout, kwargs)
    window = layer.sliding_window or kwargs.get("sliding_window") or 0
    assert layer.call is not None
    if window not in (layer.call.windows or _CAUSAL):
        raise NeedsOwnAttention(f"{type(module).__name__} has a window of {window or 'all'} tokens, its mask another")
    return _attend(module, rows, layer, step, scaling, window, kwargs.get("softcap"), kwargs.get("s_aux"))


def _delegated(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention of a compiled pass, or the one that the model had before the patch."""
    if (layer := step_layer(key, value)) is not None:
        _require_plain_causal(module, attention_mask, kwargs.get("dropout", 0.0), kwargs)
        window = layer.sliding_window or kwargs.get("sliding_window") or 0
        softcap, sinks, scaling = kwargs.get("softcap"), kwargs.get("s_aux"), kwargs.get("scaling")
        return layer.attend(query, scaling=scaling, sliding_window=window, softcap=softcap, sinks=sinks), None
    if in_native_call() and attention_mask is None and _is_causal(module, kwargs):
        raise NeedsOwnAttention(f"{type(module).__name__} attends to other keys and values than the cache's")
    output: tuple[Tensor, Tensor | None] = _own_attention(module)(
        module, query, materialize(key), materialize(value), attention_mask, **kwargs
    )
    return output


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    *,
    scaling: float | None,
    sliding_window: int = 0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Attention over the blocks that `key` stands for, in a native call; the modules in patches/ come here directly.

    Args:
        module: the attention module, for messages.
        query: `[batch, heads, width, head_dim]`.
        key: the K that `PagedLayer.update` returned.
        scaling, softcap, sinks, alibi_slopes: as for `torch_paged.ops.attention`.
        sliding_window: of the module; 0 = off.

    Returns: `[batch, width, heads, v_head_dim]`.

    Raises:
        NeedsOwnAttention: `key` was not stored in this call, or its cache slides where the model's mask does not.
    """
    if (compiled := step_layer(key, key)) is not None:
        window = compiled.sliding_window or sliding_window
        return compiled.attend(
            query, scaling=scaling, sliding_window=window, softcap=softcap, sinks=sinks, alibi_slopes=alibi_slopes
        )
    if not isinstance(key, PagedKV) or (step := _native_step(key)) is None:
        raise NeedsOwnAttention(f"{type(module).__name__} attends to other keys and values than the cache's")
    rows = token_rows(query)
    out = _attend(module, rows, key.pair.layer, step, scaling, sliding_window, softcap, sinks, alibi_slopes)
    return _as_columns(out, query)


def has_holes(key: Tensor) -> bool:
    """Whether distances in columns and in tokens differ among what `key` stands for, as `PagedLayer.update` gave it."""
    if (compiled := step_layer(key, key)) is not None:
        return compiled.shared.holes
    return isinstance(key, PagedKV) and key.pair.layer.state.columns.holes


def _attend(
    module: nn.Module,
    queries: Tensor,
    layer: PagedLayer,
    step: Step,
    scaling: float | None,
    sliding_window: int,
    softcap: float | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    call = layer.call
    assert call is not None
    if layer.sliding_window and layer.sliding_window not in call.windows:
        raise NeedsOwnAttention(f"the cache of {type(module).__name__} has a window, which its mask does not have")
    rows = queries if queries.dtype == layer.dtype else queries.to(layer.dtype)
    if step.query_rows is not None:
        rows = rows[step.query_rows]

    def attention() -> Tensor:
        out: Tensor = _attention(
            rows,
            layer.key_cache,
            layer.value_cache,
            step.block_table,
            step.seq_lens,
            step.cu_seqlens_q,
            step.max_query_len,
            scale=scaling,
            sliding_window=sliding_window,
            softcap=softcap or 0.0,
            alibi_slopes=alibi_slopes,
            sinks=None if sinks is None else sinks.float(),
            deterministic=call.deterministic,
        )
        return out

    out = without_gradient(rows, attention)
    if step.query_rows is not None:
        out = out.new_zeros(len(queries), *out.shape[1:]).index_copy(0, step.query_rows, out)
    return out


def _as_columns(rows: Tensor, query: Tensor) -> Tensor:
    """`[batch * width, heads, v_head_dim]` as `[batch, width, heads, v_head_dim]`."""
    batch, _, width, _ = query.shape
    return rows.unsqueeze(1) if width == 1 else rows.view(batch, width, *rows.shape[1:])


def _native_step(key: PagedKV) -> Step | None:
    """The plan to read the blocks by, in a native call over a PagedCache."""
    layer = key.pair.layer
    return layer.step if layer.call is not None and layer.call.native else None


def _is_causal(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    is_causal = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)


def _require_plain_causal(
    module: nn.Module, attention_mask: Tensor | None, dropout: float, kwargs: dict[str, Any]
) -> None:
    """What was not foreseen must not run on without a mask."""
    if attention_mask is not None:
        raise NeedsOwnAttention(f"{type(module).__name__} has a mask that is neither causal nor a sliding window")
    if dropout != 0.0 or kwargs.get("position_bias") is not None or not _is_causal(module, kwargs):
        raise NeedsOwnAttention(f"{type(module).__name__} asks for dropout, a position bias or bidirectional attention")


def _own_attention(module: nn.Module) -> Any:
    """The attention function that the model had before the patch."""
    # Models keep their eager attention beside the module and pass it to the interface as the default.
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(previous(module.config), eager)


# Of a call whose model asked for no mask.
_CAUSAL = frozenset({0})
# Without the choice of an overload: 2 microseconds in every layer and step.
_attention = torch.ops.paged.attention.default

AttentionInterface.register(NAME, paged_attention)
