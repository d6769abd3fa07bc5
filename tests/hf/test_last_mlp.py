"""The last layer's MLP runs for the tokens whose logits are asked, where nobody sees what it gives for the others."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

import torch_paged
from torch_paged.hf.packed import packed_call

from .fast_ops import rows_of_calls
from .models import CONFIGS, assert_same_tokens, batch, generate, sharpen, tiny, twin


def rows_of_mlps(model: PreTrainedModel) -> AbstractContextManager[list[int]]:
    """How many rows the down projection of each layer's MLP gets, call by call; no hook that would be noticed."""
    return _Rows([layer.mlp.down_proj for layer in model.model.layers])


class _Rows:
    def __init__(self, projections: list[nn.Linear]) -> None:
        self.rows: list[int] = []
        self.sizes = {projection.weight.data_ptr() for projection in projections}

    def __enter__(self) -> list[int]:
        linear = torch.nn.functional.linear

        def counted(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            if weight.data_ptr() in self.sizes:
                self.rows.append(input.shape[:-1].numel())
            return linear(input, weight, bias)

        self.patch = mock.patch.object(torch.nn.functional, "linear", counted)
        self.patch.__enter__()
        return self.rows

    def __exit__(self, *error: Any) -> None:
        self.patch.__exit__(*error)


# By PyTorch's functions, in which the rows can be counted.
KNOBS: dict[str, Any] = dict(fast_layers=False)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen2-sliding", "qwen3", "mistral"])
@pytest.mark.parametrize("fast", [False, True])
def test_tokens_are_those_of_stock(name: str, fast: bool) -> None:
    model = tiny(name)
    inputs = batch([5, 9, 40])
    expected = generate(model, inputs, max_new_tokens=3, eos_token_id=None)
    other = twin(model)
    counted = rows_of_calls("gated_linear") if fast else rows_of_mlps(other)
    with torch_paged.paged(other, fast_layers=fast), counted as rows:
        actual = generate(other, inputs, max_new_tokens=3, eos_token_id=None)
    assert rows == [54, 54, 3] + 2 * [3, 3, 3]
    assert_same_tokens(model, expected, actual, inputs)


@pytest.mark.parametrize("name", ["gemma", "gemma2", "mixtral", "gpt2"])
def test_models_of_other_kinds(name: str) -> None:
    model = tiny(name)
    inputs = batch([5, 9])
    expected = generate(model, inputs)
    with torch_paged.paged(model):
        assert_same_tokens(model, expected, generate(model, inputs), inputs)


def test_chunks_of_which_no_logits_are_asked() -> None:
    model = tiny("llama")
    inputs = batch([5, 40])
    expected = generate(model, inputs, max_new_tokens=2, eos_token_id=None)
    other = twin(model)
    with torch_paged.paged(other, max_prefill_tokens=16, **KNOBS), rows_of_mlps(other) as rows:
        actual = generate(other, inputs, max_new_tokens=2, eos_token_id=None)
    last = rows[2::3]
    assert rows[::3] == rows[1::3] and sum(rows[::3]) == 45 + 2 and sum(last) == 2 + 2 and 0 in last
    assert_same_tokens(model, expected, actual, inputs)


@pytest.mark.parametrize(("lengths", "rows_of_last"), [([9, 9], 6), ([9], 3), ([5, 9], 6)])
def test_several_logits_of_each_row(lengths: list[int], rows_of_last: int) -> None:
    """With padding and without, in which the rows are not packed."""
    model = tiny("llama")
    inputs = batch(lengths)
    with torch.no_grad():
        expected = model(**inputs, logits_to_keep=3).logits
        torch_paged.patch(model, **KNOBS)
        with rows_of_mlps(model) as rows:
            cache = torch_paged.PagedCache(model.config, **KNOBS)
            inputs["position_ids"] = inputs["attention_mask"].cumsum(1).sub(1).clamp(min=0)
            actual = model(**inputs, past_key_values=cache, logits_to_keep=3).logits
    assert rows == [sum(lengths), sum(lengths), rows_of_last]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [dict(logits_to_keep=0), dict(), dict(logits_to_keep=9), dict(logits_to_keep=20)])
def test_all_logits(options: dict[str, int]) -> None:
    model = tiny("llama")
    inputs = batch([9, 9])
    with torch.no_grad():
        expected = model(**inputs).logits
        torch_paged.patch(model, **KNOBS)
        with rows_of_mlps(model) as rows:
            actual = model(**inputs, past_key_values=torch_paged.PagedCache(model.config, **KNOBS), **options).logits
    assert rows == [18, 18, 18]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_with_gradients_it_runs_for_all() -> None:
    model = tiny("llama")
    torch_paged.patch(model, **KNOBS)
    with rows_of_mlps(model) as rows:
        model(**batch([9, 9]), past_key_values=torch_paged.PagedCache(model.config, **KNOBS), logits_to_keep=1)
    assert rows == [18, 18, 18]


