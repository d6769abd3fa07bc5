"""merge_attention_states: combine attention over two sets of keys into attention over both."""

import torch
from torch import Tensor

from torch_paged.ops._library import check_same_device, define, fake, value_errors

define("merge_attention_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor out, Tensor lse)")


def merge_attention_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merge two partial results of `attention_with_lse` over disjoint keys.

    A side whose lse is -inf saw nothing and is not read; where both are, out is 0 and lse -inf. A sink belongs in one
    side alone.

    Args:
        out_a, out_b: `[tokens, num_heads, v_head_dim]`, float32, bfloat16, float16 or (CPU) float64, one dtype, last
            dimension contiguous.
        lse_a, lse_b: float32 `[num_heads, tokens]`, natural logarithm.

    Returns:
        out: `[tokens, num_heads, v_head_dim]`, contiguous, dtype of out_a.
        lse: float32 `[num_heads, tokens]`.

    Raises:
        ValueError: dtype, shape, strides or device of an argument is wrong.

    Source: merging by log-sum-exp, FlashInfer, arXiv 2501.01005, section 2.2.
    """
    with value_errors():
        out, lse = torch.ops.paged.merge_attention_states(out_a, lse_a, out_b, lse_b)
    return out, lse


@fake("merge_attention_states")
def _(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    check_same_device(out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b)
    return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)
