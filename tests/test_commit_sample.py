"""What is drawn by commit: the same for one commit, others for the next."""

from __future__ import annotations

import subprocess
from unittest import mock

import pytest

from tests.commit_sample import commit_sample

NAMES = [f"case {number}" for number in range(100)]
COMMITS = ["176a6a67d24881b3f39be735e4bd7fdc4ca7d399", "f11ea1469da4a126f62a70482600eb64f91f2ab1"]


def test_one_commit_draws_one_sample() -> None:
    first, second = (commit_sample(NAMES, 5, commit) for commit in COMMITS)
    assert first == commit_sample(set(NAMES), 5, COMMITS[0]) == commit_sample(NAMES[::-1], 5, COMMITS[0])
    assert len(set(first)) == len(set(second)) == 5 and {*first, *second} <= set(NAMES)
    assert first != second


def test_every_name_has_its_turn() -> None:
    drawn = {name for number in range(300) for name in commit_sample(NAMES, 5, f"{number:040x}")}
    assert drawn == set(NAMES)


def test_a_sample_of_more_than_there_are_is_all() -> None:
    assert commit_sample(NAMES[:3], 5, COMMITS[0]) == NAMES[:3]


@pytest.mark.parametrize("commit", COMMITS)
def test_the_commit_is_head_unless_told(commit: str) -> None:
    answer = subprocess.CompletedProcess([], 0, stdout=f"{commit}\n")
    with mock.patch.object(subprocess, "run", return_value=answer) as git:
        assert commit_sample(NAMES, 5) == commit_sample(NAMES, 5, commit)
    assert git.call_args.args == (["git", "rev-parse", "HEAD"],)
