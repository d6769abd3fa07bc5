"""transformers' own tests: what passes on stock models passes on patched ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from tests.commit_sample import commit_sample

from . import fetch, judge
from .families import FAMILIES, config_of
from .ledger import NOT_COLLECTED

ALWAYS = ["llama", "gpt2", "mistral", "executorch"]
BY_COMMIT = 3
OBSTACLE = fetch.obstacle(transformers.__version__)

pytestmark = pytest.mark.skipif(OBSTACLE is not None, reason=str(OBSTACLE))


def chosen(option: str) -> list[str]:
    """The families that `--outside` names, "all" of them, or the fixed handful and a sample by commit."""
    if OBSTACLE is not None:
        return ALWAYS
    families = judge.families()
    if option == "all":
        return families
    if option:
        return option.split(",")
    return [*ALWAYS, *commit_sample(set(families) - set(ALWAYS), BY_COMMIT)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "family" in metafunc.fixturenames:
        metafunc.parametrize("family", chosen(metafunc.config.getoption("outside")))


def test_what_passes_stock_passes_patched(family: str, reports: list[judge.Report], tmp_path: Path) -> None:
    """In a process of its own: these tests set global switches, and none of them may depend on another family."""
    file = tmp_path / "report.json"
    command = [sys.executable, "-m", "tests.outside.judge", family, "--json", str(file)]
    process = subprocess.run(command, cwd=fetch.ROOT, capture_output=True, text=True, timeout=1800)
    assert process.returncode == 0, process.stderr[-4000:]
    report = judge.Report.read(json.loads(file.read_text()))
    reports.append(report)
    complaints = report.complaints()
    assert not complaints, "\n\n".join(complaints)
    # And they were run, on models that were patched, one of which at least has generated from blocks.
    if family in FAMILIES:
        assert report.tally()["passed both"] > 60 and report.models > 60
        assert report.paged > 0 or config_of(family).is_encoder_decoder


def test_all_files_of_the_tests_are_accounted_for() -> None:
    """A file that a new version brings is collected, or NOT_COLLECTED says why it is not."""
    files = {file.name for file in (fetch.source() / "tests").glob("test_*.py")}
    collected = {"test_executorch.py", "test_modeling_common.py", "test_training_mixin.py"}
    assert files == collected | set(NOT_COLLECTED)
