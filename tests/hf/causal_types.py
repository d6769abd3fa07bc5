"""Every causal model type of the installed transformers, tiny and random from its config class."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .models import EOS, PAD, VOCAB, sharpen

CAUSAL_TYPES: list[str] = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
WINDOW = 8

# What a config calls its sizes, and how large they are here.
SIZES: dict[str, int] = {
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "embedding_size", "emb_dim", "dim_model_base"], 64),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks"], 3),
    **dict.fromkeys(["decoder_layers", "encoder_layers", "num_encoder_layers", "num_decoder_layers"], 3),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"], 4),
    **dict.fromkeys(["decoder_attention_heads", "encoder_attention_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads", "linear_num_key_heads", "linear_num_value_heads"], 2),
    **dict.fromkeys(["head_dim", "linear_key_head_dim", "linear_value_head_dim", "index_head_dim"], 16),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "d_ff", "d_inner", "dim_ff", "dff", "ffn_hidden_size"], 96),
    **dict.fromkeys(["decoder_ffn_dim", "encoder_ffn_dim"], 96),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"], 32),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "model_max_length", "max_seq_len"], 256),
    **dict.fromkeys(["num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "num_experts_per_token", "index_n_heads"], 2),
    **dict.fromkeys(["n_group", "topk_group", "num_expert_group", "max_window_layers"], 1),
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim", "mamba_d_head"], 16),
    **dict.fromkeys(["qk_rope_head_dim", "rotary_dim", "mamba_n_heads", "mamba_chunk_size"], 8),
    **dict.fromkeys(["mamba_d_state", "state_size", "time_step_rank", "mamba_dt_rank"], 4),
    **dict.fromkeys(["sliding_window", "sliding_window_size", "window_size"], WINDOW),
    **dict.fromkeys(["vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"], VOCAB),
    **dict.fromkeys(["pronunciation_vocab_size", "shape_vocab_size"], VOCAB),
    **dict.fromkeys(["pronunciation_embed_dim", "shape_embed_dim", "laurel_rank"], 8),
    **dict.fromkeys(["hidden_size_per_layer_input", "swa_head_dim", "linear_head_dim", "rel_extent"], 16),
    "linear_num_heads": 4,
    "qk_head_dim": 24,
    "index_topk": 64,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}  # fmt: skip
NONE_BY_DEFAULT = ("pad_token_id", "eos_token_id", "bos_token_id", "num_key_value_heads", "head_dim")

_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_HYBRID = ["linear_attention", "full_attention", "full_attention"]
_LATENT = dict(head_dim=8, num_key_value_heads=4)
_DECODER = dict(is_decoder=True)
_INDEXED = dict(
    layer_types=_HYBRID, indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=64,
    indexer_compress_ratio=2, ple_embed_dim=32, heads_per_ngram=2, ngram_vocab_size_base=64, split_ngram_parts=2,
    make_ngram_vocab_size_divisible_by=8, hc_lowrank=8,
)  # fmt: skip
# What the sizes above leave inconsistent, and what makes an encoder a causal decoder.
MORE: dict[str, dict[str, Any]] = {
    **dict.fromkeys(["axk1", "axk2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa"], _LATENT),
    **dict.fromkeys(["minicpm3", "youtu"], _LATENT),
    **dict.fromkeys(["bert", "bert-generation", "bigbird_pegasus", "blenderbot", "camembert"], _DECODER),
    **dict.fromkeys(["electra", "ernie", "megatron-bert", "rembert", "roberta", "roberta-prelayernorm"], _DECODER),
    **dict.fromkeys(["data2vec-text", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "big_bird"], _DECODER),
    **dict.fromkeys(["qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"], dict(layer_types=_HYBRID)),
    **dict.fromkeys(["qwen3_5", "qwen3_5_moe"], dict(text_config=dict(layer_types=_HYBRID))),
    "bailing_hybrid": _LATENT | dict(layer_types=_HYBRID, mlp_layer_types=["dense", "sparse", "sparse"]),
    "blt": dict(encoder_hash_byte_group_vocab=64),
    "bamba": dict(attn_layer_indices=[1]),
    "cohere_compass_text": dict(
        rope_parameters={"full_attention": _ROPE, "sliding_attention": _ROPE},
        layer_types=["sliding_attention", "full_attention", "full_attention"],
    ),
    "dbrx": dict(
        attn_config=dict(kv_n_heads=2, rope_theta=1e4, clip_qkv=8.0),
        ffn_config=dict(ffn_hidden_size=96, moe_num_experts=4, moe_top_k=2),
    ),
    "deepseek_v2": _LATENT | dict(topk_method="greedy", num_experts_per_tok=2),
    "dots1": dict(n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2),
    "dots3_note_text": dict(
        layer_types=["indexed_attention", "sliding_attention", "sliding_attention"], head_dim=24, num_key_value_heads=4,
        mlp_layer_types=["dense", "sparse", "sparse"], per_layer_config={},
    ),
    "ernie4_5_moe": dict(moe_k=2),
    "falcon_h1": dict(mamba_d_ssm=128),
    "gemma3n_text": dict(
        num_hidden_layers=4, num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 2,
        intermediate_size=96, activation_sparsity_pattern=[0.0] * 4,
    ),
    "gemma4_text": dict(layer_types=["sliding_attention", "sliding_attention", "full_attention"], per_layer_config={}),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]], num_layers=2),
    "granitemoehybrid": dict(layer_types=["mamba", "attention", "attention"]),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False),
    "kimi_linear": _LATENT | dict(layer_types=_HYBRID),
    "lfm2_moe": dict(layer_types=["conv", "full_attention", "full_attention"]),
    "longcat_flash": _LATENT | dict(zero_expert_num=2, moe_topk=2),
    "mamba2": dict(num_heads=8, head_dim=16),
    "mpt": dict(use_cache=True),
    "qwen4_exp_text": _INDEXED,
    "qwen4_exp": dict(text_config=_INDEXED),
    "reformer": dict(is_decoder=True, axial_pos_embds_dim=[16, 48], axial_pos_shape=[4, 64]),
    "xmod": dict(is_decoder=True, default_language="en_XX"),
    "zamba": dict(
        num_hidden_layers=6, layers_block_type=["linear_attention", "hybrid"] * 3, num_key_value_heads=4,
        attention_hidden_size=128, attention_head_dim=32,
    ),
    "zamba2": dict(
        layers_block_type=["linear_attention", "hybrid", "linear_attention"], chunk_size=8, mamba_headdim=16,
        n_mamba_heads=8,
    ),
    "zaya": dict(num_experts_per_tok=1),
}  # fmt: skip


def tiny_config(model_type: str, **more: Any) -> PreTrainedConfig:
    """The config of `model_type` with small sizes, and `more` over that."""
    config_class = CONFIG_MAPPING[model_type]
    arguments = _sizes(config_class())
    for name, value in (MORE.get(model_type, {}) | more).items():
        nested = isinstance(value, dict) and isinstance(arguments.get(name), dict)
        arguments[name] = arguments[name] | value if nested else value
    return config_class(**arguments)


def tiny_causal(model_type: str, **more: Any) -> PreTrainedModel:
    """A model of `model_type` in float32, with weights large enough that its tokens depend on the whole context."""
    torch.manual_seed(0)
    return sharpen(AutoModelForCausalLM.from_config(tiny_config(model_type, **more)).eval())


def _sizes(config: PreTrainedConfig) -> dict[str, Any]:
    sizes: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        part = getattr(config, name, None) if isinstance(value, dict) else value
        if isinstance(part, PreTrainedConfig):
            sizes[name] = _sizes(part)
        elif name in SIZES and ((value is None and name in NONE_BY_DEFAULT) or type(value) is int):
            sizes[name] = SIZES[name]
    return sizes
