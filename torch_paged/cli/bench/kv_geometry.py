"""The shape of a model's KV cache, and pools of that shape that hold block ids but not one byte."""

from dataclasses import dataclass

import torch

from torch_paged.memory import MemoryBudget, Pool

NOWHERE = torch.device("meta")
DTYPE = torch.float16


@dataclass(frozen=True)
class KVGeometry:
    """Layers of a model and what each stores of a token, in float16."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int

    @property
    def token_bytes(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * DTYPE.itemsize

    def pool(self, max_bytes: int) -> Pool:
        """A pool bounded as on a real device: its blocks are counted and charged, their bytes lie nowhere.

        Raises:
            ValueError: not one block fits.
        """
        budget = MemoryBudget(max_bytes, NOWHERE)
        pool = Pool(num_layers=self.num_layers, block_size=self.block_size, budget=budget, device=NOWHERE)
        new = torch.empty(1, self.num_kv_heads, 0, self.head_dim, dtype=DTYPE, device=NOWHERE)
        pool.layer(0, new, new)
        return pool

    def pool_for(self, num_tokens: int, num_seqs: int) -> Pool:
        """A pool with room for that many tokens, spread over that many sequences in any way."""
        blocks = num_tokens // self.block_size + 2 * num_seqs
        return self.pool(blocks * self.block_size * self.token_bytes)
