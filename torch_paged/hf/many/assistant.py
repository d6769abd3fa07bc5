"""Assistant: a smaller model that drafts for the sequences of generate_many."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import torch

from torch_paged.hf.many.batch import Batch
from torch_paged.hf.many.rows import Rows
from torch_paged.hf.swapped_row import Swapped
from torch_paged.memory import PoolExhausted

Ints = np.ndarray


class Assistant:
    """A smaller model that drafts for all sequences that run, in packed passes over a cache of its own.

    Args:
        batch: of the assistant, with as many rows as the model's.
        max_tokens: of one pass.

    Source: assisted generation; the drafts are verified as in speculative decoding, arXiv 2211.17192, with a greedy
    draft: a token stays where the model chooses it too.
    """

    def __init__(self, batch: Batch, max_tokens: int) -> None:
        self._batch = batch
        # A draft is dropped after several passes, through which a sliding window went on.
        batch.cache.state.record_past()
        self._max_tokens = max_tokens
        self._computed = np.zeros(batch.num_rows, dtype=np.int64)
        config = batch.model.generation_config
        self._num_tokens = int(config.num_assistant_tokens or 20)
        self._confidence = float(config.assistant_confidence_threshold or 0.0)
        self._swaps = batch.handle.config.on_pressure == "swap"

    def drafts(self, rows: Ints, of: Rows, most: Ints) -> dict[int, Ints]:
        """Drafts for these rows, `most[i]` tokens at most for the i-th; none where the assistant has no blocks.

        A draft ends before an EOS token, and with a token that the assistant is not sure of.
        """
        tokens = {int(row): of.of_row(row) for row in rows}
        drafted: dict[int, list[int]] = {row: [] for row in tokens}
        limits = dict(zip(tokens, np.minimum(most, self._num_tokens).tolist(), strict=True))
        new = {row: ids[self._computed[row] :] for row, ids in tokens.items()}
        while going := [row for row in sorted(drafted) if len(drafted[row]) < limits[row] and len(new[row])]:
            num_tokens = np.zeros(self._batch.num_rows, dtype=np.int64)
            lengths = np.array([len(new[row]) for row in going])
            num_tokens[going] = np.clip(self._max_tokens - (lengths.cumsum() - lengths), 0, lengths)
            parts = [new[row][: num_tokens[row]] for row in going]
            input_ids = torch.from_numpy(np.concatenate(parts)).to(self._batch.device)
            try:
                passed = self._batch.run(num_tokens, input_ids, (num_tokens > 0).astype(np.int64))
            except PoolExhausted:
                break
            for row in passed.errors:
                del drafted[row]
            self._computed[passed.rows] += num_tokens[passed.rows]
            if not len(passed.rows):
                break
            best = passed.logits.float().softmax(dim=-1).max(dim=-1)
            sure, chosen = torch.stack([best.values.double(), best.indices.double()]).cpu().numpy()
            ends = of.are_eos(passed.rows, chosen.astype(np.int64))
            for row, token, end, confidence in zip(passed.rows.tolist(), chosen.tolist(), ends, sure, strict=True):
                new[row] = new[row][num_tokens[row] :]
                if not end and not len(new[row]):
                    drafted[row].append(int(token))
                    if confidence >= self._confidence:
                        new[row] = np.array([int(token)])
        return {row: np.array(draft, dtype=np.int64) for row, draft in drafted.items() if draft}

    def keep(self, lengths: Ints) -> None:
        """Go back to where the sequences have come, int64 `[rows]`: what they did not accept is dropped."""
        dropped = np.maximum(self._computed - lengths, 0)
        self._batch.crop(dropped)
        self._computed -= dropped

    def empty(self, rows: Ints) -> None:
        """These rows hold no sequences any more."""
        self._batch.empty(rows)
        self._computed[rows] = 0

    def swap_out(self, row: int, length: int) -> Swapped | None:
        """What is computed of the first `length` tokens of a row, moved to CPU memory; None = nothing is there."""
        computed, self._computed[row] = int(self._computed[row]), 0
        if not self._swaps or not computed:
            return None
        return self._batch.swap_out(row, max(0, computed - length))

    def swap_in(self, swapped: Swapped, row: int) -> None:
        """Let an empty row go on from there, if blocks are free."""
        with suppress(PoolExhausted):
            if self._batch.swap_in(swapped, row):
                self._computed[row] = swapped.num_tokens

    def close(self) -> None:
        self._batch.close()
