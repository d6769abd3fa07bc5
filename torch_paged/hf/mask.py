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

from torch_paged.hf.call import in_native_call
from torch_paged.hf.family import family
from torch_paged.hf.implementation import NAME, previous


def paged_mask(*args: Any, config: Any, mask_function: Callable[..., Any] = causal_mask_function, **kwargs: Any) -> Any:
    """transformers' mask interface.

    In a native call causality, window and padding follow from the lengths of the rows, so no causal or sliding mask is
    built. Any other mask, and all of them without a PagedCache in the call or in calls that gather, is that of the mask
    function the model had before the patch.
    """
    if in_native_call() and not kwargs.get("use_vmap") and _lengths_tell(mask_function):
        return _NO_MASK if family(config.model_type).converts_mask else None
    name = previous(config)
    # Implementations without a mask function get none from transformers either.
    if name not in ALL_MASK_ATTENTION_FUNCTIONS:
        return None
    return ALL_MASK_ATTENTION_FUNCTIONS[name](*args, config=config, mask_function=mask_function, **kwargs)


_NO_MASK = torch.empty(0, dtype=torch.bool)


def _lengths_tell(mask_function: Callable[..., Any]) -> bool:
    return mask_function is causal_mask_function or _code(mask_function) == _SLIDING


def _code(mask_function: Callable[..., Any]) -> list[CodeType]:
    """transformers builds masks from closures: the code of one and of the functions it joins tells its kind."""
    joined = inspect.getclosurevars(mask_function).nonlocals.get("mask_functions", ())
    return [mask_function.__code__, *(part.__code__ for part in joined)]


_SLIDING = _code(sliding_window_causal_mask_function(1))

AttentionMaskInterface.register(NAME, paged_mask)
