"""copy_blocks: duplicate whole blocks, in every layer, in one call."""

import torch
from torch import Tensor

from torch_paged.ops._library import check_same_device, define, fake, value_errors

define("copy_blocks(Tensor(a!)[] key_caches, Tensor(b!)[] value_caches, Tensor block_mapping) -> ()")


def copy_blocks(key_caches: list[Tensor], value_caches: list[Tensor], block_mapping: Tensor) -> None:
    """Copy blocks for copy-on-write.

    Args:
        key_caches: per layer `[num_blocks, block_size, num_kv_heads, head_dim]`, any dtype and strides, written in
            place.
        value_caches: per layer `[num_blocks, block_size, num_kv_heads, v_head_dim]`, written in place.
        block_mapping: int64 `[n, 2]`, rows of (source, destination); no destination twice, and none a source of the
            same call.

    Raises:
        ValueError: dtype, shape or device of an argument is wrong, or a block id is outside `[0, num_blocks)`, or a
            destination is there twice or also a source.

    Source: copy-on-write in PagedAttention, arXiv 2309.06180, section 4.4.
    """
    with value_errors():
        torch.ops.paged.copy_blocks(key_caches, value_caches, block_mapping)


@fake("copy_blocks")
def _(key_caches: list[Tensor], value_caches: list[Tensor], block_mapping: Tensor) -> None:
    for name, caches in (("key_caches", key_caches), ("value_caches", value_caches)):
        for layer, cache in enumerate(caches):
            check_same_device(block_mapping, **{f"{name}[{layer}]": cache})
