"""bare_read: the blocks of a case read one after the other and nothing else done; what attention is held against."""

import torch
from torch import Tensor

from torch_paged.cli.bench.attention_ways import Attention, Inputs
from torch_paged.ops._library import define, fake

define("_read_blocks(Tensor cache, Tensor blocks) -> int")


def bare_read(inputs: Inputs) -> Attention:
    """Read the whole blocks of every sequence in the order of the table, the keys and then the values."""
    blocks = inputs.block_table[inputs.block_table >= 0].long()
    layers = [[_as_bytes(cache) for cache in caches] for caches in inputs.caches]

    def read(number: int) -> Tensor:
        return torch.tensor([read_blocks(cache, blocks) for cache in layers[number % len(layers)]])

    return read


def read_bytes(inputs: Inputs) -> int:
    """What a bare read reads: more than attention, where sequences end within blocks."""
    num_blocks = int((inputs.block_table >= 0).sum())
    return sum(num_blocks * cache[0].nbytes for cache in inputs.caches[0])


def read_blocks(cache: Tensor, blocks: Tensor) -> int:
    """Return the bitwise exclusive or of the 4-byte words of some blocks.

    Args:
        cache: uint8 `[num_blocks, block_bytes]`, contiguous, on the CPU, block_bytes a multiple of 64.
        blocks: int64 `[count]`, ids.

    Raises:
        RuntimeError: an argument is not as above.
    """
    return int(torch.ops.paged._read_blocks(cache, blocks))


@fake("_read_blocks")
def _(cache: Tensor, blocks: Tensor) -> int:
    return 0


def _as_bytes(cache: Tensor) -> Tensor:
    return cache.transpose(1, 2).reshape(len(cache), -1).view(torch.uint8)
