"""Tiny models of many families, in the form that the mixins of transformers' tests ask for."""

from __future__ import annotations

import unittest
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
)

from . import upstream

VOCAB = 99
# Under the names that most configs know; an attribute map translates them for the others.
TINY: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
# Shorter than the prompts below, so that it matters.
WINDOW = 5
EXPERTS: dict[str, Any] = dict(
    num_experts=4,
    num_local_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
)
TYPES = ["full_attention", "sliding_attention"]
# By the name of the family's folder in transformers; the model type where it has another name.
FAMILIES: dict[str, dict[str, Any]] = {
    "bart": dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
                 encoder_ffn_dim=32, decoder_ffn_dim=32, decoder_start_token_id=2, forced_eos_token_id=None),
    "bloom": {},
    "codegen": dict(rotary_dim=4, n_ctx=512),
    "cohere2": dict(sliding_window=WINDOW, layer_types=TYPES, logit_scale=1.0),
    "exaone4": dict(sliding_window=WINDOW, layer_types=TYPES),
    "falcon": dict(alibi=True, new_decoder_architecture=False),
    "gemma": dict(head_dim=8),
    "gemma2": dict(head_dim=8, sliding_window=WINDOW, layer_types=TYPES),
    "gemma3": dict(model_type="gemma3_text", head_dim=8, sliding_window=WINDOW, layer_types=TYPES),
    "gpt2": {},
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]], window_size=WINDOW),
    "gpt_neox": {},
    "gpt_oss": dict(head_dim=8, sliding_window=WINDOW, layer_types=TYPES, **EXPERTS),
    "gptj": dict(rotary_dim=4),
    "granite": {},
    "llama": {},
    "mistral": dict(sliding_window=WINDOW),
    "mixtral": EXPERTS,
    "mpt": dict(d_model=32, n_heads=4, n_layers=2, max_seq_len=512),
    "olmo2": {},
    "opt": dict(ffn_dim=32, word_embed_proj_dim=32),
    "phi": dict(partial_rotary_factor=0.5),
    "phi3": {},
    "qwen2": dict(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "qwen2_moe": EXPERTS,
    "qwen3": dict(head_dim=8),
    "smollm3": dict(no_rope_layers=[1, 0]),
    "stablelm": {},
    "starcoder2": dict(sliding_window=WINDOW),
    "t5": dict(d_model=32, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=2, num_heads=4, decoder_start_token_id=0),
}  # fmt: skip


def config_of(family: str) -> PreTrainedConfig:
    settings = dict(FAMILIES[family])
    return CONFIG_MAPPING[settings.pop("model_type", family)](**(TINY | settings))


class ModelTester:
    """What the mixins call a model tester: sizes, a config and inputs for it."""

    batch_size = 13
    seq_length = encoder_seq_length = decoder_seq_length = key_length = 7
    num_hidden_layers = 2
    num_attention_heads = 4
    hidden_size = 32
    vocab_size = VOCAB
    pad_token_id = 0
    is_training = True

    def __init__(self, family: str) -> None:
        self.family = family
        config = config_of(family)
        self.base_model_class = MODEL_MAPPING[type(config)]
        heads = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if config.is_encoder_decoder else MODEL_FOR_CAUSAL_LM_MAPPING
        self.causal_lm_class = heads[type(config)]

    def get_config(self) -> PreTrainedConfig:
        return config_of(self.family)

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
        config = self.get_config()
        tokens = upstream.module("test_modeling_common").ids_tensor([self.batch_size, self.seq_length], VOCAB)
        # No padding inside: eos and pad would end or hide what the tests look at.
        tokens = tokens.clamp(min=3)
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        if config.is_encoder_decoder:
            inputs |= {"decoder_input_ids": tokens.flip(1), "decoder_attention_mask": torch.ones_like(tokens)}
        else:
            inputs["attention_mask"] = inputs["attention_mask"].tril()
        return config, inputs


def case_of(family: str) -> type[unittest.TestCase]:
    """The tests of ModelTesterMixin, and of TrainingTesterMixin for decoders, over the family's generating class."""
    common, training = upstream.module("test_modeling_common"), upstream.module("test_training_mixin")

    class Case(common.ModelTesterMixin, common.GenerationTesterMixin, training.TrainingTesterMixin, unittest.TestCase):  # type: ignore[misc, name-defined]
        model_tester = None
        is_encoder_decoder = config_of(family).is_encoder_decoder

        def setUp(self) -> None:
            self.model_tester = ModelTester(family)
            self.all_model_classes = (self.model_tester.causal_lm_class,)

        def test_training_overfit(self) -> None:
            if self.is_encoder_decoder:
                self.skipTest("made for decoders: the prompt is part of what it compares")
            # It generates what the model has just learnt, without a cache; here with one, which is what we page.
            with _with_cache():
                super().test_training_overfit()

    Case.__name__ = Case.__qualname__ = f"{family}Test"
    return Case


def executorch_case() -> type[unittest.TestCase]:
    """The tests of export, over a tiny Llama of ours instead of the Hub's."""
    executorch = upstream.module("test_executorch")

    class TinyLlama:
        @staticmethod
        def from_pretrained(name: str) -> Any:
            return AutoModelForCausalLM.from_config(config_of("llama"))

    executorch.AutoModelForCausalLM = TinyLlama
    case: type[unittest.TestCase] = executorch.ExecutorchTest
    return case


@contextmanager
def _with_cache() -> Iterator[None]:
    stock = GenerationMixin.generate

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        return stock(self, *args, **(kwargs | {"use_cache": True}))

    with mock.patch.object(GenerationMixin, "generate", generate):
        yield
