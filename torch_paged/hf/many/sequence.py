"""Sequence: one request on its way, from when it was taken from the requests until it is done."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from torch_paged.hf.many.prepare import Prepared
from torch_paged.hf.many.request import GenerationRequest
from torch_paged.hf.prefixes import RowPrefixes
from torch_paged.hf.swapped_row import Swapped


@dataclass(eq=False)
class Sequence:
    """A request and what came of it.

    Attributes:
        asked, request_id: as given.
        request: the same with what it takes over from `generate_many`.
        number: of the requests taken before it; the lowest has waited longest.
        tokens: int64, the prompt and what was generated, while it holds no row; else `Rows` has them.
        num_prompt_tokens: of `tokens`.
        taken: when, by `stats.now`.
        deadline: when it times out; None = never.
        error: why it cannot run.
        prepared: once it was first admitted.
        kind: by `select.kind`.
        generator: what it draws from.
        prefixes: what it may begin with, and is remembered for others.
        row: of `Rows`; -1 = none.
        swapped: what its row held when it was preempted, in CPU memory.
        swapped_drafts: likewise the assistant's row.
        last_token: when its last token came, by `stats.now`; nan before the first.
        num_told: new tokens that a stream or a streamer got.
    """

    asked: GenerationRequest
    request: GenerationRequest
    request_id: Hashable
    number: int
    tokens: np.ndarray
    taken: float
    deadline: float | None
    seed: int
    error: Exception | None = None
    prepared: Prepared | None = None
    kind: Hashable = None
    generator: torch.Generator | None = None
    prefixes: RowPrefixes | None = None
    row: int = -1
    swapped: Swapped | None = None
    swapped_drafts: Swapped | None = None
    last_token: float = math.nan
    num_prompt_tokens: int = 0
    num_told: int = 0
    num_preemptions: int = 0
    num_cached_tokens: int = 0
    first_token: float | None = None
    scores: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    def forget_swapped(self) -> None:
        """Drop what is in CPU memory."""
        self.swapped = self.swapped_drafts = None
