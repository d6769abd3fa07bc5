"""A call over `[rows, columns]` as a packed call: the model sees tokens, and no padding."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from torch_paged.hf.cache import PagedCache
from torch_paged.hf.call import Call
from torch_paged.hf.packed import Forward


def run_unpadded(
    forward: Forward, cache: PagedCache, call: Call, inputs: dict[str, Any], cached: np.ndarray | None = None
) -> Any:
    """The call over `inputs`, with stock's shapes of outputs: logits and hidden states at pads are zeros.

    Args:
        call: of all rows and columns, native, not announced yet; `packing` has no objection to it.
        inputs: the model's arguments by name.
        cached: int64 `[rows]`, how many of the first tokens of each row the cache holds already; zeros stand in their
            place in the outputs too. None = none.

    Raises: what `packed_call` raises.
    """
    tokens = inputs.get("input_ids")
    tokens = inputs["inputs_embeds"] if tokens is None else tokens
    rows, width, device = call.num_seqs, call.width, tokens.device
    valid = np.ones((rows, width), dtype=np.bool_) if call.valid is None else call.valid
    num_tokens = call.num_tokens
    if cached is not None:
        valid = valid & (valid.cumsum(axis=1) > cached[:, None])
        num_tokens = num_tokens - cached
    where = np.flatnonzero(valid)
    kept, kept_width = _kept(where, width, inputs.get("logits_to_keep", 0))
    index = torch.from_numpy(where).to(device)
    packed = dict(inputs)
    for name in ("input_ids", "inputs_embeds", "position_ids"):
        value = inputs.get(name)
        if value is not None:
            packed[name] = value.expand(rows, width, *value.shape[2:]).flatten(0, 1)[index][None]
    pass_ = Call(rows, width, call.valid, native=True, packed=num_tokens)
    outputs = forward.packed(cache, pass_, packed, torch.from_numpy(kept).to(device))
    for name, value in outputs.items():
        if name == "logits":
            row, column = np.divmod(where[kept], width)
            target = torch.from_numpy(row * kept_width + column - (width - kept_width)).to(device)
            outputs[name] = _spread(value, target, rows, kept_width)
        elif isinstance(value, Tensor):
            outputs[name] = _spread(value, index, rows, width)
        elif isinstance(value, tuple) and value and all(isinstance(part, Tensor) for part in value):
            outputs[name] = tuple(_spread(part, index, rows, width) for part in value)
    return outputs


def _kept(where: np.ndarray, width: int, logits_to_keep: int) -> tuple[np.ndarray, int]:
    """Which of the tokens at `where` have their logits asked for, and of how many columns at the end."""
    columns = logits_to_keep or width
    return np.flatnonzero(where % width >= width - columns), columns


def _spread(packed: Tensor, index: Tensor, rows: int, width: int) -> Tensor:
    """`[1, tokens, ...]` at the places `index` of `[rows, width, ...]`, zeros elsewhere."""
    spread = packed.new_zeros(rows * width, *packed.shape[2:])
    return spread.index_copy_(0, index, packed[0]).view(rows, width, *packed.shape[2:])
