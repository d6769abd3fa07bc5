"""Counts what blocks save - waste, users, sharing - with the real allocator on block ids, beside published figures."""

import argparse
import math
from functools import partial
from typing import Any

import numpy as np

from torch_paged.cli.arguments import at_least
from torch_paged.cli.bench import memory_decoding, memory_scenarios, published
from torch_paged.cli.bench.kv_geometry import DTYPE, KVGeometry
from torch_paged.cli.bench.length_mixes import MIXES
from torch_paged.cli.bench.memory_decoding import RandomBeamSearch
from torch_paged.cli.bench.memory_rows import Row, panels, table
from torch_paged.cli.bench.options import BLOCK_SIZES, add_common, prepare
from torch_paged.cli.bench.output import Output, write
from torch_paged.cli.errors import CommandError
from torch_paged.cli.report import progress
from torch_paged.memory import parse_max_memory

LLAMA_7B_PARAMETERS = 6_738_415_616


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("the model, by default Llama-7B in float16")
    model.add_argument("--layers", type=at_least(1), default=32)
    model.add_argument("--kv-heads", type=at_least(1), default=32)
    model.add_argument("--head-dim", type=at_least(1), default=128)
    model.add_argument("--parameters", type=at_least(0), default=LLAMA_7B_PARAMETERS, help="two bytes each")
    machine = parser.add_argument_group("the machine")
    machine.add_argument("--memory", type=memory_bytes, default="32GiB", help="of the device; default: 32GiB")
    machine.add_argument(
        "--workspace", type=memory_bytes, default="2GiB", help="activations and everything else; default: 2GiB"
    )
    load = parser.add_argument_group("the requests")
    load.add_argument("--block-size", type=int, choices=BLOCK_SIZES, default=16)
    load.add_argument("--max-len", type=at_least(2), default=2048, help="tokens of a pre-allocated sequence")
    load.add_argument("--mix", choices=MIXES, default="sharegpt", help="lengths of the waste and users scenarios")
    load.add_argument("--requests", type=at_least(1), default=100, help="of the waste scenario and of each length mix")
    load.add_argument("--sharers", type=at_least(1), default=100, help="users who share a prompt")
    load.add_argument("--prompt", type=at_least(1), default=500, help="tokens of the shared prompt")
    load.add_argument("--own-tokens", type=at_least(0), default=100, help="tokens of each sharer after the prompt")
    load.add_argument("--widths", type=at_least(2), nargs="+", default=[2, 4, 6], help="samples and beams of a request")
    load.add_argument(
        "--concentration",
        type=positive,
        default=1.0,
        help="of the random beam search, GEM: 1 gives a surprise of 1 nat a token, more makes beams change places more",
    )
    add_common(parser, rounds=20, rounds_help="draws of the lengths in the waste and users scenarios")
    parser.set_defaults(run=run)


def memory_bytes(text: str) -> int:
    try:
        parsed = parse_max_memory(text)
    except ValueError:
        parsed = None
    if not isinstance(parsed, int):
        raise argparse.ArgumentTypeError(f'{text}; must be bytes, such as "32GiB" or "500MB"')
    return parsed


def positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text}; must be a number greater than 0")
    return number


def run(args: argparse.Namespace) -> int:
    prepare(args)
    geometry = KVGeometry(args.layers, args.kv_heads, args.head_dim, args.block_size)
    scenarios = [partial(waste, geometry, args), partial(users, geometry, args), partial(shared_prompt, geometry, args)]
    for mix in MIXES:
        for width in args.widths:
            scenarios.append(partial(decoding, geometry, args, mix, width, beams=False))
        for width in args.widths:
            scenarios.append(partial(decoding, geometry, args, mix, width, beams=True))
    rows = []
    with progress() as bar:
        for scenario in bar.track(scenarios, description="bench memory"):
            rows.append(scenario())
    settings = {
        "layers": args.layers,
        "kv_heads": args.kv_heads,
        "head_dim": args.head_dim,
        "dtype": str(DTYPE).removeprefix("torch."),
        "block_size": args.block_size,
    }
    notes = [
        "Ours: counted here, by torch_paged's allocator and tables, over block ids. Published: by others.",
        f"A token takes {geometry.token_bytes:,} bytes. Lengths: geometric, with the means of the data sets; beams: a "
        f"search over random next-token probabilities, GEM({args.concentration:g}).",
    ]
    figures = {"token_bytes": geometry.token_bytes, "results": [row.as_json() for row in rows]}
    write(Output("memory", settings, figures, [table(rows)], notes, panels(rows)), args)
    return 0


