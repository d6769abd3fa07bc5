"""Bad input of attention and attention_with_lse: each a ValueError that names the argument."""

import pytest
import torch

from tests.assertions import assert_rejects
from tests.paged_batch import paged_batch

OP = "attention"

# What to change in a good call, and how the error begins.
BAD_STRUCTURE = {
    "query 2-D": (lambda a: {"query": a["query"].flatten(1)}, "query: shape ["),
    "query int64": (lambda a: {"query": a["query"].long()}, "query: int64; must be float32 or bfloat16"),
    "query float16": (lambda a: {"query": a["query"].half()}, "key_cache: float32; must be float16, like query"),
    "query heads": (lambda a: {"query": a["query"][:, :3]}, "query: 3 heads; must be a multiple of num_kv_heads 2"),
    "query head_dim": (lambda a: {"query": a["query"][:, :, :8]}, "key_cache: size 16 in dimension 3; must be 8"),
    "head_dim 12": (
        lambda a: {"query": a["query"][:, :, :12], "key_cache": a["key_cache"][:, :, :, :12]},
        "query: head_dim 12; must be a multiple of 8 from 8 to 512",
    ),
    "head_dim 520": (
        lambda a: {"query": a["query"].new_empty(a["query"].shape[0], 4, 520), "key_cache": blocks(a, 4, 2, 520)},
        "query: head_dim 520; must be a multiple of 8 from 8 to 512",
    ),
    "v_head_dim 4": (lambda a: {"value_cache": a["value_cache"][:, :, :, :4]}, "value_cache: head_dim 4; must be"),
    "key_cache 3-D": (lambda a: {"key_cache": a["key_cache"].flatten(2)}, "key_cache: shape ["),
    "key_cache without heads": (
        lambda a: {"key_cache": a["key_cache"][:, :, :0], "value_cache": a["value_cache"][:, :, :0]},
        "key_cache: shape [",
    ),
    "key_cache strides": (lambda a: {"key_cache": blocks(a, 4, 2, 32)[..., ::2]}, "key_cache: strides ["),
    "value_cache transposed": (
        lambda a: {"value_cache": blocks(a, 2, 16, 4).permute(0, 3, 1, 2)},
        "value_cache: strides [128, 1, 64, 4]; must be contiguous in the last dimension",
    ),
    "value_cache dtype": (
        lambda a: {"value_cache": a["value_cache"].half()},
        "value_cache: float16; must be float32, like key_cache",
    ),
    "value_cache blocks": (lambda a: {"value_cache": a["value_cache"][1:]}, "value_cache: size "),
    "value_cache block_size": (
        lambda a: {"value_cache": a["value_cache"][:, :2]},
        "value_cache: size 2 in dimension 1; must be 4 (block_size of key_cache)",
    ),
    "value_cache heads": (
        lambda a: {"value_cache": a["value_cache"][:, :, :1]},
        "value_cache: size 1 in dimension 2; must be 2 (num_kv_heads of key_cache)",
    ),
    "block_size 3": (
        lambda a: {"key_cache": a["key_cache"][:, :3], "value_cache": a["value_cache"][:, :3]},
        "key_cache: block_size 3; must be a power of two from 1 to 256",
    ),
    "block_size 512": (
        lambda a: {"key_cache": blocks(a, 512, 2, 16), "value_cache": blocks(a, 512, 2, 16)},
        "key_cache: block_size 512; must be a power of two from 1 to 256",
    ),
    "block_table int64": (lambda a: {"block_table": a["block_table"].long()}, "block_table: int64; must be int32"),
    "block_table 1-D": (lambda a: {"block_table": a["block_table"].flatten()}, "block_table: shape ["),
    "seq_lens int64": (lambda a: {"seq_lens": a["seq_lens"].long()}, "seq_lens: int64; must be int32"),
    "seq_lens 2-D": (lambda a: {"seq_lens": a["seq_lens"][None]}, "seq_lens: shape [1, "),
    "seq_lens too many": (lambda a: {"seq_lens": torch.zeros(9).int()}, "seq_lens: size 9 in dimension 0; must be "),
    "cu_seqlens_q int64": (lambda a: {"cu_seqlens_q": a["cu_seqlens_q"].long()}, "cu_seqlens_q: int64; must be int32"),
    "cu_seqlens_q 2-D": (lambda a: {"cu_seqlens_q": a["cu_seqlens_q"][None]}, "cu_seqlens_q: shape [1, "),
    "cu_seqlens_q too many": (lambda a: {"cu_seqlens_q": torch.zeros(9).int()}, "cu_seqlens_q: size 9 in dimension 0"),
    "max_query_len": (lambda a: {"max_query_len": -1}, "max_query_len: -1; must be "),
    "sliding_window": (lambda a: {"sliding_window": -1}, "sliding_window: -1; must be "),
    "max_seq_len": (lambda a: {"max_seq_len": -1}, "max_seq_len: -1; must be "),
    "num_splits": (lambda a: {"num_splits": -1}, "num_splits: -1; must be "),
    "softcap": (lambda a: {"softcap": -0.5}, "softcap: -0.5; must be "),
    "softcap NaN": (lambda a: {"softcap": torch.nan}, "softcap: nan; must be "),
    "alibi_slopes float64": (lambda a: {"alibi_slopes": torch.ones(4).double()}, "alibi_slopes: float64; must be"),
    "alibi_slopes size": (lambda a: {"alibi_slopes": torch.ones(2)}, "alibi_slopes: size 2 in dimension 0; must be 4"),
    "sinks 2-D": (lambda a: {"sinks": torch.ones(4, 1)}, "sinks: shape [4, 1]; must be 1-D [num_heads]"),
    "sinks strides": (lambda a: {"sinks": torch.ones(8)[::2]}, "sinks: strides [2]; must be contiguous"),
    "key_scale size": (
        lambda a: {"key_scale": torch.ones(3)},
        "key_scale: shape [3]; must be [1] or [2] (num_kv_heads)",
    ),
    "value_scale float16": (lambda a: {"value_scale": torch.ones(1).half()}, "value_scale: float16; must be float32"),
}
# The strides of an empty tensor say nothing.
BAD_STRIDES = {
    "block_table strides": (lambda a: {"block_table": a["block_table"].T.contiguous().T}, "block_table: strides ["),
    "seq_lens strides": (
        lambda a: {"seq_lens": a["seq_lens"].repeat_interleave(2)[::2]},
        "seq_lens: strides [2]; must be contiguous",
    ),
    "query strides": (lambda a: {"query": torch.empty(3, 4, 32)[..., ::2]}, "query: strides [128, 32, 2]; must be "),
}
BAD_VALUES = {
    "block freed": (lambda a: {"block_table": at(a["block_table"], (0, 1), -1)}, "block_table: value -1 at [0, 1]"),
    "block too large": (lambda a: {"block_table": at(a["block_table"], (1, 0), 6)}, "block_table: value 6 at [1, 0]"),
    "block least": (
        lambda a: {"block_table": at(a["block_table"], (1, 0), -(2**31))},
        "block_table: value -2147483648",
    ),
    "seq_lens negative": (
        lambda a: {"seq_lens": at(a["seq_lens"], 1, -1)},
        "seq_lens: value -1 at [1]; must be in [0, ",
    ),
    "seq_lens too long": (
        lambda a: {"seq_lens": at(a["seq_lens"], 0, 13)},
        "seq_lens: value 13 at [0]; must be in [0, 12]",
    ),
    "seq_lens most": (lambda a: {"seq_lens": at(a["seq_lens"], 0, 2**31 - 1)}, "seq_lens: value 2147483647 at [0]"),
    "cu_seqlens_q start": (
        lambda a: {"cu_seqlens_q": at(a["cu_seqlens_q"], 0, 1)},
        "cu_seqlens_q: value 1 at [0]; must be 0",
    ),
    "cu_seqlens_q falls": (
        lambda a: {"cu_seqlens_q": torch.tensor([0, 4, 3]).int(), "max_query_len": 4},
        "cu_seqlens_q: value 3 at [2]; must be at least 4",
    ),
    "cu_seqlens_q least": (
        lambda a: {"cu_seqlens_q": torch.tensor([0, 2**31 - 1, -(2**31)]).int(), "max_query_len": 2**31},
        "cu_seqlens_q: value -2147483648 at [2]; must be",
    ),
    "cu_seqlens_q end": (
        lambda a: {"cu_seqlens_q": at(a["cu_seqlens_q"], 2, 2)},
        "cu_seqlens_q: value 2 at [2]; must be 3",
    ),
    "max_query_len": (lambda a: {"max_query_len": 1}, "max_query_len: 1; must be at least 2"),
}


