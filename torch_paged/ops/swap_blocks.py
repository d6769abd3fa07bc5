"""swap_blocks: copy whole blocks from one pool to another, in every layer, in one call."""

import torch
from torch import Tensor

from torch_paged.ops._library import check_same_device, define, fake, value_errors

# The mapping is read on the host, which a captured CUDA graph would not do again.
define(
    "swap_blocks(Tensor[] src, Tensor(a!)[] dst, Tensor block_mapping) -> ()",
    torch.Tag.cudagraph_unsafe,
)


def swap_blocks(src: list[Tensor], dst: list[Tensor], block_mapping: Tensor) -> None:
    """Copy block `block_mapping[i, 0]` of each `src` to block `block_mapping[i, 1]` of its `dst`.

    Args:
        src: caches `[num_blocks, block_size, num_kv_heads, head_dim]` on the CPU or a GPU, any dtype and strides.
        dst: as many caches, each with the dtype and the block shape of its `src`, num_blocks and strides its own;
            written in place. A pair is one and the same tensor or shares no memory.
        block_mapping: int64 `[n, 2]` on the CPU, rows of (source, destination); no destination twice, and where a
            pair is one tensor, none a source of the same call.

    Raises:
        ValueError: dtype, shape or device of an argument is wrong, or a block id is outside its cache, or a
            destination is there twice.

    On a GPU the copies run on a stream of their own, in the order of the current stream's work; where a side is on the
    CPU they are done when this returns. Small blocks go fastest where that side is in pinned memory.

    Source: swapping in PagedAttention, arXiv 2309.06180, section 4.5.
    """
    with value_errors():
        torch.ops.paged.swap_blocks(src, dst, block_mapping)


@fake("swap_blocks")
def _(src: list[Tensor], dst: list[Tensor], block_mapping: Tensor) -> None:
    for name, caches in (("src", src), ("dst", dst)):
        for layer, cache in enumerate(caches):
            if (cache.device.type == "meta") != (block_mapping.device.type == "meta"):
                check_same_device(block_mapping, **{f"{name}[{layer}]": cache})
