"""Turns: decoding of more rows than the pool holds, each admitted as blocks come free."""

from __future__ import annotations

import functools
import heapq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from torch_paged.hf.beginning import Beginning, Beginnings
from torch_paged.hf.cache import PagedCache
from torch_paged.hf.group import LayerGroup
from torch_paged.hf.loop import Loop
from torch_paged.hf.packed import packed_call
from torch_paged.hf.row_by_row import for_rows
from torch_paged.hf.swapped_row import Swapped, swap_out
from torch_paged.memory import PoolExhausted

_NONE = Beginning()


@dataclass
class _Rows:
    """Running rows that are equally long: int64 `ids [rows, columns]`, as processors and criteria see them in stock."""

    rows: list[int]
    ids: Tensor

    def take(self, places: list[int]) -> _Rows:
        return _Rows([self.rows[place] for place in places], self.ids[places])

    def joined(self, other: _Rows | None) -> _Rows:
        """Both, in the order of the batch."""
        if other is None:
            return self
        rows = [*self.rows, *other.rows]
        order = sorted(range(len(rows)), key=rows.__getitem__)
        return _Rows([rows[place] for place in order], torch.cat([self.ids, other.ids])[order])


class Turns:
    """The rows of one `generate`, of which as many run as blocks allow.

    The row that comes first in the batch has waited longest and is admitted first; its prompt is computed beside the
    decode steps of the others. When blocks run out, the running row that comes last is swapped to CPU memory or dropped
    (`on_pressure`), and goes on, from where it was, when its turn comes again. Blocks that it shared stay in the pool
    until the only row that runs needs them: then its tokens are computed again. Where blocks are missing that calls in
    other threads hold, that row waits for them, and keeps none meanwhile unless its call came first.

    Source: admission and preemption as in PagedAttention's scheduler, arXiv 2309.06180, section 4.5.
    """

    def __init__(self, loop: Loop, cache: PagedCache) -> None:
        self._model, self._cache, self._loop = loop.model, cache, loop
        self._swaps = cache.config.on_pressure == "swap"
        self._line = cache.state.pools.line
        self._running: dict[int, _Rows] = {}  # by columns
        self._waiting: list[int] = []  # a heap
        self._ids: dict[int, Tensor] = {}  # int64 [columns], of the rows that wait or have ended
        self._swapped: dict[int, Swapped] = {}

    def run(self, ids: Tensor, attention_mask: Tensor, unfinished: Tensor) -> Tensor:
        """Decode to the end.

        Args:
            ids: int64 `[rows, columns]`, all tokens so far, of which the cache holds all but the last of each row, or
                none.
            attention_mask: int64 `[rows, columns]`, 0 for the padding on the left.
            unfinished: bool `[rows]`, rows that go on.

        Returns: int64 `[rows, columns]`, padded on the right behind a row's end.

        Raises:
            PoolExhausted: one row alone does not fit.
        """
        self._pads = (1 - attention_mask).sum(1).cpu().numpy()
        begun = [row[pads:] for row, pads in zip(ids.cpu().numpy(), self._pads.tolist(), strict=True)]
        self._beginnings = Beginnings(self._model, self._cache.state, begun)
        going = torch.nonzero(unfinished).flatten().tolist()
        if self._cache.state.num_seqs is None:
            self._ids = dict(enumerate(ids))
            self._waiting = going
        else:
            ended = sorted(set(range(len(ids))) - set(going))
            self._empty(ended)
            self._ids = {row: ids[row] for row in ended}
            self._running = {ids.shape[1]: _Rows(going, ids[going])}
        heapq.heapify(self._waiting)
        try:
            while self._running or self._waiting:
                self._admit()
                self._step()
        finally:
            # A traceback keeps this object alive, and with it what swapped rows hold.
            self._swapped.clear()
        return torch.nn.utils.rnn.pad_sequence(
            [self._ids[row] for row in range(len(ids))], batch_first=True, padding_value=self._loop.pad_token
        )

    def _step(self) -> None:
        """One forward pass over the running rows; fewer of them if blocks run out."""
        while True:
            pieces, left = {}, self._cache.config.max_prefill_tokens
            for row, ids in sorted((row, each.ids[i]) for each in self._running.values() for i, row in _places(each)):
                new = ids[self._pads[row] + self._fed(row) :]
                if len(new) > 1:
                    new = new[:left]
                    left -= len(new)
                if len(new):
                    pieces[row] = new
            num_tokens = np.zeros(len(self._pads), dtype=np.int64)
            for row, new in pieces.items():
                num_tokens[row] = len(new)
            try:
                outputs = packed_call(self._model, self._cache, num_tokens, torch.cat(list(pieces.values())))
            except PoolExhausted:
                active = [row for each in self._running.values() for row in each.rows]
                if len(active) > 1:
                    self._preempt(max(active))
                elif not self._forget_kept() and not self._wait(active[0], len(pieces[active[0]])):
                    raise
                if not self._running:
                    return
            else:
                self._select(list(pieces), outputs.logits[0])
                return

    def _select(self, computed: list[int], logits: Tensor) -> None:
        """Choose the next token of the rows whose tokens are all computed; `logits [rows computed, vocabulary]`."""
        at = {row: place for place, row in enumerate(computed)}
        running: dict[int, _Rows] = {}
        chosen: list[tuple[_Rows, Tensor]] = []
        for columns, each in sorted(self._running.items()):
            whole = [i for i, row in _places(each) if self._fed(row) == columns - self._pads[row]]
            if len(whole) < len(each.rows):
                rest = each.take([i for i, _ in _places(each) if i not in set(whole)])
                running[columns] = rest.joined(running.get(columns))
            if not whole:
                continue
            each = each.take(whole)
            scores = logits[[at[row] for row in each.rows]].to(copy=True, dtype=torch.float32, device=each.ids.device)
            scores = for_rows(self._loop.processors, each.rows, len(self._pads))(each.ids, scores)
            if self._loop.config.do_sample:
                tokens = torch.multinomial(torch.nn.functional.softmax(scores, dim=-1), num_samples=1)
            else:
                tokens = torch.argmax(scores, dim=-1, keepdim=True)
            each.ids = torch.cat([each.ids, tokens], dim=-1)
            chosen.append((each, self._loop.criteria(each.ids, None)))
        # The host waits once for all of them.
        ended = torch.cat([done for _, done in chosen]).tolist() if chosen else []
        for each, _ in chosen:
            done, ended = ended[: len(each.rows)], ended[len(each.rows) :]
            self._ids |= {row: each.ids[i] for i, row in _places(each) if done[i]}
            self._leave(each, [i for i, _ in _places(each) if done[i]])
            if not all(done):
                columns = each.ids.shape[1]
                going = each.take([i for i, _ in _places(each) if not done[i]])
                running[columns] = going.joined(running.get(columns))
        self._running = running

    def _leave(self, rows: _Rows, places: list[int]) -> None:
        """These rows have ended: what they hold is remembered where it shall be, and free."""
        prefixes = self._cache.state.prefixes
        if prefixes is not None:
            tokens: list[np.ndarray | None] = [None] * len(self._pads)
            for place in places:
                row = rows.rows[place]
                tokens[row] = rows.ids[place, self._pads[row] :].cpu().numpy()
            prefixes.remember(self._model, self._cache.state, tokens)
        self._empty([rows.rows[place] for place in places])

    def _admit(self) -> None:
        """Let waiting rows run as far as blocks are free, and one more for each that runs already."""
        while self._waiting:
            row = self._waiting[0]
            active = sum(len(each.rows) for each in self._running.values())
            if row in self._swapped and not self._swapped[row].is_of(self._groups()):
                # The cache has been released since: nobody else held anything.
                del self._swapped[row]
            beginning = Beginning()
            if row not in self._swapped:
                beginning = self._beginnings.of(row, (other for each in self._running.values() for other in each.rows))
            if beginning.is_being_computed:
                return
            if active and (self._line.others_wait or not self._fits(row, active, beginning)):
                return
            heapq.heappop(self._waiting)
            if (swapped := self._swapped.pop(row, None)) is not None:
                try:
                    swapped.restore(row)
                except PoolExhausted:
                    self._swapped[row] = swapped
                    heapq.heappush(self._waiting, row)
                    if active:
                        return
                    if not self._forget_kept(besides=row) and not self._wait_for(row):
                        raise
                    continue
            self._beginnings.take(row, beginning)
            ids = self._ids.pop(row)[None]
            self._running[ids.shape[1]] = _Rows([row], ids).joined(self._running.get(ids.shape[1]))
            if not self._groups():
                return  # how large blocks are shows in the first forward pass

    def _fits(self, row: int, active: int, beginning: Beginning = _NONE) -> bool:
        """Whether there are blocks for the row and its next token, and one for each of `active` rows.

        Args:
            beginning: of the row, if it is not swapped out.
        """
        if not self._groups():
            new = np.array([len(self._ids[row]) - int(self._pads[row]) + 1])
            return self._cache.state.pools.have_room(np.zeros_like(new), new)
        needed: dict[int, int] = {}
        available: dict[int, int] = {}
        swapped = self._swapped.get(row)
        pending = [
            columns - int(self._pads[other]) - self._fed(other)
            for columns, each in self._running.items()
            for other in each.rows
        ]
        for group in self._groups():
            size, budget = group.pool.block_size, group.pool.budget
            tokens = len(self._ids[row]) - int(self._pads[row])
            blocks = beginning.num_blocks(group, tokens + 1) if swapped is None else swapped.num_blocks(group) + 1
            blocks += active + sum(-(-tokens // size) for tokens in pending if tokens > 1)
            needed[id(budget)] = needed.get(id(budget), 0) + blocks * group.pool.block_bytes
            available[id(budget)] = budget.free_bytes + sum(
                other.pool.num_cached * other.pool.block_bytes
                for other in self._groups()
                if other.pool.budget is budget
            )
        return all(needed[budget] <= available[budget] for budget in needed)

    def _wait(self, row: int, num_tokens: int) -> bool:
        """Wait until calls of other threads have freed blocks for the only row that runs; False if none can.

        It keeps its blocks where it came before all others.
        """
        if not self._line.has_others:
            return False
        if not self._line.is_first:
            self._preempt(row)
            return self._wait_for(row)
        lengths, new = np.array([self._fed(row)]), np.array([num_tokens])
        enough = functools.partial(self._cache.state.pools.have_room, lengths, new)
        return self._line.wait(enough, holds=bool(lengths[0]))

    def _wait_for(self, row: int) -> bool:
        """Likewise for the first row that waits, while none runs."""
        return self._line.wait(functools.partial(self._fits, row, 0), holds=False)

    def _preempt(self, row: int) -> None:
        for columns, each in list(self._running.items()):
            if row in each.rows:
                self._ids[row] = each.ids[each.rows.index(row)]
                rest = [i for i, other in _places(each) if other != row]
                self._running[columns] = each.take(rest)
                if not rest:
                    del self._running[columns]
        if self._swaps and self._fed(row) and (swapped := swap_out(self._groups(), row)) is not None:
            self._swapped[row] = swapped
        self._empty([row])
        heapq.heappush(self._waiting, row)

    def _forget_kept(self, besides: int | None = None) -> bool:
        """Drop what waiting rows have swapped out and hold shared blocks of; whether there were any."""
        kept = [row for row, swapped in self._swapped.items() if row != besides and swapped.keeps_blocks]
        for row in kept:
            del self._swapped[row]
        return bool(kept)

    def _fed(self, row: int) -> int:
        """Tokens of the row that the cache holds."""
        lengths = self._cache.state.seq_lens
        return int(lengths[row]) if len(lengths) else 0

    def _empty(self, rows: list[int]) -> None:
        for group in self._groups():
            group.empty(np.array(rows, dtype=np.int64))

    def _groups(self) -> list[LayerGroup]:
        return list(self._cache.state.groups.values())


def _places(each: _Rows) -> list[tuple[int, int]]:
    """(place, row) of each row."""
    return list(enumerate(each.rows))
