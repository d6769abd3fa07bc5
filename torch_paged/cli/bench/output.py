"""Where the figures of a bench go: the terminal, a JSON file, a picture."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from torch_paged.cli.bench import plot
from torch_paged.cli.bench.plot import Panel
from torch_paged.cli.env import collect
from torch_paged.cli.errors import CommandError
from torch_paged.cli.report import print_environment, wide_console


@dataclass(frozen=True)
class Output:
    """What a subject of bench found.

    Attributes:
        subject: its name on the command line.
        settings: what was asked for, named as in the options.
        figures: everything the tables show, as JSON can hold it.
        tables: for the terminal.
        notes: lines below them.
        panels: for the picture.
    """

    subject: str
    settings: dict[str, Any]
    figures: dict[str, Any]
    tables: Sequence[Table]
    notes: Sequence[str]
    panels: Sequence[Panel]


def write(output: Output, args: argparse.Namespace) -> None:
    """Write the figures to where `--json` and `--plot` say, and show the tables unless stdout takes the JSON.

    Raises:
        CommandError: a file cannot be written.
    """
    environment = collect()
    settings = {**output.settings, "rounds": args.rounds, "seed": args.seed}
    if args.json is not None:
        document = {"bench": output.subject, "environment": environment, **settings, **output.figures}
        text = json.dumps(document, indent=2, allow_nan=False) + "\n"
        if args.json == "-":
            print(text, end="")
        else:
            write_text(args.json, text)
    if args.json != "-":
        console = wide_console()
        for table in output.tables:
            console.print(table)
        for note in output.notes:
            console.print(note, soft_wrap=True, highlight=False, markup=False)
        print_environment(console, settings)
    if args.plot is not None:
        machine = (
            f"{environment['cpu']}, {environment['cpu_instruction_set']}, {environment['threads']} threads; "
            f"torch_paged {environment['torch_paged']}, torch {environment['torch']}; seed {args.seed}"
        )
        plot.draw(output.panels, f"torch_paged bench {output.subject}", machine, args.plot)


def write_text(file: str, text: str) -> None:
    try:
        Path(file).write_text(text)
    except OSError as error:
        raise CommandError(f"--json {file}: {error.strerror}") from None
