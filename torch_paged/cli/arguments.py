"""Types of command-line arguments that several commands share."""

import argparse
from collections.abc import Callable

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def at_least(minimum: int) -> Callable[[str], int]:
    """Return a reader of integers that refuses those below `minimum`."""

    def read(text: str) -> int:
        if not text.removeprefix("-").isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text}; must be an integer of at least {minimum}")
        return int(text)

    return read
