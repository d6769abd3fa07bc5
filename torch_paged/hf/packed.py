"""Packed calls: one forward pass over tokens of any rows of a PagedCache, all in one row of the model's inputs."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from torch_paged.hf.announce import announced
from torch_paged.hf.cache import PagedCache
from torch_paged.hf.call import Call
from torch_paged.hf.compiled import Compiled
from torch_paged.hf.disguise import stock_class
from torch_paged.hf.last_mlp import runs_for


def packed_call(
    model: PreTrainedModel,
    cache: PagedCache,
    num_tokens: np.ndarray,
    input_ids: Tensor,
    position_ids: Tensor | None = None,
    logits_to_keep: Tensor | None = None,
    deterministic: bool = False,
    **inputs: Any,
) -> Any:
    """Run a patched model over new tokens of some rows of `cache`: prefill, chunks and decode steps in one pass.

    Rows have any lengths and any number of new tokens. Attention over sequences of different lengths without padding
    is FlashAttention's varlen form (arXiv 2307.08691); chunks of a prompt beside decode steps are Sarathi's (arXiv
    2308.16369).

    Args:
        model: a patched model for which `packing.pack_problem` is None.
        cache: its rows go on where they end; an empty cache gets as many rows as `num_tokens` has.
        num_tokens: int64 `[rows]`, new tokens of each row of the cache, 0 for the rows that are not in this pass.
        input_ids: int64 `[tokens]`, row after row.
        position_ids: int64 `[tokens]`; None = each row goes on at its length.
        logits_to_keep: int64, indices into the tokens; None = the last one of each row that has any.
        deterministic: attention gives a row the same bits whatever else is in the pass.
        **inputs: more arguments of the model.

    Returns: the model's outputs. Their first dimension is 1, the second the tokens; of `logits` those asked for.

    Raises:
        PoolExhausted: too few blocks; nothing has changed.
        ValueError: the cache holds another number of rows.
        NeedsOwnAttention: the model needs its own attention after all; the pass is taken back.
    """
    if position_ids is None:
        lengths = cache.state.seq_lens if cache.state.num_seqs is not None else np.zeros_like(num_tokens)
        before = num_tokens.cumsum() - num_tokens
        positions = np.arange(int(num_tokens.sum())) + np.repeat(lengths - before, num_tokens)
        position_ids = torch.from_numpy(positions).to(input_ids.device)
    if logits_to_keep is None:
        logits_to_keep = torch.from_numpy(num_tokens.cumsum()[num_tokens > 0] - 1).to(input_ids.device)
    forward = Forward(stock_class(type(model)), model, Compiled.of(model))
    call = Call(len(num_tokens), 0, native=True, packed=num_tokens, deterministic=deterministic)
    inputs |= dict(input_ids=input_ids[None], position_ids=position_ids[None])
    return forward.packed(cache, call, inputs, logits_to_keep)


@dataclass(frozen=True)
class Forward:
    """The call of a model's stock class.

    Attributes:
        base: the class.
        model: the patched model.
        compiled: how packed passes are compiled, if they are.
    """

    base: Any
    model: PreTrainedModel
    compiled: Compiled | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Not compiled, also in a compiled model: the tables of a PagedCache are edited in Python.
        model = self.model
        compiled = getattr(model.__dict__.get("forward"), "_torchdynamo_orig_callable", None)
        if compiled is not None and not model._forward_hooks and not model._forward_pre_hooks:
            return compiled(*args, **kwargs)
        run = self.base.__call__ if model._compiled_call_impl is None else self.base._call_impl
        return run(model, *args, **kwargs)

    def packed(self, cache: PagedCache, call: Call, inputs: dict[str, Any], logits_to_keep: Tensor) -> Any:
        """The pass `call`, which is packed, over `inputs`; logits of the tokens `logits_to_keep` alone."""
        inputs = inputs | dict(past_key_values=cache, attention_mask=None, return_dict=True)
        takes = self.parameters
        if "position_ids" not in takes:
            inputs.pop("position_ids", None)
        with announced(cache, call):
            if self.compiled is not None:
                outputs = self.compiled(self.model, self.base, cache, call, inputs, logits_to_keep)
                if outputs is not None:
                    return outputs
            if "logits_to_keep" in takes:
                inputs["logits_to_keep"] = logits_to_keep
            with runs_for(logits_to_keep, self.base, self.model, call, inputs):
                outputs = self(**inputs)
        if self.compiled is not None:
            self.compiled.saw(cache)
        if "logits_to_keep" not in takes:
            outputs["logits"] = outputs["logits"][:, logits_to_keep]
        return outputs

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of what the model's forward takes."""
        return _parameters(self.base)


@functools.cache
def _parameters(base: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(base.forward).parameters)
