"""Tiny random models and ragged batches for the generate tests."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DiffLlamaConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    JambaConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    T5Config,
    T5ForConditionalGeneration,
    XGLMConfig,
)

VOCAB = 211
PAD, EOS = 0, 210
SMALL: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=1,
    eos_token_id=EOS,
    pad_token_id=PAD,
)
WINDOW = 13
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**SMALL),
    "qwen2": lambda: Qwen2Config(**SMALL),
    "qwen2-sliding": lambda: Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "qwen3": lambda: Qwen3Config(**SMALL, head_dim=24),
    "mistral": lambda: MistralConfig(**SMALL, sliding_window=WINDOW),
    "mistral-full": lambda: MistralConfig(**SMALL, sliding_window=None),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB, n_embd=64, n_layer=3, n_head=4, n_positions=512, bos_token_id=1, eos_token_id=EOS
    ),
    "gemma": lambda: GemmaConfig(**SMALL, head_dim=16),
    # A softcap that bites at the logits of a tiny model. Sliding and full layers in turn, as in gpt-oss.
    "gemma2": lambda: Gemma2Config(
        **SMALL, head_dim=16, query_pre_attn_scalar=16, sliding_window=WINDOW, attn_logit_softcapping=0.2,
        tie_word_embeddings=False,
    ),
    "gpt_oss": lambda: GptOssConfig(
        **SMALL, head_dim=16, sliding_window=WINDOW, num_local_experts=4, num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **SMALL, head_dim=16, query_pre_attn_scalar=16, sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "phi": lambda: PhiConfig(**SMALL),
    "mixtral": lambda: MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
    "gpt_neox": lambda: GPTNeoXConfig(**SMALL),
    "opt": lambda: OPTConfig(
        vocab_size=VOCAB, hidden_size=64, ffn_dim=128, num_hidden_layers=3, num_attention_heads=4, pad_token_id=PAD,
        word_embed_proj_dim=64,
    ),
    "bloom": lambda: BloomConfig(vocab_size=VOCAB, hidden_size=64, n_layer=3, n_head=4, pad_token_id=PAD),
    # Layers of keys and values among layers of another state, and a model without any.
    "jamba": lambda: JambaConfig(
        **SMALL, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False, num_experts=2, mamba_d_state=4
    ),
    "mamba": lambda: MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4),
    # Attention that splits V before it attends, and attention code of its own.
    "diffllama": lambda: DiffLlamaConfig(**SMALL),
    "xglm": lambda: XGLMConfig(vocab_size=VOCAB, d_model=64, ffn_dim=128, num_layers=3, attention_heads=4),
    "window-of-one": lambda: MistralConfig(**SMALL, sliding_window=1),
}  # fmt: skip
NATIVE = ["llama", "qwen2", "qwen2-sliding", "qwen3", "mistral", "mistral-full", "gpt2", "opt", "bloom", "jamba"]
GATHERED = ["diffllama", "xglm"]
# With the attention implementation to build them with.
WITH_IMPLEMENTATION: list[tuple[str, str | None]] = [
    ("llama", "sdpa"),
    ("llama", "eager"),
    ("gpt2", "sdpa"),
    ("gpt2", "eager"),
    ("qwen2-sliding", "sdpa"),
    ("qwen2-sliding", "eager"),
    ("gemma2", "eager"),
    ("gpt_oss", "eager"),
    ("opt", "sdpa"),
    ("bloom", None),
    ("diffllama", None),
]

# One of each kind: full attention, sliding layers beside full ones, learned positions, gathered.
FAMILIES = ["llama", "qwen2-sliding", "gpt2", "diffllama"]


def tiny(name: str, dtype: torch.dtype = torch.float32, attn_implementation: str | None = None) -> PreTrainedModel:
    """A model with weights large enough that its tokens depend on the whole context."""
    torch.manual_seed(0)
    config = CONFIGS[name]()
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation, dtype=dtype).eval()
    return sharpen(model)


def tiny_t5() -> PreTrainedModel:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=PAD
    )
    return sharpen(T5ForConditionalGeneration(config).eval())


def tiny_tokenizer(first: int = 0, size: int = VOCAB) -> PreTrainedTokenizerFast:
    """A character for each token, some after a space; the vocabulary in one order, which stock's draws depend on."""
    numbers = range(first, first + size)
    letters = [" " * (number % 7 == 0) + chr(33 + number if number < 90 else 0x100 + number) for number in numbers]
    tokenizer = Tokenizer(BPE(vocab={letter: token for token, letter in enumerate(letters)}, merges=[]))
    tokenizer.decoder = Fuse()
    tiny = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=letters[0], eos_token=letters[-1])
    tiny.get_vocab = lambda: {letter: token for token, letter in enumerate(letters)}
    return tiny


def twin(model: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(model)


def batch(lengths: Sequence[int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random prompts, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.full((len(lengths), width), PAD)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = torch.randint(3, EOS, (length,), generator=generator)
        mask[row, width - length :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: PreTrainedModel, inputs: dict[str, Any], seed: int = 7, **kwargs: Any) -> Any:
    torch.manual_seed(seed)
    defaults: dict[str, Any] = dict(max_new_tokens=24, do_sample=False, pad_token_id=PAD, eos_token_id=EOS)
    return model.generate(**inputs, **(defaults | kwargs))


def assert_same_tokens(
    stock: PreTrainedModel, expected: torch.Tensor, actual: torch.Tensor, prompt: dict[str, Any]
) -> None:
    """Equal token by token, but for a step where stock's logits of the two tokens lie closer than 1e-5.

    Args:
        prompt: the `input_ids` that both continue, and their `attention_mask` where there is one.
    """
    assert expected.shape == actual.shape
    ids = prompt["input_ids"]
    mask = prompt.get("attention_mask", torch.ones_like(ids))
    for row in (expected != actual).any(1).nonzero().flatten().tolist():
        step = int((expected[row] != actual[row]).nonzero()[0])
        new = step - ids.shape[1]
        assert new >= 0, "the prompt itself differs"
        seen = torch.nn.functional.pad(mask[row * len(mask) // len(expected)], (0, new), value=1)
        so_far = {"input_ids": expected[None, row, :step], "attention_mask": seen[None]}
        # Without a cache, a model that is patched is stock.
        options = dict(max_new_tokens=1, use_cache=False, return_dict_in_generate=True, output_logits=True)
        logits = generate(stock, so_far, **options).logits[0][0]
        apart = logits[expected[row, step]] - logits[actual[row, step]]
        assert abs(float(apart)) < 1e-5, f"row {row}, column {step}: {expected[row]} and {actual[row]}"


def sharpen(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return model
