"""The mask function "torch_paged": no mask where blocks are read in place, the model's own everywhere else."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from transformers import AttentionMaskInterface
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    sliding_window_causal_mask_function,
)

from torch_paged.hf.call import current, in_compiled_call, in_native_call
from torch_paged.hf.family import converts_mask
from torch_paged.hf.implementation import NAME, previous


def paged_mask(*args: Any, config: Any, mask_function: Callable[..., Any] = causal_mask_function, **kwargs: Any) -> Any:
    """transformers' mask interface.

    In a native call causality, window and padding follow from the lengths of the rows, so no causal or sliding mask is
    built. Any other mask, and all of them without a PagedCache in the call or in calls that gather, is that of the mask
    function the model had before the patch.
    """
    if in_compiled_call() and not kwargs.get("use_vmap"):
        return _NO_MASK if converts_mask(config.model_type) else None
    # Asked in native calls alone: Dynamo does not trace how a closure is looked into.
    if in_native_call() and not kwargs.get("use_vmap") and (window := _window(mask_function)) is not None:
        assert current.call is not None
        current.call.windows.add(window)
        return _NO_MASK if converts_mask(config.model_type) else None
    name = previous(config)
    # Implementations without a mask function get none from transformers either.
    if name not in ALL_MASK_ATTENTION_FUNCTIONS:
        return None
    return ALL_MASK_ATTENTION_FUNCTIONS[name](*args, config=config, mask_function=mask_function, **kwargs)


_NO_MASK = torch.empty(0, dtype=torch.bool)


def _window(mask_function: Callable[..., Any]) -> int | None:
    """The window of a causal mask, 0 where it has none; None for any other mask.

    transformers builds masks from closures: the code of one and of the functions it joins tells its kind.
    """
    if mask_function is causal_mask_function:
        return 0
    if _code(mask_function) != _SLIDING:
        return None
    window: int = inspect.getclosurevars(_joined(mask_function)[0]).nonlocals["sliding_window"]
    return window


def _joined(mask_function: Callable[..., Any]) -> tuple[Callable[..., Any], ...]:
    joined: tuple[Callable[..., Any], ...] = inspect.getclosurevars(mask_function).nonlocals.get("mask_functions", ())
    return joined


def _code(mask_function: Callable[..., Any]) -> list[CodeType]:
    return [mask_function.__code__, *(part.__code__ for part in _joined(mask_function))]


_SLIDING = _code(sliding_window_causal_mask_function(1))

AttentionMaskInterface.register(NAME, paged_mask)
