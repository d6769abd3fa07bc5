"""PagedCache: a DynamicCache whose K and V live in the blocks of a pool."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, cache_utils
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from torch_paged.hf.call import Call
from torch_paged.hf.config import PagedConfig
from torch_paged.hf.layer import PagedLayer
from torch_paged.hf.pools import Pools
from torch_paged.hf.state import CacheState
from torch_paged.hf.step_cache import StepView
from torch_paged.hf.voice import Voice
from torch_paged.memory import PoolStats


class PagedCache(DynamicCache):  # type: ignore[misc]
    """A cache for `generate(past_key_values=...)` or `model(past_key_values=...)`, on blocks of a pool.

    Holds its blocks as long as it lives. `copy.deepcopy` shares every block with the copy, and a shared block that
    is written is copied first: keeping a prompt's cache and generating from copies of it costs no KV memory.

    Args:
        config: the model's config, which tells how many layers there are and which of them slide.
        **knobs: fields of `PagedConfig`, for the pool that this cache owns.

    Raises:
        ValueError, TypeError: a knob is unknown, out of range or of the wrong type, or `config` is no config.
    """

    # Nobody but the call of generate that it was made for has it.
    made_by_generate = False
    # What compiled passes see of it.
    step_view: StepView | None = None

    def __init__(self, config: PreTrainedConfig, **knobs: Any) -> None:
        if not isinstance(config, PreTrainedConfig):
            raise TypeError(f"config: {type(config).__name__}; must be a transformers config, such as model.config")
        voice = Voice.of(config, f"PagedCache({type(config).__name__})")
        self._build(DynamicCache(config=config), Pools(PagedConfig(**knobs)), voice)

    @classmethod
    def for_generate(cls, stock: DynamicCache, pools: Pools, voice: Voice | None = None) -> PagedCache:
        """A paged cache with the layers of an empty `stock` cache, in `pools`; `voice` tells where it is gathered."""
        cache = cls.__new__(cls)
        cache._build(stock, pools, voice)
        cache.made_by_generate = True
        return cache

    @staticmethod
    def unpaged_kinds(stock: DynamicCache) -> list[str]:
        """The classes of the layers of `stock`, if not one of them can be paged."""
        if not stock.layers or any(_sliding_window(layer) is not None for layer in stock.layers):
            return []
        return sorted({type(layer).__name__ for layer in stock.layers})

    def _build(self, stock: DynamicCache, pools: Pools, voice: Voice | None = None) -> None:
        windows = [_sliding_window(layer) for layer in stock.layers]
        per_window = {window: windows.count(window) for window in windows if window is not None}
        self.state = CacheState(pools, per_window, voice)
        layers = [
            layer if window is None else PagedLayer(self.state, window)
            for layer, window in zip(stock.layers, windows, strict=True)
        ]
        Cache.__init__(self, layers=layers)
        # generate asks this of the cache that it makes for an assistant, before ours takes its place.
        if any(getattr(layer, "record_past", False) for layer in stock.layers):
            self.activate_past_recording()

    def announce(self, call: Call) -> None:
        """Say what the coming forward pass stores, before its first layer."""
        self.state.announce(call)

    def passed(self, call: Call) -> None:
        """A compiled pass has stored what `call` announced in every layer."""
        for layer in self.paged_layers:
            layer.call = call
            layer.columns += call.width

    def rollback(self, call: Call) -> None:
        """Take back a forward pass that did not finish."""
        for layer in self.paged_layers:
            if layer.call is call:
                layer.columns -= call.width
                layer.call = None
        self.state.rollback(call)
        if self.state.num_seqs is None:
            self.reset()

    def go_back(self, columns: int, seq_lens: np.ndarray) -> None:
        """Drop what came after a state of so many columns and tokens per row, also from several forward passes."""
        if columns == 0:
            self.reset()
            return
        self.state.go_back(columns, seq_lens)
        for layer in self.paged_layers:
            layer.columns = columns
            layer.call = None

    def refuse(self, reason: str) -> None:
        """Gather from now on, after a native call was found to need the model's own attention.

        Raises:
            RuntimeError: layers of another kind have run already and cannot be taken back.
        """
        # A first call was taken back as a whole.
        if not self.all_paged and self.state.num_seqs is not None:
            raise RuntimeError(
                f"{reason}, after layers of another kind than keys and values have run, which cannot be taken back; "
                "torch_paged.unpatch(model) runs this call"
            )
        self.state.refusal = reason

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last columns.

        Args:
            tokens_to_remove: columns to drop, as a negative number or 0, as in `DynamicCache.crop`.

        Raises:
            ValueError: the number is positive, or the sliding window has left what would be the past again.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove: {tokens_to_remove}; must be 0 or negative")
        self._other_layers("crop", tokens_to_remove)
        width = min(-tokens_to_remove, self.state.columns.count)
        if self.state.num_seqs is not None:
            self.state.crop(width)
        for layer in self.paged_layers:
            layer.columns = max(0, layer.columns - width)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make old row `beam_idx[i]` the new row i, int64 `[rows]`: a table edit."""
        self._other_layers("reorder_cache", beam_idx)
        self.state.prefixes = None  # these rows are no longer those that generate returns
        self.state.reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor | Sequence[int]) -> None:
        """Keep these rows: ints `[rows]`, negative ones from the end, or bool over the rows there are."""
        self._other_layers("batch_select_indices", indices)
        self.state.prefixes = None
        self.state.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Make each row `repeats` rows that share its blocks."""
        self._other_layers("batch_repeat_interleave", repeats)
        if self.state.num_seqs is not None:
            self.state.select(torch.arange(self.state.num_seqs).repeat_interleave(repeats))

    def reset(self) -> None:
        """Give every block back."""
        for layer in self.layers:
            layer.reset()
        self.state.release()

    @property
    def config(self) -> PagedConfig:
        """The knobs of the pools this cache draws from."""
        return self.state.pools.config

    def stats(self) -> PoolStats:
        """Of the pools this cache draws from."""
        return self.state.pools.stats()

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedCache:
        twin = type(self).__new__(type(self))
        twin.__dict__.update({name: value for name, value in self.__dict__.items() if name not in ("state", "layers")})
        twin.state = self.state.fork()
        twin.layers = []
        for layer in self.layers:
            if isinstance(layer, PagedLayer):
                layer = copy.copy(layer)
                layer.state = twin.state
                layer.group = None if layer.group is None else twin.state.groups[layer.group.key]
                layer.call = None
                twin.layers.append(layer)
            else:
                twin.layers.append(copy.deepcopy(layer, memo))
        return twin

    def __copy__(self) -> PagedCache:
        """Another face of the same rows, as a shallow copy of stock's cache is."""
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __reduce__(self) -> Any:
        raise TypeError("a PagedCache cannot be pickled: its blocks live in a pool of this process")

    @property
    def all_paged(self) -> bool:
        """Whether no layer keeps a state of another kind, which table edits do not move."""
        return all(isinstance(layer, (PagedLayer, *_WITHOUT_STATE)) for layer in self.layers)

    @property
    def paged_layers(self) -> list[PagedLayer]:
        """The layers whose K and V are in blocks."""
        return [layer for layer in self.layers if isinstance(layer, PagedLayer)]

    def _other_layers(self, method: str, argument: Any) -> None:
        for layer in self.layers:
            if not isinstance(layer, PagedLayer):
                getattr(layer, method)(argument)


# Layers that read what others have stored, as those of Gemma 3n; not in every transformers 5.
_WITHOUT_STATE: tuple[type[Any], ...] = (cache_utils.DummyLayer,) if hasattr(cache_utils, "DummyLayer") else ()


def _sliding_window(layer: Any) -> int | None:
    """The window of a stock layer that can be paged, 0 for full attention; None for a layer that stays as it is."""
    if type(layer) is DynamicLayer:
        return 0
    # Stock's layer keeps every token of a window of 1, by a slice from -1 + 1.
    if type(layer) is DynamicSlidingWindowLayer and layer.sliding_window > 1:
        return int(layer.sliding_window)
    return None
