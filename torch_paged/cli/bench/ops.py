"""Times the attention op against gather_cache and SDPA, and against the limits of this machine, in alternation."""

import argparse
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from torch_paged.cli.arguments import DTYPES
from torch_paged.cli.bench import attention_ways
from torch_paged.cli.bench.attention_ways import Attention, Inputs
from torch_paged.cli.bench.bare_read import bare_read, read_bytes
from torch_paged.cli.bench.cases import DEFAULT_CASES, KINDS, Case, parse_case
from torch_paged.cli.bench.last_level_cache import last_level_cache_bytes
from torch_paged.cli.bench.limits import CACHE_MULTIPLE, Probes
from torch_paged.cli.bench.ops_result import NOTES, Result, panels, table
from torch_paged.cli.bench.options import BLOCK_SIZES, add_common, prepare
from torch_paged.cli.bench.output import Output, write
from torch_paged.cli.bench.timing import SETTLING_S, Timing, alternate
from torch_paged.cli.errors import CommandError
from torch_paged.cli.report import progress

MAX_WORKING_SET_BYTES = 2 << 30
MAX_LAYERS = 128
LARGE_BLOCK = 128
# A case whose op was faster than its limit is measured again: neighbours of the machine come and go.
MOST_REPEATS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--only", nargs="+", choices=KINDS, help="default cases of these kinds alone")
    chosen.add_argument(
        "--shape",
        nargs="+",
        action="extend",
        type=parse_case,
        metavar="BATCH,HEADS,KV_HEADS,HEAD_DIM,CONTEXT[,QUERY_LEN]",
        help="these cases instead of the default ones; QUERY_LEN new tokens (1) end a context of CONTEXT",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu; cuda implies --flex")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: float32 bfloat16; on cuda bfloat16")
    parser.add_argument("--block-size", type=int, choices=BLOCK_SIZES, default=16)
    parser.add_argument("--flex", action="store_true", help="also compiled FlexAttention, minutes of compilation")
    parser.add_argument(
        "--pages", action="store_true", help=f"also pages in order, and of {LARGE_BLOCK} tokens, for decode cases"
    )
    add_common(parser, rounds=10, rounds_help="timed turns of each way")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.device == "cuda":
        from torch_paged.cli.bench import cuda_ops

        return cuda_ops.run(args)
    args.dtype = args.dtype or ["float32", "bfloat16"]
    prepare(args)
    cases = args.shape or [case for case in DEFAULT_CASES if not args.only or case.kind in args.only]
    results, probes = [], Probes()
    with progress() as bar:
        task = bar.add_task("bench ops", total=len(cases) * len(args.dtype))
        for case in cases:
            for dtype in args.dtype:
                bar.update(task, description=f"{case} {dtype}")
                results.append(measure_again(partial(measure, case, DTYPES[dtype], args, probes)))
                bar.advance(task)
    settings = {"block_size": args.block_size}
    figures = {
        "read_working_set_bytes": probes.read_bytes,
        "last_level_cache_bytes": last_level_cache_bytes(),
        "results": [result.as_json() for result in results],
    }
    write(Output("ops", settings, figures, [table(results)], NOTES, panels(results)), args)
    return 0


def measure(case: Case, dtype: torch.dtype, args: argparse.Namespace, probes: Probes) -> Result:
    """Time one case, and what limits it between the same rounds.

    Raises:
        CommandError: the op refuses the case, or a way gives another result than the others.
    """
    torch.manual_seed(args.seed)
    num_layers = layers_to_rotate(case.kv_bytes(dtype))
    inputs = Inputs.random(case, dtype, args.block_size, num_layers)
    layers = attention_ways.contiguous_layers(inputs)
    forms = attention_ways.sdpa_forms(inputs)
    ways = {"paged": attention_ways.paged(inputs)}
    ways |= {f"gather {form}": attention_ways.gathered(inputs, forms[form]) for form in forms}
    ways |= {f"contiguous {form}": attention_ways.contiguous(inputs, layers, forms[form]) for form in forms}
    if args.flex:
        from torch_paged.cli.bench.flex import fresh_form

        ways["flex"] = attention_ways.contiguous(inputs, layers, fresh_form())
    others = {}
    if args.pages and case.kind == "decode":
        others["pages in order"] = inputs.repaged(args.block_size, in_order=True)
        others[f"pages of {LARGE_BLOCK}"] = inputs.repaged(LARGE_BLOCK, in_order=False)
    ways |= {name: attention_ways.paged(other) for name, other in others.items()}
    require_agreement(case, ways, dtype)
    probing = probes.multiplying(dtype)
    if case.kind == "decode":
        ways["bare read"] = bare_read(inputs)
        ways |= {f"bare read, {name}": bare_read(other) for name, other in others.items()}
        probing = probes.reading()
    timings = alternate({**apart(ways, num_layers), **probing}, args.rounds, settling_s=SETTLING_S)

    def bare(name: str, read: Inputs) -> Timing:
        # Of as many bytes as attention reads.
        return timings[name].scaled(case.kv_bytes(dtype) / read_bytes(read))

    return Result(
        case=case,
        dtype=dtype,
        num_layers=num_layers,
        read_from_memory=num_layers * case.kv_bytes(dtype) >= CACHE_MULTIPLE * last_level_cache_bytes(),
        limit=probes.limit(timings),
        paged=timings["paged"],
        gathered={form: timings[f"gather {form}"] for form in forms},
        contiguous={form: timings[f"contiguous {form}"] for form in forms},
        flex=timings.get("flex"),
        pages={name: timings[name] for name in others},
        bare_read=bare("bare read", inputs) if "bare read" in timings else None,
        bare_reads={name: bare(f"bare read, {name}", other) for name, other in others.items()},
    )


def apart(ways: dict[str, Attention], num_layers: int) -> dict[str, Callable[[int], object]]:
    """The same ways, each on another layer at a time, so that none finds in the cache what the one before it read."""

    def shifted(way: Attention, by: int) -> Callable[[int], Tensor]:
        return lambda number: way(number + by)

    return {name: shifted(way, place * num_layers // len(ways)) for place, (name, way) in enumerate(ways.items())}


def measure_again(measure: Callable[[], Result]) -> Result:
    """Measure, and once more as long as an op surpasses its limit."""
    result = measure()
    for _ in range(MOST_REPEATS):
        if not result.surpasses_limit:
            break
        result = measure()
    return result


def require_agreement(case: Case, ways: dict[str, Attention], dtype: torch.dtype) -> None:
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
    wanted = math.ceil(CACHE_MULTIPLE * last_level_cache_bytes() / bytes_per_layer)
    return max(1, min(wanted, MAX_WORKING_SET_BYTES // bytes_per_layer, MAX_LAYERS))
