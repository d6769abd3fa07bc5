"""Prefixes: what the pools of one model remember of earlier calls, and when it no longer holds."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from torch_paged.hf.pools import GroupKey, Pools
from torch_paged.hf.state import CacheState
from torch_paged.hf.weights import Weights
from torch_paged.memory import Pool, block_keys, full_blocks, hit_length, root_key

Ints = np.ndarray


class Prefixes:
    """The remembered blocks of all pools of a model, valid for the weights they were computed with.

    Args:
        pools: of the model, made with `prefix_caching`.

    Attributes:
        hits: rows that began with remembered blocks.
        tokens_saved: tokens in them, which were not prefilled.
    """

    def __init__(self, pools: Pools) -> None:
        self.pools = pools
        self.hits = self.tokens_saved = 0
        self.layouts: dict[bytes, dict[GroupKey, int]] = {}
        self._weights: Weights | None = None
        self._epoch = 0
        _live.add(self)
        _watch_optimizers()

    def flush(self) -> None:
        """Forget everything. Rows that began with remembered blocks keep them."""
        with self.pools.lock:
            for index in self.pools.prefix_indexes():
                index.flush()
            self.layouts.clear()
            self._weights = None
            self._epoch += 1

    def epoch(self, model: nn.Module) -> int:
        """A number that stands for the weights of `model` now; where they have changed, everything is forgotten."""
        with self.pools.lock:
            if self._weights is None or not self._weights.are_those_of(model):
                self.flush()
                self._weights = Weights(model)
            return self._epoch

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Forget everything if `optimizer` has stepped parameters of the model."""
        with self.pools.lock:
            weights = self._weights
            if weights is not None and any(
                weights.hold(parameter) for group in optimizer.param_groups for parameter in group["params"]
            ):
                self.flush()


