"""Paged KV memory for HuggingFace `generate`, and the custom ops underneath it."""

import logging
from typing import TYPE_CHECKING, Any

from torch_paged import compile, ops
from torch_paged._version import __version__
from torch_paged.compile import CompileOptions

if TYPE_CHECKING:
    from torch_paged.hf import (
        GenerationRequest,
        GenerationResult,
        NewTokens,
        PagedCache,
        PagedConfig,
        PagedHandle,
        PoolExhausted,
        generate_many,
        paged,
        patch,
        unpatch,
    )

__all__ = [
    "CompileOptions",
    "GenerationRequest",
    "GenerationResult",
    "NewTokens",
    "PagedCache",
    "PagedConfig",
    "PagedHandle",
    "PoolExhausted",
    "__version__",
    "compile",
    "generate_many",
    "ops",
    "paged",
    "patch",
    "unpatch",
]

logging.getLogger("torch_paged").addHandler(logging.NullHandler())
compile.register()


def __getattr__(name: str) -> Any:
    # Resolved on first use, so that the ops work where transformers is not installed.
    if name in __all__:
        from torch_paged import hf

        return getattr(hf, name)
    raise AttributeError(f"module 'torch_paged' has no attribute {name!r}")