def waste(geometry: KVGeometry, args: argparse.Namespace) -> Row:
    """The median over as many draws as there are rounds."""
    draws = []
    for number in range(args.rounds):
        rng = np.random.default_rng([args.seed, number])
        seq_lens = np.sum(MIXES[args.mix].draw(rng, args.requests, args.max_len), axis=0)
        draws.append(memory_scenarios.waste(geometry, seq_lens, args.max_len))
    draws.sort(key=lambda draw: draw.num_tokens)
    found = draws[len(draws) // 2]
    return Row(
        scenario="waste",
        setting=f"{args.requests} requests like {args.mix}, {found.num_tokens:,} tokens; {args.max_len:,} slots each",
        without=f"{found.preallocated_slots:,} slots: {found.of_preallocation:.1%} waste "
        f"({draws[-1].of_preallocation:.1%}–{draws[0].of_preallocation:.1%})",
        blocks=f"{found.num_blocks:,} blocks: {found.of_blocks:.1%} waste",
        ours=found.of_preallocation,
        published=published.WASTE_OF_PREALLOCATION,
        details={
            "mix": args.mix,
            "requests": args.requests,
            "tokens": found.num_tokens,
            "preallocated_slots": found.preallocated_slots,
            "blocks": found.num_blocks,
            "waste_of_preallocation": {
                "median": found.of_preallocation,
                "min": draws[-1].of_preallocation,
                "max": draws[0].of_preallocation,
            },
            "waste_of_blocks": found.of_blocks,
        },
    )


def users(geometry: KVGeometry, args: argparse.Namespace) -> Row:
    """Raises CommandError where the weights leave no room for one sequence."""
    weights = args.parameters * DTYPE.itemsize
    kv_bytes = args.memory - weights - args.workspace
    if kv_bytes < args.max_len * geometry.token_bytes:
        raise CommandError(
            f"--memory {args.memory}: leaves {kv_bytes} bytes for keys and values after {weights} of weights and "
            f"{args.workspace} of workspace; must leave {args.max_len * geometry.token_bytes}, one sequence"
        )
    found = memory_scenarios.users(geometry, kv_bytes, MIXES[args.mix], args.max_len, args.rounds, args.seed)
    spread = f"{min(found.in_blocks)}–{max(found.in_blocks)}"
    return Row(
        scenario="users",
        setting=f"{kv_bytes / 2**30:.2f} GiB for KV: {args.memory / 2**30:g} GiB - {weights / 2**30:.2f} weights - "
        f"{args.workspace / 2**30:g} workspace; like {args.mix}",
        without=f"{found.preallocated} users",
        blocks=f"{found.median_in_blocks:g} users ({spread})",
        ours=found.ratio,
        published=published.TIMES_THE_USERS,
        unit="times",
        details={
            "mix": args.mix,
            "memory_bytes": args.memory,
            "weight_bytes": weights,
            "workspace_bytes": args.workspace,
            "kv_bytes": kv_bytes,
            "users_preallocated": found.preallocated,
            "users_in_blocks": {
                "median": found.median_in_blocks,
                "min": min(found.in_blocks),
                "max": max(found.in_blocks),
            },
        },
    )


def shared_prompt(geometry: KVGeometry, args: argparse.Namespace) -> Row:
    found = memory_scenarios.shared_prompt(geometry, args.sharers, args.prompt, args.own_tokens)
    return sharing_row(
        "shared prompt",
        f"{args.sharers} users, {args.prompt} tokens shared + {args.own_tokens} own each",
        found,
        published.SAVED_BY_SHARED_PROMPT,
        {"users": args.sharers, "prompt": args.prompt, "own_tokens": args.own_tokens},
    )


def decoding(geometry: KVGeometry, args: argparse.Namespace, mix: str, width: int, beams: bool) -> Row:
    rng = np.random.default_rng(args.seed)  # every width and both ways of decoding: the same requests
    prompt_lens, output_lens = MIXES[mix].draw(rng, args.requests, args.max_len)
    search = RandomBeamSearch(args.requests, width, args.concentration, rng) if beams else None
    found = memory_decoding.decode(geometry, prompt_lens, output_lens, width, search)
    name = "beams" if beams else "samples"
    return sharing_row(
        name,
        f"{width} {name} of {args.requests} requests like {mix}, every step",
        found,
        (published.SAVED_BY_BEAMS if beams else published.SAVED_BY_SAMPLES)[mix],
        {
            "mix": mix,
            "width": width,
            "requests": args.requests,
            "mean_prompt_tokens": float(prompt_lens.mean()),
            "mean_output_tokens": float(output_lens.mean()),
        },
    )


def sharing_row(
    scenario: str,
    setting: str,
    found: memory_scenarios.Sharing,
    source: published.Published,
    details: dict[str, Any],
) -> Row:
    return Row(
        scenario=scenario,
        setting=setting,
        without=f"{found.blocks_unshared:,} blocks",
        blocks=f"{found.blocks_shared:,} blocks",
        ours=found.saved,
        published=source,
        details={**details, "blocks_unshared": found.blocks_unshared, "blocks_shared": found.blocks_shared},
    )
