"""Times the ops on a GPU against the device's copy bandwidth, SDPA, FlexAttention, FlashInfer and flash-attn."""

import argparse

import torch

from torch_paged.cli.arguments import DTYPES
from torch_paged.cli.bench import attention_ways
from torch_paged.cli.bench.attention_ways import Attention, Inputs
from torch_paged.cli.bench.cuda_cases import ATTENTION, AttentionGoal, Move, moves
from torch_paged.cli.bench.cuda_ops_result import CudaResult, notes, panels, table
from torch_paged.cli.bench.cuda_timing import Clock, copy_bytes_per_s, cuda_clock
from torch_paged.cli.bench.cuda_ways import others
from torch_paged.cli.bench.options import prepare
from torch_paged.cli.bench.output import Output, write
from torch_paged.cli.errors import CommandError
from torch_paged.cli.report import progress

LARGE_BLOCK = 128
TOLERANCE = 2e-2


def run(args: argparse.Namespace) -> int:
    device = require_gpu()
    prepare(args)
    chosen = ATTENTION if args.shape is None else tuple(AttentionGoal(case) for case in args.shape)
    cases = [each for each in chosen if not args.only or each.case.kind in args.only]
    dtypes = args.dtype or ["bfloat16"]
    results: list[CudaResult] = []
    with torch.device(device), progress() as bar:
        clock = cuda_clock(device)
        limit = copy_bytes_per_s(clock, args.rounds)
        task = bar.add_task("bench ops", total=len(cases) * len(dtypes))
        for dtype in dtypes:
            for each in cases:
                bar.update(task, description=f"{each.case} {dtype}")
                results.append(measure(each, DTYPES[dtype], args, clock))
                bar.advance(task)
            if args.shape is None and not args.only:
                results += [
                    move_result(move, DTYPES[dtype], args, clock) for move in moves(DTYPES[dtype], args.block_size)
                ]
    figures = {
        "device": torch.cuda.get_device_name(device),
        "copy_bytes_per_s": limit,
        "results": [result.as_json(limit) for result in results],
    }
    settings = {"device": figures["device"], "block_size": args.block_size}
    lines = notes(results, limit)
    write(Output("ops", settings, figures, [table(results, limit)], lines, panels(results, limit)), args)
    return 0


def require_gpu() -> torch.device:
    """The current GPU.

    Raises:
        CommandError: there is none that the kernels run on, or no kernels.
    """
    if not torch.cuda.is_available():
        raise CommandError(
            f"--device cuda: torch {torch.__version__} finds no GPU; "
            "needs one of compute capability 8.0 or newer, its driver, and a CUDA build of torch"
        )
    if torch.cuda.get_device_capability() < (8, 0):
        raise CommandError(f"--device cuda: {torch.cuda.get_device_name()}; must have compute capability 8.0 or newer")
    if not torch._C._dispatch_has_kernel_for_dispatch_key("paged::attention", "CUDA"):
        raise CommandError("--device cuda: torch_paged was built without CUDA; install it again with nvcc on PATH")
    return torch.device("cuda", torch.cuda.current_device())


def measure(each: AttentionGoal, dtype: torch.dtype, args: argparse.Namespace, clock: Clock) -> CudaResult:
    """Time one case by every way that this machine has.

    Raises:
        CommandError: the op refuses the case, or a way gives another result than it.
    """
    torch.manual_seed(args.seed)
    case = each.case
    inputs = Inputs.random(case, dtype, args.block_size, num_layers=1)
    ways = {"paged": attention_ways.paged(inputs)}
    try:
        expected = ways["paged"](0).float()
    except ValueError as error:
        raise CommandError(f"{case}: {error}") from None
    missing: dict[str, str] = {}
    makers = others(inputs)
    if case.kind == "decode" and args.block_size != LARGE_BLOCK:
        makers[f"pages of {LARGE_BLOCK}"] = lambda: attention_ways.paged(inputs.repaged(LARGE_BLOCK, in_order=False))
    for name, make in makers.items():
        try:
            way: Attention = make()
            out = way(0).float()
        except Exception as error:
            # Each library has refusals of its own kind.
            missing[name] = (str(error).splitlines() or [type(error).__name__])[0]
            continue
        difference = (out - expected).abs().max().item()
        if not difference <= TOLERANCE:
            raise CommandError(
                f"{case}: {name} differs from the paged op by {difference:.2g}; must be within {TOLERANCE}"
            )
        ways[name] = way
    timings = clock.alternate(ways, args.rounds)
    nbytes = case.kv_bytes(dtype) + 2 * inputs.query.nbytes
    flops = None if case.kind == "decode" else case.flops()
    return CudaResult(str(case), dtype, each.goal, nbytes, flops, timings.pop("paged"), timings, missing)


def move_result(move: Move, dtype: torch.dtype, args: argparse.Namespace, clock: Clock) -> CudaResult:
    timing = clock.alternate({move.name: move.call}, args.rounds)[move.name]
    return CudaResult(move.name, dtype, move.goal, move.nbytes, None, timing)
