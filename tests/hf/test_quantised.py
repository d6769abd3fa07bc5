"""Models with 8-bit and 4-bit weights: attention sees activations alone, and gives stock's tokens from blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_
from transformers import AutoModelForCausalLM, PreTrainedModel, TorchAoConfig

import torch_paged

from .counting import count_calls
from .models import assert_same_tokens, batch, generate, tiny, twin

INPUTS = batch([20, 5])
INT4 = dict(weight_dtype=torch.int4, granularity=PerGroup(32))


def _torchao(make: Callable[[], Any]) -> Callable[[PreTrainedModel], None]:
    return lambda model: quantize_(model, make(), filter_fn=lambda module, name: isinstance(module, nn.Linear))


QUANTISE = {
    "torchao int8": _torchao(Int8WeightOnlyConfig),
    "torchao int4": _torchao(lambda: IntxWeightOnlyConfig(**INT4)),
}
MODES: list[dict[str, Any]] = [{}, {"num_beams": 3}]


def _check(stock: PreTrainedModel, model: PreTrainedModel, plain: PreTrainedModel) -> None:
    """`model` is patched and quantised, `stock` quantised alone, `plain` neither."""
    for mode in MODES:
        expected = generate(stock, INPUTS, **mode)
        with count_calls() as calls:
            actual = generate(model, INPUTS, **mode)
        assert calls["paged.attention"] > 0 == calls["gather"]
        assert_same_tokens(stock, expected, actual, prompt=INPUTS)
    kwargs = dict(return_dict_in_generate=True, output_logits=True, max_new_tokens=1)
    want, got, other = (generate(each, INPUTS, **kwargs).logits[0] for each in (stock, model, plain))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    # The quantised weights are used.
    assert float((want - other).abs().max()) > 1e-3


@pytest.mark.parametrize("when", ["quantised, then patched", "patched, then quantised"])
@pytest.mark.parametrize("how", QUANTISE)
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_torchao(name: str, how: str, when: str) -> None:
    plain = tiny(name)
    stock, model = twin(plain), twin(plain)
    QUANTISE[how](stock)
    if when == "patched, then quantised":
        torch_paged.patch(model, block_size=4)
    QUANTISE[how](model)
    handle = torch_paged.patch(model, block_size=4)
    _check(stock, model, plain)
    assert handle.stats().blocks_used == 0
    handle.unpatch()
    assert type(model) is type(stock)
    assert torch.equal(generate(model, INPUTS), generate(stock, INPUTS))


def test_from_pretrained_with_a_quantization_config(tmp_path: Path) -> None:
    plain = tiny("llama")
    plain.save_pretrained(tmp_path)
    load: Callable[[], PreTrainedModel] = lambda: AutoModelForCausalLM.from_pretrained(  # noqa: E731
        tmp_path, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), dtype=torch.float32
    )
    stock, model = load(), load()
    assert "Int8Tensor" in type(model.model.layers[0].mlp.up_proj.weight).__name__
    torch_paged.patch(model, strict=True)
    _check(stock, model, plain)
    assert torch.equal(generate(twin(model), INPUTS), generate(stock, INPUTS))


def test_dynamic_quantisation_of_torch() -> None:
    """Activations are rounded by their range, so that tokens may turn at the last bit: the first logits compare."""
    plain = tiny("llama")
    stock = torch.ao.quantization.quantize_dynamic(twin(plain), {nn.Linear}, dtype=torch.qint8)
    model = twin(stock)
    kwargs = dict(return_dict_in_generate=True, output_logits=True, max_new_tokens=2, eos_token_id=None)
    expected = generate(stock, INPUTS, **kwargs).logits
    with torch_paged.paged(model), count_calls() as calls:
        actual = generate(model, INPUTS, **kwargs).logits
    assert calls["paged.attention"] > 0
    step = float((expected[0] - generate(plain, INPUTS, **kwargs).logits[0]).abs().max())
    assert float((actual[0] - expected[0]).abs().max()) < step / 4
