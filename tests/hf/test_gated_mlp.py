"""Gated MLPs of native passes run by torch.ops.paged.gated_linear where nobody looks inside, all others by PyTorch."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import torch_paged

from .fast_ops import rows_of_calls
from .models import assert_same_tokens, batch, generate, tiny, twin

LAYERS = 3  # of the tiny models


def mlps(model: PreTrainedModel) -> list[Any]:
    return [layer.mlp for layer in model.model.layers]


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral", "gemma2"])
def test_tokens_are_those_of_stock(name: str) -> None:
    """Also of a prefill of more rows than few."""
    model = tiny(name)
    inputs = batch([5, 9, 40])
    expected = generate(model, inputs, max_new_tokens=12, eos_token_id=None)
    other = twin(model)
    with torch_paged.paged(other), rows_of_calls("gated_linear") as rows:
        actual = generate(other, inputs, max_new_tokens=12, eos_token_id=None)
    layers = len(mlps(model))
    # The last one for the tokens whose logits are asked alone, in models in which nothing else sees its output.
    last = 54 if name == "gemma2" else 3
    assert rows == [54] * (layers - 1) + [last] + 11 * [3] * layers
    assert_same_tokens(model, expected, actual, inputs)


def test_with_biases() -> None:
    model = tiny("llama")
    for mlp in mlps(model):
        for name in ("gate_proj", "up_proj", "down_proj"):
            old = getattr(mlp, name)
            layer = nn.Linear(old.in_features, old.out_features)
            layer.weight = old.weight
            nn.init.normal_(layer.bias)
            setattr(mlp, name, layer)
    inputs = batch([5, 9])
    expected = generate(model, inputs)
    with torch_paged.paged(model), rows_of_calls("gated_linear") as rows:
        actual = generate(model, inputs)
    assert rows
    assert_same_tokens(model, expected, actual, inputs)


def _knob(model: PreTrainedModel) -> dict[str, Any]:
    return {"fast_layers": False}


def _other_activation(model: PreTrainedModel) -> dict[str, Any]:
    for mlp in mlps(model):
        mlp.act_fn = nn.ReLU()
    return {}


def _exact_gelu(model: PreTrainedModel) -> dict[str, Any]:
    for mlp in mlps(model):
        mlp.act_fn = nn.GELU()
    return {}


def _own_forward(model: PreTrainedModel) -> dict[str, Any]:
    for mlp in mlps(model):
        plain = mlp.up_proj.forward
        mlp.up_proj.forward = lambda x, plain=plain: 0.5 * plain(x)
    return {}


def _compiled(model: PreTrainedModel) -> dict[str, Any]:
    for mlp in mlps(model):
        mlp.up_proj.compile(backend="eager")
    return {}


def _scripted(model: PreTrainedModel) -> dict[str, Any]:
    for mlp in mlps(model):
        mlp.act_fn = torch.jit.trace(nn.SiLU(), torch.ones(1))
    return {}


def _own_linear(model: PreTrainedModel) -> dict[str, Any]:
    class Own(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 0.5 * super().forward(input)

    for mlp in mlps(model):
        mlp.gate_proj.__class__ = Own
    return {}


def _own_mlp(model: PreTrainedModel) -> dict[str, Any]:
    class Own(type(mlps(model)[0])):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> Any:
            return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))

    for mlp in mlps(model):
        mlp.__class__ = Own
    return {}


@pytest.mark.parametrize(
    "change", [_knob, _other_activation, _exact_gelu, _own_forward, _compiled, _scripted, _own_linear, _own_mlp]
)
def test_others_run_by_pytorch(change: Callable[[PreTrainedModel], dict[str, Any]]) -> None:
    model = tiny("llama")
    knobs = change(model)
    inputs = batch([5, 9, 2])
    expected = generate(model, inputs)
    with torch_paged.paged(model, **knobs), rows_of_calls("gated_linear") as rows:
        actual = generate(model, inputs)
    assert rows == []
    assert_same_tokens(model, expected, actual, inputs)


@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "act_fn"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_see_what_they_see_in_stock(kind: str, name: str) -> None:
    """And the layers that nobody looks into run by the op, the hooked one too when the hook is gone."""
    model = tiny("llama")
    inputs = batch([5])
    seen: list[torch.Tensor] = []
    with torch_paged.paged(model):
        handle = getattr(getattr(mlps(model)[1], name), kind)(lambda module, *given: seen.append(given[-1]))
        with rows_of_calls("gated_linear") as rows:
            generate(model, inputs, max_new_tokens=1)
        assert len(seen) == 1 and len(rows) == LAYERS - 1
        handle.remove()
        with rows_of_calls("gated_linear") as rows:
            generate(model, inputs, max_new_tokens=1)
        assert len(seen) == 1 and len(rows) == LAYERS


def test_global_hooks_see_every_module() -> None:
    model = tiny("llama")
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *given: seen.append(module))
    try:
        with torch_paged.paged(model), rows_of_calls("gated_linear") as rows:
            generate(model, batch([5]), max_new_tokens=1)
            assert {mlp.gate_proj for mlp in mlps(model)} <= set(seen)
    finally:
        handle.remove()
    assert rows == []


def test_the_result_of_the_whole_reaches_its_hooks() -> None:
    model = tiny("llama")
    with torch_paged.paged(model), rows_of_calls("gated_linear") as rows:
        seen: list[Any] = []
        handle = mlps(model)[1].register_forward_hook(lambda module, given, result: seen.append((given[0], result)))
        generate(model, batch([5]), max_new_tokens=1)
        handle.remove()
    assert len(rows) == LAYERS
    ((input, result),) = seen
    with torch.no_grad():
        assert torch.allclose(result, mlps(model)[1](input), rtol=1e-4, atol=1e-5)


def test_other_ways_to_call_it_end_as_in_stock() -> None:
    model = tiny("llama")
    mlp = mlps(model)[0]
    ends: list[Any] = []

    def outcome(*args: Any, **kwargs: Any) -> Any:
        try:
            return mlp(*args, **kwargs)
        except Exception as error:
            return type(error)

    def call_it(*arguments: Any) -> None:
        x = torch.linspace(-1, 1, mlp.gate_proj.in_features)
        ends.extend([outcome(x), outcome(x=x), outcome(), outcome(x, x), outcome(x[:-1]), outcome(x.double())])

    with torch.no_grad():
        call_it()
        stock = ends.copy()
        ends.clear()
        torch_paged.patch(model)
        model.lm_head.register_forward_hook(call_it)
        model(**batch([5]), past_key_values=torch_paged.PagedCache(model.config))
    assert stock[2:] == ends[2:] == [TypeError, TypeError, RuntimeError, RuntimeError]
    for expected, actual in zip(stock[:2], ends[:2], strict=True):
        assert torch.allclose(expected, actual, rtol=1e-4, atol=1e-5)


def test_under_autocast_and_with_gradients_by_pytorch() -> None:
    model = tiny("llama")
    inputs = batch([5, 9])
    with torch_paged.paged(model), rows_of_calls("gated_linear") as rows:
        with torch.autocast("cpu", torch.bfloat16):
            generate(model, inputs)
        model(**inputs, past_key_values=torch_paged.PagedCache(model.config))
    assert rows == []


def test_modules_are_stock_again() -> None:
    model = tiny("llama")
    (stock,) = {type(mlp) for mlp in mlps(model)}
    torch_paged.patch(model)
    assert stock not in {type(mlp) for mlp in mlps(model)}
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert {type(mlp) for mlp in mlps(other)} == {stock}
    torch_paged.unpatch(model)
    assert {type(mlp) for mlp in mlps(model)} == {stock}


@pytest.mark.parametrize("of_activation", [False, True])
def test_a_replaced_method_is_the_one_that_runs(of_activation: bool) -> None:
    """As libraries replace the methods of transformers' classes."""
    model = tiny("llama")
    mlp = mlps(model)[0]
    cls = type(mlp.act_fn if of_activation else mlp)
    inputs = batch([5, 9])
    once = cls.forward

    def twice(self: Any, x: torch.Tensor) -> Any:
        return 2 * once(self, x)

    with torch_paged.paged(model), rows_of_calls("gated_linear") as rows, mock.patch.object(cls, "forward", twice):
        actual = generate(model, inputs)
    assert rows == []
    with mock.patch.object(cls, "forward", twice):
        assert_same_tokens(model, generate(model, inputs), actual, inputs)
