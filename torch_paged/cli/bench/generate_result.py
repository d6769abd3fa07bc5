"""What the ways of generate took in one case, as rows of the table, JSON and bars."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from torch_paged.cli.bench.generate_cases import GenerateCase
from torch_paged.cli.bench.generate_ways import Run
from torch_paged.cli.bench.plot import Panel
from torch_paged.cli.bench.timing import Timing
from torch_paged.cli.demo import as_bytes

# What the other ways are held against; of the requests of generate_many the second.
BASES = "DynamicCache", "generate_many by slots"


@dataclass
class WayResult:
    """The runs of one way, one per round, or why there are none.

    Attributes:
        draws_alike: whether it draws samples as stock does, so that their tokens can be compared.
        batched: whether a step is one of all rows, so that its time can be compared.
        warm_up_s: seconds of the calls on a few tokens before the runs, with all that is compiled.
    """

    name: str
    draws_alike: bool = True
    batched: bool = True
    runs: list[Run] = field(default_factory=list)
    reason: str | None = None
    warm_up_s: float = 0.0

    @property
    def step(self) -> Timing | None:
        """Over the steps of all rounds; None where one token was all."""
        steps = [step for run in self.runs for step in run.steps]
        return Timing.of(steps) if steps else None

    @property
    def prefill(self) -> Timing:
        return Timing.of([run.prefill for run in self.runs])

    @property
    def prefill_tokens(self) -> int | None:
        """The same in every round."""
        return self.runs[0].prefill_tokens

    @property
    def total(self) -> Timing:
        return Timing.of([run.seconds for run in self.runs])

    @property
    def peak_kv_bytes(self) -> int | None:
        """The largest of any round."""
        return max((run.peak_kv_bytes for run in self.runs if run.peak_kv_bytes is not None), default=None)

    @property
    def slots_used(self) -> float | None:
        """Tokens stored by token slots held, averaged over the steps of the last round."""
        return self.runs[-1].slots_used if self.runs else None


@dataclass
class CaseResult:
    """One case in one dtype."""

    case: GenerateCase
    dtype: str
    ways: list[WayResult]

    @property
    def base(self) -> WayResult | None:
        """The way that others are held against."""
        return next((way for way in self.ways if way.name in BASES and way.runs), None)

    def same_rows(self, way: WayResult) -> int | None:
        """Sequences with the base's tokens; None where they need not be: other samples, or rounding in a half."""
        comparable = self.dtype == "float32" and (way.draws_alike or not self.case.samples)
        if self.base is None or not way.runs or not comparable:
            return None
        pairs = zip(self.base.runs[0].tokens, way.runs[0].tokens, strict=True)
        return sum(ours == theirs for ours, theirs in pairs)

    def step_ratio(self, way: WayResult) -> float | None:
        """How many times as fast as the base's a median step is."""
        if self.base is None or self.base.step is None or not way.batched or way.step is None:
            return None
        return self.base.step.median / way.step.median

    def total_ratio(self, way: WayResult) -> float | None:
        return self.base.total.median / way.total.median if self.base is not None and way.runs else None

    def as_json(self) -> dict[str, Any]:
        return {
            "case": self.case.name,
            "dtype": self.dtype,
            "rows": self.case.rows,
            "sequences": len(self.case.prompts) * self.case.returned,
            "prompt_tokens": sum(map(len, self.case.prompts)),
            "new_tokens": self.case.useful_tokens,
            "ways": {way.name: self._way_as_json(way) for way in self.ways},
        }

    def _way_as_json(self, way: WayResult) -> dict[str, Any]:
        if not way.runs:
            return {"not_run": way.reason}
        same, base = self.same_rows(way), "slots" if self.case.fit else "dynamic"
        return {
            "step": way.step.as_json() if way.step else None,
            "prefill": way.prefill.as_json(),
            "prefill_tokens": way.prefill_tokens,
            "total": way.total.as_json(),
            "warm_up_s": way.warm_up_s,
            "new_tokens_per_s": self.case.useful_tokens / way.total.median,
            "peak_kv_bytes": way.peak_kv_bytes,
            "slots_used": way.slots_used,
            "same_tokens": None if same is None else same == len(way.runs[0].tokens),
            "sequences_with_same_tokens": same,
            f"step_speedup_over_{base}": self.step_ratio(way),
            f"total_speedup_over_{base}": self.total_ratio(way),
        }


