"""What the machine can do at best, reading and multiplying, measured in the same run as what is held against it.

A limit is the best that any probe reached in any round. What a kernel reaches is its median.
"""

from collections.abc import Callable, Mapping

import torch

from torch_paged.cli.bench.last_level_cache import last_level_cache_bytes
from torch_paged.cli.bench.timing import SETTLING_S, Timing, alternate

# A working set this many times as large as the last-level cache is read from memory, as a model's layers are.
CACHE_MULTIPLE = 4
MIN_READ_BYTES = 256 << 20
MATMUL_SIZE = 2048
ROW = 4096

Ways = dict[str, Callable[[int], object]]


class Limits:
    """The highest rates seen so far.

    Attributes:
        read_bytes: that a probe reads.
        bytes_per_s: the best read rate.
        flop_per_s: per dtype the best rate of a matrix product, in it or in float32: a kernel may convert.
    """

    def __init__(self) -> None:
        wanted = max(MIN_READ_BYTES, CACHE_MULTIPLE * last_level_cache_bytes())
        rows = -(-wanted // (4 * ROW))
        self.read_bytes = 4 * rows * ROW
        self.bytes_per_s = 0.0
        self.flop_per_s: dict[torch.dtype, float] = {}
        self._rows = torch.ones(rows, ROW)
        self._one_row = torch.ones(ROW)

    def read_probes(self) -> Ways:
        """STREAM-like: each reads the buffer once and writes next to nothing; which is fastest depends on the CPU."""
        half = self._rows.view(torch.bfloat16)
        return {
            "read sum": lambda number: self._rows.sum(),
            "read row sums": lambda number: self._rows.sum(1),
            "read sum of halves": lambda number: half.sum(),
            "read maximum": lambda number: self._rows.amax(),
            "read matrix-vector": lambda number: torch.mv(self._rows, self._one_row),
        }

    def matmul_probes(self, dtype: torch.dtype) -> Ways:
        """Square products, by torch.matmul and where there is one by oneDNN's own."""
        probes: Ways = {}
        for kind in dict.fromkeys((dtype, torch.float32)):
            left, right = (torch.randn(MATMUL_SIZE, MATMUL_SIZE).to(kind) for _ in range(2))
            probes[f"multiply {kind}"] = lambda number, a=left, b=right: torch.mm(a, b)  # type: ignore[misc]
            probes[f"multiply by oneDNN {kind}"] = lambda number, a=left, b=right: (  # type: ignore[misc]
                torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
            )
        return {name: probe for name, probe in probes.items() if _runs(probe)}

    def learn(self, timings: Mapping[str, Timing], dtype: torch.dtype) -> None:
        """Take the best round of each probe among the timings."""
        for name, timing in timings.items():
            if name.startswith("read "):
                self.bytes_per_s = max(self.bytes_per_s, self.read_bytes / timing.fastest)
            elif name.startswith("multiply "):
                rate = 2 * MATMUL_SIZE**3 / timing.fastest
                self.flop_per_s[dtype] = max(self.flop_per_s.get(dtype, 0.0), rate)

    def probe_reading(self, rounds: int) -> None:
        self.learn(alternate(self.read_probes(), rounds, settling_s=SETTLING_S), torch.float32)

    def probe_multiplying(self, dtype: torch.dtype, rounds: int) -> None:
        self.learn(alternate(self.matmul_probes(dtype), rounds, settling_s=SETTLING_S), dtype)


def _runs(probe: Callable[[int], object]) -> bool:
    try:
        probe(0)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return True
