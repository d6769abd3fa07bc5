"""Batch: one paged cache, and packed forward passes over tokens of its rows."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from torch_paged.hf.cache import PagedCache
from torch_paged.hf.call import NeedsOwnAttention
from torch_paged.hf.disguise import stock_class
from torch_paged.hf.handle import PagedHandle
from torch_paged.hf.many.batch_invariant import batch_invariant
from torch_paged.hf.many.prepare import input_device
from torch_paged.hf.many.sequence import Sequence
from torch_paged.hf.packed import Forward, packed_call
from torch_paged.hf.packing import pack_problem
from torch_paged.hf.prefixes import RowPrefixes
from torch_paged.hf.support import Path, implementation_reason, training_reason
from torch_paged.hf.swapped_row import Swapped, swap_out
from torch_paged.memory import Pool, PoolExhausted

Ints = np.ndarray


@dataclass(frozen=True)
class Passed:
    """What a pass gave.

    Attributes:
        logits: `[n, vocabulary]`, of the last tokens of some rows, row after row.
        rows: int64, the rows that had tokens in the pass and did not fail.
        errors: of the rows that failed, whose tokens were not computed.
    """

    logits: Tensor
    rows: Ints
    errors: dict[int, Exception]


class Batch:
    """The rows of one model.

    Args:
        model: patched.
        handle: of the model.
        num_rows: of the cache.
        deterministic: what a row gets has the same bits whatever else is in its passes.
    """

    def __init__(self, model: PreTrainedModel, handle: PagedHandle, num_rows: int, deterministic: bool = False) -> None:
        self.model = model
        self.handle = handle
        self.device = input_device(model)
        self.num_rows = num_rows
        self.deterministic = deterministic
        stock = DynamicCache(config=model.config.get_text_config(decoder=True))
        cache = handle.replace(model, stock) if handle.support(model).path is Path.NATIVE else stock
        self._cache: PagedCache | None = cache if isinstance(cache, PagedCache) else None
        # The calls that draw from the same pools.
        self.pools = handle.settings[1]
        if self._cache is not None:
            # Each sequence has prefixes of its own, as salts differ and weights may change between two of them.
            self._cache.state.prefixes = None

    @property
    def cache(self) -> PagedCache:
        assert self._cache is not None
        return self._cache

    @property
    def slides(self) -> bool:
        """Whether some layers have a sliding window."""
        return any(key.sliding_window for key in self.cache.state.groups)

    @property
    def problem(self) -> str | None:
        """Why rows of this model cannot share forward passes, or None."""
        support = self.handle.support(self.model)
        if support.path is not Path.NATIVE:
            return support.reason
        if self.model.config.is_encoder_decoder or self._cache is None:
            return "its cache holds more than its own keys and values"
        return (
            pack_problem(Forward(stock_class(type(self.model)), self.model), self.cache)
            or training_reason(self.model)
            or implementation_reason(self.model)
        )

    def run(self, num_tokens: Ints, input_ids: Tensor, counts: Ints) -> Passed:
        """One forward pass; where it fails, a pass for each row, so that a row's error is its own.

        Args:
            num_tokens: int64 `[num_rows]`, of each row, 0 allowed.
            input_ids: int64 `[tokens]`, row after row.
            counts: int64 `[num_rows]`, how many of a row's last tokens have their logits wanted.

        Raises:
            PoolExhausted: too few blocks; nothing has changed.
            NeedsOwnAttention: the model cannot run so; nothing has changed.
            RuntimeError: the model is not patched any more.
        """
        if not self.handle.patched:
            raise RuntimeError(f"{type(self.model).__name__} was unpatched while generate_many runs")
        rows = np.flatnonzero(num_tokens)
        try:
            return Passed(self._logits(num_tokens, input_ids, counts), rows, {})
        except (PoolExhausted, NeedsOwnAttention):
            raise
        except Exception as error:
            if len(rows) == 1:
                return Passed(input_ids.new_empty(0, 1), rows[:0], {int(rows[0]): error})
        ends = num_tokens.cumsum()
        parts = []
        for row in rows.tolist():
            alone = np.where(np.arange(self.num_rows) == row, num_tokens, 0)
            # Rows that find no blocks now are not in the result, and come again in a later pass.
            with suppress(PoolExhausted):
                parts.append(self.run(alone, input_ids[ends[row] - num_tokens[row] : ends[row]], counts))
        logits = [part.logits for part in parts if len(part.rows)]
        return Passed(
            torch.cat(logits) if logits else input_ids.new_empty(0, 1),
            np.concatenate([rows[:0], *(part.rows for part in parts)]),
            {row: error for part in parts for row, error in part.errors.items()},
        )

    def adopt(self, row: int, tokens: Ints, prefixes: RowPrefixes) -> int:
        """Let an empty row begin with what is remembered of its tokens; how many these are."""
        rows = [tokens[:0]] * self.num_rows
        rows[row] = tokens
        return int(prefixes.adopt(self.model, self.cache.state, rows)[row])

    def num_remembered(self, sequence: Sequence) -> int:
        """Tokens that the sequence could begin with, with up to a block behind them that is not remembered."""
        if sequence.prefixes is None:
            return 0
        tokens, _ = sequence.prefixes.find(self.model, self.cache.state, sequence.tokens)
        return tokens + self.handle.config.block_size - 1

    def held_of(self, sequence: Sequence) -> dict[Pool, int]:
        """How many blocks of each pool the sequence will begin with that are held anyway, now that it waits."""
        groups = self.cache.state.groups.values()
        if sequence.swapped is not None and sequence.swapped.is_of(groups):
            return {group.pool: sequence.swapped.num_kept(group) for group in groups}
        if sequence.prefixes is None:
            return {}
        _, of_pools = sequence.prefixes.find(self.model, self.cache.state, sequence.tokens)
        return {pool: held for pool, (held, _) in of_pools.items()}

    def remember(self, row: int, tokens: Ints, prefixes: RowPrefixes) -> None:
        """Remember the full blocks of a row with these tokens."""
        rows: list[Ints | None] = [None] * self.num_rows
        rows[row] = tokens
        prefixes.remember(self.model, self.cache.state, rows)

    def crop(self, num_tokens: Ints) -> None:
        """Drop the last tokens of each row, int64 `[num_rows]`."""
        self.cache.state.crop_rows(num_tokens)

    def empty(self, rows: Ints) -> None:
        """Give the blocks of these rows back."""
        if self._cache is not None:
            self.cache.state.empty(rows)

    def swap_out(self, row: int, dropping: int = 0) -> Swapped | None:
        """What a row holds but for its last `dropping` tokens, in CPU memory; None where that has no room for it.

        The row is empty then.
        """
        groups = list(self.cache.state.groups.values())
        if dropping:
            num_tokens = np.zeros(self.num_rows, dtype=np.int64)
            num_tokens[row] = dropping
            # The past of other rows stays for them to go back to.
            for group in groups:
                group.crop(num_tokens)
        return swap_out(groups, row)

    def swap_in(self, swapped: Swapped, row: int) -> bool:
        """Let an empty row hold its tokens again; False if the cache was released since, and they are gone.

        Raises:
            PoolExhausted: too few blocks are free; nothing has changed.
        """
        if not swapped.is_of(self.cache.state.groups.values()):
            return False
        swapped.restore(row)
        return True

    def close(self) -> None:
        """Give all blocks back."""
        if self._cache is not None:
            self.cache.reset()
        self.handle.trim()

    def _logits(self, num_tokens: Ints, input_ids: Tensor, counts: Ints) -> Tensor:
        counts = np.where(num_tokens > 0, counts, 0)
        ends = num_tokens.cumsum()
        before = counts.cumsum() - counts
        keep = np.arange(int(counts.sum())) + np.repeat(ends - counts - before, counts)
        with batch_invariant(self.deterministic):
            outputs = packed_call(
                self.model,
                self.cache,
                num_tokens,
                input_ids,
                logits_to_keep=torch.from_numpy(keep).to(input_ids.device),
                deterministic=self.deterministic,
                use_cache=True,
            )
        logits: Tensor = outputs.logits[0]
        return logits
