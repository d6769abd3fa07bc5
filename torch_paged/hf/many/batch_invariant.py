"""Linear layers whose result for a token does not depend on how many tokens there are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# BLAS libraries choose a kernel, and with it the order of summation, by the shape: products are computed for exactly so
# many tokens at a time, the last ones with rows of zeros behind them.
_TILE = 32


@contextmanager
def batch_invariant(on: bool) -> Iterator[None]:
    """Compute `linear`, `addmm` and `matmul` with a weight `[in, out]` in tiles of one shape, if `on`.

    The idea of batch-invariant kernels (He et al., "Defeating Nondeterminism in LLM Inference", Thinking Machines Lab,
    2025), with the kernels that PyTorch has. Other products of activations and weights, such as the grouped ones of
    some mixtures of experts, are left as they are.
    """
    if not on:
        yield
        return
    with _Tiled():
        yield


class _Tiled(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear:
            tokens, weight, bias = (*args, None)[:3] if not kwargs else _linear_arguments(*args, **kwargs)
            return _in_tiles(tokens, weight.shape[0], lambda tile: func(tile, weight, bias))
        if func is torch.addmm and len(args) == 3 and not kwargs:
            bias, tokens, weight = args
            return _in_tiles(tokens, weight.shape[1], lambda tile: func(bias, tile, weight))
        if func in _MATMULS and len(args) == 2 and not kwargs and args[1].ndim == 2 and args[0].ndim >= 2:
            tokens, weight = args
            return _in_tiles(tokens, weight.shape[1], lambda tile: func(tile, weight))
        return func(*args, **kwargs)


_MATMULS = (torch.matmul, torch.mm, Tensor.matmul, Tensor.__matmul__)


def _linear_arguments(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Any]:
    return input, weight, bias


def _in_tiles(tokens: Tensor, width: int, product: Any) -> Tensor:
    """`product` of tokens `[..., in]`, tile by tile: `[..., out]`."""
    flat = tokens.reshape(-1, tokens.shape[-1])
    num_tiles = -(-len(flat) // _TILE)
    padded = flat.new_zeros(num_tiles * _TILE, flat.shape[1])
    padded[: len(flat)] = flat
    parts = [product(tile) for tile in torch.split(padded, _TILE)]
    result: Tensor = torch.cat(parts)[: len(flat)] if parts else flat.new_empty(0, width)
    return result.reshape(*tokens.shape[:-1], width)
