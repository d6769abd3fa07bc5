"""A decode step, one new column for every row, as a packed pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from torch_paged.hf.cache import PagedCache
from torch_paged.hf.call import Call
from torch_paged.hf.packed import Forward


def run_decode_step(forward: Forward, cache: PagedCache, call: Call, inputs: dict[str, Any]) -> Any:
    """The call over `inputs`, with stock's shapes of outputs: logits of rows that have left are zeros.

    `run_unpadded` does the same for any width; this is what is left of it where nothing can be shared or chunked.

    Args:
        call: of one column, native, not announced yet; `packing` has no objection to it.
        inputs: the model's arguments by name, `input_ids` among them.

    Raises: what `packed_call` raises. The cache is what it was before.
    """
    rows = call.num_seqs
    index = None if call.valid is None else torch.from_numpy(np.flatnonzero(call.num_tokens))
    taken = dict(inputs)
    for name in ("input_ids", "position_ids"):
        if (value := inputs.get(name)) is not None:
            # Positions may stand there once for all rows.
            tokens = value.expand(rows, 1).flatten()
            taken[name] = (tokens.clone() if index is None else tokens[index.to(tokens.device)])[None]
    num_tokens = taken["input_ids"].shape[1]
    step = Call(rows, 1, call.valid, native=True, packed=call.num_tokens)
    outputs = forward.packed(cache, step, taken, torch.arange(num_tokens, device=taken["input_ids"].device))
    logits = outputs["logits"][0]
    if index is not None:
        logits = logits.new_zeros(rows, logits.shape[1]).index_copy_(0, index.to(logits.device), logits)
    outputs["logits"] = logits[:, None]
    return outputs
