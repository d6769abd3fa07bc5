"""Linear layers of a patched model: on a CPU, native passes of few rows read the weights at the speed of memory."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from torch_paged.hf.call import current
from torch_paged.hf.disguise import disguise, stock_class
from torch_paged.ops import linear

# Rows up to which `linear` is taken for a dtype.
_MOST_ROWS = {torch.float32: 64, torch.bfloat16: 64, torch.float16: 64}


def install(model: nn.Module) -> None:
    """Give the linear layers of `model` the class that knows `linear`; subclasses of nn.Linear stay what they are."""
    for module in model.modules():
        if type(module) is nn.Linear and "forward" not in module.__dict__:
            module.__class__ = _class()


def uninstall(model: nn.Module) -> None:
    """Undo `install`."""
    for module in model.modules():
        if type(module) is _class():
            module.__class__ = stock_class(_class())


@functools.cache
def _class() -> Any:
    class Linear(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            # Not in graphs: the backend packs weights, and chooses by the number of rows itself.
            if not torch.compiler.is_compiling() and current.call is not None and current.call.native:
                if (rows := _few_rows(self, input)) is not None:
                    return linear(rows, self.weight, self.bias).view(*input.shape[:-1], self.weight.shape[0])
            return nn.Linear.forward(self, input)

    disguise(Linear, nn.Linear)
    return Linear


def _few_rows(module: nn.Linear, input: Tensor) -> Tensor | None:
    """`input` as rows, where `linear` computes what nn.Linear does, and faster; None elsewhere."""
    weight, bias, dtype = module.weight, module.bias, input.dtype
    most = _MOST_ROWS.get(dtype)
    plain = (
        most is not None
        and input.numel() <= most * input.shape[-1]
        and input.device.type == "cpu"
        and type(weight) is nn.Parameter
        and weight.dtype == dtype
        and weight.layout == torch.strided
        and weight.shape[1] == input.shape[-1]
        and weight.is_contiguous()
        and (bias is None or (bias.dtype == dtype and bias.is_contiguous()))
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not (current.call is not None and current.call.deterministic)
    )
    return input.reshape(-1, input.shape[-1]) if plain else None
