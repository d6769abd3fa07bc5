"""Families of models by name: their tokens are stock's and come from the blocks, or from the fallback where told."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import torch_paged

from .causal_types import WINDOW, tiny_causal
from .counting import count_calls, messages
from .models import PAD, SMALL, VOCAB, assert_same_tokens, batch, generate, sharpen, tiny_t5

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "mixtral": {},
    "qwen2": dict(use_sliding_window=True),
    "qwen2_moe": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": dict(attn_logit_softcapping=0.5, final_logit_softcapping=None),
    "gemma3_text": dict(layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
    "gemma3": {},
    "gpt2": {},
    "opt": {},
    "gpt_neox": {},
    "phi": dict(partial_rotary_factor=0.5),
    "phi3": {},
    "starcoder2": {},
    "stablelm": {},
    "olmo2": {},
    "granite": dict(attention_multiplier=0.3),
    "cohere2": dict(layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
    "smollm3": dict(no_rope_layers=[1, 0, 1]),
    "gpt_oss": dict(layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
    "exaone4": dict(layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
    "bloom": {},
    "falcon": dict(multi_query=True),
    "mpt": {},
    "gptj": {},
    "codegen": {},
    "gpt_neo": {},
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon with ALiBi": ("falcon", dict(alibi=True, multi_query=False, num_kv_heads=4)),
    "falcon's new decoder": ("falcon", dict(new_decoder_architecture=True, num_kv_heads=2)),
    "mpt with clipping": ("mpt", dict(attn_config=dict(clip_qkv=0.5, softmax_scale=0.4))),
    "bloom with 8 heads": ("bloom", dict(n_head=8)),
    "mistral without a window": ("mistral", dict(sliding_window=None)),
}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": dict(num_beams=3, max_new_tokens=12),
    "samples": dict(do_sample=True, num_return_sequences=2, max_new_tokens=12),
    "chunked prefill": dict(prefill_chunk_size=5, max_new_tokens=6),
}
# Ragged, left-padded, longer than the windows.
PROMPTS = [3 * WINDOW, 5, 19]


def make(name: str, **more: Any) -> PreTrainedModel:
    return diversify(tiny_causal(name, **more))


def diversify(model: PreTrainedModel) -> PreTrainedModel:
    """An output layer of its own, so that a model does not go on repeating its last token."""
    model.config.tie_word_embeddings = False
    if (head := model.get_output_embeddings()) is not None:
        generator = torch.Generator().manual_seed(1)
        head.weight = torch.nn.Parameter(torch.randn(head.weight.shape, generator=generator))
    return model


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_reads_blocks_and_gives_stocks_tokens(name: str, mode: str, caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = make(name, **FAMILIES[name]), batch(PROMPTS)
    expected = generate(model, inputs, **MODES[mode])
    with (
        caplog.at_level(logging.WARNING, "torch_paged"),
        torch_paged.paged(model, block_size=4, strict=True) as handle,
        count_calls() as calls,
    ):
        actual = generate(model, inputs, **MODES[mode])
        assert handle.stats().blocks_used == 0 < handle.stats().peak_bytes
    assert expected[:, inputs["input_ids"].shape[1] :].unique().numel() > len(PROMPTS), (
        "tokens that would not tell a difference"
    )
    assert_same_tokens(model, expected, actual, prompt=inputs)
    assert calls["paged.attention"] == calls["write"] > 0 == calls["gather"]
    assert not messages(caplog)


@pytest.mark.parametrize(("name", "config"), VARIANTS.values(), ids=VARIANTS)
def test_a_variant_of_a_family(name: str, config: dict[str, Any]) -> None:
    model, inputs = make(name, **config), batch(PROMPTS)
    expected = generate(model, inputs)
    with torch_paged.paged(model, block_size=4, strict=True), count_calls() as calls:
        actual = generate(model, inputs)
    assert_same_tokens(model, expected, actual, prompt=inputs)
    assert calls["paged.attention"] > 0 == calls["gather"]


@pytest.mark.parametrize("name", ["bloom", "mpt", "falcon", "gptj", "codegen", "gpt_neo"])
def test_modules_of_patched_families_get_their_class_back(name: str) -> None:
    model = make(name)
    before = [type(module) for module in model.modules()]
    torch_paged.patch(model)
    changed = [cls for module, cls in zip(model.modules(), before, strict=True) if type(module) is not cls]
    # The model itself, one attention module in every layer, and the linear layers.
    layers = model.config.num_hidden_layers
    assert len(changed) == 1 + layers + before.count(nn.Linear)
    assert [type(module).__name__ for module in model.modules()] == [cls.__name__ for cls in before]
    torch_paged.unpatch(model)
    assert [type(module) for module in model.modules()] == before


@pytest.mark.parametrize("name, reason", [("mpt", "ALiBi counts their columns"), ("gpt_neo", "local window")])
def test_distances_in_columns_gather_where_the_mask_has_holes(
    name: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, inputs = make(name), batch([16, 16])
    inputs["attention_mask"][1, 6:9] = 0
    expected = generate(model, inputs)
    with caplog.at_level(logging.WARNING, "torch_paged"), torch_paged.paged(model), count_calls() as calls:
        actual = generate(model, inputs)
    assert_same_tokens(model, expected, actual, prompt=inputs)
    assert calls["gather"] > 0
    (message,) = messages(caplog)
    assert reason in message


@pytest.mark.parametrize("name", ["bloom", "falcon"])
def test_positions_in_tokens_take_holes_natively(name: str) -> None:
    model, inputs = make(name, **({"alibi": True} if name == "falcon" else {})), batch([16, 16])
    inputs["attention_mask"][1, 6:9] = 0
    expected = generate(model, inputs)
    with torch_paged.paged(model, strict=True), count_calls() as calls:
        actual = generate(model, inputs)
    assert_same_tokens(model, expected, actual, prompt=inputs)
    assert calls["gather"] == 0


def test_falcons_rounded_alibi_gathers_once_it_rounds(caplog: pytest.LogCaptureFixture) -> None:
    """Stock holds slope x position in bfloat16: whole numbers up to 256 are exact, further ones are not."""
    model = make("falcon", alibi=True, multi_query=False, num_kv_heads=4, max_position_embeddings=512)
    inputs = batch([250])
    expected = generate(model, inputs, max_new_tokens=20, eos_token_id=None)
    with caplog.at_level(logging.WARNING, "torch_paged"), torch_paged.paged(model), count_calls() as calls:
        actual = generate(model, inputs, max_new_tokens=20, eos_token_id=None)
    assert_same_tokens(model, expected, actual, prompt=inputs)
    # 250 prompt tokens and six more read blocks in each of three layers, the rest gathers.
    assert (calls["paged.attention"], calls["gather"]) == (3 * 7, 3 * 13)
    (message,) = messages(caplog)
    assert "rounds its ALiBi bias past 256 tokens" in message


def test_a_config_that_a_family_cannot_run_natively_says_why(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = make("bloom", pretraining_tp=2, slow_but_exact=True), batch([9, 4])
    expected = generate(model, inputs)
    with caplog.at_level(logging.WARNING, "torch_paged"), torch_paged.paged(model):
        assert_same_tokens(model, expected, generate(model, inputs), prompt=inputs)
    (message,) = messages(caplog)
    assert message.startswith("BloomForCausalLM: slow_but_exact")


def test_a_type_nobody_has_tried_gathers(caplog: pytest.LogCaptureFixture) -> None:
    """A config class of the user's own, as remote code has it."""

    class OwnConfig(LlamaConfig):
        model_type = "my-own-llama"

    torch.manual_seed(0)
    model, inputs = sharpen(LlamaForCausalLM(OwnConfig(**SMALL)).eval()), batch([9, 4])
    expected = generate(model, inputs)
    with caplog.at_level(logging.WARNING, "torch_paged"), torch_paged.paged(model), count_calls() as calls:
        assert_same_tokens(model, expected, generate(model, inputs), prompt=inputs)
    assert calls["gather"] > 0 == calls["paged.attention"]
    assert "model type 'my-own-llama' is not among the native ones" in caplog.text


