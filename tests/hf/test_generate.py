"""The same call gives stock's tokens: native families and gathered ones, every mode of the foundation."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

import torch_paged
from torch_paged.hf.family import family

from .causal_types import tiny_causal
from .counting import count_calls, messages
from .models import GATHERED, NATIVE, assert_same_tokens, batch, generate, tiny

MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy without eos": {"eos_token_id": None},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beams": {"num_beams": 4},
    "beams returned": {"num_beams": 4, "num_return_sequences": 3},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "samples": {"do_sample": True, "num_return_sequences": 3},
}
PROMPTS = {"left-padded": [40, 7, 23, 31], "one": [17], "short": [1, 2]}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NATIVE)
def test_native_families_give_stocks_tokens(name: str, mode: str) -> None:
    model, inputs = tiny(name), batch(PROMPTS["left-padded"])
    expected = generate(model, inputs, **MODES[mode])
    with torch_paged.paged(model, block_size=4) as handle, count_calls() as calls:
        actual = generate(model, inputs, **MODES[mode])
        assert handle.stats().blocks_used == 0
    assert_same_tokens(model, expected, actual, prompt=inputs)
    assert calls["paged.attention"] == calls["write"] > 0
    assert calls["gather"] == 0


@pytest.mark.parametrize("block_size", [1, 16, 256])
@pytest.mark.parametrize("prompts", PROMPTS)
def test_block_sizes_and_prompts(prompts: str, block_size: int) -> None:
    model, inputs = tiny("mistral"), batch(PROMPTS[prompts])
    expected = generate(model, inputs)
    with torch_paged.paged(model, block_size=block_size):
        actual = generate(model, inputs)
    assert_same_tokens(model, expected, actual, prompt=inputs)


@pytest.mark.parametrize("mode", ["greedy", "beams", "samples"])
@pytest.mark.parametrize("name", GATHERED)
def test_other_families_gather_with_one_warning(name: str, mode: str, caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = tiny(name), batch(PROMPTS["left-padded"])
    expected = generate(model, inputs, **MODES[mode])
    with (
        caplog.at_level(logging.WARNING, "torch_paged"),
        torch_paged.paged(model, block_size=4) as handle,
        count_calls() as calls,
    ):
        actual = generate(model, inputs, **MODES[mode])
        generate(model, inputs, **MODES[mode])
        assert handle.stats().peak_bytes > 0
    assert_same_tokens(model, expected, actual, prompt=inputs)
    assert calls["paged.attention"] == 0 < calls["gather"]
    (message,) = messages(caplog)
    for part in (type(model).__name__, family(model.config.model_type).reason, "gathered"):
        assert part in message


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_output_attentions_come_from_the_models_own_attention(
    attn_implementation: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, inputs = tiny("llama", attn_implementation=attn_implementation), batch([9, 5])
    model.generation_config.output_attentions = attn_implementation == "eager"
    kwargs = dict(return_dict_in_generate=True, max_new_tokens=5)
    expected = generate(model, inputs, **kwargs)
    with torch_paged.paged(model):
        actual = generate(model, inputs, **kwargs)
    assert_same_tokens(model, expected.sequences, actual.sequences, prompt=inputs)
    if attn_implementation == "eager":
        for want, got in zip(expected.attentions, actual.attentions, strict=True):
            for layer, paged_layer in zip(want, got, strict=True):
                # Rows at pads hold what no token ever reads.
                real = inputs["attention_mask"][:, None, -layer.shape[2] :, None].bool().expand_as(layer)
                torch.testing.assert_close(paged_layer[real], layer[real])


def test_head_dims_that_the_op_refuses_are_gathered(caplog: pytest.LogCaptureFixture) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from .models import SMALL

    torch.manual_seed(0)
    model, inputs = LlamaForCausalLM(LlamaConfig(**(SMALL | {"head_dim": 12}))).eval(), batch([12, 7])
    expected = generate(model, inputs)
    with caplog.at_level(logging.WARNING, "torch_paged"), torch_paged.paged(model):
        assert torch.equal(generate(model, inputs), expected)
    assert "head_dim 12 is no multiple of 8" in caplog.text


def test_a_model_without_keys_and_values_keeps_its_cache_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = tiny("mamba"), batch([9, 9])
    expected = generate(model, inputs)
    with caplog.at_level(logging.WARNING, "torch_paged"), torch_paged.paged(model) as handle:
        assert torch.equal(generate(model, inputs), expected)
        assert handle.stats().peak_bytes == 0
    (message,) = messages(caplog)
    assert "MambaForCausalLM" in message and "nothing is paged" in message


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_training_mode_keeps_mask_and_dropout(
    name: str, attn_implementation: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Dropout belongs to the model's own attention, which needs its mask; so little of it that tokens compare."""
    model, inputs = tiny(name, attn_implementation=attn_implementation).train(), batch([20, 5, 9])
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 1e-7
    setattr(model.config, "attn_pdrop" if name == "gpt2" else "attention_dropout", 1e-7)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 1e-7
    expected = generate(model, inputs)
    with caplog.at_level(logging.WARNING, "torch_paged"), torch_paged.paged(model) as handle:
        actual = generate(model, inputs)
        assert handle.stats().peak_bytes > 0
    assert_same_tokens(model, expected, actual, prompt=inputs)
    assert "dropout" in caplog.text


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradient_checkpointing_keeps_the_mask(name: str) -> None:
    """It takes the cache away from the layers."""
    model, inputs = tiny(name).train(), batch([9, 4])
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.gradient_checkpointing_enable()
    expected = generate(model, inputs, max_new_tokens=1)
    with torch_paged.paged(model):
        assert torch.equal(generate(model, inputs, max_new_tokens=1), expected)


