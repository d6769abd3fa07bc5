"""Decode steps filled up to few sizes on a GPU: a CUDA graph is one for each combination of sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from torch_paged.hf.group import Step


def fills_up(device: torch.device) -> bool:
    """Whether decode steps there are to have few sizes."""
    return device.type == "cuda"


def bucket(num_rows: int) -> int:
    """Rows to run `num_rows` with: 1, 2, 4 or a multiple of 8."""
    return 1 << (num_rows - 1).bit_length() if num_rows < 8 else -(-num_rows // 8) * 8


def filled_step(step: Step) -> Step:
    """A decode step with rows that have no token and store none, and a table as wide as a power of two."""
    rows, width = step.block_table.shape
    more, columns = bucket(rows) - rows, 1 << (width - 1).bit_length()
    return Step(
        block_table=pad(step.block_table, (0, columns - width, 0, more), value=-1),
        seq_lens=pad(step.seq_lens, (0, more)),
        cu_seqlens_q=torch.arange(rows + more + 1, dtype=torch.int32, device=step.cu_seqlens_q.device),
        slot_mapping=pad(step.slot_mapping, (0, more), value=-1),
        query_rows=None,
        max_query_len=1,
    )


def filled_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """The model's inputs `[1, rows]` with as many more tokens, whose outputs mean nothing."""
    return {name: _filled(value) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def _filled(tokens: Tensor) -> Tensor:
    rows = tokens.shape[1]
    return pad(tokens, (0, bucket(rows) - rows))
