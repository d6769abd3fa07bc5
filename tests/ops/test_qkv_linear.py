"""qkv_linear: the same bits as three linear layers, as heads."""

import pytest
import torch

from tests.assertions import assert_rejects
from torch_paged import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WEIGHTS = ("query", "key", "value")
# Rows, inputs, heads, KV heads, head size: few rows and many, steps of outputs that are not full, nothing of a kind.
SIZES = [
    (1, 64, 4, 2, 16),
    (3, 7, 3, 1, 5),
    (11, 128, 14, 2, 64),
    (9, 2100, 5, 5, 26),
    (40, 300, 6, 3, 24),
    (530, 70, 9, 1, 80),
    (0, 8, 2, 1, 8),
    (5, 0, 2, 1, 8),
    (70, 0, 2, 1, 8),
    (5, 8, 2, 0, 8),
    (5, 8, 0, 2, 8),
]


def build(num_rows=3, in_features=7, num_heads=3, num_kv_heads=1, head_dim=5, *, dtype=torch.float32, bias=True):
    """Rows and weights that are parts of wider tensors, NaN beside them."""
    generator = torch.Generator().manual_seed(0)

    def random(rows, size):
        wider = torch.full((rows, size + 8), torch.nan, dtype=dtype)
        wider[:, :size] = torch.randn(rows, size, generator=generator)
        return wider[:, :size]

    outputs = dict(zip(WEIGHTS, (num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim), strict=True))
    weights = {f"{name}_weight": random(size, in_features) for name, size in outputs.items()}
    biases = {f"{name}_bias": random(1, size)[0] if bias else None for name, size in outputs.items()}
    return {"input": random(num_rows, in_features), **weights, **biases, "head_dim": head_dim}


def assert_like_linear(given, out):
    for name, actual in zip(WEIGHTS, out, strict=True):
        expected = ops.linear(given["input"], given[f"{name}_weight"], given[f"{name}_bias"])
        assert actual.is_contiguous() and actual.dtype == expected.dtype
        assert torch.equal(actual, expected.unflatten(-1, (-1, given["head_dim"])) if expected.numel() else actual)
        assert actual.shape[:-2] == expected.shape[:-1] and actual.shape[-2:].numel() == expected.shape[-1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_matches_linear(sizes, bias, dtype):
    """Which is held against float64 in its own tests."""
    given = build(*sizes, dtype=dtype, bias=bias)
    assert_like_linear(given, ops.qkv_linear(**given))


@pytest.mark.parametrize("sizes", [(4, 512, 14, 2, 64), (100, 512, 14, 2, 64), (2, 64, 1, 1, 8)], ids=str)
def test_threads_share_the_work(sizes):
    """Threads end within a weight, and begin with the next."""
    given = build(*sizes)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 16):
            torch.set_num_threads(threads)
            assert_like_linear(given, ops.qkv_linear(**given))
    finally:
        torch.set_num_threads(before)


def test_any_number_of_dimensions():
    given = build(6)
    expected = ops.qkv_linear(**given)
    out = ops.qkv_linear(**given | {"input": given["input"].reshape(2, 3, 7).contiguous()})
    assert all(torch.equal(a, b.unflatten(0, (2, 3))) for a, b in zip(out, expected, strict=True))


def test_opcheck():
    torch.library.opcheck(torch.ops.paged.qkv_linear.default, tuple(build().values()))


BAD = {
    "input 0-D": (lambda a: {"input": torch.tensor(1.0)}, "input: shape []; must be [..., in_features]"),
    "input float64": (lambda a: {"input": a["input"].double()}, "input: float64; must be float32 or bfloat16"),
    "query dtype": (lambda a: {"query_weight": a["query_weight"].half()}, "query_weight: float16; must be float32"),
    "key on meta": (lambda a: {"key_weight": a["key_weight"].to("meta")}, "key_weight: on meta; must be on"),
    "value inputs": (lambda a: {"value_weight": torch.ones(5, 6)}, "value_weight: size 6 in dimension 1; must be 7"),
    "key strides": (lambda a: {"key_weight": torch.ones(7, 5).t()}, "key_weight: strides [1, 5]; must be contiguous"),
    "value heads": (
        lambda a: {"value_weight": torch.ones(6, 7), "value_bias": None},
        "value_weight: 6 out_features; must be a multiple of head_dim 5",
    ),
    "head_dim": (lambda a: {"head_dim": 0}, "head_dim: 0; must be positive"),
    "query bias": (lambda a: {"query_bias": torch.ones(4)}, "query_bias: size 4 in dimension 0; must be 15"),
    "key bias": (lambda a: {"key_bias": torch.ones(5).double()}, "key_bias: float64; must be float32, like input"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_rejects(change, message):
    given = build()
    assert_rejects("qkv_linear", given | change(given), message)
