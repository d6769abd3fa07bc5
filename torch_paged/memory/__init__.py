"""Blocks without a model: who owns them, which sequence they belong to, where their bytes lie."""

from torch_paged.memory.allocator import BlockAllocator, PoolExhausted
from torch_paged.memory.budget import MemoryBudget, parse_max_memory
from torch_paged.memory.pool import Pool
from torch_paged.memory.prefix_index import PrefixIndex, hit_length
from torch_paged.memory.prefix_keys import block_keys, full_blocks, root_key
from torch_paged.memory.stats import PoolStats
from torch_paged.memory.swap import SwappedRow, SwappedTables
from torch_paged.memory.tables import BlockTables

__all__ = [
    "BlockAllocator",
    "BlockTables",
    "MemoryBudget",
    "Pool",
    "PoolExhausted",
    "PoolStats",
    "PrefixIndex",
    "SwappedRow",
    "SwappedTables",
    "block_keys",
    "full_blocks",
    "hit_length",
    "parse_max_memory",
    "root_key",
]
