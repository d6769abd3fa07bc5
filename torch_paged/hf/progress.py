"""Progress: how far stock's decoding loop came, for whoever goes on from there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList


class Progress(StoppingCriteriaList):  # type: ignore[misc]
    """Stopping criteria that remember how far decoding came.

    Attributes:
        ids: int64 `[rows, columns]`, all tokens so far.
        done: bool `[rows]`, which rows have ended.
    """

    def __init__(self, criteria: StoppingCriteriaList, input_ids: Tensor) -> None:
        super().__init__(criteria)
        self.ids = input_ids
        self.done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        done: Tensor = super().__call__(input_ids, scores, **kwargs)
        self.ids, self.done = input_ids, self.done | done
        return done
