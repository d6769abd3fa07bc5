"""Decoding waits for the device at most once a step, and its host work does not grow with tokens already there."""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import torch_paged
from torch_paged.hf.turns import Turns

from .counting import count_tokens
from .models import batch, generate, tiny
from .test_on_gpu import both, there
from .waits import count_waits, pretended_gpu

__all__ = ["pretended_gpu"]


def per_step(model: Any, **kwargs: Any) -> Counter[str]:
    """Waits that each of 8 more steps adds."""
    counts = []
    for steps in (4, 12):
        with count_waits() as waits:
            generate(model, there(batch([17, 4, 30])), max_new_tokens=steps, eos_token_id=None, **kwargs)
        counts.append(Counter(waits))
    assert all((counts[1][name] - counts[0][name]) % 8 == 0 for name in counts[1])
    return Counter({name: (counts[1][name] - counts[0][name]) // 8 for name in counts[1]})


def test_what_waits_is_counted(pretended_gpu: None) -> None:
    """On a device: copies to the CPU that are not left to run, reads, and events behind the last of these."""
    tensor, event = torch.arange(4.0).to("cuda"), None
    pinned = torch.empty(4)
    with count_waits() as waits:
        assert tensor.cpu().tolist() == [0.0, 1.0, 2.0, 3.0] == tensor.tolist()
        pinned.copy_(tensor, non_blocking=True)
        pinned.copy_(tensor)
        assert float(tensor.max()) == 3.0 and bool((tensor > 2).any())
        tensor[tensor > 1] = 0.0
        tensor.nonzero()
        for late in (False, True):
            event = torch.Event(device=tensor.device)
            tensor.add_(1)
            event.record()
            if not late:
                tensor.sum().item()
            event.synchronize()
        # Nothing of these is on a device.
        pinned.max().item(), pinned.nonzero(), pinned.cpu(), pinned.to("cuda")
    assert waits == {
        "aten::_to_copy": 2, "aten::copy_": 1, "aten::_local_scalar_dense": 3, "aten::index_put_": 1,
        "aten::nonzero": 1, "event": 1,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "qwen2-sliding", "mistral", "gpt2"])
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"do_sample": True}, {"num_beams": 3}, {"num_beams": 2, "do_sample": True}],
    ids=["greedy", "sampling", "beams", "beams that draw"],
)
def test_a_step_waits_once_as_stocks_does(pretended_gpu: None, name: str, kwargs: dict[str, Any]) -> None:
    stock, model = both(name)
    expected = per_step(stock, **kwargs)
    with torch_paged.paged(model):
        ours = per_step(model, **kwargs)
    assert ours.total() == 1 == expected.total()


@pytest.mark.parametrize("kwargs", [{}, {"do_sample": True}, {"num_beams": 2}], ids=["greedy", "sampling", "beams"])
def test_steps_wait_once_while_rows_leave(pretended_gpu: None, kwargs: dict[str, Any]) -> None:
    _, model = both("llama")
    options: dict[str, Any] = dict(max_new_tokens=24, eos_token_id=list(range(150, 211))) | kwargs
    counts, computed = [], []
    for drop in (True, False):
        with (
            torch_paged.paged(model, drop_finished_rows=drop),
            count_tokens(model) as tokens,
            count_waits() as waits,
        ):
            generate(model, there(batch([17, 4, 30])), **options)
        counts.append(Counter(waits))
        computed.append(sum(tokens))
    assert counts[0] == counts[1] and computed[0] < computed[1]


@pytest.mark.parametrize("kwargs", [{}, {"do_sample": True}])
def test_steps_wait_once_while_rows_take_turns(pretended_gpu: None, kwargs: dict[str, Any]) -> None:
    """However many lengths the running rows have."""
    (_, model), inputs = both("llama"), there(batch([17, 9, 21, 5, 12]))
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
