"""What one case of `bench ops` took, as a row of the table, JSON and bars."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.table import Table

from torch_paged.cli.bench.cases import Case
from torch_paged.cli.bench.limits import Limits
from torch_paged.cli.bench.plot import Panel
from torch_paged.cli.bench.timing import Timing


@dataclass(frozen=True)
class Result:
    """Seconds of one call, per way.

    Attributes:
        case: what was called.
        dtype: of queries, keys and values.
        num_layers: caches that the calls rotated over.
        read_from_memory: whether these exceed the last-level cache by far.
        paged: ours.
        gathered: per form of SDPA, with gather_cache before it.
        contiguous: per form, on contiguous keys and values.
        flex: compiled FlexAttention on the same, if asked for.
        pages: the paged op on other pages, if asked for.
    """

    case: Case
    dtype: torch.dtype
    num_layers: int
    read_from_memory: bool
    paged: Timing
    gathered: dict[str, Timing]
    contiguous: dict[str, Timing]
    flex: Timing | None = None
    pages: dict[str, Timing] = field(default_factory=dict)

    @property
    def reads(self) -> bool:
        """Whether reading bounds the case; else arithmetic does."""
        return self.case.kind == "decode"

    @property
    def bytes_per_s(self) -> float:
        return self.case.kv_bytes(self.dtype) / self.paged.median

    @property
    def flop_per_s(self) -> float:
        return self.case.flops() / self.paged.median

    def over(self, other: Timing) -> float:
        """How many times as fast as another way the paged op is."""
        return other.median / self.paged.median

    def share(self, limits: Limits) -> float | None:
        """The part of the machine's limit that the paged op reached; None where none can be told.

        That is where the keys and values fit into the cache, or where the op was faster than every probe: then the
        probes did not find the limit, and a share would be nonsense.
        """
        share = self.raw_share(limits)
        return share if share <= 1 and (self.read_from_memory or not self.reads) else None

    def raw_share(self, limits: Limits) -> float:
        return self.bytes_per_s / limits.bytes_per_s if self.reads else self.flop_per_s / limits.flop_per_s[self.dtype]

    def as_json(self, limits: Limits) -> dict[str, Any]:
        gathered, contiguous = fastest(self.gathered)[1], fastest(self.contiguous)[1]
        return {
            "case": str(self.case),
            "dtype": dtype_name(self.dtype),
            "num_layers": self.num_layers,
            "working_set_bytes": self.num_layers * self.case.kv_bytes(self.dtype),
            "working_set_exceeds_cache": self.read_from_memory,
            "paged": self.paged.as_json(),
            "gather_and_sdpa": {form: timing.as_json() for form, timing in self.gathered.items()},
            "sdpa_contiguous": {form: timing.as_json() for form, timing in self.contiguous.items()},
            "flex_contiguous": self.flex.as_json() if self.flex else None,
            "other_pages": {name: timing.as_json() for name, timing in self.pages.items()},
            "speedup_over_gather_and_sdpa": self.over(gathered),
            "speedup_over_sdpa_contiguous": self.over(contiguous),
            "speedup_over_flex_contiguous": self.over(self.flex) if self.flex else None,
            "kv_bytes_per_s": self.bytes_per_s,
            "flop_per_s": self.flop_per_s,
            "limit": "read" if self.reads else "multiply",
            "share_of_limit": self.share(limits),
            "faster_than_limit": self.raw_share(limits) > 1,
        }


def fastest(timings: dict[str, Timing]) -> tuple[str, Timing]:
    return min(timings.items(), key=lambda item: item[1].median)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def table(results: Sequence[Result], limits: Limits) -> Table:
    made = Table(title="Milliseconds of one call: median (fastest–slowest)")
    for header in ("case: heads/kv×dim\ncount×query/context", "dtype"):
        made.add_column(header)
    headers = ["paged", "rate,\n% of limit"]
    headers += ["gather + SDPA", "times\nas fast", "SDPA on\ncontiguous KV", "times\nas fast"]
    if any(result.flex for result in results):
        headers += ["FlexAttention,\ncontiguous KV", "times\nas fast"]
    pages = list(dict.fromkeys(name for result in results for name in result.pages))
    for header in headers + [f"{name},\ntime of paged" for name in pages]:
        made.add_column(header, justify="right", no_wrap=True)
    for result in results:
        share = result.share(limits)
        rate = f"{result.bytes_per_s / 1e9:.1f} GB/s" if result.reads else f"{result.flop_per_s / 1e9:.0f} GFLOP/s"
        cells = [
            str(result.case),
            dtype_name(result.dtype),
            result.paged.as_text(),
            f"{rate}\n{'–' if share is None else f'{share:.0%}'}",
        ]
        for timings in (result.gathered, result.contiguous):
            form, timing = fastest(timings)
            cells += [f"{timing.as_text()}\n{form}", f"{result.over(timing):.2f}"]
        if result.flex:
            cells += [result.flex.as_text(), f"{result.over(result.flex):.2f}"]
        for name in pages:
            cells.append(f"{1 / result.over(result.pages[name]):.2f}x" if name in result.pages else "")
        made.add_row(*cells)
    return made


def limit_notes(limits: Limits) -> list[str]:
    """What the percentages are of."""
    rates = ", ".join(f"{rate / 1e9:.0f} GFLOP/s {dtype_name(dtype)}" for dtype, rate in limits.flop_per_s.items())
    return [
        f"Limits, the best of several probes in this run: read {limits.bytes_per_s / 1e9:.1f} GB/s over "
        f"{limits.read_bytes >> 20} MiB; matrix products {rates or 'not needed'}.",
        "–: no share, as the keys and values fit into the cache or the op was faster than every probe.",
    ]


def panels(results: Sequence[Result], limits: Limits) -> list[Panel]:
    labels = [f"{result.case} {dtype_name(result.dtype)}" for result in results]
    ratios: dict[str, list[float | None]] = {
        "gather + SDPA": [result.over(fastest(result.gathered)[1]) for result in results],
        "SDPA on contiguous KV": [result.over(fastest(result.contiguous)[1]) for result in results],
    }
    if any(result.flex for result in results):
        ratios["FlexAttention on contiguous KV"] = [
            result.over(result.flex) if result.flex else None for result in results
        ]
    shares = [result.share(limits) for result in results]
    bars: dict[str, list[float | None]] = {"paged": [None if share is None else 100 * share for share in shares]}
    return [
        Panel("The paged op, times as fast as", "times", labels, ratios),
        Panel("The paged op, part of what the machine can read (decode) or multiply", "% of limit", labels, bars),
    ]
