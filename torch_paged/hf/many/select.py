"""The next tokens of many sequences from their logits, as stock's loops choose them for each one alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from torch_paged.hf.many.sequence import Sequence

# Row by row, and whatever the tokens before: one call does for all rows with the same settings.
_ALIKE = (MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, TypicalLogitsWarper)
# Rows whose largest logit wins, without anything before or after.
_PLAIN = ()


@dataclass(frozen=True)
class Ask:
    """Logits of one sequence.

    Attributes:
        sequence: prepared.
        tokens: int64, the sequence and its draft: the logits are those after its last `count` tokens.
        first: the first of its logits among all.
        count: 1, and 1 more for each token of its draft.
    """

    sequence: Sequence
    tokens: np.ndarray
    first: int
    count: int


@dataclass(frozen=True)
class Chosen:
    """Tokens and what is known of their sequences.

    Attributes:
        tokens: int64 `[n]`, after all logits.
        stops: bool by ask, whether a stopping criterion says so; False for those with a draft, of which only the caller
            knows how many tokens stay.
        errors: what was raised, by the index of the ask.
    """

    tokens: np.ndarray
    stops: np.ndarray
    errors: dict[int, Exception]


def kind(sequence: Sequence) -> Hashable:
    """Sequences of the same kind are chosen for in one go; None = by itself. To be kept with the sequence."""
    prepared = sequence.prepared
    assert prepared is not None
    if any(prepared.keeps) or any(type(processor) not in _ALIKE for processor in prepared.processors):
        return None
    if not prepared.config.do_sample and not prepared.processors:
        return _PLAIN
    if not prepared.config.do_sample:
        return None
    parts = [(type(processor), *sorted(vars(processor).items())) for processor in prepared.processors]
    return "sample", *parts


def select(asks: list[Ask], kinds: list[Hashable], logits: Tensor) -> Chosen:
    """Choose tokens from all logits; the host waits once for all there is to know.

    Args:
        asks: in the order of their logits.
        kinds: of their sequences.
        logits: `[n, vocabulary]`.

    Every token of a draft is chosen anew from what the model says after the tokens before it.
    """
    errors: dict[int, Exception] = {}
    chosen = _tokens(asks, kinds, logits, errors)
    stopped: dict[int, Tensor] = {}
    for number, ask in enumerate(asks):
        assert ask.sequence.prepared is not None
        if ask.sequence.prepared.criteria and ask.count == 1 and number not in errors:
            before = torch.from_numpy(ask.tokens).to(chosen.device)
            try:
                stopped[number] = stops(ask.sequence, torch.cat([before, chosen[ask.first : ask.first + 1]]))
            except Exception as error:
                errors[number] = error
    known = np.zeros(len(asks), dtype=np.bool_)
    if not stopped:
        return Chosen(chosen.cpu().numpy(), known, errors)
    both = torch.cat([chosen, torch.stack(list(stopped.values())).to(chosen)]).cpu().numpy()
    known[list(stopped)] = both[len(chosen) :]
    return Chosen(both[: len(chosen)], known, errors)


def stops(sequence: Sequence, ids: Tensor) -> Tensor:
    """What its stopping criteria say of its tokens, int64 `[tokens]`: bool `[]`."""
    prepared = sequence.prepared
    assert prepared is not None
    scores: Any = tuple(sequence.scores) if prepared.keeps[0] else None
    said: Tensor = prepared.criteria(ids[None], scores).any()
    return said


def _tokens(asks: list[Ask], kinds: list[Hashable], logits: Tensor, errors: dict[int, Exception]) -> Tensor:
    groups: defaultdict[Hashable, list[int]] = defaultdict(list)
    for number, key in enumerate(kinds):
        groups[(number,) if key is None or (key != _PLAIN and asks[number].count > 1) else key].append(number)
    if set(groups) == {_PLAIN}:
        return logits.argmax(dim=-1)
    chosen = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    for key, numbers in groups.items():
        if key == _PLAIN:
            spans = [np.arange(asks[number].first, asks[number].first + asks[number].count) for number in numbers]
            where = torch.from_numpy(np.concatenate(spans)).to(logits.device)
            chosen[where] = logits[where].argmax(dim=-1)
        elif len(numbers) > 1:
            _draw_alike([asks[number] for number in numbers], numbers, logits, chosen, errors)
        else:
            ask = asks[numbers[0]]
            try:
                span = slice(ask.first, ask.first + ask.count)
                chosen[span] = _one(ask, logits[span])
            except Exception as error:
                errors[numbers[0]] = error
    return chosen


def _one(ask: Ask, logits: Tensor) -> Tensor:
    """As `_sample` and `_assisted_decoding` choose for a batch of one."""
    sequence, prepared = ask.sequence, ask.sequence.prepared
    assert prepared is not None
    raw = logits.to(torch.float32)
    scores = raw
    if prepared.processors:
        ids = torch.from_numpy(ask.tokens.copy()).to(logits.device)[None]
        start = ids.shape[1] - (ask.count - 1)
        rows = [
            prepared.processors(ids[:, : start + i], raw[i : i + 1].clone()).to(torch.float32) for i in range(ask.count)
        ]
        scores = torch.cat(rows)
    for wanted, kept, values in zip(prepared.keeps, (sequence.scores, sequence.logits), (scores, raw), strict=True):
        if wanted:
            kept.extend(torch.split(values.clone(), 1))
    if not prepared.config.do_sample:
        return scores.argmax(dim=-1)
    return torch.multinomial(scores.softmax(dim=-1), 1, generator=sequence.generator).squeeze(1)


def _draw_alike(
    asks: list[Ask], numbers: list[int], logits: Tensor, chosen: Tensor, errors: dict[int, Exception]
) -> None:
    """Sampling with the same settings: processors and softmax for all rows, a draw from each one's own generator."""
    where = torch.tensor([ask.first for ask in asks], device=logits.device)
    prepared = asks[0].sequence.prepared
    assert prepared is not None
    processors: Any = LogitsProcessorList(prepared.processors)
    probabilities = processors(None, logits[where].to(torch.float32)).softmax(dim=-1)
    for ask, number, row in zip(asks, numbers, torch.split(probabilities, 1), strict=True):
        try:
            chosen[ask.first] = torch.multinomial(row, 1, generator=ask.sequence.generator)[0, 0]
        except Exception as error:
            errors[number] = error
