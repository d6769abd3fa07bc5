"""What a pool holds at one moment, in blocks and bytes."""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields


@dataclass(frozen=True)
class PoolStats:
    """Figures of one pool, or of several added up.

    Attributes:
        blocks_total: blocks the pool can hold.
        blocks_used: blocks with at least one owner.
        blocks_shared: blocks with more than one.
        blocks_free: blocks that can be allocated now; less than total - used where other pools use up the same budget.
        prefix_hits: rows that began with remembered blocks, since the patch.
        prefix_tokens_saved: tokens in those blocks, which were not prefilled.
        tokens_computed: tokens that forward passes have computed, prompts and decode steps, since the patch; with
            padding and finished rows where a pass has them, without those of encoder-decoders.
        blocks_cached: blocks that only the prefix index still holds, given up as soon as blocks run out.
        bytes_held: bytes of the used blocks, all layers of the group.
        bytes_useful: bytes of the tokens in them, each block counted once.
        peak_bytes: the highest `bytes_held` since the start or `reset_peak`; of several pools, the sum of their peaks.
        peak_blocks_shared: the highest `blocks_shared`, likewise.
        waste: the part of `bytes_held` that holds no token, 0..1.
    """

    blocks_total: int = 0
    blocks_used: int = 0
    blocks_shared: int = 0
    blocks_free: int = 0
    bytes_held: int = 0
    bytes_useful: int = 0
    peak_bytes: int = 0
    peak_blocks_shared: int = 0
    blocks_cached: int = 0
    prefix_hits: int = 0
    prefix_tokens_saved: int = 0
    tokens_computed: int = 0
    waste: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "waste", 1 - self.bytes_useful / self.bytes_held if self.bytes_held else 0.0)

    @classmethod
    def total(cls, stats: Iterable["PoolStats"]) -> "PoolStats":
        """The sum over several pools."""
        each = list(stats)
        return cls(**{f.name: sum(getattr(one, f.name) for one in each) for f in fields(cls) if f.init})
