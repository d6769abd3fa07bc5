"""Whatever changes the keys and values that a model computes makes it forget its prefixes, by itself."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import LogitsProcessorList, PreTrainedModel

from torch_paged.hf.weights import Weights

from .models import SMALL, batch, tiny, twin
from .test_prefixes import assert_as_stock, computed, remembering

PROMPT = batch([21, 9])
ALL, REST = 30, (21 - 20) + (9 - 8)


def _other_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in model.state_dict().items()}


def _step(optimizer: Callable[..., torch.optim.Optimizer], **options: Any) -> Callable[[PreTrainedModel], None]:
    def step(model: PreTrainedModel) -> None:
        stepping = optimizer(model.parameters(), lr=1e-2, **options)
        model(**PROMPT, labels=PROMPT["input_ids"]).loss.backward()
        stepping.step()
        stepping.zero_grad()

    return step


def _assign(model: PreTrainedModel) -> None:
    layer = model.model.layers[1].self_attn.v_proj
    layer.weight = nn.Parameter(2 * layer.weight.detach())


def _in_place(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(2)


def _data(model: PreTrainedModel) -> None:
    """Where the allocator may hand the old memory out again."""
    parameter = model.model.layers[0].mlp.down_proj.weight
    for _ in range(3):
        parameter.data = parameter.data * 2
        gc.collect()


def _hook(model: PreTrainedModel) -> RemovableHandle:
    return model.model.layers[0].register_forward_hook(lambda module, args, output: output * 2)


def _pre_hook(model: PreTrainedModel) -> RemovableHandle:
    return model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: (2 * args[0],))


CHANGES: dict[str, Callable[[PreTrainedModel], Any]] = {
    "load_state_dict": lambda model: model.load_state_dict(_other_weights(model)),
    "load_state_dict(assign=True)": lambda model: model.load_state_dict(_other_weights(model), assign=True),
    "AdamW": _step(torch.optim.AdamW),
    "AdamW, fused": _step(torch.optim.AdamW, fused=True),
    "AdamW, foreach": _step(torch.optim.AdamW, foreach=True),
    "SGD, fused": _step(torch.optim.SGD, fused=True),
    "to bfloat16 and back": lambda model: model.to(torch.bfloat16).to(torch.float32),
    "to bfloat16": lambda model: model.to(torch.bfloat16),
    "assignment": _assign,
    "in place": _in_place,
    "data": _data,
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_noticed(change: str) -> None:
    stock = tiny("llama")
    model = twin(stock)
    handle = remembering(model)
    assert [computed(model, PROMPT)[0] for _ in range(2)] == [ALL, REST]
    CHANGES[change](stock)
    CHANGES[change](model)
    count, actual = computed(model, PROMPT)
    assert (count, handle.stats().prefix_hits) == (ALL, 2)
    assert_as_stock(stock, PROMPT, actual)
    count, actual = computed(model, PROMPT)
    assert count == REST, "remembered again, with the new weights"
    assert_as_stock(stock, PROMPT, actual)


@pytest.mark.parametrize("change", [_hook, _pre_hook])
def test_nothing_is_remembered_where_hooks_see_the_tokens(change: Callable[[PreTrainedModel], Any]) -> None:
    """They see all of them in each call, as in stock; what was remembered without them holds again afterwards."""
    stock = tiny("llama")
    model = twin(stock)
    handle = remembering(model)
    assert computed(model, PROMPT)[0] == ALL
    hooks = [change(each) for each in (stock, model)]
    for _ in range(2):
        count, actual = computed(model, PROMPT)
        assert (count, handle.stats().prefix_hits) == (PROMPT["input_ids"].numel(), 0)
        assert_as_stock(stock, PROMPT, actual)
    for hook in hooks:
        hook.remove()
    count, actual = computed(model, PROMPT)
    assert count == REST
    assert_as_stock(stock, PROMPT, actual)


def test_what_changes_nothing_forgets_nothing() -> None:
    model = tiny("llama")
    remembering(model)
    other = tiny("llama")
    assert computed(model, PROMPT)[0] == ALL
    model.to(torch.float32).to("cpu").eval().requires_grad_(False).requires_grad_(True)
    model.zero_grad()
    model(**PROMPT)
    _step(torch.optim.AdamW, fused=True)(other)
    assert computed(model, PROMPT)[0] == REST


def test_what_nobody_notices_is_flushed_by_hand() -> None:
    stock = tiny("llama")
    model = twin(stock)
    handle = remembering(model)
    computed(model, PROMPT)
    for each in (stock, model):
        each.model.layers[0].mlp.down_proj.weight.data.mul_(2)
    handle.flush()
    count, actual = computed(model, PROMPT)
    assert count == ALL
    assert_as_stock(stock, PROMPT, actual)


def test_weights_that_change_in_mid_run_leave_nothing() -> None:
    model = tiny("llama")
    remembering(model)

    def change(ids: Tensor, scores: Tensor) -> Tensor:
        _in_place(model)
        return scores

    computed(model, PROMPT, logits_processor=LogitsProcessorList([change]), max_new_tokens=2)
    stock = twin(model)
    count, actual = computed(model, PROMPT)
    assert count == ALL
    assert_as_stock(stock, PROMPT, actual)


def test_a_training_model_remembers_nothing() -> None:
    """Dropout may draw other keys and values in every call."""
    model = tiny("llama").train()
    handle = remembering(model)
    assert min(computed(model, PROMPT)[0] for _ in range(2)) >= ALL
    assert handle.stats().blocks_used == 0
    model.eval()
    assert [computed(model, PROMPT)[0] for _ in range(2)] == [ALL, REST]


def test_blocks_are_back_when_training_begins() -> None:
    model = tiny("llama")
    handle = remembering(model)
    wrapper = nn.ModuleList([model])
    for begin in (model.train, wrapper.train):
        computed(model.eval(), PROMPT)
        assert handle.stats().blocks_used > 0
        begin()
        assert handle.stats().blocks_used == 0


@contextmanager
def _disabled(model: PeftModel) -> Iterator[None]:
    with model.disable_adapter():
        yield


@contextmanager
def _merged(model: PeftModel) -> Iterator[None]:
    model.merge_adapter()
    yield
    model.unmerge_adapter()


@contextmanager
def _switched(model: PeftModel) -> Iterator[None]:
    model.set_adapter("second")
    yield
    model.set_adapter("first")


@contextmanager
def _rescaled(model: PeftModel) -> Iterator[None]:
    layers = [module for module in model.modules() if hasattr(module, "set_scale")]
    for layer in layers:
        layer.set_scale("first", 3.0)
    yield
    for layer in layers:
        layer.set_scale("first", 1.0)


def _adapted() -> PeftModel:
    config = LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    torch.manual_seed(3)
    model = get_peft_model(tiny("llama"), config, adapter_name="first")
    model.add_adapter("second", config)
    return model.eval()


@pytest.mark.parametrize("change", [_disabled, _merged, _switched, _rescaled])
def test_adapters_are_noticed(change: Callable[[PeftModel], Any]) -> None:
    stock, model = _adapted(), _adapted()
    remembering(model)
    for _ in range(2):
        assert [computed(model, PROMPT)[0] for _ in range(2)] == [ALL, REST]
        with change(stock), change(model):
            count, actual = computed(model, PROMPT)
            assert count == ALL
            assert_as_stock(stock, PROMPT, actual)
    count, actual = computed(model, PROMPT)
    assert count == ALL
    assert_as_stock(stock, PROMPT, actual)


def test_weights_know_quantised_tensors() -> None:
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = nn.Linear(32, 32)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    weights = Weights(model)
    assert weights.are_those_of(model)
    with torch.no_grad():
        inner = getattr(model.weight, model.weight.__tensor_flatten__()[0][0])
        inner.add_(1)
    assert not weights.are_those_of(model)


def test_weights_know_a_replaced_tensor_of_the_same_size() -> None:
    model = nn.Linear(SMALL["hidden_size"], 3)
    weights = Weights(model)
    with torch.inference_mode():
        values = torch.zeros_like(model.weight)
    model.weight = nn.Parameter(values, requires_grad=False)
    assert not weights.are_those_of(model)
    assert Weights(model).are_those_of(model), "inference tensors have no version"
