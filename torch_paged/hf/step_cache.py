"""StepCache: what a compiled forward pass sees of a PagedCache, tensors where the pass before it had its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from torch_paged.hf.group import LayerGroup, Step

if TYPE_CHECKING:
    from torch_paged.hf.layer import PagedLayer

# An attribute of the K and V that a StepLayer returns: code that computes with them gets tensors without it.
_TAG = "_torch_paged_layer"


class StepGroup:
    """What the layers of a group share: nothing that is a number in one pass and another number in the next.

    It does not know its LayerGroup: what Dynamo has seen lives on until the cycle collector runs, and blocks may not.

    Attributes:
        step: of the pass that is about to run; None between passes.
        longest: `[0, n]` where a sequence has up to n queries: a number that may change without compiling anything is
            the size of a tensor. None in a decode step, whose sequences have one each.
        holes: a column that is not stored stands after one that is, so that distances in columns and tokens differ.
    """

    def __init__(self) -> None:
        self.step: Step | None = None
        self.longest: Tensor | None = None
        self.holes = False


class StepLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's place in the pool, for a packed pass whose tables and slots are known before it runs."""

    is_compileable = False
    is_croppable = False

    def __init__(self, layer: PagedLayer, shared: StepGroup) -> None:
        # CacheLayerMixin.__init__ would assign `keys` and `values`, which nothing reads in a native pass.
        assert layer.key_cache is not None and layer.value_cache is not None
        self.key_cache, self.value_cache = _by_itself(layer.key_cache), _by_itself(layer.value_cache)
        self.sliding_window, self.is_sliding = layer.sliding_window, layer.is_sliding
        self.shared = shared
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Its caches are there."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store K and V, `[1, num_kv_heads, tokens, head_dim]`; the same back, tagged as what `attend` reads."""
        dtype = self.key_cache.dtype
        if not key_states.dtype == value_states.dtype == dtype:
            key_states, value_states = key_states.to(dtype), value_states.to(dtype)
        assert self.shared.step is not None
        torch.ops.paged.reshape_and_cache.default(
            _rows(key_states), _rows(value_states), self.key_cache, self.value_cache, self.shared.step.slot_mapping
        )
        # Dynamo sets attributes of an op's only result, not of one of several, as `chunk` has.
        key_states, value_states = key_states.view_as(key_states), value_states.view_as(value_states)
        setattr(key_states, _TAG, self)
        setattr(value_states, _TAG, self)
        return key_states, value_states

    def attend(
        self,
        query: Tensor,
        *,
        scaling: float | None,
        sliding_window: int = 0,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
    ) -> Tensor:
        """Attention of `query`, `[1, heads, tokens, head_dim]`, over the blocks; `[1, tokens, heads, v_head_dim]`.

        Args:
            scaling, softcap, sinks, alibi_slopes: as for `torch_paged.ops.attention`.
            sliding_window: of the module; 0 = off.
        """
        rows = _rows(query).to(self.key_cache.dtype)
        step = self.shared.step
        assert step is not None
        out: Tensor = torch.ops.paged.attention.default(
            rows,
            self.key_cache,
            self.value_cache,
            step.block_table,
            step.seq_lens,
            step.cu_seqlens_q,
            1 if self.shared.longest is None else self.shared.longest.shape[1],
            scale=scaling,
            sliding_window=sliding_window,
            softcap=softcap or 0.0,
            alibi_slopes=alibi_slopes,
            sinks=None if sinks is None else sinks.float(),
        )
        return out.unsqueeze(0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        raise NotImplementedError("a StepCache counts columns, for all of its layers")

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length


class StepCache(Cache):  # type: ignore[misc]
    """The face of a PagedCache in compiled code. No table is edited and no length is read in there.

    Attributes:
        columns: int64 `[]`, columns before the pass, on the CPU.
    """

    columns: Tensor

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        written: tuple[Tensor, Tensor] = self.layers[layer_idx].update(key_states, value_states)
        return written

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """A tensor, as of stock's compilable caches."""
        return self.columns

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """For masks, of which a native pass has none."""
        return 0


class StepView:
    """A PagedCache and its StepCache side by side.

    Args:
        layers: of the PagedCache, each with a place in the pool, or without a state.
    """

    def __init__(self, layers: list[Any]) -> None:
        self._groups = [layer.group for layer in layers if hasattr(layer, "group")]
        self._shared: dict[int, tuple[LayerGroup, StepGroup]] = {}
        steps = []
        for layer in layers:
            if hasattr(layer, "group"):
                _, shared = self._shared.setdefault(id(layer.group), (layer.group, StepGroup()))
                layer = StepLayer(layer, shared)
            steps.append(layer)
        self.cache = StepCache(layers=steps)

    def is_of(self, layers: list[PagedLayer]) -> bool:
        """Whether these layers still live in the groups that they lived in when this was made."""
        return all(layer.group is group for layer, group in zip(layers, self._groups, strict=True))

    @property
    def groups(self) -> list[tuple[LayerGroup, StepGroup]]:
        """The groups of layers, each with what compiled passes see of it."""
        return list(self._shared.values())


def step_layer(key: Tensor, value: Tensor) -> StepLayer | None:
    """The layer that returned this K and V; None where code between cache and attention has changed one of them."""
    layer: StepLayer | None = getattr(key, _TAG, None)
    return layer if getattr(value, _TAG, None) is layer else None


def _by_itself(cache: Tensor) -> Tensor:
    """The same memory under a storage of its own.

    Views of one storage that a graph writes count as overlapping where their sizes are symbols, and are copied whole.
    """
    with torch.inference_mode(False):
        alone: Tensor = torch.utils.dlpack.from_dlpack(cache)
    # CUDA graphs then read and write it where it is.
    torch._dynamo.mark_static_address(alone)
    # How many blocks there are differs from pool to pool, and so from one PagedCache of its own to the next.
    if alone.shape[0] > 1:
        torch._dynamo.mark_dynamic(alone, 0)
    return alone


def _rows(states: Tensor) -> Tensor:
    """`[1, heads, tokens, head_dim]` as `[tokens, heads, head_dim]`."""
    rows = states[0].transpose(0, 1)
    return rows if rows.stride(-1) == 1 else rows.contiguous()
