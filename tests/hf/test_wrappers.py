"""Models inside PEFT, data-parallel, accelerate's and compiled wrappers give stock's tokens from blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

import torch_paged
from torch_paged.hf.disguise import stock_class

from .counting import count_calls
from .host_state import host_state
from .models import assert_same_tokens, batch, generate, tiny, twin

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
INPUTS = batch([20, 5])


def _lora(model: PreTrainedModel) -> PeftModel:
    """Two adapters that change the tokens, the first one active."""
    torch.manual_seed(0)
    wrapped = get_peft_model(model, LORA, adapter_name="first")
    wrapped.add_adapter("second", LORA)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.mul_(4)
    return wrapped.eval()


def _adapters(wrapped: PeftModel, tokens: Callable[[], Tensor]) -> list[Tensor]:
    """The tokens of each adapter, of none, and of the first again."""
    results = []
    for name in ("first", "second"):
        wrapped.set_adapter(name)
        results.append(tokens())
    with wrapped.disable_adapter():
        results.append(tokens())
    wrapped.set_adapter("first")
    return [*results, tokens()]


@pytest.mark.parametrize("when", ["wrapped, then patched", "patched, then wrapped"])
def test_lora(when: str) -> None:
    model = tiny("llama")
    stock = _lora(twin(model))
    expected = _adapters(stock, lambda: generate(stock, INPUTS))
    assert not torch.equal(expected[0], expected[1]) and not torch.equal(expected[0], expected[2])
    if when == "patched, then wrapped":
        handle = torch_paged.patch(model)
    wrapped = _lora(model)
    if when == "wrapped, then patched":
        handle = torch_paged.patch(wrapped)
    assert torch_paged.patch(wrapped) is handle and handle.patched
    with count_calls() as calls:
        actual = _adapters(wrapped, lambda: generate(wrapped, INPUTS))
    assert calls["paged.attention"] > 0 == calls["gather"]
    for want, got in zip(expected, actual, strict=True):
        assert_same_tokens(stock, want, got, prompt=INPUTS)
    merged, merged_stock = wrapped.merge_and_unload(), stock.merge_and_unload()
    assert merged is model and handle.patched
    assert_same_tokens(merged_stock, generate(merged_stock, INPUTS), generate(merged, INPUTS), prompt=INPUTS)
    torch_paged.unpatch(merged)
    assert type(merged) is type(merged_stock) and not handle.patched


def test_lora_saved_while_patched(tmp_path: Path) -> None:
    model = tiny("llama")
    base = twin(model)
    wrapped = _lora(model)
    expected = generate(wrapped, INPUTS)
    with torch_paged.paged(wrapped):
        wrapped.save_pretrained(tmp_path)
    for file in tmp_path.rglob("*.*"):
        assert b"torch_paged" not in file.read_bytes()
    loaded = PeftModel.from_pretrained(base, tmp_path / "first").eval()
    assert torch.equal(generate(loaded, INPUTS), expected)


def test_lora_trains_as_stock_between_generates() -> None:
    model = tiny("llama")
    losses = []
    for wrapped in (_lora(twin(model)), _lora(model)):
        if wrapped.get_base_model() is model:
            torch_paged.patch(wrapped)
            generate(wrapped, INPUTS)
        loss = wrapped.train()(**INPUTS, labels=INPUTS["input_ids"]).loss
        loss.backward()
        gradients = [parameter.grad for parameter in wrapped.parameters() if parameter.grad is not None]
        losses.append([loss, *gradients])
    assert len(losses[0]) > 1
    assert all(torch.equal(want, got) for want, got in zip(*losses, strict=True))


class _Plain(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """One process that talks to itself."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def _compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": _Plain,
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "accelerate": lambda model: Accelerator(cpu=True).prepare(model),
    "compiled": _compiled,
    "compiled DataParallel": lambda model: _compiled(nn.DataParallel(model)),
    "DataParallel of LoRA": lambda model: nn.DataParallel(_lora(model)),
}


@pytest.mark.parametrize("how", WRAPPERS)
def test_wrappers_are_looked_through(how: str, process_group: None) -> None:
    model = tiny("llama")
    wrapped = WRAPPERS[how](model).eval()
    before = host_state(model)
    expected = generate(model, INPUTS)
    handle = torch_paged.patch(wrapped)
    assert torch_paged.patch(model) is handle
    with count_calls() as calls:
        assert_same_tokens(model, expected, generate(model, INPUTS), prompt=INPUTS)
    assert calls["paged.attention"] > 0
    torch_paged.unpatch(wrapped)
    assert not handle.patched
    assert host_state(model) == before


@pytest.mark.parametrize("how", ["plain", "DataParallel", "DistributedDataParallel", "accelerate"])
def test_training_through_a_wrapper_is_stocks(how: str, process_group: None) -> None:
    model = tiny("gpt2")
    results = []
    for each in (twin(model), model):
        wrapped = WRAPPERS[how](each)
        if each is model:
            torch_paged.patch(wrapped)
            generate(model, INPUTS)
        torch.manual_seed(0)
        loss = wrapped.train()(**INPUTS, labels=INPUTS["input_ids"]).loss
        loss.backward()
        results.append([loss, *(parameter.grad for parameter in each.parameters())])
    assert all(torch.equal(want, got) for want, got in zip(*results, strict=True))


@pytest.mark.parametrize("kwargs", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}])
def test_prefix_tuning_brings_a_cache_of_its_own(kwargs: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model, inputs = get_peft_model(tiny("llama"), config).eval(), batch([12, 5])
    expected = generate(model, inputs, **kwargs)
    with torch_paged.paged(model) as handle:
        assert torch.equal(generate(model, inputs, **kwargs), expected)
        assert handle.stats().blocks_used == 0


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_a_replica_as_data_parallel_makes_it_is_stock(name: str) -> None:
    model, inputs = tiny(name), batch([9])
    expected = model(**inputs).logits
    torch_paged.patch(model)
    for module in model.modules():
        assert type(module._replicate_for_data_parallel()) is stock_class(type(module))
    assert torch.equal(model(**inputs).logits, expected)


def test_a_class_that_someone_derives_from_the_patched_one_stays() -> None:
    """As fully_shard does."""

    class Sharded:
        def shards(self) -> int:
            return 2

    model, inputs = tiny("llama"), batch([9, 4])
    stock, expected = type(model), generate(model, inputs)
    handle = torch_paged.patch(model)
    model.__class__ = type("ShardedLlama", (Sharded, type(model)), {"own": 1})
    assert torch.equal(generate(model, inputs), expected)
    handle.unpatch()
    assert type(model).__bases__ == (Sharded, stock)
    assert (type(model).__name__, model.own, model.shards()) == ("ShardedLlama", 1, 2)
    assert torch.equal(generate(model, inputs), expected)
