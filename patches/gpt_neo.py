"""GPT-Neo: attention in a method of its own, unscaled, in every other layer over a window of columns."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.gpt_neo.modeling_gpt_neo import GPT_NEO_ATTENTION_CLASSES

from torch_paged.hf.attention import attend, has_holes
from torch_paged.hf.call import ThisCallNeedsOwnAttention, in_native_call
from torch_paged.hf.family import Family
from torch_paged.hf.implementation import register_in


def _native_class(base: type[Any]) -> type[Any]:
    class Native(base):  # type: ignore[misc]
        def _attn(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None) -> Any:
            if not in_native_call():
                return base._attn(self, query, key, value, attention_mask)
            window = self.config.window_size if self.attention_type == "local" else 0
            if window and has_holes(key):
                raise ThisCallNeedsOwnAttention("attention_mask has holes under a local window, which counts them")
            out = attend(self, query, key, scaling=1.0, sliding_window=window)
            return out.transpose(1, 2), None

    return Native


FAMILY = Family(attention="GPTNeoSelfAttention", native_class=_native_class)
register_in(GPT_NEO_ATTENTION_CLASSES)
