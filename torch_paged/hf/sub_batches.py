"""Sub-batches: decoding that begins anew with half of the rows whenever blocks run out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
)

from torch_paged.hf.chosen import Chosen
from torch_paged.hf.chosen_beams import ChosenBeams, choosing
from torch_paged.hf.fresh_cache import FreshCache
from torch_paged.hf.joined import joined, sequences_of
from torch_paged.hf.loop import Loop
from torch_paged.hf.progress import Progress
from torch_paged.hf.row_by_row import as_they_are, end_alone, for_rows
from torch_paged.hf.row_hooks import hooks_of
from torch_paged.hf.row_inputs import inputs_of
from torch_paged.memory import PoolExhausted


@dataclass
class Part:
    """Rows that decode together.

    Attributes:
        chosen: int64 `[rows, columns]`, their prompts and the tokens that they have got already, and get again.
        beams: what their beams have drawn already, and draw again.
        need: bytes with which they would have got further.
    """

    rows: range
    chosen: Tensor | None = None
    beams: ChosenBeams | None = None
    need: int = 0

    def halves(self, unit: int) -> list[Part]:
        half = len(self.rows) // unit // 2
        return [self._some(slice(half), unit), self._some(slice(half, None), unit)]

    def _some(self, units: slice, unit: int) -> Part:
        rows = slice(unit * (units.start or 0), None if units.stop is None else unit * units.stop)
        chosen = None if self.chosen is None else self.chosen[rows]
        return Part(self.rows[rows], chosen, None if self.beams is None else self.beams.of(units))


class SubBatches:
    """One decoding loop of stock, over all rows or over contiguous parts of them, each from its beginning to its end.

    What a row gets does not depend on the rows beside it, so that greedy tokens are those of the whole batch.

    Args:
        loop: `_sample` or `_beam_search`.
        tell: called when rows are divided.
    """

    def __init__(self, loop: Loop, tell: Callable[[], None]) -> None:
        self._loop, self._ids, self._inputs, self._tell = loop, loop.input_ids, loop.inputs, tell
        self._begun, self._criteria = as_they_are(loop.processors), loop.criteria
        # The caller's own see the first try, as in stock, copies of what they were see the others.
        self._is_first = True
        self._fresh, self._used = FreshCache(loop.inputs["past_key_values"]), False
        self._streaming: dict[str, Any] = {}

    def sample(self, streaming: dict[str, Any], chosen: Tensor | None = None) -> Any:
        """`_sample`.

        Args:
            streaming: more arguments of the first try, in which all rows run.
            chosen: int64 `[rows, columns]`, the prompts and what was chosen for them already, by a loop that failed.

        Returns: sequences or an output of stock's, as `joined` joins them.

        Raises:
            PoolExhausted: one row alone does not fit.
        """
        self._streaming, self._used = streaming, chosen is not None
        done = self._run_parts([Part(range(len(self._ids)), chosen)], 1, self._sample_part)
        if len(done) > 1 and not end_alone(self._criteria):
            done = self._go_on(done)
        return self._joined(done, self._loop.pad_token)

    def beam_search(self) -> Any:
        """`_beam_search`; raises PoolExhausted where the beams of one prompt do not fit."""
        config = self._loop.config
        whole = Part(range(len(self._ids)), beams=ChosenBeams() if config.do_sample else None)
        done = self._run_parts([whole], config.num_beams, self._beam_part)
        return self._joined(done, _beam_fill(config))

    def _run_parts(self, waiting: list[Part], unit: int, run: Callable[[Part], Any]) -> list[tuple[Part, Any]]:
        """What each part gave, in their order."""
        done: list[tuple[Part, Any]] = []
        state = self._fresh.paged.state
        while waiting:
            part = waiting.pop(0)
            if self._used:
                self._begin_anew()
            self._used, state.divides = True, len(part.rows) > unit
            try:
                with hooks_of(self._loop.model, part.rows, len(self._ids)):
                    done.append((part, run(part)))
                continue
            except PoolExhausted as error:
                exhausted = error.with_traceback(None)
                part.need = max(part.need, self._fresh.needed(error))
            finally:
                state.divides = False
            self._begin_anew()
            if len(part.rows) > unit:
                self._tell()
                waiting[:0] = part.halves(unit)
            elif self._fresh.wait(part.need):
                waiting[:0] = [part]
            else:
                raise exhausted
        return done

    def _begin_anew(self) -> None:
        self._is_first = False
        self._inputs = self._inputs | {"past_key_values": self._fresh.again()}

    def _go_on(self, done: list[tuple[Part, Any]]) -> list[tuple[Part, Any]]:
        """All parts as long as the longest: stock goes on with rows that have ended until all have."""
        width = max(sequences_of(result).shape[1] for _, result in done)
        limits = [each for each in self._criteria if isinstance(each, MaxTimeCriteria)]
        if any(bool(limit(self._ids, None).any()) for limit in limits):
            return done
        self._criteria = StoppingCriteriaList([MaxLengthCriteria(width), *limits])
        longer: list[tuple[Part, Any]] = []
        for part, result in done:
            if (sequences := sequences_of(result)).shape[1] < width:
                longer += self._run_parts([Part(part.rows, sequences)], 1, self._sample_part)
            else:
                longer.append((part, result))
        return longer

    def _sample_part(self, part: Part) -> Any:
        processors, chosen = self._processors_of(part.rows), None
        if part.chosen is not None:
            config = self._loop.config
            chosen = Chosen(part.chosen, bool(config.return_dict_in_generate and config.output_scores))
            processors.append(chosen)
        ids = self._ids[part.rows.start : part.rows.stop]
        progress = Progress(self._criteria, ids, chosen)
        try:
            streaming, self._streaming = self._streaming, {}
            result = self._loop.run(ids, processors, progress, **streaming, **self._inputs_of(part.rows))
        except PoolExhausted:
            if part.chosen is None or progress.ids.shape[1] > part.chosen.shape[1]:
                part.chosen = progress.ids
            raise
        if chosen is not None and getattr(result, "scores", None) is not None:
            result.scores = chosen.seen(result.scores)
        return result

    def _beam_part(self, part: Part) -> Any:
        ids = self._ids[part.rows.start : part.rows.stop]
        part.beams = None if part.beams is None else part.beams.of(slice(None))
        with choosing(part.beams):
            return self._loop.run(ids, self._processors_of(part.rows), self._criteria, **self._inputs_of(part.rows))

    def _processors_of(self, rows: range) -> LogitsProcessorList:
        if self._is_first:
            return LogitsProcessorList(self._loop.processors)
        return for_rows(self._begun, rows, len(self._ids))

    def _inputs_of(self, rows: range) -> dict[str, Any]:
        return inputs_of(self._inputs, rows, len(self._ids))

    def _joined(self, done: list[tuple[Part, Any]], fill: int) -> Any:
        if len(done) > 1:
            self._begin_anew()
        result = joined([result for _, result in done], [len(part.rows) for part, _ in done], fill)
        for name in ("hidden_states", "attentions"):
            # Of the prompts: stock repeats them neither for beams nor for samples.
            if getattr(result, f"encoder_{name}", None) is not None:
                result[f"encoder_{name}"] = self._loop.inputs["encoder_outputs"][name]
        return result


def _beam_fill(config: GenerationConfig) -> int:
    """What stock has behind the end of a sequence."""
    pad: Any = config._pad_token_tensor
    eos: Any = config._eos_token_tensor
    return -1 if eos is None else int(pad or eos[0])
