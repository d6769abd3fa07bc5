"""Run a family's tests stock and patched: python -m tests.outside.judge FAMILY."""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
import unittest
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import fetch
from .ledger import LEDGER, Excuse

# Small blocks and a small pool, so that rows cross from block to block.
KNOBS: dict[str, Any] = dict(block_size=4, max_memory="64MiB")
EXPORT, GENERATION = "executorch", "generation"
# Read where torch and the Hub's client are imported: one thread, no network, the CPU even where there is a GPU.
ENVIRONMENT = dict(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1", TRANSFORMERS_TEST_DEVICE="cpu")


@dataclass(frozen=True)
class Outcome:
    """One test. `stock` and `patched` are "passed", "skipped" or "failed"; patched is None where stock did not pass."""

    test: str
    stock: str
    patched: str | None
    why: str


@dataclass
class Report:
    """What came of a family's tests.

    Attributes:
        models: how many models the patched runs patched.
        paged: how many of them kept keys and values in blocks.
        blocks: how many blocks they hold now that all tests are over.
    """

    family: str
    outcomes: list[Outcome] = field(default_factory=list)
    models: int = 0
    paged: int = 0
    blocks: int = 0
    seconds: float = 0.0

    @classmethod
    def read(cls, saved: dict[str, Any]) -> Report:
        """The report that `asdict` wrote."""
        return cls(**(saved | {"outcomes": [Outcome(**outcome) for outcome in saved["outcomes"]]}))

    def tally(self, ledger: list[Excuse] = LEDGER) -> Counter[str]:
        counts: Counter[str] = Counter()
        for outcome in self.outcomes:
            if outcome.stock != "passed":
                counts[f"{outcome.stock} stock"] += 1
            elif outcome.patched == "passed":
                counts["passed both"] += 1
            else:
                counts["in the ledger" if _excuse(outcome.test, self.family, ledger) else "failed patched"] += 1
        return counts

    def complaints(self, ledger: list[Excuse] = LEDGER) -> list[str]:
        """What is wrong: a test that passes stock alone, an excuse that is not needed, blocks that nobody gave back."""
        found = []
        for outcome in self.outcomes:
            excuse = _excuse(outcome.test, self.family, ledger)
            if outcome.stock == "passed" and outcome.patched != "passed" and excuse is None:
                found.append(f"{outcome.test}: passed stock, {outcome.patched} patched\n{outcome.why}")
            if outcome.patched == "passed" and excuse is not None:
                found.append(f"{outcome.test}: passes patched after all; strike it from the ledger ({excuse.reason})")
        if self.blocks:
            found.append(f"{self.blocks} blocks are still held after all tests")
        return found


def _excuse(test: str, family: str, ledger: list[Excuse]) -> Excuse | None:
    return next((one for one in ledger if one.covers(test, family)), None)


def judge(family: str) -> Report:
    """Run the family's tests in this process, each of them stock and then patched.

    Raises: ImportError: the family's tests need what is not installed.
    """
    from .patched import every_model_patched
    from .upstream import seed

    report, start = Report(family), time.monotonic()
    handles: list[Any] = []
    for case, name in _tests(family):
        seed()
        stock, why = _run(case(name))
        patched = None
        if stock == "passed":
            seed()
            with every_model_patched(**KNOBS) as new:
                patched, why = _run(case(name))
            handles += new
        name = f"{case.__name__}.{name}"
        report.outcomes.append(Outcome(name, stock, patched, why))
    gc.collect()
    report.models = len(handles)
    report.paged = sum(handle.stats().peak_bytes > 0 for handle in handles)
    report.blocks = sum(handle.stats().blocks_used for handle in handles)
    report.seconds = time.monotonic() - start
    return report


def _tests(family: str) -> Iterator[tuple[type[unittest.TestCase], str]]:
    from . import families, upstream

    upstream.load(fetch.source())
    if family == EXPORT:
        cases = [families.executorch_case()]
    elif family == GENERATION:
        cases = upstream.cases("generation.test_utils")
    elif fetch.is_checkout(fetch.source()):
        cases = upstream.cases(f"models.{family}.test_modeling_{family}")
    else:
        cases = [families.case_of(family)]
    for case in cases:
        for name in unittest.TestLoader().getTestCaseNames(case):
            yield case, name


def _run(test: unittest.TestCase) -> tuple[str, str]:
    """How it went, and the end of the traceback or the reason of a skip."""
    result = unittest.TestResult()
    test.run(result)
    if problems := result.errors + result.failures:
        return "failed", "\n".join(problems[0][1].strip().splitlines()[-12:])
    if result.skipped:
        return "skipped", result.skipped[0][1]
    return "passed", ""


def families() -> list[str]:
    """Those that the tests at hand have tests for."""
    from .families import FAMILIES

    folder = fetch.source()
    if not fetch.is_checkout(folder):
        return [EXPORT, *FAMILIES]
    models = folder / "tests" / "models"
    return [EXPORT, GENERATION, *(f for f in FAMILIES if (models / f / f"test_modeling_{f}.py").exists())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family")
    parser.add_argument("--json", type=Path, help="write the report here")
    arguments = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    report = judge(arguments.family)
    if arguments.json:
        arguments.json.write_text(json.dumps(asdict(report)))
        return
    for outcome in report.outcomes:
        reason = "" if outcome.patched == "passed" else outcome.why.splitlines()[-1:]
        print(f"{outcome.stock:8}{outcome.patched or '':8}{outcome.test} {reason}")
    print(dict(report.tally()), f"{report.models} models patched, {report.paged} paged, {report.seconds:.0f} s")
    print("\n".join(report.complaints()))


if __name__ == "__main__":
    main()
