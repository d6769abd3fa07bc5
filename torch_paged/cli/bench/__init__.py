"""Times the ops and generate against PyTorch's and transformers' own, and counts what blocks save."""

import argparse
from importlib import import_module

SUBJECTS = ("ops", "copies", "bookkeeping", "memory", "steps", "generate")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subjects = parser.add_subparsers(dest="subject", required=True, metavar=f"{{{','.join(SUBJECTS)}}}")
    for name in SUBJECTS:
        module = import_module(f"{__name__}.{name}")
        summary = module.__doc__ or ""
        module.add_arguments(subjects.add_parser(name, help=summary, description=summary))
