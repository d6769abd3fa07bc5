"""PagedKV: what a cache layer hands to the model instead of K or V, a tensor's shape over blocks of the pool."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from torch_paged.hf.call import NeedsOwnAttention, in_native_call

if TYPE_CHECKING:
    from torch_paged.hf.layer import PagedLayer


class GatheredPair:
    """A layer's K and V as tensors, the `last` of its columns, gathered together when either is first needed."""

    def __init__(self, layer: PagedLayer, last: int) -> None:
        self.layer = layer
        self.columns = layer.columns
        self.last = last
        self._tensors: tuple[Tensor, Tensor] | None = None

    def tensors(self) -> tuple[Tensor, Tensor]:
        if self._tensors is None:
            self._tensors = self.layer.gather(self.columns, self.last)
        return self._tensors


class PagedKV(Tensor):
    """All that a forward pass sees of a layer's K or V, `[batch, num_kv_heads, columns, head_dim]`, in its blocks.

    Our attention function reads the blocks in place. Any other operation sees the gathered tensor; in a native call,
    which has no mask that it could need next, it ends the call with NeedsOwnAttention.
    """

    pair: GatheredPair
    position: int

    @staticmethod
    def __new__(cls, pair: GatheredPair, position: int, like: Tensor) -> PagedKV:
        batch, heads, _, head_dim = like.shape
        self: PagedKV = Tensor._make_wrapper_subclass(
            cls, (batch, heads, pair.last, head_dim), dtype=like.dtype, device=like.device
        )
        self.pair = pair
        self.position = position
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if in_native_call():
            raise NeedsOwnAttention(f"code between cache and attention function computes with K or V ({func})")
        return func(*tree_map(materialize, args), **tree_map(materialize, kwargs or {}))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PagedKV(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


def materialize(value: Any) -> Any:
    """The gathered tensor of a PagedKV; anything else as it is."""
    return value.pair.tensors()[value.position] if isinstance(value, PagedKV) else value
