"""packed_linear: a linear layer on a CPU over weights packed for the few rows of a decode step."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from torch_paged.ops._library import check_same_device, define, fake, value_errors

# Outputs that lie together; csrc/cpu/packed_linear.h.
_PANEL = 32

define("packed_linear(Tensor input, Tensor packed_weight, Tensor? bias, SymInt out_features) -> Tensor")


def pack_linear_weight(weight: Tensor) -> Tensor:
    """Reorder a weight for `packed_linear`: for 32 outputs at a time, one pair of inputs after the other.

    Args:
        weight: `[out_features, in_features]`, float32, bfloat16 or float16.

    Returns:
        `[ceil(out_features / 32), ceil(in_features / 2), 64]`, zeros in what is beyond the weight's sizes.

    Raises:
        ValueError: shape or dtype of weight is wrong.
    """
    if weight.dim() != 2:
        raise ValueError(f"weight: shape {list(weight.shape)}; must be 2-D [out_features, in_features]")
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"weight: {weight.dtype}; must be float32 or bfloat16 or float16")
    out_features, in_features = weight.shape
    whole = pad(weight, (0, in_features % 2, 0, -out_features % _PANEL))
    pairs = whole.view(whole.shape[0] // _PANEL, _PANEL, whole.shape[1] // 2, 2)
    # bfloat16 beside bfloat16, so that a shift and a mask make floats of a pair, and dot products take it as it is.
    order = (0, 2, 1, 3) if weight.dtype == torch.bfloat16 else (0, 2, 3, 1)
    return pairs.permute(order).reshape(pairs.shape[0], pairs.shape[2], 2 * _PANEL)


def packed_linear(input: Tensor, packed_weight: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """Return `input @ weight.T + bias`, summed in float32 and rounded once.

    A row's result does not depend on the other rows. Weights are read once for every 32 rows, with AMX
    for every 64 in bfloat16.

    Args:
        input: `[rows, in_features]`, float32, bfloat16 or float16, on a CPU, last dimension contiguous.
        packed_weight: what `pack_linear_weight` makes of `[out_features, in_features]`, dtype of input.
        bias: `[out_features]`, dtype of input, contiguous.
        out_features: which the packed weight does not tell.

    Returns:
        `[rows, out_features]`, contiguous, dtype of input.

    Raises:
        ValueError: dtype, shape, strides or device of an argument is wrong.

    Source: register tiles over packed panels, Goto and van de Geijn, Anatomy of High-Performance Matrix
    Multiplication, ACM TOMS 34(3), 2008.
    """
    with value_errors():
        out: Tensor = torch.ops.paged.packed_linear(input, packed_weight, bias, out_features)
    return out


@fake("packed_linear")
def _(input: Tensor, packed_weight: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    check_same_device(input, packed_weight=packed_weight, bias=bias)
    return input.new_empty((input.shape[0], out_features))
