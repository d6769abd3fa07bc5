"""Engine: the steps of generate_many, each with one packed forward pass at most."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Hashable

import numpy as np
import torch
from transformers import PreTrainedModel

from torch_paged.hf.call import NeedsOwnAttention
from torch_paged.hf.many.alone import generate_alone
from torch_paged.hf.many.assistant import Assistant
from torch_paged.hf.many.batch import Batch, Passed
from torch_paged.hf.many.drafts import Drafts
from torch_paged.hf.many.outcome import Outcome
from torch_paged.hf.many.placement import Placement
from torch_paged.hf.many.plan import plan
from torch_paged.hf.many.prepare import prepare
from torch_paged.hf.many.request import FinishReason, GenerationRequest, GenerationResult, NewTokens
from torch_paged.hf.many.results import Results
from torch_paged.hf.many.room import Room
from torch_paged.hf.many.rows import Rows
from torch_paged.hf.many.select import kind
from torch_paged.hf.many.sequence import Sequence
from torch_paged.hf.many.source import Source
from torch_paged.hf.many.stats import Counts, now
from torch_paged.hf.many.waiting import Waiting
from torch_paged.memory import PoolExhausted

Ints = np.ndarray
Events = list["NewTokens | GenerationResult"]


class Engine:
    """Everything that is kept from one step to the next.

    A step admits the requests that have waited longest, as far as rows, tokens and blocks allow, runs one pass over
    decode steps and chunks of prompts (Orca's continuous batching, OSDI 2022, with Sarathi's chunked prefills, arXiv
    2308.16369), chooses tokens, and gives back the rows that are done. Where blocks run out, the sequence that has
    waited the shortest loses its own, to CPU memory or to be computed again later (PagedAttention, arXiv 2309.06180,
    section 4.5).

    Args:
        batch: of the model.
        requests: taken one by one as there is room.
        take: makes a Sequence of a request.
        max_num_batched_tokens: tokens of one pass.
        assistant: drafts for those that may have drafts.
        assistant_model: the same, as `generate` gets it.
        problem: why no request of this model can share passes; None = they can.

    Attributes:
        is_idle: nothing runs or waits, and requests may come yet.
    """

    def __init__(
        self,
        batch: Batch,
        requests: Source,
        take: Callable[[GenerationRequest], Sequence],
        max_num_batched_tokens: int,
        assistant: Assistant | None,
        assistant_model: PreTrainedModel | None,
        problem: str | None,
    ) -> None:
        on_pressure = batch.handle.config.on_pressure
        self.counts = Counts()
        self.outcome = Outcome(batch.device, self.counts)
        self._batch, self._assistant_model = batch, assistant_model
        self._rows = Rows(batch.num_rows)
        self._waiting = Waiting(requests, take)
        self._max_tokens = max_num_batched_tokens
        self._problem = problem
        self._room = Room(sure=batch.deterministic or on_pressure == "error")
        self._drafts = Drafts(batch.model, assistant, max_num_batched_tokens, off=batch.deterministic)
        self._preempts = on_pressure != "error"
        self._placement = Placement(
            batch, self._rows, self._waiting, self._drafts, self.counts, swaps=on_pressure == "swap"
        )
        self._results = Results(batch, self._rows, self._placement, self._drafts, self.counts, self.outcome, self._end)
        self._chunk = max(1, max_num_batched_tokens - batch.num_rows) if batch.deterministic else None
        self.is_idle = False
        self._cancelled: set[Hashable] = set()
        self._lock = threading.Lock()
        self._line = batch.pools.line
        self._place = self._line.add()

    def cancel(self, request_id: Hashable) -> None:
        """End a request at the next step; from any thread."""
        with self._lock:
            self._cancelled.add(request_id)

    @torch.no_grad()
    def step(self) -> tuple[Events, bool]:
        """One step; what came of it, and whether there may be more."""
        start = now()
        self.outcome.events = []
        try:
            with self._line.computing(self._place):
                self._drop_cancelled_and_late()
                self._admit()
                if len(self._rows.used):
                    self._run()
        finally:
            self.counts.seconds += now() - start
        if not len(self._rows.used):
            self._line.move_back(self._place)
        more = bool(len(self._rows.used)) or self._waiting.first() is not None
        self.is_idle = not more and not self._waiting.is_over
        return self.outcome.events, more or self.is_idle

    def close(self) -> None:
        """Give all blocks back."""
        self._line.remove(self._place)
        self._placement.close()
        self._batch.close()
        self._drafts.close()

    # Admission.

    def _drop_cancelled_and_late(self) -> None:
        running = [self._rows.sequence(row) for row in self._rows.used.tolist()]
        ending = [(each, self._reason_to_end(each)) for each in [*running, *self._waiting]]
        for sequence, reason in ending:
            if reason is not None:
                self._end(sequence, reason)

    def _reason_to_end(self, sequence: Sequence) -> FinishReason | None:
        with self._lock:
            if sequence.request_id in self._cancelled:
                return "cancelled"
        if sequence.deadline is not None and now() >= sequence.deadline:
            return "timeout"
        return None

    def _admit(self) -> None:
        used = self._rows.used
        left = self._max_tokens - int(self._rows.pending[used].sum())
        while left > 0 and not self._rows.is_full:
            sequence = self._waiting.first()
            if sequence is None:
                return
            if (reason := self._reason_to_end(sequence)) is not None:
                self._end(sequence, reason)
                continue
            if not self._is_prepared(sequence):
                continue
            assert sequence.prepared is not None
            if self._problem is not None or sequence.prepared.alone is not None:
                # It needs all memory, perhaps: those that run come to their end first.
                if len(self._rows.used):
                    return
                self._waiting.remove(sequence)
                sequence.forget_swapped()
                self._run_alone(sequence)
                continue
            if self._placement.begins_with_what_is_being_computed(sequence):
                return
            if len(self._rows.used):
                # Calls of other threads that wait go before those that have not begun.
                if self._line.others_wait or not self._room.is_enough(self._batch, self._rows, sequence):
                    return
            else:
                self._line.wait_behind()
            self._waiting.remove(sequence)
            try:
                left -= len(sequence.tokens) - self._placement.place(sequence)
            except PoolExhausted as error:
                self._waiting.put_back(sequence)
                if len(self._rows.used):
                    return
                if not self._placement.forget_kept(besides=sequence) and not self._wait_for(sequence):
                    self._end(sequence, "error", error.with_traceback(None))

    def _is_prepared(self, sequence: Sequence) -> bool:
        """Prepare a sequence that is to be admitted for the first time; False if it failed, and is done."""
        if sequence.prepared is not None:
            return True
        try:
            if sequence.error is not None:
                raise sequence.error
            sequence.prepared = prepare(self._batch.model, sequence.request, sequence.tokens, self._assistant_model)
            sequence.kind = kind(sequence)
            if not self._batch.deterministic:
                # What other calls have computed was computed beside others.
                sequence.prefixes = self._batch.handle.row_prefixes(sequence.request.salt)
            sequence.generator = torch.Generator(self._batch.device).manual_seed(sequence.seed)
            self._drafts.begin(sequence)
            self.outcome.begin(sequence)
        except Exception as error:
            self._end(sequence, "error", error)
            return False
        return True

    def _run_alone(self, sequence: Sequence) -> None:
        reasons: list[FinishReason | None] = [None]

        def stop() -> bool:
            reasons[0] = self._reason_to_end(sequence)
            return reasons[0] is not None

        # It may have begun beside others, before its model was found not to share passes.
        known = sequence.num_told

        def tell(tokens: list[int]) -> None:
            nonlocal known
            known, new = max(0, known - len(tokens)), tokens[known:]
            if new:
                self.outcome.first_token(sequence, now())
                self.outcome.tell(sequence, new)

        self.counts.alone += 1
        try:
            returned = generate_alone(self._batch.model, sequence, self._assistant_model, stop, tell)
        except Exception as error:
            self._end(sequence, "error", error)
        else:
            self.outcome.returned(sequence, returned, reasons[0])

    # A pass.

    def _run(self) -> None:
        drafts, errors = self._drafts.of(self._rows)
        for row, error in errors.items():
            self._end(self._rows.sequence(row), "error", error)
        while len(self._rows.used):
            num_tokens = plan(self._rows, drafts, self._max_tokens, self._chunk)
            passed = self._pass(num_tokens, drafts)
            if passed is not None:
                self._results.use(passed, num_tokens, drafts)
                return
            drafts = {row: draft for row, draft in drafts.items() if self._rows.sequences[row] is not None}

    def _pass(self, num_tokens: Ints, drafts: dict[int, Ints]) -> Passed | None:
        """The pass; None where it found too few blocks or cannot be, and some sequences do not run any more."""
        rows = self._rows
        room = num_tokens - rows.pending
        drafted = {row: draft[: room[row]] for row, draft in drafts.items() if room[row] > 0}
        drafts.clear()
        drafts.update(drafted)
        counts = np.ones(self._batch.num_rows, dtype=np.int64)
        for row, draft in drafts.items():
            counts[row] += len(draft)
        input_ids = torch.from_numpy(rows.inputs(num_tokens, drafts)).to(self._batch.device)
        try:
            passed = self._batch.run(num_tokens, input_ids, counts)
        except PoolExhausted as error:
            self._make_room(error)
            return None
        except NeedsOwnAttention as needs:
            self._problem = str(needs)
            for row in rows.used.tolist():
                self._placement.put_back(row)
            return None
        self.counts.forwards += 1
        self.counts.tokens_drafted += sum(map(len, drafts.values()))
        prefill = rows.pending > 1
        self.counts.mixed_forwards += bool(num_tokens[prefill].any() and num_tokens[~prefill].any())
        return passed

    def _make_room(self, error: PoolExhausted) -> None:
        """Let fewer sequences run after a pass found too few blocks."""
        used = self._rows.used
        youngest = int(used[-1])
        if len(used) > 1 and not self._rows.computed[used].any():
            # Nothing was known of the pool when they were admitted.
            block_size = self._batch.handle.config.block_size
            for row in used[self._room.num_fitting(self._rows, error.free, block_size) :].tolist():
                self._placement.put_back(row)
        elif len(used) > 1 and self._preempts:
            self._room.preempted()
            self._placement.preempt(youngest)
        else:
            # It loses its row where it waits.
            sequence = self._rows.sequence(youngest)
            if len(used) > 1 or not (self._placement.forget_kept() or self._wait(youngest)):
                self._end(sequence, "error", error.with_traceback(None))

    def _wait(self, row: int) -> bool:
        """Wait until calls of other threads have freed blocks for the only row that runs; False if none can.

        It keeps its blocks where `generate_many` came before all others.
        """
        if not self._preempts or not self._line.has_others:
            return False
        if not self._line.is_first:
            sequence = self._rows.sequence(row)
            self._placement.preempt(row)
            return self._wait_for(sequence)
        lengths, pending = self._rows.computed[[row]], self._rows.pending[[row]]
        enough = functools.partial(self._batch.pools.have_room, lengths, np.minimum(pending, self._max_tokens))
        return self._line.wait(enough, holds=True)

    def _wait_for(self, sequence: Sequence) -> bool:
        """Likewise for a sequence that waits, while no row is used."""
        if not self._preempts:
            return False
        new = np.array([len(sequence.tokens) + 1])
        return self._line.wait(functools.partial(self._batch.pools.have_room, np.zeros_like(new), new), holds=False)

    def _end(self, sequence: Sequence, reason: FinishReason, error: Exception | None = None) -> None:
        if sequence.row >= 0:
            self._placement.leave(sequence.row)
            if reason in ("eos", "length", "stop"):
                assert sequence.prepared is not None
                self._room.ended(sequence, sequence.prepared.max_length)
        else:
            self._waiting.remove(sequence)
            sequence.forget_swapped()
        self._drafts.end(sequence)
        with self._lock:
            self._cancelled.discard(sequence.request_id)
        self.outcome.end(sequence, reason, error)
