"""RMS norms of a patched model: on a CPU, native passes run them by the op, which reads and writes each row once."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from torch_paged.hf.call import current
from torch_paged.hf.disguise import disguise
from torch_paged.hf.fast_class import attempt, kept_with, may_run, own_forward
from torch_paged.hf.same_code import same_code

_rms_norm = torch.ops.paged.rms_norm.default


# What the op computes, as transformers has it in most of its models.
def _llama(self: Any, hidden_states: Any) -> Any:
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    return self.weight * hidden_states.to(input_dtype)


def fast_class(stock: Any) -> Any:
    """Return the subclass of `stock` that knows `rms_norm`, None if it computes something else than Llama's norm."""
    return kept_with(stock, _fast_norm) if same_code(own_forward(stock), _llama) else None


def is_fast(module: nn.Module) -> bool:
    """Whether this is a norm of a class that knows `rms_norm`."""
    return getattr(type(module), "is_fast_norm", False)


def _fast_norm(stock: Any) -> Any:
    known = stock.forward

    class RMSNorm(stock):  # type: ignore[misc]
        is_fast_layer = is_fast_norm = True

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            if current.fast_layers and len(args) == 1 and not kwargs and not torch.compiler.is_compiling():
                (input,) = args
                # Somebody may have replaced the method meanwhile.
                if stock.forward is known and _is_faster(self, input):
                    normal = attempt(_rms_norm, input, self.weight, self.variance_epsilon)
                    if normal is not None:
                        return normal
            return stock.forward(self, *args, **kwargs)

    disguise(RMSNorm, stock)
    return RMSNorm


def _is_faster(module: Any, input: Any) -> bool:
    """Whether the op is faster than the module if it can compute this. What is not contiguous stays so in stock."""
    return (
        may_run(input)
        and input.is_contiguous()
        and type(module.weight) is nn.Parameter
        and module.weight.dtype is input.dtype
        and type(module.variance_epsilon) is float
    )
