"""Compiled forward passes: packed passes of a patched model as full graphs, the same for every length and cache."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch.utils._python_dispatch import _get_current_dispatch_mode
from transformers import PreTrainedModel

from torch_paged.compile import repack_if_written
from torch_paged.hf.around import run_compiled
from torch_paged.hf.buckets import filled_inputs, filled_step, fills_up
from torch_paged.hf.call import Call, ThisCallNeedsOwnAttention
from torch_paged.hf.group import Step
from torch_paged.hf.pools import GroupKey
from torch_paged.hf.step_cache import StepView

if TYPE_CHECKING:
    from torch_paged.hf.cache import PagedCache

# Graphs of one model: prefills, decode steps of one row and of several, each with and without autograd's modes and
# autocast.
_RECOMPILE_LIMIT = 64


class Compiled:
    """How packed passes of one patched model are compiled.

    A pass sees a StepCache instead of the PagedCache: its tables, slots and lengths are tensors that our eager code
    makes before it. Decode steps of one row are a graph, those of two rows and more another, passes with more tokens of
    a row, prefills and chunks beside decode steps, a third. Sizes above one are symbols, so that neither longer
    sequences nor rows that leave compile anything. Tables, slots and lengths are made anew for each pass and so not
    marked static: CUDA graphs copy them, some kilobytes, into memory of their own, and would be captured again for
    every new address.

    Args:
        run: the model's stock call as `run(model, base, inputs)`, which compiles what it runs.
        tell: called with the reason, where a pass cannot be compiled.
    """

    def __init__(self, run: Callable[..., Any], tell: Callable[[str], None]) -> None:
        self._run, self.tell = run, tell
        self._failed = False
        # What each layer stores, as an uncompiled pass has shown.
        self._layers: list[GroupKey] | None = None

    @classmethod
    def by(cls, options: dict[str, Any], tell: Callable[[str], None]) -> Compiled:
        """Passes compiled by `torch.compile(**options)`."""
        step = _own_step()
        if "recompile_limit" in inspect.signature(torch.compile).parameters:
            options = {"recompile_limit": _RECOMPILE_LIMIT} | options
        return cls(torch.compile(step, **({"fullgraph": True} | options)), tell=tell)

    @staticmethod
    def of(model: PreTrainedModel) -> Compiled | None:
        """How passes of this patched model are compiled when nobody says otherwise; None: they are not."""
        compiled: Compiled | None = type(model)._torch_paged_compiled(model)
        return compiled

    @classmethod
    def of_user(cls, tell: Callable[[str], None]) -> Compiled:
        """Every pass, by what the user has compiled of the model."""
        return cls(_step, tell=tell)

    @classmethod
    def under(cls, callback: Any, tell: Callable[[str], None]) -> Compiled:
        """Every pass, by the `torch.compile` that is around the call: `callback` of `around.compiling_around`."""
        return cls(functools.partial(run_compiled, callback, _own_step()), tell=tell)

    def takes(self, call: Call) -> bool:
        """Whether the pass `call`, native and packed or to be packed, is one to compile."""
        plain = not call.deterministic and not torch.is_grad_enabled() and _get_current_dispatch_mode() is None
        return plain and not self._failed

    def saw(self, cache: PagedCache) -> None:
        """An uncompiled native pass over `cache` is done: its masks and windows are what our attention does."""
        layers = cache.paged_layers
        if all(layer.group is not None for layer in layers):
            self._layers = [layer.group.key for layer in layers if layer.group is not None]

    def __call__(
        self, model: PreTrainedModel, base: Any, cache: PagedCache, call: Call, inputs: dict[str, Any], keep: Tensor
    ) -> Any:
        """The announced pass `call` over `inputs`, without logits_to_keep; None where it is to run uncompiled.

        Args:
            keep: int64, the tokens whose logits are wanted.
        """
        if call.deterministic:
            self.tell("deterministic=True has kernels of its own")
        if not self.takes(call) or not is_plain(inputs) or not self._ready(cache):
            return None
        layers = cache.paged_layers
        if cache.step_view is None or not cache.step_view.is_of(layers):
            cache.step_view = StepView(cache.layers)
            repack_if_written(model.parameters())
        view = cache.step_view
        is_decode = int(call.num_tokens.max(initial=0)) <= 1
        fill = is_decode and fills_up(keep.device)
        for group, shared in view.groups:
            step = filled_step(group.plan(call)) if fill else group.plan(call)
            shared.step = _prepared(step, is_decode)
            shared.longest = None if is_decode else _as_size(step.max_query_len)
            shared.holes = cache.state.columns.holes
        view.cache.columns = torch.tensor(cache.state.columns.count - call.width)
        given = {"input_ids", "position_ids", "use_cache"}
        inputs = {name: value for name, value in inputs.items() if name in given}
        inputs = (filled_inputs(inputs) if fill else inputs) | {"past_key_values": view.cache, "return_dict": True}
        for name in ("input_ids", "position_ids"):
            if name in inputs:
                _mark_dynamic(inputs[name], 1)
        wanted = None
        if not is_decode and "logits_to_keep" in _parameters(base):
            # Of a piece of a prompt no logits are wanted.
            wanted, keep = keep, torch.nn.functional.pad(keep, (0, max(0, 2 - len(keep))))
            _mark_dynamic(keep, 0)
            inputs["logits_to_keep"] = keep
        call.is_compiled = True
        try:
            outputs = self._run(model, base, inputs)
        except TorchDynamoException as error:
            # It says so again when it runs uncompiled.
            if ThisCallNeedsOwnAttention.__name__ not in str(error):
                self._failed = True
                self.tell(_summary(error))
            _forget_frames(error)
            return None
        finally:
            call.is_compiled = False
            for _, shared in view.groups:
                shared.step = None
        outputs["past_key_values"] = cache
        cache.passed(call)
        if wanted is not None:
            outputs["logits"] = outputs["logits"][:, : len(wanted)]
        elif not (is_decode and len(keep) == outputs["logits"].shape[1]):
            outputs["logits"] = outputs["logits"][:, keep]
        return outputs

    def _ready(self, cache: PagedCache) -> bool:
        """Whether every layer has its place in the pool, if need be the one that the model is known to use."""
        layers = cache.paged_layers
        if all(layer.is_initialized for layer in layers):
            return all(layer.call is not None and layer.call.native for layer in layers)
        if self._layers is None or len(self._layers) != len(layers) or any(layer.is_initialized for layer in layers):
            return False
        for layer, key in zip(layers, self._layers, strict=True):
            like = [torch.empty((1, key.num_kv_heads, 0, dim), dtype=key.dtype, device=key.device)
                    for dim in (key.head_dim, key.v_head_dim)]  # fmt: skip
            layer.lazy_initialization(*like)
        return True


def _step(model: PreTrainedModel, base: Any, inputs: dict[str, Any]) -> Any:
    return base.__call__(model, **inputs)


def _own_step() -> Callable[..., Any]:
    # A code object of its own: graphs are kept, and counted against limits, by code.
    return FunctionType(_step.__code__.replace(co_name=_step.__name__), globals(), _step.__name__)


def user_compiled(model: PreTrainedModel) -> Any:
    """What `model.compile()` or `model.forward = torch.compile(...)` has put in place; None: nobody did either."""
    if model._compiled_call_impl is not None:
        return model._compiled_call_impl
    forward = model.__dict__.get("forward")
    return forward if hasattr(forward, "_torchdynamo_orig_callable") else None


def is_plain(inputs: dict[str, Any]) -> bool:
    """Whether these are inputs and outputs of the kind that compiled passes have."""
    return (
        inputs.get("input_ids") is not None
        and inputs.get("inputs_embeds") is None
        and not inputs.get("output_hidden_states")
    )


def _prepared(step: Step, is_decode: bool) -> Step:
    """`step` with the sizes that change from pass to pass marked so, and none of them one where others may follow.

    PyTorch compiles sizes of 0 and 1 apart from all others.
    """
    block_table = step.block_table
    if block_table.shape[1] == 1:
        block_table = torch.nn.functional.pad(block_table, (0, 1), value=-1)
    seq_lens, starts = step.seq_lens, step.cu_seqlens_q
    if not is_decode and len(seq_lens) == 1:
        # A sequence without tokens beside it.
        block_table = torch.nn.functional.pad(block_table, (0, 0, 0, 1), value=-1)
        seq_lens = torch.nn.functional.pad(seq_lens, (0, 1))
        starts = torch.cat([starts, starts[-1:]])
    _mark_dynamic(block_table, 0, 1)
    for tensor in (seq_lens, starts, step.slot_mapping):
        if len(seq_lens) > 1:
            _mark_dynamic(tensor, 0)
    return Step(block_table, seq_lens, starts, step.slot_mapping, None, 0)


def _as_size(number: int) -> Tensor:
    # PyTorch compiles a size of 1 apart from all others.
    tensor = torch.empty(0, max(number, 2))
    _mark_dynamic(tensor, 1)
    return tensor


def _mark_dynamic(tensor: Tensor, *dims: int) -> None:
    for dim in dims:
        if tensor.shape[dim] > 1:
            torch._dynamo.mark_dynamic(tensor, dim)


def _forget_frames(error: BaseException | None) -> None:
    """Let go of what was there when `error` was raised: Dynamo keeps errors in cycles, and callers hold blocks."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def _summary(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # What an exception in the model says stands here, and nowhere above.
    context = [line for line in lines if line.startswith("Developer debug context: raised exception")]
    return " ".join(context or lines[:2]) or type(error).__name__


@functools.cache
def _parameters(base: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(base.forward).parameters)