class RowPrefixes:
    """The rows of one PagedCache, from what they begin with to what is remembered of them.

    Args:
        prefixes: of the model that the cache was made for.
        salt: `PagedConfig.salt` when it was made.
    """

    def __init__(self, prefixes: Prefixes, salt: str) -> None:
        self._prefixes = prefixes
        self._salt = salt
        self._epoch = -1
        self._root = b""
        self._hashed: tuple[bytes, Ints, list[bytes], Ints] | None = None

    def adopt(self, model: nn.Module, state: CacheState, rows: Sequence[Ints]) -> Ints:
        """Let the rows of an empty cache begin with the blocks that are remembered for their tokens.

        At least the last token of a row is left to be computed.

        Args:
            rows: int64 `[num_tokens]` for each row, the tokens of the cache's first call, which is not announced yet.

        Returns:
            int64 `[num_seqs]`, tokens of each row that it begins with.
        """
        self._root = self._root_of(model, state)
        pools, size = self._prefixes.pools, self._prefixes.pools.config.block_size
        with pools.lock:
            self._epoch = self._prefixes.epoch(model)
            lengths, blocks = np.zeros(len(rows), dtype=np.int64), {key: list[Ints]() for key in self._layout}
            for i, tokens in enumerate(rows if self._layout else ()):
                keys, found = self._found(tokens)
                for index in pools.prefix_indexes():
                    index.touch(keys)
                lengths[i] = len(keys) * size
                for key, ids in found.items():
                    blocks[key].append(ids)
            if lengths.any():
                state.adopt(lengths, blocks)
                self._prefixes.hits += int(np.count_nonzero(lengths))
                self._prefixes.tokens_saved += int(lengths.sum())
        return lengths

    def find(self, model: nn.Module, state: CacheState, tokens: Ints) -> tuple[int, dict[Pool, tuple[int, int]]]:
        """What `adopt` would let a row with these tokens begin with, if the weights have not changed.

        Returns: how many tokens, and of each pool how many blocks of those that it would hold others hold now, too, and
            how many nobody does.
        """
        with self._prefixes.pools.lock:
            self._root = self._root_of(model, state)
            keys, found = self._found(tokens)
            held = {}
            for key, num_layers in self._layout.items():
                pool = self._prefixes.pools.get(key, num_layers)
                if keys and key in found:
                    # Of a sliding group, what the next token sees.
                    behind = max(0, len(keys) * pool.block_size - key.sliding_window + 1) // pool.block_size
                    blocks = found[key][behind if key.sliding_window else 0 :]
                    num_held = int(np.count_nonzero(pool.allocator.ref_counts[blocks] > 1))
                    held[pool] = num_held, len(blocks) - num_held
            return len(keys) * self._prefixes.pools.config.block_size, held

    @property
    def salt(self) -> str:
        """Whose rows these are."""
        return self._salt

    @property
    def _layout(self) -> dict[GroupKey, int]:
        return self._prefixes.layouts.get(self._root, {})

    def _root_of(self, model: nn.Module, state: CacheState) -> bytes:
        return root_key(*(text.encode() for text in (self._salt, *_computed_by(model, state))))

    def _found(self, tokens: Ints) -> tuple[Sequence[bytes], dict[GroupKey, Ints]]:
        """The keys of the blocks that a row with these tokens can begin with, and for each group these blocks.

        Of a sliding group the first ones may be missing: -1. At least the last token is left to be computed.
        """
        pools, size = self._prefixes.pools, self._prefixes.pools.config.block_size
        if self._hashed is None or self._hashed[0] != self._root or self._hashed[1] is not tokens:
            keys, cached = block_keys(self._root, tokens[:-1], size), full_blocks(tokens[:-1], size)
            # Whoever waits asks for the same again.
            self._hashed = self._root, tokens, keys, cached
        _, _, keys, cached = self._hashed
        found = {}
        for key, num_layers in self._layout.items():
            pool = pools.get(key, num_layers)
            if pool.budget.prefix_index is not None:
                found[key] = pool.budget.prefix_index.find(pool.allocator, keys, cached)
        length = hit_length([(key.sliding_window, ids) for key, ids in found.items()], size) if found else 0
        return keys[:length], {key: ids[:length] for key, ids in found.items()}

    def remember(self, model: nn.Module, state: CacheState, rows: Sequence[Ints | None]) -> None:
        """Remember the full blocks of the rows, for the weights that `adopt` saw: if they changed since, nothing.

        Args:
            rows: int64 for each row, its tokens from the first on, at least as many as it holds; None = not this row.
        """
        pools, size = self._prefixes.pools, self._prefixes.pools.config.block_size
        with pools.lock:
            if self._epoch < 0 or self._epoch != self._prefixes.epoch(model):
                return
            self._prefixes.layouts.setdefault(
                self._root, {key: state.layers_per_window[key.sliding_window] for key in state.groups}
            )
            lengths = state.seq_lens
            for i, tokens in enumerate(rows):
                if tokens is None or not lengths[i]:
                    continue
                tokens = tokens[: lengths[i]]
                keys, cached = block_keys(self._root, tokens, size), full_blocks(tokens, size)
                for group in state.groups.values():
                    if (index := group.pool.budget.prefix_index) is not None:
                        index.put(group.pool.allocator, keys, cached, group.tables.blocks(i)[: len(keys)])


def _computed_by(model: nn.Module, state: CacheState) -> list[str]:
    """What keys and values depend on besides tokens and weights."""
    accelerator = torch.accelerator.current_accelerator()
    # Where the model computes, its parameters need not be: offloaded ones are on no device in between.
    device_types = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    autocast = [torch.is_autocast_enabled(each) and torch.get_autocast_dtype(each) for each in device_types]
    return [type(model).__qualname__, str(sorted(state.layers_per_window.items())), str(autocast)]


_live: weakref.WeakSet[Prefixes] = weakref.WeakSet()


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for prefixes in list(_live):
        prefixes.after_step(optimizer)


@functools.cache
def _watch_optimizers() -> None:
    # Fused optimizers leave the version counters of the parameters as they were.
    register_optimizer_step_post_hook(_after_step)