def _t5() -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    return tiny_t5(), batch([19, 5])


def _bart() -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    config = BartConfig(
        vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=128,
        decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return sharpen(BartForConditionalGeneration(config).eval()), batch([19, 5])


def _whisper() -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    config = WhisperConfig(
        vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=8, max_source_positions=20,
        max_target_positions=64, decoder_start_token_id=3, suppress_tokens=None, begin_suppress_tokens=None,
        bos_token_id=1, eos_token_id=2, pad_token_id=PAD,
    )  # fmt: skip
    features = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    return sharpen(WhisperForConditionalGeneration(config).eval()), {"input_features": features}


@pytest.mark.parametrize("mode", ["greedy", "beams", "samples"])
@pytest.mark.parametrize("build", [_t5, _bart, _whisper])
def test_encoder_decoders_gather_their_self_attention(build: Any, mode: str, caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = build()
    expected = generate(model, inputs, **MODES[mode])
    with (
        caplog.at_level(logging.WARNING, "torch_paged"),
        torch_paged.paged(model, block_size=4) as handle,
        count_calls() as calls,
    ):
        actual = generate(model, inputs, **MODES[mode])
        assert handle.stats().peak_bytes > 0 == handle.stats().blocks_used
    assert torch.equal(expected, actual)
    assert calls["gather"] > 0
    (message,) = messages(caplog)
    assert message.startswith(f"{type(model).__name__}: encoder-decoder models are not among the native ones")


@pytest.mark.parametrize("build", [_bart, _whisper])
def test_a_compiled_forward_gathers_by_the_tables_of_its_own_step(build: Any) -> None:
    model, inputs = build()
    options: dict[str, Any] = dict(max_new_tokens=9, do_sample=False, eos_token_id=None)
    expected = model.generate(**inputs, **options)
    torch.compiler.reset()
    model.forward = torch.compile(model.forward, backend="eager")
    with torch_paged.paged(model, block_size=4):
        assert torch.equal(model.generate(**inputs, **options), expected)
