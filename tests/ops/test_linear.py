"""linear against float64, and rows against the same rows in other company."""

import pytest
import torch
from torch.nn import functional

from tests.assertions import assert_as_exact_as_torch, assert_rejects
from torch_paged import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Rows, inputs, outputs: each number of rows in a tile, blocks of rows, inputs and outputs that are not full; other
# kernels compute up to 12 rows, 17 to 23, and some the rest up to 28 or 32, than more.
SIZES = [
    (1, 64, 32),
    (2, 40, 17),
    (3, 7, 5),
    (4, 33, 96),
    (11, 128, 70),
    (23, 128, 70),
    (32, 16, 1),
    (9, 2100, 130),
    (13, 33, 17),
    (48, 600, 40),
    (113, 7, 3),
    (131, 100, 163),
    (300, 1030, 40),
    (530, 70, 300),
    (3, 8300, 40),
    (23, 41000, 16),
    (300, 2100, 1100),
    (0, 8, 8),
    (5, 0, 40),
    (5, 8, 0),
    (70, 0, 40),
    (70, 8, 0),
]


def build(num_rows=3, in_features=7, out_features=5, *, dtype=torch.float32, bias=True, seed=0):
    """Rows and weights that are parts of wider tensors, NaN beside them."""
    generator = torch.Generator().manual_seed(seed)

    def random(rows, size):
        wider = torch.full((rows, size + 8), torch.nan, dtype=dtype)
        wider[:, :size] = torch.randn(rows, size, generator=generator)
        return wider[:, :size]

    return {
        "input": random(num_rows, in_features),
        "weight": random(out_features, in_features),
        "bias": random(1, out_features)[0] if bias else None,
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_matches_reference(sizes, bias, dtype):
    given = build(*sizes, dtype=dtype, bias=bias)
    out = ops.linear(**given)
    exact = functional.linear(*(None if each is None else each.double() for each in given.values()))
    # PyTorch's own products on AMX read what lies beside rows of a wider tensor.
    alone = (None if each is None else each.contiguous() for each in given.values())
    assert out.dtype == dtype and out.is_contiguous()
    assert_as_exact_as_torch(out, exact, functional.linear(*alone))


PARTS = {
    "few": (23, [(0, 1), (3, 8), (4, 16), (5, 23)]),
    "many": (571, [(0, 29), (15, 90), (200, 571), (534, 571)]),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_rows", "parts"), PARTS.values(), ids=PARTS)
def test_rows_are_independent_of_their_batch_deterministic(num_rows, parts, dtype):
    """To the last bit, whatever tile a row is in."""
    given = build(num_rows, 1100, 163, dtype=dtype)
    whole = ops.linear(**given)
    for first, last in parts:
        part = ops.linear(**given | {"input": given["input"][first:last]})
        assert torch.equal(part, whole[first:last])


@pytest.mark.parametrize("sizes", [(4, 512, 3000), (100, 512, 1100), (600, 512, 390), (1100, 700, 17)], ids=str)
def test_threads_share_the_work(sizes):
    given = build(*sizes)
    before = torch.get_num_threads()
    # All are kept: none finds its numbers in the memory of another.
    results = []
    try:
        for threads in (1, 2, 3, 5, 16):
            torch.set_num_threads(threads)
            results.append(ops.linear(**given))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_any_number_of_dimensions():
    given = build(bias=True)
    rows = given["input"].contiguous()
    expected = ops.linear(**given)
    for shape in [(7,), (1, 3, 7), (3, 1, 1, 7), (0, 3, 7)]:
        input = rows[: 1 if shape == (7,) else 3].reshape(shape) if 0 not in shape else rows.new_empty(shape)
        out = ops.linear(**given | {"input": input})
        assert out.shape == (*shape[:-1], 5)
        assert torch.equal(out.reshape(-1, 5), expected[: out.numel() // 5])


def test_without_bias_argument():
    given = build(bias=False)
    assert torch.equal(ops.linear(given["input"], given["weight"]), ops.linear(**given))


def test_opcheck():
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(torch.ops.paged.linear.default, tuple(build(dtype=dtype).values()))


BAD = {
    "input 0-D": (lambda a: {"input": torch.tensor(1.0)}, "input: shape []; must be [..., in_features]"),
    "input float64": (lambda a: {"input": a["input"].double()}, "input: float64; must be float32 or bfloat16"),
    "input strides": (lambda a: {"input": torch.ones(3, 14)[:, ::2]}, "input: strides [14, 2]; must be contiguous"),
    "input wider": (lambda a: {"input": torch.ones(3, 9)}, "weight: size 7 in dimension 1; must be 9"),
    "weight 1-D": (lambda a: {"weight": a["weight"][0]}, "weight: shape [7]; must be 2-D [out_features, in_features]"),
    "weight dtype": (lambda a: {"weight": a["weight"].half()}, "weight: float16; must be float32"),
    "weight on meta": (lambda a: {"weight": a["weight"].to("meta")}, "weight: on meta; must be on"),
    "weight strides": (lambda a: {"weight": torch.ones(7, 5).t()}, "weight: strides [1, 5]; must be contiguous"),
    "bias shape": (lambda a: {"bias": torch.ones(4)}, "bias: size 4 in dimension 0; must be 5 (out_features)"),
    "bias strides": (lambda a: {"bias": torch.ones(10)[::2]}, "bias: strides [2]; must be contiguous"),
    "bias dtype": (lambda a: {"bias": torch.ones(5).double()}, "bias: float64; must be float32, like input"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_rejects(change, message):
    given = build()
    assert_rejects("linear", given | change(given), message)
