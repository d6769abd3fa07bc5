"""PagedKV: what a cache layer hands to the model instead of K or V, a tensor's shape over blocks of the pool."""

from __future__ import annotations

import sys
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
        self.stand_for(layer, last)

    def stand_for(self, layer: PagedLayer, last: int) -> None:
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


def paged_pair(
    layer: PagedLayer, last: int, key: Tensor, value: Tensor, before: tuple[PagedKV, PagedKV] | None
) -> tuple[PagedKV, PagedKV]:
    """What `layer` gives the model for the `last` of its columns.

    Args:
        key, value: `[batch, heads, width, head_dim]`, with the dtypes and devices that stock would give.
        before: what another layer gave it in the same forward pass, with the same shapes. Where the model has let go
            of it, it serves again: new tensors take 6 of 24 microseconds that the host spends in a layer.
    """
    if before is not None and _is_free(before):
        before[0].pair.stand_for(layer, last)
        return before
    pair = GatheredPair(layer, last)
    return PagedKV(pair, 0, key), PagedKV(pair, 1, value)


def _is_free(kept: tuple[PagedKV, PagedKV]) -> bool:
    """Whether nobody else has these, in Python (the tuple and the argument refer to each) or below."""
    return (
        sys.getrefcount(kept[0]) <= 2
        and sys.getrefcount(kept[1]) <= 2
        and kept[0]._use_count() == 1  # type: ignore[attr-defined]
        and kept[1]._use_count() == 1  # type: ignore[attr-defined]
    )


def materialize(value: Any) -> Any:
    """The gathered tensor of a PagedKV; anything else as it is."""
    return value.pair.tensors()[value.position] if isinstance(value, PagedKV) else value
