"""A call over `[rows, columns]` as packed calls: the model sees every token once, and no padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torch_paged.hf.cache import PagedCache
from torch_paged.hf.call import Call
from torch_paged.hf.packed import Forward
from torch_paged.hf.passes import Pass, Sharing, plan_passes

Ints = NDArray[np.int64]
_PER_TOKEN = ("input_ids", "inputs_embeds", "position_ids")


def saves_work(cache: PagedCache, call: Call) -> bool:
    """Whether packed calls may compute fewer tokens than `call` has columns, or fewer at once."""
    if not call.num_tokens.any():
        return False
    num_columns = call.num_seqs * call.width
    return call.valid is not None or _may_share(cache, call) or num_columns > cache.config.max_prefill_tokens


def _may_share(cache: PagedCache, call: Call) -> bool:
    """Whether rows may begin alike."""
    return cache.config.share_prompts and call.num_seqs > 1 and call.width > 1 and not cache.state.columns.count


def run_unpadded(
    forward: Forward,
    cache: PagedCache,
    call: Call,
    inputs: dict[str, Any],
    cached: np.ndarray | None = None,
    between: Callable[[], None] | None = None,
) -> Any:
    """The call over `inputs`, with stock's shapes of outputs: logits and hidden states at pads are zeros.

    Args:
        call: of all rows and columns, native, not announced yet; `packing` has no objection to it.
        inputs: the model's arguments by name.
        cached: int64 `[rows]`, how many of the first tokens of each row the cache holds already; zeros stand in their
            place in the outputs too. None = none.
        between: called after each pass but the last.

    Raises: what `packed_call` raises. The cache is what it was before.
    """
    grid = _Grid.of(call, inputs)
    sharing = Sharing.none(call.num_seqs)
    if _may_share(cache, call):
        sharing = Sharing.of(grid.rows(), cache.config.min_shared_prefix)
    cached = np.zeros_like(call.num_tokens) if cached is None else cached
    passes = plan_passes(call.num_tokens, cached, sharing, cache.config.max_prefill_tokens)
    last = min(inputs.get("logits_to_keep") or call.width, call.width)
    computed_at, shown = grid.computed_at(passes), grid.shown(passes)
    kept = shown[shown % call.width >= call.width - last]
    needed = np.zeros(call.num_seqs * call.width, dtype=np.bool_)
    needed[computed_at[kept]] = True

    done: list[tuple[Ints, Any]] = []
    with _taken_back_together(cache, passes):
        for number, part in enumerate(passes):
            cells = grid.cells(part)
            first = number == 0
            step = Call(
                call.num_seqs, call.width if first else 0, call.valid if first else None, native=True,
                packed=part.num_tokens(call.num_seqs),
            )  # fmt: skip
            keep = torch.from_numpy(np.flatnonzero(needed[cells])).to(grid.device)
            done.append((cells, forward.packed(cache, step, grid.take(cells, inputs), keep)))
            if part.forks:
                cache.state.copy_rows(part.forks)
            if between is not None and part is not passes[-1]:
                between()
    return grid.outputs(done, computed_at, shown, kept, last)


@dataclass(frozen=True)
class _Grid:
    """The cells of `[rows, columns]`, row by row, and which of them hold tokens.

    Attributes:
        num_tokens: int64 `[rows]`.
        tokens: int64, the cells that hold tokens, row by row.
    """

    width: int
    num_tokens: Ints
    tokens: Ints
    ids: Tensor

    @classmethod
    def of(cls, call: Call, inputs: dict[str, Any]) -> _Grid:
        ids = inputs.get("input_ids")
        ids = inputs["inputs_embeds"] if ids is None else ids
        cells = np.arange(call.num_seqs * call.width)
        return cls(call.width, call.num_tokens, cells if call.valid is None else cells[call.valid.ravel()], ids)

    @property
    def device(self) -> torch.device:
        return self.ids.device

    def of_row(self, row: int) -> Ints:
        """The cells of the row's tokens."""
        end = int(self.num_tokens[: row + 1].sum())
        return self.tokens[end - int(self.num_tokens[row]) : end]

    def rows(self) -> list[Ints]:
        """The tokens of each row; numbers that tell them apart, where embeddings are given instead."""
        if self.ids.ndim == 2:
            ids = self.ids.cpu().numpy().ravel()
        else:
            embeddings = self.ids.contiguous().view(torch.uint8).flatten(0, 1).cpu().numpy()
            ids = np.unique(embeddings.view(f"V{embeddings.shape[1]}"), return_inverse=True)[1].ravel()
        return np.split(ids[self.tokens], self.num_tokens.cumsum()[:-1])

    def cells(self, part: Pass) -> Ints:
        """The cells that a pass computes."""
        return np.concatenate([self.of_row(row)[first:end] for row, first, end in part.pieces])

    def computed_at(self, passes: Sequence[Pass]) -> Ints:
        """int64 `[rows * columns]`, the cell that is computed for each one."""
        cells = np.arange(len(self.num_tokens) * self.width)
        for part in passes:
            for row, source, common in part.forks:
                cells[self.of_row(row)[:common]] = cells[self.of_row(source)[:common]]
        return cells

    def shown(self, passes: Sequence[Pass]) -> Ints:
        """The cells of tokens that are computed, there or elsewhere; the others were cached."""
        computed = np.zeros(len(self.num_tokens) * self.width, dtype=np.bool_)
        for part in passes:
            computed[self.cells(part)] = True
        return self.tokens[computed[self.computed_at(passes)[self.tokens]]]

    def take(self, cells: Ints, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs with those cells alone, in one row."""
        index = torch.from_numpy(cells).to(self.device)
        taken = dict(inputs)
        for name in _PER_TOKEN:
            value = inputs.get(name)
            if value is not None:
                # Positions may stand there once for all rows.
                value = value.expand(len(self.num_tokens), -1, *value.shape[2:])
                taken[name] = value.flatten(0, 1)[index][None]
        return taken

    def outputs(self, done: list[tuple[Ints, Any]], computed_at: Ints, shown: Ints, kept: Ints, last: int) -> Any:
        """The outputs of passes put together, in stock's shapes.

        Args:
            done: for each pass the cells it computed, and its outputs.
            computed_at, shown: of the passes.
            kept: the cells whose logits are asked for, among the `last` columns.
        """
        result = done[-1][1]
        rows = len(self.num_tokens)
        computed = np.concatenate([cells for cells, _ in done])
        everywhere = _Places(computed, computed_at[shown], shown)
        with_logits = computed[np.isin(computed, computed_at[kept])]
        row, column = np.divmod(kept, self.width)
        of_logits = _Places(with_logits, computed_at[kept], row * last + column - (self.width - last))
        for name, value in result.items():
            parts = [output[name] for _, output in done]
            if name == "logits":
                result[name] = of_logits.spread(parts, rows, last)
            elif isinstance(value, Tensor):
                result[name] = everywhere.spread(parts, rows, self.width)
            elif isinstance(value, tuple) and value and all(isinstance(layer, Tensor) for layer in value):
                layers = zip(*parts, strict=True)
                result[name] = tuple(everywhere.spread(list(layer), rows, self.width) for layer in layers)
        return result


@dataclass(frozen=True)
class _Places:
    """Where what passes computed goes.

    Attributes:
        computed: int64, the cells that were computed, one after the other.
        wanted: int64, cells among them.
        places: int64, as long as `wanted`: of `[rows * width]`.
    """

    computed: Ints
    wanted: Ints
    places: Ints

    def spread(self, parts: Sequence[Tensor], rows: int, width: int) -> Tensor:
        """Parts `[1, n, ...]` as `[rows, width, ...]`, zeros elsewhere."""
        values = parts[0][0] if len(parts) == 1 else torch.cat([part[0] for part in parts])
        if not np.array_equal(self.computed, self.wanted):
            order = np.argsort(self.computed)
            index = order[np.searchsorted(self.computed, self.wanted, sorter=order)]
            values = values[torch.from_numpy(index).to(values.device)]
        spread = values.new_zeros(rows * width, *values.shape[1:])
        spread.index_copy_(0, torch.from_numpy(self.places).to(values.device), values)
        return spread.view(rows, width, *values.shape[1:])


@contextmanager
def _taken_back_together(cache: PagedCache, passes: Sequence[Pass]) -> Iterator[None]:
    """Where one of the passes raises, those before it are taken back too."""
    if len(passes) == 1:
        yield
        return
    columns, seq_lens = cache.state.columns.count, cache.state.seq_lens
    with cache.state.past_kept():
        try:
            yield
        except BaseException:
            cache.go_back(columns, seq_lens)
            raise
