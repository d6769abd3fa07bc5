"""Times a decode step with stock's caches and with torch_paged, compiled and not, in alternation."""

import argparse
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from rich.table import Table

from torch_paged.cli.arguments import DTYPES, at_least
from torch_paged.cli.bench.generate_model import Shape, random_model, with_same_weights
from torch_paged.cli.bench.limits import Probes
from torch_paged.cli.bench.options import BLOCK_SIZES, add_common, prepare
from torch_paged.cli.bench.output import Output, write
from torch_paged.cli.bench.plot import Panel
from torch_paged.cli.bench.step_profile import StepProfile, profiled, tables
from torch_paged.cli.bench.timing import Timing, alternate
from torch_paged.cli.report import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAMES = ("dynamic", "static", "static-compiled", "paged", "paged-compiled")
WARM_UP_STEPS = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("the model, of the shape of Qwen2.5-0.5B with random weights")
    model.add_argument("--layers", type=at_least(1), default=24)
    model.add_argument("--hidden", type=at_least(1), default=896)
    model.add_argument("--intermediate", type=at_least(1), default=4864)
    model.add_argument("--heads", type=at_least(1), default=14)
    model.add_argument("--kv-heads", type=at_least(1), default=2)
    model.add_argument("--vocabulary", type=at_least(2), default=32000)
    model.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--batch", nargs="+", type=at_least(1), default=[1, 8, 32], help="rows")
    parser.add_argument("--context", type=at_least(1), default=1024, help="tokens that the longest row holds")
    parser.add_argument(
        "--padded", action="store_true", help="rows of half of that length and more, padded on the left"
    )
    parser.add_argument("--ways", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument(
        "--profile", action="store_true", help="also where the time of a step goes, and how fast its weights are read"
    )
    parser.add_argument("--block-size", type=int, choices=BLOCK_SIZES, default=16, help="of torch_paged")
    add_common(parser, rounds=15, rounds_help="timed steps of each way")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    prepare(args)
    shape = Shape(args.layers, args.hidden, args.intermediate, args.heads, args.kv_heads, args.vocabulary)
    model = random_model(shape, args.context + _steps(args), DTYPES[args.dtype], args.seed)
    table = Table(title=f"A decode step, {args.dtype}, {args.context} tokens {'at most' if args.padded else 'cached'}")
    for header in ("rows", "", "milliseconds", "of the first way", "first step, s"):
        table.add_column(header, justify="right")
    results: list[dict[str, Any]] = []
    panels, profiles = [], []
    with progress() as bar:
        task = bar.add_task("bench steps", total=len(args.batch))
        for rows in args.batch:
            bar.update(task, description=f"{rows} rows")
            timings, first, found = measure(model, rows, args)
            reference = next(iter(timings.values())).median
            for name, timing in timings.items():
                ratio = reference / timing.median
                table.add_row(str(rows), name, timing.as_text(), f"{ratio:.2f}x", f"{first[name]:.1f}")
                results.append(
                    {
                        "rows": rows,
                        "way": name,
                        "step": timing.as_json(),
                        "speedup_over_first_way": ratio,
                        "first_step_s": first[name],
                    }
                )
                if name in found:
                    results[-1]["profile"] = found[name].as_json()
                    profiles.append((rows, name, found[name]))
            bars: dict[str, list[float | None]] = {"ms": [1e3 * timing.median for timing in timings.values()]}
            panels.append(Panel(f"{rows} rows", "milliseconds", list(timings), bars))
            bar.advance(task)
    settings = {
        "model": shape.name,
        "dtype": args.dtype,
        "context": args.context,
        "padded": args.padded,
        "block_size": args.block_size,
    }
    note = "A step is all between two tokens: inputs prepared, forward, argmax. First steps compile what is compiled."
    figures: dict[str, Any] = {"results": results}
    shown = [table]
    if args.profile:
        shown += tables(profiles)
    write(Output("steps", settings, figures, shown, [note], panels), args)
    return 0


def measure(
    model: "PreTrainedModel", rows: int, args: argparse.Namespace
) -> tuple[dict[str, Timing], dict[str, float], dict[str, StepProfile]]:
    """Per way the seconds of a step, those of its first one, and where they go if `--profile`."""
    from torch_paged.cli.bench.step_ways import WAYS, prepared, row_lengths

    lengths = row_lengths(rows, args.context, args.padded, args.seed)
    steps = _steps(args)
    first: dict[str, float] = {}
    with ExitStack() as stack:
        calls = {}
        for way in args.ways:
            # One model for stock's ways, one for each of ours, which are patched differently.
            of_way = with_same_weights(model) if way.startswith("paged") else model
            call = stack.enter_context(prepared(way, of_way, lengths, steps, args.block_size))
            first[WAYS[way]] = call.first()
            calls[WAYS[way]] = call
        timings = alternate(calls, args.rounds, warmup=WARM_UP_STEPS)
        if not args.profile:
            return timings, first, {}
        probes = Probes()
        found = {}
        for name, call in calls.items():
            read = probes.read_bytes_per_s(args.rounds)
            found[name] = profiled(call, args.rounds, model.dtype.itemsize, read)
        return timings, first, found


def _steps(args: argparse.Namespace) -> int:
    """Steps of a way: the first, those to warm up, the timed ones and the profiled ones."""
    timed: int = args.rounds * (2 if args.profile else 1)
    return 1 + WARM_UP_STEPS + timed
