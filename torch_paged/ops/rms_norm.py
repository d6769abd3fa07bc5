"""rms_norm: rows by their root mean square on a CPU, in one pass."""

import torch
from torch import Tensor

from torch_paged.ops._library import check_same_device, define, fake, value_errors

define("rms_norm(Tensor input, Tensor weight, float eps) -> Tensor")


def rms_norm(input: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return `input / sqrt(mean(input ** 2) + eps) * weight`, each row by its own mean.

    Computed in float32; the quotient is rounded to the dtype of input before it is multiplied, as in transformers'
    `LlamaRMSNorm`.

    Args:
        input: `[..., size]`, float32, bfloat16 or float16, on a CPU; contiguous, but a matrix may be so in its last
            dimension alone.
        weight: `[size]`, dtype of input, contiguous.
        eps: is added to the mean of the squares.

    Returns:
        `[..., size]`, contiguous, dtype of input.

    Raises:
        ValueError: dtype, shape, strides or device of an argument is wrong.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, section 4.
    """
    with value_errors():
        out: Tensor = torch.ops.paged.rms_norm(input, weight, eps)
    return out


@fake("rms_norm")
def _(input: Tensor, weight: Tensor, eps: float) -> Tensor:
    check_same_device(input, weight=weight)
    return input.new_empty(input.shape)
