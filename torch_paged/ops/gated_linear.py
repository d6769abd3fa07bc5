"""gated_linear: the gate and the input of a gated linear unit on a CPU, in one pass."""

import torch
from torch import Tensor

from torch_paged.ops._library import check_same_device, define, fake, value_errors

define(
    "gated_linear(Tensor input, Tensor gate_weight, Tensor up_weight, Tensor? gate_bias, Tensor? up_bias, "
    "str activation) -> Tensor"
)


def gated_linear(
    input: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    activation: str = "silu",
) -> Tensor:
    """Return `activation(input @ gate_weight.T + gate_bias) * (input @ up_weight.T + up_bias)`.

    All of it in float32, rounded once; neither factor is stored. In other ways it is as `linear`.

    Args:
        input: `[..., in_features]`, float32, bfloat16 or float16, on a CPU; contiguous, but a matrix may be so in its
            last dimension alone.
        gate_weight, up_weight: `[out_features, in_features]`, dtype of input, last dimension contiguous.
        gate_bias, up_bias: `[out_features]`, dtype of input, contiguous.
        activation: `"silu"`, or `"gelu_tanh"`, GELU approximated by tanh.

    Returns:
        `[..., out_features]`, contiguous, dtype of input.

    Raises:
        ValueError: dtype, shape, strides or device of an argument is wrong, or the activation is unknown.

    Source: SwiGLU and GEGLU, Shazeer, GLU Variants Improve Transformer, 2020, section 2.
    """
    with value_errors():
        out: Tensor = torch.ops.paged.gated_linear(input, gate_weight, up_weight, gate_bias, up_bias, activation)
    return out


@fake("gated_linear")
def _(
    input: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
) -> Tensor:
    check_same_device(input, gate_weight=gate_weight, up_weight=up_weight, gate_bias=gate_bias, up_bias=up_bias)
    return input.new_empty((*input.shape[:-1], gate_weight.shape[0]))
