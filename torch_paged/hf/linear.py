"""Linear layers of a patched model: on a CPU, native passes of few rows read the weights at the speed of memory."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from torch_paged.hf.call import current
from torch_paged.hf.disguise import disguise, undisguise
from torch_paged.ops import linear

# With more, products are bound by arithmetic, and PyTorch's are as fast.
_MOST_ROWS = 64
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def install(model: nn.Module) -> None:
    """Give the linear layers of `model` the class that knows `linear`; subclasses of nn.Linear stay what they are."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = _fast_class()


def uninstall(model: nn.Module) -> None:
    """Undo `install`."""
    for module in model.modules():
        if isinstance(module, _fast_class()):
            undisguise(module)


@functools.cache
def _fast_class() -> Any:
    class Linear(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            # Not in graphs, where the backend chooses.
            if not torch.compiler.is_compiling() and current.fast_linear and _is_plain(self, input):
                rows = linear(input.reshape(-1, input.shape[-1]).contiguous(), self.weight, self.bias)
                return rows.view(*input.shape[:-1], rows.shape[1])
            return nn.Linear.forward(self, input)

    disguise(Linear, nn.Linear)
    return Linear


def _is_plain(module: nn.Linear, input: Tensor) -> bool:
    """Whether `linear` computes what nn.Linear does, and faster."""
    if type(input) is not Tensor or input.dim() == 0 or type(module.weight) is not nn.Parameter:
        return False
    weight, bias = module.weight, module.bias
    return (
        0 < input.numel() <= _MOST_ROWS * input.shape[-1]
        and input.dtype in _DTYPES
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and all(each is None or _is_plain_on_cpu(each, input.dtype) for each in (input, weight, bias))
        and weight.dim() == 2
        and weight.shape[1] == input.shape[-1]
        and weight.is_contiguous()
        and (bias is None or (bias.shape == weight.shape[:1] and bias.is_contiguous()))
    )


def _is_plain_on_cpu(tensor: Tensor, dtype: torch.dtype) -> bool:
    plain = tensor.layout == torch.strided and not tensor.is_nested
    return plain and tensor.dtype == dtype and tensor.device.type == "cpu"
