"""What the machine can do at best, reading and multiplying, measured in the same rounds as what is held against it.

A limit is the median of the best probe, as what a kernel reaches is its median: how fast a virtual machine reads
changes from minute to minute, by a factor of two on some.
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


class Probes:
    """Ways to read and to multiply that the machine has besides ours.

    Attributes:
        read_bytes: that a probe reads.
    """

    def __init__(self) -> None:
        wanted = max(MIN_READ_BYTES, CACHE_MULTIPLE * last_level_cache_bytes())
        rows = -(-wanted // (4 * ROW))
        self.read_bytes = 4 * rows * ROW
        self._rows = torch.ones(rows, ROW)
        self._one_row = torch.ones(ROW)

    def reading(self) -> Ways:
        """STREAM-like: each reads the buffer once and writes next to nothing; which is fastest depends on the CPU."""
        half = self._rows.view(torch.bfloat16)
        return {
            "read sum": lambda number: self._rows.sum(),
            "read row sums": lambda number: self._rows.sum(1),
            "read sum of halves": lambda number: half.sum(),
            "read maximum": lambda number: self._rows.amax(),
            "read matrix-vector": lambda number: torch.mv(self._rows, self._one_row),
        }

    def multiplying(self, dtype: torch.dtype) -> Ways:
        """Square products in `dtype` and in float32, as a kernel may convert; by torch.matmul and by oneDNN's own."""
        probes: Ways = {}
        for kind in dict.fromkeys((dtype, torch.float32)):
            left, right = (torch.randn(MATMUL_SIZE, MATMUL_SIZE).to(kind) for _ in range(2))
            probes[f"multiply {kind}"] = lambda number, a=left, b=right: torch.mm(a, b)  # type: ignore[misc]
            probes[f"multiply by oneDNN {kind}"] = lambda number, a=left, b=right: (  # type: ignore[misc]
                torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
            )
        return {name: probe for name, probe in probes.items() if _runs(probe)}

    def limit(self, timings: Mapping[str, Timing]) -> float:
        """The rate of the best probe among the timings, which has one kind of probes: bytes or operations a second."""
        amounts = {"read": self.read_bytes, "multiply": 2 * MATMUL_SIZE**3}
        rates = [
            amounts[kind] / timing.median for name, timing in timings.items() if (kind := name.split()[0]) in amounts
        ]
        return max(rates)

    def read_bytes_per_s(self, rounds: int) -> float:
        """How fast the machine reads now."""
        return self.limit(alternate(self.reading(), rounds, settling_s=SETTLING_S))


def _runs(probe: Callable[[int], object]) -> bool:
    try:
        probe(0)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return True
