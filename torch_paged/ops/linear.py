"""linear: a linear layer on a CPU over weights as nn.Linear keeps them, for the few rows of a decode step."""

import torch
from torch import Tensor

from torch_paged.ops._library import check_same_device, define, fake, value_errors

define("linear(Tensor input, Tensor weight, Tensor? bias) -> Tensor")


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `input @ weight.T + bias`, summed in float32 and rounded once.

    A row's result does not depend on the other rows. Up to 128 rows read the weights once.

    Args:
        input: `[rows, in_features]`, float32, bfloat16 or float16, on a CPU, last dimension contiguous.
        weight: `[out_features, in_features]`, dtype of input, last dimension contiguous.
        bias: `[out_features]`, dtype of input, contiguous.

    Returns:
        `[rows, out_features]`, contiguous, dtype of input.

    Raises:
        ValueError: dtype, shape, strides or device of an argument is wrong.

    Source: blocks that stay in the caches, Goto and van de Geijn, Anatomy of High-Performance Matrix Multiplication,
    ACM TOMS 34(3), 2008; nothing is packed, as inputs and weights both have what is summed over in their rows.
    """
    with value_errors():
        out: Tensor = torch.ops.paged.linear(input, weight, bias)
    return out


@fake("linear")
def _(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    check_same_device(input, weight=weight, bias=bias)
    return input.new_empty((input.shape[0], weight.shape[0]))
