"""rms_norm against float64, and against transformers' norm."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tests.assertions import assert_as_exact_as_torch, assert_rejects
from torch_paged import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 1), (3, 7), (2, 31), (4, 32), (5, 33), (300, 64), (7, 100), (9, 896), (2, 4099), (0, 8), (3, 0)]


def build(num_rows=3, size=7, *, dtype=torch.float32, seed=0):
    """Rows that are parts of wider ones, NaN beside them, each of a magnitude of its own."""
    generator = torch.Generator().manual_seed(seed)
    wider = torch.full((num_rows, size + 8), torch.nan, dtype=dtype)
    magnitudes = torch.logspace(-3, 3, max(num_rows, 1))[:num_rows, None]
    wider[:, :size] = magnitudes * torch.randn(num_rows, size, generator=generator)
    return {"input": wider[:, :size], "weight": torch.randn(size, generator=generator).to(dtype), "eps": 1e-6}


def by_transformers(input, weight, eps):
    norm = LlamaRMSNorm(len(weight), eps)
    norm.weight = torch.nn.Parameter(weight, requires_grad=False)
    return norm(input)


def exact(input, weight, eps):
    input = input.double()
    return input / (input.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_matches_reference(sizes, dtype):
    given = build(*sizes, dtype=dtype)
    out = ops.rms_norm(**given)
    assert out.dtype == dtype and out.is_contiguous()
    assert_as_exact_as_torch(out, exact(**given), by_transformers(**given))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounds_where_transformers_does(dtype):
    """Whole numbers have a mean that does not depend on the order of its sum: all bits are the same."""
    given = build(40, 64, dtype=dtype)
    given["input"] = torch.randint(-9, 9, (40, 64), generator=torch.Generator().manual_seed(1)).to(dtype)
    assert torch.equal(ops.rms_norm(**given), by_transformers(**given))


@pytest.mark.parametrize("eps", [0.0, 1e-6, 1.0])
def test_eps(eps):
    given = build() | {"eps": eps}
    assert torch.allclose(ops.rms_norm(**given).double(), exact(**given), rtol=1e-6)


def test_rows_without_a_norm():
    """As in transformers: zeros stay zeros where there is an eps, infinities are divided by one."""
    given = build(4, 40)
    for row, value in enumerate([0.0, torch.inf, torch.nan]):
        given["input"][row, 3 if row else slice(None)] = value
    out, expected = ops.rms_norm(**given), by_transformers(**given)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.allclose(out, expected, rtol=1e-6, equal_nan=True)


def test_threads_share_the_work():
    given = build(1000, 300)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 16):
            torch.set_num_threads(threads)
            results.append(ops.rms_norm(**given))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_any_number_of_dimensions():
    given = build(6)
    expected = ops.rms_norm(**given)
    for shape in [(2, 3, 7), (6, 1, 1, 7)]:
        assert torch.equal(
            ops.rms_norm(**given | {"input": given["input"].reshape(shape).contiguous()}), expected.reshape(shape)
        )
    assert torch.equal(ops.rms_norm(**given | {"input": given["input"][0]}), expected[0])


def test_opcheck():
    for dtype in DTYPES:
        torch.library.opcheck(torch.ops.paged.rms_norm.default, tuple(build(dtype=dtype).values()))


BAD = {
    "input 0-D": (lambda a: {"input": torch.tensor(1.0)}, "input: shape []; must be [..., size]"),
    "input float64": (lambda a: {"input": a["input"].double()}, "input: float64; must be float32 or bfloat16"),
    "input strides": (lambda a: {"input": torch.ones(3, 14)[:, ::2]}, "input: strides [14, 2]; must be contiguous"),
    "input 3-D strides": (
        lambda a: {"input": torch.ones(2, 7, 3).transpose(1, 2)},
        "input: strides [21, 1, 3]; must be contiguous",
    ),
    "weight 2-D": (lambda a: {"weight": torch.ones(1, 7)}, "weight: shape [1, 7]; must be 1-D [size]"),
    "weight size": (lambda a: {"weight": torch.ones(8)}, "weight: size 8 in dimension 0; must be 7 (size of input)"),
    "weight dtype": (lambda a: {"weight": a["weight"].half()}, "weight: float16; must be float32, like input"),
    "weight strides": (lambda a: {"weight": torch.ones(14)[::2]}, "weight: strides [2]; must be contiguous"),
    "weight on meta": (lambda a: {"weight": a["weight"].to("meta")}, "weight: on meta; must be on"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_rejects(change, message):
    given = build()
    assert_rejects("rms_norm", given | change(given), message)
