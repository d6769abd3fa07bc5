"""Drafts: tokens that a sequence may get next, to be verified in one pass (prompt lookup; an assistant model)."""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from torch_paged.hf.many.assistant import Assistant
from torch_paged.hf.many.rows import Rows
from torch_paged.hf.many.sequence import Sequence
from torch_paged.hf.swapped_row import Swapped

Ints = np.ndarray


class Drafts:
    """What proposes tokens for the sequences that ask for it.

    Args:
        model: that the drafts are for.
        assistant: drafts for sequences that do not look up their own; None = there is none.
        max_tokens: of one pass.
        off: there are no drafts.
    """

    def __init__(self, model: PreTrainedModel, assistant: Assistant | None, max_tokens: int, off: bool) -> None:
        self._model, self._assistant = model, assistant
        self._max_tokens, self._off = max_tokens, off
        self._lookups: dict[int, PromptLookupCandidateGenerator] = {}

    def begin(self, sequence: Sequence) -> None:
        """A sequence is prepared."""
        if (lookup := _lookup_generator(self._model, sequence)) is not None:
            self._lookups[sequence.number] = lookup

    def end(self, sequence: Sequence) -> None:
        """A sequence is done."""
        self._lookups.pop(sequence.number, None)

    def of(self, rows: Rows) -> tuple[dict[int, Ints], dict[int, Exception]]:
        """Drafts by row, of the rows that decode, and from their own tokens of those whose prompts end perhaps.

        The second is what was raised for rows that get none.
        """
        drafts: dict[int, Ints] = {}
        errors: dict[int, Exception] = {}
        if self._off:
            return drafts, errors
        used = rows.used
        assisted = []
        for row, pending in zip(used.tolist(), rows.pending[used].tolist(), strict=True):
            sequence = rows.sequence(row)
            assert sequence.prepared is not None
            if sequence.prepared.method != "_assisted_decoding" or pending > self._max_tokens:
                continue
            if (generator := self._lookups.get(sequence.number)) is None:
                if pending == 1:
                    assisted.append(row)
                continue
            try:
                draft = _looked_up(generator, rows.of_row(row))
            except Exception as error:
                errors[row] = error
                continue
            if not sequence.prepared.config.do_sample:
                # Stock draws for the whole draft, and so must we.
                draft = draft[: int(rows.max_lengths[row] - rows.lengths[row]) - 1]
            drafts[row] = draft
        if assisted and self._assistant is not None:
            of = np.array(assisted)
            drafts |= self._assistant.drafts(of, rows, rows.max_lengths[of] - rows.lengths[of] - 1)
        return {row: draft for row, draft in drafts.items() if len(draft)}, errors

    def keep(self, lengths: Ints) -> None:
        """Let the assistant go back to where the sequences have come, int64 `[rows]`."""
        if self._assistant is not None:
            self._assistant.keep(lengths)

    def empty(self, row: int) -> None:
        """This row holds no sequence any more."""
        if self._assistant is not None:
            self._assistant.empty(np.array([row]))

    def swap_out(self, row: int, length: int) -> Swapped | None:
        """What the assistant has computed of a row's first `length` tokens, moved to CPU memory; None = nothing."""
        return None if self._assistant is None else self._assistant.swap_out(row, length)

    def swap_in(self, swapped: Swapped, row: int) -> None:
        """Let the assistant go on from there."""
        if self._assistant is not None:
            self._assistant.swap_in(swapped, row)

    def close(self) -> None:
        """Give all blocks back."""
        if self._assistant is not None:
            self._assistant.close()


def _lookup_generator(model: PreTrainedModel, sequence: Sequence) -> PromptLookupCandidateGenerator | None:
    """Stock's generator of drafts from the sequence's own tokens, as its `_get_candidate_generator` makes it."""
    prepared = sequence.prepared
    assert prepared is not None
    config = prepared.config
    if prepared.method != "_assisted_decoding" or config.prompt_lookup_num_tokens is None:
        return None
    return PromptLookupCandidateGenerator(
        eos_token_id=None if not len(prepared.eos) else torch.from_numpy(prepared.eos),
        num_output_tokens=config.prompt_lookup_num_tokens,
        max_matching_ngram_size=config.max_matching_ngram_size or 2,
        max_length=prepared.max_length,
        logits_processor=prepared.processors or None,
        vocab_size=model.config.get_text_config().vocab_size,
    )


def _looked_up(generator: PromptLookupCandidateGenerator, tokens: Ints) -> Ints:
    """A draft from the tokens of a sequence.

    Source: prompt lookup decoding, https://github.com/apoorvumang/prompt-lookup-decoding.
    """
    candidates, _ = generator.get_candidates(torch.from_numpy(tokens.copy())[None])
    draft: Ints = candidates[0, len(tokens) :].numpy()
    return draft
