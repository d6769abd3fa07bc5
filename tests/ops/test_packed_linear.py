"""packed_linear against float64, and rows against the same rows in other company."""

import pytest
import torch
from torch.nn.functional import linear

from tests.assertions import assert_as_exact_as_torch, assert_rejects
from torch_paged import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Rows, inputs, outputs: each size of a tile and of a block of rows, odd numbers of inputs, panels that are not full.
SIZES = [
    (1, 64, 32),
    (3, 7, 5),
    (8, 33, 96),
    (12, 128, 70),
    (32, 16, 1),
    (41, 100, 163),
    (0, 8, 8),
    (5, 0, 40),
    (5, 8, 0),
]


def build(num_rows=3, in_features=7, out_features=5, *, dtype=torch.float32, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*sizes):
        return torch.randn(*sizes, generator=generator).to(dtype)

    # Rows of a wider tensor, as one side of a fused projection is.
    rows = random(num_rows, in_features + 8)[:, :in_features]
    return rows, random(out_features, in_features), random(out_features) if bias else None


def arguments(rows, weight, bias):
    packed = ops.pack_linear_weight(weight)
    return {"input": rows, "packed_weight": packed, "bias": bias, "out_features": weight.shape[0]}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_matches_reference(sizes, bias, dtype):
    given = build(*sizes, dtype=dtype, bias=bias)
    out = ops.packed_linear(**arguments(*given))
    exact = linear(*(None if each is None else each.double() for each in given))
    assert out.dtype == dtype and out.is_contiguous()
    assert_as_exact_as_torch(out, exact, linear(*given))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_independent_of_their_batch_deterministic(dtype):
    """To the last bit, whatever tile a row is in."""
    given = arguments(*build(41, 100, 163, dtype=dtype))
    whole = ops.packed_linear(**given)
    for first, last in ((0, 1), (3, 8), (8, 20), (33, 41)):
        part = ops.packed_linear(**given | {"input": given["input"][first:last]})
        assert torch.equal(part, whole[first:last])


def test_threads_share_the_panels():
    given = arguments(*build(4, 512, 3000))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = ops.packed_linear(**given)
        torch.set_num_threads(3)
        assert torch.equal(ops.packed_linear(**given), alone)
    finally:
        torch.set_num_threads(before)


def test_opcheck():
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(torch.ops.paged.packed_linear.default, tuple(arguments(*build(dtype=dtype)).values()))


BAD = {
    "input 3-D": (lambda a: {"input": a["input"][None]}, "input: shape [1, 3, 7]; must be 2-D [rows, in_features]"),
    "input float64": (lambda a: {"input": a["input"].double()}, "input: float64; must be float32 or bfloat16"),
    "input strides": (lambda a: {"input": torch.ones(3, 14)[:, ::2]}, "input: strides [14, 2]; must be contiguous"),
    "input wider": (lambda a: {"input": torch.ones(3, 9)}, "packed_weight: size 4 in dimension 1; must be 5"),
    "weight 2-D": (lambda a: {"packed_weight": a["packed_weight"][0]}, "packed_weight: shape [4, 64]; must be 3-D"),
    "weight dtype": (lambda a: {"packed_weight": a["packed_weight"].half()}, "packed_weight: float16; must be float32"),
    "weight on meta": (
        lambda a: {"packed_weight": a["packed_weight"].to("meta")},
        "packed_weight: on meta; must be on",
    ),
    "weight strides": (
        lambda a: {"packed_weight": torch.ones(1, 64, 4).transpose(1, 2)},
        "packed_weight: strides [256, 1, 4]; must be contiguous",
    ),
    "more outputs": (lambda a: {"out_features": 33}, "packed_weight: size 1 in dimension 0; must be 2"),
    "negative outputs": (lambda a: {"out_features": -1}, "out_features: -1; must be at least 0"),
    "bias shape": (lambda a: {"bias": torch.ones(4)}, "bias: size 4 in dimension 0; must be 5 (out_features)"),
    "bias dtype": (lambda a: {"bias": torch.ones(5).double()}, "bias: float64; must be float32, like input"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_rejects(change, message):
    given = arguments(*build())
    assert_rejects("packed_linear", given | change(given), message)


@pytest.mark.parametrize(
    ("weight", "message"),
    [(torch.ones(3), "weight: shape [3]; must be 2-D"), (torch.ones(3, 3).int(), "weight: torch.int32; must be")],
    ids=["1-D", "int32"],
)
def test_packing_rejects(weight, message):
    with pytest.raises(ValueError) as error:
        ops.pack_linear_weight(weight)
    assert str(error.value).startswith(message)
