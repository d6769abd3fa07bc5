"""qkv_linear: the projections of an attention layer to queries, keys and values on a CPU, in one pass."""

import torch
from torch import Tensor

from torch_paged.ops._library import check_same_device, define, fake, value_errors

define(
    "qkv_linear(Tensor input, Tensor query_weight, Tensor key_weight, Tensor value_weight, Tensor? query_bias, "
    "Tensor? key_bias, Tensor? value_bias, int head_dim) -> (Tensor query, Tensor key, Tensor value)"
)


def qkv_linear(
    input: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    query_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    value_bias: Tensor | None = None,
    *,
    head_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `linear` of the same input by three weights, as heads: what `rope_and_cache` takes.

    The numbers are those of `linear`. Few rows meet all weights in one go: those of keys and values are small where
    queries share them, and not worth threads of their own.

    Args:
        input: `[..., in_features]`, float32, bfloat16 or float16, on a CPU; contiguous, but a matrix may be so in its
            last dimension alone.
        query_weight: `[num_heads * head_dim, in_features]`, dtype of input, last dimension contiguous.
        key_weight, value_weight: `[num_kv_heads * head_dim, in_features]`, likewise.
        query_bias: `[num_heads * head_dim]`, dtype of input, contiguous.
        key_bias, value_bias: `[num_kv_heads * head_dim]`, likewise.
        head_dim: divides the outputs of each weight.

    Returns:
        query: `[..., num_heads, head_dim]`, contiguous, dtype of input.
        key, value: `[..., num_kv_heads, head_dim]`, likewise.

    Raises:
        ValueError: dtype, shape, strides or device of an argument is wrong.
    """
    weights = (query_weight, key_weight, value_weight)
    with value_errors():
        query, key, value = torch.ops.paged.qkv_linear(input, *weights, query_bias, key_bias, value_bias, head_dim)
    return query, key, value


@fake("qkv_linear")
def _(
    input: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    query_bias: Tensor | None,
    key_bias: Tensor | None,
    value_bias: Tensor | None,
    head_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    check_same_device(input, query_weight=query_weight, key_weight=key_weight, value_weight=value_weight)
    check_same_device(input, query_bias=query_bias, key_bias=key_bias, value_bias=value_bias)
    query, key, value = (
        input.new_empty((*input.shape[:-1], weight.shape[0] // head_dim, head_dim))
        for weight in (query_weight, key_weight, value_weight)
    )
    return query, key, value
