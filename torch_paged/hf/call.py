"""Call: what one forward pass does to a paged cache, decided once before its first layer."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor, nn


@dataclass(eq=False)
class Call:
    """One forward pass: `width` new columns for each of `num_seqs` rows.

    Attributes:
        valid: bool `[num_seqs, width]`, which of the new columns hold tokens; None if all do.
        native: our attention reads the blocks in place; else layers see gathered tensors and a dense mask.
        packed: int64 `[num_seqs]`, how many tokens of each row the model sees, all in one row of its inputs, one
            sequence after the other; None: it sees every column, `[num_seqs, width]`.
        deterministic: attention gives a row the same bits whatever else is in the pass.
        is_compiled: the pass runs over a StepCache, after an uncompiled pass that has shown the model's masks.
        windows: of the masks that the model asked for in a native call, 0 for a causal one.
        num_tokens: int64 `[num_seqs]`, tokens to store per row.
        input_shape: `(batch, width)` of what the model sees.
        left_padded: in every row the stored tokens are the last ones, so that queries and keys align at the end.
    """

    num_seqs: int
    width: int
    valid: np.ndarray | None = None
    native: bool = False
    packed: np.ndarray | None = None
    deterministic: bool = False
    is_compiled: bool = False
    windows: set[int] = field(default_factory=set)
    num_tokens: np.ndarray = field(init=False)
    input_shape: tuple[int, int] = field(init=False)
    left_padded: bool = field(init=False)

    def __post_init__(self) -> None:
        self.input_shape = (self.num_seqs, self.width) if self.packed is None else (1, int(self.packed.sum()))
        if self.packed is not None:
            self.num_tokens = self.packed
            self.left_padded = False
        elif self.valid is None:
            self.num_tokens = np.full(self.num_seqs, self.width, dtype=np.int64)
            self.left_padded = True
        else:
            self.num_tokens = self.valid.sum(1, dtype=np.int64)
            self.left_padded = not bool((self.valid[:, :-1] & ~self.valid[:, 1:]).any())


@dataclass
class Columns:
    """Which columns of the batch, as `generate` counts them, are stored in the pool.

    Runs of columns, oldest first: bool `[num_seqs, width]` where some are pads, None where all are stored. Arrays, as
    PyTorch reduces bool tensors ten times slower than NumPy does (64 x 1,024: 90 and 5 microseconds).
    """

    runs: list[tuple[np.ndarray | None, int]] = field(default_factory=list)
    count: int = 0
    # bool `[num_seqs]`: rows that hold nothing any more, whatever the runs say; None = no row.
    gone: np.ndarray | None = None
    # A hidden column stands after a stored one, so that distances in columns and in tokens differ. Stays set when the
    # row that had it goes: the cost is a gathered call.
    holes: bool = False

    def append(self, call: Call) -> None:
        if call.width == 0:
            return
        self.holes = self.holes_with(call)
        self.count += call.width
        if call.valid is not None and not self._live(call.valid).all():
            self.runs.append((call.valid, call.width))
        elif self.runs and self.runs[-1][0] is None:
            self.runs[-1] = (None, self.runs[-1][1] + call.width)
        else:
            self.runs.append((None, call.width))

    def crop(self, width: int) -> np.ndarray | int:
        """Drop the last `width` columns; the number of stored tokens among them, per row or the same for all."""
        dropped: np.ndarray | int = 0
        self.count -= width
        while width > 0:
            valid, run = self.runs.pop()
            cut = min(run, width)
            width -= cut
            dropped = dropped + (cut if valid is None else valid[:, run - cut :].sum(1))
            if cut < run:
                self.runs.append((None if valid is None else valid[:, : run - cut], run - cut))
        return dropped if self.gone is None else np.where(self.gone, 0, dropped)

    def select(self, rows: np.ndarray) -> None:
        self.runs = [(valid if valid is None else valid[rows], width) for valid, width in self.runs]
        self.gone = None if self.gone is None else self.gone[rows]

    def same_after(self, rows: np.ndarray) -> bool:
        """Whether `select(rows)` would leave all as it is: rows of one prompt change places."""
        selected = [(valid, valid[rows]) for valid, _ in self.runs if valid is not None]
        return all(valid.shape == new.shape and bool((valid == new).all()) for valid, new in selected)

    def copy(self) -> Columns:
        return Columns(list(self.runs), self.count, self.gone, self.holes)

    @property
    def all_stored(self) -> bool:
        return self.gone is None and all(valid is None for valid, _ in self.runs)

    def holes_with(self, call: Call) -> bool:
        """`holes`, once the columns of `call` are appended."""
        if self.holes or call.valid is None:
            return self.holes
        everything = self._live(np.concatenate([self.stored(call.num_seqs), call.valid], axis=1))
        return bool((everything[:, :-1] & ~everything[:, 1:]).any())

    def stored(self, num_seqs: int) -> np.ndarray:
        """bool `[num_seqs, count]`."""
        runs = [np.ones((num_seqs, width), dtype=np.bool_) if v is None else v for v, width in self.runs]
        stored = np.concatenate([np.ones((num_seqs, 0), dtype=np.bool_), *runs], axis=1)
        return stored if self.gone is None else stored & ~self.gone[:, None]

    def leave(self, rows: np.ndarray) -> None:
        """Rows (bool `[num_seqs]`) hold nothing any more, and will not."""
        self.gone = rows if self.gone is None else self.gone | rows

    def _live(self, cells: np.ndarray) -> np.ndarray:
        return cells if self.gone is None else cells[~self.gone]

    def compare(self, mask: np.ndarray | None) -> str:
        """How `mask` (bool `[num_seqs, count]`, or None: all ones) relates to what is stored.

        "same", "hides" (stored tokens must not be seen: dense masks can do that), or "reveals" (pads that were not
        stored are to be seen: nothing can do that).
        """
        answer, start = "same", 0
        for valid, width in self.runs:
            part = np.ones((1, 1), dtype=np.bool_) if mask is None else self._live(mask[:, start : start + width])
            start += width
            if valid is None:
                answer = answer if part.all() else "hides"
                continue
            valid = self._live(valid)
            if (part != valid).any():
                if (part & ~valid).any():
                    return "reveals"
                answer = "hides"
        return answer


class NeedsOwnAttention(Exception):
    """Raised inside a native call that turns out to need the model's own attention; the text says why.

    Whoever announced the call takes it back and runs it again, gathered.
    """


class ThisCallNeedsOwnAttention(NeedsOwnAttention):
    """The same, for what was passed this time: other calls of the model run natively, and compiled."""


class _Current(threading.local):
    call: Call | None = None
    # Whether layers may run by our ops in it.
    fast_layers: bool = False
    # The MLP that is to run for some tokens alone, and these, int64.
    asked: tuple[nn.Module, Tensor] | None = None


current = _Current()


def in_native_call() -> bool:
    """Whether this thread is in a forward pass whose attention reads blocks."""
    return current.call is not None and current.call.native


def in_compiled_call() -> bool:
    """Whether this thread is in a forward pass over a StepCache."""
    return current.call is not None and current.call.is_compiled
