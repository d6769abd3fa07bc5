"""Progress: how far stock's decoding loop came, for whoever goes on from there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import MaxTimeCriteria, StoppingCriteriaList

from torch_paged.hf.chosen import Chosen


class Progress(StoppingCriteriaList):  # type: ignore[misc]
    """Stopping criteria that remember how far decoding came.

    Attributes:
        ids: int64 `[rows, columns]`, all tokens so far.
        done: bool `[rows]`, which rows have ended.

    Args:
        chosen: what a loop that begins anew has chosen already.
    """

    def __init__(self, criteria: StoppingCriteriaList, input_ids: Tensor, chosen: Chosen | None = None) -> None:
        super().__init__(criteria)
        self.ids = input_ids
        self.done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        self._chosen = chosen

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        criteria: StoppingCriteriaList = self
        if self._chosen is not None:
            scores = self._chosen.seen(scores)
            if input_ids.shape[1] <= self._chosen.columns:
                # Time was not over when these were chosen.
                criteria = StoppingCriteriaList(each for each in self if not isinstance(each, MaxTimeCriteria))
        done: Tensor = StoppingCriteriaList.__call__(criteria, input_ids, scores, **kwargs)
        self.ids, self.done = input_ids, self.done | done
        return done
