"""What `bench ops --device cuda` measures, with what an H200 is to reach."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from torch_paged import ops
from torch_paged.cli.bench.cases import Case, Group

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128


@dataclass(frozen=True)
class AttentionGoal:
    """A call of the attention op, and what it is to reach on an H200."""

    case: Case
    goal: str = ""


ATTENTION = (
    AttentionGoal(Case("decode", HEADS, KV_HEADS, HEAD_DIM, (Group(32, 1, 4096),)), "135 µs"),
    AttentionGoal(Case("decode", HEADS, KV_HEADS, HEAD_DIM, (Group(8, 1, 32768),)), "90 % of copy"),
    AttentionGoal(Case("decode", HEADS, KV_HEADS, HEAD_DIM, (Group(1, 1, 131072),)), "90 % of copy"),
    AttentionGoal(Case("decode", 64, KV_HEADS, HEAD_DIM, (Group(16, 1, 500),)), "22 µs"),
    AttentionGoal(Case("prefill", HEADS, KV_HEADS, HEAD_DIM, (Group(1, 8192, 8192),)), "320 TFLOP/s"),
    AttentionGoal(Case("chunked", HEADS, KV_HEADS, HEAD_DIM, (Group(1, 512, 16384 + 512),)), "280 TFLOP/s"),
)


@dataclass(frozen=True)
class Move:
    """A call of an op that moves or merges rows.

    Attributes:
        name: of the op, and its sizes.
        goal: what it is to reach on an H200.
        nbytes: that it has to read and write.
        call: runs it; takes the number of the round.
    """

    name: str
    goal: str
    nbytes: int
    call: Callable[[int], object]


def moves(
    dtype: torch.dtype, block_size: int, num_layers: int = 32, batch: int = 256, context: int = 4096
) -> list[Move]:
    """The ops beside attention, on random blocks of the default device."""
    row = KV_HEADS * HEAD_DIM * dtype.itemsize
    num_blocks = 32 * context // block_size
    key_cache, value_cache = (_cache(num_blocks, block_size, dtype) for _ in range(2))
    table = torch.randperm(num_blocks, dtype=torch.int32).view(32, -1)
    lengths = torch.full((32,), context, dtype=torch.int32)
    per_layer = 512 // block_size * 4
    layers = [tuple(_cache(2 * per_layer, block_size, dtype) for _ in range(2)) for _ in range(num_layers)]
    keys, values = [key for key, _ in layers], [value for _, value in layers]
    pairs = torch.randperm(2 * per_layer).view(-1, 2)
    key, value = (torch.randn(batch, KV_HEADS, HEAD_DIM).to(dtype) for _ in range(2))
    slots = torch.randperm(num_blocks * block_size)[:batch]
    out_a, out_b = (torch.randn(batch, HEADS, HEAD_DIM).to(dtype) for _ in range(2))
    lse_a, lse_b = (torch.randn(HEADS, batch) for _ in range(2))
    return [
        Move(
            f"copy_blocks {per_layer} of {block_size}, {num_layers} layers",
            "85 % of copy",
            2 * 2 * num_layers * per_layer * block_size * row,
            lambda number: ops.copy_blocks(keys, values, pairs),
        ),
        Move(
            f"gather_cache 32×{context}",
            "85 % of copy",
            2 * 2 * 32 * context * row,
            lambda number: ops.gather_cache(key_cache, value_cache, table, lengths, context),
        ),
        Move(
            f"merge_attention_states {batch}",
            "6 µs",
            3 * (out_a.nbytes + lse_a.nbytes),
            lambda number: ops.merge_attention_states(out_a, lse_a, out_b, lse_b),
        ),
        Move(
            f"reshape_and_cache {batch}",
            "6 µs",
            2 * 2 * batch * row + slots.nbytes,
            lambda number: ops.reshape_and_cache(key, value, key_cache, value_cache, slots),
        ),
    ]


def _cache(num_blocks: int, block_size: int, dtype: torch.dtype) -> torch.Tensor:
    device = torch.get_default_device()
    cache = ops.empty_cache(num_blocks, block_size, KV_HEADS, HEAD_DIM, dtype=dtype, device=device)[0]
    return cache.normal_()
