"""Rows: the sequences that run, as arrays over the rows of one cache."""

from __future__ import annotations

import numpy as np

from torch_paged.hf.many.sequence import Sequence

Ints = np.ndarray
_NO_TOKEN = -1


class Rows:
    """A row of each array is one of the sequences that run, or free.

    Attributes:
        sequences: by row; None = free.
        tokens: int64 `[rows, capacity]`.
        lengths: int64 `[rows]`, tokens of each.
        computed: int64 `[rows]`, how many of them the cache holds.
        prefill: int64 `[rows]`, how many of them no decode step computes: those it was placed with.
        max_lengths: int64 `[rows]`.
        numbers: int64 `[rows]`, of the sequences.
        last: float64 `[rows]`, when the last token came; nan before the first.
    """

    def __init__(self, num_rows: int) -> None:
        self.sequences: list[Sequence | None] = [None] * num_rows
        self.tokens = np.zeros((num_rows, 64), dtype=np.int64)
        zeros = np.zeros((5, num_rows), dtype=np.int64)
        self.lengths, self.computed, self.prefill, self.max_lengths, self.numbers = zeros
        self.last = np.full(num_rows, np.nan)
        self._eos = np.full((num_rows, 1), _NO_TOKEN, dtype=np.int64)
        self._used = np.zeros(num_rows, dtype=np.bool_)

    @property
    def used(self) -> Ints:
        """The rows of sequences, the one that has waited longest first."""
        rows = np.flatnonzero(self._used)
        ordered: Ints = rows[np.argsort(self.numbers[rows])]
        return ordered

    @property
    def is_full(self) -> bool:
        return bool(self._used.all())

    @property
    def pending(self) -> Ints:
        """int64 `[rows]`, tokens that are to be computed before the next one is chosen."""
        return self.lengths - self.computed

    def sequence(self, row: int) -> Sequence:
        sequence = self.sequences[row]
        assert sequence is not None
        return sequence

    def place(self, sequence: Sequence) -> int:
        """Give the sequence a free row."""
        assert sequence.prepared is not None
        row = int(np.flatnonzero(~self._used)[0])
        sequence.row, self.sequences[row], self._used[row] = row, sequence, True
        self._widen(len(sequence.tokens))
        self.tokens[row, : len(sequence.tokens)] = sequence.tokens
        self.lengths[row] = self.prefill[row] = len(sequence.tokens)
        self.computed[row] = 0
        self.max_lengths[row] = sequence.prepared.max_length
        self.numbers[row] = sequence.number
        self.last[row] = sequence.last_token
        eos = sequence.prepared.eos
        if len(eos) > self._eos.shape[1]:
            more = np.full((len(self._eos), len(eos) - self._eos.shape[1]), _NO_TOKEN, dtype=np.int64)
            self._eos = np.concatenate([self._eos, more], axis=1)
        self._eos[row] = _NO_TOKEN
        self._eos[row, : len(eos)] = eos
        return row

    def take(self, row: int) -> Sequence:
        """Free the row; its sequence keeps its tokens."""
        sequence = self.sequence(row)
        sequence.tokens, sequence.last_token = self.of_row(row).copy(), float(self.last[row])
        sequence.row, self.sequences[row], self._used[row] = -1, None, False
        self.lengths[row] = self.computed[row] = 0
        return sequence

    def of_row(self, row: int) -> Ints:
        """The tokens of a row; a view."""
        tokens: Ints = self.tokens[row, : self.lengths[row]]
        return tokens

    def append(self, rows: Ints, tokens: Ints) -> None:
        """One more token for each of these rows."""
        self._widen(int(self.lengths[rows].max(initial=0)) + 1)
        self.tokens[rows, self.lengths[rows]] = tokens
        self.lengths[rows] += 1

    def extend(self, row: int, tokens: Ints) -> None:
        """Several more tokens of one row."""
        start = int(self.lengths[row])
        self._widen(start + len(tokens))
        self.tokens[row, start : start + len(tokens)] = tokens
        self.lengths[row] += len(tokens)

    def inputs(self, num_tokens: Ints, drafts: dict[int, Ints]) -> Ints:
        """The tokens of a packed pass, row after row: those not computed yet, then the row's draft."""
        rows = np.repeat(np.arange(len(num_tokens)), num_tokens)
        before = num_tokens.cumsum() - num_tokens
        position = np.arange(len(rows)) + np.repeat(self.computed - before, num_tokens)
        if drafts:
            self._widen(int((self.computed + num_tokens).max()))
            for row, draft in drafts.items():
                self.tokens[row, self.lengths[row] : self.lengths[row] + len(draft)] = draft
        tokens: Ints = self.tokens[rows, position]
        return tokens

    def ends(self, rows: Ints) -> tuple[Ints, Ints]:
        """Which of these rows end with their last token: bool, by an EOS token, and bool, by their length."""
        last = self.tokens[rows, self.lengths[rows] - 1]
        return self.are_eos(rows, last), self.lengths[rows] >= self.max_lengths[rows]

    def are_eos(self, rows: Ints, tokens: Ints) -> Ints:
        """Which of these tokens, one for each of the rows, end its sequence: bool."""
        hits: Ints = (self._eos[rows] == tokens[:, None]).any(axis=1)
        return hits

    def first_eos(self, row: int, tokens: Ints) -> int:
        """How many of these tokens of a row count: those up to its first EOS token."""
        hits = np.flatnonzero(np.isin(tokens, self._eos[row][self._eos[row] != _NO_TOKEN]))
        return int(hits[0]) + 1 if len(hits) else len(tokens)

    def _widen(self, width: int) -> None:
        num_rows, capacity = self.tokens.shape
        if width > capacity:
            wider = np.zeros((num_rows, max(width, 2 * capacity)), dtype=np.int64)
            wider[:, :capacity] = self.tokens
            self.tokens = wider
