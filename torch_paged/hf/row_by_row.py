"""Which processors and criteria look at each row by itself, so that rows may wait for one another."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from transformers import LogitsProcessorList, PrefixConstrainedLogitsProcessor, RepetitionPenaltyLogitsProcessor
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


def for_rows(processors: Iterable[Any], rows: Sequence[int]) -> LogitsProcessorList:
    """The processors for a batch of these rows alone.

    The repetition penalty keeps a length for each row, and what tokens are allowed depends on a row's place.
    """
    return LogitsProcessorList([_for_rows(processor, rows) for processor in processors])


def _for_rows(processor: Any, rows: Sequence[int]) -> Any:
    if type(processor) is PrefixConstrainedLogitsProcessor:
        allowed, num_beams = processor._prefix_allowed_tokens_fn, processor._num_beams
        prompts = [row // num_beams for row in rows[::num_beams]]
        return PrefixConstrainedLogitsProcessor(lambda place, ids: allowed(prompts[place], ids), num_beams)
    lengths = getattr(processor, "prompt_ignore_length", None)
    if type(processor) is not RepetitionPenaltyLogitsProcessor or not isinstance(lengths, Tensor):
        return processor
    processor = copy.copy(processor)
    processor.prompt_ignore_length = lengths[list(rows)]
    return processor


def _known(given: Iterable[Any], module: Any, names: list[str]) -> bool:
    known = {getattr(module, name) for name in names if hasattr(module, name)}
    return all(type(one) in known for one in given)
