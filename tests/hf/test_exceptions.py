"""Whatever fails in the middle of generate, wherever: no block held, the next call is fine, unpatch restores."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LogitsProcessorList, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

import torch_paged
from tests.commit_sample import commit_sample, head
from torch_paged.memory.allocator import BlockAllocator

from .host_state import host_state
from .models import assert_same_tokens, batch, generate, tiny, tiny_t5


class Planted(Exception):
    pass


class Plant:
    """Raises at its n-th visit; before that it only counts."""

    def __init__(self, error: BaseException, at: int | None = None) -> None:
        self.error, self.at, self.visits = error, at, 0

    def visit(self) -> None:
        self.visits += 1
        if self.visits - 1 == self.at:
            raise self.error


Place = Callable[[PreTrainedModel, Plant], Any]


@contextmanager
def _processor(model: PreTrainedModel, plant: Plant) -> Iterator[dict[str, Any]]:
    def processor(ids: Tensor, scores: Tensor) -> Tensor:
        plant.visit()
        return scores

    yield {"logits_processor": LogitsProcessorList([processor])}


@contextmanager
def _criterion(model: PreTrainedModel, plant: Plant) -> Iterator[dict[str, Any]]:
    def criterion(ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        plant.visit()
        return torch.zeros(len(ids), dtype=torch.bool)

    yield {"stopping_criteria": [criterion]}


@contextmanager
def _streamer(model: PreTrainedModel, plant: Plant) -> Iterator[dict[str, Any]]:
    class Streamer(BaseStreamer):
        def put(self, value: Tensor) -> None:
            plant.visit()

        def end(self) -> None:
            plant.visit()

    yield {"streamer": Streamer()}


@contextmanager
def _hooks(model: PreTrainedModel, plant: Plant) -> Iterator[dict[str, Any]]:
    """Before and after every submodule, the model itself among them."""
    removable = []
    for module in model.modules():
        removable.append(module.register_forward_pre_hook(lambda module, args: plant.visit()))
        removable.append(module.register_forward_hook(lambda module, args, output: plant.visit()))
    try:
        yield {}
    finally:
        for hook in removable:
            hook.remove()


@contextmanager
def _ops(model: PreTrainedModel, plant: Plant) -> Iterator[dict[str, Any]]:
    """Before and after every paged op."""

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace != "paged":
                return func(*args, **(kwargs or {}))
            plant.visit()
            result = func(*args, **(kwargs or {}))
            plant.visit()
            return result

    with Mode():
        yield {}


@contextmanager
def _allocator(model: PreTrainedModel, plant: Plant) -> Iterator[dict[str, Any]]:
    allocate = BlockAllocator.allocate

    def counted(self: BlockAllocator, *args: Any, **kwargs: Any) -> Any:
        plant.visit()
        return allocate(self, *args, **kwargs)

    with mock.patch.object(BlockAllocator, "allocate", counted):
        yield {}


PLACES: dict[str, tuple[Place, BaseException]] = {
    "processor": (_processor, Planted("in a processor")),
    "criterion": (_criterion, Planted("in a criterion")),
    "streamer": (_streamer, BrokenPipeError("in a streamer")),
    "hook": (_hooks, Planted("in a hook")),
    "interrupt": (_hooks, KeyboardInterrupt()),
    "op": (_ops, torch.OutOfMemoryError("in an op")),
    "allocator": (_allocator, torch_paged.PoolExhausted(needed=3, free=1)),
}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "chunked prefill": {"prefill_chunk_size": 5},
    "assisted": {},
}
ONE_ROW = ("prompt lookup", "assisted")
# Where in a call something fails, in thousandths of the visits that a place has: three by commit.
DRAWN, THOUSANDTHS, HEAD = 3, [f"{number:03}" for number in range(1000)], head()


def with_points(*case: str) -> Any:
    points = commit_sample(THOUSANDTHS, DRAWN, f"{HEAD} {case}")
    return pytest.param(*case, points, id="-".join([*case, "at", *points]))


# Callbacks fail between forward passes, the same way in every loop; the rest may fail in the middle of one.
CASES = [
    *(("mistral", mode, place) for mode in ("greedy", "assisted") for place in ("processor", "criterion", "streamer")),
    *(("mistral", mode, place) for mode in MODES for place in ("hook", "op", "allocator")),
    *(("diffllama", mode, place) for mode in ("greedy", "beams") for place in ("processor", "hook", "op")),
    ("mistral", "beams", "interrupt"),
    ("mistral", "beams", "processor"),
]


@pytest.mark.parametrize(("name", "mode", "place", "points"), [with_points(*case) for case in CASES])
def test_exceptions_at_points_drawn_by_commit(name: str, mode: str, place: str, points: list[str]) -> None:
    model, inputs = tiny(name), batch([20] if mode in ONE_ROW else [20, 5])
    kwargs = dict(eos_token_id=None, max_new_tokens=6, **MODES[mode])
    models = [model]
    if mode == "assisted":
        kwargs["assistant_model"] = assistant = tiny("mistral-full")
        models.append(assistant)
    check(models, inputs, kwargs, place, points)


@pytest.mark.parametrize(
    ("mode", "place", "points"), [with_points(mode, place) for mode in ("greedy", "beams") for place in ("hook", "op")]
)
def test_exceptions_in_encoder_decoders(mode: str, place: str, points: list[str]) -> None:
    kwargs = dict(eos_token_id=None, max_new_tokens=6, **MODES[mode])
    check([tiny_t5()], batch([12, 5]), kwargs, place, points)


def test_a_model_that_drafts_for_itself() -> None:
    model, inputs = tiny("llama"), batch([20])
    kwargs = dict(eos_token_id=None, max_new_tokens=6, assistant_early_exit=1)
    expected = generate(model, inputs, **kwargs)
    with torch_paged.paged(model, block_size=4) as handle:
        for point in (0, 30, 60, 90):
            with pytest.raises(Planted) as raised, _hooks(model, Plant(Planted("in a hook"), point)):
                generate(model, inputs, **kwargs)
            assert raised.value.__traceback__ is not None and handle.stats().blocks_used == 0
            # transformers leaves the model with the draft's layers where the draft fails.
            model.config.num_hidden_layers = 3
            assert torch.equal(generate(model, inputs, **kwargs), expected)


def test_caches_of_other_models_outlive_a_generate_that_fails() -> None:
    """A processor that generates with a model of its own, and keeps what that returns."""
    model, other, inputs = tiny("llama"), tiny("qwen2"), batch([9])
    kept: list[Any] = []

    def processor(ids: Tensor, scores: Tensor) -> Tensor:
        kept.append(generate(other, inputs, max_new_tokens=3, return_dict_in_generate=True).past_key_values)
        if len(kept) == 3:
            raise Planted("in a processor")
        return scores

    with torch_paged.paged(model) as handle, torch_paged.paged(other) as others:
        with pytest.raises(Planted):
            generate(model, inputs, eos_token_id=None, logits_processor=LogitsProcessorList([processor]))
        assert handle.stats().blocks_used == 0 < others.stats().blocks_used
        assert [cache.get_seq_length() for cache in kept] == [11] * 3


@pytest.mark.parametrize("place", ["processor", "hook", "op", "allocator"])
def test_a_conversation_goes_on_after_a_turn_that_failed(place: str) -> None:
    """The caller's cache keeps the turns before, and its copy shares their blocks: neither sees half a forward pass."""
    model, inputs = tiny("llama"), batch([13, 5])
    kwargs = dict(eos_token_id=None, max_new_tokens=6)
    place_it, error = PLACES[place]

    def turn(model: PreTrainedModel, tokens: Tensor, **kwargs: Any) -> Any:
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, tokens.shape[1] - 13, dtype=torch.long)], 1)
        kwargs |= dict(return_dict_in_generate=True, output_logits=True)
        return generate(model, {"input_ids": tokens, "attention_mask": mask}, **kwargs)

    tokens = generate(model, inputs, **kwargs)
    tokens = torch.cat([tokens, batch([4, 4], seed=1)["input_ids"]], 1)
    expected = turn(model, tokens, **kwargs)
    with torch_paged.paged(model, block_size=4) as handle:
        cache = turn(model, inputs["input_ids"], **kwargs).past_key_values
        length, counter = cache.get_seq_length(), Plant(error)
        with place_it(model, counter) as extra:
            turn(model, tokens, past_key_values=copy.deepcopy(cache), **kwargs, **extra)
        for point in range(0, counter.visits, -(-counter.visits // 12)):
            twin = copy.deepcopy(cache)
            with pytest.raises(type(error)), place_it(model, Plant(error, point)) as extra:
                turn(model, tokens, past_key_values=twin, **kwargs, **extra)
            twin.crop(length - twin.get_seq_length())
            for again in (twin, copy.deepcopy(cache)):
                actual = turn(model, tokens, past_key_values=again, **kwargs)
                assert torch.equal(actual.sequences, expected.sequences), f"point {point}"
                torch.testing.assert_close(actual.logits, expected.logits)
            error.__traceback__ = None
            del twin, again, actual
        del cache
        assert handle.stats().blocks_used == 0


def check(
    models: list[PreTrainedModel], inputs: dict[str, Tensor], kwargs: dict[str, Any], where: str, points: list[str]
) -> None:
    model = models[0]
    place, error = PLACES[where]
    expected = generate(model, inputs, **kwargs)
    before = [host_state(each) for each in models]
    # Where rows may wait, blocks that run out are no failure.
    handles = [torch_paged.patch(each, block_size=4, on_pressure="error") for each in models]
    # The first call also makes the pools.
    generate(model, inputs, **kwargs)
    counter = Plant(error)
    with place(model, counter) as extra:
        generate(model, inputs, **kwargs, **extra)
    assert counter.visits > 0
    drawn = {int(point) * counter.visits // 1000 for point in points}
    for point in sorted({*drawn, counter.visits - 1}):
        with pytest.raises(type(error)) as raised, place(model, Plant(error, point)) as extra:
            generate(model, inputs, **kwargs, **extra)
        # The traceback still holds generate's frames, and no block all the same.
        assert raised.value is error and error.__traceback__ is not None
        assert [handle.stats().blocks_used for handle in handles] == [0] * len(handles), f"point {point}"
        actual = generate(model, inputs, **kwargs)
        if model.config.is_encoder_decoder:
            assert torch.equal(actual, expected)
        else:
            assert_same_tokens(model, expected, actual, prompt=inputs)
    for each in models:
        torch_paged.unpatch(each)
    assert [host_state(each) for each in models] == before
    assert torch.equal(generate(model, inputs, **kwargs), expected)
