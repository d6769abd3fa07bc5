"""What one case of `bench ops --device cuda` took, as a row of the table, JSON and bars."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.table import Table

from torch_paged.cli.bench.ops_result import dtype_name
from torch_paged.cli.bench.plot import Panel
from torch_paged.cli.bench.timing import Timing


@dataclass(frozen=True)
class CudaResult:
    """Seconds of one call, per way.

    Attributes:
        name: what was called.
        dtype: of queries, keys and values.
        goal: what an H200 is to reach; "" = none is set.
        nbytes: that the call has to read and write.
        flops: of its matrix products, where these bound it; None where memory does.
        ours: of this library's op.
        others: by name, of whatever else computes the same.
        missing: by name, why a way could not run.
    """

    name: str
    dtype: torch.dtype
    goal: str
    nbytes: int
    flops: int | None
    ours: Timing
    others: dict[str, Timing] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def bytes_per_s(self) -> float:
        return self.nbytes / self.ours.median

    @property
    def flop_per_s(self) -> float | None:
        return None if self.flops is None else self.flops / self.ours.median

    def share(self, copy_bytes_per_s: float) -> float | None:
        """The part of the device's copy bandwidth that the op reached; None where arithmetic bounds it."""
        return self.bytes_per_s / copy_bytes_per_s if self.flops is None else None

    def over(self, other: str) -> float:
        """How many times as fast as another way the op is."""
        return self.others[other].median / self.ours.median

    def as_json(self, copy_bytes_per_s: float) -> dict[str, Any]:
        return {
            "case": self.name,
            "dtype": dtype_name(self.dtype),
            "paged": self.ours.as_json(),
            "others": {name: timing.as_json() for name, timing in self.others.items()},
            "missing": self.missing,
            "times_as_fast_as": {name: self.over(name) for name in self.others},
            "bytes": self.nbytes,
            "bytes_per_s": self.bytes_per_s,
            "flop_per_s": self.flop_per_s,
            "share_of_copy": self.share(copy_bytes_per_s),
            "goal_on_h200": self.goal or None,
        }


def table(results: Sequence[CudaResult], copy_bytes_per_s: float) -> Table:
    names = _names(results)
    made = Table(title="Milliseconds of one call, L2 flushed: median (fastest–slowest)")
    for header in ("case: heads/kv×dim\ncount×query/context", "dtype"):
        made.add_column(header)
    for header in ["paged", "rate,\n% of copy", "goal on\nan H200"] + [f"{name},\ntimes as fast" for name in names]:
        made.add_column(header, justify="right", no_wrap=True)
    for result in results:
        share, flop_per_s = result.share(copy_bytes_per_s), result.flop_per_s
        if share is not None:
            rate = f"{result.bytes_per_s / 1e12:.2f} TB/s\n{share:.0%}"
        else:
            rate = f"{(flop_per_s or 0) / 1e12:.0f} TFLOP/s"
        cells = [result.name, dtype_name(result.dtype), result.ours.as_text(), rate, result.goal]
        for name in names:
            timing = result.others.get(name)
            cells.append(f"{timing.as_text()}\n{result.over(name):.2f}" if timing else "–")
        made.add_row(*cells)
    return made


def notes(results: Sequence[CudaResult], copy_bytes_per_s: float) -> list[str]:
    """What the percentages are of, and why ways are missing."""
    reasons = dict.fromkeys(f"{name}: {why}" for result in results for name, why in result.missing.items())
    return [
        f"Copy: {copy_bytes_per_s / 1e12:.2f} TB/s read and written, the best round of this run.",
        *(f"– {reason}" for reason in reasons),
    ]


def panels(results: Sequence[CudaResult], copy_bytes_per_s: float) -> list[Panel]:
    labels = [f"{result.name} {dtype_name(result.dtype)}" for result in results]
    ratios: dict[str, list[float | None]] = {
        name: [result.over(name) if name in result.others else None for result in results] for name in _names(results)
    }
    shares = [result.share(copy_bytes_per_s) for result in results]
    bars: dict[str, list[float | None]] = {"paged": [None if share is None else 100 * share for share in shares]}
    return [
        Panel("The op, times as fast as", "times", labels, ratios),
        Panel("The op, part of the device's copy bandwidth", "% of copy", labels, bars),
    ]


def _names(results: Sequence[CudaResult]) -> list[str]:
    return list(dict.fromkeys(name for result in results for name in result.others))
