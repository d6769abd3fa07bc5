"""Blocks without a model: who owns them, which sequence they belong to, where their bytes lie."""

from torch_paged.memory.allocator import BlockAllocator, PoolExhausted
from torch_paged.memory.budget import MemoryBudget, parse_max_memory
from torch_paged.memory.pool import Pool
from torch_paged.memory.stats import PoolStats
from torch_paged.memory.tables import BlockTables

__all__ = ["BlockAllocator", "BlockTables", "MemoryBudget", "Pool", "PoolExhausted", "PoolStats", "parse_max_memory"]
