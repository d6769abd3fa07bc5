"""Times the ops against PyTorch's own, and the bookkeeping of a decode step."""

import argparse

from torch_paged.cli.bench import bookkeeping, ops


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subjects = parser.add_subparsers(dest="subject", required=True, metavar="{ops,bookkeeping}")
    for module in (ops, bookkeeping):
        name = module.__name__.rpartition(".")[2]
        summary = module.__doc__ or ""
        module.add_arguments(subjects.add_parser(name, help=summary, description=summary))
