"""A sample that changes with every commit, for what is too slow to be tested in full each time."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Collection
from pathlib import Path


def commit_sample(names: Collection[str], count: int, commit: str | None = None) -> list[str]:
    """`count` of the names, drawn by the hash of a commit: the same on every machine, others with the next commit.

    Args:
        commit: HEAD, unless told.
    """
    return sorted(random.Random(commit or head()).sample(sorted(names), min(count, len(names))))


def head() -> str:
    """The hash of HEAD, or nothing outside a git checkout."""
    command = ["git", "rev-parse", "HEAD"]
    return subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    ).stdout.strip()
