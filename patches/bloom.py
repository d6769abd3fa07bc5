"""Bloom: ALiBi inside its own attention code. Positions count tokens, not columns, as ours do."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from torch_paged.hf.attention import attend
from torch_paged.hf.call import in_native_call
from torch_paged.hf.family import Family


def _native_class(base: type[Any]) -> type[Any]:
    class Native(base):  # type: ignore[misc]
        def forward(
            self,
            hidden_states: Tensor,
            residual: Tensor,
            alibi: Tensor,
            attention_mask: Tensor | None,
            layer_past: Any = None,
            **kwargs: Any,
        ) -> Any:
            if not in_native_call():
                return base.forward(self, hidden_states, residual, alibi, attention_mask, layer_past, **kwargs)
            query, key, value = self._reshape(self.query_key_value(hidden_states))
            if layer_past is not None:
                key, value = layer_past.update(key, value, self.layer_idx)
            # Dynamo looks into no cache, and warns of it.
            slopes_of = _alibi_slopes if torch.compiler.is_compiling() else _kept_alibi_slopes
            slopes = slopes_of(self.num_heads, hidden_states.device)
            out = attend(self, query, key, scaling=self.inv_norm_factor, alibi_slopes=slopes)
            out = dropout(self.dense(out.flatten(2)), p=self.hidden_dropout, training=self.training)
            return residual + out, None

    return Native


def _alibi_slopes(num_heads: int, device: torch.device) -> Tensor:
    """float32 `[num_heads]`: the bias of the second of two tokens."""
    alibi: Tensor = build_alibi_tensor(torch.ones(1, 2, device=device), num_heads, torch.float32)
    return alibi[:, 0, 1].contiguous()


_kept_alibi_slopes = functools.cache(_alibi_slopes)


def _not_native(config: Any) -> str:
    if config.pretraining_tp > 1 and config.slow_but_exact:
        return "slow_but_exact sums the output projection in slices"
    return ""


FAMILY = Family(
    attention="BloomAttention", native_class=_native_class, not_native=_not_native, packed_without_positions=True
)
