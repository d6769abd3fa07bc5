"""A backward pass through a paged cache is an error: blocks keep values, no graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def without_gradient(anchor: Tensor, make: Callable[[], Tensor]) -> Tensor:
    """`make()`; where `anchor` asks for a gradient, a backward pass that comes through the result raises.

    Inference under an enabled autograd works, and no parameter's gradient is silently incomplete.
    """
    if torch.is_grad_enabled() and anchor.requires_grad:
        result: Tensor = _WithoutGradient.apply(anchor, make)  # type: ignore[no-untyped-call]
        return result
    return make()


class _WithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, make: Callable[[], Tensor]) -> Tensor:
        return make()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(
            "backward through a PagedCache: its blocks keep no graph; train without past_key_values, "
            "or pass a DynamicCache where the gradient must flow through the cache"
        )
