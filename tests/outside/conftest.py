"""The judge's numbers at the end of a test run."""

from __future__ import annotations

from collections import Counter

import pytest

from .judge import Report

REPORTS = pytest.StashKey[list[Report]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[REPORTS] = []


@pytest.fixture
def reports(pytestconfig: pytest.Config) -> list[Report]:
    """Where the reports of this run are gathered."""
    return pytestconfig.stash.setdefault(REPORTS, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    reports = config.stash.get(REPORTS, [])
    if not reports:
        return
    terminalreporter.section("transformers' own tests, stock and patched")
    total: Counter[str] = Counter()
    for report in reports:
        total += report.tally()
        terminalreporter.write_line(f"{report.family}: {_numbers(report.tally())}; {report.seconds:.0f} s")
    terminalreporter.write_line(f"{len(reports)} families: {_numbers(total)}")


def _numbers(tally: Counter[str]) -> str:
    return ", ".join(f"{number} {what}" for what, number in sorted(tally.items()))
