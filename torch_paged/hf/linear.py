"""Linear layers of a patched model: on a CPU, native passes run them by the op where it is faster than PyTorch."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor, nn

from torch_paged.hf.call import current
from torch_paged.hf.disguise import disguise, undisguise
from torch_paged.ops import cpu_instruction_set

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Without the choice of an overload, and without the renaming of errors, as `_is_plain` has looked.
_linear = torch.ops.paged.linear.default


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
            if current.fast_linear and not torch.compiler.is_compiling() and _is_plain(self, input):
                size = input.shape[-1]
                rows: Tensor = _linear(input.reshape(-1, size).contiguous(), self.weight, self.bias)
                return rows.view(*input.shape[:-1], rows.shape[1])
            return nn.Linear.forward(self, input)

    disguise(Linear, nn.Linear)
    return Linear


@functools.cache
def most_rows(dtype: torch.dtype) -> int:
    """Return with up to how many rows `linear` is as fast as PyTorch on this CPU, or faster.

    Few rows are bound by memory. Many are bound by arithmetic, in which PyTorch is as fast in float32, and in bfloat16
    where the CPU has fast dot products, or AMX. On other x86 CPUs it is slower: 4,864 x 896, 512 rows, 2 cores of a 4th
    generation Xeon without AMX, 2026-11-30, PyTorch and `linear`: bfloat16 162 and 276 GFLOP/s, float16 295 and 290;
    held to AVX-512 without half precision 61 and 289, 25 and 247; held to AVX2 26 and 134, 28 and 130.
    """
    halves = {torch.bfloat16, torch.float16}
    many = {"avx2": halves, "avx512": halves, "avx512bf16": {torch.float16}}
    # What is unknown counts as there: AMX has not been measured.
    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: True)()
    return sys.maxsize if dtype in many.get(cpu_instruction_set(), set()) and not has_amx else 64


def _is_plain(module: nn.Linear, input: Tensor) -> bool:
    """Whether `linear` computes what nn.Linear does, and faster. Asked seven times in each layer of a step."""
    weight, bias = module.weight, module.bias
    if type(input) is not Tensor or type(weight) is not nn.Parameter or not (_is_plain_on_cpu(input) and input.dim()):
        return False
    dtype, size = input.dtype, input.shape[-1]
    return (
        dtype in _DTYPES
        and 0 < input.numel() <= most_rows(dtype) * size
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and weight.dtype == dtype
        and _is_plain_on_cpu(weight)
        and weight.dim() == 2
        and weight.shape[1] == size
        and weight.is_contiguous()
        and (bias is None or _fits(bias, weight))
    )


def _fits(bias: Tensor, weight: Tensor) -> bool:
    same = bias.dtype == weight.dtype and bias.shape == weight.shape[:1]
    return same and _is_plain_on_cpu(bias) and bias.is_contiguous()


def _is_plain_on_cpu(tensor: Tensor) -> bool:
    return tensor.is_cpu and tensor.layout is torch.strided and not tensor.is_nested
