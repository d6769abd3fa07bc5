"""A pool of a few small blocks on the CPU."""

import torch

from torch_paged.memory import MemoryBudget, Pool

HEADS, HEAD_DIM = 2, 8
# Of the emulated GPU.
PAGE = 4096


def small_pool(num_blocks: int = 8, block_size: int = 4, num_layers: int = 2, **options: object) -> Pool:
    """A float32 pool whose budget holds exactly `num_blocks` blocks."""
    block_bytes = num_layers * 2 * block_size * HEADS * HEAD_DIM * 4
    budget = options.pop("budget", None) or MemoryBudget(num_blocks * block_bytes, torch.device("cpu"))
    pool = Pool(num_layers=num_layers, block_size=block_size, budget=budget, device=torch.device("cpu"), **options)
    kv = torch.zeros(1, HEADS, 1, HEAD_DIM)
    pool.layer(0, kv, kv)
    return pool
