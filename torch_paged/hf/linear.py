"""Linear layers of a patched model: on a CPU, native passes run them by the op where it is faster than PyTorch."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  the name in PyTorch's own code

from torch_paged.hf.call import current
from torch_paged.hf.disguise import disguise
from torch_paged.hf.fast_class import attempt, may_run
from torch_paged.hf.same_code import same_code
from torch_paged.ops._most_rows import most_rows

# Without the choice of an overload, and without the renaming of errors.
_linear = torch.ops.paged.linear.default


def _known(self: Any, input: Any) -> Any:
    """What the op computes."""
    return F.linear(input, self.weight, self.bias)


# None where somebody had replaced it before.
_stock_forward = nn.Linear.forward if same_code(nn.Linear.forward, _known) else None


def fast_class(stock: Any) -> Any:
    """Return the class that knows `linear` for nn.Linear itself, None for any other class, also for derived ones."""
    return _fast_linear() if stock is nn.Linear else None


def is_fast(module: nn.Module) -> bool:
    """Whether this is a linear layer of the class that knows `linear`."""
    return type(module) is _fast_linear()


@functools.cache
def _fast_linear() -> Any:
    class Linear(nn.Linear):
        is_fast_layer = True

        def forward(self, input: Tensor) -> Tensor:
            # Not in graphs, where the backend chooses.
            if current.fast_layers and not torch.compiler.is_compiling() and is_faster(self, input):
                out: Tensor | None = attempt(_linear, input.contiguous(), self.weight, self.bias)
                if out is not None:
                    return out
            return nn.Linear.forward(self, input)

    disguise(Linear, nn.Linear)
    return Linear


def is_faster(module: Any, input: Tensor) -> bool:
    """Whether `linear`, which does not know gradients and autocast, is faster than nn.Linear if it can compute this."""
    return (
        # A class of its own may compute in its own way, as quantised weights do.
        type(module.weight) is nn.Parameter
        # Somebody may have replaced the method meanwhile.
        and nn.Linear.forward is _stock_forward
        and may_run(input)
        and _has_few_rows(input)
        and module.weight.layout is torch.strided
        and module.weight.is_contiguous()
    )


def _has_few_rows(input: Tensor) -> bool:
    """Whether there are no more rows than `most_rows`."""
    return input.dim() > 0 and input.numel() <= most_rows(input.dtype) * input.shape[-1]
