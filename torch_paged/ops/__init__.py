"""Custom ops over a paged KV cache, `torch.ops.paged.*`, with documented wrappers that raise ValueError."""

from torch_paged.ops._library import load_kernels
from torch_paged.ops.attention import attention
from torch_paged.ops.attention_with_lse import attention_with_lse
from torch_paged.ops.cache_layout import cache_view, empty_cache
from torch_paged.ops.copy_blocks import copy_blocks
from torch_paged.ops.cpu_instruction_set import cpu_instruction_set, cpu_instruction_sets
from torch_paged.ops.gated_linear import gated_linear
from torch_paged.ops.gather_cache import gather_cache
from torch_paged.ops.linear import linear
from torch_paged.ops.merge_attention_states import merge_attention_states
from torch_paged.ops.packed_linear import pack_linear_weight, packed_linear
from torch_paged.ops.qkv_linear import qkv_linear
from torch_paged.ops.reshape_and_cache import reshape_and_cache
from torch_paged.ops.rms_norm import rms_norm
from torch_paged.ops.rope_and_cache import rope_and_cache
from torch_paged.ops.swap_blocks import swap_blocks

load_kernels()

__all__ = [
    "attention",
    "attention_with_lse",
    "cache_view",
    "copy_blocks",
    "cpu_instruction_set",
    "cpu_instruction_sets",
    "empty_cache",
    "gated_linear",
    "gather_cache",
    "linear",
    "merge_attention_states",
    "pack_linear_weight",
    "packed_linear",
    "qkv_linear",
    "reshape_and_cache",
    "rms_norm",
    "rope_and_cache",
    "swap_blocks",
]
