"""What the commands print alike: a progress bar, tables that do not fold, a line about the machine."""

import sys
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from torch_paged.cli.env import collect

MIN_TABLE_WIDTH = 160


def progress() -> Progress:
    """Return a progress bar on stderr; it leaves no trace where stderr is no terminal."""
    console = Console(file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def wide_console() -> Console:
    """Return a console on stdout that keeps a table's rows whole in a file or a pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=MIN_TABLE_WIDTH)


def print_environment(console: Console, settings: Mapping[str, object]) -> None:
    """Name the machine and the settings under a table of figures."""
    environment = collect()
    console.print(
        f"{environment['cpu']}, {environment['cpu_instruction_set']}, {environment['threads']} threads; "
        f"torch_paged {environment['torch_paged']}, torch {environment['torch']}, "
        f"Python {environment['python']}, {environment['os']}; "
        + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items()),
        soft_wrap=True,
        highlight=False,
    )
