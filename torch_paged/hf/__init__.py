"""Paging inside HuggingFace `generate`: the cache, the attention and mask functions, the patch."""

from torch_paged.hf import attention, mask  # noqa: F401  registers the "torch_paged" attention and mask functions
from torch_paged.hf.cache import PagedCache
from torch_paged.hf.config import PagedConfig
from torch_paged.hf.handle import PagedHandle
from torch_paged.hf.many import GenerationRequest, GenerationResult, NewTokens, generate_many
from torch_paged.hf.patch import paged, patch, unpatch
from torch_paged.memory import PoolExhausted

__all__ = [
    "GenerationRequest",
    "GenerationResult",
    "NewTokens",
    "PagedCache",
    "PagedConfig",
    "PagedHandle",
    "PoolExhausted",
    "generate_many",
    "paged",
    "patch",
    "unpatch",
]
