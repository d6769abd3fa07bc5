"""Decoding waits for the device at most once a step, and its host work does not grow with tokens already there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import torch_paged
from torch_paged.hf.turns import Turns

from .counting import count_tokens
from .models import batch, generate, tiny
from .test_leaving import Watcher, run


class _Waits(TorchDispatchMode):
    """Ops that make the host wait for a device, whichever the device is here."""

    def __init__(self, waits: Counter[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"):
            self.waits[name] += 1
        # A mask of bool that is indexed with is a nonzero inside.
        if name == "aten::index" and any(index is not None and index.dtype == torch.bool for index in args[1]):
            self.waits[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def count_waits() -> Iterator[Counter[str]]:
    """By ops, and by the methods that copy to the host, which run no op for a tensor that is there already."""
    waits: Counter[str] = Counter()

    def counted(name: str) -> Any:
        stock = getattr(Tensor, name)

        def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            waits[name] += 1
            return stock(self, *args, **kwargs)

        return mock.patch.object(Tensor, name, method)

    with _Waits(waits), counted("cpu"), counted("tolist"):
        yield waits


def _per_step(model: Any, **kwargs: Any) -> Counter[str]:
    """Waits that each of 8 more steps adds."""
    counts = []
    for steps in (4, 12):
        with count_waits() as waits:
            generate(model, batch([17, 4, 30]), max_new_tokens=steps, eos_token_id=None, **kwargs)
        counts.append(Counter(waits))
    assert all((counts[1][name] - counts[0][name]) % 8 == 0 for name in counts[1])
    return Counter({name: (counts[1][name] - counts[0][name]) // 8 for name in counts[1]})


@pytest.mark.parametrize("name", ["llama", "qwen2-sliding", "mistral", "gpt2"])
@pytest.mark.parametrize("kwargs", [{}, {"do_sample": True}])
def test_a_step_waits_once_as_stocks_does(name: str, kwargs: dict[str, Any]) -> None:
    model = tiny(name)
    stock = _per_step(model, **kwargs)
    with torch_paged.paged(model):
        ours = _per_step(model, **kwargs)
    assert ours.total() == 1 == ours["aten::_local_scalar_dense"]
    assert ours <= stock


@pytest.mark.parametrize("name", ["llama", "qwen2-sliding"])
def test_a_step_of_beams_waits_for_their_order_besides(name: str) -> None:
    model = tiny(name)
    with torch_paged.paged(model):
        ours = _per_step(model, num_beams=3)
    assert ours.total() - ours["cpu"] == 1 == ours["cpu"]


def test_steps_wait_once_while_rows_leave() -> None:
    model = tiny("llama")
    with torch_paged.paged(model), count_tokens(model) as tokens, count_waits() as waits:
        run(model, Watcher())
    assert len(set(tokens[1:])) == 3, "not all rows left"
    with torch_paged.paged(model, drop_finished_rows=False), count_waits() as without:
        run(model, Watcher())
    assert waits == without


@pytest.mark.parametrize("kwargs", [{}, {"do_sample": True}])
def test_steps_wait_once_while_rows_take_turns(kwargs: dict[str, Any]) -> None:
    """However many lengths the running rows have."""
    model, inputs = tiny("llama"), batch([17, 9, 21, 5, 12])
    step, each, lengths = Turns._step, list[int](), list[int]()

    def counted(self: Turns) -> None:
        lengths.append(len(self._running))
        before = waits.total()
        step(self)
        each.append(waits.total() - before)

    # Three layers with K and V of 2 heads of 16, float32.
    knobs: dict[str, Any] = dict(block_size=4, max_memory=15 * 3 * 2 * 4 * 2 * 16 * 4, on_pressure="recompute")
    with torch_paged.paged(model, **knobs), mock.patch.object(Turns, "_step", counted), count_waits() as waits:
        generate(model, inputs, max_new_tokens=12, eos_token_id=None, **kwargs)
    assert max(lengths) > 1 == max(each)


def test_a_mask_that_was_written_to_is_read_again() -> None:
    """A loop of one's own may hide columns in the mask that it goes on with."""
    model, inputs = tiny("llama"), batch([9, 9])

    def loop(cache: Any) -> Tensor:
        kwargs = dict(inputs, past_key_values=cache, use_cache=True)
        ids, logits = kwargs.pop("input_ids"), []
        for step in range(3):
            prepared = model.prepare_inputs_for_generation(ids, next_sequence_length=1 if step else None, **kwargs)
            prepared["position_ids"] = (kwargs["attention_mask"].cumsum(1) - 1)[:, -prepared["input_ids"].shape[1] :]
            outputs = model(**prepared, return_dict=True)
            logits.append(outputs.logits[:, -1])
            kwargs = model._update_model_kwargs_for_generation(outputs, kwargs)
            if step == 1:
                kwargs["attention_mask"][0, 2:5] = 0
            ids = torch.cat([ids, torch.full((2, 1), 5)], 1)
        return torch.stack(logits)

    with torch.no_grad():
        expected = loop(None)
        with torch_paged.paged(model):
            actual = loop(torch_paged.PagedCache(model.config))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
