"""Times what a decode step costs besides the model: tables, slots and blocks, once a forward for all layers."""

import argparse
import json

import numpy as np
import torch
from rich.table import Table

from torch_paged.cli.arguments import at_least
from torch_paged.cli.bench.timing import Timing, alternate
from torch_paged.cli.env import collect
from torch_paged.cli.report import print_environment, wide_console
from torch_paged.memory import BlockTables, MemoryBudget, Pool

NUM_HEADS, HEAD_DIM = 1, 8  # The bookkeeping moves no keys or values, so small ones keep the pool small.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=at_least(1), default=64, help="sequences")
    parser.add_argument("--layers", type=at_least(1), default=32)
    parser.add_argument(
        "--context", type=at_least(1), default=1024, help="longest sequence before the first step, tokens"
    )
    parser.add_argument("--block-size", type=int, choices=[2**i for i in range(9)], default=16)
    parser.add_argument("--steps", type=at_least(1), default=1000)
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    timing = measure(args.batch, args.layers, args.context, args.block_size, args.steps, args.seed)
    settings = {name: getattr(args, name) for name in ("batch", "layers", "context", "block_size", "steps", "seed")}
    if args.json:
        print(json.dumps({"environment": collect(), **settings, "step": timing.as_json()}, indent=2))
        return 0
    console = wide_console()
    table = Table(title="Bookkeeping of one decode step, microseconds")
    for header in ("median", "fastest", "slowest"):
        table.add_column(header, justify="right")
    table.add_row(*(f"{1e6 * seconds:.0f}" for seconds in (timing.median, timing.fastest, timing.slowest)))
    console.print(table)
    print_environment(console, settings)
    return 0


def measure(batch: int, layers: int, context: int, block_size: int, steps: int, seed: int) -> Timing:
    """Time decode steps of one batch whose rows have grown to different lengths.

    Args:
        batch: sequences.
        layers: layers of the model.
        context: the longest sequence before the first step, tokens; the others are uniform below it.
        block_size: tokens of a block.
        steps: decode steps; each adds a token to every row.
        seed: of the lengths.

    Returns:
        Seconds of one step: room for the tokens, copies on write, slots, table and lengths, each layer's caches.
    """
    blocks_per_row = -(-(context + steps + 1) // block_size)
    bytes_per_block = 2 * layers * block_size * NUM_HEADS * HEAD_DIM * torch.float32.itemsize
    device = torch.device("cpu")
    budget = MemoryBudget(batch * blocks_per_row * bytes_per_block, device)
    pool = Pool(num_layers=layers, block_size=block_size, budget=budget, device=device)
    new = torch.empty(batch, NUM_HEADS, 1, HEAD_DIM)
    pool.layer(0, new, new)
    tables = BlockTables(pool, batch)
    tables.append(np.random.default_rng(seed).integers(1, context, size=batch, endpoint=True))
    one_each = np.ones(batch, dtype=np.int64)

    def step(_: int) -> None:
        with pool.lock:
            pool.copy_blocks(tables.append(one_each))
            torch.from_numpy(tables.slots(one_each, None, 1)).to(device)
            tables.step()
            for index in range(layers):
                pool.layer(index, new, new)

    return alternate({"step": step}, rounds=steps)["step"]
