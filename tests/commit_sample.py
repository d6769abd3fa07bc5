"""A sample that changes with every commit, for what is too slow to be tested in full each time."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Collection
from pathlib import Path


def commit_sample(names: Collection[str], count: int) -> list[str]:
    """`count` of the names, drawn by the hash of HEAD: the same on every machine, others with the next commit."""
    command = ["git", "rev-parse", "HEAD"]
    head = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False).stdout
    return sorted(random.Random(head).sample(sorted(names), min(count, len(names))))
