"""Inputs of a decoding loop that belong to rows of the batch, and what some of the rows get of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.utils import ModelOutput

# A first dimension of rows, unless it is one for all; of other tensors, as images, it may be something else.
_OF_ROWS = {
    "attention_mask", "decoder_attention_mask", "encoder_attention_mask", "encoder_outputs", "inputs_embeds",
    "mm_token_type_ids", "position_ids", "token_type_ids",
}  # fmt: skip
_CACHES = {"past_key_values"}


def unknown_inputs(kwargs: dict[str, Any]) -> list[str]:
    """The names of those that may belong to rows in a way that nobody knows here."""
    plain = (bool, int, float, str)
    known = _OF_ROWS | _CACHES
    return sorted(n for n, v in kwargs.items() if n not in known and not is_unset(v) and not isinstance(v, plain))


def is_unset(value: Any) -> bool:
    """Whether an input says nothing, as what stock hands over of images where there are none."""
    return value is None or value is False or (isinstance(value, dict) and all(map(is_unset, value.values())))


def inputs_of(kwargs: dict[str, Any], rows: Sequence[int], num_rows: int) -> dict[str, Any]:
    """What these rows get of the inputs of `num_rows`."""
    chosen = list(rows)
    given = {name: _of(value, chosen, num_rows) if name in _OF_ROWS else value for name, value in kwargs.items()}
    positions = kwargs.get("position_ids")
    if isinstance(positions, Tensor) and positions.ndim == 3:
        # Multimodal rotary positions, [kinds, rows, columns].
        given["position_ids"] = positions[:, chosen] if positions.shape[1] == num_rows else positions
    return given


def _of(value: Any, rows: list[int], num_rows: int) -> Any:
    if isinstance(value, Tensor):
        return value[rows] if value.ndim and value.shape[0] == num_rows else value
    if isinstance(value, ModelOutput):
        names = [field.name for field in dataclasses.fields(value)]
        return type(value)(**{name: _of(value[name], rows, num_rows) for name in names if name in value})
    if isinstance(value, tuple):
        return tuple(_of(each, rows, num_rows) for each in value)
    return value
