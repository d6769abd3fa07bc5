"""Waves: a batch that does not fit runs as sub-batches, each to its end."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_paged.hf.cache import PagedCache
from torch_paged.hf.loop import Loop
from torch_paged.hf.progress import Progress
from torch_paged.hf.row_by_row import for_rows
from torch_paged.memory import PoolExhausted


def in_waves(loop: Loop, cache: PagedCache, reached: Progress, mask: Tensor, begun: Tensor) -> Tensor:
    """Decode the rows that go on in sub-batches, half as large whenever one runs out of blocks.

    A sub-batch begins by computing what its rows have so far, and keeps what it has reached when it is divided.

    Args:
        loop: `_sample`.
        reached: how far it came with all rows.
        mask: int64 `[rows, columns]`, 0 for the padding on the left of these columns.
        begun: bool `[rows]`, rows whose prompts are not padding alone; stock counts positions of others from one.

    Raises:
        PoolExhausted: one row alone does not fit.
    """
    ids, done = reached.ids, reached.done
    ended = {row: ids[row] for row in torch.nonzero(done).flatten().tolist()}
    going = torch.nonzero(~done).flatten().tolist()
    half = -(-len(going) // 2)
    waves = [(part, ids[part], mask[part]) for part in (going[:half], going[half:]) if part]
    while waves:
        rows, part, seen = waves.pop(0)
        cache.reset()
        progress = Progress(loop.criteria, part)
        cache.state.divides = len(rows) > 1
        try:
            given = loop.inputs | {"attention_mask": seen}
            if loop.inputs.get("position_ids") is not None:
                counted = seen.cumsum(1) - begun[rows][:, None].to(seen)
                given["position_ids"] = (counted * seen).clamp(min=0)
            result = loop.run(part, for_rows(loop.processors, rows, len(ids)), progress, **given)
        except PoolExhausted:
            if len(rows) == 1:
                raise
            seen = torch.nn.functional.pad(seen, (0, progress.ids.shape[1] - seen.shape[1]), value=1)
            ended |= {row: progress.ids[i] for i, row in enumerate(rows) if progress.done[i]}
            left = [i for i in range(len(rows)) if not progress.done[i]]
            half = -(-len(left) // 2)
            parts = [places for places in (left[:half], left[half:]) if places]
            waves[:0] = [([rows[i] for i in places], progress.ids[places], seen[places]) for places in parts]
        else:
            ended |= dict(zip(rows, result, strict=True))
        finally:
            cache.state.divides = False
    return torch.nn.utils.rnn.pad_sequence(
        [ended[row] for row in range(len(ids))], batch_first=True, padding_value=loop.pad_token
    )
