"""Chosen: tokens that a decoding loop has chosen already are chosen again, whatever it would draw."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor


class Chosen(LogitsProcessor):  # type: ignore[misc]
    """The last processor of a loop that begins anew.

    A loop that drew other tokens than the first time, because that one ran out of blocks, would draw short sequences
    too often: those are the ones that do not run out.

    Args:
        tokens: int64 `[rows, columns]`, the prompt and what was chosen after it.
        keeps_scores: for `seen`.
    """

    def __init__(self, tokens: Tensor, keeps_scores: bool) -> None:
        self._tokens, self._keeps_scores = tokens, keeps_scores
        # Of the steps whose tokens were chosen already, without that choice: `[rows, vocabulary]` each.
        self._scores: list[Tensor] = []

    @property
    def columns(self) -> int:
        return self._tokens.shape[1]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        column = input_ids.shape[1]
        if column >= self.columns:
            return scores
        if self._keeps_scores:
            self._scores.append(scores)
        # Finished rows got a padding token, which the vocabulary need not have, and get it again.
        tokens = self._tokens[:, column, None].to(scores.device).clamp(0, scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens, 0.0)

    def seen(self, scores: Any) -> Any:
        """Scores of all steps so far, as they would be without a choice; anything else as it is."""
        if not isinstance(scores, tuple):
            return scores
        return tuple(self._scores[: len(scores)]) + scores[len(self._scores) :]
