"""What is known of a model type: whether its attention can read blocks, by itself or with a module of patches/."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torch_paged.hf.disguise import disguise, stock_class

# Types whose attention goes through transformers' attention interface and reads nothing but what the cache returned.
# tests/hf/test_model_types.py compares each of them with stock and writes docs/model_types.md.
BY_INTERFACE = frozenset(
    """
    afmoe apertus arcee aria_text bamba bart beam bert bert-generation biogpt bitnet blenderbot blenderbot-small
    camembert cohere cohere2 cohere2_moe cohere_compass_text ctrl cwm data2vec-text dbrx dots1 electra emu3
    emu3_text_model ernie ernie4_5 ernie4_5_moe exaone4 exaone_moe flex_olmo flint fuyu gemma gemma2 gemma3
    gemma3_text gemma3n_text gemma4 gemma4_text gemma4_unified_text glm glm4 glm4_moe got_ocr2 gpt-sw3 gpt2
    gpt_bigcode gpt_neox gpt_oss granite granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared
    helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder jais2 jamba kolibri1
    laguna lfm2 lfm2_moe lfm3 llama marian mbart mellum mimo_v2_flash minimax_m2 minimax_m3_vl_text ministral
    ministral3 mistral mixtral modernbert-decoder moss_transcribe_diarize nanochat nemotron nemotron_h olmo olmo2
    olmo3 olmo_hybrid olmoe opt pegasus persimmon phi phi3 phi4_multimodal phimoe plbart qwen2 qwen2_moe qwen3
    qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next recurrent_gemma roberta
    roberta-prelayernorm roc_bert seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma whisper xlm-roberta
    xlm-roberta-xl xmod
    """.split()  # noqa: SIM905  a list literal would take 110 lines
)
# Types with attention code of their own, each with a module of this name in patches/.
BY_PATCH = frozenset({"bloom", "codegen", "falcon", "gpt_neo", "gptj", "mpt"})
# Why others gather, as the warning says it.
GATHERS = {
    "it caches compressed latents (MLA) and expands them itself": (
        "axk1 bailing_hybrid deepseek_v2 deepseek_v3 glm4_moe_lite kimi_linear longcat_flash minicpm3 youtu"
    ),
    "its attention code is its own and outside transformers' attention interface": (
        "big_bird cpmant git gpt_neox_japanese megatron-bert mvp prophetnet rembert roformer trocr xglm"
    ),
    "it computes with K or V between cache and attention": "diffllama doge jetmoe",
    "its masks are neither causal nor sliding windows": (
        "bigbird_pegasus dots3_note_text gemma4_unified llama4 llama4_text mllama mllama_text_model moshi"
    ),
}
# Why others keep stock's cache.
KEEPS_STOCK = {
    "it keeps no keys and values and computes every token anew in each step": "openai-gpt xlm",
    "it keeps another state than keys and values": "falcon_mamba mamba mamba2 reformer rwkv",
    "its keys and values are in a cache of its own": "minimax xlnet",
    "its cache layers choose keys by an index": ("axk2 deepseek_v32 glm_moe_dsa hy_v4 qwen4_exp qwen4_exp_text"),
    "its cache layers hold more than keys and values": (
        "deepseek_v4 falcon_h1 inkling2_text inkling_text zamba zamba2 zaya"
    ),
}


@dataclass(frozen=True)
class Family:
    """A model type.

    Attributes:
        reason: why attention cannot read blocks; "" if it can.
        stock: nothing can be paged.
        attention: class name of the attention modules that need another class for it; "": none do.
        native_class: that class, a subclass of the one it is given.
        not_native: why it cannot for a certain config of this type; "" if it can.
        converts_mask: the model computes with its mask and cannot do with None.
        packed_without_positions: tokens of different rows can stand in one row of its inputs though it takes no
            position_ids, as its attention alone depends on positions.
    """

    reason: str = ""
    stock: bool = False
    attention: str = ""
    native_class: Callable[[type[Any]], type[Any]] | None = None
    not_native: Callable[[Any], str] = lambda config: ""
    converts_mask: bool = False
    packed_without_positions: bool = False

    def install(self, model: nn.Module) -> None:
        """Give the attention modules of `model` the class that reads blocks in native calls."""
        for module in self._modules(model):
            stock: Any = type(module)
            if self.native_class is not None and stock_class(stock) is stock:
                module.__class__ = _once_per_class(self.native_class, stock)  # type: ignore[arg-type]

    def uninstall(self, model: nn.Module) -> None:
        """Undo `install`."""
        for module in self._modules(model):
            module.__class__ = stock_class(type(module))

    def _modules(self, model: nn.Module) -> list[nn.Module]:
        return [module for module in model.modules() if type(module).__name__ == self.attention]


@functools.cache
def _once_per_class(native_class: Any, base: Any) -> type[Any]:
    cls: type[Any] = native_class(base)
    disguise(cls, base)
    return cls


@functools.cache
def family(model_type: str) -> Family:
    """What is known of `model_type`."""
    if model_type in BY_PATCH:
        known: Family = importlib.import_module(f"torch_paged.patches.{model_type}").FAMILY
        return known
    for reason, model_types in (GATHERS | KEEPS_STOCK).items():
        if model_type in model_types.split():
            return Family(reason=reason, stock=reason in KEEPS_STOCK)
    if model_type not in BY_INTERFACE:
        return Family(reason=f"model type {model_type!r} is not among the native ones")
    return Family()


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def converts_mask(model_type: str) -> bool:
    """Whether models of this type compute with their mask."""
    return family(model_type).converts_mask
