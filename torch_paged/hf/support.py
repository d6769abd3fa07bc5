"""Which models run natively, which gather, which keep stock's cache, and why."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from transformers import PreTrainedModel

from torch_paged.hf.family import family
from torch_paged.hf.implementation import PagedImplementation

# What torch.ops.paged.attention takes.
HEAD_DIM_STEP, MAX_HEAD_DIM = 8, 512


class Path(Enum):
    """How a model's KV is handled while it is patched; the value says it to the user."""

    NATIVE = "attention reads the blocks in place"
    GATHER = (
        "KV is stored in blocks and gathered for the model's own attention: the same tokens and the same memory held, "
        "one layer's K and V copied in every layer and step"
    )
    STOCK = "the model keeps the stock cache: nothing is paged"


@dataclass(frozen=True)
class Support:
    path: Path
    reason: str = ""


def model_support(model: PreTrainedModel) -> Support:
    """The path `generate` takes with the cache it would make for `model`."""
    config = model.config
    devices = {p.device.type for p in model.parameters()} - {"meta", "cpu"}
    for device in sorted(devices):
        if not has_kernel("paged::attention", device):
            return Support(Path.STOCK, f"this build has no paged attention for device {device!r}")
    if config.is_encoder_decoder:
        return Support(Path.GATHER, "encoder-decoder models are not among the native ones")
    if getattr(config.get_text_config(decoder=True), "sliding_window", None) == 1:
        return Support(Path.STOCK, "stock's cache keeps every token of a sliding window of 1")
    known = family(config.model_type)
    if reason := known.reason or known.not_native(config):
        return Support(Path.STOCK if known.stock else Path.GATHER, reason)
    if getattr(config, "add_cross_attention", False):
        return Support(Path.GATHER, "cross-attention is not among the native paths")
    if getattr(config, "reorder_and_upcast_attn", False):
        return Support(Path.GATHER, "reorder_and_upcast_attn has its own attention code")
    if not getattr(config, "is_causal", True):
        return Support(Path.GATHER, "bidirectional attention is not among the native paths")
    if problem := head_dims_problem(*_head_dims(config.get_text_config(decoder=True))):
        return Support(Path.GATHER, problem)
    return Support(Path.NATIVE)


def head_dims_problem(*head_dims: int) -> str | None:
    """Why `torch.ops.paged.attention` does not take these head sizes, or None."""
    for head_dim in head_dims:
        if head_dim % HEAD_DIM_STEP or head_dim > MAX_HEAD_DIM:
            return f"head_dim {head_dim} is no multiple of {HEAD_DIM_STEP} up to {MAX_HEAD_DIM}"
    return None


def dtype_problem(dtype: torch.dtype, device_type: str) -> str | None:
    """Why `torch.ops.paged.attention` does not take this dtype on this kind of device, or None."""
    if dtype == torch.float64 and device_type != "cpu":
        return f"attention in float64 is not among the kernels for {device_type}"
    return None


def _head_dims(config: Any) -> list[int]:
    """What the config tells of head sizes: nothing where layers differ, which show theirs when they first run."""
    sizes = config.to_dict()
    if sizes.get("head_dim"):
        return [sizes["head_dim"]]
    try:
        return [config.hidden_size // config.num_attention_heads]
    except AttributeError:
        return []


def training_reason(model: PreTrainedModel) -> str | None:
    """Why a model in training mode needs its own attention, or None."""
    if not model.training:
        return None
    if _attention_dropout(model.config.to_dict()):
        return "training applies the dropout of the model's own attention"
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return "gradient checkpointing keeps the cache from the layers"
    return None


def _attention_dropout(config: dict[str, Any]) -> bool:
    """Whether a config asks for dropout of attention weights, under any of the names that models have for it."""
    return any(
        _attention_dropout(value)
        if isinstance(value, dict)
        else "att" in str(name) and "drop" in str(name) and bool(value)
        for name, value in config.items()
    )


def implementation_reason(model: PreTrainedModel) -> str | None:
    """Why a model whose attention implementation was changed while it was patched cannot run natively, or None."""
    chosen = model.config._attn_implementation
    if isinstance(chosen, PagedImplementation):
        return None
    return f"the attention implementation {chosen!r} was chosen after the patch"


def has_kernel(op: str, device_type: str) -> bool:
    key = {"cuda": "CUDA", "cpu": "CPU"}.get(device_type)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(op, key)
