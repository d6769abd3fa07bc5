"""Times what a decode step costs besides the model: tables, slots and blocks, once a forward for all layers."""

import argparse
import itertools
from typing import Any

import numpy as np
import torch
from rich.table import Table

from torch_paged.cli.arguments import at_least
from torch_paged.cli.bench.host_time import WAYS, refuse
from torch_paged.cli.bench.host_time import measure as measure_layers
from torch_paged.cli.bench.options import BLOCK_SIZES, add_common, prepare
from torch_paged.cli.bench.output import Output, write
from torch_paged.cli.bench.plot import Panel
from torch_paged.cli.bench.timing import Timing, alternate

HOST_STEPS = 200
HEAD_DIM = 8  # The bookkeeping moves no keys or values, so small ones keep the pool small.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=at_least(1), default=64, help="sequences")
    parser.add_argument("--layers", type=at_least(1), default=32)
    parser.add_argument(
        "--context", type=at_least(1), default=1024, help="longest sequence before the first step, tokens"
    )
    parser.add_argument("--block-size", type=int, choices=BLOCK_SIZES, default=16)
    parser.add_argument(
        "--host-batch",
        type=at_least(1),
        nargs="+",
        default=[1, 8],
        help="sequences of the steps whose layers are timed, %(default)s",
    )
    add_common(parser, rounds=1000, rounds_help="timed decode steps")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    prepare(args)
    timing = measure(args.batch, args.layers, args.context, args.block_size, args.rounds, args.seed)
    settings = {name: getattr(args, name) for name in ("batch", "layers", "context", "block_size", "host_batch")}
    table = Table(title="Bookkeeping of one decode step, microseconds")
    for header in ("median", "fastest", "slowest", "median\nper layer"):
        table.add_column(header, justify="right")
    micros = [1e6 * seconds for seconds in (timing.median, timing.fastest, timing.slowest)]
    per_layer = timing.median / args.layers
    table.add_row(*(f"{value:.0f}" for value in micros), f"{1e6 * per_layer:.1f}")
    bars: dict[str, list[float | None]] = {"a step": [*micros]}
    panel = Panel("Bookkeeping of one decode step", "µs", ["median", "fastest", "slowest"], bars)
    figures: dict[str, Any] = {"step": timing.as_json(), "median_s_per_layer": per_layer, "host": []}
    layers = Table(title="Host time of one layer in a decode step besides the ops, microseconds")
    for header in ("by", "batch", "context", "median", "fastest", "slowest", "the ops,\nmedian"):
        layers.add_column(header, justify="right")
    # Short rows leave the processor's caches to Python, long ones do not.
    contexts = sorted({min(16, args.context), args.context})
    for way, batch, context in itertools.product(WAYS, args.host_batch, contexts):
        steps = min(args.rounds, HOST_STEPS)
        host, ops = measure_layers(batch, args.layers, context, args.block_size, steps, way)
        shape = {"way": way, "batch": batch, "context": context}
        figures["host"].append({**shape, **host.as_json(), "ops": ops.as_json()})
        seconds = (host.median, host.fastest, host.slowest, ops.median)
        layers.add_row(way, str(batch), str(context), *(f"{1e6 * value:.1f}" for value in seconds))
    write(Output("bookkeeping", settings, figures, [table, layers], [], [panel]), args)
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
        Seconds of one step: what the attention mask says, room for the tokens, slots, table and lengths, and each
        layer's look at them. The mask is left-padded as generate makes it, so that no padding is stored.
    """
    from transformers import LlamaConfig

    from torch_paged.hf import PagedCache
    from torch_paged.hf.announce import make_call

    config = LlamaConfig(
        hidden_size=HEAD_DIM,
        num_attention_heads=1,
        num_key_value_heads=1,
        num_hidden_layers=layers,
    )
    cache = PagedCache(config, block_size=block_size)
    lengths = torch.from_numpy(np.random.default_rng(seed).integers(1, context, size=batch, endpoint=True))
    mask = (torch.arange(context) >= context - lengths[:, None]).long()
    mask = torch.cat([mask, torch.ones(batch, steps + 1, dtype=torch.long)], 1)

    def step(columns: int, width: int) -> None:
        inputs = {"input_ids": torch.empty(batch, width), "attention_mask": mask[:, :columns]}
        call = make_call(cache, inputs, native=True, say=refuse)
        assert call is not None
        cache.announce(call)
        for layer in cache.layers:
            if not layer.is_initialized:
                layer.lazy_initialization(new, new)
            layer.group.plan(call)

    new = torch.empty(batch, 1, 1, HEAD_DIM)
    step(context, context)
    return alternate({"step": lambda number: step(context + number + 1, 1)}, rounds=steps)["step"]
