"""Results: what came of a pass, tokens that are chosen, kept and told, and sequences that end with them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from torch_paged.hf.many.batch import Batch, Passed
from torch_paged.hf.many.drafts import Drafts
from torch_paged.hf.many.outcome import Outcome
from torch_paged.hf.many.placement import Placement
from torch_paged.hf.many.request import FinishReason
from torch_paged.hf.many.rows import Rows
from torch_paged.hf.many.select import Ask, select, stops
from torch_paged.hf.many.sequence import Sequence
from torch_paged.hf.many.stats import Counts, now

Ints = np.ndarray


class Results:
    """The second half of a step.

    Args:
        batch: of the model.
        rows: that run.
        placement: of their blocks.
        drafts: that some of them have.
        counts: of the run.
        outcome: hears of tokens.
        end: ends a sequence.
    """

    def __init__(
        self,
        batch: Batch,
        rows: Rows,
        placement: Placement,
        drafts: Drafts,
        counts: Counts,
        outcome: Outcome,
        end: Callable[[Sequence, FinishReason, Exception | None], None],
    ) -> None:
        self._batch, self._rows, self._placement, self._drafts = batch, rows, placement, drafts
        self._counts, self._outcome, self._end = counts, outcome, end

    def use(self, passed: Passed, num_tokens: Ints, drafts: dict[int, Ints]) -> None:
        """Take in a pass.

        Args:
            num_tokens: int64 `[rows]`, tokens of each row that it computed, besides those of drafts.
            drafts: int64 tokens that it computed besides, by row.
        """
        rows = self._rows
        failed = [(rows.sequence(row), error) for row, error in passed.errors.items()]
        ran = passed.rows
        computed = num_tokens[ran]
        prefilled = np.clip(rows.prefill[ran] - rows.computed[ran], 0, computed)
        self._counts.tokens_prefilled += int(prefilled.sum())
        complete = computed >= rows.pending[ran]
        rows.computed[ran] += computed
        asks, places = [], []
        first = 0
        # Blocks that leave a sliding window are remembered before they do.
        for row in ran[(prefilled > 0) & (complete | self._batch.slides)].tolist():
            self._placement.remember(row)
        for row, is_complete in zip(ran.tolist(), complete.tolist(), strict=True):
            draft = drafts.get(row, ())
            if is_complete:
                tokens = rows.tokens[row, : rows.lengths[row] + len(draft)]
                asks.append(Ask(rows.sequence(row), tokens, first, 1 + len(draft)))
                places.append(row)
            first += 1 + len(draft)
        if asks:
            self._choose(asks, np.array(places), passed.logits, drafts)
        for sequence, error in failed:
            self._end(sequence, "error", error)

    def _choose(self, asks: list[Ask], places: Ints, logits: Tensor, drafts: dict[int, Ints]) -> None:
        rows = self._rows
        chosen = select(asks, [ask.sequence.kind for ask in asks], logits)
        for number, error in chosen.errors.items():
            self._end(asks[number].sequence, "error", error)
        fine = np.array([number for number in range(len(asks)) if number not in chosen.errors], dtype=np.int64)
        firsts = np.array([ask.first for ask in asks], dtype=np.int64)[fine]
        places = places[fine]
        single = np.array([row not in drafts for row in places.tolist()], dtype=np.bool_)
        told: dict[int, Ints] = {}
        rows.append(places[single], chosen.tokens[firsts[single]])
        for row, first in zip(places[~single].tolist(), firsts[~single].tolist(), strict=True):
            told[row] = self._accept(row, drafts[row], chosen.tokens[first : first + 1 + len(drafts[row])])
        self._drop_drafts()
        self._tell(places, told)
        stopped = dict(zip(places.tolist(), chosen.stops[fine].tolist(), strict=True))
        self._end_those_done(places, stopped | self._stop_after(list(told)))

    def _accept(self, row: int, draft: Ints, chosen: Ints) -> Ints:
        """Tokens of a draft that the model chose too, and the one it chose after them."""
        rows = self._rows
        matches = int(np.append(draft != chosen[:-1], True).argmax())
        tokens = chosen[: matches + 1][: int(rows.max_lengths[row] - rows.lengths[row])]
        tokens = tokens[: rows.first_eos(row, tokens)]
        self._counts.drafts_accepted += len(tokens) - 1
        sequence = rows.sequence(row)
        for kept in (sequence.scores, sequence.logits):
            if kept:
                del kept[len(kept) - len(chosen) + len(tokens) :]
        rows.extend(row, tokens)
        return tokens

    def _drop_drafts(self) -> None:
        """Crop what was computed and not accepted."""
        rows = self._rows
        beyond = np.maximum(rows.computed - np.maximum(rows.lengths - 1, 0), 0)
        if beyond.any():
            self._batch.crop(beyond)
            rows.computed -= beyond
        self._drafts.keep(rows.computed)

    def _tell(self, places: Ints, told: dict[int, Ints]) -> None:
        rows, at = self._rows, now()
        before = rows.last[places]
        later = ~np.isnan(before)
        self._counts.new_tokens += len(places) - len(told) + sum(map(len, told.values()))
        if later.any():
            self._counts.latencies.append(at - before[later])
        rows.last[places] = at
        for row in places[~later].tolist():
            self._outcome.first_token(rows.sequence(row), at)
        if self._outcome.listens:
            for row in places.tolist():
                sequence = rows.sequence(row)
                tokens = told[row] if row in told else rows.of_row(row)[-1:]
                try:
                    self._outcome.tell(sequence, tokens.tolist())
                except Exception as error:
                    self._end(sequence, "error", error)

    def _stop_after(self, rows: list[int]) -> dict[int, bool]:
        """Which of these rows, that had drafts, their stopping criteria end; the host waits once for all."""
        said: dict[int, Tensor] = {}
        for row in rows:
            sequence = self._rows.sequences[row]
            if sequence is None or sequence.prepared is None or not sequence.prepared.criteria:
                continue
            ids = torch.from_numpy(self._rows.of_row(row).copy()).to(self._batch.device)
            try:
                said[row] = stops(sequence, ids)
            except Exception as error:
                self._end(sequence, "error", error)
        return dict(zip(said, torch.stack(list(said.values())).tolist(), strict=True)) if said else {}

    def _end_those_done(self, places: Ints, stopped: dict[int, bool]) -> None:
        by_eos, by_length = self._rows.ends(places)
        for row, eos, length in zip(places.tolist(), by_eos.tolist(), by_length.tolist(), strict=True):
            sequence = self._rows.sequences[row]
            if sequence is not None and (eos or length or stopped[row]):
                self._end(sequence, "eos" if eos else "length" if length else "stop", None)
