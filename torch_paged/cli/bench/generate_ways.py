"""The ways that `bench generate` compares: what came out of a call, when, and in how many bytes of keys and values."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, set_seed

import torch_paged
from torch_paged.cli.bench.generate_cases import GenerateCase
from torch_paged.cli.bench.generate_model import with_same_weights

PAD = 0
NO_TOKEN = -1


@dataclass(frozen=True)
class Run:
    """One call, or the calls of a chat one after the other.

    Attributes:
        tokens: per returned sequence the new tokens that were asked for.
        marks: seconds since the call, when all rows had their first token and after every step from then on. Of several
            calls: as if their prefills had been first.
        seconds: of the whole call.
        peak_kv_bytes: keys and values held when they were most; None where the way does not tell.
        prefill_tokens: positions that the model computed before the first tokens; None where the way does not tell.
        slots_used: tokens stored by token slots held, averaged over the steps; None where the way does not tell.
    """

    tokens: list[list[int]]
    marks: list[float]
    seconds: float
    peak_kv_bytes: int | None
    prefill_tokens: int | None = None
    slots_used: float | None = None

    @property
    def prefill(self) -> float:
        return self.marks[0]

    @property
    def steps(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.marks, self.marks[1:], strict=False)]


Way = Callable[[PreTrainedModel, GenerateCase, int], Run]


class NotPossible(Exception):
    """Why a way cannot run a case; the text stands in the table."""


def dynamic(model: PreTrainedModel, case: GenerateCase, seed: int) -> Run:
    run, cache = _generate(model, case, seed)
    return _with_bytes(run, held_bytes(cache))


def static(model: PreTrainedModel, case: GenerateCase, seed: int) -> Run:
    # A model remembers the longest static cache it had, and never makes a shorter one.
    vars(model).pop("_previous_max_cache_length", None)
    run, cache = _generate(model, case, seed, cache_implementation="static", disable_compile=True)
    return _with_bytes(run, held_bytes(cache))


def one_by_one(model: PreTrainedModel, case: GenerateCase, seed: int) -> Run:
    """Stock, a prompt after the other, without padding: what people do about ragged batches."""
    runs = []
    for prompt, wish in zip(case.prompts, case.wishes, strict=True):
        runs.append(dynamic(model, GenerateCase(case.name, [prompt], [wish]), seed))
    return _one_after_the_other(runs, [run.tokens[0] for run in runs])


def paged(block_size: int) -> Way:
    """torch_paged, with blocks of that many tokens."""

    def run(model: PreTrainedModel, case: GenerateCase, seed: int) -> Run:
        return _paged(model, case, seed, block_size=block_size)

    return run


def paged_compiled(block_size: int) -> Way:
    """torch_paged with compile=True, all calls with one model that stays patched: each graph is made once.

    Calls with few tokens make them, of several rows, the same again, and of one row.
    """
    models: dict[int, PreTrainedModel] = {}

    def run(model: PreTrainedModel, case: GenerateCase, seed: int) -> Run:
        if id(model) not in models:
            models[id(model)] = with_same_weights(model)
            torch_paged.patch(models[id(model)], block_size=block_size, compile=True)
        return _paged(models[id(model)], case, seed, block_size=block_size, compile=True)

    return run


def _paged(model: PreTrainedModel, case: GenerateCase, seed: int, **knobs: Any) -> Run:
    with torch_paged.paged(model, prefix_caching=bool(case.turns), **knobs) as handle:
        handle.reset_peak()
        # Whoever asks for the cache gets the rows that are finished too, so that none may leave.
        run, _ = _generate(model, case, seed, handle, return_dict_in_generate=False)
        return _with_bytes(run, handle.stats().peak_bytes)


def held_bytes(cache: Any) -> int:
    """Bytes of the keys and values in a cache of transformers."""
    tensors = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))


class _Clock(StoppingCriteria):  # type: ignore[misc]
    """Notes the time after each step, and ends each row with its wish, as an end-of-sequence token would.

    Args:
        computed: tokens that the model has computed so far, for `prefill_tokens`, those before the first step.
        handle: of a patched model.
    """

    def __init__(
        self,
        case: GenerateCase,
        width: int,
        start: float,
        computed: Callable[[], int],
        handle: torch_paged.PagedHandle | None = None,
    ) -> None:
        self.width, self.start = width, start
        self.marks: list[float] = []
        self.slots_used = list[float]()
        self.prefill_tokens = 0
        self._computed, self._handle = computed, handle
        wishes = torch.tensor(case.wishes)
        # Rows that all end together are ended by max_new_tokens; the rows of beams are not those of the prompts.
        self.wishes = wishes if len(set(case.wishes)) > 1 else None
        if self.wishes is not None:
            # What makes stock pad the rows that are finished, instead of sampling on.
            self.eos_token_id = torch.tensor([NO_TOKEN])

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if not self.marks:
            self.prefill_tokens = self._computed()
        self.marks.append(time.perf_counter() - self.start)
        if self._handle is not None:
            self.slots_used.append(1 - self._handle.stats().waste)
        if self.wishes is None:
            return torch.zeros(len(input_ids), dtype=torch.bool)
        return input_ids.shape[1] - self.width >= self.wishes


def _generate(
    model: PreTrainedModel,
    case: GenerateCase,
    seed: int,
    handle: torch_paged.PagedHandle | None = None,
    **options: Any,
) -> tuple[Run, Any]:
    """Return the run, its bytes not yet counted, and the last cache: what it holds is held as long as it lives."""
    width = max(map(len, case.prompts))
    padded = [[PAD] * (width - len(prompt)) + prompt for prompt in case.prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in case.prompts]
    input_ids, attention_mask = torch.tensor(padded), torch.tensor(mask)
    set_seed(seed)
    run, output = _call(model, case, input_ids, attention_mask, handle, options)
    runs = [run]
    for turn in case.turns:
        history = _sequences(output)
        del output
        input_ids = torch.cat([history, torch.tensor([turn] * len(history))], dim=1)
        run, output = _call(model, case, input_ids, torch.ones_like(input_ids), handle, options)
        runs.append(run)
    if case.turns:
        run = _one_after_the_other(runs, [sum((run.tokens[0] for run in runs), [])])
    return run, None if isinstance(output, Tensor) else output.past_key_values


def _sequences(output: Any) -> Tensor:
    sequences: Tensor = output if isinstance(output, Tensor) else output.sequences
    return sequences


def _call(
    model: PreTrainedModel,
    case: GenerateCase,
    input_ids: Tensor,
    attention_mask: Tensor,
    handle: torch_paged.PagedHandle | None,
    options: dict[str, Any],
) -> tuple[Run, Any]:
    """One call of generate: the run, and what came back."""
    width = input_ids.shape[1]
    with _embedded(model) if handle is None else _computed(handle) as computed:
        start = time.perf_counter()
        clock = _Clock(case, width, start, computed, handle)
        output = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            max_new_tokens=max(case.wishes),
            stopping_criteria=[clock],
            **{"do_sample": False, "return_dict_in_generate": True, **case.options, **options},
        )
        seconds = time.perf_counter() - start
    wishes = [wish for wish in case.wishes for _ in range(case.returned)]
    new = _sequences(output)[:, width:].tolist()
    tokens = [row[:wish] for row, wish in zip(new, wishes, strict=True)]
    used = sum(clock.slots_used) / len(clock.slots_used) if clock.slots_used else None
    return Run(tokens, clock.marks, seconds, None, clock.prefill_tokens, used), output


@contextmanager
def _embedded(model: PreTrainedModel) -> Iterator[Callable[[], int]]:
    """Count the tokens that a stock model embeds meanwhile."""
    embedding, count = model.get_input_embeddings(), 0
    embed = embedding.forward

    def counted(ids: Tensor) -> Tensor:
        nonlocal count
        count += ids.numel()
        embedded: Tensor = embed(ids)
        return embedded

    embedding.forward = counted
    try:
        yield lambda: count
    finally:
        del embedding.forward


@contextmanager
def _computed(handle: torch_paged.PagedHandle) -> Iterator[Callable[[], int]]:
    """Count those of a patched model by its statistics: what changes a module makes compiled code compile again."""
    before = handle.stats().tokens_computed
    yield lambda: handle.stats().tokens_computed - before


def _one_after_the_other(runs: list[Run], tokens: list[list[int]]) -> Run:
    """Several calls as one, whose steps follow one another as if all prefills had been first."""
    marks = [sum(run.prefill for run in runs)]
    for run in runs:
        for step in run.steps:
            marks.append(marks[-1] + step)
    return Run(
        tokens=tokens,
        marks=marks,
        seconds=sum(run.seconds for run in runs),
        peak_kv_bytes=max(run.peak_kv_bytes or 0 for run in runs),
        prefill_tokens=sum(run.prefill_tokens or 0 for run in runs),
    )


def _with_bytes(run: Run, peak_kv_bytes: int) -> Run:
    return replace(run, peak_kv_bytes=peak_kv_bytes)
