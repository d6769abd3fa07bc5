"""Gated MLPs of a patched model: on a CPU, native passes run gate and up projection by one op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from transformers.activations import GELUTanh, SiLUActivation

from torch_paged.hf.call import current
from torch_paged.hf.disguise import disguise
from torch_paged.hf.fast_class import attempt, is_watched, kept_with, own_forward
from torch_paged.hf.last_mlp import asked_of, spread
from torch_paged.hf.linear import is_fast, is_faster
from torch_paged.hf.same_code import same_code

_gated_linear = torch.ops.paged.gated_linear.default

_ACTIVATIONS: dict[type[nn.Module], str] = {SiLUActivation: "silu", nn.SiLU: "silu", GELUTanh: "gelu_tanh"}
_FORWARDS = {cls: cls.forward for cls in _ACTIVATIONS}


# What the op computes, but for the last product, as transformers has it in most of its models.
def _llama(self: Any, x: Any) -> Any:
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj  # noqa: RET504


def _qwen2(self: Any, x: Any) -> Any:
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def fast_class(stock: Any) -> Any:
    """Return the subclass of `stock` that knows `gated_linear`, None if it computes something else than Llama's MLP."""
    forward = own_forward(stock)
    return kept_with(stock, _fast_mlp) if same_code(forward, _llama) or same_code(forward, _qwen2) else None


def _fast_mlp(stock: Any) -> Any:
    known = stock.forward

    class MLP(stock):  # type: ignore[misc]
        is_fast_layer = True

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            # Somebody may have replaced the method meanwhile.
            if len(args) != 1 or kwargs or stock.forward is not known or torch.compiler.is_compiling():
                return stock.forward(self, *args, **kwargs)
            (input,) = args
            tokens = asked_of(self, input)
            if tokens is None:
                return _output(stock, self, input)
            return spread(_output(stock, self, input[:, tokens]), tokens, input)

    disguise(MLP, stock)
    return MLP


def _output(stock: Any, mlp: Any, input: Any) -> Any:
    gate, up, activation = mlp.gate_proj, mlp.up_proj, mlp.act_fn
    if current.fast_layers and _is_faster(gate, up, activation, input):
        weights = (gate.weight, up.weight, gate.bias, up.bias)
        hidden = attempt(_gated_linear, input.contiguous(), *weights, _ACTIVATIONS[type(activation)])
        if hidden is not None:
            return mlp.down_proj(hidden)
    return stock.forward(mlp, input)


def _is_faster(gate: nn.Module, up: nn.Module, activation: nn.Module, input: Tensor) -> bool:
    """Whether the op is faster than the three modules, and nobody looks at what is between them."""
    return (
        type(activation) in _ACTIVATIONS
        and type(activation).forward is _FORWARDS[type(activation)]
        and is_fast(gate)
        and is_fast(up)
        and not (is_watched(gate) or is_watched(up) or is_watched(activation))
        and not nn_module._global_forward_hooks
        and not nn_module._global_forward_pre_hooks
        and is_faster(gate, input)
        and type(up.weight) is nn.Parameter
    )
