"""linear: a linear layer on a CPU over weights as nn.Linear keeps them."""

import torch
from torch import Tensor

from torch_paged.ops._library import check_same_device, define, fake, value_errors

define("linear(Tensor input, Tensor weight, Tensor? bias) -> Tensor")


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `input @ weight.T + bias`, summed in float32 and rounded once.

    A row's result does not depend on the other rows, only, in its last bits, on their number: few, always up to 12 and
    never more than 32, are multiplied by weights that stay where they are, at the speed of memory for those of a decode
    step; for many blocks of both are packed, at the speed of arithmetic, as floats where the instruction set in use has
    no dot products of bfloat16. With AMX weights of bfloat16 always stay where they are, and the number does not
    matter. These dot products and AMX take denormal numbers for zero.

    Args:
        input: `[..., in_features]`, float32, bfloat16 or float16, on a CPU; contiguous, but a matrix may be so in its
            last dimension alone.
        weight: `[out_features, in_features]`, dtype of input, last dimension contiguous.
        bias: `[out_features]`, dtype of input, contiguous.

    Returns:
        `[..., out_features]`, contiguous, dtype of input.

    Raises:
        ValueError: dtype, shape, strides or device of an argument is wrong.

    Source: blocks that stay in the caches, Goto and van de Geijn, Anatomy of High-Performance Matrix Multiplication,
    ACM TOMS 34(3), 2008.
    """
    with value_errors():
        out: Tensor = torch.ops.paged.linear(input, weight, bias)
    return out


@fake("linear")
def _(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    check_same_device(input, weight=weight, bias=bias)
    return input.new_empty((*input.shape[:-1], weight.shape[0]))
