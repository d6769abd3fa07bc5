"""FreshCache: the empty cache that a decoding loop begins with, to begin with again."""

from __future__ import annotations

import copy
from typing import Any

from transformers.cache_utils import EncoderDecoderCache

from torch_paged.hf.cache import PagedCache
from torch_paged.hf.layer import PagedLayer
from torch_paged.memory import PoolExhausted


def paged_part(cache: Any) -> PagedCache | None:
    """The paged cache, by itself or inside that of an encoder-decoder; None where there is none."""
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    return cache if isinstance(cache, PagedCache) else None


class FreshCache:
    """Layers of kinds that are not paged, which keep the shape of a batch, begin as copies of what they were."""

    def __init__(self, cache: Any) -> None:
        paged = paged_part(cache)
        assert paged is not None
        self.paged = paged
        self._cache = cache
        self._others = {i: copy.deepcopy(x) for i, x in enumerate(paged.layers) if not isinstance(x, PagedLayer)}
        self._cross = copy.deepcopy(cache.cross_attention_cache) if isinstance(cache, EncoderDecoderCache) else None

    def again(self) -> Any:
        """The cache without what it held, all of whose blocks are free."""
        self.paged.reset()
        for i, layer in self._others.items():
            self.paged.layers[i] = copy.deepcopy(layer)
        if self._cross is not None:
            self._cache.cross_attention_cache.reset()
            self._cache = EncoderDecoderCache(self.paged, copy.deepcopy(self._cross))
        return self._cache

    def wait(self, need: int) -> bool:
        """Wait until calls of other threads have freed blocks; False where they cannot, or passes wait themselves.

        Passes do not where layers of other kinds have gone on when blocks run out: these begin anew.

        Args:
            need: bytes, of `needed` when blocks ran out.
        """
        if self._cross is None and not self._others:
            return False
        pools = self.paged.state.pools
        with pools.lock:
            before = pools.free_bytes()
        # Others may have given theirs back before.
        return pools.line.wait(lambda: pools.free_bytes() >= need or pools.free_bytes() > before, holds=False)

    def needed(self, error: PoolExhausted) -> int:
        """Bytes that the rows hold and would hold besides, after a pass found too few blocks."""
        held = sum(group.num_bytes for group in self.paged.state.groups.values())
        return held + error.needed * self.paged.state.pools.largest_block()
