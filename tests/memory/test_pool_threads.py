"""Threads: batches of several threads in one pool keep their own tokens, and no block is lost."""

import sys
import threading

import numpy as np
import torch

from torch_paged.memory import BlockTables, Pool


def generate(pool: Pool, seed: int, errors: list[str]) -> None:
    """Random forks, crops, reorders and writes of one thread's own value; every token is read back at each step."""
    random = np.random.default_rng(seed)
    kv = torch.zeros(1, 2, 1, 8)
    cache = pool.layer(0, kv, kv)[0].numpy()
    tables = BlockTables(pool, 3)
    for step in range(150):
        num_tokens = random.integers(0, 4, size=tables.num_seqs)
        with pool.lock:
            pool.copy_blocks(tables.append(num_tokens))
        width = 3
        valid = np.arange(width) < num_tokens[:, None]
        slots = tables.slots(num_tokens, valid, width)
        slots = slots[slots >= 0]
        cache[slots // pool.block_size, slots % pool.block_size] = seed
        block_table, seq_lens = (tensor.numpy() for tensor in tables.step())
        for blocks, length in zip(block_table, seq_lens, strict=True):
            held = cache[blocks[blocks >= 0]].reshape(-1, *cache.shape[2:])[:length]
            if not (held == seed).all():
                errors.append(f"thread {seed} step {step}: holds {np.unique(held)}")
        if step % 7 == 0:
            tables.select(random.integers(0, 3, size=3))
        if step % 11 == 0:
            tables.crop(np.minimum(tables.seq_lens, random.integers(0, 30, size=3)))
        if step % 13 == 0:
            tables = tables.fork()
    pool.stats()


def test_threads_share_a_pool(make_pool):
    pool = make_pool(num_blocks=2000)
    errors: list[str] = []
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=generate, args=(pool, seed, errors)) for seed in range(1, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert errors == []
    assert pool.stats().blocks_used == pool.budget.used_bytes == 0
    assert not pool.allocator.ref_counts.any()
