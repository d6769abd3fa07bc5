"""The first call of a cache whose rows may begin with remembered prefixes: only what follows them is computed."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from torch_paged.hf.cache import PagedCache
from torch_paged.hf.call import Call
from torch_paged.hf.packed import Forward
from torch_paged.hf.state import CacheState
from torch_paged.hf.unpadded import run_unpadded


def run_behind_prefixes(
    forward: Forward, cache: PagedCache, call: Call, inputs: dict[str, Any], rows: list[np.ndarray]
) -> Any:
    """`run_unpadded` without the tokens that earlier calls have computed; those that it computes are remembered.

    Args:
        rows: from `prompt_rows`.
    """
    prefixes = cache.state.prefixes
    assert prefixes is not None

    def remember_what_leaves_the_window() -> None:
        if any(key.sliding_window for key in cache.state.groups):
            prefixes.remember(forward.model, cache.state, rows)

    try:
        cached = prefixes.adopt(forward.model, cache.state, rows)
        outputs = run_unpadded(forward, cache, call, inputs, cached, remember_what_leaves_the_window)
    except BaseException:
        cache.reset()
        raise
    prefixes.remember(forward.model, cache.state, rows)
    return outputs


def prompt_rows(state: CacheState, call: Call, inputs: dict[str, Any]) -> list[np.ndarray] | None:
    """The tokens of each row, int64 `[num_tokens]`, if this call is the first of a cache that remembers.

    None too where keys and values depend on more than the tokens before them, or more is asked for than logits at the
    end.

    Args:
        inputs: the model's arguments by name.
    """
    ids, positions = inputs.get("input_ids"), inputs.get("position_ids")
    if (
        state.prefixes is None
        or state.columns.count
        or not isinstance(ids, Tensor)
        or inputs.get("inputs_embeds") is not None
        or inputs.get("output_hidden_states")
    ):
        return None
    shape = (call.num_seqs, call.width)
    valid = np.ones(shape, dtype=np.bool_) if call.valid is None else call.valid
    if isinstance(positions, Tensor):
        given = positions.expand(shape).cpu().numpy()
        if (given != valid.cumsum(axis=1) - 1)[valid].any():
            return None
    tokens = ids.cpu().numpy()
    return [tokens[row, valid[row]] for row in range(call.num_seqs)]


def sequence_rows(state: CacheState, sequences: Tensor) -> list[np.ndarray] | None:
    """The tokens that each row of the cache holds, int64 `[num_tokens]`, where `sequences` are its rows.

    Args:
        sequences: int64 `[rows, columns]`, what `generate` returned.
    """
    if state.num_seqs != len(sequences) or state.columns.count > sequences.shape[1]:
        return None
    tokens = sequences[:, : state.columns.count].cpu().numpy()
    stored = state.columns.stored(state.num_seqs)
    return [tokens[row, stored[row]] for row in range(state.num_seqs)]
