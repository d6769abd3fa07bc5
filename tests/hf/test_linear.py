"""Linear layers of native passes run by torch.ops.paged.linear where it is the faster one, all others by PyTorch."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from transformers import PreTrainedModel

import torch_paged
from torch_paged import generate_many
from torch_paged.hf import linear
from torch_paged.hf.call import current
from torch_paged.ops import _most_rows

from .fast_ops import rows_of_calls
from .many import prompts
from .models import assert_same_tokens, batch, generate, tiny, twin

# Of the tiny models: three layers with o and down projection, and the one that makes logits.
LAYERS = 7


def linears(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


@pytest.mark.parametrize("name", ["llama", "qwen2", "opt", "mixtral", "jamba"])
def test_tokens_are_those_of_stock(name: str) -> None:
    model = tiny(name)
    inputs = batch([5, 9, 2])
    expected = generate(model, inputs)
    other = twin(model)
    with torch_paged.paged(other), rows_of_calls("linear") as rows:
        actual = generate(other, inputs)
    assert rows
    assert_same_tokens(model, expected, actual, inputs)


def test_prefills_of_few_tokens_and_all_steps() -> None:
    model = tiny("llama")
    with torch_paged.paged(model), rows_of_calls("linear") as rows:
        generate(model, batch([5, 9, 2]), max_new_tokens=3, eos_token_id=None)
    # The last layer's MLP runs for the tokens whose logits are asked.
    assert rows == [16] * (LAYERS - 2) + 2 * [3] + 2 * [3] * LAYERS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", [[5, 9, 2], [50, 15, 90]], ids=str)
def test_halves_are_as_exact_as_in_stock(
    lengths: list[int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "most_rows", lambda dtype: sum(lengths))
    model = tiny("llama", dtype)
    inputs = batch(lengths)
    options: dict[str, Any] = dict(max_new_tokens=1, return_dict_in_generate=True, output_logits=True)
    exact = generate(tiny("llama").to(dtype).double(), inputs, **options).logits[0]
    stock = generate(model, inputs, **options).logits[0]
    with torch_paged.paged(model), rows_of_calls("linear") as rows:
        ours = generate(model, inputs, **options).logits[0]
    assert len(rows) == LAYERS
    assert (ours - exact).abs().max() <= 2 * (stock - exact).abs().max()


# Instruction set, whether there is AMX, and the types of which many rows run by the op.
CPUS: dict[str, tuple[str, bool, list[torch.dtype]]] = {
    "AVX2": ("avx2", False, [torch.bfloat16, torch.float16]),
    "AVX-512": ("avx512", False, [torch.bfloat16, torch.float16]),
    "fast dot products": ("avx512bf16", False, [torch.float32, torch.bfloat16, torch.float16]),
    "AMX": ("amx", True, [torch.bfloat16]),
    "AMX, not used": ("avx512", True, []),
    "SSE2": ("baseline", False, []),
    "ARM": ("neon", False, []),
}


@pytest.mark.parametrize(("instruction_set", "amx", "many"), CPUS.values(), ids=CPUS)
def test_prefills_of_many_tokens_by_the_faster_one(
    instruction_set: str, amx: bool, many: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_most_rows, "cpu_instruction_set", lambda: instruction_set)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    linear.most_rows.cache_clear()
    try:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            model = tiny("llama", dtype)
            with torch_paged.paged(model), rows_of_calls("linear") as rows:
                generate(model, batch([50, 15, 1]), max_new_tokens=2, eos_token_id=None)
            prefill = [66] * (LAYERS - 2) if dtype in many else []
            assert rows == prefill + 2 * [3] + [3] * LAYERS
    finally:
        linear.most_rows.cache_clear()


def _knob(model: PreTrainedModel) -> dict[str, Any]:
    return {"fast_layers": False}


def _transposed(model: PreTrainedModel) -> dict[str, Any]:
    for module in linears(model):
        module.weight = nn.Parameter(module.weight.t().contiguous().t())
    return {}


def _own_weights(model: PreTrainedModel) -> dict[str, Any]:
    """Weights of a class of their own, as quantised ones are."""

    class Weight(nn.Parameter):
        pass

    for module in linears(model):
        module.weight = Weight(module.weight.detach())
    return {}


def _biases_that_broadcast(model: PreTrainedModel) -> dict[str, Any]:
    for module in linears(model):
        module.bias = nn.Parameter(torch.full((1, module.out_features), 0.1))
    return {}


def _float64(model: PreTrainedModel) -> dict[str, Any]:
    model.double()
    return {}


def _own_class(model: PreTrainedModel) -> dict[str, Any]:
    class Own(nn.Linear):
        pass

    for module in linears(model):
        module.__class__ = Own
    return {}


@pytest.mark.parametrize("change", [_knob, _transposed, _own_weights, _biases_that_broadcast, _float64, _own_class])
def test_others_run_by_pytorch(change: Callable[[PreTrainedModel], dict[str, Any]]) -> None:
    model = tiny("llama")
    knobs = change(model)
    inputs = batch([5, 9, 2])
    expected = generate(model, inputs)
    with torch_paged.paged(model, **knobs), rows_of_calls("linear") as rows:
        actual = generate(model, inputs)
    assert rows == []
    assert_same_tokens(model, expected, actual, inputs)


def test_under_autocast_and_with_gradients_by_pytorch() -> None:
    model = tiny("llama")
    inputs = batch([5, 9])
    with torch_paged.paged(model), rows_of_calls("linear") as rows:
        with torch.autocast("cpu", torch.bfloat16):
            generate(model, inputs)
        model(**inputs, past_key_values=torch_paged.PagedCache(model.config))
        assert rows == []
        with torch.no_grad():
            model(**inputs, past_key_values=torch_paged.PagedCache(model.config))
        assert len(rows) == LAYERS


def test_a_pass_without_a_paged_cache_has_the_bits_of_stock() -> None:
    model = tiny("llama")
    inputs = batch([5, 9])
    with torch.no_grad():
        expected = model(**inputs).logits
        with torch_paged.paged(model), rows_of_calls("linear") as rows:
            assert torch.equal(model(**inputs).logits, expected)
    assert rows == []


def test_deterministic_requests_run_by_pytorch() -> None:
    model = tiny("llama")
    with torch_paged.paged(model), rows_of_calls("linear") as rows:
        for deterministic in (True, False):
            list(generate_many(model, prompts([4, 7]), max_new_tokens=3, deterministic=deterministic))
            assert bool(rows) is not deterministic


def test_gathered_models_run_by_pytorch() -> None:
    model = tiny("diffllama")
    with torch_paged.paged(model), rows_of_calls("linear") as rows:
        generate(model, batch([5, 9]))
    assert rows == []


def test_layers_are_stock_again() -> None:
    model = tiny("llama")
    handle = torch_paged.patch(model)
    patched = {type(module) for module in linears(model)}
    assert nn.Linear not in patched and len(patched) == 1
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model.lm_head)):
        assert {type(module) for module in linears(other)} == {nn.Linear}
    # A class derived from ours meanwhile.
    parametrizations.weight_norm(model.lm_head)
    handle.unpatch()
    parametrize.remove_parametrizations(model.lm_head, "weight")
    assert {type(module) for module in linears(model)} == {nn.Linear}


@pytest.mark.parametrize(
    "input",
    [torch.tensor(1.0), None, torch.ones(2, 8).to_sparse(), torch.ones(2, 8).to_mkldnn(), torch.ones(2, 0)],
    ids=["0-D", "None", "sparse", "MKL-DNN", "no inputs"],
)
def test_odd_inputs_end_as_in_stock(input: Any) -> None:
    """In a pass in which the op could be taken."""

    def outcome(layer: nn.Linear, in_pass: bool) -> Any:
        assert current.fast_layers is in_pass
        try:
            return layer(input).to_dense().tolist()
        except Exception as error:
            return type(error)

    model = tiny("llama")
    layer = nn.Linear(0 if input is not None and input.shape[-1:] == (0,) else 8, 4)
    model.odd = layer
    with torch.no_grad():
        expected = outcome(layer, in_pass=False)
        torch_paged.patch(model)
        ends = []
        model.lm_head.register_forward_hook(lambda *arguments: ends.append(outcome(layer, in_pass=True)))
        model(**batch([5]), past_key_values=torch_paged.PagedCache(model.config))
    assert ends == [expected]


def test_a_wrong_input_is_refused_as_in_stock() -> None:
    model = tiny("llama")
    with torch.no_grad(), pytest.raises(RuntimeError) as stock:
        model.lm_head(torch.ones(2, 63))
    torch_paged.patch(model)
    broken: Any = model.model.layers[1].mlp
    broken.gate_proj.forward, plain = lambda x: plain(x[..., :63]), broken.gate_proj.forward
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        generate(model, batch([5, 9]))
    assert "mat1 and mat2 shapes cannot be multiplied" in str(stock.value)


def test_a_replaced_method_is_the_one_that_runs() -> None:
    model = tiny("llama")
    inputs = batch([5, 9])

    def half(self: nn.Linear, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(input, 0.5 * self.weight, self.bias)

    with torch_paged.paged(model), rows_of_calls("linear") as rows, mock.patch.object(nn.Linear, "forward", half):
        actual = generate(model, inputs)
    assert rows == []
    with mock.patch.object(nn.Linear, "forward", half):
        assert_same_tokens(model, generate(model, inputs), actual, inputs)


def test_nothing_keeps_the_handle_of_a_model_that_was_patched() -> None:
    model = tiny("llama")
    with torch_paged.paged(model) as handle:
        generate(model, batch([5, 9]))
    there = weakref.ref(handle)
    del handle
    gc.collect()
    assert there() is None
