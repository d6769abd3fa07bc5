"""Outcome: what the caller gets to see of the sequences, tokens as they come and results."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from torch_paged.hf.many.request import FinishReason, GenerationResult, NewTokens
from torch_paged.hf.many.sequence import Sequence
from torch_paged.hf.many.stats import Counts, now


class Outcome:
    """Makes events of what happens to sequences, and tells their streamers.

    Args:
        device: of the results.
        counts: of the run.

    Attributes:
        events: of the current step.
        streams: whether tokens are events too.
    """

    def __init__(self, device: torch.device, counts: Counts) -> None:
        self.events: list[NewTokens | GenerationResult] = []
        self.streams = False
        self._device = device
        self._counts = counts
        self._num_streamers = 0

    def begin(self, sequence: Sequence) -> None:
        """A sequence is prepared."""
        if sequence.request.streamer is not None:
            self._num_streamers += 1
            sequence.request.streamer.put(torch.from_numpy(sequence.tokens.copy())[None])

    def first_token(self, sequence: Sequence, at: float) -> None:
        """Its first token came, at that time; after a preemption it came before."""
        if sequence.first_token is None:
            sequence.first_token = at - sequence.taken
            self._counts.first_tokens.append(sequence.first_token)

    @property
    def listens(self) -> bool:
        """Whether anybody wants tokens as they come."""
        return self.streams or self._num_streamers > 0

    def tell(self, sequence: Sequence, tokens: list[int]) -> None:
        """New tokens came."""
        sequence.num_told += len(tokens)
        if self.streams:
            self.events.append(NewTokens(sequence.request_id, tokens))
        if sequence.request.streamer is not None:
            sequence.request.streamer.put(torch.tensor(tokens))

    def returned(self, sequence: Sequence, result: Any, interrupted: FinishReason | None) -> None:
        """What `generate` returned for a sequence alone."""
        sequences = result if isinstance(result, Tensor) else result.sequences
        assert sequence.prepared is not None
        sequence.num_prompt_tokens = sequence.prepared.num_prompt_tokens
        new = sequences[:, sequence.num_prompt_tokens :]
        self._counts.new_tokens += new.numel()
        ends = torch.isin(new, torch.from_numpy(sequence.prepared.eos).to(new.device)).any(dim=1).all()
        length = sequences.shape[1] >= sequence.prepared.max_length
        reason = interrupted or ("eos" if ends else "length" if length else "stop")
        scores, logits = (
            None if isinstance(result, Tensor) else getattr(result, n, None) for n in ("scores", "logits")
        )
        self._finish(sequence, sequences, reason, None, scores, logits)

    def end(self, sequence: Sequence, reason: FinishReason, error: Exception | None) -> None:
        """A sequence is done, with the tokens it has."""
        keeps = (False, False) if sequence.prepared is None else sequence.prepared.keeps
        scores, logits = (tuple(kept) if wanted else None for wanted, kept in zip(
            keeps, (sequence.scores, sequence.logits), strict=True
        ))  # fmt: skip
        sequences = torch.from_numpy(sequence.tokens.copy())[None].to(self._device)
        self._finish(sequence, sequences, reason, error, scores, logits)

    def _finish(
        self,
        sequence: Sequence,
        sequences: Tensor,
        reason: FinishReason,
        error: Exception | None,
        scores: tuple[Tensor, ...] | None,
        logits: tuple[Tensor, ...] | None,
    ) -> None:
        if sequence.request.streamer is not None and sequence.prepared is not None:
            self._num_streamers -= 1
            try:
                sequence.request.streamer.end()
            except Exception as raised:
                error, reason = error or raised, "error"
        self._counts.reasons[reason] = self._counts.reasons.get(reason, 0) + 1
        self.events.append(
            GenerationResult(
                request_id=sequence.request_id,
                request=sequence.asked,
                sequences=sequences,
                num_prompt_tokens=sequence.num_prompt_tokens,
                finish_reason=reason,
                error=None if error is None else error.with_traceback(_of_caller(error.__traceback__)),
                scores=scores,
                logits=logits,
                time_to_first_token=sequence.first_token,
                seconds=now() - sequence.taken,
                num_preemptions=sequence.num_preemptions,
                num_cached_tokens=sequence.num_cached_tokens,
            )
        )


def _of_caller(traceback: TracebackType | None) -> TracebackType | None:
    """The traceback from where it left this package: frames of ours would keep what their locals hold."""
    while traceback is not None and traceback.tb_frame.f_globals.get("__name__", "").startswith("torch_paged."):
        traceback = traceback.tb_next
    return traceback
