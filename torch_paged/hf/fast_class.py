"""What the classes of fast layers have in common: when an op may run, what it refuses, where the classes are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torch_paged.ops._library import is_refusal

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# An attribute of the stock class: a table of classes would keep those that nothing else keeps.
_FAST_CLASS = "_torch_paged_fast_class"


def own_forward(stock: Any) -> Any:
    """Return the forward that a module class defines itself, next to nn.Module; None for classes of other kinds.

    Classes that others derive at run time, as for parametrizations, stay what they are, and so do scripted modules.
    """
    own = vars(stock)
    return own.get("forward") if stock.__bases__ == (nn.Module,) and "__init_subclass__" not in own else None


def kept_with(stock: Any, make: Callable[[Any], Any]) -> Any:
    """Return the fast class of `stock`, made once."""
    if _FAST_CLASS not in vars(stock):
        setattr(stock, _FAST_CLASS, make(stock))
    return vars(stock)[_FAST_CLASS]


def may_run(input: Any) -> bool:
    """Whether an op, which knows neither gradients nor autocast, may have this input."""
    return (
        type(input) is Tensor
        and input.is_cpu
        and input.layout is torch.strided
        and not input.is_nested
        and input.dtype in _DTYPES
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def runs_otherwise(module: nn.Module) -> bool:
    """Whether a module has a forward of its own, or is compiled by itself."""
    return "forward" in vars(module) or module._compiled_call_impl is not None


def is_watched(module: nn.Module) -> bool:
    """Whether somebody looks at what goes into a module or comes out of it, or computes it in another way."""
    return bool(runs_otherwise(module) or module._forward_hooks or module._forward_pre_hooks)


def attempt(op: Callable[..., Any], *arguments: Any) -> Any:
    """Return what an op computes, None where it refuses what PyTorch may compute, or refuses in its own words."""
    try:
        return op(*arguments)
    except RuntimeError as error:
        if is_refusal(error) or isinstance(error, NotImplementedError):
            return None
        raise
