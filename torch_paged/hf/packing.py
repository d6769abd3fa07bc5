"""Which calls over `[rows, columns]` can run as packed calls."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from torch_paged.hf.cache import PagedCache
from torch_paged.hf.family import family
from torch_paged.hf.packed import Forward

# What a call may bring along and still be packed. Anything else that is not None may have a meaning per row or column.
_ALLOWED = {
    "input_ids", "inputs_embeds", "position_ids", "attention_mask", "past_key_values", "use_cache", "logits_to_keep",
    "return_dict", "output_hidden_states",
}  # fmt: skip
# Rotary frequencies that follow from the longest sequence of a call: packing and chunking change which that is.
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}


def pack_problem(forward: Forward, cache: PagedCache) -> str | None:
    """Why tokens of different rows of `cache` cannot stand in one row of the inputs of this native model, or None."""
    model = forward.model
    if "position_ids" not in forward.parameters and not family(model.config.model_type).packed_without_positions:
        return "the model computes its positions from columns"
    if not cache.all_paged:
        return "layers of another kind than keys and values read along the row"
    if model._forward_hooks or model._forward_pre_hooks:
        return "hooks of the model see its inputs and outputs"
    if _LENGTH_DEPENDENT_ROPE & set(_rope_types(model.config.to_dict())):
        return "its rotary frequencies depend on the longest row of a call"
    return None


def call_problem(forward: Forward, inputs: dict[str, Any]) -> str | None:
    """Why the call over these model inputs cannot be packed, if the model can, or None."""
    config = forward.model.config
    if torch.is_grad_enabled() or forward.model.training:
        return "a graph is recorded, or dropout draws for every column"
    if unknown := [name for name, value in inputs.items() if name not in _ALLOWED and not _is_unset(value)]:
        return f"{', '.join(unknown)} may belong to rows or columns"
    if getattr(config, "output_router_logits", False) or not (inputs.get("return_dict", True) and config.return_dict):
        return "outputs other than logits and hidden states by name"
    if not isinstance(inputs.get("logits_to_keep", 0), int):
        return "logits of chosen columns"
    positions = inputs.get("position_ids")
    if "position_ids" in forward.parameters and (not isinstance(positions, Tensor) or positions.ndim != 2):
        return "the model computes its positions from columns"
    return None


def _is_unset(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, dict) and all(map(_is_unset, value.values())))


def _rope_types(config: Any) -> Iterator[str]:
    """The types of rotary embeddings that a config names, also in its parts."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _rope_types(value)
        elif name in ("rope_type", "type") and isinstance(value, str):
            yield value
