"""PagedLayer: one layer's K and V in the pool, behind the face of a transformers cache layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from torch_paged.hf.call import Call, NeedsOwnAttention
from torch_paged.hf.group import LayerGroup, Step
from torch_paged.hf.no_gradient import without_gradient
from torch_paged.hf.paged_kv import GatheredPair, PagedKV, paged_pair
from torch_paged.hf.pools import GroupKey
from torch_paged.hf.state import CacheState
from torch_paged.hf.support import dtype_problem, has_kernel, head_dims_problem

# Without the choice of an overload: 2 microseconds in every layer and step.
_reshape_and_cache = torch.ops.paged.reshape_and_cache.default
_rope_and_cache = torch.ops.paged.rope_and_cache.default


class PagedLayer(CacheLayerMixin):  # type: ignore[misc]
    """Writes the pool through the tables it shares with the layers that live alike.

    Lengths count columns, pads included, as `generate` does, also where pads are not stored.
    """

    is_croppable = True
    is_compileable = False

    def __init__(self, state: CacheState, sliding_window: int = 0) -> None:
        # CacheLayerMixin.__init__ would assign `keys` and `values`, which are read from the pool here.
        self.state = state
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window > 0
        self.reset()

    def reset(self) -> None:
        """Forget the layer's columns; the cache releases the blocks."""
        self.is_initialized = False
        self.columns = 0
        self.call: Call | None = None
        self.group: LayerGroup | None = None
        self.key_cache: Tensor | None = None
        self.value_cache: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Join the group of layers with the same device, dtype, heads and window, and take a place in its pool."""
        if not has_kernel("paged::gather_cache", key_states.device.type):
            raise ValueError(f"device: {key_states.device}; must be one this build of torch_paged has kernels for")
        self.dtype, self.device = _storage_dtype(key_states, value_states), key_states.device
        key = GroupKey(
            device=self.device,
            dtype=self.dtype,
            num_kv_heads=key_states.shape[1],
            head_dim=key_states.shape[-1],
            v_head_dim=value_states.shape[-1],
            sliding_window=self.sliding_window,
        )
        self.group = self.state.group(key)
        with self.group.pool.lock:
            self.key_cache, self.value_cache = self.group.pool.layer(
                self.group.num_layers, key_states.to(self.dtype), value_states.to(self.dtype)
            )
        self.group.num_layers += 1
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the new columns' K and V, `[batch, num_kv_heads, width, head_dim]`; all columns' K and V.

        They come as handles in a call that reads the blocks in place, gathered in any other.

        Raises:
            PoolExhausted: the pool has too few free blocks; nothing has changed.
            ValueError: the batch, heads or head sizes are not those this cache holds.
        """
        if torch.compiler.is_compiling():
            return _update_eagerly(self, key_states, value_states)
        return self._update(key_states, value_states)

    def _update(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        if not self._is_planned(key_states.shape, value_states.shape):
            self._begin(key_states, value_states)
        call, group = self.state.call, self.group
        assert call is not None and group is not None
        assert group.step is not None
        if not key_states.dtype == value_states.dtype == self.dtype:
            key_states, value_states = key_states.to(self.dtype), value_states.to(self.dtype)
        with_graph = torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)
        key, value = token_rows(key_states), token_rows(value_states)
        if with_graph:
            key, value = key.detach(), value.detach()
        _reshape_and_cache(key, value, self.key_cache, self.value_cache, group.step.slot_mapping)
        self.call = call
        self.columns += call.width
        if call.native and not with_graph:
            last = self._seen(call.width) if self.is_sliding else self.columns
            group.seen = paged_pair(self, last, key_states, value_states, group.seen)
            return group.seen
        pair = GatheredPair(self, self._seen(call.width))

        def result(position: int, like: Tensor) -> Tensor:
            return PagedKV(pair, position, like) if call.native else pair.tensors()[position]

        return (
            without_gradient(key_states, lambda: result(0, key_states)),
            without_gradient(value_states, lambda: result(1, value_states)),
        )

    def rotate_and_update(
        self, query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, width: int
    ) -> Tensor | None:
        """`update` with a K that is not rotated yet, in the same pass as the query, by `rope_and_cache`.

        Args:
            query, key, value: `[batch * width, heads, head_dim]`, no graph recorded.
            cos, sin: `[batch * width, rotary_dim]`.

        Returns: the query rotated; None where `update` is to store K and V after all: the cache has another dtype, or
            this is no part of the native pass that was announced.

        Raises: what `update` raises.
        """
        batch = len(key) // width
        key_shape = (batch, key.shape[1], width, key.shape[2])
        value_shape = (batch, value.shape[1], width, value.shape[2])
        if not self._is_planned(key_shape, value_shape):
            self._begin(*(rows.reshape(batch, width, *rows.shape[1:]).transpose(1, 2) for rows in (key, value)))
        call, group = self.state.call, self.group
        assert call is not None and group is not None and group.step is not None
        if key.dtype != self.dtype or not call.native:
            return None
        slots = group.step.slot_mapping
        rotated: Tensor = _rope_and_cache(query, key, value, cos, sin, self.key_cache, self.value_cache, slots)
        self.call = call
        self.columns += call.width
        return rotated

    def _is_planned(self, key_shape: tuple[int, ...], value_shape: tuple[int, ...]) -> bool:
        """Whether another layer of the group has begun this forward pass, and found what this one would find."""
        # Runs in every layer and step.
        call, group = self.state.call, self.group
        return (
            call is not None
            and call is not self.call
            and group is not None
            and group.call is call
            and group.step is not None
            and group.written == (key_shape, value_shape)
        )

    def _begin(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the plan of the forward pass that this update belongs to, after all checks."""
        batch, _, width, head_dim = key_states.shape
        call = self.state.call
        if call is None or call is self.call or call.input_shape != (batch, width):
            # Nobody announced this forward pass: an unpatched model, or a layer called by itself.
            self.state.say_unannounced()
            call = self.state.announce(Call(batch, width))
        if not self.is_initialized:
            problem = head_dims_problem(head_dim, value_states.shape[-1]) or dtype_problem(
                _storage_dtype(key_states, value_states), key_states.device.type
            )
            if call.native and problem:
                raise NeedsOwnAttention(problem)
            self.lazy_initialization(key_states, value_states)
        assert self.group is not None and self.key_cache is not None and self.value_cache is not None
        self._check_shapes(key_states, value_states)
        self.group.plan(call)
        self.group.written = key_states.shape, value_states.shape

    @property
    def step(self) -> Step | None:
        """The plan of the forward pass that wrote this layer last; None once the tables were edited after it."""
        if self.group is None or self.call is None or self.group.call is not self.call:
            return None
        return self.group.step

    def gather(self, columns: int, last: int) -> tuple[Tensor, Tensor]:
        """K and V of the `last` of the first `columns` columns as stock lays them out, zero where one is not stored.

        Returns: `[batch, num_kv_heads, last, head_dim]` and `[batch, num_kv_heads, last, v_head_dim]`.
        """
        assert self.group is not None and self.key_cache is not None and self.value_cache is not None
        step = self.step
        if step is not None and self.call is not None and self.call.packed is None:
            block_table, seq_lens = step.block_table, step.seq_lens
        else:
            block_table, seq_lens = self.group.tables.step()
        # The columns of a block that left the window are cut off or masked: any block's content will do.
        block_table = block_table.clamp(min=0)
        all_stored = self.state.columns.all_stored
        stored = None
        if not all_stored:
            stored = torch.from_numpy(self.state.columns.stored(len(seq_lens))[:, :columns]).to(seq_lens.device)
        seq_lens = torch.full_like(seq_lens, columns) if stored is None else stored.sum(1, dtype=torch.int32)
        max_seq_len = columns if stored is None else int(seq_lens.max())
        gathered = torch.ops.paged.gather_cache(self.key_cache, self.value_cache, block_table, seq_lens, max_seq_len)
        if stored is not None:
            gathered = tuple(_spread(tokens, seq_lens, stored) for tokens in gathered)
        key, value = (tokens[:, columns - last :].transpose(1, 2).contiguous() for tokens in gathered)
        return key, value

    @property
    def keys(self) -> Tensor | None:
        """K gathered, `[batch, num_kv_heads, columns, head_dim]`, of a sliding layer what the next token sees of it.

        None before the first update.
        """
        return self.gather(self.columns, self._seen(0))[0] if self.is_initialized else None

    @property
    def values(self) -> Tensor | None:
        """V gathered, `[batch, num_kv_heads, columns, v_head_dim]`; as `keys`."""
        return self.gather(self.columns, self._seen(0))[1] if self.is_initialized else None

    def _seen(self, width: int) -> int:
        """How many columns at the end the last `width` of them see together: what stock's layer returns."""
        return min(self.columns, self.sliding_window - 1 + width) if self.is_sliding else self.columns

    def _check_shapes(self, key: Tensor, value: Tensor) -> None:
        assert self.group is not None
        held = self.group.key
        shape = (key.shape[1], key.shape[-1], value.shape[-1])
        if shape != (held.num_kv_heads, held.head_dim, held.v_head_dim):
            raise ValueError(
                f"key_states: heads and head sizes of K and V {shape}; must be "
                f"{(held.num_kv_heads, held.head_dim, held.v_head_dim)}, those of the model that filled this cache"
            )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        behind = max(self.columns - self.sliding_window + 1, 0) if self.is_sliding else 0
        return self.columns - behind + query_length, behind

    def get_seq_length(self) -> int:
        return self.columns

    def get_max_length(self) -> int:
        return self.sliding_window if self.is_sliding else -1

    # The name in transformers before 5.20.
    get_max_cache_shape = get_max_length

    def offload(self) -> None:
        """Blocks stay where they are."""

    def prefetch(self) -> None:
        """Blocks stay where they are."""

    def activate_past_recording(self) -> None:
        """Keep blocks that leave the window until the next crop."""
        self.state.record_past()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise NotImplementedError("layers share a block table: reorder the PagedCache, not one of its layers")


def token_rows(states: Tensor) -> Tensor:
    """`[batch, heads, width, head_dim]` as `[batch * width, heads, head_dim]`, a view where one dimension is 1."""
    batch, _, width, _ = states.shape
    if width == 1:
        rows = states.squeeze(2)
    elif batch == 1:
        rows = states[0].transpose(0, 1)
    else:
        rows = states.transpose(1, 2).flatten(0, 1)
    return rows if rows.is_contiguous() or rows.stride(-1) == 1 else rows.contiguous()


def _storage_dtype(key: Tensor, value: Tensor) -> torch.dtype:
    """What attention would compute in: under autocast K often arrives in float32 and V in the lower precision."""
    device_type = key.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return torch.promote_types(key.dtype, value.dtype)


def _spread(tokens: Tensor, seq_lens: Tensor, stored: Tensor) -> Tensor:
    """Tokens packed at the front of each row, `[batch, tokens, heads, dim]`, moved to the columns they stand in."""
    columns = tokens.new_zeros(*stored.shape, *tokens.shape[2:])
    columns[stored] = tokens[torch.arange(tokens.shape[1], device=stored.device) < seq_lens[:, None]]
    return columns


_Update = Callable[[PagedLayer, Tensor, Tensor], tuple[Tensor, Tensor]]
# Dynamo would trace the bookkeeping and hold on to the tables of one step.
_update_eagerly: _Update = torch.compiler.disable(PagedLayer._update)  # type: ignore[no-untyped-call]
