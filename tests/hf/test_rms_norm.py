"""RMS norms of native passes run by torch.ops.paged.rms_norm where they are of Llama's kind, all others by PyTorch."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

import torch_paged
from torch_paged.hf.same_code import same_code

from .fast_ops import rows_of_calls
from .models import assert_same_tokens, batch, generate, tiny, twin


def norms(model: PreTrainedModel) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]


# qwen3 norms each head of its queries and keys too.
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "mixtral"])
def test_tokens_are_those_of_stock(name: str) -> None:
    model = tiny(name)
    inputs = batch([5, 9, 2])
    expected = generate(model, inputs, eos_token_id=None, max_new_tokens=8)
    other = twin(model)
    with torch_paged.paged(other), rows_of_calls("rms_norm") as rows:
        actual = generate(other, inputs, eos_token_id=None, max_new_tokens=8)
    assert len(rows) == 8 * len(norms(model)) > 0
    assert rows[0] == 16 and rows[-1] == 3
    assert_same_tokens(model, expected, actual, inputs)


@pytest.mark.parametrize("name", ["gemma2", "gpt2"])
def test_models_without_norms_of_that_kind(name: str) -> None:
    model = tiny(name)
    inputs = batch([5, 9])
    expected = generate(model, inputs)
    with torch_paged.paged(model), rows_of_calls("rms_norm") as rows:
        actual = generate(model, inputs)
    assert rows == []
    assert_same_tokens(model, expected, actual, inputs)


def _knob(model: PreTrainedModel) -> dict[str, Any]:
    return {"fast_layers": False}


def _own_class(model: PreTrainedModel) -> dict[str, Any]:
    class Own(type(norms(model)[0])):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor) -> Any:
            return 2 * super().forward(hidden_states)

    for norm in norms(model):
        norm.__class__ = Own
    return {}


def _own_weights(model: PreTrainedModel) -> dict[str, Any]:
    class Weight(nn.Parameter):
        pass

    for norm in norms(model):
        norm.weight = Weight(norm.weight.detach())
    return {}


def _weights_that_broadcast(model: PreTrainedModel) -> dict[str, Any]:
    for norm in norms(model):
        norm.weight = nn.Parameter(torch.tensor([1.5]))
    return {}


def _eps_of_each_channel(model: PreTrainedModel) -> dict[str, Any]:
    for norm in norms(model):
        norm.variance_epsilon = torch.linspace(1e-6, 1e-5, len(norm.weight))
    return {}


def _parametrized(model: PreTrainedModel) -> dict[str, Any]:
    class Double(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    for norm in norms(model):
        parametrize.register_parametrization(norm, "weight", Double())
    return {}


def _float64(model: PreTrainedModel) -> dict[str, Any]:
    model.double()
    return {}


@pytest.mark.parametrize(
    "change",
    [
        _knob,
        _own_class,
        _own_weights,
        _weights_that_broadcast,
        _eps_of_each_channel,
        _parametrized,
        _float64,
    ],
)
def test_others_run_by_pytorch(change: Callable[[PreTrainedModel], dict[str, Any]]) -> None:
    model = tiny("llama")
    knobs = change(model)
    inputs = batch([5, 9, 2])
    expected = generate(model, inputs)
    with torch_paged.paged(model, **knobs), rows_of_calls("rms_norm") as rows:
        actual = generate(model, inputs)
    assert rows == []
    assert_same_tokens(model, expected, actual, inputs)


def test_eps_may_change() -> None:
    model = tiny("llama")
    inputs = batch([5, 9])
    with torch_paged.paged(model), rows_of_calls("rms_norm") as rows:
        before = generate(model, inputs)
        for norm in norms(model):
            norm.variance_epsilon = 30.0
        actual = generate(model, inputs)
        assert len(rows) > 2 * len(norms(model))
    assert not torch.equal(before, actual)
    assert_same_tokens(model, generate(model, inputs), actual, inputs)


def test_under_autocast_and_with_gradients_by_pytorch() -> None:
    model = tiny("llama")
    inputs = batch([5, 9])
    with torch_paged.paged(model), rows_of_calls("rms_norm") as rows:
        with torch.autocast("cpu", torch.bfloat16):
            generate(model, inputs)
        model(**inputs, past_key_values=torch_paged.PagedCache(model.config))
        assert rows == []
        with torch.no_grad():
            model(**inputs, past_key_values=torch_paged.PagedCache(model.config))
        assert len(rows) == len(norms(model))


def test_hooks_get_the_result() -> None:
    model = tiny("llama")
    seen: list[Any] = []
    with torch_paged.paged(model):
        handle = norms(model)[2].register_forward_hook(lambda module, given, result: seen.append((given[0], result)))
        generate(model, batch([5]), max_new_tokens=1)
        handle.remove()
    ((input, result),) = seen
    with torch.no_grad():
        assert torch.allclose(result, norms(model)[2](input), rtol=1e-5)


def test_modules_are_stock_again() -> None:
    model = tiny("llama")
    (stock,) = {type(norm) for norm in norms(model)}
    torch_paged.patch(model)
    assert stock not in {type(norm) for norm in norms(model)}
    torch_paged.unpatch(model)
    assert {type(norm) for norm in norms(model)} == {stock}


def test_same_code() -> None:
    def known(self: Any, x: Any) -> Any:
        return self.scale * x.mean(-1)

    def renamed(this: Any, y: Any) -> Any:
        return this.scale * y.mean(-1)

    def other_name(self: Any, x: Any) -> Any:
        return self.scale * x.sum(-1)

    def other_constant(self: Any, x: Any) -> Any:
        return self.scale * x.mean(-2)

    def other_order(self: Any, x: Any) -> Any:
        return x.mean(-1) * self.scale

    def more_arguments(self: Any, x: Any, y: Any = None) -> Any:
        return self.scale * x.mean(-1)

    assert same_code(renamed, known)
    for other in (other_name, other_constant, other_order, more_arguments, len, lambda *args: None):
        assert not same_code(other, known)


def test_a_replaced_method_is_the_one_that_runs() -> None:
    """As libraries replace the methods of transformers' classes."""
    model = tiny("llama")
    cls = type(norms(model)[0])
    inputs = batch([5, 9])

    def double(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        return 2 * torch.nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)

    with torch_paged.paged(model), rows_of_calls("rms_norm") as rows, mock.patch.object(cls, "forward", double):
        actual = generate(model, inputs)
    assert rows == []
    with mock.patch.object(cls, "forward", double):
        assert_same_tokens(model, generate(model, inputs), actual, inputs)


def test_what_is_not_contiguous_keeps_its_strides() -> None:
    model = tiny("llama")
    norm = norms(model)[0]
    results: list[torch.Tensor] = []
    x = torch.randn(2, len(norm.weight), 5, generator=torch.Generator().manual_seed(0)).transpose(1, 2)
    with torch_paged.paged(model), torch.no_grad():
        expected = norm(x)
        model.lm_head.register_forward_hook(lambda *arguments: results.append(norm(x)))
        model(**batch([5]), past_key_values=torch_paged.PagedCache(model.config))
    assert results[0].stride() == expected.stride() and torch.equal(results[0], expected)


def test_nothing_keeps_a_class_whose_modules_were_patched() -> None:
    model = tiny("llama")
    names = dict(vars(type(norms(model)[0])))

    def patch_one() -> weakref.ref[Any]:
        cls = type("Own", (nn.Module,), {name: names[name] for name in ("__init__", "forward")})
        model.own = cls.__new__(cls)
        nn.Module.__init__(model.own)
        with torch_paged.paged(model):
            assert type(model.own) is not cls
        del model.own
        return weakref.ref(cls)

    there = patch_one()
    gc.collect()
    assert there() is None
