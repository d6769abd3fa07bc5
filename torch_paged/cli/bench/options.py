"""The options that every subject of bench has, and what is checked about them before anything is measured."""

import argparse
from pathlib import Path

import torch

from torch_paged.cli.arguments import at_least
from torch_paged.cli.bench import plot
from torch_paged.cli.errors import CommandError

BLOCK_SIZES = [2**i for i in range(9)]


def add_common(parser: argparse.ArgumentParser, rounds: int, rounds_help: str) -> None:
    """Add `--rounds`, `--threads`, `--seed`, `--json` and `--plot`."""
    parser.add_argument("--rounds", type=at_least(1), default=rounds, help=f"{rounds_help}; default: {rounds}")
    parser.add_argument("--threads", type=at_least(1), help="threads of PyTorch; default: its own choice")
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write the figures there as JSON; - or nothing prints them instead of the table",
    )
    parser.add_argument("--plot", metavar="OUT.PNG", help="draw the figures; needs matplotlib")


def prepare(args: argparse.Namespace) -> None:
    """Set the threads, and find out now whether the figures can be written later.

    Raises:
        CommandError: `--plot` without matplotlib or with an ending it cannot draw, or a folder that does not exist.
    """
    for option, file in (("--json", args.json), ("--plot", args.plot)):
        if file not in (None, "-") and not Path(file).parent.is_dir():
            raise CommandError(f"{option} {file}: no folder {Path(file).parent}")
        if file not in (None, "-") and Path(file).is_dir():
            raise CommandError(f"{option} {file}: a folder; must be a file")
    if args.plot is not None:
        plot.require_matplotlib(args.plot)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
