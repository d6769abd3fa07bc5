"""Falcon: rotary embeddings, or ALiBi, inside its own attention code."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers.models.falcon.modeling_falcon import (
    FALCON_ATTENTION_CLASSES,
    apply_rotary_pos_emb,
    build_alibi_tensor,
)

from torch_paged.hf.attention import attend
from torch_paged.hf.call import ThisCallNeedsOwnAttention, in_compiled_call, in_native_call
from torch_paged.hf.family import Family
from torch_paged.hf.implementation import register_in

# Stock rounds ALiBi's bias to bfloat16, which holds whole numbers up to this one exactly.
EXACT_ALIBI_TOKENS = 256


def _native_class(base: type[Any]) -> type[Any]:
    class Native(base):  # type: ignore[misc]
        def forward(
            self,
            hidden_states: Tensor,
            alibi: Tensor | None,
            attention_mask: Tensor | None,
            position_ids: Tensor | None = None,
            layer_past: Any = None,
            use_cache: bool = False,
            output_attentions: bool = False,
            position_embeddings: Any = None,
            **kwargs: Any,
        ) -> Any:
            if not in_native_call():
                return base.forward(
                    self, hidden_states, alibi, attention_mask, position_ids, layer_past, use_cache, output_attentions,
                    position_embeddings, **kwargs,
                )  # fmt: skip
            query, key, value = (
                states.transpose(1, 2) for states in self._split_heads(self.query_key_value(hidden_states))
            )
            if alibi is None:
                query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
            if layer_past is not None:
                key, value = layer_past.update(key, value, self.layer_idx)
            slopes = None
            if alibi is not None:
                # A compiled pass does not know how many there are.
                if in_compiled_call() or key.shape[2] > EXACT_ALIBI_TOKENS:
                    raise ThisCallNeedsOwnAttention(f"Falcon rounds its ALiBi bias past {EXACT_ALIBI_TOKENS} tokens")
                # Dynamo looks into no cache, and warns of it.
                slopes_of = _alibi_slopes if torch.compiler.is_compiling() else _kept_alibi_slopes
                slopes = slopes_of(self.num_heads, self.inv_norm_factor, hidden_states.device)
            out = attend(self, query, key, scaling=self.inv_norm_factor, alibi_slopes=slopes)
            return self.dense(out.flatten(2)), None

    return Native


def _alibi_slopes(num_heads: int, scale: float, device: torch.device) -> Tensor:
    """float32 `[num_heads]`: the bias of the second of two tokens, scaled as its scores are."""
    mask = torch.ones(1, 2, dtype=torch.long, device=device)
    alibi: Tensor = build_alibi_tensor(mask, num_heads, torch.float32)
    return alibi[:, 0, 1] * scale


_kept_alibi_slopes = functools.cache(_alibi_slopes)


def _not_native(config: Any) -> str:
    if config.alibi and config.num_attention_heads & (config.num_attention_heads - 1):
        return "ALiBi over a number of heads that is no power of two, which stock rounds to bfloat16"
    return ""


FAMILY = Family(attention="FalconAttention", native_class=_native_class, not_native=_not_native)
register_in(FALCON_ATTENTION_CLASSES)