def at(tensor, index, value):
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


def blocks(arguments, *sizes):
    return torch.empty(arguments["key_cache"].shape[0], *sizes)


def few_tokens(rows):
    return paged_batch(rows, block_size=4).arguments


@pytest.mark.parametrize("op", ["attention", "attention_with_lse"])
@pytest.mark.parametrize(("change", "message"), BAD_STRUCTURE.values(), ids=BAD_STRUCTURE)
def test_rejects_structure(op, change, message):
    for rows in ([(1, 5), (2, 3)], []):
        arguments = few_tokens(rows)
        assert_rejects(op, arguments | change(arguments), message)


@pytest.mark.parametrize(
    ("change", "message"),
    (BAD_STRIDES | BAD_VALUES).values(),
    ids=BAD_STRIDES | BAD_VALUES,
)
def test_rejects_values(change, message):
    arguments = few_tokens([(1, 5), (2, 3)])
    assert_rejects("attention", arguments | change(arguments), message)


@pytest.mark.parametrize("bound", [0, 1])
def test_rejects_a_bound_that_cannot_be(backend, bound):
    """Also where the lengths of the queries lie on a device, and nobody looks at them."""
    arguments = paged_batch([(1, 5), (2, 3)], block_size=4, device=backend).arguments | {"max_query_len": bound}
    assert_rejects("attention", arguments, f"max_query_len: {bound}; must be ")


@pytest.mark.parametrize("name", ["key_cache", "value_cache", "block_table", "seq_lens", "cu_seqlens_q", "sinks"])
def test_rejects_another_device(name):
    arguments = few_tokens([(1, 5), (2, 3)]) | {"sinks": torch.ones(4)}
    assert_rejects("attention", arguments | {name: arguments[name].to("meta")}, f"{name}: on meta; must be on cpu")
