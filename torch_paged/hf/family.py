"""What is known of a model type: whether its attention can read blocks, by itself or with a module of patches/."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from torch_paged.hf.disguise import disguise, stock_class

# Types whose attention goes through transformers' attention interface and reads nothing but what the cache returned.
# tests/hf/test_model_types.py compares each of them with stock and writes docs/model_types.md.
BY_INTERFACE = frozenset(
    """
    afmoe apertus arcee aria_text bamba bart beam biogpt bitnet blenderbot blenderbot-small cohere cohere2
    cohere2_moe cohere_compass_text ctrl cwm dbrx dots1 emu3 ernie4_5 ernie4_5_moe exaone4 exaone_moe flex_olmo
    flint gemma gemma2 gemma3 gemma3_text gemma3n_text gemma4_text glm glm4 glm4_moe gpt-sw3 gpt2 gpt_bigcode
    gpt_neox gpt_oss granite granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared helium
    hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder jais2 jamba kolibri1 laguna
    lfm2 lfm2_moe lfm3 llama marian mbart mellum mimo_v2_flash minimax_m2 minimax_m3_vl_text ministral
    ministral3 mistral mixtral modernbert-decoder nanochat nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid
    olmoe opt pegasus persimmon phi phi3 phi4_multimodal phimoe plbart qwen2 qwen2_moe qwen3 qwen3_5 qwen3_5_moe
    qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next recurrent_gemma seed_oss smollm3 solar_open stablelm
    starcoder2 vaultgemma whisper
    """.split()  # noqa: SIM905  a list literal would take 110 lines
)
# Types with attention code of their own, each with a module of this name in patches/.
BY_PATCH = frozenset({"bloom", "codegen", "falcon", "gpt_neo", "gptj", "mpt"})


@dataclass(frozen=True)
class Family:
    """A model type.

    Attributes:
        native: attention can read blocks.
        attention: class name of the attention modules that need another class for it; "": none do.
        native_class: that class, a subclass of the one it is given.
        not_native: why a config of this type cannot run natively, or None.
        converts_mask: the model computes with its mask and cannot do with None.
    """

    native: bool = True
    attention: str = ""
    native_class: Callable[[type[Any]], type[Any]] | None = None
    not_native: Callable[[Any], str | None] = lambda config: None
    converts_mask: bool = False

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
    return Family(native=model_type in BY_INTERFACE)
