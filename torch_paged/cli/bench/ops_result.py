"""What one case of `bench ops` took, as a row of the table, JSON and bars."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.table import Table

from torch_paged.cli.bench.cases import Case
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
        limit: bytes a second that the machine read in the same rounds, or operations that it multiplied.
        paged: ours.
        gathered: per form of SDPA, with gather_cache before it.
        contiguous: per form, on contiguous keys and values.
        flex: compiled FlexAttention on the same, if asked for.
        pages: the paged op on other pages, if asked for.
        bare_read: of the same blocks, for as many bytes as attention reads, where reading bounds the case.
        bare_reads: of the other pages.
    """

    case: Case
    dtype: torch.dtype
    num_layers: int
    read_from_memory: bool
    limit: float
    paged: Timing
    gathered: dict[str, Timing]
    contiguous: dict[str, Timing]
    flex: Timing | None = None
    pages: dict[str, Timing] = field(default_factory=dict)
    bare_read: Timing | None = None
    bare_reads: dict[str, Timing] = field(default_factory=dict)

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

    def cost_over(self, pages: str) -> tuple[float, float]:
        """What these pages cost, in times of other ones: attention, and a bare read."""
        assert self.bare_read is not None
        return self.paged.median / self.pages[pages].median, self.bare_read.median / self.bare_reads[pages].median

    @property
    def share(self) -> float | None:
        """The part of the machine's limit that the paged op reached; None where none can be told.

        That is where the keys and values fit into the cache, or where the op was faster than every probe: then the
        probes did not find the limit, and a share would be nonsense.
        """
        return None if self.surpasses_limit or not self._is_limited else self._raw_share

    @property
    def surpasses_limit(self) -> bool:
        return self._is_limited and self._raw_share > 1

    @property
    def _is_limited(self) -> bool:
        return self.read_from_memory or not self.reads

    @property
    def _raw_share(self) -> float:
        return (self.bytes_per_s if self.reads else self.flop_per_s) / self.limit

    def as_json(self) -> dict[str, Any]:
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
            "limited_by": "reading" if self.reads else "multiplying",
            "limit_per_s": self.limit,
            "share_of_limit": self.share,
            "faster_than_limit": self.surpasses_limit,
            "bare_read": self.bare_read.as_json() if self.bare_read else None,
            "bare_read_of_other_pages": {name: timing.as_json() for name, timing in self.bare_reads.items()},
            "speedup_over_bare_read": self.over(self.bare_read) if self.bare_read else None,
        }


def fastest(timings: dict[str, Timing]) -> tuple[str, Timing]:
    return min(timings.items(), key=lambda item: item[1].median)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _in_lines(timing: Timing) -> str:
    return timing.as_text().replace(" (", "\n(")


def table(results: Sequence[Result]) -> Table:
    made = Table(title="Milliseconds of one call: median (fastest–slowest); how many times as fast paged is")
    made.add_column("heads/kv×dim\ncount×query/\ncontext", no_wrap=True)
    pages = list(dict.fromkeys(name for result in results for name in result.pages))
    headers = ["paged", "part of\nthe limit\n(a bare read)", "gather + SDPA", "SDPA,\ncontiguous KV"]
    if any(result.flex for result in results):
        headers.append("FlexAttention,\ncontiguous KV")
    for header in headers + [f"cost over\n{name}\n(a bare read)" for name in pages]:
        made.add_column(header, justify="right", no_wrap=True)
    for result in results:
        rate, limit = result.bytes_per_s if result.reads else result.flop_per_s, result.limit
        digits, unit = (1, "GB/s") if result.reads else (0, "GFLOP/s")
        part = "–" if result.share is None else f"{result.share:.0%}"
        bare = f"\n({result.over(result.bare_read):.0%})" if result.bare_read else ""
        cells = [
            "\n".join([*str(result.case).replace(" + ", "\n+ ").split(" ", 2), dtype_name(result.dtype)]),
            f"{_in_lines(result.paged)}\n{1e-9 * rate:.{digits}f} {unit}",
            f"{part} of {1e-9 * limit:.{digits}f}{bare}",
        ]
        for timings in (result.gathered, result.contiguous):
            form, timing = fastest(timings)
            cells.append(f"{_in_lines(timing)}\n{form}\n{result.over(timing):.2f}x")
        if result.flex:
            cells.append(f"{_in_lines(result.flex)}\n{result.over(result.flex):.2f}x")
        for name in pages:
            cost = "{:.2f}x\n({:.2f}x)".format(*result.cost_over(name)) if name in result.pages else ""
            cells.append(cost)
        made.add_row(*cells)
    return made


NOTES = [
    "Limits: the median of the best of several probes in the same rounds, which read memory in order (decode) or "
    "multiply matrices. A bare read: of the same blocks, all keys and then all values, nothing computed; no bound.",
    "A case that was faster than its limit was measured again, a few times at most.",
    "–: no share, as the keys and values fit into the cache or the op was faster than every probe.",
]


def panels(results: Sequence[Result]) -> list[Panel]:
    labels = [f"{result.case} {dtype_name(result.dtype)}" for result in results]
    ratios: dict[str, list[float | None]] = {
        "gather + SDPA": [result.over(fastest(result.gathered)[1]) for result in results],
        "SDPA on contiguous KV": [result.over(fastest(result.contiguous)[1]) for result in results],
    }
    if any(result.flex for result in results):
        ratios["FlexAttention on contiguous KV"] = [
            result.over(result.flex) if result.flex else None for result in results
        ]
    shares = [result.share for result in results]
    bars: dict[str, list[float | None]] = {"paged": [None if share is None else 100 * share for share in shares]}
    return [
        Panel("The paged op, times as fast as", "times", labels, ratios),
        Panel("The paged op, part of what the machine can read (decode) or multiply", "% of limit", labels, bars),
    ]