def test_a_model_that_uses_fewer_layers_than_before_and_then_all() -> None:
    model, inputs = tiny("llama"), batch([20])
    expected = generate(model, inputs, assistant_early_exit=1)
    with torch_paged.paged(model) as handle:
        assert torch.equal(generate(model, inputs, assistant_early_exit=1), expected)
        assert handle.stats().blocks_used == 0


def test_another_attention_implementation_while_patched(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = tiny("llama"), batch([9, 4])
    expected = generate(model, inputs)
    with torch_paged.paged(model), count_calls() as calls:
        model.set_attn_implementation("eager")
        assert torch.equal(generate(model, inputs), expected)
    (message,) = messages(caplog)
    assert "the attention implementation 'eager' was chosen after the patch" in message
    assert calls["paged.attention"] == 0 < calls["gather"]
    assert model.config._attn_implementation == "eager"


def test_our_name_is_not_to_be_set_by_hand() -> None:
    model = tiny("llama")
    model.set_attn_implementation("torch_paged")
    with pytest.raises(ValueError, match="must be set by torch_paged.patch"):
        generate(model, batch([9]))


def test_a_native_call_that_turns_out_to_need_a_mask_runs_again_gathered(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = tiny("llama"), batch([9, 5])
    model.model.layers[1].self_attn.is_causal = False
    expected = generate(model, inputs)
    with caplog.at_level(logging.WARNING, "torch_paged"), torch_paged.paged(model) as handle, count_calls() as calls:
        actual = generate(model, inputs)
        assert handle.stats().blocks_used == 0
    assert_same_tokens(model, expected, actual, prompt=inputs)
    (message,) = messages(caplog)
    assert "LlamaForCausalLM: LlamaAttention asks for dropout, a position bias or bidirectional attention" in message
    # The first call was native up to the second layer; it alone ran twice, and later ones gather from their start.
    assert calls["paged.attention"] == 1
    assert calls["gather"] == 3 * (expected.shape[1] - 9)


def test_a_hybrid_runs_again_from_its_first_call(caplog: pytest.LogCaptureFixture) -> None:
    """Layers of another state ran in it, too."""
    model, inputs = tiny("jamba"), batch([9, 5])
    model.model.layers[1].self_attn.is_causal = False
    expected = generate(model, inputs)
    with caplog.at_level(logging.WARNING, "torch_paged"), torch_paged.paged(model), count_calls() as calls:
        actual = generate(model, inputs)
    assert_same_tokens(model, expected, actual, prompt=inputs)
    assert calls["gather"] > 0
    assert "JambaSdpaAttention" in caplog.text or "JambaAttention" in caplog.text


def test_a_mask_that_lengths_do_not_tell_is_built(caplog: pytest.LogCaptureFixture) -> None:
    """Gemma 3 lets the tokens of an image see one another in both directions."""
    model, inputs = tiny_causal("gemma3"), batch([9, 9])
    inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    inputs["token_type_ids"][:, 2:6] = 1
    expected = generate(model, inputs)
    with caplog.at_level(logging.WARNING, "torch_paged"), torch_paged.paged(model), count_calls() as calls:
        assert torch.equal(generate(model, inputs), expected)
    assert calls["paged.attention"] == 0 < calls["gather"]
    assert "neither causal nor a sliding window" in caplog.text


@pytest.mark.parametrize("name", ["llama", "gemma", "diffllama"])
def test_autocast(name: str) -> None:
    """K arrives in float32 and V in bfloat16; attention computes in bfloat16, with stock as with blocks."""
    model, inputs = tiny(name), batch([12, 7])
    kwargs = dict(return_dict_in_generate=True, output_logits=True, max_new_tokens=4, eos_token_id=None)
    with torch.autocast("cpu", torch.bfloat16):
        expected = generate(model, inputs, **kwargs)
        with torch_paged.paged(model) as handle:
            actual = generate(model, inputs, **kwargs)
            assert handle.stats().peak_bytes > 0
    torch.testing.assert_close(actual.logits[0], expected.logits[0], atol=0.05, rtol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_stay_close_to_stock(dtype: torch.dtype) -> None:
    model, inputs = tiny("qwen3", dtype), batch([12, 12])
    kwargs = dict(return_dict_in_generate=True, output_logits=True, max_new_tokens=1)
    expected = generate(model, inputs, **kwargs).logits[0]
    with torch_paged.paged(model):
        actual = generate(model, inputs, **kwargs).logits[0]
    exact = generate(model.double(), inputs, **kwargs).logits[0].double()
    bound = 2 * float((expected.double() - exact).abs().max()) + 1e-5
    assert float((actual.double() - exact).abs().max()) <= bound
