"""Times generate with stock's caches, continuous batching and torch_paged, in alternation, and counts the KV bytes."""

import argparse
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from torch_paged.cli.arguments import DTYPES, at_least
from torch_paged.cli.bench.generate_cases import NAMES, GenerateCase, Sizes, cases
from torch_paged.cli.bench.generate_model import Shape, named_model, random_model
from torch_paged.cli.bench.options import BLOCK_SIZES, add_common, prepare
from torch_paged.cli.bench.output import Output, write
from torch_paged.cli.errors import CommandError
from torch_paged.cli.report import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from torch_paged.cli.bench.generate_result import CaseResult
    from torch_paged.cli.bench.generate_ways import Way

WAYS = {
    "dynamic": "DynamicCache",
    "one-by-one": "DynamicCache, one by one",
    "static": "StaticCache",
    "batch": "generate_batch",
    "paged": "torch_paged",
    "paged-compiled": "torch_paged, compile=True",
    "slots": "generate_many by slots",
    "blocks": "generate_many by blocks",
}
# Those of the case of many requests alone.
MANY = "slots", "blocks"
# Not by default: it takes a minute or two before the first call.
COMPILED = "paged-compiled"
WARM_UP_TOKENS = 8, 3  # of a prompt, and after it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("the model, by default of the shape of Qwen2.5-0.5B with random weights")
    model.add_argument("--model", help="folder or hub id of a causal language model, instead of a shape")
    model.add_argument("--layers", type=at_least(1), default=24)
    model.add_argument("--hidden", type=at_least(1), default=896)
    model.add_argument("--intermediate", type=at_least(1), default=4864)
    model.add_argument("--heads", type=at_least(1), default=14)
    model.add_argument("--kv-heads", type=at_least(1), default=2)
    model.add_argument("--vocabulary", type=at_least(2), default=32000)
    model.add_argument(
        "--dtype", nargs="+", choices=DTYPES, default=["float32"], help="only float32 promises stock's tokens"
    )
    asked = parser.add_argument_group("what is generated")
    asked.add_argument("--cases", nargs="+", choices=NAMES, default=list(NAMES))
    asked.add_argument("--ways", nargs="+", choices=WAYS, default=[name for name in WAYS if name != COMPILED])
    asked.add_argument("--context", type=at_least(1), default=1024, help="tokens of a prompt")
    asked.add_argument("--new-tokens", type=at_least(1), default=32, help="after each prompt but the ragged ones")
    asked.add_argument("--batch", nargs="+", type=at_least(1), default=[8], help="rows, uniform and padded")
    asked.add_argument("--beams", type=at_least(2), default=4)
    asked.add_argument("--samples", type=at_least(2), default=8)
    asked.add_argument("--ragged-rows", type=at_least(1), default=16)
    asked.add_argument("--ragged-prompts", nargs=2, type=at_least(1), default=[36, 1798], metavar=("LEAST", "MOST"))
    asked.add_argument("--ragged-wishes", nargs=2, type=at_least(1), default=[17, 120], metavar=("LEAST", "MOST"))
    asked.add_argument("--chat-system", type=at_least(1), default=2000, help="tokens before the first turn of a chat")
    asked.add_argument("--chat-turns", type=at_least(1), default=8)
    asked.add_argument("--chat-user", type=at_least(1), default=60, help="tokens of the user's part of a turn")
    asked.add_argument("--chat-answer", type=at_least(1), default=40)
    asked.add_argument("--many-requests", type=at_least(1), default=64, help="of generate_many")
    asked.add_argument("--many-fit", type=at_least(1), default=8, help="requests that slots, or blocks, have room for")
    asked.add_argument("--many-prompts", nargs=2, type=at_least(1), default=[36, 512], metavar=("LEAST", "MOST"))
    asked.add_argument("--many-wishes", nargs=2, type=at_least(1), default=[17, 60], metavar=("LEAST", "MOST"))
    asked.add_argument("--block-size", type=int, choices=BLOCK_SIZES, default=16, help="of torch_paged")
    add_common(parser, rounds=3, rounds_help="calls of each way")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    for option in ("ragged_prompts", "ragged_wishes", "many_prompts", "many_wishes"):
        least, most = getattr(args, option)
        if least > most:
            raise CommandError(f"--{option.replace('_', '-')} {least} {most}; the first must be at most the second")
    prepare(args)
    sizes = Sizes(
        context=args.context,
        new_tokens=args.new_tokens,
        batches=tuple(args.batch),
        beams=args.beams,
        samples=args.samples,
        ragged_rows=args.ragged_rows,
        ragged_prompts=(args.ragged_prompts[0], args.ragged_prompts[1]),
        ragged_wishes=(args.ragged_wishes[0], args.ragged_wishes[1]),
        chat_system=args.chat_system,
        chat_turns=args.chat_turns,
        chat_user=args.chat_user,
        chat_answer=args.chat_answer,
        many_requests=args.many_requests,
        many_fit=args.many_fit,
        many_prompts=(args.many_prompts[0], args.many_prompts[1]),
        many_wishes=(args.many_wishes[0], args.many_wishes[1]),
    )
    shape = Shape(args.layers, args.hidden, args.intermediate, args.heads, args.kv_heads, args.vocabulary)
    results = [result for dtype in args.dtype for result in measure_all(dtype, shape, sizes, args)]

    from torch_paged.cli.bench.generate_result import notes, panels, table

    settings = {
        "model": args.model or shape.name,
        "block_size": args.block_size,
        "context": args.context,
        "new_tokens": args.new_tokens,
    }
    figures = {"results": [result.as_json() for result in results]}
    write(Output("generate", settings, figures, [table(results)], notes(results), panels(results)), args)
    return 0


