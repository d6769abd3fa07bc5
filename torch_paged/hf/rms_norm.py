"""RMS norms of a patched model: on a CPU, native passes run them by the op, which reads and writes each row once."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from torch_paged.hf.call import current
from torch_paged.hf.disguise import disguise
from torch_paged.hf.linear import may_run, pass_refusal
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
    return _fast_norm(stock) if same_code(stock.forward, _llama) else None


@functools.cache
def _fast_norm(stock: Any) -> Any:
    known = stock.forward

    class RMSNorm(stock):  # type: ignore[misc]
        is_fast_layer = True

        def forward(self, hidden_states: Tensor) -> Tensor:
            # Somebody may have replaced the method meanwhile.
            plain = stock.forward is known and type(self.weight) is nn.Parameter
            if current.fast_layers and plain and not torch.compiler.is_compiling() and may_run(hidden_states):
                try:
                    normal: Tensor = _rms_norm(hidden_states.contiguous(), self.weight, self.variance_epsilon)
                    return normal
                except RuntimeError as error:
                    pass_refusal(error)
            result: Tensor = stock.forward(self, hidden_states)
            return result

    disguise(RMSNorm, stock)
    return RMSNorm