def test_packed_call() -> None:
    model = tiny("llama")
    tokens = batch([9])["input_ids"][0]
    with torch.no_grad():
        expected = model(tokens[None]).logits[0]
        torch_paged.patch(model)
        num_tokens = torch.tensor([9]).numpy()
        for asked in ([8], [0, 3, 8], [8, 2, 2], [-1], [0, -2], list(range(9)), []):
            cache = torch_paged.PagedCache(model.config)
            actual = packed_call(model, cache, num_tokens, tokens, logits_to_keep=torch.tensor(asked, dtype=torch.long))
            torch.testing.assert_close(actual.logits[0], expected[asked], rtol=1e-4, atol=1e-5)


def _hidden_states(model: PreTrainedModel) -> dict[str, Any]:
    return {"output_hidden_states": True, "return_dict_in_generate": True}


def _hidden_states_by_config(model: PreTrainedModel) -> dict[str, Any]:
    model.config.output_hidden_states = True
    return {}


def _hook(choose: Callable[[Any], nn.Module], pre: bool = False) -> Callable[[PreTrainedModel], dict[str, Any]]:
    def look(*given: Any) -> None: ...

    # With hooks of others no row is packed anyhow, those of torch and transformers are known to look at no row.
    look.__module__ = "torch.tests"

    def register(model: PreTrainedModel) -> dict[str, Any]:
        module = choose(model.model)
        (module.register_forward_pre_hook if pre else module.register_forward_hook)(look)
        return {}

    return register


def _own_forward(model: PreTrainedModel) -> dict[str, Any]:
    plain = model.forward
    model.forward = functools.wraps(plain)(lambda *args, **kwargs: plain(*args, **kwargs))
    return {}


def _own_class(model: PreTrainedModel) -> dict[str, Any]:
    class Own(LlamaForCausalLM):  # type: ignore[misc]
        @functools.wraps(LlamaForCausalLM.forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    model.__class__ = Own
    return {}


def _own_layer(model: PreTrainedModel) -> dict[str, Any]:
    class Own(type(model.model.layers[0])):  # type: ignore[misc]
        @functools.wraps(type(model.model.layers[0]).forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    model.model.layers[-1].__class__ = Own
    return {}


def _shared(model: PreTrainedModel) -> dict[str, Any]:
    model.model.layers[0].mlp = model.model.layers[-1].mlp
    return {}


def _trained(model: PreTrainedModel) -> dict[str, Any]:
    """What draws for each token, as dropout does, draws as often as in stock."""
    model.model.layers[-1].mlp.train()
    return {}


def _own_projection(model: PreTrainedModel) -> dict[str, Any]:
    """One that looks at its input, or at other tokens."""

    class Own(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input - input.mean())

    model.model.layers[-1].mlp.gate_proj.__class__ = Own
    return {}


def _own_norm(model: PreTrainedModel) -> dict[str, Any]:
    class Own(type(model.model.norm)):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor) -> Any:
            return super().forward(hidden_states)

    model.model.norm.__class__ = Own
    return {}


def _own_call(model: PreTrainedModel) -> dict[str, Any]:
    class Own(LlamaForCausalLM):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs)

    model.__class__ = Own
    return {}


