"""Times the attention op against gather_cache and SDPA, on this machine, in alternation."""

import argparse
import json
import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from torch_paged.cli.arguments import DTYPES, at_least
from torch_paged.cli.bench import attention_ways
from torch_paged.cli.bench.attention_ways import Inputs
from torch_paged.cli.bench.cases import DEFAULT_CASES, KINDS, Case, parse_case
from torch_paged.cli.bench.timing import Timing, alternate
from torch_paged.cli.env import collect
from torch_paged.cli.errors import CommandError
from torch_paged.cli.report import print_environment, progress, wide_console

# Rotating over this many times the last-level cache keeps every call reading from memory, as a model's layers do.
CACHE_MULTIPLE = 4
ASSUMED_CACHE_BYTES = 32 << 20
MAX_WORKING_SET_BYTES = 2 << 30
MAX_LAYERS = 128


@dataclass(frozen=True)
class Result:
    """What one case took: ours, and per SDPA form with the gather and on contiguous keys and values."""

    case: Case
    dtype: torch.dtype
    num_layers: int
    paged: Timing
    gathered: dict[str, Timing]
    contiguous: dict[str, Timing]

    @property
    def ratio(self) -> float:
        """How many times as fast as gather_cache and the fastest form of SDPA."""
        return fastest(self.gathered)[1].median / self.paged.median

    @property
    def contiguous_ratio(self) -> float:
        """The same against the fastest form of SDPA on contiguous keys and values, without the gather."""
        return fastest(self.contiguous)[1].median / self.paged.median

    @property
    def rate(self) -> str:
        """What bounds the case: bytes of keys and values a second while decoding, else floating-point operations."""
        if self.case.kind == "decode":
            return f"{self.case.kv_bytes(self.dtype) / self.paged.median / 1e9:.1f} GB/s"
        return f"{self.case.flops() / self.paged.median / 1e9:.0f} GFLOP/s"

    def as_json(self) -> dict[str, Any]:
        return {
            "case": str(self.case),
            "dtype": str(self.dtype).removeprefix("torch."),
            "num_layers": self.num_layers,
            "paged": self.paged.as_json(),
            "gather_and_sdpa": {form: timing.as_json() for form, timing in self.gathered.items()},
            "sdpa_contiguous": {form: timing.as_json() for form, timing in self.contiguous.items()},
            "speedup_over_gather_and_sdpa": self.ratio,
            "speedup_over_sdpa_contiguous": self.contiguous_ratio,
            "kv_bytes_per_s": self.case.kv_bytes(self.dtype) / self.paged.median,
            "flop_per_s": self.case.flops() / self.paged.median,
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--only", nargs="+", choices=KINDS, help="default cases of these kinds alone")
    chosen.add_argument(
        "--case",
        nargs="+",
        type=parse_case,
        metavar="SEQUENCES,HEADS,KV_HEADS,HEAD_DIM,CONTEXT[,QUERY_LEN]",
        help="these cases instead of the default ones; QUERY_LEN new tokens (1) end a context of CONTEXT",
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--block-size", type=int, choices=[2**i for i in range(9)], default=16)
    parser.add_argument("--rounds", type=at_least(1), default=10, help="timed calls of each way")
    parser.add_argument("--threads", type=at_least(1), help="threads of PyTorch; default: its own choice")
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.threads:
        torch.set_num_threads(args.threads)
    cases = args.case or [case for case in DEFAULT_CASES if not args.only or case.kind in args.only]
    results = []
    with progress() as bar:
        task = bar.add_task("bench ops", total=len(cases) * len(args.dtype))
        for case in cases:
            for dtype in args.dtype:
                bar.update(task, description=f"{case} {dtype}")
                results.append(measure(case, DTYPES[dtype], args.block_size, args.rounds, args.seed))
                bar.advance(task)
    settings = {"block_size": args.block_size, "rounds": args.rounds, "seed": args.seed}
    if args.json:
        report = {"environment": collect(), **settings, "results": [result.as_json() for result in results]}
        print(json.dumps(report, indent=2))
    else:
        print_results(results, settings)
    return 0


def measure(case: Case, dtype: torch.dtype, block_size: int, rounds: int, seed: int) -> Result:
    """Time one case.

    Raises:
        CommandError: the op refuses the case, or a way gives another result than the others.
    """
    torch.manual_seed(seed)
    num_layers = layers_to_rotate(case.kv_bytes(dtype))
    inputs = Inputs.random(case, dtype, block_size, num_layers)
    forms = attention_ways.sdpa_forms(inputs)
    gathered = {form: attention_ways.gathered(inputs, forms[form]) for form in forms}
    contiguous = {form: attention_ways.contiguous(inputs, forms[form]) for form in forms}
    ways = {"paged": attention_ways.paged(inputs)}
    ways |= {f"gather {form}": way for form, way in gathered.items()}
    ways |= {f"contiguous {form}": way for form, way in contiguous.items()}
    require_agreement(case, ways, dtype)
    timings = alternate(ways, rounds)
    return Result(
        case=case,
        dtype=dtype,
        num_layers=num_layers,
        paged=timings["paged"],
        gathered={form: timings[f"gather {form}"] for form in forms},
        contiguous={form: timings[f"contiguous {form}"] for form in forms},
    )


def require_agreement(case: Case, ways: dict[str, attention_ways.Attention], dtype: torch.dtype) -> None:
    """A wrong answer has no speed: compare each way's result before the clock starts."""
    try:
        expected = ways["paged"](0).float()
    except ValueError as error:
        raise CommandError(f"{case}: {error}") from None
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for name, way in ways.items():
        difference = (way(0).float() - expected).abs().max().item()
        if not difference <= tolerance:
            raise CommandError(
                f"{case}: {name} differs from the paged op by {difference:.2g}; must be within {tolerance}"
            )


def layers_to_rotate(bytes_per_layer: int) -> int:
    """Layers whose keys and values exceed the last-level cache, as far as memory and the depth of models allow."""
    wanted = math.ceil(CACHE_MULTIPLE * _last_level_cache_bytes() / bytes_per_layer)
    return max(1, min(wanted, MAX_WORKING_SET_BYTES // bytes_per_layer, MAX_LAYERS))


def _last_level_cache_bytes() -> int:
    name = "SC_LEVEL3_CACHE_SIZE"
    size = os.sysconf(name) if name in os.sysconf_names else 0
    return size if size > 0 else ASSUMED_CACHE_BYTES


def fastest(timings: dict[str, Timing]) -> tuple[str, Timing]:
    return min(timings.items(), key=lambda item: item[1].median)


def print_results(results: list[Result], settings: dict[str, int]) -> None:
    console: Console = wide_console()
    table = Table(title="Milliseconds of one call: median (fastest–slowest)")
    for header in ("case: heads/kv×dim\ncount×query/context", "dtype"):
        table.add_column(header)
    for header in ("paged", "rate", "gather + SDPA", "times\nas fast", "SDPA on\ncontiguous KV", "times\nas fast"):
        table.add_column(header, justify="right", no_wrap=True)
    for result in results:
        gather_form, gather = fastest(result.gathered)
        form, sdpa = fastest(result.contiguous)
        table.add_row(
            str(result.case),
            str(result.dtype).removeprefix("torch."),
            result.paged.as_text(),
            result.rate,
            f"{gather.as_text()}\n{gather_form}",
            f"{result.ratio:.2f}",
            f"{sdpa.as_text()}\n{form}",
            f"{result.contiguous_ratio:.2f}",
        )
    console.print(table)
    print_environment(console, settings)
