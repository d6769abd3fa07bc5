"""What others published about the scenarios of `bench memory`: figures to stand beside ours."""

from dataclasses import dataclass

PAPER = "PagedAttention paper, arXiv 2309.06180, section 6.3"
CLASSIC = "often told of paged KV caches"


@dataclass(frozen=True)
class Published:
    """A range as it was published: one figure has low = high."""

    low: float
    high: float
    source: str


WASTE_OF_PREALLOCATION = Published(0.77, 0.77, CLASSIC)
TIMES_THE_USERS = Published(4, 4, CLASSIC)
SAVED_BY_SHARED_PROMPT = Published(0.80, 0.83, CLASSIC)
# Of two to six samples or beams.
SAVED_BY_SAMPLES = {"alpaca": Published(0.061, 0.098, PAPER), "sharegpt": Published(0.162, 0.305, PAPER)}
SAVED_BY_BEAMS = {"alpaca": Published(0.376, 0.552, PAPER), "sharegpt": Published(0.443, 0.663, PAPER)}