CHANGES: dict[str, Callable[[PreTrainedModel], dict[str, Any]]] = {
    "hidden states": _hidden_states,
    "hidden states by config": _hidden_states_by_config,
    "hook of the model": _hook(lambda decoder: decoder),
    "hook of the last layer": _hook(lambda decoder: decoder.layers[-1]),
    "hook of its MLP": _hook(lambda decoder: decoder.layers[-1].mlp, pre=True),
    "hook within it": _hook(lambda decoder: decoder.layers[-1].mlp.down_proj),
    "hook of the last norm": _hook(lambda decoder: decoder.norm, pre=True),
    "own forward": _own_forward,
    "own class": _own_class,
    "own layer": _own_layer,
    "shared": _shared,
    "training": _trained,
    "own projection": _own_projection,
    "own norm": _own_norm,
    "own call": _own_call,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_where_its_output_may_be_seen_it_runs_for_all(change: Callable[[PreTrainedModel], dict[str, Any]]) -> None:
    model = tiny("llama")
    options = change(model)
    inputs = batch([5, 9])
    expected = generate(model, inputs, max_new_tokens=1, **options)
    with torch_paged.paged(model, **KNOBS), rows_of_mlps(model) as rows:
        actual = generate(model, inputs, max_new_tokens=1, **options)
    assert rows == [14, 14, 14]
    if options:
        visible = inputs["attention_mask"].bool()
        for stock, ours in zip(expected.hidden_states[0], actual.hidden_states[0], strict=True):
            torch.testing.assert_close(ours[visible], stock[visible], rtol=1e-4, atol=1e-5)
        expected, actual = expected.sequences, actual.sequences
    assert_same_tokens(model, expected, actual, inputs)


def test_a_hook_of_other_layers_changes_nothing() -> None:
    model = tiny("llama")
    seen: list[int] = []

    def look(module: nn.Module, given: Any, result: torch.Tensor) -> None:
        seen.append(result.shape[1])

    look.__module__ = "torch.tests"
    model.model.layers[1].mlp.register_forward_hook(look)
    with torch_paged.paged(model, **KNOBS), rows_of_mlps(model) as rows:
        generate(model, batch([5, 9]), max_new_tokens=1)
    assert rows == [14, 14, 2] and seen == [14]


def test_hooks_that_transformers_has_left_change_nothing() -> None:
    model = tiny("llama")
    inputs = batch([5, 9])
    with torch_paged.paged(model, **KNOBS), rows_of_mlps(model) as rows:
        generate(model, inputs, max_new_tokens=1, output_hidden_states=True, return_dict_in_generate=True)
        assert rows == [14, 14, 14]
        generate(model, inputs, max_new_tokens=1)
    assert rows[3:] == [14, 14, 2]


def test_outputs_that_a_class_records() -> None:
    """transformers hooks their modules within the call."""
    model = tiny("llama")
    ids = batch([9])["input_ids"]
    model.model._can_record_outputs = {**type(model.model)._can_record_outputs, "mlps": type(model.model.layers[0].mlp)}
    with torch_paged.paged(model, **KNOBS), rows_of_mlps(model) as rows, torch.no_grad():
        cache = torch_paged.PagedCache(model.config, **KNOBS)
        model(ids, past_key_values=cache, logits_to_keep=1, output_mlps=True)
    assert rows == [9, 9, 9]


def test_an_earlier_call_from_a_hook_runs_for_all() -> None:
    model = tiny("llama")
    x, results = torch.linspace(-1, 1, 9 * 64).view(1, 9, 64), list[torch.Tensor]()
    mlp = model.model.layers[-1].mlp
    with torch.no_grad():
        expected = mlp(x)
        with torch_paged.paged(model):
            handle = model.model.layers[0].register_forward_hook(lambda *given: results.append(mlp(x)) or None)
            model(batch([9])["input_ids"], past_key_values=torch_paged.PagedCache(model.config), logits_to_keep=1)
            handle.remove()
    torch.testing.assert_close(results[0], expected, rtol=1e-4, atol=1e-5)


def test_a_hook_that_asks_for_all_logits() -> None:
    model = tiny("llama")
    ids = batch([9])["input_ids"]

    def ask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"logits_to_keep": 0}

    with torch.no_grad():
        expected = model(ids).logits
        with torch_paged.paged(model):
            handle = model.register_forward_pre_hook(ask, with_kwargs=True)
            cache = torch_paged.PagedCache(model.config)
            actual = model(ids, past_key_values=cache, logits_to_keep=1).logits
            handle.remove()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_off_with_rows_as_in_stock() -> None:
    model = tiny("llama")
    with torch_paged.paged(model, pack_rows=False, **KNOBS), rows_of_mlps(model) as rows:
        generate(model, batch([9]), max_new_tokens=1)
    assert rows == [9, 9, 9]


def test_a_later_call_of_the_same_mlp_runs_for_all() -> None:
    """As from a hook, which gets what it asks for."""
    model = tiny("llama")
    results: list[torch.Tensor] = []
    mlp = model.model.layers[-1].mlp
    x = torch.linspace(-1, 1, 9 * 64).view(1, 9, 64)
    with torch.no_grad():
        expected = mlp(x)
    with torch_paged.paged(model):
        handle = model.lm_head.register_forward_pre_hook(lambda *given: results.append(mlp(x)))
        generate(model, batch([5, 9]), max_new_tokens=1)
        handle.remove()
    torch.testing.assert_close(results[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("error", [True, False])
def test_nothing_is_left_over_for_the_next_call(error: bool) -> None:
    model = tiny("llama")
    x = torch.linspace(-1, 1, 9 * 64).view(1, 9, 64)
    mlp = model.model.layers[-1].mlp
    with torch.no_grad():
        expected = mlp(x)

    def fail(*given: Any) -> None:
        raise KeyError("in mid-run")

    with torch_paged.paged(model):
        handle = model.model.layers[0].register_forward_hook(fail) if error else None
        with pytest.raises(KeyError) if error else nullcontext():
            generate(model, batch([5, 9]), max_new_tokens=1)
        if handle is not None:
            handle.remove()
        with torch.no_grad():
            torch.testing.assert_close(mlp(x), expected, rtol=1e-4, atol=1e-5)


def test_dropped_layers_are_not_counted() -> None:
    """Of a model whose config uses fewer layers than it has."""
    torch.manual_seed(0)
    model = sharpen(AutoModelForCausalLM.from_config(CONFIGS["llama"]()).eval())
    model.config.num_hidden_layers = 2
    inputs = batch([5, 9])
    expected = generate(model, inputs, max_new_tokens=1)
    with torch_paged.paged(model, **KNOBS), rows_of_mlps(model) as rows:
        actual = generate(model, inputs, max_new_tokens=1)
    assert rows == [14, 2]
    assert_same_tokens(model, expected, actual, inputs)