def measure_all(dtype: str, shape: Shape, sizes: Sizes, args: argparse.Namespace) -> "list[CaseResult]":
    """All cases in one dtype.

    Raises:
        CommandError: the model cannot be had, or has too few positions.
    """
    positions = sizes.positions(args.cases)
    if args.model:
        model = named_model(args.model, positions, DTYPES[dtype])
    else:
        model = random_model(shape, positions, DTYPES[dtype], args.seed)
    asked = cases(args.cases, sizes, model.config.get_text_config(decoder=True).vocab_size, args.seed)
    results, calls = [], ways(args.block_size)
    with progress() as bar:
        task = bar.add_task("bench generate", total=len(asked) * args.rounds)
        for case in asked:
            bar.update(task, description=f"{case.name}, {dtype}")
            results.append(measure(model, case, dtype, calls, args, partial(bar.advance, task)))
    return results


def measure(
    model: "PreTrainedModel",
    case: GenerateCase,
    dtype: str,
    calls: "dict[str, Way]",
    args: argparse.Namespace,
    advance: Callable[[], None],
) -> "CaseResult":
    """Run every way once a round, A B A B; before the first round each on a few tokens."""
    from torch_paged.cli.bench.generate_result import CaseResult, WayResult
    from torch_paged.cli.bench.generate_ways import NotPossible

    names = [name for name in WAYS if name in args.ways and (name in MANY) == bool(case.fit)]
    if not case.is_ragged:
        names = [name for name in names if name != "one-by-one"]
    # generate_batch draws its samples in an order of its own.
    results = {name: WayResult(WAYS[name], draws_alike=name != "batch", batched=name != "one-by-one") for name in names}
    short = case.shortened(*WARM_UP_TOKENS)
    # A second prefill is the first that is compiled, and a row that is left alone has a graph of its own.
    warm_ups = {name: [short, short, short.first()] if name == COMPILED else [short] for name in names}
    for number in range(-1, args.rounds):
        for name, result in results.items():
            if result.reason is not None:
                continue
            try:
                runs = [calls[name](model, each, args.seed) for each in (warm_ups[name] if number < 0 else [case])]
            except NotPossible as error:
                result.reason = str(error)
                result.runs.clear()
                continue
            if number >= 0:
                result.runs += runs
            else:
                result.warm_up_s = sum(run.seconds for run in runs)
        if number >= 0:
            advance()
    return CaseResult(case, dtype, list(results.values()))


def ways(block_size: int) -> "dict[str, Way]":
    from torch_paged.cli.bench import generate_many_ways, generate_ways
    from torch_paged.cli.bench.continuous_batching import continuous_batching

    return {
        "dynamic": generate_ways.dynamic,
        "one-by-one": generate_ways.one_by_one,
        "static": generate_ways.static,
        "batch": continuous_batching,
        "paged": generate_ways.paged(block_size),
        COMPILED: generate_ways.paged_compiled(block_size),
        "slots": generate_many_ways.slots(block_size),
        "blocks": generate_many_ways.blocks(block_size),
    }
