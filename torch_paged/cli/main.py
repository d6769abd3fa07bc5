"""Reads the command line and runs the command it names; whatever is wrong with an argument becomes one line."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from torch_paged._version import __version__
from torch_paged.cli import bench, demo, env
from torch_paged.cli.errors import CommandError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the words after `python -m torch_paged`; None takes them from the command line.

    Returns:
        The exit status: 0, or 2 where an argument is wrong.
    """
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        status: int = args.run(args)
    except CommandError as error:
        print(f"{parser.prog} {args.command}: error: {error}", file=sys.stderr)
        return 2
    return status


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m torch_paged", description="Paged KV memory for HuggingFace generate, and its custom ops."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{demo,bench,env}")
    for module in (demo, bench, env):
        name = module.__name__.rpartition(".")[2]
        summary = module.__doc__ or ""
        module.add_arguments(commands.add_parser(name, help=summary, description=summary))
    return parser
