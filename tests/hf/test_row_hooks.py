"""Hooks that tell rows apart by their place in the batch find them where stock has them."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

import torch_paged

from .counting import count_tokens, messages
from .models import assert_same_tokens, batch, generate, tiny, twin
from .test_leaving import Watcher, run
from .test_prefixes import computed, remembering

LENGTHS = [21, 9, 21]
ADAPTERS = ["first", "second", "__base__"]
KNOBS: list[dict[str, Any]] = [
    {}, {"prefix_caching": True}, {"max_prefill_tokens": 10}, {"min_shared_prefix": 4},
]  # fmt: skip


def adapted(name: str = "llama") -> PeftModel:
    """Two adapters that change the tokens."""
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(tiny(name), lora, adapter_name="first")
    model.add_adapter("second", lora)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora" in parameter_name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


def prompts() -> dict[str, Tensor]:
    """The first and the last row have the same tokens, for different adapters."""
    inputs = batch(LENGTHS)
    inputs["input_ids"][2] = inputs["input_ids"][0]
    return inputs


def answers(model: PeftModel, inputs: dict[str, Tensor], **kwargs: Any) -> Tensor:
    tokens: Tensor = generate(model, inputs, **({"eos_token_id": None, "max_new_tokens": 8} | kwargs))
    return tokens[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("knobs", KNOBS, ids=lambda knobs: ",".join(knobs) or "default")
@pytest.mark.parametrize("name", ["llama", "qwen2-sliding"])
def test_each_row_keeps_its_adapter(name: str, knobs: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    stock, model, inputs = adapted(name), adapted(name), prompts()
    expected = answers(stock, inputs, adapter_names=ADAPTERS)
    assert not torch.equal(expected[0], expected[2]), "the adapters change nothing"
    with caplog.at_level(logging.WARNING, "torch_paged"), torch_paged.paged(model, block_size=4, **knobs) as handle:
        for _ in range(2):
            assert torch.equal(answers(model, inputs, adapter_names=ADAPTERS), expected)
        stats = handle.stats()
        assert stats.prefix_hits == stats.blocks_used == 0 < stats.peak_bytes
    (message,) = messages(caplog)
    assert message.startswith(type(model.get_base_model()).__name__) and "hooks" in message


@pytest.mark.parametrize("kwargs", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_beams_keep_their_prompts_adapter(kwargs: dict[str, Any]) -> None:
    stock, model, inputs = adapted(), adapted(), prompts()
    expected = answers(stock, inputs, adapter_names=ADAPTERS, **kwargs)
    with torch_paged.paged(model, block_size=4) as handle:
        assert torch.equal(answers(model, inputs, adapter_names=ADAPTERS, **kwargs), expected)
        assert handle.stats().blocks_used == 0 < handle.stats().peak_bytes


def test_adapters_for_another_number_of_rows_are_stocks_error() -> None:
    stock, model, inputs = adapted(), adapted(), prompts()
    errors = []
    with torch_paged.paged(model) as handle:
        for each in (stock, model):
            with pytest.raises(ValueError, match="adapter_names") as error:
                answers(each, inputs, adapter_names=ADAPTERS, num_return_sequences=2, do_sample=True)
            errors.append(str(error.value))
        assert errors[0] == errors[1] and handle.stats().blocks_used == 0


def test_one_adapter_for_all_is_packed_before_and_after() -> None:
    """And what is remembered of it outlives a call with several adapters, which knows nothing of it."""
    model, inputs = adapted(), prompts()
    base = model.get_base_model()
    remembering(base)
    assert computed(base, inputs)[0] == 21 + 9
    answers(model, inputs, adapter_names=ADAPTERS)
    assert computed(base, inputs)[0] == (21 - 20) + (9 - 8)


class Steering:
    """Adds to the last column of each row, and notes the shape of what it sees."""

    def __init__(self, width: int) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.direction = torch.linspace(-3, 3, width)

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        self.shapes.append(tuple(output.shape))
        steered = output.clone()
        steered[:, -1] += self.direction
        return steered


@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
@pytest.mark.parametrize("knobs", KNOBS, ids=lambda knobs: ",".join(knobs) or "default")
def test_a_hook_that_steers_the_last_column_steers_every_row(knobs: dict[str, Any], kwargs: dict[str, Any]) -> None:
    stock = tiny("llama")
    model = twin(stock)
    inputs, seen = prompts(), []
    for each in (stock, model):
        if each is model:
            torch_paged.patch(model, block_size=4, **knobs)
        steering = Steering(model.config.hidden_size)
        each.model.layers[1].mlp.register_forward_hook(steering)
        tokens = generate(each, inputs, eos_token_id=None, max_new_tokens=8, **kwargs)
        seen.append((steering.shapes, tokens))
    assert seen[0][0] == seen[1][0]
    assert_same_tokens(stock, seen[0][1], seen[1][1], inputs)


def test_finished_rows_stay_for_a_hook() -> None:
    model = tiny("llama")
    shapes: list[int] = []
    hook = model.model.layers[1].register_forward_hook(lambda module, args, output: shapes.append(len(args[0])))
    with torch_paged.paged(model):
        run(model, Watcher())
        assert set(shapes) == {3}
        hook.remove()
        with count_tokens(model) as tokens:
            run(model, Watcher())
    assert set(tokens[1:]) == {3, 2, 1}, "and leave when it is gone"


def _states(model: PreTrainedModel) -> None:
    """transformers hooks every layer, to hand out its states, and leaves the hooks there."""
    model(**batch([5]), output_hidden_states=True)
    assert any(module._forward_hooks for module in model.modules())


def _gradients(model: PreTrainedModel) -> None:
    model.enable_input_require_grads()
    assert model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("hook", [_states, _gradients])
def test_hooks_that_look_at_no_row_change_nothing(hook: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("llama")
    hook(model)
    with caplog.at_level(logging.WARNING, "torch_paged"), torch_paged.paged(model), count_tokens(model) as tokens:
        generate(model, prompts(), max_new_tokens=1)
    assert tokens == [21 + 9] and messages(caplog) == []