def table(results: Sequence[CaseResult]) -> Table:
    made = Table(title="model.generate: medians (fastest–slowest)")
    for header in ("case", "dtype", "way"):
        made.add_column(header)
    headers = ["a step, ms", "times\nas fast", "prefill, s", "of tokens", "total, s", "times\nas fast"]
    headers += ["tokens/s", "peak KV", "slots\nused", "same\ntokens"]
    for header in headers:
        made.add_column(header, justify="right", no_wrap=True)
    for result in results:
        for number, way in enumerate(result.ways):
            names = (result.case.name, result.dtype) if number == 0 else ("", "")
            made.add_row(*names, way.name, *(_cells(result, way) if way.runs else ("not run",)))
        made.add_section()
    return made


def notes(results: Sequence[CaseResult]) -> list[str]:
    """How to read the table, and why ways did not run."""
    lines = [
        f"Times as fast: as {BASES[0]}, many requests as {BASES[1]}. Prefill: until every row has its first token, "
        f"and the positions that were computed for it. Tokens/s: of the new tokens "
        f"asked for. Slots used: tokens stored by slots of the blocks held, averaged over the steps. "
        f"Same tokens: likewise, in float32.",
    ]
    for result in results:
        for way in result.ways:
            if way.runs and "compile" in way.name:
                lines.append(f"{result.case.name}, {result.dtype}, {way.name}: compiled before, {way.warm_up_s:.1f} s.")
            if not way.runs:
                lines.append(f"{result.case.name}, {result.dtype}, {way.name}: not run, {way.reason}.")
    return lines


def panels(results: Sequence[CaseResult]) -> list[Panel]:
    labels = [f"{result.case.name}, {result.dtype}" for result in results]
    names = list(dict.fromkeys(way.name for result in results for way in result.ways if way.runs))
    steps: dict[str, list[float | None]] = {name: [] for name in names}
    totals: dict[str, list[float | None]] = {name: [] for name in names}
    peaks: dict[str, list[float | None]] = {name: [] for name in names}
    for result in results:
        ways = {way.name: way for way in result.ways if way.runs}
        for name in names:
            way = ways.get(name)
            steps[name].append(1e3 * way.step.median if way and way.step else None)
            totals[name].append(way.total.median if way else None)
            peaks[name].append(way.peak_kv_bytes / 2**20 if way and way.peak_kv_bytes is not None else None)
    return [
        Panel("A step", "ms", labels, steps),
        Panel("The whole call", "s", labels, totals),
        Panel("Keys and values at their peak", "MiB", labels, peaks),
    ]


def _cells(result: CaseResult, way: WayResult) -> tuple[str, ...]:
    same, sequences, peak = result.same_rows(way), len(way.runs[0].tokens), way.peak_kv_bytes
    return (
        way.step.as_text() if way.step else "–",
        _ratio(result.step_ratio(way)),
        f"{way.prefill.median:.3f}",
        "–" if way.prefill_tokens is None else f"{way.prefill_tokens:,}",
        f"{way.total.median:.3f} ({way.total.fastest:.3f}–{way.total.slowest:.3f})",
        _ratio(result.total_ratio(way)),
        f"{result.case.useful_tokens / way.total.median:.1f}",
        "–" if peak is None else as_bytes(peak),
        "–" if way.slots_used is None else f"{way.slots_used:.1%}",
        "–" if same is None else "yes" if same == sequences else f"NO: {same} of {sequences}",
    )


def _ratio(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}"
