"""The mask function "torch_paged": no mask where blocks are read in place, the model's own everywhere else."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from torch_paged.hf.call import current
from torch_paged.hf.implementation import NAME, previous


def paged_mask(*args: Any, config: Any, **kwargs: Any) -> Tensor | None:
    """transformers' mask interface.

    In a native call causality, window and padding follow from the lengths of the rows, so no mask is built. Without a
    PagedCache in the call, and in calls that gather, this is the mask function the model had before the patch.
    """
    if current.call is not None and current.call.native:
        return None
    name = previous(config)
    # Implementations without a mask function get none from transformers either.
    if name not in ALL_MASK_ATTENTION_FUNCTIONS:
        return None
    mask: Tensor | None = ALL_MASK_ATTENTION_FUNCTIONS[name](*args, config=config, **kwargs)
    return mask


AttentionMaskInterface.register(NAME, paged_mask)
