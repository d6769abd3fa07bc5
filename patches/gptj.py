"""GPT-J: plain causal attention in a method of its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.gptj.modeling_gptj import GPTJ_ATTENTION_CLASSES

from torch_paged.hf.attention import attend
from torch_paged.hf.call import in_native_call
from torch_paged.hf.family import Family
from torch_paged.hf.implementation import register_in


def _native_class(base: type[Any]) -> type[Any]:
    class Native(base):  # type: ignore[misc]
        def _attn(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None) -> Any:
            if not in_native_call():
                return base._attn(self, query, key, value, attention_mask)
            out = attend(self, query, key, scaling=1 / self.scale_attn)
            return out.transpose(1, 2), None

    return Native


FAMILY = Family(attention="GPTJAttention", native_class=_native_class)
register_in(GPTJ_ATTENTION_CLASSES)
