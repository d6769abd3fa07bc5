"""Which calls over `[rows, columns]` can run as packed calls."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from torch_paged.hf.cache import PagedCache
from torch_paged.hf.call import Call
from torch_paged.hf.family import family
from torch_paged.hf.packed import Forward
from torch_paged.hf.row_hooks import ROW_HOOKS, has_row_hooks
from torch_paged.hf.row_inputs import is_unset

# What a call may bring along and still be packed. Anything else that is not None may have a meaning per row or column.
_ALLOWED = {
    "input_ids", "inputs_embeds", "position_ids", "attention_mask", "past_key_values", "use_cache", "logits_to_keep",
    "return_dict", "output_hidden_states",
}  # fmt: skip
# Rotary frequencies that follow from the longest sequence of a call: packing and chunking change which that is.
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}
# Their embeddings count positions from the padding token's id on, `generate` from zero.
_OWN_POSITIONS = {
    "camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"
}  # fmt: skip


def pack_problem(forward: Forward, cache: PagedCache) -> str | None:
    """Why tokens of different rows of `cache` cannot stand in one row of the inputs of this native model, or None."""
    # Hooks are numbered: without a new one the answer stays, which a large model would be searched for in every step.
    asked = id(forward.model), RemovableHandle.next_id
    if cache.state.packs == asked:
        return None
    problem = _pack_problem(forward, cache)
    cache.state.packs = asked if problem is None else None
    return problem


def rope_problem(model: PreTrainedModel, num_columns: int | None = None) -> str | None:
    """Why rows cannot be computed beside others than the caller gave, or None.

    Args:
        num_columns: that the rows have at most, up to which frequencies may be the same for all lengths.
    """
    config = model.config.to_dict()
    if not _LENGTH_DEPENDENT_ROPE & set(_rope_types(config)):
        return None
    if num_columns is not None and num_columns <= min(_original_lengths(config), default=0):
        return None
    return "its rotary frequencies depend on the longest row of a call"


def _pack_problem(forward: Forward, cache: PagedCache) -> str | None:
    model = forward.model
    if "position_ids" not in forward.parameters and not family(model.config.model_type).packed_without_positions:
        return "the model computes its positions from columns"
    if not cache.all_paged:
        return "layers of another kind than keys and values read along the row"
    return ROW_HOOKS if has_row_hooks(model) else rope_problem(model)


def with_positions(forward: Forward, cache: PagedCache, call: Call, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs with the positions that the model would count itself, where these are its columns, as of a loop that
    decodes without `generate`."""
    tokens = inputs.get("input_ids")
    if (
        inputs.get("position_ids") is not None
        or "position_ids" not in forward.parameters
        or forward.model.config.model_type in _OWN_POSITIONS
        or call.valid is not None
        or not cache.state.columns.all_stored
        or not isinstance(tokens, Tensor)
    ):
        return inputs
    first = cache.state.columns.count
    return inputs | {"position_ids": torch.arange(first, first + call.width, device=tokens.device)[None]}


def call_problem(forward: Forward, inputs: dict[str, Any]) -> str | None:
    """Why the call over these model inputs cannot be packed, if the model can, or None."""
    config = forward.model.config
    if torch.is_grad_enabled() or forward.model.training:
        return "a graph is recorded, or dropout draws for every column"
    if unknown := [name for name, value in inputs.items() if name not in _ALLOWED and not is_unset(value)]:
        return f"{', '.join(unknown)} may belong to rows or columns"
    if getattr(config, "output_router_logits", False) or not (inputs.get("return_dict", True) and config.return_dict):
        return "outputs other than logits and hidden states by name"
    if not isinstance(inputs.get("logits_to_keep", 0), int):
        return "logits of chosen columns"
    positions = inputs.get("position_ids")
    if "position_ids" in forward.parameters and (not isinstance(positions, Tensor) or positions.ndim != 2):
        return "the model computes its positions from columns"
    return None


def _rope_types(config: Any) -> Iterator[str]:
    """The types of rotary embeddings that a config names, also in its parts."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _rope_types(value)
        elif name in ("rope_type", "type") and isinstance(value, str):
            yield value


def _original_lengths(config: Any) -> Iterator[int]:
    """How many positions a config says that the model was trained for, also in its parts."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _original_lengths(value)
        elif name in ("max_position_embeddings", "original_max_position_embeddings") and isinstance(value, int):
            yield value
