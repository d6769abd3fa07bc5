"""What sub-batches gave, as the output of the whole batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._pytree import tree_map


def sequences_of(result: Any) -> Tensor:
    """int64 `[sequences, columns]`, of what a decoding loop returned."""
    sequences: Tensor = result if isinstance(result, Tensor) else result.sequences
    return sequences


def joined(results: Sequence[Any], num_rows: Sequence[int], fill: int) -> Any:
    """The results of sub-batches, in their order, as one.

    Args:
        results: what the decoding loop of stock returned for each: sequences, or all that belongs to them.
        num_rows: of each, beams of a prompt counted one by one.
        fill: behind the end of a sequence.

    Returns: of the same type. Steps that a sub-batch did not make any more are zeros. A cache that holds all rows is
        what did not fit: there is none.
    """
    if len(results) == 1:
        return results[0]
    sequences = _columns([sequences_of(result) for result in results], fill)
    if isinstance(results[0], Tensor):
        return sequences
    fields: dict[str, Any] = {}
    for name in results[0]:
        values = [result[name] for result in results]
        if name == "sequences":
            fields[name] = sequences
        elif name == "beam_indices":
            first = [sum(num_rows[:place]) for place in range(len(num_rows))]
            moved = [torch.where(each < 0, each, each + row) for each, row in zip(values, first, strict=True)]
            fields[name] = _columns(moved, -1)
        elif name != "past_key_values":
            fields[name] = _rows(values, num_rows)
    return type(results[0])(**fields)


def _columns(parts: Sequence[Tensor], fill: int) -> Tensor:
    width = max(part.shape[1] for part in parts)
    return torch.cat([pad(part, (0, width - part.shape[1]), value=fill) for part in parts])


def _rows(parts: Sequence[Any], num_rows: Sequence[int]) -> Any:
    """Tensors one below the other, in tuples over steps or layers, or both."""
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts))
    if not isinstance(parts[0], tuple):
        return parts[0]
    longest = max(parts, key=len)
    steps = []
    for step, like in enumerate(longest):
        of_step = [
            part[step] if step < len(part) else _zeros(like, rows) for part, rows in zip(parts, num_rows, strict=True)
        ]
        steps.append(_rows(of_step, num_rows))
    return tuple(steps)


def _zeros(like: Any, rows: int) -> Any:
    return tree_map(lambda each: each.new_zeros(rows, *each.shape[1:]) if isinstance(each, Tensor) else each, like)
