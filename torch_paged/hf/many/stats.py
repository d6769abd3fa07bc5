"""What generate_many has done so far: latencies, throughput, tokens computed and saved."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Percentiles:
    """Of seconds; nan where nothing was measured."""

    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, seconds: np.ndarray) -> Percentiles:
        return cls(*(np.percentile(seconds, [50, 95, 99]).tolist() if len(seconds) else [float("nan")] * 3))


@dataclass(frozen=True)
class ManyStats:
    """Figures of one `generate_many` from its start.

    Attributes:
        finished: requests that ended as `generate` would have ended them.
        cancelled, timed_out, failed: requests that ended otherwise.
        time_to_first_token: seconds from when a request was taken from the requests.
        inter_token_latency: seconds between tokens of a request.
        seconds: spent in steps; the time a caller takes between results does not count.
        tokens_per_second: new tokens by these seconds.
        new_tokens: that requests got.
        tokens_prefilled: prompt tokens computed, and those computed again after a preemption.
        tokens_saved: prompt tokens that were remembered and not computed.
        forwards: passes of the model, and `mixed_forwards` with prefill and decode steps in one.
        preemptions: how often a request lost its blocks, and `swaps` how often of these to CPU memory.
        tokens_drafted, drafts_accepted: tokens that speculation proposed, and those that the model chose too.
        alone: requests that ran through `model.generate` by themselves.
    """

    finished: int
    cancelled: int
    timed_out: int
    failed: int
    time_to_first_token: Percentiles
    inter_token_latency: Percentiles
    seconds: float
    tokens_per_second: float
    new_tokens: int
    tokens_prefilled: int
    tokens_saved: int
    forwards: int
    mixed_forwards: int
    preemptions: int
    swaps: int
    tokens_drafted: int
    drafts_accepted: int
    alone: int


@dataclass
class Counts:
    """The same as it is counted."""

    reasons: dict[str, int] = field(default_factory=dict)
    first_tokens: list[float] = field(default_factory=list)
    latencies: list[np.ndarray] = field(default_factory=list)
    seconds: float = 0.0
    new_tokens: int = 0
    tokens_prefilled: int = 0
    tokens_saved: int = 0
    forwards: int = 0
    mixed_forwards: int = 0
    preemptions: int = 0
    swaps: int = 0
    tokens_drafted: int = 0
    drafts_accepted: int = 0
    alone: int = 0

    def stats(self) -> ManyStats:
        ends = self.reasons
        if len(self.latencies) > 1:
            self.latencies = [np.concatenate(self.latencies)]
        return ManyStats(
            finished=sum(ends.get(reason, 0) for reason in ("eos", "length", "stop")),
            cancelled=ends.get("cancelled", 0),
            timed_out=ends.get("timeout", 0),
            failed=ends.get("error", 0),
            time_to_first_token=Percentiles.of(np.array(self.first_tokens)),
            inter_token_latency=Percentiles.of(self.latencies[0] if self.latencies else np.empty(0)),
            seconds=self.seconds,
            tokens_per_second=self.new_tokens / self.seconds if self.seconds else 0.0,
            new_tokens=self.new_tokens,
            tokens_prefilled=self.tokens_prefilled,
            tokens_saved=self.tokens_saved,
            forwards=self.forwards,
            mixed_forwards=self.mixed_forwards,
            preemptions=self.preemptions,
            swaps=self.swaps,
            tokens_drafted=self.tokens_drafted,
            drafts_accepted=self.drafts_accepted,
            alone=self.alone,
        )


def now() -> float:
    """Seconds of the clock that everything here is measured by."""
    return time.perf_counter()
