"""Which tokens of which rows each packed pass of a call computes: chunks, and prefixes that rows have in common."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass
class Pass:
    """One forward pass.

    Attributes:
        pieces: (row, first, end): tokens `first <= token < end` of the row, counted from its first new one; by row.
        forks: (row, source, length): after the pass the row holds what the source holds then, that many new tokens.
    """

    pieces: list[tuple[int, int, int]] = field(default_factory=list)
    forks: list[tuple[int, int, int]] = field(default_factory=list)

    def num_tokens(self, num_seqs: int) -> Ints:
        """int64 `[num_seqs]`, tokens of each row."""
        counts = np.zeros(num_seqs, dtype=np.int64)
        for row, first, end in self.pieces:
            counts[row] = end - first
        return counts


@dataclass(frozen=True)
class Sharing:
    """What each row has in common with an earlier one in the order of computation.

    Attributes:
        source: int64 `[rows]`, the row that computes the common tokens; -1 = the row computes all of its own.
        length: int64 `[rows]`, how many first tokens these are.
    """

    source: Ints
    length: Ints

    @classmethod
    def none(cls, rows: int) -> Sharing:
        return cls(np.full(rows, -1, dtype=np.int64), np.zeros(rows, dtype=np.int64))

    @classmethod
    def of(cls, rows: Sequence[Ints], at_least: int) -> Sharing:
        """Of rows with these tokens: identical ones, and prefixes of `at_least` tokens (0 = no shorter ones).

        Sorted rows have their longest common prefix with a neighbour. A row shares with the neighbour before it, or,
        where that one has the common tokens from elsewhere, with the row that computes them.
        """
        sharing = cls.none(len(rows))
        source, length = sharing.source, sharing.length
        order = sorted(range(len(rows)), key=lambda row: rows[row].astype(">i8").tobytes())
        for before, row in zip(order, order[1:], strict=False):
            common = common_prefix(rows[before], rows[row])
            identical = common == len(rows[row]) == len(rows[before])
            if common == 0 or not (identical or 0 < at_least <= common):
                continue
            while common <= length[before]:
                before = int(source[before])
            source[row], length[row] = before, common
        return sharing


def plan_passes(num_tokens: Ints, cached: Ints, sharing: Sharing, max_tokens: int) -> list[Pass]:
    """Passes of at most `max_tokens` tokens that compute every token once.

    A row whose first tokens another row computes begins when that one has come to the end of them.

    Args:
        num_tokens: int64 `[rows]`, new tokens of each row.
        cached: int64 `[rows]`, how many of them the cache holds already.
        sharing: of the rows.
        max_tokens: at least 1.
    """
    followers: defaultdict[int, list[int]] = defaultdict(list)
    done = cached.copy()
    running = []
    for row, source in enumerate(sharing.source.tolist()):
        if source >= 0 and max(cached[row], cached[source]) < sharing.length[row]:
            followers[source].append(row)
        elif done[row] < num_tokens[row]:
            running.append(row)
    passes = []
    while running:
        passed, left = Pass(), max_tokens
        forked: list[int] = []
        for row in sorted(running):
            cuts = [int(sharing.length[follower]) for follower in followers[row]]
            end = min([int(num_tokens[row]), int(done[row]) + left, *(cut for cut in cuts if cut > done[row])])
            if end > done[row]:
                passed.pieces.append((row, int(done[row]), end))
                left -= end - int(done[row])
                done[row] = end
                _fork(row, followers, sharing, done, passed, forked)
        running = [row for row in [*running, *forked] if done[row] < num_tokens[row]]
        passes.append(passed)
    return passes


def _fork(
    row: int, followers: dict[int, list[int]], sharing: Sharing, done: Ints, passed: Pass, forked: list[int]
) -> None:
    """The rows that begin where `row` has come to, and those that begin where they do."""
    for follower in followers[row]:
        if sharing.length[follower] == done[row]:
            passed.forks.append((follower, row, int(done[row])))
            done[follower] = done[row]
            forked.append(follower)


def common_prefix(a: Ints, b: Ints) -> int:
    """How many first tokens two rows have in common."""
    width = min(len(a), len(b))
    different = np.flatnonzero(a[:width] != b[:width])
    return int(different[0]) if len(different) else width
