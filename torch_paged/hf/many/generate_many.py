"""generate_many: an iterator over the results of any number of requests, many of which run at once."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from queue import Queue
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from torch_paged.hf.config import PagedConfig
from torch_paged.hf.many.assistant import Assistant
from torch_paged.hf.many.batch import Batch
from torch_paged.hf.many.engine import Engine
from torch_paged.hf.many.prepare import prompt_ids
from torch_paged.hf.many.request import GenerationRequest, GenerationResult, NewTokens, check_fields, id_of
from torch_paged.hf.many.sequence import Sequence as RunningSequence
from torch_paged.hf.many.source import Source, source_of
from torch_paged.hf.many.stats import ManyStats, now
from torch_paged.hf.patch import Borrowed, handle_of, unwrap
from torch_paged.hf.support import Path, Support

Prompt = Tensor | Sequence[int]
# Seconds that a thread waits for what it has dropped to be closed, unless that waits for it.
_COLLECTED = 0.5


def generate_many(
    model: nn.Module,
    requests: Iterable[GenerationRequest | Prompt] | Queue[GenerationRequest | Prompt | None],
    *,
    generation_config: GenerationConfig | None = None,
    assistant_model: nn.Module | None = None,
    stream: bool = False,
    max_num_seqs: int | None = None,
    max_num_batched_tokens: int | None = None,
    deterministic: bool | None = None,
    timeout: float | None = None,
    progress: bool = False,
    **options: Any,
) -> GenerateMany:
    """Run many requests through one model: each gets the tokens that `model.generate` gives for it alone.

    Requests are taken one by one, in their order, as there is room, so that any iterable will do, also an endless one;
    results come in the order in which requests are done. What runs stands still while an iterator makes its next
    request. Where these come from elsewhere, as in a server, give a queue that other threads put them into, and None at
    the end: it is waited on only when nothing runs. Each forward pass computes the next token of every sequence
    that runs beside chunks of prompts, without padding. Where blocks run out, the sequence that has waited the shortest
    gives up its blocks and goes on later: `on_pressure="swap"` of the model's PagedConfig keeps what it has in CPU
    memory, as far as the system has some, "recompute" computes it again. With "error" requests wait for memory for all
    the tokens they may get, and end with PoolExhausted where others take it meanwhile. What a request does wrong is its
    own result: its `error` is set.

    A model that is not patched is patched until the iterator is done. Requests that are rows of a batch of their own
    (beams, several returned sequences), that ask for attentions, hidden states or another cache, and all requests of
    a model whose rows cannot share passes, run one after the other through `model.generate`; a warning names the model
    and the reason.

    Args:
        model: a transformers model with `generate`, or a wrapper around one.
        requests: GenerationRequest, or prompts as token ids: an iterable of them, or a `queue.Queue`.
        generation_config: as of `generate`, for requests that have none.
        assistant_model: drafts for the greedy and sampling requests, which all are verified in one pass. Drafts from a
            sequence's own tokens need no model: `prompt_lookup_num_tokens` in a request's config.
        stream: also yield NewTokens as they come.
        max_num_seqs: sequences that run at once, at most; None = as the model's PagedConfig says, like the next two.
        max_num_batched_tokens: tokens of one forward pass, at most; bounds the memory of activations. At least
            `max_num_seqs`.
        deterministic: a request's logits have the same bits whatever else runs, for the same two numbers: attention is
            computed row by row alike, linear layers in tiles of one shape, prompts in chunks that begin at the same
            places, without drafts or remembered prefixes, and memory for all the tokens a request may get is waited
            for. Slower. Not covered: grouped products of mixtures of experts, and what a request computes again after a
            preemption, which only happens where others use up the pool, and not with `on_pressure="swap"`.
        timeout: seconds that a request may take, from when it is taken; None = any time.
        progress: show a bar.
        **options: keyword arguments of `generate` that set fields of the config, for requests that have no config and
            do not set them themselves.

    Returns:
        An iterator over GenerationResult (and NewTokens), with `cancel`, `stats` and `close`.

    Raises:
        TypeError: `model` or `assistant_model` is no transformers model, or `requests` is neither iterable nor a queue.
        ValueError: a number is out of range, a model cannot generate, or the assistant's rows cannot share passes.
    """
    inner = unwrap(model)
    handle = handle_of(inner)
    knobs = PagedConfig() if handle is None else handle.config
    max_num_seqs = knobs.max_num_seqs if max_num_seqs is None else max_num_seqs
    if max_num_batched_tokens is None:
        max_num_batched_tokens = knobs.max_num_batched_tokens
    for name, value in (("max_num_seqs", max_num_seqs), ("max_num_batched_tokens", max_num_batched_tokens)):
        least = 1 if name == "max_num_seqs" else max_num_seqs
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}: {value!r}; must be an int, at least {least}")
    if timeout is not None and not timeout > 0:
        raise ValueError(f"timeout: {timeout!r}; must be more than 0 seconds, or None")
    source = source_of(requests)
    many = GenerateMany.__new__(GenerateMany)
    defaults = _Defaults(generation_config, options, timeout)
    many._begin(
        inner,
        None if assistant_model is None else unwrap(assistant_model),
        source,
        defaults,
        (max_num_seqs, max_num_batched_tokens),
        knobs.deterministic if deterministic is None else deterministic,
        stream,
        _bar(requests) if progress else None,
    )
    return many


class GenerateMany(Iterator["GenerationResult | NewTokens"]):
    """What `generate_many` returns. Also a context manager that closes itself; blocks are given back by then."""

    def __init__(self) -> None:
        raise TypeError("GenerateMany is made by torch_paged.generate_many(model, requests)")

    def _begin(
        self,
        model: PreTrainedModel,
        assistant: PreTrainedModel | None,
        source: Source,
        defaults: _Defaults,
        sizes: tuple[int, int],
        deterministic: bool,
        stream: bool,
        bar: Any,
    ) -> None:
        self._lock = threading.RLock()
        self._events: deque[GenerationResult | NewTokens] = deque()
        self._more, self._in_step, self._released = True, False, False
        self._exit = ExitStack()
        num_rows, max_tokens = sizes
        self._requests = source
        with ExitStack() as stack:
            handle = stack.enter_context(Borrowed(model))
            batch = Batch(model, handle, num_rows, deterministic)
            problem = batch.problem
            if problem is not None:
                handle.say(Support(Path.GATHER, f"{problem}, so that generate_many runs its requests one by one"))
            drafting = None
            if assistant is not None and problem is None:
                drafting = _assistant(assistant, stack, num_rows, max_tokens, deterministic)
            self._engine = Engine(batch, source, defaults.take, max_tokens, drafting, assistant, problem)
            self._engine.outcome.streams = stream
            self._exit = stack.pop_all()
        self._exit.callback(self._engine.close)
        self._bar = bar

    def __iter__(self) -> GenerateMany:
        return self

    def __next__(self) -> GenerationResult | NewTokens:
        while (event := self._next()) is None:
            # Not under the lock, so that others may close this.
            self._requests.wait()
        if self._bar is not None and isinstance(event, GenerationResult):
            self._bar.update()
        return event

    def _next(self) -> GenerationResult | NewTokens | None:
        """The next event; None where nothing runs and no request is there."""
        with self._lock:
            if self._in_step:
                raise RuntimeError("a request's own code asked for the next result while it is made; must wait for it")
            while not self._events:
                if not self._more:
                    self.close()
                    raise StopIteration
                self._step()
                if self._engine.is_idle and not self._events:
                    return None
            return self._events.popleft()

    def _step(self) -> None:
        self._in_step = True
        try:
            events, more = self._engine.step()
        except BaseException:
            self._in_step = False
            self.close()
            raise
        self._in_step = False
        # A request's own code may have closed this meanwhile.
        if self._more:
            self._events.extend(events)
            self._more = more
        if not self._more:
            self._release()

    def __enter__(self) -> GenerateMany:
        return self

    def __exit__(self, *exception: tuple[type[BaseException], BaseException, TracebackType] | None) -> None:
        self.close()

    def __del__(self) -> None:
        if not hasattr(self, "_engine") or self._released:
            return
        # The cycle collector may run this in any thread, in the middle of an edit of the pools: another thread waits
        # for the edit to end, and this one for that thread only where it need not.
        closing = threading.Thread(target=_close, args=(self._exit, self._bar), daemon=True)
        # At the end of the interpreter no thread can be started.
        with suppress(RuntimeError):
            closing.start()
            closing.join(_COLLECTED)

    def cancel(self, request_id: Hashable) -> None:
        """End a request with what it has; its result says "cancelled". From any thread, at any time before its end.

        Of several with the same id those that were taken by then, or the next one.
        """
        self._engine.cancel(request_id)

    def stats(self) -> ManyStats:
        """What was done so far."""
        return self._engine.counts.stats()

    def close(self) -> None:
        """Drop all requests that are not done, and give every block back."""
        with self._lock:
            self._more = False
            self._events.clear()
            if not self._in_step:
                self._release()
            if self._bar is not None:
                self._bar.close()

    def _release(self) -> None:
        self._released = True
        self._exit.close()


class _Defaults:
    """What requests take over that do not say otherwise, and the numbers they get."""

    def __init__(
        self, generation_config: GenerationConfig | None, options: Mapping[str, Any], timeout: float | None
    ) -> None:
        self._config, self._options, self._timeout = generation_config, options, timeout
        self._count = 0

    def take(self, request: GenerationRequest) -> RunningSequence:
        """A request begins its way."""
        number, self._count = self._count, self._count + 1
        at = now()
        error = None
        tokens = np.empty(0, dtype=np.int64)
        merged = request
        try:
            check_fields(request)
            tokens = prompt_ids(request)
        except Exception as raised:
            error, merged = raised, GenerationRequest((), request_id=id_of(request))
        if merged.generation_config is None:
            merged = replace(merged, generation_config=self._config, options={**self._options, **merged.options})
        timeout = self._timeout if merged.timeout is None else merged.timeout
        return RunningSequence(
            asked=request,
            request=merged,
            request_id=number if merged.request_id is None else merged.request_id,
            number=number,
            tokens=tokens,
            num_prompt_tokens=len(tokens),
            taken=at,
            deadline=None if timeout is None else at + timeout,
            seed=int(torch.randint(2**62, ())) if merged.seed is None else merged.seed,
            error=error,
        )


def _close(stack: ExitStack, bar: Any) -> None:
    stack.close()
    if bar is not None:
        bar.close()


def _assistant(
    model: PreTrainedModel, stack: ExitStack, num_rows: int, max_tokens: int, deterministic: bool
) -> Assistant:
    batch = Batch(model, stack.enter_context(Borrowed(model)), num_rows, deterministic)
    if batch.problem is not None:
        raise ValueError(
            f"assistant_model: {type(model).__name__}; must be a model whose rows can share forward passes, but "
            f"{batch.problem}"
        )
    return Assistant(batch, max_tokens)


def _bar(requests: Any) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=len(requests) if hasattr(requests, "__len__") else None, unit="request")
