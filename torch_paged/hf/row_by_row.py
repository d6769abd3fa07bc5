"""Which processors and criteria look at each row by itself, so that rows may wait for one another."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    LogitsProcessorList,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation import logits_process, stopping_criteria

_PROCESSORS = """
    EpsilonLogitsWarper EtaLogitsWarper ExponentialDecayLengthPenalty ForcedBOSTokenLogitsProcessor
    ForcedEOSTokenLogitsProcessor InfNanRemoveLogitsProcessor LogitNormalization MinLengthLogitsProcessor
    MinNewTokensLengthLogitsProcessor MinPLogitsWarper NoBadWordsLogitsProcessor NoRepeatNGramLogitsProcessor
    PrefixConstrainedLogitsProcessor RepetitionPenaltyLogitsProcessor SequenceBiasLogitsProcessor
    SuppressTokensAtBeginLogitsProcessor SuppressTokensLogitsProcessor TemperatureLogitsWarper TopHLogitsWarper
    TopKLogitsWarper TopPLogitsWarper TypicalLogitsWarper
""".split()  # noqa: SIM905
_CRITERIA = ["EosTokenCriteria", "MaxLengthCriteria", "MaxTimeCriteria", "StopStringCriteria"]


def works_row_by_row(processors: Iterable[Any], criteria: Iterable[Any]) -> bool:
    """Whether what these say of a row depends on that row alone. Subclasses and a caller's own are not known to."""
    return _known(processors, logits_process, _PROCESSORS) and _known(criteria, stopping_criteria, _CRITERIA)


def end_alone(criteria: Iterable[Any]) -> bool:
    """Whether a row ends when its criterion is met, or all rows at one length; else stock goes on with all of them."""
    criteria = list(criteria)
    return any(hasattr(criterion, "eos_token_id") for criterion in criteria) or all(
        type(criterion).__name__ == "MaxLengthCriteria" for criterion in criteria
    )


def keep_state(processors: Iterable[Any]) -> bool:
    """Whether one of them keeps what it has seen of the rows, so that it can only begin with others anew.

    Guidance decodes rows of its own beside these, over a cache of its own; SynthID remembers the contexts of each row.
    """
    return any(isinstance(each, _WITH_STATE) for each in processors)


def as_they_are(processors: Iterable[Any]) -> LogitsProcessorList:
    """Copies of those that keep a state, as it is now, and the others."""
    return LogitsProcessorList([_copy(each) if isinstance(each, _WITH_STATE) else each for each in processors])


def for_rows(processors: Iterable[Any], rows: Sequence[int], num_rows: int) -> LogitsProcessorList:
    """The processors for a batch of these rows alone, of `num_rows`.

    The repetition penalty keeps a length for each row, those that look at the prompt keep it, guidance has prompts of
    its own, and what tokens are allowed depends on a row's place.
    """
    return LogitsProcessorList([_for_rows(processor, list(rows), num_rows) for processor in processors])


_WITH_STATE = (SynthIDTextWatermarkLogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor)


def _copy(processor: Any) -> Any:
    processor = copy.copy(processor)
    if hasattr(processor, "unconditional_context"):
        processor.unconditional_context = dict(processor.unconditional_context)
    if getattr(processor, "state", None) is not None:
        processor.state = copy.copy(processor.state)
    return processor


def _for_rows(processor: Any, rows: list[int], num_rows: int) -> Any:
    kind = type(processor)
    if kind is PrefixConstrainedLogitsProcessor:
        allowed, num_beams = processor._prefix_allowed_tokens_fn, processor._num_beams
        prompts = [row // num_beams for row in rows[::num_beams]]
        return PrefixConstrainedLogitsProcessor(lambda place, ids: allowed(prompts[place], ids), num_beams)
    lengths = getattr(processor, "prompt_ignore_length", None)
    if kind is RepetitionPenaltyLogitsProcessor and isinstance(lengths, Tensor):
        processor = copy.copy(processor)
        processor.prompt_ignore_length = lengths[rows]
    elif kind is EncoderRepetitionPenaltyLogitsProcessor:
        processor = copy.copy(processor)
        # With beams stock has fewer rows of these, and penalises the first ones alone.
        prompts = [row for row in rows if row < len(processor.encoder_input_ids)]
        processor.encoder_input_ids = processor.encoder_input_ids[prompts]
    elif kind is EncoderNoRepeatNGramLogitsProcessor:
        processor = copy.copy(processor)
        num_beams = num_rows // processor.batch_size
        processor.generated_ngrams = [processor.generated_ngrams[row // num_beams] for row in rows]
        processor.batch_size = len(rows)
    elif isinstance(processor, _WITH_STATE):
        processor = _copy(processor)
        context = getattr(processor, "unconditional_context", {})
        for name in ("input_ids", "attention_mask"):
            if isinstance(value := context.get(name), Tensor) and len(value) > 1:
                context[name] = value[rows]
        if (state := getattr(processor, "state", None)) is not None:
            state.context, state.context_history = state.context[rows], state.context_history[rows]
    return processor


def _known(given: Iterable[Any], module: Any, names: list[str]) -> bool:
    known = {getattr(module, name) for name in names if hasattr(module, name)}
    return all(type(one) in known for one in given)
