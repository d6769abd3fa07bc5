"""Training steps of a patched model are stock's bit for bit: losses, every gradient, every weight after a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import torch_paged

from .models import WITH_IMPLEMENTATION, batch, generate, tiny, tiny_t5, twin

# Plain, dropout, windows, softcap, sinks, attention code of its own, a model that gathers, and T5.
MODELS = [*WITH_IMPLEMENTATION, ("t5", None)]


def _model(name: str, attn_implementation: str | None) -> PreTrainedModel:
    if name == "t5":
        return tiny_t5()
    model = tiny(name, attn_implementation=attn_implementation)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "sinks" in parameter_name:
                parameter.normal_()
    return model


def _gradients(model: PreTrainedModel) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def _loss(model: PreTrainedModel, inputs: dict[str, Tensor], **kwargs: Any) -> Tensor:
    return model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100), **kwargs).loss


def _step(model: PreTrainedModel) -> list[Tensor]:
    """Ragged rows, and the cache that models make by default in training mode too."""
    loss = _loss(model, batch([20, 7]))
    loss.backward()
    return [loss, *_gradients(model)]


def _without_cache(model: PreTrainedModel) -> list[Tensor]:
    loss = _loss(model, batch([17, 17]), use_cache=False)
    loss.backward()
    return [loss, *_gradients(model)]


def _accumulation(model: PreTrainedModel) -> list[Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(2):
        for micro in range(2):
            loss = _loss(model, batch([15, 6], seed=2 * step + micro)) / 2
            loss.backward()
            losses.append(loss)
        optimizer.step()
        optimizer.zero_grad()
    return [*losses, *(parameter.detach() for parameter in model.parameters())]


def _autocast(model: PreTrainedModel) -> list[Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        loss = _loss(model, batch([20, 7]))
    loss.backward()
    return [loss, *_gradients(model)]


def _checkpointing(model: PreTrainedModel) -> list[Tensor]:
    model.gradient_checkpointing_enable()
    try:
        return _step(model)
    finally:
        model.gradient_checkpointing_disable()


def _between_generates(model: PreTrainedModel) -> list[Tensor]:
    """As in reinforcement learning: rollout, training step on it, rollout with the new weights."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    inputs = batch([9, 5])
    results = []
    for _ in range(2):
        tokens = generate(model.eval(), inputs, max_new_tokens=8)
        model.train()
        loss = _loss(model, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})
        loss.backward()
        results += [tokens, loss, *_gradients(model)]
        optimizer.step()
        optimizer.zero_grad()
    return results


STEPS: list[Callable[[PreTrainedModel], list[Tensor]]] = [
    _step, _without_cache, _accumulation, _autocast, _checkpointing, _between_generates,
]  # fmt: skip


def _assert_equal(expected: list[Tensor], actual: list[Tensor]) -> None:
    assert len(expected) == len(actual) > 1
    for number, (want, got) in enumerate(zip(expected, actual, strict=True)):
        assert torch.equal(want, got), f"tensor {number} of {len(expected)}"


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__.strip("_"))
@pytest.mark.parametrize(("name", "attn_implementation"), MODELS)
def test_steps_are_stocks(
    name: str, attn_implementation: str | None, step: Callable[[PreTrainedModel], list[Tensor]]
) -> None:
    model = _model(name, attn_implementation)
    stock = twin(model)
    results = []
    for which in (stock, model):
        if which is model:
            torch_paged.patch(model, block_size=4)
        # The same dropout in both.
        torch.manual_seed(3)
        results.append(step(which.train()))
    _assert_equal(*results)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2-sliding"])
def test_packed_sequences_are_stocks(name: str, attn_implementation: str) -> None:
    """Two sequences in one row, told apart by their positions alone."""
    model = _model(name, attn_implementation)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    tokens = batch([20])["input_ids"]
    positions = torch.cat([torch.arange(12), torch.arange(8)])[None]

    def packed(model: PreTrainedModel) -> list[Tensor]:
        output = model(tokens, position_ids=positions, labels=tokens, use_cache=False)
        output.loss.backward()
        return [output.loss, output.logits, *_gradients(model)]

    stock = packed(twin(model).train())
    with torch_paged.paged(model):
        actual = packed(model.train())
    _assert_equal(stock, actual)
    # And the mask between the sequences is in it: the second one does not see the first.
    alone = model(tokens[:, 12:], use_cache=False).logits
    torch.testing.assert_close(actual[1][:, 12:], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("patched", [True, False])
def test_backward_through_a_paged_cache_raises_instead_of_losing_gradients(patched: bool) -> None:
    model, inputs = tiny("llama"), batch([9, 9])
    if patched:
        torch_paged.patch(model)
    cache = torch_paged.PagedCache(model.config)
    output = model(**inputs, labels=inputs["input_ids"], past_key_values=cache)
    with pytest.raises(RuntimeError, match="backward through a PagedCache"):
        output.loss.backward()
