"""Plan: how many tokens of each row the next pass computes."""

from __future__ import annotations

import numpy as np

from torch_paged.hf.many.rows import Rows

Ints = np.ndarray


def plan(rows: Rows, drafts: dict[int, Ints], max_tokens: int, chunk: int | None) -> Ints:
    """Tokens of each row in the next pass, int64 `[rows]`: decode steps, drafts, then prompts, oldest first.

    Args:
        drafts: tokens by row, that may be verified.
        max_tokens: of the pass.
        chunk: prompts are divided where multiples of so many tokens end, whatever else runs; None = anywhere.
    """
    used, pending = rows.used, rows.pending
    num_tokens = np.zeros(len(pending), dtype=np.int64)
    decoding, filling = used[pending[used] == 1], used[pending[used] > 1]
    num_tokens[decoding] = 1
    if drafts:
        lengths = np.array([len(drafts.get(row, ())) for row in decoding.tolist()], dtype=np.int64)
        num_tokens[decoding] += _share_out(max_tokens - len(decoding), lengths)
    left = max_tokens - int(num_tokens.sum())
    if chunk is not None:
        # Attention sums in another order for another number of queries.
        chunks = np.minimum(pending[filling], chunk - rows.computed[filling] % chunk)
        num_tokens[filling] = np.where(chunks.cumsum() <= left, chunks, 0)
        return num_tokens
    num_tokens[filling] = _share_out(left, pending[filling])
    for row in filling.tolist():
        if row in drafts and num_tokens[row] == pending[row]:
            num_tokens[row] += min(len(drafts[row]), max_tokens - int(num_tokens.sum()))
    return num_tokens


def _share_out(tokens: int, wanted: Ints) -> Ints:
    """What each gets of so many tokens, the first ones all they want."""
    shares: Ints = np.clip(tokens - (wanted.cumsum() - wanted), 0, wanted)
    return shares
