"""Finished rows leave: what decoding loops know of them reaches the cache, which frees them before the next call."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteriaList

from torch_paged.hf.cache import PagedCache
from torch_paged.hf.finished import Finished
from torch_paged.hf.prefix_call import sequence_rows
from torch_paged.hf.state import CacheState


class _Watched(StoppingCriteriaList):  # type: ignore[misc]
    """Stopping criteria that tell `finished` which rows they end; what they answer is theirs."""

    def __init__(self, criteria: StoppingCriteriaList, finished: Finished) -> None:
        super().__init__(criteria)
        self._criteria, self._finished = criteria, finished

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        done: Tensor = self._criteria(input_ids, scores, **kwargs)
        self._finished.tell(done)
        self._finished.sequences = input_ids
        return done


@contextmanager
def leaving(
    model: PreTrainedModel, cache: PagedCache | None, criteria: StoppingCriteriaList
) -> Iterator[StoppingCriteriaList]:
    """For `_sample` of `model`: criteria for it, that let finished rows of `cache` leave.

    As stock does, rows are only finished where a criterion has an `eos_token_id`; else it goes on with them.
    """
    if cache is None or not any(hasattr(criterion, "eos_token_id") for criterion in criteria):
        yield criteria
        return

    def remember(rows: np.ndarray, sequences: Tensor | None) -> None:
        prefixes = cache.state.prefixes
        if prefixes is not None and sequences is not None:
            tokens = sequence_rows(cache.state, sequences) or []
            prefixes.remember(model, cache.state, [each if rows[i] else None for i, each in enumerate(tokens)])

    with _telling(cache, Finished(remember)) as finished:
        yield _Watched(criteria, finished)


@contextmanager
def beams_leaving(cache: PagedCache | None, watching: Sequence[Any]) -> Iterator[None]:
    """For `_beam_search`: the beams of a prompt leave together, when `tell_of_beams` hears that they are done.

    Args:
        watching: processors and criteria. Those of the caller's own see the beams that stock goes on with when they
            can no longer be chosen, so that no beams leave.
    """
    outer = _beams.finished
    if cache is None or not all(type(each).__module__.startswith("transformers.") for each in watching):
        _beams.finished = None
        try:
            yield
        finally:
            _beams.finished = outer
        return
    with _telling(cache, Finished(lambda rows, sequences: None)) as finished:
        _beams.finished = finished
        try:
            yield
        finally:
            _beams.finished = outer


@contextmanager
def order_read_late(cache: PagedCache | None) -> Iterator[None]:
    """For `_beam_search`: the order of beams comes to the host together with whether it goes on, see `whether_on`."""
    if cache is None:
        yield
        return
    outer, _beams.state = _beams.state, cache.state
    cache.state.order_is_read_late = True
    try:
        yield
    finally:
        _beams.state, cache.state.order_is_read_late = outer, False


def whether_on(unfinished: Any) -> Any:
    """`unfinished`, bool `[]`, on the host where the order of beams is waited for anyway: once for both."""
    state = _beams.state
    if state is None or state.order is None or not isinstance(unfinished, Tensor):
        return unfinished
    both = torch.cat([state.order, unfinished.reshape(1).to(state.order)]).cpu()
    state.settle_order(both[:-1])
    return bool(both[-1])


def tell_of_beams(improvable: Tensor, sent_finished: Tensor, early_stopping: bool | str) -> None:
    """What `_beam_search` knows after a step, of each prompt.

    Args:
        improvable: bool `[prompts, 1]`, whether running beams can still better the finished ones.
        sent_finished: bool `[prompts, num_beams]`, which places hold a finished sequence.
        early_stopping: True takes nothing in any more once all places are filled.
    """
    if _beams.finished is not None:
        done = ~improvable[:, 0]
        if early_stopping is True:
            done = done | sent_finished.all(dim=1)
        _beams.finished.tell(done.repeat_interleave(sent_finished.shape[1]))


@contextmanager
def _telling(cache: PagedCache, finished: Finished) -> Iterator[Finished]:
    cache.state.finished = finished
    try:
        yield finished
    finally:
        cache.state.finished = None


class _Beams(threading.local):
    finished: Finished | None = None
    state: CacheState | None = None


_beams = _Beams()
