"""Times the ops that move keys and values against a plain copy of as many bytes, in alternation."""

import argparse
from collections.abc import Callable

import torch
from rich.table import Table
from torch import Tensor

from torch_paged import ops
from torch_paged.cli.arguments import DTYPES, at_least
from torch_paged.cli.bench.last_level_cache import last_level_cache_bytes
from torch_paged.cli.bench.limits import CACHE_MULTIPLE
from torch_paged.cli.bench.ops import MAX_WORKING_SET_BYTES
from torch_paged.cli.bench.options import BLOCK_SIZES, add_common, prepare
from torch_paged.cli.bench.output import Output, write
from torch_paged.cli.bench.plot import Panel
from torch_paged.cli.bench.timing import SETTLING_S, Timing, alternate

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, NUM_SEQS = 32, 8, 128, 8
PLAIN = "Tensor.copy_"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=at_least(NUM_SEQS), default=1024, help="tokens that a call moves")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--block-size", type=int, choices=BLOCK_SIZES, default=16)
    add_common(parser, rounds=10, rounds_help="timed turns of each way")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    prepare(args)
    table = Table(title=f"Moving keys and values, {NUM_KV_HEADS}x{HEAD_DIM} a token, blocks at random")
    for header in ("dtype", "", "milliseconds of one call", "GB/s read\nand written", f"rate of\n{PLAIN}"):
        table.add_column(header, justify="right")
    results, ratios = [], {}
    for dtype in args.dtype:
        timings, moved = measure(args.tokens, args.block_size, DTYPES[dtype], args.rounds)
        rates = {name: moved[name] / timing.median for name, timing in timings.items()}
        for name, timing in timings.items():
            ratio = rates[name] / rates[PLAIN]
            table.add_row(dtype, name, timing.as_text(), f"{rates[name] / 1e9:.1f}", f"{ratio:.2f}x")
            results.append(
                {
                    "dtype": dtype,
                    "op": name,
                    "call": timing.as_json(),
                    "moved_bytes": moved[name],
                    "bytes_per_s": rates[name],
                    "rate_over_plain_copy": ratio,
                }
            )
            ratios[f"{name} {dtype}"] = ratio
    settings = {"tokens": args.tokens, "block_size": args.block_size}
    bars: dict[str, list[float | None]] = {f"rate of {PLAIN}": [*ratios.values()]}
    panel = Panel("Ops that move keys and values", "times", list(ratios), bars)
    note = (
        "A call goes on in the next of so many caches that they exceed the last-level cache. Bytes that an op returns "
        "in new tensors count as written; PyTorch's allocator hands them out warm."
    )
    write(Output("copies", settings, {"results": results}, [table], [note], [panel]), args)
    return 0


def measure(tokens: int, block_size: int, dtype: torch.dtype, rounds: int) -> tuple[dict[str, Timing], dict[str, int]]:
    """Time each op, and a plain copy, over caches that lie in memory, not in the last-level cache.

    Args:
        tokens: that a call moves, rounded up to whole blocks of NUM_SEQS sequences.
        block_size: tokens of a block.
        dtype: of keys and values.
        rounds: timed turns of each.

    Returns:
        Per name the seconds of a call, and the bytes that it reads and writes.
    """
    per_seq = -(-tokens // (NUM_SEQS * block_size)) * block_size
    tokens, num_blocks = NUM_SEQS * per_seq, NUM_SEQS * per_seq // block_size
    kv_bytes = 2 * tokens * NUM_KV_HEADS * HEAD_DIM * dtype.itemsize
    # Half of the working set is what is read, half what is written.
    wanted = min(CACHE_MULTIPLE * last_level_cache_bytes(), MAX_WORKING_SET_BYTES)
    num_sets = max(2, -(-wanted // (2 * kv_bytes)))

    def filled_cache() -> tuple[Tensor, Tensor]:
        caches = ops.empty_cache(num_blocks, block_size, NUM_KV_HEADS, HEAD_DIM, dtype=dtype, device="cpu")
        return caches[0].fill_(1), caches[1].fill_(1)

    rows = [torch.ones(2, tokens, NUM_KV_HEADS, HEAD_DIM, dtype=dtype) for _ in range(num_sets)]
    new = [(key_and_value[0], key_and_value[1]) for key_and_value in rows]
    plain = [torch.ones_like(key_and_value) for key_and_value in rows]
    caches, others = ([filled_cache() for _ in range(num_sets)] for _ in range(2))
    query = torch.ones(tokens, NUM_HEADS, HEAD_DIM, dtype=dtype)
    cos, sin = torch.ones(2, tokens, HEAD_DIM, dtype=dtype)
    order = torch.randperm(num_blocks)
    slots = (order[:, None] * block_size + torch.arange(block_size)).flatten()
    block_table = order.int().view(NUM_SEQS, -1)
    seq_lens = torch.full((NUM_SEQS,), per_seq, dtype=torch.int32)
    halves = order[: num_blocks // 2 * 2].view(2, -1).T.contiguous()
    swapped = torch.stack([order, torch.randperm(num_blocks)], 1)

    def over(move: Callable[[int], object]) -> Callable[[int], object]:
        return lambda number: move(number % num_sets)

    ways = {
        PLAIN: over(lambda i: plain[i].copy_(rows[i])),
        "reshape_and_cache": over(lambda i: ops.reshape_and_cache(*new[i], *caches[i], slots)),
        "rope_and_cache": over(lambda i: ops.rope_and_cache(query, *new[i], cos, sin, *caches[i], slots)),
        "gather_cache": over(lambda i: ops.gather_cache(*caches[i], block_table, seq_lens, per_seq)),
        "copy_blocks": over(lambda i: ops.copy_blocks([caches[i][0]], [caches[i][1]], halves)),
        "swap_blocks": over(lambda i: ops.swap_blocks([*caches[i]], [*others[i]], swapped)),
    }
    moved = dict.fromkeys(ways, 2 * kv_bytes)
    moved["copy_blocks"] = 2 * kv_bytes * len(halves) // num_blocks
    moved["rope_and_cache"] += 2 * query.nbytes + cos.nbytes + sin.nbytes
    return alternate(ways, rounds, settling_s=SETTLING_S), moved
