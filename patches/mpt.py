"""MPT: ALiBi inside its own attention code. Distances count columns, pads included."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torch_paged.hf.attention import attend, has_holes
from torch_paged.hf.call import ThisCallNeedsOwnAttention, in_native_call
from torch_paged.hf.family import Family


def _native_class(base: type[Any]) -> type[Any]:
    class Native(base):  # type: ignore[misc]
        def forward(
            self,
            hidden_states: Tensor,
            position_bias: Tensor,
            past_key_values: Any = None,
            attention_mask: Tensor | None = None,
            **kwargs: Any,
        ) -> Any:
            if not in_native_call():
                return base.forward(self, hidden_states, position_bias, past_key_values, attention_mask, **kwargs)
            states = self.Wqkv(hidden_states)
            if self.clip_qkv:
                states = states.clamp(min=-self.clip_qkv, max=self.clip_qkv)
            query, key, value = (
                part.unflatten(-1, (self.n_heads, self.head_dim)).transpose(1, 2) for part in states.chunk(3, dim=2)
            )
            key, value = past_key_values.update(key, value, self.layer_idx)
            if has_holes(key):
                raise ThisCallNeedsOwnAttention("attention_mask has holes, and MPT's ALiBi counts their columns")
            out = attend(self, query, key, scaling=self.softmax_scale, alibi_slopes=_slopes(position_bias))
            return self.out_proj(out.flatten(2)), None

    return Native


def _slopes(position_bias: Tensor) -> Tensor:
    """float32 `[heads]`, from the bias `[heads, 1, max_seq_len]` of keys before the last one."""
    return -position_bias[:, 0, -2].float()


FAMILY = Family(attention="MptAttention", native_class=_native_class, converts_mask=True, packed_without_positions=True)
