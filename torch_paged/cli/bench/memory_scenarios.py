"""Blocks against contiguous pre-allocation, and against sequences that share nothing: counted by the real allocator."""

from dataclasses import dataclass

import numpy as np

from torch_paged.cli.bench.kv_geometry import KVGeometry
from torch_paged.cli.bench.length_mixes import Ints, LengthMix
from torch_paged.memory import BlockTables, PoolExhausted


@dataclass(frozen=True)
class Waste:
    """Slots that hold no token, of those reserved."""

    num_tokens: int
    preallocated_slots: int
    num_blocks: int
    block_size: int

    @property
    def of_preallocation(self) -> float:
        return 1 - self.num_tokens / self.preallocated_slots

    @property
    def of_blocks(self) -> float:
        return 1 - self.num_tokens / (self.num_blocks * self.block_size)


def waste(geometry: KVGeometry, seq_lens: Ints, reserved: int) -> Waste:
    """Requests of these lengths, each with `reserved` slots of its own or in blocks."""
    pool = geometry.pool_for(int(seq_lens.sum()), len(seq_lens))
    tables = BlockTables(pool, len(seq_lens))
    tables.append(seq_lens)
    stats = pool.stats()
    return Waste(
        num_tokens=stats.bytes_useful // geometry.token_bytes,
        preallocated_slots=len(seq_lens) * reserved,
        num_blocks=stats.blocks_used,
        block_size=geometry.block_size,
    )


@dataclass(frozen=True)
class Users:
    """Users that fit into the same bytes; with blocks, one number per draw of their lengths."""

    kv_bytes: int
    preallocated: int
    in_blocks: list[int]

    @property
    def median_in_blocks(self) -> float:
        return float(np.median(self.in_blocks))

    @property
    def ratio(self) -> float:
        return self.median_in_blocks / self.preallocated


def users(geometry: KVGeometry, kv_bytes: int, mix: LengthMix, longest: int, rounds: int, seed: int) -> Users:
    """Let users in one after the other, each with her whole request, until the pool is exhausted."""
    in_blocks = []
    for number in range(rounds):
        rng = np.random.default_rng([seed, number])
        pool, admitted = geometry.pool(kv_bytes), []
        try:
            while True:
                tables = BlockTables(pool, 1)
                prompt_lens, output_lens = mix.draw(rng, 1, longest)
                tables.append(prompt_lens + output_lens)
                admitted.append(tables)
        except PoolExhausted:
            in_blocks.append(len(admitted))
    return Users(kv_bytes, kv_bytes // (longest * geometry.token_bytes), in_blocks)


@dataclass(frozen=True)
class Sharing:
    """Blocks held by sequences that share what they can, and by the same sequences each for itself."""

    blocks_shared: int
    blocks_unshared: int

    @property
    def saved(self) -> float:
        return 1 - self.blocks_shared / self.blocks_unshared


def shared_prompt(geometry: KVGeometry, num_users: int, prompt_len: int, own_len: int) -> Sharing:
    """Users whose requests begin with the same prompt and go on with `own_len` tokens of their own each."""
    each = np.full(num_users, own_len)
    room = num_users * (prompt_len + own_len)

    shared = geometry.pool_for(room, num_users)
    tables = BlockTables(shared, 1)
    tables.append(np.array([prompt_len]))
    tables.select(np.zeros(num_users, dtype=np.int64))
    tables.append(each)

    unshared = geometry.pool_for(room, num_users)
    alone = BlockTables(unshared, num_users)
    alone.append(prompt_len + each)
    return Sharing(shared.allocator.num_used, unshared.allocator.num_used)
